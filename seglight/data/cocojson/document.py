"""The content of a json file in COCO's instance format, in flat arrays."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seglight.data.findings import Fault
from seglight.data.packed import Packed, Strings, pack_bytes

if TYPE_CHECKING:
    from seglight.data.objects import Segmentation


@dataclass
class Document:
    """One json file. Entries that cannot be used are in `faults` and nowhere else."""

    path: Path
    category_ids: tuple[int, ...]
    """K ids in rising order: label 0..K-1 to id in the file."""
    categories: tuple[str, ...]
    """K names in that order."""
    packed: Packed
    """N images: `image_ids`, `heights`, `widths`, `names` (uint8) from `name_starts`; the annotations of image i are
    `first[i]` to `first[i + 1]`. A annotations, by image, else as in the file: `ids`, `labels`, `iscrowd`, `area`,
    `boxes` (float32 x1 y1 x2 y2), and `rows`, the place of their outlines. Outline r: polygons `parts[r]` to
    `parts[r + 1]`, each with `points` from `part_starts`, float64 x, y, x, y...; or `rle` (uint8) from `rle_starts`."""
    faults: list[Fault] = field(default_factory=list)
    labelled: bool = True
    """False if the file has no list of annotations, as those of COCO's test images."""
    index: Path | None = None
    """Folder of what is known about the file from an earlier time, see `seglight.data.cocojson.index`."""
    sha256: str | None = None
    """Of the file, where it is known."""
    degenerate: tuple[np.ndarray, list[Fault]] | None = None
    """What `seglight.data.cocojson.check.degenerate` finds, where it is known."""

    def __len__(self) -> int:
        return len(self.packed.image_ids)

    def outline(self, annotation: int) -> Segmentation:
        """Polygons or compressed RLE of one annotation."""
        data = self.packed
        row = data.rows[annotation]
        begin, end = data.rle_starts[row : row + 2]
        if begin < end:
            image = np.searchsorted(data.first, annotation, "right") - 1
            size = [int(data.heights[image]), int(data.widths[image])]
            return {"size": size, "counts": data.rle[begin:end].tobytes()}
        begin, end = data.parts[row : row + 2]
        starts = data.part_starts[begin : end + 1]
        return [data.points[a:b] for a, b in pairwise(starts.tolist())]

    def keep(self, images: np.ndarray, annotations: np.ndarray) -> Document:
        """Without some of the images and annotations; both are bool. Annotations of images that go, go too."""
        old = self.packed
        of_image = np.repeat(np.arange(len(self)), np.diff(old.first))
        annotations = annotations & images[of_image]
        counts = np.bincount(of_image[annotations], minlength=len(self))[images]
        names = Strings(old.names, old.name_starts)
        names, name_starts = pack_bytes(names[i].encode() for i in np.flatnonzero(images))
        arrays = {
            **{name: getattr(old, name)[images] for name in ("image_ids", "heights", "widths")},
            **{name: getattr(old, name)[annotations] for name in ("ids", "labels", "iscrowd", "area", "boxes", "rows")},
        }
        first = np.concatenate([[0], np.cumsum(counts)])
        packed = old.replaced(names=names, name_starts=name_starts, first=first, **arrays)
        return replace(self, packed=packed, index=None, degenerate=None)


def pixels(document: Document, annotations: np.ndarray) -> np.ndarray:
    """int64, how many pixels the masks of some annotations have, as COCO's code fills them."""
    from pycocotools import mask as coco

    data, counts = document.packed, np.zeros(len(annotations), np.int64)
    images = np.searchsorted(data.first, annotations, "right") - 1
    for place, (image, annotation) in enumerate(zip(images.tolist(), annotations.tolist(), strict=True)):
        outline = document.outline(annotation)
        if isinstance(outline, list):
            outline = coco.frPyObjects(outline, int(data.heights[image]), int(data.widths[image]))
            outline = outline[0] if len(outline) == 1 else coco.merge(outline)
        counts[place] = coco.area(outline)
    return counts
