"""Decoded samples in a few large files, so that a training crop reads its own pixels and decodes nothing.

A cache is a folder with `SPLIT-RULES.raw`, where image and labels of each sample lie one after the other as bytes, and
`SPLIT-RULES.npz`, which says where, and of which files they are; RULES is a digest of how labels are made of files, so
datasets whose classes or rules differ may lie side by side. All loader processes and ranks map the same file. What a
dataset reads from it is bit for bit what it reads from its own files: files with another date than they had, as those
of a copy, are compared by their checksums, which takes as long as reading them, until `seglight data cache` has noted
their dates.

It takes 4 bytes per pixel: 0.75 MB for an image of VOC, 8 MB for one of Cityscapes. It pays where that fits into memory
or lies on a fast disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seglight.data.archive import AnyPath, Member
from seglight.data.dataset import SemanticDataset
from seglight.data.findings import DataError, listing
from seglight.data.packed import Strings, pack_bytes
from seglight.data.store import checksum, whole

FORMAT = 2
PAGE = 4096
"""Samples begin at multiples of it."""
_SPOT = 2  # samples that are decoded and compared at every start


class Samples(NamedTuple):
    """Which samples, of which files."""

    ids: list[str]
    """See `SemanticDataset.content_id`."""
    files: list[str]
    """The ends of the paths of their files: what stays when a dataset is copied elsewhere."""
    sizes: np.ndarray
    """int64 (N, 2), bytes of up to two files."""
    times: np.ndarray
    """int64 (N, 2), when they were last changed."""
    sums: np.ndarray
    """int64 (N, 2), their CRC-32, where somebody has looked."""

    def keys(self) -> list[tuple[str, str, int, int]]:
        """What tells a sample from any other."""
        return list(zip(self.ids, self.files, *self.sizes.T.tolist(), strict=True))


class Index:
    """What lies where in one .raw file.

    Args:
        path: of the .raw file.
        rules: how labels are made, see `rules`.
    """

    def __init__(self, path: Path, rules: str):
        self.path, self.rules = path, rules
        self.samples = Samples([], [], *np.zeros((3, 0, 2), np.int64))
        self.places = np.zeros((0, 3), np.int64)
        """Where a sample begins, height and width."""
        self.end = 0
        """Bytes of the file that count."""

    @classmethod
    def load(cls, path: Path) -> Index:
        """Read the .npz beside a .raw file.

        Raises:
            DataError: it is damaged, or the .raw file is shorter than it says.
        """
        try:
            with np.load(path.with_suffix(".npz")) as file:
                found = cls(path, str(file["rules"]))
                texts = (Strings(file[name], file[f"{name}_starts"]) for name in ("ids", "files"))
                ids, files = (
                    [text.raw(i).decode(errors="surrogateescape") for i in range(len(text))] for text in texts
                )
                found.samples = Samples(ids, files, file["sizes"], file["times"], file["sums"])
                found.places, found.end = file["places"], int(file["end"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path.with_suffix('.npz')} is damaged ({error}). Delete the cache and make it again."
            ) from error
        if not path.is_file() or path.stat().st_size < found.end:
            raise DataError(f"{path} is shorter than its .npz says. Delete both and make them again.")
        return found

    def save(self) -> None:
        """Write the .npz: complete or not at all."""
        arrays = {}
        for name in ("ids", "files"):
            text = (one.encode(errors="surrogateescape") for one in getattr(self.samples, name))
            arrays[name], arrays[f"{name}_starts"] = pack_bytes(text)
        arrays |= {name: getattr(self.samples, name) for name in ("sizes", "times", "sums")}
        arrays["places"] = self.places
        with whole(self.path.with_suffix(".npz")) as file:
            np.savez(file, rules=np.array(self.rules), end=np.array(self.end), **arrays)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all samples but these."""
        rows = np.asarray(rows, np.int64)
        old = self.samples
        names = ([column[row] for row in rows.tolist()] for column in (old.ids, old.files))
        self.samples = Samples(*names, old.sizes[rows], old.times[rows], old.sums[rows])
        self.places = self.places[rows]


class Match(NamedTuple):
    """Where a cache holds the samples of a dataset."""

    file: np.ndarray
    """int64 (N,), number of the index; -1 for a sample that is not there."""
    row: np.ndarray
    """int64 (N,), in that index."""
    redated: np.ndarray
    """bool (N,): there, but of files with another date."""
    changed: list[int]
    """Samples of which the cache holds another version."""


class Cached(SemanticDataset):
    """A dataset whose pixels come from a cache; everything else is asked of the dataset itself.

    Args:
        dataset: of files.
        folder: of the cache.
        classes: names of the dataset's classes.

    Raises:
        DataError: the cache does not hold the dataset as it is now; with what has changed.
        FileNotFoundError: there is no cache.
    """

    def __init__(self, dataset: SemanticDataset, folder: str | Path, classes: Sequence[str]):
        self.dataset, self.ids = dataset, dataset.ids
        folder = Path(folder).expanduser()
        indices, samples = load(folder), describe(dataset)
        found = match(samples, rules(dataset, classes), indices)
        name = _name(dataset)
        if (found.file < 0).any():
            raise DataError(
                _stale(name, folder, dataset.ids, found, {one.rules for one in indices}, rules(dataset, classes))
            )
        self._paths = [one.path for one in indices]
        self._files = found.file.astype(np.int32)
        rows = zip(found.file.tolist(), found.row.tolist(), strict=True)
        self._places = np.array([indices[file].places[row] for file, row in rows], np.int64)
        self._maps: list[np.ndarray | None] = [None] * len(indices)
        self._compare(name, folder, differing(dataset, samples, found, indices))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": [None] * len(self._maps)}

    def view(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """As `read`, read-only: only what is looked at is fetched from the disk."""
        data = self._map(int(self._files[index]))
        begin, height, width = self._places[index].tolist()
        middle = begin + 3 * height * width
        image = data[begin:middle].reshape(height, width, 3)
        return image, data[middle : middle + height * width].reshape(height, width)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H, W, 3) RGB and labels uint8 (H, W)."""
        image, mask = self.view(index)
        return image.copy(), mask.copy()

    def files_of(self, index: int) -> tuple[AnyPath | None, ...]:
        """Those that were decoded."""
        return self.dataset.files_of(index)

    def check(self, num_classes: int) -> None:
        """Nothing: the files were checked before they were cached, and have not changed since."""

    def fingerprint(self) -> dict[str, Any]:
        """That of the dataset."""
        return self.dataset.fingerprint()

    def _map(self, number: int) -> np.ndarray:
        found = self._maps[number]
        if found is None:
            found = self._maps[number] = np.memmap(self._paths[number], np.uint8, "r").view(np.ndarray)
        return found

    def _compare(self, name: str, folder: Path, changed: list[int]) -> None:
        """Refuse what has changed; some samples are decoded to tell."""
        spots = (i for i in _spread(np.arange(len(self)), _SPOT) if i not in changed)
        changed += [i for i in spots if not all(map(np.array_equal, self.view(i), self.dataset.read(i)))]
        if changed:
            names, one = listing([self.ids[i] for i in sorted(changed)], 3), len(changed) == 1
            raise DataError(
                f"{name}: {names} {'is' if one else 'are'} not what data.cache {folder} holds of "
                f"{'it; its' if one else 'them; their'} files or the rules for {'its' if one else 'their'} labels have "
                f"changed. {_again(folder)}"
            )


def load(folder: Path) -> list[Index]:
    """All indices of a cache.

    Raises:
        FileNotFoundError: no cache.
        DataError: a damaged one.
    """
    try:
        made = json.loads((folder / "cache.json").read_text())
    except ValueError as error:
        raise DataError(f"{folder}/cache.json is damaged ({error}). Delete the cache and make it again.") from error
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"There is no cache in {folder} (data.cache). Make it: seglight data cache SOURCE --out {folder}"
        ) from None
    if made.get("format") != FORMAT:
        raise DataError(f"{folder} was made by another version of seglight. Delete it and make it again.")
    return [Index.load(path.with_suffix(".raw")) for path in sorted(folder.glob("*.npz"))]


def describe(dataset: SemanticDataset) -> Samples:
    """The samples of a dataset and the state of their files, if they are files.

    Raises:
        FileNotFoundError: naming all files that are missing.
    """
    count, missing = len(dataset), []
    sizes, times, files = np.zeros((count, 2), np.int64), np.zeros((count, 2), np.int64), [""] * count
    for index in range(count):
        pair = dataset.files_of(index)
        for kind, path in enumerate(pair):
            if path is not None:
                try:
                    sizes[index, kind], times[index, kind] = _state(path)
                except FileNotFoundError:
                    missing.append(path)
        files[index] = " ".join("/".join(str(path).replace(os.sep, "/").split("/")[-3:]) for path in pair)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} files of {_name(dataset)} are missing: {listing(missing)}. Copy the dataset again, or "
            "take the samples out of the split."
        )
    ids = [dataset.content_id(index) for index in range(count)]
    return Samples(ids, files, sizes, times, np.zeros((count, 2), np.int64))


def checksums(dataset: SemanticDataset, index: int) -> tuple[int, int]:
    """CRC-32 of the files of a sample, 0 for one that it lacks."""
    first, second, *_ = (*(_checksum(path) for path in dataset.files_of(index)), 0, 0)
    return first, second


def _checksum(path: AnyPath | None) -> int:
    if path is None:
        return 0
    if isinstance(path, Member):
        return path.checksum()
    try:
        return checksum(path)
    except NotADirectoryError:  # as in `_state`
        return _large_checksum(path.parent, *_state(path))


@lru_cache(maxsize=4)
def _large_checksum(path: Path, size: int, time: int) -> int:
    """Of a file in this state, for all samples in it."""
    return checksum(path)


def _name(dataset: SemanticDataset) -> str:
    return getattr(dataset, "name", type(dataset).__name__)


def _state(path: AnyPath) -> tuple[int, int]:
    """Bytes and time of change."""
    try:
        state = path.stat()
    except NotADirectoryError:  # a mask inside a file of many, FILE/NAME: it changes with that file
        state = path.parent.stat()
    return state.st_size, state.st_mtime_ns


def rules(dataset: SemanticDataset, classes: Sequence[str]) -> str:
    """How labels are made of files, as a digest; of data without files, everything that identifies it."""
    from seglight.data.mixed import MixedDataset  # which needs `Cached`

    dataset = dataset.dataset if isinstance(dataset, Cached) else dataset
    facts: dict[str, Any] = {"kind": type(dataset).__qualname__, "classes": list(classes)}
    for name in ("lut", "colours"):
        value = getattr(dataset, name, None)
        facts[name] = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(dataset, MixedDataset):
        facts["parts"] = {name: rules(part, ()) for name, part in dataset.data.items()}
        facts["tables"] = {name: None if table is None else table.tolist() for name, table in dataset.tables.items()}
    elif not hasattr(dataset, "image_paths"):
        facts["fingerprint"] = dataset.fingerprint()
    if isinstance(labels := getattr(dataset, "labels", None), np.ndarray):
        facts["labels"] = hashlib.sha256(labels.tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def match(samples: Samples, rule: str, indices: Sequence[Index]) -> Match:
    """Look samples up in the indices with the same rules."""
    known = {
        key: (number, row)
        for number, index in enumerate(indices)
        if index.rules == rule
        for row, key in enumerate(index.samples.keys())
    }
    same = [index for index in indices if index.rules == rule] or indices
    names = {name for index in same for name in index.samples.ids}
    count = len(samples.ids)
    file, row = np.full(count, -1), np.full(count, -1)
    redated, changed = np.zeros(count, bool), []
    for place, key in enumerate(samples.keys()):
        if key in known:
            file[place], row[place] = number, at = known[key]
            redated[place] = (indices[number].samples.times[at] != samples.times[place]).any()
        elif key[0] in names:
            changed.append(place)
    return Match(file, row, redated, changed)


def differing(dataset: SemanticDataset, samples: Samples, found: Match, indices: Sequence[Index]) -> list[int]:
    """Samples of files with another date whose content is another, too. Notes the checksums of all redated ones."""
    redated = np.flatnonzero(found.redated).tolist()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for number, sums in zip(redated, pool.map(lambda one: checksums(dataset, one), redated), strict=True):
            samples.sums[number] = sums
    known = (indices[found.file[number]].samples.sums[found.row[number]] for number in redated)
    return [number for number, sums in zip(redated, known, strict=True) if (samples.sums[number] != sums).any()]


def _stale(name: str, folder: Path, ids: Sequence[str], found: Match, seen: set[str], rule: str) -> str:
    changed = set(found.changed)
    absent = [ids[i] for i in np.flatnonzero(found.file < 0).tolist() if i not in changed]
    parts = []
    if changed and rule not in seen:
        parts.append("the classes or the rules for labels are others")
    elif changed:
        parts.append(f"{len(changed)} samples have changed since ({listing([ids[i] for i in found.changed], 3)})")
    if absent:
        parts.append(f"{len(absent)} of {len(ids)} samples are not in it ({listing(absent, 3)})")
    return f"{name}: data.cache {folder} is not of this data: {'; '.join(parts)}. {_again(folder)}"


def _again(folder: Path) -> str:
    return (
        f"Bring it up to date with `seglight data cache SOURCE --out {folder}`, SOURCE being what you train on, or "
        "leave data.cache out."
    )


def _spread(numbers: np.ndarray, count: int) -> Iterator[int]:
    """Up to `count` of some numbers, from the first to the last."""
    places = np.unique(np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int))
    return iter(numbers[places].tolist())
