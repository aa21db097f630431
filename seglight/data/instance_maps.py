"""Objects drawn as numbers in a mask file: one value per object."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from seglight.data.dataset import InstanceDataset
from seglight.data.decode import probe, read_image
from seglight.data.files import FileDataset
from seglight.data.findings import DataError
from seglight.data.objects import Bitmap, Objects
from seglight.data.packed import Paths


class MapDataset(InstanceDataset):
    """Images with one or more masks each. Subclasses write `objects`.

    Args:
        parts: datasets of the same images, one for each kind of mask; their checks are the check of this.
    """

    def __init__(self, *parts: FileDataset):
        self.parts, self.ids = parts, parts[0].ids

    def image(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3), RGB."""
        return read_image(Paths.to_open(self.parts[0].image_paths, index))

    def size(self, index: int) -> tuple[int, int]:
        """Height and width, as the header of the image says."""
        header = probe(Paths.to_open(self.parts[0].image_paths, index))
        return header.height, header.width

    def upright(self) -> np.ndarray:
        """bool (samples,): whether the image is higher than wide."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return np.array([height > width for height, width in pool.map(self.size, range(len(self)))], bool)

    def look(self, index: int) -> None:
        """Raise DataError if a sample's masks do not make sense together."""

    def check(self, num_classes: int) -> None:
        """The check of all files of each part, then a look at every sample.

        Raises:
            DataError: with all findings.
        """
        found = []
        for part in self.parts:
            try:
                part.check(self.values_of(part, num_classes))
            except DataError as error:
                found.append(str(error))
        if not found:
            with ThreadPoolExecutor(2) as pool:
                found = [text for text in pool.map(partial(_complaint, self), range(len(self))) if text]
        if found:
            more = [f"... and {len(found) - 10} more."] if len(found) > 10 else []
            raise DataError("\n".join([*found[:10], *more]))

    def values_of(self, part: FileDataset, num_classes: int) -> int:
        """How many values, from 0, the masks of a part may have."""
        return 255

    def fingerprint(self) -> dict[str, Any]:
        """Those of the parts."""
        first, *others = (part.fingerprint() for part in self.parts)
        return {**first, **{f"{key}_{i}": value for i, one in enumerate(others, 2) for key, value in one.items()}}


def objects_of(numbers: np.ndarray, known: Mapping[int, tuple[int, bool]]) -> Objects:
    """Objects of a map of numbers, (H, W) of 8 or 16 bits without sign.

    Args:
        numbers: one value per object.
        known: label and whether it is a crowd, by value. Other values show no object.
    """
    from scipy.ndimage import find_objects

    values = sorted(known)
    table = np.zeros(1 << 8 * numbers.dtype.itemsize, np.int32)
    table[values] = np.arange(1, len(values) + 1)
    compact = table[numbers]
    boxes, pixels, outlines, kept = [], [], [], []
    for place, (value, found) in enumerate(zip(values, find_objects(compact, len(values)), strict=True), start=1):
        if found is None:
            continue
        rows, columns = found
        mask = compact[found] == place
        boxes.append((columns.start, rows.start, columns.stop, rows.stop))
        pixels.append(np.count_nonzero(mask))
        outlines.append(Bitmap(rows.start, columns.start, mask))
        kept.append(known[value])
    return Objects(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array([label for label, _ in kept], np.int64),
        np.array([crowd for _, crowd in kept], bool),
        np.array(pixels, np.float64),
        outlines,
    )


def _complaint(dataset: MapDataset, index: int) -> str | None:
    try:
        dataset.look(index)
    except DataError as error:
        return str(error)
    return None
