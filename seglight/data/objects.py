"""The objects of an image as annotated, and their masks wherever the image is mapped to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from seglight.data.rle import decode_into

if TYPE_CHECKING:
    from seglight.data.transforms import Geometry
    from seglight.types import RLE


class Bitmap(NamedTuple):
    """A mask that is zero outside of a rectangle."""

    top: int
    left: int
    mask: np.ndarray
    """bool (h, w)."""


Segmentation = list[np.ndarray] | dict[str, Any] | Bitmap
"""One object's outline: polygons, each float64 (2P,) x, y, x, y, ...; a compressed RLE; or pixels."""


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of one image as annotated, in pixels of the image. N = 0 is legal."""

    boxes: np.ndarray
    """float32 (N, 4), x1 y1 x2 y2."""
    labels: np.ndarray
    """int64 (N,), 0..K-1."""
    iscrowd: np.ndarray
    """bool (N,)."""
    area: np.ndarray
    """float64 (N,), as annotated."""
    segmentations: list[Segmentation]
    """N outlines."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keep: np.ndarray) -> Objects:
        """Some of them: `keep` is bool (N,) or indices."""
        chosen = np.arange(len(self))[keep]
        parts = [self.segmentations[i] for i in chosen]
        return Objects(self.boxes[keep], self.labels[keep], self.iscrowd[keep], self.area[keep], parts)

    def rles(self, size: tuple[int, int]) -> list[RLE]:
        """N masks of an image of `size` (height, width); polygons are filled and united by COCO's own code."""
        return [_rle(one, size) for one in self.segmentations]

    def masks(self, geometry: Geometry) -> np.ndarray:
        """Masks in the output of a geometry without rotation, bool (N, h, w).

        Polygons are mapped and filled there, so their edges are as sharp as the output allows; of the others each
        output pixel takes the nearest pixel. At the identity both equal `rles`.

        Raises:
            ValueError: the geometry is turned or bent.
        """
        if geometry.angle or geometry.elastic is not None:
            raise ValueError("Objects.masks maps by scale, crop and flip only; use Geometry.masks for turned outputs.")
        out = np.zeros((len(self), *geometry.size), bool)
        for one, slot in zip(self.segmentations, out, strict=True):
            if isinstance(one, list):
                _fill(one, geometry, slot)
            else:
                _sample(one, geometry, slot)
        return out


def _rle(one: Segmentation, size: tuple[int, int]) -> RLE:
    from pycocotools import mask as coco

    if isinstance(one, dict):
        return {"size": list(one["size"]), "counts": one["counts"]}
    if isinstance(one, list):
        return coco.merge(coco.frPyObjects(one, *size))
    dense = np.zeros(size, np.uint8, order="F")
    height, width = one.mask.shape
    dense[one.top : one.top + height, one.left : one.left + width] = one.mask
    return coco.encode(dense)


def _fill(polygons: list[np.ndarray], geometry: Geometry, out: np.ndarray) -> None:
    """Fill mapped polygons. COCO's code clips them at the edges of what shows the image."""
    from pycocotools import mask as coco

    (top, left, height, width), (to_top, to_left, to_height, to_width) = geometry.source, geometry.target
    x, y = np.concatenate(polygons).reshape(-1, 2).T
    x, y = (x - left) * (to_width / width), (y - top) * (to_height / height)
    if x.max() <= 0 or y.max() <= 0 or x.min() >= to_width or y.min() >= to_height:
        return
    x = to_width - x if geometry.flip else x
    bounds = np.cumsum([len(polygon) for polygon in polygons])[:-1]
    rles = coco.frPyObjects(np.split(np.stack([x, y], 1).ravel(), bounds), to_height, to_width)
    slot = out[to_top : to_top + to_height, to_left : to_left + to_width]
    decode_into(rles[0] if len(rles) == 1 else coco.merge(rles), slot)


def _sample(one: dict[str, Any] | Bitmap, geometry: Geometry, out: np.ndarray) -> None:
    """Nearest pixels of a bitmap or RLE, in the part of the output that its rectangle covers."""
    if isinstance(one, dict):
        dense = np.zeros(one["size"], bool)
        decode_into(one, dense)
        one = Bitmap(0, 0, dense)
    (top, left, height, width), (to_top, to_left, to_height, to_width) = geometry.source, geometry.target
    rows = top + (np.arange(to_height) + 0.5) * (height / to_height)
    columns = left + (np.arange(to_width) + 0.5) * (width / to_width)
    rows, columns = rows.astype(np.intp) - one.top, columns.astype(np.intp) - one.left
    if geometry.flip:
        columns = columns[::-1]
    inside_rows = np.flatnonzero((rows >= 0) & (rows < one.mask.shape[0]))
    inside_columns = np.flatnonzero((columns >= 0) & (columns < one.mask.shape[1]))
    if not len(inside_rows) or not len(inside_columns):
        return
    part = one.mask.take(rows[inside_rows], 0).take(columns[inside_columns], 1)
    row, column = to_top + inside_rows[0], to_left + inside_columns[0]
    out[row : row + part.shape[0], column : column + part.shape[1]] = part
