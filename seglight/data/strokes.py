"""Shapes drawn by integer arithmetic into maps of 0 and 1, the same on every machine."""

from __future__ import annotations

import numpy as np


def _pixel_centres(shape: np.ndarray, x: tuple[int, int], y: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """The part of a map within limits, and x (w,) and y (h,) of its pixel centres; all in sixteenths of a pixel."""
    left, right = (min(max(v, 0), shape.shape[1]) for v in (x[0] >> 4, (x[1] >> 4) + 1))
    top, bottom = (min(max(v, 0), shape.shape[0]) for v in (y[0] >> 4, (y[1] >> 4) + 1))
    return shape[top:bottom, left:right], np.arange(left, right) * 16 + 8, np.arange(top, bottom) * 16 + 8


def polygon(shape: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Pixels whose centre has an odd number of sides to its left.

    OpenCV's own polygons and lines are not used here: 4.10 and 5.0 disagree about pixels on the border.
    """
    x1, y1 = np.rint(x * 16).astype(np.int64)[:, None], np.rint(y * 16).astype(np.int64)[:, None]
    x2, y2 = np.concatenate((x1[1:], x1[:1])), np.concatenate((y1[1:], y1[:1]))
    part, px, py = _pixel_centres(shape, (int(x1.min()), int(x1.max())), (int(y1.min()), int(y1.max())))
    spans = (y1 <= py) != (y2 <= py)
    crossing = x1 + (py - y1) * (x2 - x1) // np.where(y1 == y2, 1, y2 - y1)
    part |= np.logical_xor.reduce(spans[..., None] & (px > crossing[..., None]))


def ellipse(
    shape: np.ndarray, at: tuple[float, float], radii: tuple[float, float], turn: float, hole: float = 0.0
) -> None:
    """An ellipse, or what lies between it and the same one shrunk by the factor `hole`."""
    cx, cy, a, b = (round(16 * v) for v in (*at, *radii))
    reach = max(a, b)
    part, px, py = _pixel_centres(shape, (cx - reach, cx + reach), (cy - reach, cy + reach))
    cos, sin = round(1024 * np.cos(turn)), round(1024 * np.sin(turn))
    dx, dy = px - cx, (py - cy)[:, None]
    u, v = (dx * cos + dy * sin) >> 10, (dy * cos - dx * sin) >> 10
    level = (u * b) ** 2 + (v * a) ** 2
    inner = round(16 * hole) ** 2 * (a * b) ** 2 >> 8
    part |= (level <= (a * b) ** 2) & (level >= inner)


def stroke(shape: np.ndarray, x: np.ndarray, y: np.ndarray, thickness: int) -> None:
    """A line through points, of exactly `thickness` pixels measured along the axis that it runs across."""
    points = np.rint(np.stack([x, y])).astype(np.int64)
    way = points[:, 1:] - points[:, :-1]
    counts = np.maximum(np.abs(way).max(axis=0), 1)  # pixels from each point to the next
    segment = np.repeat(np.arange(len(counts)), counts)
    step = np.arange(len(segment)) - (np.cumsum(counts) - counts)[segment]
    count = counts[segment]
    px, py = points[:, segment] + (way[:, segment] * step * 2 + count) // (2 * count)
    level = np.ptp(points[0]) >= np.ptp(points[1])
    for _ in range(thickness):
        seen = (px >= 0) & (px < shape.shape[1]) & (py >= 0) & (py < shape.shape[0])
        shape[py[seen], px[seen]] = 1
        px, py = (px, py + 1) if level else (px + 1, py)
