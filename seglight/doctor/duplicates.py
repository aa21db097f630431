"""Pictures that are the same or nearly so, found by a small thumbnail of each.

A thumbnail is 32x32 grey without its coarse part (what a Gaussian of 2 cells keeps), because sky above and ground below
make half of all photographs alike. Two of them are compared by their correlation. Measured on real data: among 196,000
pairs of different VOC photographs the largest is 0.45, for COCO 0.27, neighbouring slices of a microscope stack 0.58;
the same picture at half size and JPEG quality 40 has 0.966 or more, brightened 0.94 or more; consecutive video frames
have 0.6 to 0.98.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

SIDE = 32
SAME = 0.93
"""Correlation from which two pictures may be one picture, stored twice."""
SIMILAR = 0.75
"""Correlation from which two pictures show the same place: frames of a video, a series of shots."""
_COARSE = 16  # cells of the first comparison, which only says which pairs to look at
_FIRST = 0.55  # what it lets through; for pairs of SIMILAR and more it is hardly below theirs
_ROWS = 2048
_FLAT = 2.0  # standard deviation in grey levels below which a thumbnail shows nothing


class Pair(NamedTuple):
    """Two pictures that look alike."""

    first: int
    second: int
    score: float
    mirrored: bool


def thumbnail(image: np.ndarray) -> np.ndarray:
    """uint8 (32, 32) of an image uint8 (H, W, 3), each cell the mean of its pixels."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    while min(grey.shape) >= 8 * SIDE:  # halving first is faster than one large mean, and equal to it but for rounding
        grey = cv2.resize(grey, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def alike(thumbnails: np.ndarray, group: np.ndarray) -> list[Pair]:
    """Pairs with a correlation of `SAME` and more within a group, of `SIMILAR` and more across groups.

    All pairs are compared: 118,000 pictures are 1.8e12 multiplications, a minute or two beside the many of decoding
    them. Across groups mirrored copies count as well, because offline augmentation before the split makes them.

    Args:
        thumbnails: uint8 (N, 32, 32).
        group: int (N,), the split of each.
    """
    useful = np.flatnonzero(thumbnails.reshape(len(thumbnails), -1).std(1) >= _FLAT)
    if len(useful) < 2:
        return []
    fine = _details(thumbnails[useful])
    group = group[useful]
    found = _pairs(fine, fine, group, mirrored=False)
    if len(set(group.tolist())) > 1:
        found += _pairs(fine, fine[:, :, ::-1], group, mirrored=True)
    return [Pair(int(useful[i]), int(useful[j]), score, mirrored) for i, j, score, mirrored in found]


def same_picture(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two images, uint8 (H, W, 3), are copies of one, perhaps at another size, quality or brightness.

    At 96x96 and with brightness and contrast equalised, copies differ everywhere by the little that compression costs,
    frames of a video by a lot wherever something moved.
    """
    a, b = (_normal(cv2.resize(cv2.cvtColor(one, cv2.COLOR_RGB2GRAY), (96, 96), interpolation=cv2.INTER_AREA))
            for one in (first, second))  # fmt: skip
    worst = np.sort(np.abs(a - b).ravel())[-92:]  # the worst hundredth
    return float(worst.mean()) < 0.6  # frames of CamVid: 0.71 and more; copies at JPEG quality 75: 0.39 and less


def _normal(grey: np.ndarray) -> np.ndarray:
    values = grey.astype(np.float32)
    return (values - values.mean()) / max(float(values.std()), 1e-3)


def _details(thumbnails: np.ndarray) -> np.ndarray:
    """float32 (N, 32, 32) without the coarse part, each of norm 1."""
    found = np.empty(thumbnails.shape, np.float32)
    for one, out in zip(thumbnails, found, strict=True):
        values = one.astype(np.float32)
        np.subtract(values, cv2.GaussianBlur(values, (0, 0), 2), out)
        out -= out.mean()
        out /= max(float(np.linalg.norm(out)), 1e-6)
    return found


def _pairs(
    fine: np.ndarray, other: np.ndarray, group: np.ndarray, mirrored: bool
) -> list[tuple[int, int, float, bool]]:
    left, right = _coarse(fine), _coarse(other)
    flat, flat_other = fine.reshape(len(fine), -1), np.ascontiguousarray(other).reshape(len(other), -1)
    found = []
    for begin in range(0, len(left), _ROWS):
        scores = left[begin : begin + _ROWS] @ right[begin:].T
        rows, columns = np.nonzero(scores >= _FIRST)
        keep = columns > rows
        rows, columns = rows[keep] + begin, columns[keep] + begin
        across = group[rows] != group[columns]
        if mirrored:
            rows, columns, across = rows[across], columns[across], across[across]
        for part in range(0, len(rows), 1 << 14):
            r, c = rows[part : part + (1 << 14)], columns[part : part + (1 << 14)]
            exact = np.einsum("ij,ij->i", flat[r], flat_other[c])
            good = exact >= np.where(across[part : part + (1 << 14)] & (not mirrored), SIMILAR, SAME)
            found += zip(r[good].tolist(), c[good].tolist(), exact[good].tolist(), [mirrored] * int(good.sum()),
                         strict=True)  # fmt: skip
    return found


def _coarse(fine: np.ndarray) -> np.ndarray:
    """float32 (N, 256): means of 2x2 cells, of norm 1."""
    half = SIDE // _COARSE
    cells = fine.reshape(len(fine), _COARSE, half, _COARSE, half).mean((2, 4)).reshape(len(fine), -1)
    return cells / np.maximum(np.linalg.norm(cells, axis=1, keepdims=True), 1e-6)
