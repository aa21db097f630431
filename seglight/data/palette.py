"""The colours of the VOC devkit."""

from __future__ import annotations

Colour = tuple[int, int, int]


def palette(count: int) -> tuple[Colour, ...]:
    """The colours of the VOC devkit: three bits of a label at a time go to red, green and blue, high bits first."""
    return tuple(
        tuple(sum((label >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3))
        for label in range(count)
    )
