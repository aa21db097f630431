"""Colours and patterns of the embedded scenes, from a generator: the same numbers on every machine.

Only integer arithmetic and exact resizing touch pixels, because drawing routines differ between versions of OpenCV.
"""

from __future__ import annotations

import cv2
import numpy as np

DIRECTIONS = ((16, 0), (15, 6), (11, 11), (6, 15), (0, 16), (-6, 15), (-11, 11), (-15, 6))
_RAMP = np.arange(256, dtype=np.int32)[:, None, None]


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """Uniform in [low, high)."""
    return low + (high - low) * rng.random()


def whole(rng: np.random.Generator, low: int, high: int) -> int:
    """From low to high, both possible."""
    return low + int((high - low + 1) * rng.random())


def draw_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """Anything but greys: the channels are spread over at least 70 levels."""
    while True:
        red, green, blue = (whole(rng, 25, 235) for _ in range(3))
        if max(red, green, blue) - min(red, green, blue) >= 70:
            return red, green, blue


def shifted(rng: np.random.Generator, colour: tuple[int, int, int], reach: int) -> tuple[int, int, int]:
    """The same colour with each channel moved by at most `reach`."""
    red, green, blue = (min(max(c + whole(rng, -reach, reach), 8), 247) for c in colour)
    return red, green, blue


def apart(one: tuple[int, int, int], other: tuple[int, int, int]) -> int:
    """Largest difference of a channel."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def waves(height: int, width: int, direction: tuple[int, int], period: int, phase: int) -> np.ndarray:
    """Triangle wave 0..254 along a direction, uint8 (height, width)."""
    x = (np.arange(width, dtype=np.int32) * (direction[0] * 16 // period)).astype(np.uint8)
    y = (np.arange(height, dtype=np.int32) * (direction[1] * 16 // period) + phase).astype(np.uint8)
    saw = y[:, None] + x[None]  # modulo 256
    return np.minimum(saw, ~saw) * np.uint8(2)


def noise(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    """Random levels on a grid of `cell` pixels, interpolated, uint8 (height, width)."""
    rows, cols = height // cell + 2, width // cell + 2
    grid = np.frombuffer(rng.bytes(rows * cols), np.uint8).reshape(rows, cols)
    return cv2.resize(grid, (cols * cell, rows * cell), interpolation=cv2.INTER_LINEAR_EXACT)[:height, :width]


def draw_texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One of six patterns, uint8 (height, width)."""
    kind = whole(rng, 0, 5)
    turn = whole(rng, 0, 7)
    period = whole(rng, 5, 16)
    phase = whole(rng, 0, 255)
    if kind == 0:  # a slow ramp
        return waves(height, width, DIRECTIONS[turn], 200, phase)
    if kind == 1:
        return noise(rng, height, width, period)
    if kind == 2:  # grain
        return noise(rng, height, width, 2)
    across = waves(height, width, DIRECTIONS[turn], period, phase)
    if kind == 3:  # stripes
        return across
    along = waves(height, width, DIRECTIONS[(turn + 4) % 8], period, 255 - phase)
    if kind == 4:  # checks
        return ((across ^ along) >> 7) * np.uint8(255)
    return (np.minimum(across, along) > 140) * np.uint8(255)  # dots


def coloured(levels: np.ndarray, low: tuple[int, int, int], high: tuple[int, int, int]) -> np.ndarray:
    """Levels uint8 (H, W) to colours between two, uint8 (H, W, 3)."""
    start, end = np.array(low, np.int32), np.array(high, np.int32)
    table = (start + (end - start) * _RAMP // 255).astype(np.uint8)
    return cv2.LUT(cv2.merge((levels, levels, levels)), table)
