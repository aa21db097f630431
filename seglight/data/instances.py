"""Objects rather than pixels: the batches and loaders of a dataset for instance segmentation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from seglight.data.base import DataModule, Split
from seglight.data.dataset import InstanceDataset, Subset
from seglight.data.faults import reading
from seglight.data.findings import DataError
from seglight.data.instance_transforms import InstanceTransform, train_batch

log = logging.getLogger(__name__)


def eval_batch(dataset: InstanceDataset, indices: Sequence[int]) -> dict[str, Any]:
    """A `seglight.types.InstanceEvalBatch` of the samples `indices`: nothing resampled, nothing left out."""
    images, targets = [], []
    for index in indices:
        with reading(dataset.ids[index]):
            image, objects = dataset.image(index), dataset.objects(index)
        images.append(image)
        targets.append(
            {
                "boxes": torch.from_numpy(objects.boxes),
                "labels": torch.from_numpy(objects.labels),
                "rles": objects.rles(image.shape[:2]),
                "iscrowd": torch.from_numpy(objects.iscrowd),
                "area": torch.from_numpy(objects.area),
            }
        )
    return {
        "image": [torch.from_numpy(image).permute(2, 0, 1) for image in images],
        "target": targets,
        "image_id": [dataset.ids[index] for index in indices],
    }


class InstanceDataModule(DataModule):
    """One dataset for instance segmentation.

    Batches are `seglight.types.InstanceBatch` in training and `InstanceEvalBatch` elsewhere. Subclasses set `classes`
    and `palette` (no background) and write `dataset(split)`, which returns an `InstanceDataset`.

    Args:
        short_side: training images are resized until their shorter side has this many pixels, at random one of several
            if a list.
        long_side: but their longer side no more than this.
        crop: height and width of a random crop of the resized image, one number for a square; null keeps all of it.
            Images that are smaller stay so.
        scale: large-scale jitter (Ghiasi et al., CVPR 2021: 0.1 to 2.0 with a crop of 1024): the image is resized by a
            random factor of this range times what makes it fit into `crop`, then cut or padded to exactly `crop`.
            `short_side` and `long_side` do not count then.
        flip: probability of mirroring left to right.
        jitter: strength of random brightness, contrast and saturation, 0 for none.
        copy_paste: probability that objects of another training image are pasted on top (same paper; it needs `scale`).
        skip_empty: leave images without an object to learn from (none at all, or crowds only) out of training, as the
            code of the papers does. Their number is logged and in the run folder. They always count in evaluation.
        group_aspect: training batches hold either upright images or others, as in the code of the papers, since images
            of a batch are padded to a common size, unless they have one size anyway (`scale`).
    """

    task = "instance"

    def __init__(
        self,
        batch_size: int = 2,
        short_side: int | list[int] = 800,
        long_side: int = 1333,
        crop: int | tuple[int, int] | None = None,
        scale: tuple[float, float] | None = None,
        flip: float = 0.5,
        jitter: float = 0.0,
        copy_paste: float = 0.0,
        skip_empty: bool = True,
        group_aspect: bool = True,
        **kwargs: Any,
    ):
        super().__init__(batch_size=batch_size, **kwargs)
        self.transform = InstanceTransform(short_side, long_side, crop, scale, flip, jitter, copy_paste)
        self.skip_empty, self.group_aspect = skip_empty, group_aspect and scale is None

    def split(self, split: Split) -> InstanceDataset:
        """`dataset(split)`, built once; for training without the images that hold nothing to learn from."""
        if split not in self._datasets:
            data = self.dataset(split)
            if split == "train" and self.skip_empty:
                data = _without_empty(data)
            self._datasets[split] = data
        return self._datasets[split]

    def apart(self) -> np.ndarray | None:
        """Upright images, if `group_aspect`."""
        return self.split("train").upright() if self.group_aspect else None

    def train_builder(self) -> Callable[[list[tuple[int, int]]], dict[str, Any]]:
        """Makes a `seglight.types.InstanceBatch`."""
        skip = self.faulty_samples == "skip"
        return partial(train_batch, self.split("train"), transform=self.transform, seed=self.seed, skip=skip)

    def eval_builder(self, split: Split) -> Callable[[list[int]], dict[str, Any]]:
        """Makes a `seglight.types.InstanceEvalBatch`."""
        return partial(eval_batch, self.split(split))


def _without_empty(data: InstanceDataset) -> InstanceDataset:
    trainable = data.trainable()
    if trainable.all():
        return data
    if not trainable.any():
        raise DataError(f"None of the {len(data)} training images has an object that is no crowd. Look at the labels.")
    log.info("%d of %d training images hold no object to learn from; left out.", np.sum(~trainable), len(data))
    return Subset(data, np.flatnonzero(trainable), "without_objects")
