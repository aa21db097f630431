"""Reads a json file in COCO's instance format into flat arrays, one entry at a time, and notes what is wrong with it.

Format: https://cocodataset.org/#format-data. The file is never there as Python objects as a whole: full COCO would take
about 4 GB and a minute of garbage collection.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seglight.data.check import Fault, listing
from seglight.data.coco_document import Document, pixels
from seglight.data.decode import DataError
from seglight.data.packed import Packed, pack_bytes
from seglight.data.rle import run_lengths

LISTS = {"images": "image", "annotations": "annotation", "categories": "category"}
_BLANK = re.compile(r"[ \t\n\r]*")
_WHOLE, _NUMBER = (int,), (int, float)
_UNKNOWN = -1.0
"""Area of an annotation that gives none, until it is counted."""
_FORMAT = "See https://cocodataset.org/#format-data."


def read(path: str | Path, labelled: bool = True, points: Path | None = None) -> Document:
    """Read a file; a large one in pieces, on all processor cores.

    Args:
        path: the file.
        labelled: whether there must be a list of annotations; the files of COCO's test images have none.
        points: file to write the corners of a large one to, as `.npy`, rather than keep them in memory.

    Raises:
        DataError: no json, or no list of images, annotations or categories in it.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    found = _in_pieces(path, points) or _parse(path, _text(path))
    if missing := [name for name in LISTS if name not in found.seen and (labelled or name != "annotations")]:
        raise DataError(f"{path} has no {' and no '.join(missing)}, so it is no COCO instance file. {_FORMAT}")
    categories, faults = _categories(path, found.categories), found.faults
    packed = _pack(found.images, found.columns, [number for number, _ in categories], faults)
    document = Document(
        path, *(tuple(part) for part in zip(*categories, strict=True)), packed, faults, "annotations" in found.seen
    )
    unknown = np.flatnonzero(packed.area == _UNKNOWN)
    if len(unknown):
        packed.area[unknown] = pixels(document, unknown)
    return document


class _Found(NamedTuple):
    """The entries of a file."""

    images: Images
    columns: dict[str, np.ndarray]
    """Of the annotations, see `Annotations.columns`."""
    categories: list[tuple[int, str]]
    faults: list[Fault]
    seen: set[str]
    """Names of the lists."""
    cut: int | None
    """How many faults come before the list of annotations, if it is the mark of one that was cut out."""


def _in_pieces(path: Path, points: Path | None) -> _Found | None:
    """As `_parse`, with the annotations read by several processes; None if the file is small, unusual or broken."""
    from seglight.data.coco_pieces import MARK, read_pieces  # which needs the classes of this file

    if (pieces := read_pieces(path, points)) is None:
        return None
    rest, columns, faults = pieces
    try:
        found = _parse(path, rest, MARK)
    except DataError:  # to be raised with its line in the whole file
        return None
    if found.cut is None or len(found.columns["ids"]):  # what was cut out is not the list of annotations, or not all
        return None
    return found._replace(columns=columns, faults=found.faults[: found.cut] + faults + found.faults[found.cut :])


def _parse(path: Path, text: str, mark: str | None = None) -> _Found:
    images, annotations, categories = Images(), Annotations(), []
    faults, seen, cut = [], set(), None
    for name, number, one in _entries(path, text):
        seen.add(name)
        if number is None:
            continue
        if mark is not None and one == mark and (name, number) == ("annotations", 0):
            cut = len(faults)
            continue
        try:
            if name == "images":
                images.add(one)
            elif name == "annotations":
                annotations.add(one)
            else:
                categories.append((_take(one, "id", _WHOLE), _take(one, "name", (str,))))
        except Unusable as error:
            faults.append(error.fault(name, one, number))
            if name == "images" and type(one) is dict and type(one.get("id")) is int:
                images.bad.add(one["id"])
    return _Found(images, annotations.columns(), categories, faults, seen, cut)


class Unusable(Exception):
    """An entry that cannot be used: the rank of the fault, and the rule that it breaks."""

    def __str__(self) -> str:
        return self.args[1]

    def fault(self, name: str, one: Any, number: int) -> Fault:
        """The finding about the entry `one`, which has this number in the list `name`."""
        where = one["id"] if isinstance(one, dict) and type(one.get("id")) is int else f"[{number}]"
        return Fault(*self.args, f"{LISTS[name]} {where}")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}). Export it again."
        ) from error


def _entries(path: Path, text: str, lists: Collection[str] = LISTS) -> Iterator[tuple[str, int | None, Any]]:
    """List, number and content of every entry; the number is None once at the beginning of each of the `lists`."""
    decode, at, place = json.JSONDecoder().raw_decode, 0, "the beginning"

    def skip(to: int) -> int:
        return _BLANK.match(text, to).end()

    def expect(characters: str, to: int) -> str:
        if text[to : to + 1] not in characters or to >= len(text):
            raise json.JSONDecodeError(f"Expecting {' or '.join(map(repr, characters))}", text, to)
        return text[to]

    try:
        at = skip(0)
        expect("{", at)
        at = skip(at + 1)
        while text[at : at + 1] != "}":
            expect('"', at)
            name, at = decode(text, at)
            place, at = repr(name), skip(at)
            expect(":", at)
            at = skip(at + 1)
            if name in lists and text[at : at + 1] == "[":
                yield name, None, None
                number, at = 0, skip(at + 1)
                while text[at : at + 1] != "]":
                    place = f"{name}[{number}]"
                    one, at = decode(text, at)
                    yield name, number, one
                    at = skip(at)
                    if expect(",]", at) == ",":
                        number, at = number + 1, skip(at + 1)
                        if text[at : at + 1] == "]":
                            raise json.JSONDecodeError("Illegal trailing comma", text, at)
                at += 1
            else:
                _, at = decode(text, at)
            at = skip(at)
            if expect(",}", at) == ",":
                at = skip(at + 1)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {error.lineno}, column {error.colno}, at {place}: {error.msg}. The file is broken or cut "
            "off. Export or copy it again."
        ) from error


def _take(entry: Any, key: str, kinds: tuple[type, ...], default: Any = ...) -> Any:
    """The value of a key, of one of these types (True and False are no numbers)."""
    if type(entry) is not dict:
        raise Unusable(0, f"not a mapping. {_FORMAT}")
    value = entry.get(key, default)
    if value is ...:
        raise Unusable(0, f"no {key!r}. {_FORMAT}")
    if type(value) not in kinds and value is not default:
        raise Unusable(0, f"{key!r} must be {' or '.join(kind.__name__ for kind in kinds)}. {_FORMAT}")
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
        number, name = _take(one, "id", _WHOLE), _take(one, "file_name", (str,))
        height, width = _take(one, "height", _WHOLE), _take(one, "width", _WHOLE)
        if min(height, width) < 1 or max(height, width) > 1 << 20 or not -(1 << 63) <= number < 1 << 63:
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


class Annotations:
    """The list of annotations, entry by entry."""

    def __init__(self) -> None:
        self.ids, self.image_ids, self.category_ids = array("q"), array("q"), array("q")
        self.iscrowd, self.area, self.boxes = array("b"), array("d"), array("d")
        self.parts, self.part_lengths, self.points = array("q"), array("q"), array("d")
        self.rle_lengths, self.rle, self.rle_sizes = array("q"), bytearray(), array("q")

    def add(self, one: Any) -> None:
        """Take an entry, or raise `Unusable`."""
        numbers = [_take(one, key, _WHOLE) for key in ("id", "image_id", "category_id")]
        crowd = _take(one, "iscrowd", (int, bool), 0)
        area = _take(one, "area", _NUMBER, None)
        box = _take(one, "bbox", (list,), None)
        outline = _take(one, "segmentation", (list, dict), None)
        if crowd not in (0, 1) or max(map(abs, numbers)) >= 1 << 63:
            raise Unusable(4, "'iscrowd' must be 0 or 1, and ids must fit into 64 bits.")
        polygons, rle, size = [], b"", (0, 0)
        if isinstance(outline, dict):
            rle, size = _rle(outline)
        else:
            polygons = _polygons(outline)
        try:
            box = array("d", box) if box is not None else _extent(polygons, rle, size)
        except (TypeError, OverflowError):
            box = ()
        if len(box) != 4:
            raise Unusable(4, "'bbox' must be four numbers: x, y, width, height.")
        for column, number in zip((self.ids, self.image_ids, self.category_ids), numbers, strict=True):
            column.append(number)
        self.iscrowd.append(crowd)
        self.area.append(_UNKNOWN if area is None else area)
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


def _polygons(outline: Any) -> list[array]:
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
        polygons.append(polygon)
    return polygons


def _rle(outline: dict[str, Any]) -> tuple[bytes, tuple[int, int]]:
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


def _categories(path: Path, found: list[tuple[int, str]]) -> list[tuple[int, str]]:
    found = sorted(found)
    for kind, values in (("ids", [number for number, _ in found]), ("names", [name for _, name in found])):
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise DataError(f"{path}: categories with the same {kind}: {listing(twice)}. Give each its own.")
    if not found:
        raise DataError(f"{path} lists no category, so there is nothing to learn. {_FORMAT}")
    return found


def _pack(images: Images, columns: dict[str, np.ndarray], category_ids: list[int], faults: list[Fault]) -> Packed:
    """Arrays of all entries that refer to known images and categories, ordered by image; the others become faults."""
    names, name_starts = pack_bytes(images.names)
    image_ids, heights, widths = map(np.asarray, (images.ids, images.heights, images.widths))
    ids, of_image, of_category, area = (columns[name] for name in ("ids", "image_ids", "category_ids", "area"))
    image, known_image = _find(image_ids, of_image)
    label, known_label = _find(np.array(category_ids, np.int64), of_category)
    boxes, points = columns["boxes"].reshape(-1, 4), columns["points"]
    parts, part_starts, rle_starts = (_starts(columns[name]) for name in ("parts", "part_lengths", "rle_lengths"))
    rle_sizes = columns["rle_sizes"].reshape(-1, 2)

    bad_part = np.searchsorted(part_starts, np.flatnonzero(~np.isfinite(points)), "right") - 1
    broken = ~np.isfinite(boxes).all(1) | ~np.isfinite(area)
    broken[np.searchsorted(parts, bad_part, "right") - 1] = True
    twice = np.ones(len(ids), bool)
    twice[np.unique(ids, return_index=True)[1]] = False
    of_bad = np.isin(of_image, list(images.bad)) & ~known_image
    sizes = np.stack([heights[image], widths[image]], 1) if len(heights) else rle_sizes
    resized = (np.diff(rle_starts) > 0) & known_image & (rle_sizes != sizes).any(1)
    keep = ~of_bad
    for rank, wrong, rule in (
        (5, ~known_image, "their image is not in the list of images. Add the image, or remove them."),
        (5, ~known_label, "their category is not listed. Add it to 'categories', or remove them."),
        (5, twice, "their id is that of another annotation. Give every annotation an id of its own."),
        (6, resized, "an RLE of another size than its image. Encode the mask at the size of the image."),
        (7, broken, "NaN or infinity in the box, the area or a polygon."),
    ):
        where = np.flatnonzero(wrong & ~of_bad)
        faults += [Fault(rank, rule, f"annotation {ids[i]} (image {of_image[i]})") for i in where]
        keep &= ~wrong

    rows = np.flatnonzero(keep)
    rows = rows[np.argsort(image[rows], kind="stable")]
    return Packed(
        image_ids=image_ids,
        heights=heights,
        widths=widths,
        names=names,
        name_starts=name_starts,
        first=np.searchsorted(image[rows], np.arange(len(image_ids) + 1)),
        ids=ids[rows],
        labels=label[rows],
        iscrowd=columns["iscrowd"].astype(bool)[rows],
        area=area[rows],
        boxes=np.concatenate([boxes[rows, :2], boxes[rows, :2] + boxes[rows, 2:]], 1).astype(np.float32),
        rows=rows,
        parts=parts,
        part_starts=part_starts,
        points=points,
        rle=columns["rle"],
        rle_starts=rle_starts,
    )


def _find(known: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position in `known` of each wanted number, and bool whether it is there."""
    if not len(known):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    order = np.argsort(known)
    place = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
    return place, known[place] == wanted


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
