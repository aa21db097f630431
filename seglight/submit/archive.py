"""Zip and tgz archives of results: written whole or not at all, and read without unpacking them to the disk."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType

from seglight.data.findings import DataError

LARGEST = 1 << 30
"""Bytes of one file in an archive, unpacked, that are read at most."""
_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can hold: equal predictions give equal archives


class Writer:
    """Adds files to a new archive.

    Args:
        path: of the archive.
        tgz: tar with gzip rather than zip.
    """

    def __init__(self, path: Path, tgz: bool):
        self._zip = None if tgz else zipfile.ZipFile(path, "w")
        self._tar = tarfile.open(path, "w:gz", compresslevel=1) if tgz else None  # noqa: SIM115 closed by `close`

    def add(self, name: str, content: bytes) -> None:
        """One file. PNGs are packed already; anything else is deflated in a zip."""
        if self._tar is not None:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            self._tar.addfile(entry, io.BytesIO(content))
        else:
            entry = zipfile.ZipInfo(name, _TIME)
            entry.external_attr = 0o644 << 16
            method = zipfile.ZIP_STORED if name.endswith(".png") else zipfile.ZIP_DEFLATED
            self._zip.writestr(entry, content, method)

    def close(self) -> None:
        """Write the end."""
        (self._tar or self._zip).close()


class Reader:
    """The files of an archive, by name. Links and devices count as files without content.

    Args:
        path: a zip or a tar, packed or not.
        name: that it will have, if not yet that of its file.

    Raises:
        DataError: neither, or cut off.
        FileNotFoundError: no such file.
    """

    def __init__(self, path: str | Path, name: str | None = None):
        self.path = Path(path)
        self.name = name or self.path.name
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no archive {self.path}.")
        self._zip = self._tar = None
        try:
            if zipfile.is_zipfile(self.path):
                self._zip = zipfile.ZipFile(self.path)
                self._entries = [entry for entry in self._zip.infolist() if not entry.is_dir()]
                self.names = [entry.filename for entry in self._entries]
            else:
                self._tar = tarfile.open(self.path)  # noqa: SIM115 closed at the end of the block
                self._entries = [entry for entry in self._tar.getmembers() if not entry.isdir()]
                self.names = [entry.name.removeprefix("./") for entry in self._entries]
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error) as error:
            self.close()
            reason = str(error).partition("\n")[0].rstrip(":")  # tarfile adds a line for each way to pack
            raise DataError(f"{self.path} is no whole zip or tar archive ({reason}).") from error

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        for one in (self._zip, self._tar):
            if one is not None:
                one.close()

    def __iter__(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Name and a function that reads the content, in the order of the archive, in which reading is fast."""
        for index, name in enumerate(self.names):
            yield name, lambda index=index: self._content(index)

    def read(self, name: str) -> bytes:
        """The content of the file of that name, the first one if there are several.

        Raises:
            DataError: damaged, or no plain file.
            KeyError: there is none.
        """
        if name not in self._places:
            raise KeyError(name)
        return self._content(self._places[name])

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in reversed(list(enumerate(self.names)))}

    def _content(self, index: int) -> bytes:
        name, entry = self.names[index], self._entries[index]
        size = entry.file_size if self._zip is not None else entry.size
        if self._tar is not None and not entry.isreg():
            raise DataError(f"{name}: a link or device, not a file")
        if size > LARGEST:
            raise DataError(f"{name}: {size:,} bytes, too large to be a result")
        try:
            with self._zip.open(entry) if self._zip is not None else self._tar.extractfile(entry) as source:
                return source.read()
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, RuntimeError, zlib.error) as error:
            raise DataError(f"{name}: cannot be read ({error})") from error


@contextmanager
def new_archive(path: Path, tgz: bool) -> Iterator[tuple[Writer, Path]]:
    """A writer, and where it writes until all is well: the file gets its name when the block ends without an error.

    Raises:
        FileExistsError: there is one of that name. Nothing is overwritten.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists. Nothing is overwritten: choose another --out.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    writer = Writer(part, tgz)
    try:
        yield writer, part
        if path.exists():  # made meanwhile
            raise FileExistsError(f"{path} exists. Nothing is overwritten: choose another --out.")
        part.rename(path)
    finally:
        writer.close()
        part.unlink(missing_ok=True)
