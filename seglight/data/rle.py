"""COCO's run-length encoding, as far as pycocotools has no function for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from seglight.types import RLE


def run_lengths(text: bytes) -> np.ndarray | None:
    """int64, the runs of a compressed RLE; None if it is none.

    Each run is a number in groups of 5 bits, least significant first, one character (48 + bits) per group. Bit 32 says
    that more follow, bit 16 of the last one is the sign. From the fourth run on it is the difference to the last but
    one.
    """
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 8:
        return None
    place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    runs = np.add.reduceat((codes & 31) << 5 * place, starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << 5 * (ends - starts + 1), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def decode_into(rle: RLE, out: np.ndarray) -> None:
    """Set the pixels of a sound mask in `out`, bool (H, W), and leave the others alone.

    pycocotools writes every pixel of the image, one by one (2 ms for 800x1067). Here only the columns are touched in
    which the mask has a pixel.
    """
    height = rle["size"][0]
    ends = np.cumsum(run_lengths(rle["counts"]))
    starts, stops = ends[:-1:2], ends[1::2]
    filled = starts < stops
    starts, stops = starts[filled], stops[filled]
    if not len(starts):
        return
    left, right = int(starts[0]) // height, -(-int(stops[-1]) // height)
    change = np.zeros((right - left) * height + 1, np.int8)
    change[starts - left * height] = 1
    change[stops - left * height] -= 1  # a run may begin where another ends
    inside = np.cumsum(change[:-1], dtype=np.int8).view(bool).reshape(-1, height)
    rows = np.flatnonzero(inside.any(0))
    top, bottom = rows[0], rows[-1] + 1
    out[top:bottom, left:right] |= inside[:, top:bottom].T
