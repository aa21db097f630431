"""What an entry of COCO's lists must be: images and annotations as they are read, one entry at a time.

Format: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

from array import array
from math import isfinite
from operator import itemgetter
from typing import Any

import numpy as np

from seglight.data.findings import Fault
from seglight.data.rle import run_lengths

LISTS = {"images": "image", "annotations": "annotation", "categories": "category"}
"""The lists of a file, and what to call an entry."""
WHOLE, NUMBER = (int,), (int, float)
"""Types of values."""
ID, SIDE = (1 << 63) - 1, 1 << 20
"""The largest id, and the largest height or width of an image."""
UNKNOWN = -1.0
"""Area of an annotation that gives none, until it is counted."""
_FINITE = 7, "NaN or infinity in the box, the area or a polygon."
FORMAT = "See https://cocodataset.org/#format-data."
_KEYS = "id", "file_name", "height", "width"
_IMAGE = itemgetter(*_KEYS)


class Unusable(Exception):
    """An entry that cannot be used: the rank of the fault, and the rule that it breaks."""

    def __str__(self) -> str:
        return self.args[1]

    def fault(self, name: str, one: Any, number: int) -> Fault:
        """The finding about the entry `one`, which has this number in the list `name`."""
        where = one["id"] if isinstance(one, dict) and type(one.get("id")) is int else f"[{number}]"
        return Fault(*self.args, f"{LISTS[name]} {where}")


def take(entry: Any, key: str, kinds: tuple[type, ...], default: Any = ...) -> Any:
    """The value of a key, of one of these types (True and False are no numbers)."""
    if type(entry) is not dict:
        raise Unusable(0, f"not a mapping. {FORMAT}")
    value = entry.get(key, default)
    if value is ...:
        raise Unusable(0, f"no {key!r}. {FORMAT}")
    if type(value) not in kinds and value is not default:
        raise Unusable(0, f"{key!r} must be {' or '.join(kind.__name__ for kind in kinds)}. {FORMAT}")
    return value


class Images:
    """The list of images, entry by entry."""

    def __init__(self) -> None:
        self.ids, self.heights, self.widths, self.names = array("q"), array("q"), array("q"), []
        self.bad: set[int] = set()
        """Ids of entries that cannot be used: their annotations are no faults of their own."""
        self._seen: set[int] = set()
        self._files: set[str] = set()

    def add(self, one: Any) -> None:
        """Take an entry, or raise `Unusable`."""
        try:
            values = _IMAGE(one)
        except (KeyError, TypeError):
            values = ()
        if [*map(type, values)] != [int, str, int, int]:
            values = [take(one, key, kinds) for key, kinds in zip(_KEYS, (WHOLE, (str,), WHOLE, WHOLE), strict=True)]
        number, name, height, width = values
        if min(height, width) < 1 or max(height, width) > SIDE or not -ID - 1 <= number <= ID:
            raise Unusable(0, "'id', 'height' or 'width' is out of range. Look at what wrote the file.")
        if name in self._files:
            raise Unusable(1, "its file is listed for another image, too. Remove one of the entries.")
        self._files.add(name)
        if number in self._seen:
            raise Unusable(1, "its id is that of another image. Give every image an id of its own.")
        self._seen.add(number)
        self.ids.append(number)
        self.heights.append(height)
        self.widths.append(width)
        self.names.append(name.encode())

    def extend(self, ids: list[int], names: list[str], heights: list[int], widths: list[int]) -> None:
        """Take entries that break no rule and are the only ones."""
        self.ids, self.heights, self.widths = array("q", ids), array("q", heights), array("q", widths)
        self.names = [name.encode() for name in names]


class Annotations:
    """The list of annotations, entry by entry."""

    def __init__(self) -> None:
        self.ids, self.image_ids, self.category_ids = array("q"), array("q"), array("q")
        self.iscrowd, self.area, self.boxes = array("b"), array("d"), array("d")
        self.parts, self.part_lengths, self.points = array("q"), array("q"), array("d")
        self.rle_lengths, self.rle, self.rle_sizes = array("q"), bytearray(), array("q")

    def add(self, one: Any) -> None:
        """Take an entry, or raise `Unusable`."""
        numbers = [take(one, key, WHOLE) for key in ("id", "image_id", "category_id")]
        crowd = take(one, "iscrowd", (int, bool), 0)
        area = take(one, "area", NUMBER, None)
        box = take(one, "bbox", (list,), None)
        outline = take(one, "segmentation", (list, dict), None)
        if crowd not in (0, 1) or max(map(abs, numbers)) > ID:
            raise Unusable(4, "'iscrowd' must be 0 or 1, and ids must fit into 64 bits.")
        polygons, rle, size = [], b"", (0, 0)
        if isinstance(outline, dict):
            rle, size = rle_of(outline)
        else:
            polygons = polygons_of(outline)
        try:
            box = array("d", box) if box is not None else _extent(polygons, rle, size)
        except (TypeError, OverflowError):
            box = ()
        if len(box) != 4:
            raise Unusable(4, "'bbox' must be four numbers: x, y, width, height.")
        if not all(map(isfinite, (*box, area or 0))):
            raise Unusable(*_FINITE)
        for column, number in zip((self.ids, self.image_ids, self.category_ids), numbers, strict=True):
            column.append(number)
        self.iscrowd.append(crowd)
        self.area.append(UNKNOWN if area is None else area)
        self.boxes.extend(box)
        self.parts.append(len(polygons))
        for polygon in polygons:
            self.part_lengths.append(len(polygon))
            self.points.extend(polygon)
        self.rle_lengths.append(len(rle))
        self.rle += rle
        self.rle_sizes.extend(size)

    def columns(self) -> dict[str, np.ndarray]:
        """All entries as flat arrays, under the names of the attributes."""
        found = {name: np.asarray(column) for name, column in self.__dict__.items() if isinstance(column, array)}
        return {**found, "rle": np.frombuffer(self.rle, np.uint8)}


def polygons_of(outline: Any) -> list[array]:
    """The polygons of an outline, x y x y ... each; raises `Unusable`."""
    if not outline:
        raise Unusable(6, "no 'segmentation'. Objects need an outline; boxes alone do not do.")
    polygons = []
    for part in outline:
        if type(part) is not list:
            raise Unusable(6, "'segmentation' must be a list of polygons, each a list: [[x, y, x, y, ...]].")
        try:
            polygon = array("d", part)
        except (TypeError, OverflowError):
            raise Unusable(6, "a polygon with something else than numbers.") from None
        if len(polygon) % 2:
            raise Unusable(6, "a polygon with an odd number of coordinates. Points are pairs x, y.")
        if len(polygon) < 6:
            raise Unusable(6, "a polygon with fewer than 3 points. Remove the part, or the object.")
        if not all(map(isfinite, polygon)):
            raise Unusable(*_FINITE)
        polygons.append(polygon)
    return polygons


def rle_of(outline: dict[str, Any]) -> tuple[bytes, tuple[int, int]]:
    """COCO's compressed string, and height and width, of an RLE in either form; raises `Unusable`."""
    from pycocotools import mask as coco

    size, counts = outline.get("size"), outline.get("counts")
    if type(size) is not list or len(size) != 2 or any(type(n) is not int or not 0 < n <= 1 << 20 for n in size):
        raise Unusable(6, "an RLE needs its 'size': [height, width].")
    if isinstance(counts, str):
        runs = run_lengths(counts.encode())
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        runs = np.array(counts, np.int64 if max(map(abs, counts), default=0) < 1 << 40 else object)
    else:
        runs = None
    if runs is None:
        raise Unusable(6, "the 'counts' of an RLE must be a list of whole numbers or COCO's compressed string.")
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise Unusable(6, "an RLE whose counts do not add up to height x width of its 'size'.")
    if isinstance(counts, str):
        return counts.encode(), (size[0], size[1])
    return coco.frPyObjects({"size": size, "counts": counts}, *size)["counts"], (size[0], size[1])


def _extent(polygons: list[array], rle: bytes, size: tuple[int, int]) -> Any:
    """The box of an object whose entry has none: x, y, width, height."""
    if rle:
        from pycocotools import mask as coco

        return coco.toBbox({"size": list(size), "counts": rle}).tolist()
    points = np.concatenate(polygons).reshape(-1, 2)
    return (*points.min(0), *np.ptp(points, axis=0))
