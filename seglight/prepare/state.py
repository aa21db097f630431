"""What is there of a dataset, and what is still to be done. Reads names, sizes and lists; writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seglight.prepare.download import Download
from seglight.prepare.folder import OWN, Record
from seglight.prepare.recipe import Archive, Count, Recipe


@dataclass(frozen=True)
class Options:
    """How to prepare.

    Args:
        mirrors: addresses that have the archives by their official names; they replace the official servers.
        source: a further folder to take archives from; it is only read.
        parts: optional parts.
        verify: compare sizes, checksums and counts with the official ones.
        unpack: unpack what could be read as it is, too.
        remove: remove archives from the dataset's folder once their content is there and verified.
    """

    mirrors: Sequence[str] = ()
    source: Path | None = None
    parts: Sequence[str] = ()
    verify: bool = True
    unpack: bool = False
    remove: bool = False


@dataclass(frozen=True)
class State:
    """What is there of one archive.

    Args:
        archive: which.
        found: the number of each of its counts.
        file: the archive itself, in the dataset's folder or in `Options.source`; None if it is in neither.
        part: bytes of it that have been downloaded.
        moving: it is unpacked, and moving its files to their places was interrupted.
        differs: files that were there before and are of another size than the archive's: now, and in the archive.
        todo: something has to be fetched, checked or unpacked.
        read: the DataModule reads the file itself.
    """

    archive: Archive
    found: list[int]
    file: Path | None
    part: int
    moving: bool
    differs: dict[str, tuple[int, int]]
    todo: bool
    read: bool

    @property
    def complete(self) -> bool:
        """Nothing is left to do, for us or for a person."""
        return not self.todo and not self.differs

    def wrong(self) -> list[tuple[Count, int]]:
        """Counts that are not the official ones, and what was counted."""
        pairs = zip(self.archive.counts, self.found, strict=True)
        return [(count, number) for count, number in pairs if not count.fits(number)]


def survey(recipe: Recipe, root: Path, options: Options) -> list[State]:
    """The state of each chosen archive."""
    record = Record(root)
    return [_state(archive, root, record[archive.name], options) for archive in recipe.chosen(options.parts)]


def _state(archive: Archive, root: Path, entry: dict[str, Any], options: Options) -> State:
    found = archive.unpacked(root) if options.unpack else archive.counted(root)
    here = place(archive, root)
    files = [here, *([options.source / archive.name] if options.source else [])]
    file = next((path for path in files if path.is_file()), None)
    moving = own(root, archive, "unpacked").is_dir()
    sizes = {name: (_size(root / name), size) for name, size in (entry.get("differs") or {}).items()}
    enough = _enough(archive, found, entry, options)
    todo = not enough or any(now is None for now, _ in sizes.values())
    read = file == here and (archive.plain or (as_it_is(archive, options) and found != archive.unpacked(root)))
    if read:
        todo |= not _checked(archive, here, entry, options)
    differs = {name: (now, size) for name, (now, size) in sizes.items() if now is not None and now != size}
    return State(archive, found, file, Download(here, ()).done, moving, differs, todo or moving, read)


def place(archive: Archive, root: Path) -> Path:
    """Where the file lies in the dataset's folder."""
    return root / archive.into / archive.name if archive.plain else root / archive.name


def own(root: Path, archive: Archive, kind: str) -> Path:
    """A folder of ours for the content of an archive: "unpacking" until all of it is there, then "unpacked"."""
    return root / OWN / f"{archive.name}.{kind}"


def as_it_is(archive: Archive, options: Options) -> bool:
    """Whether a zip in the dataset's folder need not be unpacked."""
    return archive.zipped is not None and not options.unpack


def _enough(archive: Archive, found: list[int], entry: dict[str, Any], options: Options) -> bool:
    """Whether all files are there: the official number, or without verification as many as last time, or any."""
    if options.verify:
        return all(count.fits(number) for count, number in zip(archive.counts, found, strict=True))
    last = entry.get("counts") or [1] * len(found)
    return len(last) == len(found) and all(number >= before for number, before in zip(found, last, strict=True))


def _checked(archive: Archive, file: Path, entry: dict[str, Any], options: Options) -> bool:
    """Whether the file needs no comparison with an official checksum, or had it."""
    if not options.verify or (archive.digest is None and archive.size is None):
        return True
    return bool(entry.get("verified")) and entry.get("bytes") == _size(file)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
