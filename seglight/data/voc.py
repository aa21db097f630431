"""PASCAL VOC segmentation, in the layout of the devkit as it is downloaded (Everingham et al., IJCV 2010 and 2015)."""

from __future__ import annotations

from typing import Any

import numpy as np

from seglight.data.base import SemanticDataModule, Split
from seglight.data.decode import DataError
from seglight.data.files import FileDataset, locate, read_list, refuse_overlap
from seglight.data.instance_maps import MapDataset, objects_of
from seglight.data.instances import InstanceDataModule, Objects
from seglight.data.palette import palette
from seglight.types import IGNORE_INDEX

_ADVICE = (
    "To get it: VOCtrainval_11-May-2012.tar (2 GB, md5 6cd6e144f989b92b3379bac3b3de84fd), unpacked, from "
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/. Or a miniature: `seglight data sample --format voc OUT`."
)


class VOC(SemanticDataModule):
    """20 object classes and background; object borders are void (255).

    Args:
        root: the folder VOC2012, VOCdevkit or the one that contains it. Default: $SEGLIGHT_DATA or ./data, and there
            voc2012.
        year: of the challenge, part of the folder name.
        train_split: name of a list in ImageSets/Segmentation, without ".txt".
        val_split: the same, for validation. It must not share images with `train_split`.
        test_split: the same, for `seglight test`. The labels of VOC's own test split are not public.
        masks: folder of the masks, for lists that come with masks of their own (trainaug: SegmentationClassAug).
    """

    classes = (
        *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
        *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    )
    palette = palette(21)

    def __init__(
        self,
        root: str | None = None,
        year: str = "2012",
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "val",
        masks: str = "SegmentationClass",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        inside = (f"VOCdevkit/VOC{year}", f"VOC{year}", "")
        self.root = locate(root, f"voc{year}", inside, "ImageSets/Segmentation", _ADVICE)
        self.lists = {"train": train_split, "val": val_split, "test": test_split}
        self.masks = masks

    def dataset(self, split: Split) -> FileDataset:
        """The images of a split list."""
        ids = self._ids(split)
        if split == "train":
            refuse_overlap("VOC", ids, self._ids("val"))
        images = [self.root / "JPEGImages" / f"{name}.jpg" for name in ids]
        masks = [self.root / self.masks / f"{name}.png" for name in ids]
        return FileDataset(f"VOC {self.lists[split]}", ids, images, masks)

    def _ids(self, split: Split) -> list[str]:
        lines = read_list(self.root / "ImageSets/Segmentation" / f"{self.lists[split]}.txt")
        return [line.split()[0] for line in lines]


class VOCObjects(MapDataset):
    """Images of VOC with SegmentationObject, where object n has value n, and SegmentationClass, which says its class.

    Args:
        labels: images with class masks.
        numbers: the same images with object masks.
    """

    def __init__(self, labels: FileDataset, numbers: FileDataset):
        super().__init__(labels, numbers)
        self.labels, self.numbers = labels, numbers

    def objects(self, index: int) -> Objects:
        """The objects, without their void border. An object's class is that of most of its pixels.

        Raises:
            DataError: an object on background only.
        """
        numbers, classes = self.numbers.values(index), self.labels.values(index)
        votes = np.bincount(numbers.ravel() * np.int64(256) + classes.ravel(), minlength=1 << 16).reshape(256, 256)
        votes[:, IGNORE_INDEX] = votes[0] = votes[IGNORE_INDEX] = 0
        seen = np.flatnonzero(votes.any(1))
        label = votes.argmax(1)
        if len(wrong := seen[label[seen] == 0]):
            raise DataError(
                f"{self.numbers.mask_paths[index]}: object {wrong[0]} lies on background of "
                f"{self.labels.mask_paths[index].parent.name}. The two masks do not belong together."
            )
        return objects_of(numbers, {int(n): (int(label[n]) - 1, False) for n in seen})

    def look(self, index: int) -> None:
        """Raise DataError if the two masks do not fit."""
        if self.numbers.values(index).shape != self.labels.values(index).shape:
            raise DataError(f"{self.numbers.mask_paths[index]} and {self.labels.mask_paths[index]} differ in size.")
        self.objects(index)


class VOCInstances(InstanceDataModule):
    """The objects of VOC's 20 classes (SegmentationObject): 1,464 images to train on, 1,449 to validate on in 2012.

    Nothing is a crowd; pixels of the void border (255) belong to no object.

    Args:
        root: as in `VOC`, like the others.
        year: of the challenge.
        train_split: name of a list in ImageSets/Segmentation, without ".txt".
        val_split: the same, for validation.
        test_split: the same, for `seglight test`.
    """

    classes = VOC.classes[1:]
    palette = VOC.palette[1:]

    def __init__(
        self,
        root: str | None = None,
        year: str = "2012",
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "val",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        lists = {"train_split": train_split, "val_split": val_split, "test_split": test_split}
        self.parts = [VOC(root, year, **lists, masks=f"Segmentation{kind}") for kind in ("Class", "Object")]

    def dataset(self, split: Split) -> VOCObjects:
        """The images of a split list."""
        return VOCObjects(*(part.dataset(split) for part in self.parts))
