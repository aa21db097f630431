"""What is wrong with COCO-format data: the entries of the json, what the outlines cover, and the image files."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from seglight.data.cocojson.document import Document, pixels
from seglight.data.decode import image_fault, probe
from seglight.data.findings import DataError, Fault
from seglight.data.packed import Strings

_BEYOND = 1.0  # pixels that a box may leave the image by: annotation tools round
_POLYGONS = 1 << 12  # that are looked at together: their numbers fit into a processor's cache
_FORGOTTEN = 1 << 16  # after which their numbers need not be in memory


def image_faults(document: Document, folder: Path, wanted: np.ndarray | None = None) -> tuple[np.ndarray, list[Fault]]:
    """Image files that are missing, broken or of another size than the json says: bool (N,) and findings.

    Only headers are read, 8 files at a time.

    Args:
        document: of N images.
        folder: that the file names are relative to.
        wanted: bool (N,), images to look at; by default all.
    """
    data = document.packed
    names = Strings(data.names, data.name_starts)

    def look(index: int) -> Fault | None:
        path = folder / names[index]
        where = f"{path} (image {data.image_ids[index]})"
        try:
            header = probe(path)
        except FileNotFoundError:
            rule = "missing. Copy the images again, or name the right folder."
            return Fault(1, rule, where)
        except OSError as error:
            return Fault(1, f"cannot be read ({error.strerror}).", where)
        except DataError as error:
            return Fault(2, str(error).removeprefix(f"{path}: "), where)
        if fault := image_fault(header, exif=True):
            return Fault(2, fault, where)
        size = (header.width, header.height)
        size = size[::-1] if header.orientation > 4 else size  # these EXIF orientations swap the sides
        said = (int(data.widths[index]), int(data.heights[index]))
        if size != said:
            rule = (
                "of another size than the json says, so its outlines are elsewhere. Use the images that were annotated."
            )
            return Fault(3, rule, f"{where}: {size[0]}x{size[1]}, json {said[0]}x{said[1]}")
        return None

    chosen = range(len(document)) if wanted is None else np.flatnonzero(wanted).tolist()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(look, chosen))
    bad = np.zeros(len(document), bool)
    bad[[index for index, fault in zip(chosen, found, strict=True) if fault]] = True
    return bad, [fault for fault in found if fault]


def degenerate(document: Document) -> tuple[np.ndarray, list[Fault]]:
    """Annotations that show nothing or lie outside of their image: bool (A,) and findings.

    Official COCO has some. Its evaluation counts them; training has no use for them.
    """
    if document.degenerate is not None:
        return document.degenerate
    data = document.packed
    of_image = np.repeat(np.arange(len(document)), np.diff(data.first))
    limit = np.stack([data.widths[of_image], data.heights[of_image]], 1)
    upper, lower = data.boxes[:, 2:], data.boxes[:, :2]
    outside = ((lower >= limit) | (upper <= 0)).any(1)
    beyond = ~outside & ((lower < -_BEYOND) | (upper > limit + _BEYOND)).any(1)
    flat = (upper <= lower).any(1)
    empty = ~_covers(document)
    empty[empty] = pixels(document, np.flatnonzero(empty)) == 0
    bad, faults = np.zeros(len(data.ids), bool), []
    for wrong, rule in (
        (outside, "the box lies outside of the image. Boxes are x, y, width, height in pixels of the image."),
        (beyond, "the box leaves the image. Boxes are x, y, width, height in pixels of the image."),
        (flat, "the box has no width or no height."),
        (empty, "the mask has no pixel. Remove the object, or draw it larger."),
        (
            (data.area <= 0) & ~empty,
            "the area is 0 or less, so the object belongs to no size range of the scores.",
        ),
    ):
        where = np.flatnonzero(wrong & ~bad)
        faults += [Fault(8, rule, f"annotation {data.ids[i]} (image {data.image_ids[of_image[i]]})") for i in where]
        bad |= wrong
    return bad, faults


def _covers(document: Document) -> np.ndarray:
    """bool (A,): whether an outline surely has a pixel. Filling all of them takes three times as long.

    A closed curve of length L around an area A has more than A - L lattice points inside (Jarnik), and COCO's code
    moves corners by up to a tenth of a pixel.
    """
    data = document.packed
    of_image = np.repeat(np.arange(len(document)), np.diff(data.first))
    size = np.zeros((len(data.parts) - 1, 2), np.int64)
    size[data.rows] = np.stack([data.widths[of_image], data.heights[of_image]], 1)
    counts = np.diff(data.parts)
    size = np.repeat(size, counts, 0)
    sure = np.zeros(len(size), bool)

    def look(begin: int) -> None:
        starts = data.part_starts[begin : begin + _POLYGONS + 1] // 2
        corners = data.points[2 * starts[0] : 2 * starts[-1]].reshape(-1, 2)
        first, last = starts[:-1] - starts[0], starts[1:] - starts[0] - 1
        x, y = np.ascontiguousarray(corners.T)
        next_x, next_y = np.roll(x, -1), np.roll(y, -1)
        next_x[last], next_y[last] = x[first], y[first]
        twice = np.add.reduceat(x * next_y - y * next_x, first)
        edges = np.sqrt((next_x - x) ** 2 + (next_y - y) ** 2)  # np.hypot takes five times as long
        length = np.add.reduceat(edges, first)
        piece = slice(begin, begin + len(first))
        inside = np.ones(len(first), bool)
        for axis, ways in enumerate((x, y)):
            inside &= np.maximum.reduceat(ways, first) <= size[piece, axis]
            if ways.min() < 0:
                inside &= np.minimum.reduceat(ways, first) >= 0
        sure[piece] = inside & (np.abs(twice) / 2 > 1.5 * length + 2)
        if begin % _FORGOTTEN == 0:
            data.forget("points")

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(look, range(0, len(size), _POLYGONS)))
    covered = np.zeros(len(counts), bool)
    covered[np.repeat(np.arange(len(counts)), counts)[sure]] = True
    return covered[data.rows]
