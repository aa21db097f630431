"""From logits to labels, and the ways of looking at one image more than once.

A `net` here is any callable from a float image (B, C, H, W), already normalised, to logits (B, K, h, w) of any stride.
`sliding`, `multiscale` and `rotations` return logits at the size of their image, so each is a net again and they nest:

    def windows(image):
        return sliding(net, image, window=513, stride=342)

    classes = labels(multiscale(windows, image, scales=(0.75, 1, 1.25), flip=True), (H, W))

No function here turns gradients off; wrap the call in `torch.inference_mode()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Net = Callable[[Tensor], Tensor]
Aggregate = Literal["softmax", "logits", "exp"]
"""What is averaged: probabilities, logits, or exponentials of logits (EncNet's release), before which the logits of an
image and of its mirror image are added."""
SizeRule = Callable[[tuple[int, int], float, int | None], tuple[int, int]]
"""Size (h, w) of an image of some size at a scale, with or without a common longer side; see `scaled_size`."""
STRIPE = 2**17
"""Floats of a stripe of logits in `labels` (512 KiB): the few passes over it then stay in the processor's cache."""
BAND = 16
"""Rows of the small logits that `labels` widens at a time; one row is computed twice for each band."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; the mode of before comes back, also where something fails."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def labels(logits: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Return the best class of each pixel after bilinear resizing, equal to `F.interpolate(...).argmax(1)`.

    On torch 2.11, whose kernel rounds the weights of rows differently, resized logits differ by up to 1e-5, so classes
    that are as close as that may change places.

    The full-size logits never exist on a CPU, only some rows of them; on an accelerator those of one image do. No
    softmax: it cannot change the winner. On the CPU the logits are read as contiguous, so that labels do not depend on
    the memory format (torch rounds the last bit differently for channels_last). Half-precision logits are resized in
    float32: rounding after the resizing would make ties. The label of a pixel with a nan is any class.

    Args:
        logits: float (B, K, h, w).
        size: (H, W) of the label.
        align_corners: as in `F.interpolate`.

    Returns:
        (B, H, W), uint8 if K <= 255, else int64.
    """
    batch, classes, height, width = logits.shape
    size = tuple(size)
    out = torch.empty((batch, *size), dtype=torch.uint8 if classes <= 255 else torch.int64, device=logits.device)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        for image, label in zip(logits.split(1), out, strict=True):
            label.copy_(_resize(image, size, align_corners)[0].argmax(0))
        return out
    for image, label in zip(logits.contiguous().split(1), out, strict=True):
        # torch resizes three channels and narrow outputs with kernels that round differently from the one copied below.
        if size == (height, width) or classes == 3 or size[1] <= 128:
            _write_ranks(label, _resize(image, size, align_corners)[0])
        else:
            _write_resized_ranks(label, image, align_corners)
    return (classes - out).clamp_(0, classes - 1)


def _write_ranks(out: Tensor, logits: Tensor) -> None:
    """Write the ranks of `_best` of `logits`, float32 (K, H, W) on the CPU, into `out` (H, W)."""
    rank = _rank(len(logits))
    rows = max(1, STRIPE // logits[:, 0].numel())
    for top in range(0, len(out), rows):
        out[top : top + rows] = _best(logits[:, top : top + rows].clone(), rank)


def _write_resized_ranks(out: Tensor, image: Tensor, align_corners: bool) -> None:
    """Write the ranks of `_best` of one image, float32 (1, K, h, w) on the CPU, resized to `out` (H, W).

    torch resizes along x, a band of rows at a time. Along y it is done here, for the output rows between two source
    rows at once and in the order of torch's kernel: (1 - t) * above + (t * below), rounded as `addcmul` does.
    """
    classes, height = image.shape[1:3]
    rank = _rank(classes)
    rows = max(1, STRIPE // (classes * out.shape[1]))
    source, t = _taps(height, out.shape[0], align_corners)
    t, s = t[:, None], 1 - t[:, None]
    begin = torch.searchsorted(source, torch.arange(height + 1)).tolist()
    for y in range(height):  # output rows begin[y]..begin[y + 1] - 1 lie between the source rows y and y + 1
        if y % BAND == 0:
            band = image[:, :, y : y + BAND + 1]
            band = _resize(band, (band.shape[2], out.shape[1]), align_corners)[0]
        above, below = band[:, y % BAND, None], band[:, min(y % BAND + 1, band.shape[1] - 1), None]
        for top in range(begin[y], begin[y + 1], rows):
            part = slice(top, min(top + rows, begin[y + 1]))
            out[part] = _best((below * t[part]).addcmul_(above, s[part]), rank)


def _rank(classes: int) -> Tensor:
    return torch.arange(classes, 0, -1, dtype=torch.int32)[:, None, None]


def _best(stripe: Tensor, rank: Tensor) -> Tensor:
    """Rank int32 (H, W) of the first best class of a stripe float32 (K, H, W), which is overwritten.

    Class 0 has rank K, the last one rank 1. Many times faster than argmax over a strided axis: minus its maximum, the
    stripe is +0.0 where a class wins and negative elsewhere, and so are its bits read as integers. Adding the rank then
    orders the winners by index. (0.0 - x rather than -x, because -0.0 has negative bits.)
    """
    gap = stripe.add_(0.0 - stripe.amax(0))
    return gap.view(torch.int32).add_(rank).amax(0)


def _taps(size: int, out: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Source row above each of `out` rows (int64) and the weight of the next row (float32), rounded as torch does."""
    position = torch.arange(out, dtype=torch.float32)
    if align_corners:
        position = position * torch.tensor((size - 1) / max(out - 1, 1), dtype=torch.float32)
    else:
        scale = torch.tensor(size / out, dtype=torch.float32)
        position = ((position + 0.5) * scale - 0.5).clamp_min(0)
    above = position.long().clamp_max(size - 1)
    return above, position - above


def sliding(
    net: Net,
    image: Tensor,
    window: int | tuple[int, int],
    stride: int | tuple[int, int],
    aggregate: Aggregate = "softmax",
    align_corners: bool = False,
    flip: bool = False,
    last: Literal["shift", "pad"] = "shift",
    centred: bool = False,
    fill: float | Tensor = 0.0,
) -> Tensor:
    """Run `net` on overlapping windows and average what they say of each pixel.

    Every window is full. An image smaller than the window is padded, by default right and below with 0, the mean colour
    of a normalised image.

    Args:
        net: see the module.
        image: float (B, C, H, W), normalised.
        window: size (h, w) of a window, or one number for both.
        stride: step (y, x) between windows, at most `window`.
        aggregate: "softmax" averages probabilities, "logits" averages logits; see `Aggregate`.
        align_corners: of resizing the logits of a window to the window.
        flip: look at each window twice, the second time mirrored. (`multiscale` mirrors the whole image, and a shifted
            last window then lies elsewhere.)
        last: the last window of a row or column is shifted inside, or reaches over the border, where the image is
            padded.
        centred: pad on all sides alike, the odd pixel right and below.
        fill: what is padded, a number or (C, 1, 1).

    Returns:
        float32 (B, K, H, W). With "softmax", the logarithm of the mean probability: softmax over K gives it back. With
        "exp", the logarithm of the mean exponential.
    """
    high, wide = _pair(window)
    down, right = _pair(stride)
    if not (1 <= down <= high and 1 <= right <= wide):
        raise ValueError(
            f"The stride is {stride} and the window {window}; a stride must be 1 to the window, or pixels are missed."
        )
    if last not in ("shift", "pad"):
        raise ValueError(f'last is {last!r}; choose "shift" or "pad".')
    height, width = image.shape[-2:]
    sides = [max(height, high), max(width, wide)]
    if last == "pad":
        sides = [
            w + -(-(side - w) // step) * step for side, w, step in zip(sides, (high, wide), (down, right), strict=True)
        ]
    top, left = ((sides[0] - height) // 2, (sides[1] - width) // 2) if centred else (0, 0)
    if sides != [height, width]:
        canvas = image.new_empty((*image.shape[:2], *sides))
        canvas[:] = fill
        canvas[..., top : top + height, left : left + width] = image
        image = canvas
    total, seen = None, image.new_zeros(image.shape[-2:], dtype=torch.float32)
    rows, columns = window_starts(image.shape[-2], high, down), window_starts(image.shape[-1], wide, right)
    for y, x in product(rows, columns):
        votes = _look(net, image[..., y : y + high, x : x + wide], (high, wide), flip, aggregate, align_corners)
        if total is None:
            total = votes.new_zeros((*votes.shape[:2], *image.shape[-2:]))
        total[..., y : y + high, x : x + wide] += votes
        seen[y : y + high, x : x + wide] += 1
    return _verdict((total / seen)[..., top : top + height, left : left + width], aggregate)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return the first pixels of windows that cover 0..length-1; the last one ends at the border. length >= window."""
    last = length - window
    return [*range(0, last, stride), last]


def multiscale(
    net: Net,
    image: Tensor,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    aggregate: Aggregate = "softmax",
    align_corners: bool = False,
    long_side: int | None = None,
    resize: Literal["logits", "votes"] = "logits",
    align_image: bool = False,
    size_of: SizeRule | None = None,
) -> Tensor:
    """Run `net` on the image at several scales, mirrored left to right too if asked, and average.

    Args:
        net: see the module; it must accept every scaled size.
        image: float (B, C, H, W), normalised.
        scales: factors above 0; the image is resized bilinearly to the size that `scaled_size` gives.
        flip: look at each scale twice.
        aggregate: "softmax" averages probabilities (DeepLabv3), "logits" averages logits; see `Aggregate`.
        align_corners: of resizing the logits to the image.
        long_side: length in pixels of the longer side at scale 1, whatever the image's own; none keeps its own.
        resize: "logits" brings logits to the size of the image, "votes" what they are averaged as, such as
            probabilities. The latter suits windows, which make probabilities at the size of the scaled image.
        align_image: align_corners of resizing the image.
        size_of: another rule than `scaled_size`, called with (H, W), a scale and `long_side`.

    Returns:
        float32 (B, K, H, W), as `sliding`.
    """
    if not scales or not all(scale > 0 for scale in scales):
        raise ValueError(f"scales is {scales}; give at least one factor above 0, for example (1.0,).")
    height, width = image.shape[-2:]
    if resize not in ("logits", "votes"):
        raise ValueError(f'resize is {resize!r}; choose "logits" or "votes".')
    rule = size_of or partial(scaled_size, align_corners=align_image)
    total = 0.0
    for scale in scales:
        size = rule((height, width), scale, long_side)
        scaled = _resize(image, size, align_image)
        votes = _look(net, scaled, size if resize == "votes" else (height, width), flip, aggregate, align_corners)
        total = total + _resize(votes, (height, width), align_corners)
    return _verdict(total / len(scales), aggregate)


def scaled_size(
    size: tuple[int, int], scale: float, long_side: int | None = None, align_corners: bool = False
) -> tuple[int, int]:
    """Size (h, w) of an image at a scale: of its own size, or of the size whose longer side is `long_side`.

    Sides are rounded, halves to even, as in PSPNet's release. With `align_corners` the distance of the corners is what
    is scaled, not the own side, and rounded down, as in TensorFlow's DeepLab.
    """
    if align_corners and long_side is None:
        return int((size[0] - 1) * scale + 1), int((size[1] - 1) * scale + 1)
    factor = scale if long_side is None else round(scale * long_side) / max(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def overlap_tile(net: Net, image: Tensor, out_tile: int | tuple[int, int], margin: int) -> Tensor:
    """Predict an image of any size with a network of unpadded convolutions (Ronneberger et al. 2015, figure 2).

    The output plane is tiled; each tile is fed with `margin` more pixels on every side, and what lies outside the image
    is mirrored at its border (the border pixel is not repeated), again and again if the margin exceeds the image. Each
    output pixel is predicted exactly once. The last tile of a row or column may reach over the border and is cropped.

    Args:
        net: maps (B, C, h + 2 margin, w + 2 margin) to (B, K, h, w).
        image: float (B, C, H, W), normalised.
        out_tile: (h, w) of the output of one call, or one number for both; a size that the network can give.
        margin: pixels that the network loses on each side, 92 for the paper's U-Net.

    Returns:
        (B, K, H, W), logits.
    """
    high, wide = _pair(out_tile)
    if min(high, wide) < 1 or margin < 0:
        raise ValueError(
            f"out_tile is {out_tile} and margin {margin}; a tile has at least one pixel, and no margin is negative."
        )
    height, width = image.shape[-2:]
    out = None
    for y, x in product(range(0, height, high), range(0, width, wide)):
        rows = _mirror(y - margin, y + high + margin, height, image.device)
        columns = _mirror(x - margin, x + wide + margin, width, image.device)
        logits = net(image[:, :, rows[:, None], columns])
        if logits.shape[-2:] != (high, wide):
            given = (high + 2 * margin, wide + 2 * margin)
            raise ValueError(
                f"The network made {tuple(logits.shape[-2:])} out of a tile of {given}, not {(high, wide)}. "
                "Set margin to the pixels that it loses on each side and out_tile to a size that it can give."
            )
        if out is None:
            out = logits.new_empty((image.shape[0], logits.shape[1], height, width))
        out[..., y : y + high, x : x + wide] = logits[..., : height - y, : width - x]
    return out


def rotations(
    net: Net,
    image: Tensor,
    count: int,
    aggregate: Aggregate = "softmax",
    align_corners: bool = False,
) -> Tensor:
    """Run `net` on the image turned by `count` equal parts of a full turn, turn what it says back, and average.

    U-Net's electron microscopy result averages 7 of them (Ronneberger et al. 2015, section 4); which 7 the paper does
    not say. A turned image lies in a canvas that holds all of it, filled by mirroring at its borders. Quarter turns are
    exact, others are interpolated bilinearly on both ways.

    Args:
        net: see the module; it must accept every size, up to the diagonal of the image.
        image: float (B, C, H, W), normalised.
        count: number of rotations, from 1 (the image as it is).
        aggregate: what is averaged, see `Aggregate`.
        align_corners: of resizing the logits to the canvas.

    Returns:
        float32 (B, K, H, W), as `sliding`.
    """
    if count < 1:
        raise ValueError(f"count is {count}; average at least 1 rotation, the image as it is.")
    height, width = image.shape[-2:]
    total: float | Tensor = 0.0
    for turn in range(count):
        degrees = 360 * turn / count
        if degrees % 90 == 0:
            quarters = round(degrees / 90)
            turned = image.rot90(quarters, (-2, -1))
            votes = _votes(net(turned), turned.shape[-2:], aggregate, align_corners)
            total = total + votes.rot90(-quarters, (-2, -1))
        else:
            turned = _turned(image, _canvas(height, width, degrees), degrees)
            votes = _votes(net(turned), turned.shape[-2:], aggregate, align_corners)
            total = total + _turned(votes, (height, width), -degrees)
    return _verdict(total / count, aggregate)


def _canvas(height: int, width: int, degrees: float) -> tuple[int, int]:
    """The smallest size that holds the centres of all pixels of a turned image."""
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    high, wide = cos * (height - 1) + sin * (width - 1), cos * (width - 1) + sin * (height - 1)
    return math.ceil(high - 1e-6) + 1, math.ceil(wide - 1e-6) + 1


def _turned(image: Tensor, size: tuple[int, int], degrees: float) -> Tensor:
    """Turn (B, C, H, W) counter-clockwise about its centre, bilinearly; mirrored outside, the border not repeated."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2 for side in size)
    last_y, last_x = (max(side - 1, 1) / 2 for side in image.shape[-2:])  # half the distance of the outer centres
    grid = torch.stack([(cos * x - sin * y[:, None]) / last_x, (sin * x + cos * y[:, None]) / last_y], -1)
    grid = grid.to(image).expand(len(image), -1, -1, -1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


def mirror_pad(image: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Continue an image by its mirror image, the border pixel not repeated, by any number of pixels.

    Args:
        image: (..., H, W).
        rows: pixels to add above and below.
        columns: pixels to add left and right.
    """
    height, width = image.shape[-2:]
    y = _mirror(-rows[0], height + rows[1], height, image.device)
    x = _mirror(-columns[0], width + columns[1], width, image.device)
    return image[..., y[:, None], x]


def _mirror(start: int, stop: int, length: int, device: torch.device) -> Tensor:
    """Pixels of an axis at the positions start..stop-1 of its endless mirror image."""
    last = length - 1
    return last - (torch.arange(start, stop, device=device) % max(2 * last, 1) - last).abs()


def _look(net: Net, image: Tensor, size: tuple[int, int], flip: bool, aggregate: str, align_corners: bool) -> Tensor:
    """Votes at `size` of an image, and of its mirror image if asked."""
    logits = net(image)
    if not flip:
        return _votes(logits, size, aggregate, align_corners)
    mirrored = net(image.flip(-1)).flip(-1)
    if aggregate == "exp":  # the one case that adds before it votes
        return _votes(logits.float() + mirrored.float(), size, aggregate, align_corners)
    return (_votes(logits, size, aggregate, align_corners) + _votes(mirrored, size, aggregate, align_corners)) / 2


def _votes(logits: Tensor, size: tuple[int, int], aggregate: str, align_corners: bool) -> Tensor:
    """Logits at `size` in float32, as what is averaged."""
    if aggregate not in ("softmax", "logits", "exp"):
        raise ValueError(f'aggregate is {aggregate!r}; choose "softmax", "logits" or "exp".')
    logits = _resize(logits.float(), size, align_corners)
    if aggregate == "exp":
        return logits.clamp_max(80).exp()  # float32 ends at exp(88): some thousand looks may be summed
    return logits.softmax(1) if aggregate == "softmax" else logits


def _verdict(mean: Tensor, aggregate: str) -> Tensor:
    """Averaged votes as logits. The smallest normal float stands for probability 0: a resizing makes nan of -inf."""
    return mean if aggregate == "logits" else mean.clamp_min(torch.finfo(mean.dtype).tiny).log()


def _resize(values: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    if tuple(values.shape[-2:]) == size:
        return values
    return F.interpolate(values, size=size, mode="bilinear", align_corners=align_corners)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
