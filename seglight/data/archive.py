"""Files inside zip archives as samples, so that a dataset is read straight from what was downloaded.

A `Member` stands where a `pathlib.Path` stands: it has a name, a parent, a size and bytes. The directory of an archive
is read once and kept in a few flat arrays. Reads give the offset with the request (pread), so threads and forked
workers share one open file without moving each other's position.
"""

from __future__ import annotations

import os
import struct
import zipfile
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from zlib_ng import zlib_ng

from seglight.data.findings import DataError
from seglight.data.packed import Packed, Strings, pack_bytes

_LOCAL = struct.Struct("<4s22xHH")  # header of a member: mark, ..., length of its name and of its extra field
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Stat(NamedTuple):
    """What `Member.stat` knows."""

    st_size: int
    """Bytes, unpacked."""
    st_mtime_ns: int
    """Of the archive."""


class Archive:
    """The directory of a zip file.

    Args:
        path: the file.

    Raises:
        DataError: no zip file, or a cut-off one.
        FileNotFoundError: no such file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        state = self.path.stat()
        self.state = (state.st_size, state.st_mtime_ns)
        try:
            with zipfile.ZipFile(self.path) as file:
                members = {one.filename.encode(): one for one in file.infolist() if not one.is_dir()}
                found = sorted(members.items())  # of a name that is there twice the last counts
        except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
            raise DataError(
                f"{self.path}: no zip archive, or its end is missing ({error}). Download it again; a download that "
                "was interrupted looks like this."
            ) from error
        names, starts = pack_bytes(name for name, _ in found)
        columns = {
            "offset": np.array([one.header_offset for _, one in found], np.int64),
            "packed": np.array([one.compress_size for _, one in found], np.int64),
            "size": np.array([one.file_size for _, one in found], np.int64),
            "crc": np.array([one.CRC for _, one in found], np.uint32),
            "method": np.array([one.compress_type for _, one in found], np.int16),
            "encrypted": np.array([one.flag_bits & 1 for _, one in found], bool),
        }
        self.table = Packed(names=names, starts=starts, **columns)
        self._file = self._open()

    def __len__(self) -> int:
        return len(self.table.offset)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = self._open()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def _open(self) -> int:
        file = os.open(self.path, os.O_RDONLY)
        state = os.fstat(file)
        if (state.st_size, state.st_mtime_ns) != self.state:
            os.close(file)
            raise DataError(f"{self.path} has changed since its directory was read. Start again.")
        return file

    @property
    def names(self) -> Strings:
        """All members, sorted."""
        return Strings(self.table.names, self.table.starts)

    def index(self, name: str) -> int:
        """The place of a member.

        Raises:
            FileNotFoundError: there is none of that name.
        """
        names, low, high = self.names, 0, len(self)
        wanted = name.encode()
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if names[middle].encode() < wanted else (low, middle)
        if low == len(self) or names[low] != name:
            raise FileNotFoundError(f"{self.path} holds no {name}.")
        return low

    def member(self, name: str) -> Member:
        """The file of that name.

        Raises:
            FileNotFoundError: there is none.
        """
        return Member(self, self.index(name))

    def below(self, folder: str) -> dict[str, Member]:
        """Files below a folder, by their path relative to it, sorted."""
        names, prefix = self.names, folder.strip("/") + "/"
        found = ((i, name) for i, name in enumerate(names) if name.startswith(prefix))
        return {name[len(prefix) :]: Member(self, i) for i, name in found if not _clutter(name)}

    def read(self, index: int) -> bytes:
        """A member, unpacked, its checksum compared.

        Raises:
            DataError: encrypted, packed by another method, or damaged.
        """
        table, begin = self.table, self._begin(index)
        data = self._bytes(begin, int(table.packed[index]))
        if table.method[index] == zipfile.ZIP_DEFLATED:
            data = self._inflated(index, data, int(table.size[index]))
        if len(data) != table.size[index] or zlib_ng.crc32(data) != table.crc[index]:
            raise DataError(f"{self._where(index)}: damaged, its checksum differs. Download the archive again.")
        return data

    def ends(self, index: int, first: int, last: int) -> tuple[bytes, bytes | None]:
        """The first bytes of a member and the last ones; None for those of a deflated one, which lie behind all others.

        Raises:
            DataError: as `read`, but the checksum is not looked at.
        """
        table, begin = self.table, self._begin(index)
        packed = int(table.packed[index])
        head = self._bytes(begin, min(first, packed))
        if table.method[index] == zipfile.ZIP_DEFLATED:
            return self._inflated(index, head, first), None
        return head, self._bytes(begin + max(0, packed - last), min(last, packed))

    def _begin(self, index: int) -> int:
        """Where the packed bytes of a member begin, once it is clear that they can be read."""
        method, offset = int(self.table.method[index]), int(self.table.offset[index])
        if self.table.encrypted[index]:
            raise DataError(
                f"{self._where(index)}: encrypted. Unpack the archive with its password, and remove the archive."
            )
        if method not in _METHODS:
            raise DataError(
                f"{self._where(index)}: packed by method {method}; only stored and deflated members are read. Unpack "
                "the archive, and remove it."
            )
        header = self._bytes(offset, _LOCAL.size)
        if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
            raise DataError(
                f"{self._where(index)}: not where the directory of the archive says. Download the archive again."
            )
        _, name, extra = _LOCAL.unpack(header)
        return offset + _LOCAL.size + name + extra

    def _inflated(self, index: int, data: bytes, length: int) -> bytes:
        """The first bytes of a deflated member, from the first packed ones."""
        try:
            return zlib_ng.decompressobj(-15).decompress(data, max(1, length))
        except zlib_ng.error as error:
            raise DataError(
                f"{self._where(index)}: cannot be unpacked ({error}). Download the archive again."
            ) from error

    def _where(self, index: int) -> str:
        return f"{self.path}/{self.names[index]}"

    def _bytes(self, offset: int, length: int) -> bytes:
        parts = []
        while length > 0 and (part := os.pread(self._file, length, offset)):  # the kernel may return less than asked
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Member:
    """A file in an archive; it can be read wherever datasets expect a `pathlib.Path`."""

    __slots__ = ("archive", "place")

    def __init__(self, archive: Archive, place: int):
        self.archive, self.place = archive, place

    def __str__(self) -> str:
        return f"{self.archive.path}/{self.archive.names[self.place]}"

    def __repr__(self) -> str:
        return f"Member({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Member) and str(self) == str(other)

    def __lt__(self, other: Member | Path) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.archive.names[self.place])

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self._pure.name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self._pure.stem

    @property
    def suffix(self) -> str:
        """The suffix of the name."""
        return self._pure.suffix

    @property
    def parent(self) -> Path:
        """The folder, as if the archive were one."""
        return Path(str(self)).parent

    def stat(self) -> Stat:
        """Its size, unpacked, and the archive's time."""
        return Stat(int(self.archive.table.size[self.place]), self.archive.state[1])

    def checksum(self) -> int:
        """CRC-32 of its content, as the archive says."""
        return int(self.archive.table.crc[self.place])

    def is_file(self) -> bool:
        """Always: only files are members."""
        return True

    exists = is_file

    def read_bytes(self) -> bytes:
        """Its content; see `Archive.read`."""
        return self.archive.read(self.place)

    def ends(self, first: int, last: int) -> tuple[bytes, bytes | None]:
        """Its first and last bytes; see `Archive.ends`."""
        return self.archive.ends(self.place, first, last)

    def read_text(self, encoding: str = "utf-8") -> str:
        """Its content as text."""
        return self.read_bytes().decode(encoding)


AnyPath = Path | Member
"""A file on disk or in an archive."""


@lru_cache(maxsize=8)
def _opened(path: Path, size: int, mtime: int) -> Archive:
    return Archive(path)


def opened(path: Path) -> Archive:
    """The archive, its directory read once per process and state of the file."""
    state = path.stat()
    return _opened(path, state.st_size, state.st_mtime_ns)


def files_below(root: Path, folder: str, archives: tuple[str, ...]) -> dict[str, AnyPath] | None:
    """Files below a folder of a dataset, by their path relative to it; None if neither folder nor archive has it.

    A folder on disk counts before an archive.

    Args:
        root: of the dataset; archives lie there.
        folder: relative to the root, and to the top of an archive.
        archives: names of the zip files that may hold it.
    """
    if (place := root / folder).is_dir():
        walk = os.walk(place, followlinks=True)
        names = (os.path.relpath(here, place) + "/" + name for here, _, names in walk for name in names)
        return {name: place / name for name in sorted(name.removeprefix("./") for name in names) if not _clutter(name)}
    for name in archives:
        if (root / name).is_file() and (found := opened(root / name).below(folder)):
            return found
    return None


def sources(*groups: Any) -> list[str]:
    """Names of the archives that paths of some lists lie in, sorted; [] for files on disk."""
    return sorted({path.archive.path.name for paths in groups for path in paths if isinstance(path, Member)})


def _clutter(name: str) -> bool:
    """Hidden files, and those that a Mac puts into archives."""
    return PurePosixPath(name).name.startswith(".")
