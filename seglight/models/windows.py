"""Square windows on the levels of a pyramid: where they lie, which object each stands for, which ones to train on.

The heads of `seglight.models.fpn_proposals` look through them; its module docstring has their scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from seglight.types import InstanceTarget

STRIDES = (4, 8, 16, 32, 64)
PADDING = 1.25
SAMPLES = 128
POSITIVES = SAMPLES // 4
SMALLEST = 16

NOTHING, EXCLUDED = -1, -2
"""What a window stands for that stands for no object: a negative; neither positive nor negative."""


class Places(NamedTuple):
    """The T locations of all levels of a padded batch, finest level first, row by row."""

    centre: Tensor
    """float32 (T, 2), x y in pixels of the image: cell i lies around (i + 1/2) strides."""
    stride: Tensor
    """int64 (T,)."""
    cell: Tensor
    """int64 (T,), where its cell is among those of all levels, each with a margin of zeros around it."""
    row: Tensor
    """int64 (T,), how many cells further the next row is."""
    starts: Tensor
    """int64 (levels,), the first location of each level."""
    widths: Tensor
    """int64 (levels,), locations in a row of each level."""


def extent(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Tight boxes of masks.

    Args:
        masks: bool (N, H, W).

    Returns:
        float32 (N, 4), x1 y1 x2 y2 with x2 and y2 just outside, and bool (N,), whether there is any pixel; the box of
        an empty mask is the whole grid.
    """
    sides = []
    for seen in (masks.any(1), masks.any(2)):  # columns, rows
        length = seen.shape[1]
        first = seen.byte().argmax(1)
        sides.append((first, length - seen.byte().flip(1).argmax(1)))
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], 1).float(), masks.any(2).any(1)


def _constants(values: Sequence[float], device: torch.device | str) -> Tensor:
    """A small tensor made on the device: `torch.tensor` would copy it there, for which the host waits."""
    return torch.stack([torch.full((), value, device=device) for value in values])


class WindowGrid:
    """The windows of some kernel sizes at every location of the levels P2 to P6.

    A window has a number: h * T + t is that of kernel h at location t of the T ones that `places` lists.

    Args:
        kernels: cells of a level that a head looks at: 5, or 7 for scales half an octave higher.
        canonical: the finest scale in pixels.
        mask_size: m, cells of a mask's side.
    """

    def __init__(self, kernels: Sequence[int], canonical: float, mask_size: int):
        self.kernels, self.canonical, self.mask_size = tuple(kernels), canonical, mask_size

    @property
    def margin(self) -> int:
        """Cells of zeros around a level that the widest head needs."""
        return max(self.kernels) // 2

    @property
    def scales(self) -> list[float]:
        """Canonical sizes in pixels, level by level for each head."""
        return [self._scale(kernel, stride) for kernel in self.kernels for stride in STRIDES]

    def _scale(self, kernel: int, stride: int) -> float:
        return self.canonical * stride / STRIDES[0] * (math.sqrt(2) if kernel == 7 else 1)

    def places(self, shapes: Sequence[tuple[int, int]], device: torch.device | str = "cpu") -> Places:
        """The locations of levels of these heights and widths, finest first."""
        margin = self.margin
        parts: list[list[Tensor]] = []
        starts, widths, cells = [], [], 0
        for (height, width), stride in zip(shapes, STRIDES, strict=True):
            y, x = torch.meshgrid(
                torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
            )
            x, y, row = x.flatten(), y.flatten(), width + 2 * margin
            starts.append(sum(len(part[0]) for part in parts))
            widths.append(width)
            parts.append(
                [
                    (torch.stack([x, y], 1) + 0.5) * stride,
                    torch.full_like(x, stride),
                    cells + (y + margin) * row + x + margin,
                    torch.full_like(x, row),
                ]
            )
            cells += (height + 2 * margin) * row
        centre, stride, cell, row = (torch.cat(part) for part in zip(*parts, strict=True))
        return Places(centre, stride, cell, row, _constants(starts, device), _constants(widths, device))

    def windows(self, places: Places, chosen: Tensor) -> Tensor:
        """What the masks of some windows cover: int64 (...), their numbers -> float32 (..., 4), x1 y1 x2 y2."""
        head, place = chosen // len(places.stride), chosen % len(places.stride)
        unit = _constants([self._scale(kernel, 1) * PADDING / 2 for kernel in self.kernels], chosen.device)
        half = (unit[head] * places.stride[place])[..., None]
        centre = places.centre[place]
        return torch.cat([centre - half, centre + half], -1)

    def inside(self, places: Places, size: tuple[int, int]) -> Tensor:
        """Whether the cell of a location begins in an image of (H, W) pixels: bool (T,)."""
        corner = places.centre - places.stride[:, None] / 2
        return (corner[:, 0] < size[1]) & (corner[:, 1] < size[0])

    # ------------------------------------------------------------------ training

    def assign(self, places: Places, target: InstanceTarget) -> Tensor:
        """Which object each window stands for.

        An object belongs to the scale nearest to the longer side of its mask, in octaves, and to the locations there
        that its centre is within one cell of, in x and in y (within `canonical` / 32 cells, in general). Of several
        objects a location takes the nearest. Locations on a crowd, and beyond the image, are excluded.

        Args:
            places: of the batch that the image is padded into.
            target: objects of the image, masks at its size.

        Returns:
            int64 (kernels * T,): the index of an object, `NOTHING` or `EXCLUDED`.
        """
        masks, count = target["masks"], len(places.stride)
        height, width = int(masks.shape[-2]), int(masks.shape[-1])
        owner = places.stride.new_full((len(self.kernels) * count,), NOTHING)
        if len(masks):
            cells, nearness, objects = self._candidates(places, target)
            order = nearness.argsort(stable=True)  # unlike distances, ranks are unique: a minimum names its object
            rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            never = len(order)
            rank = torch.where(nearness.isfinite(), rank, never)
            best = torch.full_like(owner, never).scatter_reduce_(0, cells, rank, "amin")
            owner = torch.where(best < never, objects[order[best.clamp(max=never - 1)]], owner)
        crowd = (masks & target["iscrowd"][:, None, None]).any(0)
        x, y = places.centre.long().unbind(1)
        excluded = crowd[y.clamp(max=height - 1), x.clamp(max=width - 1)] | ~self.inside(places, (height, width))
        return torch.where(excluded.repeat(len(self.kernels)), EXCLUDED, owner)

    def _candidates(self, places: Places, target: InstanceTarget) -> tuple[Tensor, Tensor, Tensor]:
        """Locations around the centre of each object, how far away (infinite if too far), and the object's index."""
        masks, count = target["masks"], len(places.stride)
        device = masks.device
        boxes, filled = extent(masks)
        size = (boxes[:, 2:] - boxes[:, :2]).amax(1)
        scales = _constants(self.scales, device)
        nearest = (size.log2()[:, None] - scales.log2()).abs().argmin(1)
        head, level = nearest // len(STRIDES), nearest % len(STRIDES)
        stride = _constants(STRIDES, device)[level][:, None, None]
        centre = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        tolerance = self.canonical / 32
        reach = torch.arange(-math.ceil(tolerance), math.ceil(tolerance) + 1, device=device)
        cell = (centre / stride).floor().long() + torch.cartesian_prod(reach, reach)
        away = (cell + 0.5) * stride - centre
        limit = _constants([masks.shape[-1], masks.shape[-2]], device)
        fits = (away.abs() <= tolerance * stride) & (cell >= 0) & (cell * stride < limit)
        fits = fits.all(-1) & (filled & ~target["iscrowd"])[:, None]
        index = (head * count + places.starts[level])[:, None] + cell[..., 1] * places.widths[level][:, None]
        index = torch.where(fits, index + cell[..., 0], 0)
        distance = torch.where(fits, away.square().sum(-1), torch.inf)
        objects = torch.arange(len(masks), device=device)[:, None].expand_as(index)
        return index.flatten(), distance.flatten(), objects.flatten()

    def sample(self, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Draw 128 windows, a quarter of them positive; where positives lack, negatives stand in.

        Nothing is read back from the device: there is room for all that could be drawn, and what is used is marked.

        Args:
            owner: int64 (L,), as `assign` has it.

        Returns:
            int64 (32 + 128,), positives first, and bool (32 + 128,), which of them count. Fewer if L is small.
        """
        key = torch.rand(owner.shape, device=owner.device)
        positive, chosen = torch.where(owner >= 0, key, -1.0).topk(min(POSITIVES, len(owner)))
        negative, others = torch.where(owner == NOTHING, key, -1.0).topk(min(SAMPLES, len(owner)))
        positive, negative = positive >= 0, negative >= 0
        left = SAMPLES - positive.sum()
        negative &= torch.arange(len(negative), device=owner.device) < left
        return torch.cat([chosen, others]), torch.cat([positive, negative])

    def mask_targets(self, masks: Tensor, objects: Tensor, windows: Tensor) -> Tensor:
        """Masks as seen through windows: of each cell whether half of it belongs to the object.

        Args:
            masks: bool (N, H, W), nothing beyond.
            objects: int64 (P,), whose.
            windows: float32 (P, 4).

        Returns:
            float32 (P, m, m), 0 or 1.
        """
        from torchvision.ops import roi_align

        if not len(masks):
            return windows.new_zeros(len(windows), self.mask_size, self.mask_size)
        framed = F.pad(masks[:, None].float(), [1] * 4)  # zeros: `roi_align` repeats the pixels of the border
        regions = torch.cat([objects[:, None].to(windows.dtype), windows + 1], 1)
        return (roi_align(framed, regions, self.mask_size, aligned=True)[:, 0] >= 0.5).float()
