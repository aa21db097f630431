"""Augmentation of images with objects: the geometry is drawn first, then applied once to image, boxes and masks.

Coordinates are continuous: pixel i covers [i, i + 1) and has its centre at i + 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from seglight.data.faults import FaultySample, reading, this_or_another, without
from seglight.data.transforms import Geometry, TrainTransform, rng_for, span

if TYPE_CHECKING:
    from seglight.data.dataset import InstanceDataset


class Sample(NamedTuple):
    """One augmented image with its objects."""

    image: np.ndarray
    """uint8 (H, W, 3)."""
    boxes: np.ndarray
    """float32 (N, 4)."""
    labels: np.ndarray
    """int64 (N,)."""
    masks: np.ndarray
    """bool (N, H, W), each with a pixel."""
    iscrowd: np.ndarray
    """bool (N,)."""

    def of(self, keep: np.ndarray) -> Sample:
        """With some of the objects only."""
        if keep.all():
            return self
        return Sample(self.image, self.boxes[keep], self.labels[keep], self.masks[keep], self.iscrowd[keep])


class InstanceTransform:
    """Random size, crop, mirroring, colours and pasted objects of one training sample.

    Arguments as in `seglight.data.instances.InstanceDataModule`.
    """

    def __init__(
        self,
        short_side: int | Sequence[int] = 800,
        long_side: int = 1333,
        crop: int | Sequence[int] | None = None,
        scale: Sequence[float] | None = None,
        flip: float = 0.5,
        jitter: float = 0.0,
        copy_paste: float = 0.0,
    ):
        sides = [short_side] if isinstance(short_side, int) else list(short_side)
        if not sides or min(sides) < 1:
            raise ValueError(f"short_side is {short_side}; it must be a number of pixels or a list of them.")
        if long_side < max(sides):
            raise ValueError(f"long_side is {long_side}; it must be at least short_side, {max(sides)}.")
        for name, value in (("flip", flip), ("copy_paste", copy_paste)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must lie in 0..1.")
        for name, value in (("scale", scale), ("copy_paste", copy_paste)):
            if value and crop is None:
                raise ValueError(f"{name} is {value}, but crop is null; give the size of the output, such as 1024.")
        if copy_paste and scale is None:
            raise ValueError(f"copy_paste is {copy_paste}, but scale is null, so images differ in size; give a range.")
        # The parts that semantic segmentation has too, and their messages
        self.colours = TrainTransform(crop=crop, scale=scale or (1.0, 1.0), flip=flip, jitter=jitter)
        self.crop, self.scale = self.colours.crop, None if scale is None else self.colours.scale
        self.short_sides, self.long_side, self.flip, self.copy_paste = sides, long_side, flip, copy_paste

    def draw(self, rng: np.random.Generator, size: tuple[int, int]) -> Geometry:
        """The geometry of an image of `size` (height, width)."""
        u = rng.random(5)
        if self.scale is not None:
            low, high = self.scale
            factor = (low + u[0] * (high - low)) * min(self.crop[0] / size[0], self.crop[1] / size[1])
            out = self.crop
        else:
            side = self.short_sides[int(u[0] * len(self.short_sides))]
            factor = min(side / min(size), self.long_side / max(size))
            resized = [max(1, round(length * factor)) for length in size]
            out = tuple(resized if self.crop is None else map(min, resized, self.crop))
        # Where the image is smaller than the output, it lies in the upper left corner, as in the published code.
        spans = [span(*axis, 0.0, factor) for axis in zip(size, out, u[1:3], strict=True)]
        (top, height, to_top, to_height), (left, width, to_left, to_width) = spans
        target = (to_top, to_left, to_height, to_width)
        return Geometry(out, (top, left, height, width), target, flip=bool(u[3] < self.flip), average=True)

    def sample(
        self,
        dataset: InstanceDataset,
        index: int,
        rng: np.random.Generator,
        faults: list[FaultySample] | None = None,
    ) -> Sample:
        """Read, draw and apply. With `faults` an image to paste from that cannot be read is noted there, and the next
        one that can stands in for it."""
        sample = self._one(dataset, rng, index)
        if self.copy_paste and rng.random() < self.copy_paste:
            other, read = int(rng.integers(len(dataset))), partial(self._one, dataset, rng)
            above = read(other) if faults is None else this_or_another(read, other, len(dataset), faults)[1]
            sample = paste(sample, above, rng)
        return sample

    def _one(self, dataset: InstanceDataset, rng: np.random.Generator, index: int) -> Sample:
        with reading(dataset.ids[index]):
            image, objects = dataset.image(index), dataset.objects(index)
        geometry = self.draw(rng, image.shape[:2])
        colours = self.colours.draw_colours(rng)
        masks, boxes = objects.masks(geometry), geometry.boxes(objects.boxes)
        sample = Sample(geometry.image(image, None, colours), boxes, objects.labels, masks, objects.iscrowd)
        if geometry.source != (0, 0, *image.shape[:2]):  # cut, so boxes may be smaller than the clipped ones
            sample = sample._replace(boxes=boxes_of(masks))
        return sample.of(_visible(sample))


def paste(below: Sample, above: Sample, rng: np.random.Generator) -> Sample:
    """Simple copy-paste: a random part of the objects of `above`, but crowds, on top of `below`.

    Masks and boxes of what they hide are cut, and objects of which nothing is left vanish (Ghiasi et al., CVPR 2021,
    section 3; without blending, which the paper found not to matter).
    """
    chosen = (rng.random(len(above.labels)) < 0.5) & ~above.iscrowd
    if not chosen.any():
        return below
    above = above.of(chosen)
    front = above.masks.any(0)
    image = np.where(front[..., None], above.image, below.image)
    hidden = (below.masks & front).any((1, 2))
    masks = below.masks & ~front
    boxes = np.where(hidden[:, None], boxes_of(masks), below.boxes)
    below = below._replace(image=image, boxes=boxes, masks=masks)
    below = below.of(_visible(below))
    both = [np.concatenate(pair) for pair in zip(below[1:], above[1:], strict=True)]
    return Sample(image, *both)


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """The smallest box around the pixels of each mask, bool (N, H, W), as float32 (N, 4); zeros for none."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for mask, box in zip(masks, boxes, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def _visible(sample: Sample) -> np.ndarray:
    """bool (N,): a box with an extent and a mask with a pixel."""
    x1, y1, x2, y2 = sample.boxes.T
    return (x2 > x1) & (y2 > y1) & sample.masks.any((1, 2))


def train_batch(
    dataset: InstanceDataset,
    keys: Sequence[tuple[int, int]],
    transform: InstanceTransform,
    seed: int,
    skip: bool = False,
) -> dict[str, Any]:
    """A `seglight.types.InstanceBatch` of the samples `keys`: pairs of pass number and index.

    A sample depends on (seed, pass, index) alone, not on its place in the batch or on who builds it.

    Args:
        dataset: where they are read.
        keys: of the samples.
        transform: what is done to them.
        seed: of the augmentation.
        skip: in the place of what cannot be read, also of an image to paste from, take the next one that can; see
            `seglight.data.faults`.

    Raises:
        FaultySample: a sample cannot be read, without `skip`.
        DataError: none of the dataset can.
    """
    images, targets, names = [], [], []
    faults: list[FaultySample] = []
    for epoch, index in keys:
        read = partial(_sample, dataset, transform, seed, epoch, faults if skip else None)
        index, sample = this_or_another(read, index, len(dataset), faults) if skip else (index, read(index))
        names.append(dataset.ids[index])
        images.append(torch.from_numpy(sample.image).permute(2, 0, 1))
        targets.append(
            {
                "boxes": torch.from_numpy(sample.boxes),
                "labels": torch.from_numpy(sample.labels),
                "masks": torch.from_numpy(sample.masks),
                "iscrowd": torch.from_numpy(sample.iscrowd),
                "area": torch.from_numpy(sample.masks.sum((1, 2), dtype=np.float32)),
            }
        )
    return without({"image": images, "target": targets, "image_id": names}, faults)


def _sample(
    dataset: InstanceDataset,
    transform: InstanceTransform,
    seed: int,
    epoch: int,
    faults: list[FaultySample] | None,
    index: int,
) -> Sample:
    return transform.sample(dataset, index, rng_for(seed, epoch, index), faults)
