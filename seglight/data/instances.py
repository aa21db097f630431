"""Objects rather than pixels: what a sample with objects is, and the loaders of an instance segmentation dataset."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from seglight.data.base import DataModule, Split
from seglight.data.faults import reading
from seglight.data.instance_transforms import InstanceTransform, train_batch
from seglight.data.rle import decode_into

if TYPE_CHECKING:
    from seglight.data.transforms import Geometry
    from seglight.types import RLE

log = logging.getLogger(__name__)


class Bitmap(NamedTuple):
    """A mask that is zero outside of a rectangle."""

    top: int
    left: int
    mask: np.ndarray
    """bool (h, w)."""


Segmentation = list[np.ndarray] | dict[str, Any] | Bitmap
"""One object's outline: polygons, each float64 (2P,) x, y, x, y, ...; a compressed RLE; or pixels."""


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of one image as annotated, in pixels of the image. N = 0 is legal."""

    boxes: np.ndarray
    """float32 (N, 4), x1 y1 x2 y2."""
    labels: np.ndarray
    """int64 (N,), 0..K-1."""
    iscrowd: np.ndarray
    """bool (N,)."""
    area: np.ndarray
    """float64 (N,), as annotated."""
    segmentations: list[Segmentation]
    """N outlines."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keep: np.ndarray) -> Objects:
        """Some of them: `keep` is bool (N,) or indices."""
        chosen = np.arange(len(self))[keep]
        parts = [self.segmentations[i] for i in chosen]
        return Objects(self.boxes[keep], self.labels[keep], self.iscrowd[keep], self.area[keep], parts)

    def rles(self, size: tuple[int, int]) -> list[RLE]:
        """N masks of an image of `size` (height, width); polygons are filled and united by COCO's own code."""
        return [_rle(one, size) for one in self.segmentations]

    def masks(self, geometry: Geometry) -> np.ndarray:
        """Masks in the output of a geometry without rotation, bool (N, h, w).

        Polygons are mapped and filled there, so their edges are as sharp as the output allows; of the others each
        output pixel takes the nearest pixel. At the identity both equal `rles`.

        Raises:
            ValueError: the geometry is turned or bent.
        """
        if geometry.angle or geometry.elastic is not None:
            raise ValueError("Objects.masks maps by scale, crop and flip only; use Geometry.masks for turned outputs.")
        out = np.zeros((len(self), *geometry.size), bool)
        for one, slot in zip(self.segmentations, out, strict=True):
            if isinstance(one, list):
                _fill(one, geometry, slot)
            else:
                _sample(one, geometry, slot)
        return out


def _rle(one: Segmentation, size: tuple[int, int]) -> RLE:
    from pycocotools import mask as coco

    if isinstance(one, dict):
        return {"size": list(one["size"]), "counts": one["counts"]}
    if isinstance(one, list):
        return coco.merge(coco.frPyObjects(one, *size))
    dense = np.zeros(size, np.uint8, order="F")
    height, width = one.mask.shape
    dense[one.top : one.top + height, one.left : one.left + width] = one.mask
    return coco.encode(dense)


def _fill(polygons: list[np.ndarray], geometry: Geometry, out: np.ndarray) -> None:
    """Fill mapped polygons. COCO's code clips them at the edges of what shows the image."""
    from pycocotools import mask as coco

    (top, left, height, width), (to_top, to_left, to_height, to_width) = geometry.source, geometry.target
    x, y = np.concatenate(polygons).reshape(-1, 2).T
    x, y = (x - left) * (to_width / width), (y - top) * (to_height / height)
    if x.max() <= 0 or y.max() <= 0 or x.min() >= to_width or y.min() >= to_height:
        return
    x = to_width - x if geometry.flip else x
    bounds = np.cumsum([len(polygon) for polygon in polygons])[:-1]
    rles = coco.frPyObjects(np.split(np.stack([x, y], 1).ravel(), bounds), to_height, to_width)
    slot = out[to_top : to_top + to_height, to_left : to_left + to_width]
    decode_into(rles[0] if len(rles) == 1 else coco.merge(rles), slot)


def _sample(one: dict[str, Any] | Bitmap, geometry: Geometry, out: np.ndarray) -> None:
    """Nearest pixels of a bitmap or RLE, in the part of the output that its rectangle covers."""
    if isinstance(one, dict):
        dense = np.zeros(one["size"], bool)
        decode_into(one, dense)
        one = Bitmap(0, 0, dense)
    (top, left, height, width), (to_top, to_left, to_height, to_width) = geometry.source, geometry.target
    rows = top + (np.arange(to_height) + 0.5) * (height / to_height)
    columns = left + (np.arange(to_width) + 0.5) * (width / to_width)
    rows, columns = rows.astype(np.intp) - one.top, columns.astype(np.intp) - one.left
    if geometry.flip:
        columns = columns[::-1]
    inside_rows = np.flatnonzero((rows >= 0) & (rows < one.mask.shape[0]))
    inside_columns = np.flatnonzero((columns >= 0) & (columns < one.mask.shape[1]))
    if not len(inside_rows) or not len(inside_columns):
        return
    part = one.mask.take(rows[inside_rows], 0).take(columns[inside_columns], 1)
    row, column = to_top + inside_rows[0], to_left + inside_columns[0]
    out[row : row + part.shape[0], column : column + part.shape[1]] = part


class InstanceDataset(Dataset):
    """Images and their objects of one split, at their original size.

    Subclasses set `ids` and write `image`, `size` and `objects`.
    """

    ids: Sequence[str]
    """Names of the samples, unique, in a stable order. COCO's are its image ids."""

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3), RGB."""
        raise TypeError(f"{type(self).__name__} must define image(index).")

    def size(self, index: int) -> tuple[int, int]:
        """Height and width, without decoding the image where the data say so."""
        return self.image(index).shape[:2]

    def objects(self, index: int) -> Objects:
        """What is annotated in the image."""
        raise TypeError(f"{type(self).__name__} must define objects(index).")

    def trainable(self) -> np.ndarray:
        """bool (samples,): whether there is an object to learn from. All True where only decoding would tell."""
        return np.ones(len(self), bool)

    def check(self, num_classes: int) -> None:
        """Look for faults before training starts.

        Raises:
            seglight.data.check.DataError: with all findings, worst first.
        """

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data, for the run folder: plain JSON values."""
        return {"samples": len(self)}


class Names(Sequence):
    """Some of a sequence of names, without a copy."""

    def __init__(self, names: Sequence[str], indices: np.ndarray):
        self.names, self.indices = names, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> str:
        return self.names[self.indices[index]]


class Subset(InstanceDataset):
    """Some samples of a dataset.

    Args:
        dataset: all of them.
        indices: of those that stay.
        why: what to call the number of the others in the fingerprint.
    """

    def __init__(self, dataset: InstanceDataset, indices: np.ndarray, why: str):
        self.whole, self.indices, self.why = dataset, np.asarray(indices, np.int64), why
        self.ids = Names(dataset.ids, self.indices)

    def image(self, index: int) -> np.ndarray:
        """As `InstanceDataset.image`."""
        return self.whole.image(self.indices[index])

    def size(self, index: int) -> tuple[int, int]:
        """As `InstanceDataset.size`."""
        return self.whole.size(self.indices[index])

    def objects(self, index: int) -> Objects:
        """As `InstanceDataset.objects`."""
        return self.whole.objects(self.indices[index])

    def trainable(self) -> np.ndarray:
        """As `InstanceDataset.trainable`."""
        return self.whole.trainable()[self.indices]

    def check(self, num_classes: int) -> None:
        """The check of the whole dataset: a fault in what is left out is a fault."""
        self.whole.check(num_classes)

    def fingerprint(self) -> dict[str, Any]:
        """That of the whole, and how many samples are left."""
        return {**self.whole.fingerprint(), "samples": len(self), self.why: len(self.whole) - len(self)}


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
        **kwargs: Any,
    ):
        super().__init__(batch_size=batch_size, **kwargs)
        self.transform = InstanceTransform(short_side, long_side, crop, scale, flip, jitter, copy_paste)
        self.skip_empty = skip_empty

    def dataset(self, split: Split) -> InstanceDataset:
        """The samples of a split, all of them, without augmentation."""
        raise TypeError(f"{type(self).__name__} must define dataset(split).")

    def split(self, split: Split) -> InstanceDataset:
        """`dataset(split)`, built once; for training without the images that hold nothing to learn from."""
        if split not in self._datasets:
            data = self.dataset(split)
            if split == "train" and self.skip_empty:
                data = _without_empty(data)
            self._datasets[split] = data
        return self._datasets[split]

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
        from seglight.data.check import DataError

        raise DataError(f"None of the {len(data)} training images has an object that is no crowd. Look at the labels.")
    log.info("%d of %d training images hold no object to learn from; left out.", np.sum(~trainable), len(data))
    return Subset(data, np.flatnonzero(trainable), "without_objects")
