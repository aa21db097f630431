"""One pass over a split, in threads, that counts everything and keeps nothing."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from seglight.data_stats.result import GRID, Statistics
from seglight.types import IGNORE_INDEX

if TYPE_CHECKING:
    from seglight.data.base import DataModule, Split

_CHUNK = 16  # samples that a thread counts at a time
_EXACT = 1 << 24  # cv2.calcHist returns float32, which holds all whole numbers up to here


def statistics(datamodule: DataModule, split: Split = "train", progress: bool = True) -> Statistics:
    """Count one split: every image is decoded once, nothing is kept of it.

    Memory is a few hundred bytes per class and thread times `GRID` squared, and 40 bytes per object; not per image.
    Images that training leaves out because they hold no object are counted, too.

    Args:
        datamodule: its images as stored, without augmentation.
        split: "train", "val" or "test".
        progress: show a bar, where standard error is a terminal.

    Raises:
        seglight.data.findings.DataError: a file that cannot be used; `seglight data check` lists all of them.
        ValueError: no such split, or nothing in it.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"There is no split {split!r}; choose train, val or test.")
    data = datamodule.dataset(split)
    name = type(datamodule).__name__
    if not len(data):
        raise ValueError(f"{name} has no samples in {split}.")
    empty = Statistics(name, split, datamodule.task, tuple(datamodule.classes), tuple(datamodule.palette))
    total, objects = empty, []
    with _bar(len(data), f"{name} {split}", progress) as bar:
        for part in _parts(data, empty, getattr(datamodule, "transform", None)):
            total.add(part)
            objects.append(part.objects)
            bar.update(part.images)
    total.objects = np.concatenate(objects)
    return total


def _bar(total: int, what: str, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=" images", disable=None if progress else True, leave=False)


def _parts(data: Any, empty: Statistics, transform: Any) -> Iterator[Statistics]:
    """Counts of a few samples at a time, in order."""
    head = (empty.name, empty.split, empty.task, empty.classes, empty.colours)
    threads = min(8, os.cpu_count() or 1)

    def count(start: int) -> Statistics:
        part, objects = Statistics(*head), []
        for index in range(start, min(start + _CHUNK, len(data))):
            if part.task == "semantic":
                _count_labels(part, *data.read(index))
            else:
                objects.append(_count_objects(part, data.image(index), data.objects(index), transform))
        part.objects = np.concatenate([part.objects, *objects])
        return part

    pool = ThreadPoolExecutor(threads)
    starts = iter(range(0, len(data), _CHUNK))
    try:
        waiting = deque(pool.submit(count, start) for start in islice(starts, 2 * threads))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(count, start) for start in islice(starts, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _count_image(part: Statistics, image: np.ndarray) -> None:
    part.images += 1
    part.sizes[image.shape[:2]] += 1
    part.intensities += np.stack([_histogram(image, channel) for channel in range(3)])


def _count_labels(part: Statistics, image: np.ndarray, mask: np.ndarray) -> None:
    _count_image(part, image)
    places = _places(mask, len(part.classes))
    pixels, void = places.sum((1, 2)), np.count_nonzero(mask == IGNORE_INDEX)
    if pixels.sum() + void == mask.size:
        part.values[: len(pixels)] += pixels
        part.values[IGNORE_INDEX] += void
    else:  # labels that are no class, to be named
        part.values += _histogram(mask)
    present = np.flatnonzero(pixels)
    _count_present(part, present, mask.size)
    part.unlabelled_images += not len(present)
    part.places += places
    part.places_held[present] += places.sum(0)
    part.places_all += places.sum(0)


def _count_present(part: Statistics, present: np.ndarray, pixels: int) -> None:
    part.holding[present] += 1
    part.holding_pixels[present] += pixels
    part.together[np.ix_(present, present)] += 1


def _count_objects(part: Statistics, image: np.ndarray, objects: Any, transform: Any) -> np.ndarray:
    """Returns rows of `Statistics.objects`."""
    from seglight.data.rle import decode_into

    _count_image(part, image)
    size = image.shape[:2]
    rles, anything = objects.rles(size), np.zeros(size, bool)
    present, cells = np.unique(objects.labels), _cells(size)
    _count_present(part, present, anything.size)
    part.places_held[present] += cells
    part.places_all += cells
    for label in present:
        inside = np.zeros(size, bool)
        for index in np.flatnonzero(objects.labels == label):
            decode_into(rles[index], inside)
        part.places[label] += _inside(inside)
        anything |= inside
    covered = int(np.count_nonzero(anything))
    part.values[0] += covered
    part.values[IGNORE_INDEX] += anything.size - covered
    part.unlabelled_images += not len(objects)
    part.crowds += np.bincount(objects.labels[objects.iscrowd], minlength=len(part.classes))
    single = ~objects.iscrowd
    part.objects_in_image[int(single.sum())] += 1
    x1, y1, x2, y2 = objects.boxes[single].T.astype(float)
    factor = np.full(len(x1), _factor(transform, size))
    return np.stack([objects.labels[single], objects.area[single], x2 - x1, y2 - y1, factor], 1)


def _factor(transform: Any, size: Sequence[int]) -> float:
    """By how much training resizes an image: the middle of what it draws from."""
    sides = getattr(transform, "short_sides", None)
    if sides is None:
        return 1.0
    if transform.scale is not None:
        return sum(transform.scale) / 2 * min(crop / side for crop, side in zip(transform.crop, size, strict=True))
    return min(float(np.median(sides)) / min(size), transform.long_side / max(size))


def _histogram(array: np.ndarray, channel: int = 0) -> np.ndarray:
    """How often each value occurs in uint8 (H, W) or (H, W, C): int64 (256,)."""
    rows = max(1, _EXACT // array.shape[1])
    bands = (array[top : top + rows] for top in range(0, len(array), rows))
    found = [cv2.calcHist([np.ascontiguousarray(band)], [channel], None, [256], [0, 256]) for band in bands]
    return sum(one.ravel().astype(np.int64) for one in found)


def _places(mask: np.ndarray, count: int) -> np.ndarray:
    """Pixels of labels 0..count-1 in each part of the picture: int64 (count, G, G)."""
    found = np.zeros((count, GRID, GRID), np.int64)
    mask = np.ascontiguousarray(mask)
    edges = _edges(mask.shape[0])
    columns = _columns(int(np.diff(edges).max()), mask.shape[1])
    for row, (top, bottom) in enumerate(pairwise(edges)):
        if top < bottom:
            pair = [mask[top:bottom], columns[: bottom - top]]
            found[:, row] = cv2.calcHist(pair, [0, 1], None, [count, GRID], [0, count, 0, GRID])
    return found


def _inside(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask, bool (H, W), in each part of the picture: int64 (G, G)."""
    sums = cv2.integral(mask.view(np.uint8))  # int32, of everything above and left
    corners = sums[np.ix_(*(_edges(length) for length in mask.shape))].astype(np.int64)
    return np.diff(np.diff(corners, axis=0), axis=1)


def _edges(length: int) -> np.ndarray:
    """(G + 1,): where each part of an axis begins and the last ends."""
    return -(-np.arange(GRID + 1) * length // GRID)


@lru_cache(maxsize=16)
def _columns(height: int, width: int) -> np.ndarray:
    """uint8 (height, width), the part in which each column lies."""
    return np.tile((np.arange(width) * GRID // width).astype(np.uint8), (height, 1))


def _cells(size: tuple[int, int]) -> np.ndarray:
    """int64 (G, G), pixels of each part of a picture."""
    rows, columns = (np.diff(_edges(length)) for length in size)
    return rows[:, None] * columns
