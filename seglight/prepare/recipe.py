"""What a dataset consists of: its archives, and what each must leave in the folder."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch, fnmatchcase
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Count:
    """A number of files or lines that the official data has.

    Args:
        what: in a person's words: "training images".
        path: pattern of the files ("train/*/*.png"), or a list file, relative to the folder of the archive's content.
        expected: the number.
        lines: count the lines of a list file rather than files.
        pages: count the pages of a TIFF rather than files.
        more: more is fine: another archive adds some.
        instead: pattern of files that the DataModule reads in place of it.
    """

    what: str
    path: str
    expected: int
    lines: bool = False
    pages: bool = False
    more: bool = False
    instead: str = ""

    def fits(self, found: int) -> bool:
        """Whether that is the official number."""
        return found == self.expected or (self.more and found > self.expected)

    def below(self, folder: Path) -> int:
        """The number in a folder."""
        if self.lines:
            path = folder / self.path
            return _lines(path.read_bytes()) if path.is_file() else 0
        found = _pages(folder / self.path) if self.pages else _files(folder, self.path.split("/"))
        return max(found, _files(folder, self.instead.split("/")) if self.instead else 0)

    def inside(self, archive: Path, top: str) -> int:
        """The number below a folder of a zip file; 0 if it is damaged."""
        parts = [*filter(None, top.split("/")), *self.path.split("/")]
        state = archive.stat()
        if self.lines:
            return _lines_inside(archive, "/".join(parts))
        names = (name.split("/") for name in _names(archive, state.st_size, state.st_mtime_ns))
        return sum(len(name) == len(parts) and all(map(fnmatchcase, name, parts)) for name in names)


def _lines(text: bytes) -> int:
    return sum(bool(line.strip()) for line in text.splitlines())


def _lines_inside(archive: Path, name: str) -> int:
    try:
        with zipfile.ZipFile(archive) as file:
            return _lines(file.read(name))
    except (zipfile.BadZipFile, NotImplementedError, KeyError):
        return 0


def _pages(path: Path) -> int:
    """Of a TIFF; 0 for one that cannot be read to its end."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.n_frames
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        return 0


def _files(folder: Path, parts: list[str]) -> int:
    pattern, *rest = parts
    if rest and not set(pattern) & set("*?["):
        return _files(folder / pattern, rest)
    if not folder.is_dir():
        return 0
    names = [name for name in os.listdir(folder) if fnmatch(name, pattern) and not name.startswith(".")]
    return sum(_files(folder / name, rest) for name in names) if rest else len(names)


@lru_cache(maxsize=8)
def _names(archive: Path, size: int, mtime: int) -> tuple[str, ...]:
    try:
        with zipfile.ZipFile(archive) as file:
            return tuple(file.namelist())
    except (zipfile.BadZipFile, NotImplementedError):
        return ()


@dataclass(frozen=True)
class Archive:
    """A file as the official server has it.

    Args:
        name: its name.
        counts: what must be there when it is unpacked.
        urls: servers, in this order; none where a login is needed, so that a person has to put it there.
        page: where a person gets it, and reads the terms.
        size: bytes, exactly; None where no source is sure enough to refuse another number.
        about: bytes, roughly, for people.
        digest: as of `seglight.prepare.download.Download`; None where none could be confirmed.
        bases: folders below the root in which the content may lie, the first being where unpacking puts it.
        into: folder below the root to unpack into.
        take: as of `seglight.prepare.unpack.unpack`.
        part: name of the optional part that it belongs to; "" belongs to every preparation.
        zipped: folder in the zip that stands for the first of `bases`, if the DataModule reads it without unpacking.
        plain: it is no archive but a file of the dataset itself.
    """

    name: str
    counts: tuple[Count, ...] = ()
    urls: tuple[str, ...] = ()
    page: str = ""
    size: int | None = None
    about: float = 0.0
    digest: str | None = None
    bases: tuple[str, ...] = ("",)
    into: str = ""
    take: str = ""
    part: str = ""
    zipped: str | None = None
    plain: bool = False

    @property
    def bytes(self) -> float:
        """Its size, exactly or roughly."""
        return self.size or self.about

    def counted(self, root: Path) -> list[int]:
        """What is there of each of `counts`: unpacked, or in the zip where that is read as it is; whichever is more."""
        tables = [self.unpacked(root)]
        if self.zipped is not None and (root / self.name).is_file():
            tables.append([count.inside(root / self.name, self.zipped) for count in self.counts])
        return max(tables, key=_most)

    def unpacked(self, root: Path) -> list[int]:
        """What is there of each of `counts` in the one of `bases` that has most."""
        return max(([count.below(root / base) for count in self.counts] for base in self.bases), key=_most)


def _most(table: list[int]) -> tuple[int, int]:
    return sum(map(bool, table)), sum(table)


@dataclass(frozen=True)
class Recipe:
    """A dataset.

    Args:
        name: of `seglight data prepare NAME`.
        title: in people's words.
        folder: usual name of its folder.
        reader: class in `seglight.data` that reads it.
        archives: what it consists of.
        extras: what each optional part is, by name.
        note: what else a person should know, one sentence.
    """

    name: str
    title: str
    folder: str
    reader: str
    archives: tuple[Archive, ...]
    extras: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def home(self) -> Path:
        """Where its DataModule looks without being told: $SEGLIGHT_DATA or ./data, and there the usual name."""
        return Path(os.environ.get("SEGLIGHT_DATA") or "data") / self.folder

    def chosen(self, parts: Sequence[str] = ()) -> tuple[Archive, ...]:
        """The archives of some optional parts and of those that are not optional."""
        return tuple(archive for archive in self.archives if not archive.part or archive.part in parts)
