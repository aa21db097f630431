"""Makes a cache of decoded samples, see `seglight.data.cache`: planned, then written by many threads into few files."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seglight.data.cache import FORMAT, PAGE, Index, Samples, checksums, describe, differing, load, match, rules
from seglight.data.dataset import SemanticDataset
from seglight.data.decode import probe
from seglight.data.findings import DataError
from seglight.data.store import alone, whole

_SAVED = 10.0  # seconds between two notes of how far it came
_SAMPLED = 8  # samples that are decoded to guess the size of those that are not files
_SPARE = 1.02  # file systems need more than the bytes of a file


@dataclass
class Part:
    """What is to be written for one split."""

    split: str
    dataset: SemanticDataset
    rules: str
    samples: Samples
    todo: list[int]
    """Samples that the cache does not hold yet."""
    redated: list[int]
    """Samples that it holds, of files with another date."""
    bytes: int
    """That those to do will take."""

    @property
    def count(self) -> int:
        """Samples, each once."""
        return len(set(self.samples.keys()))


def plan(datasets: Mapping[str, SemanticDataset], classes: list[str], folder: Path) -> list[Part]:
    """What a cache lacks.

    Args:
        datasets: by split.
        classes: names of their classes.
        folder: of the cache; it need not exist.

    Raises:
        DataError: the folder holds something else, or a damaged cache.
    """
    indices = []
    if (folder / "cache.json").exists():
        indices = load(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is no cache, and something is in the way there. Name another folder: --out DIR.")
    parts, seen = [], set()
    for split, dataset in datasets.items():
        samples, rule = describe(dataset), rules(dataset, classes)
        found, todo = match(samples, rule, indices), []
        changed = set(differing(dataset, samples, found, indices))
        for number, key in enumerate(samples.keys()):
            if (found.file[number] < 0 or number in changed) and (rule, key) not in seen:
                seen.add((rule, key))
                todo.append(number)
        redated = [number for number in np.flatnonzero(found.redated).tolist() if number not in changed]
        parts.append(Part(split, dataset, rule, samples, todo, redated, _size(dataset, todo)))
    return parts


def write(
    parts: Iterable[Part], folder: Path, progress: Callable[[Iterable[Any], Part], Iterable[Any]] | None = None
) -> None:
    """Write what is planned. An interrupted call loses a few seconds of work: call `plan` again and go on.

    Args:
        parts: of `plan`.
        folder: of the cache; made if it is not there.
        progress: wraps the samples of a part on their way to the disk, as tqdm does.

    Raises:
        BlockingIOError: another process is writing to this cache.
        DataError: a sample that cannot be read; what was written before it stays.
        OSError: no space left on the disk.
    """
    parts = [part for part in parts if part.todo or part.redated]
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(part.bytes for part in parts), shutil.disk_usage(folder).free
    if needed * _SPARE > free:
        raise DataError(
            f"The cache needs {needed / 1e9:.1f} GB more, and the disk of {folder} has {free / 1e9:.1f} GB free. Make "
            "room, name a folder on another disk (--out), or cache fewer splits (--split)."
        )
    try:
        with alone(folder / "lock", wait=False):
            with whole(folder / "cache.json") as file:
                file.write(json.dumps({"format": FORMAT}).encode())
            _redate(parts, folder)
            for part in parts:
                if part.todo:
                    path = folder / f"{part.split}-{part.rules[:12]}.raw"
                    _write_part(part, path, progress or (lambda done, _: done))
    except BlockingIOError:
        raise BlockingIOError(f"Another process is writing to {folder}. Wait for it, or name another folder.") from None


def _redate(parts: list[Part], folder: Path) -> None:
    """Note the dates of files whose content is what it was."""
    times = {}
    for part in parts:
        keys = part.samples.keys()
        for number in part.redated:
            times[(part.rules, keys[number], *part.samples.sums[number].tolist())] = part.samples.times[number]
    for index in load(folder) if times else ():
        samples = index.samples
        looks = [(index.rules, *look) for look in zip(samples.keys(), *samples.sums.T.tolist(), strict=True)]
        if rows := [row for row, look in enumerate(looks) if look in times]:
            samples.times[rows] = [times[looks[row]] for row in rows]
            index.save()


def _write_part(part: Part, path: Path, progress: Callable[[Iterable[Any], Part], Iterable[Any]]) -> None:
    index = _begin(part, path)
    rows: list[tuple[int, int, int, int]] = []  # of each sample: its number, where it begins, height and width
    with open(path, "r+b" if path.exists() else "w+b") as file:
        file.truncate(index.end)  # what lies behind was being written when somebody stopped it
        file.seek(index.end)
        position, saved = index.end, time.monotonic()

        def save() -> None:
            file.flush()
            os.fsync(file.fileno())
            _append(index, part, rows, position)
            index.save()

        try:
            for number, image, mask in progress(_decoded(part), part):
                place = -position % PAGE
                file.write(bytes(place))
                file.write(np.ascontiguousarray(image))
                file.write(np.ascontiguousarray(mask))
                rows.append((number, position + place, *mask.shape))
                position += place + 4 * mask.size
                if time.monotonic() - saved > _SAVED:
                    save()
                    saved = time.monotonic()
        finally:
            file.truncate(position)
            save()


def _begin(part: Part, path: Path) -> Index:
    """The index as it is, without samples that are to be written anew."""
    if not path.with_suffix(".npz").exists():
        return Index(path, part.rules)
    index = Index.load(path)
    keys = part.samples.keys()
    again = {keys[number][:2] for number in part.todo}
    index.keep([row for row, key in enumerate(index.samples.keys()) if key[:2] not in again])
    return index


def _append(index: Index, part: Part, rows: list[tuple[int, int, int, int]], end: int) -> None:
    """Take the samples that were written into the index."""
    old, new = index.samples, part.samples
    numbers = np.array([number for number, *_ in rows], np.int64)
    index.samples = Samples(
        old.ids + [new.ids[i] for i in numbers],
        old.files + [new.files[i] for i in numbers],
        *(np.concatenate([known, more[numbers]]) for known, more in zip(old[2:], new[2:], strict=True)),
    )
    index.places = np.concatenate([index.places, np.array([row[1:] for row in rows], np.int64).reshape(-1, 3)])
    index.end = end
    rows.clear()


def _decoded(part: Part) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number, image and labels of samples, in order; decoders run side by side, since they let go of Python's lock."""
    workers = os.cpu_count() or 1

    def read(number: int) -> tuple[np.ndarray, np.ndarray]:
        part.samples.sums[number] = checksums(part.dataset, number)
        return part.dataset.read(number)

    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[int, Any]] = deque()
        try:
            for number in part.todo:
                waiting.append((number, pool.submit(read, number)))
                if len(waiting) > 2 * workers:
                    number, result = waiting.popleft()
                    yield number, *result.result()
            while waiting:
                number, result = waiting.popleft()
                yield number, *result.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _size(dataset: SemanticDataset, todo: list[int]) -> int:
    """Bytes that samples will take: of files as their headers say, of others by a few of them."""
    if not todo:
        return 0
    if hasattr(dataset, "image_paths"):
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            headers = list(pool.map(probe, (dataset.image_paths[number] for number in todo)))
        return sum(_pages(header.height * header.width) for header in headers)
    chosen = todo[:: max(1, len(todo) // _SAMPLED)]
    return round(sum(_pages(dataset.read(number)[1].size) for number in chosen) / len(chosen) * len(todo))


def _pages(pixels: int) -> int:
    return -(-4 * pixels // PAGE) * PAGE
