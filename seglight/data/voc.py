"""PASCAL VOC segmentation, in the layout of the devkit as it is downloaded (Everingham et al., IJCV 2010 and 2015)."""

from __future__ import annotations

from typing import Any

from seglight.data.base import SemanticDataModule, Split
from seglight.data.files import FileDataset, locate, read_list, refuse_overlap
from seglight.data.palette import palette

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
