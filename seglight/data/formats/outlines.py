"""Masks as polygons and run lengths."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np


def rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths: column by column, off and on in turn, beginning with off."""
    flat = mask.ravel(order="F")
    bounds = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), flat.size]
    counts = np.diff(bounds).tolist()
    return {"counts": [0, *counts] if flat[0] else counts, "size": list(mask.shape)}


def pieces(mask: np.ndarray) -> list[np.ndarray]:
    """Connected parts, bool (H, W) each, none with a hole: a polygon has one outline, so a ring is cut in two."""
    pixels = mask.astype(np.uint8)
    contours, hierarchy = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    inner = hierarchy[0, :, 3] >= 0 if contours else []
    holes = [points for points, is_hole in zip(contours, inner, strict=True) if is_hole]
    if not holes:
        count, parts = cv2.connectedComponents(pixels, connectivity=8)
        return [parts == part for part in range(1, count)]
    columns = holes[0][..., 0]
    cut = np.arange(mask.shape[1]) < (int(columns.min()) + int(columns.max())) // 2
    return pieces(mask & cut) + pieces(mask & ~cut)


def outline(piece: np.ndarray) -> list[float]:
    """Corners x, y, x, y, ... of the polygon along the pixel edges of a part without holes, clockwise on the screen."""
    padded = np.pad(piece, 1)
    steps = ((1, 0), (0, 1), (-1, 0), (0, -1))  # right, down, left, up: the part is on the right-hand side
    outside = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    starts = ((0, 0), (1, 0), (1, 1), (0, 1))
    edges = set()
    for way, (beyond, (dx, dy)) in enumerate(zip(outside, starts, strict=True)):
        ys, xs = np.nonzero(piece & ~beyond)
        edges |= {(x + dx, y + dy, way) for x, y in zip(xs.tolist(), ys.tolist(), strict=True)}
    x, y, way = first = min(edges, key=lambda edge: (edge[1], edge[0], edge[2]))
    corners: list[float] = []
    while True:
        corners += [float(x), float(y)]
        while True:  # along one straight side
            x, y = x + steps[way][0], y + steps[way][1]
            # Where two pixels touch at a corner only, turning left keeps them in one outline.
            turn = next(turn for turn in (3, 0, 1) if (x, y, (way + turn) % 4) in edges)
            if turn:
                break
        way = (way + turn) % 4
        if (x, y, way) == first:
            return corners
