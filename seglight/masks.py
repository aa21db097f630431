"""From a network's small mask grids to dense masks and run lengths, and back.

A mask is a grid of m x m probabilities laid over a window of the image. Its value at a pixel is read at the pixel's
centre (x + 0.5, y + 0.5): bilinear between the centres of the cells, zero beyond the grid. That is detectron2's
continuous paste, `grid_sample(align_corners=False, padding_mode="zeros")`; torchvision's `paste_masks_in_image` rounds
the window to whole pixels first, which moves small objects by up to a pixel.

Interpolation is separable, so a window of h x w pixels costs two small matrix products, and runs of pixels are found
within the window only. Dense masks of a whole image are what makes the usual way slow, and what fills the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from seglight.types import RLE

TOGETHER = 64
"""Masks whose interpolation weights are made at a time: few enough to keep the tables in cache."""


def paste(masks: Tensor, windows: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Return dense masks: true where the value at the pixel's centre is at least `threshold`.

    Args:
        masks: probabilities (N, m, m), any floating type, any device; m x m cells cover the window.
        windows: (N, 4), x1 y1 x2 y2 in pixels. May leave the image; one without area, or between the centres of pixels,
            gives an empty mask.
        size: height and width of the image.
        threshold: above 0, at most 1. Below 0.5 a mask may reach half a cell beyond its window, as in `grid_sample`.

    Returns:
        bool (N, H, W), on the device of `masks`. N full images: for a picture to look at. `encode` is for keeping.

    Raises:
        ValueError: wrong shapes, values that are not finite, an empty image or a threshold out of range.
    """
    out = np.zeros((len(masks), *map(int, size)), dtype=bool)
    for n, (x, y, local) in enumerate(_local(masks, windows, size, threshold)):
        w, h = len(local), local.shape[1] - 1
        out[n, y : y + h, x : x + w] = local[:, :h].T
    return torch.from_numpy(out).to(masks.device)


def encode(masks: Tensor, windows: Tensor, size: tuple[int, int], threshold: float = 0.5) -> list[RLE]:
    """Return compressed run lengths of `paste`, byte for byte those of `pycocotools.mask.encode`, without pasting.

    Args, errors: as `paste`. Tensors of a GPU come to the host once, as grids.

    Returns:
        N dictionaries of `size` [H, W] and `counts`, bytes.
    """
    height, width = map(int, size)
    borders, numbers = [], []
    for x, y, local in _local(masks, windows, size, threshold):
        runs = _runs(local, x, y, height)
        borders += (runs, [height * width])
        numbers.append(len(runs) + 1)
    if not numbers:
        return []
    return [{"size": [height, width], "counts": text} for text in _compress(np.concatenate(borders), numbers)]


def decode(rles: Sequence[RLE], size: tuple[int, int] | None = None) -> np.ndarray:
    """Return dense masks of run lengths, bool (N, H, W).

    Args:
        rles: compressed, all of one size.
        size: height and width, needed only to shape the result if there are no masks; (0, 0, 0) without.
    """
    from pycocotools import mask

    if not rles:
        return np.zeros((0, *(size or (0, 0))), dtype=bool)
    return np.ascontiguousarray(mask.decode(list(rles)).transpose(2, 0, 1)).view(bool)


def areas(rles: Sequence[RLE]) -> np.ndarray:
    """Return the number of pixels of each mask, int64 (N,)."""
    from pycocotools import mask

    rles = list(rles)  # pycocotools 2.0.11 fails on more than 255 at once (OverflowError), as proposals are
    parts = [mask.area(rles[start : start + 255]) for start in range(0, len(rles), 255)]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def boxes(rles: Sequence[RLE]) -> np.ndarray:
    """Return the tightest boxes of the masks, float32 (N, 4), x1 y1 x2 y2; zeros for an empty mask."""
    from pycocotools import mask

    out = np.asarray(mask.toBbox(list(rles)) if rles else [], dtype=np.float32).reshape(-1, 4)
    out[:, 2:] += out[:, :2]
    return out


def _local(
    masks: Tensor, windows: Tensor, size: tuple[int, int], threshold: float
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield x, y of the first pixel and a bool mask (w, h + 1) of each window: columns first, a false row below."""
    grids, windows = _checked(masks, windows, size, threshold)
    m = grids.shape[1]
    for start in range(0, len(grids), TOGETHER):
        part = windows[start : start + TOGETHER]
        first_x, columns = _weights(part[:, 0], part[:, 2], int(size[1]), m, 0)
        first_y, rows = _weights(part[:, 1], part[:, 3], int(size[0]), m, 1)
        # the row of zero weights at the end separates the columns of a mask: no run crosses it
        for grid, x, y, across, down in zip(grids[start:], first_x, first_y, columns, rows, strict=False):
            yield x, y, (across @ grid.T) @ down.T >= threshold


def _weights(low: np.ndarray, high: np.ndarray, pixels: int, m: int, extra: int) -> tuple[list[int], list[np.ndarray]]:
    """Interpolation along one axis for many windows low..high, float64 (N,).

    Returns:
        The first pixel of each window, and float32 (n + extra, m) weights of the cells for its n pixels; `extra` rows
        of zeros follow.
    """
    cell = (high - low) / m
    empty = ~(cell > 0)
    cell[empty] = 1
    # the pixels with a centre within half a cell of the window, where the grid is not zero, and one more at each end
    first = np.clip(np.floor(low - cell / 2 - 0.5), 0, pixels).astype(np.int64)
    last = np.clip(np.ceil(high + cell / 2 + 0.5), 0, pixels).astype(np.int64)
    last = np.where(empty, first, np.maximum(first, last))
    length = last - first + extra
    end = np.cumsum(length)
    which = np.repeat(np.arange(len(low)), length)
    pixel = np.arange(end[-1]) - (end - length - first)[which]
    # in cells, so that 0 is the centre of the first; float64, because windows may be tiny and far from the origin
    at = np.clip((pixel + 0.5 - low[which]) / cell[which] - 0.5, -1, m)
    at[pixel >= last[which]] = m
    below = np.minimum(np.floor(at), m - 1)
    share = (at - below).astype(np.float32)
    table = np.zeros((len(at), m + 2), dtype=np.float32)  # a column of cells beyond each end takes what is lost there
    line, below = np.arange(len(at)), below.astype(np.int64)
    table[line, below + 1] = 1 - share  # 1 - share + share is exactly 1 in float32, so a grid of 0.5 stays 0.5
    table[line, below + 2] = share
    return first.tolist(), np.split(table[:, 1:-1], end[:-1])


def _runs(local: np.ndarray, x: int, y: int, height: int) -> np.ndarray:
    """Positions in the column-wise image where runs of true start and end, in turn; int64, an even number of them."""
    lines = local.shape[1]
    if lines == height + 1:  # full columns: a run may go on in the next one
        local, lines = local[:, :height], height
    flat = local.ravel()
    if not flat.any():
        return np.zeros(0, dtype=np.int64)
    change = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat[0]:
        change = np.concatenate(([0], change))
    if flat[-1]:
        change = np.concatenate((change, [len(flat)]))
    return change + (change // lines) * (height - lines) + (x * height + y)


def _compress(borders: np.ndarray, numbers: list[int]) -> list[bytes]:
    """COCO's strings of many masks: lengths as differences, in groups of 5 bits, low ones first.

    Args:
        borders: int64, where runs end, of one mask after the other; the last of each is the number of pixels.
        numbers: borders per mask.
    """
    number = np.asarray(numbers)
    start = np.cumsum(number) - number
    lengths = np.diff(borders, prepend=0)
    lengths[start] = borders[start]
    keep = lengths > 0  # a mask that ends in the last pixel has no run after it ...
    keep[start] = True  # ... but the first run, of zeros, is always there
    number = np.add.reduceat(keep, start)
    lengths = lengths[keep]
    start = np.cumsum(number) - number
    value = lengths.copy()
    value[2:] -= lengths[:-2]
    for i in range(3):  # the first three have no predecessor of their kind, as the original counts
        at = (start + i)[number > i]
        value[at] = lengths[at]
    text = np.zeros((len(value), 7), dtype=np.uint8)
    line = np.arange(len(value))
    for group in range(7):
        bits = value & 31
        value = value >> 5
        more = value != -(bits >> 4)  # what is left is more than the sign
        text[line, group] = bits + 48 + 32 * more
        line, value = line[more], value[more]
    used = text > 0
    ends = np.cumsum(used.sum(1))[start + number - 1].tolist()
    whole = text[used].tobytes()
    return [whole[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def _checked(masks: Tensor, windows: Tensor, size: tuple[int, int], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return grids float32 (N, m, m) and windows float64 (N, 4) on the host, fetched in one go."""
    if masks.ndim != 3 or masks.shape[1] != masks.shape[2] or not masks.shape[1] or not masks.is_floating_point():
        raise ValueError(
            f"Masks are {masks.dtype} of shape {tuple(masks.shape)}, but must be probabilities (N, m, m): square "
            "grids, one per object. Index the channel of the predicted class first."
        )
    if tuple(windows.shape) != (len(masks), 4):
        raise ValueError(
            f"Windows have the shape {tuple(windows.shape)} for {len(masks)} masks; give one x1 y1 x2 y2 each."
        )
    if min(size) < 1:
        raise ValueError(f"The image size is {tuple(size)}; height and width must be at least 1.")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}, but must be above 0 and at most 1: masks are probabilities.")
    m = masks.shape[1]
    host = torch.cat([masks.detach().float().flatten(1), windows.detach().float()], 1).cpu().numpy()
    good = np.isfinite(host).all(1)
    if not good.all():
        n = int(np.argmin(good))
        what = "values that are not finite" if np.isfinite(host[n, m * m :]).all() else f"the window {host[n, m * m :]}"
        raise ValueError(
            f"Mask {n} of {len(host)} has {what}; masks and windows must be finite. The network has diverged: lower "
            "the learning rate or clip its gradients."
        )
    return host[:, : m * m].reshape(-1, m, m), host[:, m * m :].astype(np.float64)
