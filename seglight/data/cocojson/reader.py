"""Reads a json file in COCO's instance format into flat arrays, one entry at a time, and notes what is wrong with it.

Format: https://cocodataset.org/#format-data. The file is never there as Python objects as a whole: full COCO would take
about 4 GB and a minute of garbage collection.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seglight.data.cocojson import quick
from seglight.data.cocojson.document import Document, pixels
from seglight.data.cocojson.lists import FORMAT, LISTS, UNKNOWN, WHOLE, Annotations, Images, Unusable, take
from seglight.data.cocojson.pieces import MARK, read_pieces
from seglight.data.cocojson.stream import entries, text_of
from seglight.data.findings import DataError, Fault, listing
from seglight.data.packed import Packed, pack_bytes


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
    return assemble(Path(path), gather(Path(path), points), labelled)


def gather(path: Path, points: Path | None = None) -> Found:
    """The first half of `read`, which takes all processor cores."""
    return _in_pieces(path, points) or _collect(entries(path, text_of(path), LISTS))


def assemble(path: Path, found: Found, labelled: bool) -> Document:
    """The second half of `read`, which takes one."""
    if missing := [name for name in LISTS if name not in found.seen and (labelled or name != "annotations")]:
        raise DataError(f"{path} has no {' and no '.join(missing)}, so it is no COCO instance file. {FORMAT}")
    categories, faults = _categories(path, found.categories), found.faults
    packed = _pack(found.images, found.columns, [number for number, _ in categories], faults)
    document = Document(
        path, *(tuple(part) for part in zip(*categories, strict=True)), packed, faults, "annotations" in found.seen
    )
    unknown = np.flatnonzero(packed.area == UNKNOWN)
    if len(unknown):
        packed.area[unknown] = pixels(document, unknown)
    return document


class Found(NamedTuple):
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


def _in_pieces(path: Path, points: Path | None) -> Found | None:
    """With the annotations read by several processes; None if the file is small, unusual or broken."""
    if (pieces := read_pieces(path, points)) is None:
        return None
    rest, columns, faults = pieces
    try:
        found = _collect(quick.entries(rest.removeprefix(codecs.BOM_UTF8), LISTS), MARK)
    except ValueError:  # to be raised with its line in the whole file
        return None
    if found.cut is None or len(found.columns["ids"]):  # what was cut out is not the list of annotations, or not all
        return None
    return found._replace(columns=columns, faults=found.faults[: found.cut] + faults + found.faults[found.cut :])


def _collect(listed: Iterable[tuple[str, int | None, Any]], mark: str | None = None) -> Found:
    images, annotations, categories = Images(), Annotations(), []
    faults, seen, cut = [], set(), None
    for name, number, one in listed:
        seen.add(name)
        if number is None:
            if one is not None:
                images.extend(*one)
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
                categories.append((take(one, "id", WHOLE), take(one, "name", (str,))))
        except Unusable as error:
            faults.append(error.fault(name, one, number))
            if name == "images" and type(one) is dict and type(one.get("id")) is int:
                images.bad.add(one["id"])
    return Found(images, annotations.columns(), categories, faults, seen, cut)


def _categories(path: Path, found: list[tuple[int, str]]) -> list[tuple[int, str]]:
    found = sorted(found)
    for kind, values in (("ids", [number for number, _ in found]), ("names", [name for _, name in found])):
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise DataError(f"{path}: categories with the same {kind}: {listing(twice)}. Give each its own.")
    if not found:
        raise DataError(f"{path} lists no category, so there is nothing to learn. {FORMAT}")
    return found


def _pack(images: Images, columns: dict[str, np.ndarray], category_ids: list[int], faults: list[Fault]) -> Packed:
    """Arrays of all entries that refer to known images and categories, ordered by image; the others become faults."""
    names, name_starts = pack_bytes(images.names)
    image_ids, heights, widths = map(np.asarray, (images.ids, images.heights, images.widths))
    ids, of_image, of_category, area = (columns[name] for name in ("ids", "image_ids", "category_ids", "area"))
    image, known_image = _find(image_ids, of_image)
    label, known_label = _find(np.array(category_ids, np.int64), of_category)
    boxes = columns["boxes"].reshape(-1, 4)
    parts, part_starts, rle_starts = (_starts(columns[name]) for name in ("parts", "part_lengths", "rle_lengths"))
    rle_sizes = columns["rle_sizes"].reshape(-1, 2)

    outlines = columns.get("rows", np.arange(len(ids)))
    twice = np.ones(len(ids), bool)
    twice[np.unique(ids, return_index=True)[1]] = False
    of_bad = np.isin(of_image, list(images.bad)) & ~known_image
    sizes = np.stack([heights[image], widths[image]], 1) if len(heights) else rle_sizes
    resized = (np.diff(rle_starts) > 0)[outlines] & known_image & (rle_sizes[outlines] != sizes).any(1)
    keep = ~of_bad
    for rank, wrong, rule in (
        (5, ~known_image, "their image is not in the list of images. Add the image, or remove them."),
        (5, ~known_label, "their category is not listed. Add it to 'categories', or remove them."),
        (5, twice, "their id is that of another annotation. Give every annotation an id of its own."),
        (6, resized, "an RLE of another size than its image. Encode the mask at the size of the image."),
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
        rows=outlines[rows],
        parts=parts,
        part_starts=part_starts,
        points=columns["points"],
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
