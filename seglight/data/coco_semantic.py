"""Pixel labels drawn from COCO's instances: what the papers pre-train on before VOC.

The rules are those of torchvision's reference (references/segmentation/coco_utils.py), with which its published
networks were trained: classes that VOC does not have are background, crowds count like objects, a pixel of two objects
is ignored because COCO does not say which is in front, and training leaves out images with 1000 labelled pixels or
less. DeepLabv3 (arXiv 1706.05587, "Pretrained on COCO") has the first and the last rule, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from seglight.data.base import SemanticDataModule, Split
from seglight.data.coco import COCO, COCODataset, class_colours
from seglight.data.dataset import SemanticDataset, Subset
from seglight.data.findings import DataError, choice, listing
from seglight.data.rle import decode_into
from seglight.data.voc import VOC
from seglight.types import IGNORE_INDEX

_RENAMED = {
    "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle", "pottedplant": "potted plant",
    "sofa": "couch", "tvmonitor": "tv",
}  # fmt: skip
VOC_NAMES = {_RENAMED.get(name, name): name for name in VOC.classes[1:]}
"""COCO's name of each of the 20 classes of VOC, and VOC's."""


class COCOLabels(SemanticDataset):
    """Images of COCO with a label map drawn from their objects.

    Args:
        objects: the images and their objects.
        labels: label of each of COCO's classes, uint8 (K,); 0 is background and not drawn.
        overlaps: "ignore" or "smaller", see `COCOSemantic`.
        crowds: "label" or "ignore".
        min_pixels: leave out images whose objects have no more than this area, sum over objects that are drawn.
    """

    def __init__(self, objects: COCODataset, labels: np.ndarray, overlaps: str, crowds: str, min_pixels: int = 0):
        self.objects: COCODataset | Subset = objects
        self.labels, self.overlaps, self.crowds, self.min_pixels = labels, overlaps, crowds, min_pixels
        self.labelled = objects.document.labelled
        if min_pixels:
            data = objects.data
            image = np.repeat(np.arange(len(objects)), np.diff(data.first))
            area = np.bincount(image, data.area * (labels[data.labels] > 0), minlength=len(objects))
            if not (area > min_pixels).any():
                raise DataError(
                    f"{objects.name}: none of {len(objects)} images has more than {min_pixels} pixels of a class "
                    "(data.min_pixels)."
                )
            self.objects = Subset(objects, np.flatnonzero(area > min_pixels), "with_few_pixels")
        self.ids = self.objects.ids

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H, W, 3) RGB and labels uint8 (H, W)."""
        return self.objects.image(index), self.values(index)

    def files_of(self, index: int) -> tuple[Path]:
        """The image."""
        if isinstance(self.objects, Subset):
            return (self.objects.whole.path(self.objects.indices[index]),)
        return (self.objects.path(index),)

    def values(self, index: int) -> np.ndarray:
        """The label map, uint8 (H, W); all 255 where the annotations are not public."""
        from pycocotools import mask as coco

        size = self.objects.size(index)
        if not self.labelled:
            return np.full(size, IGNORE_INDEX, np.uint8)
        objects = self.objects.objects(index)
        objects = objects[self.labels[objects.labels] > 0]
        labels, rles = self.labels[objects.labels], objects.rles(size)
        ignored = objects.iscrowd & (self.crowds == "ignore")
        pixels = np.array([coco.area(rle) for rle in rles], np.int64)
        order = np.lexsort((-pixels, ~ignored))  # ignored crowds lie behind everything, then large objects
        out, seen, twice, one = np.zeros(size, np.uint8), *(np.zeros(size, bool) for _ in range(3))
        for i in order:
            x, y, width, height = (int(side) for side in coco.toBbox(rles[i]))
            window = np.s_[y : y + height, x : x + width]
            decode_into(rles[i], one)
            inside = one[window]
            out[window][inside] = IGNORE_INDEX if ignored[i] else labels[i]
            if not ignored[i]:
                twice[window] |= seen[window] & inside
                seen[window] |= inside
            inside[:] = False
        if self.overlaps == "ignore":
            out[twice] = IGNORE_INDEX
        return out

    def check(self, num_classes: int) -> None:
        """See `COCODataset.check`."""
        self.objects.check(num_classes)

    def fingerprint(self) -> dict[str, Any]:
        """That of the objects, and how they are drawn."""
        rules = {"overlaps": self.overlaps, "crowds": self.crowds, "min_pixels": self.min_pixels}
        return {**self.objects.fingerprint(), **rules}


class COCOSemantic(SemanticDataModule):
    """COCO 2017 as pixel labels: VOC's 20 classes or all 80, and background.

    Args:
        root: as of `COCO`: the folder with annotations, train2017 and val2017.
        classes: "voc", and every other object is background; or "coco".
        overlaps: pixels of two objects or more: "ignore" them, as torchvision does, or give them to the "smaller"
            object: COCO does not say which one is in front. A few percent of the labelled pixels.
        crowds: "label" a crowd as its class, or "ignore" its pixels where no single object is.
        min_pixels: train on images with more than this many labelled pixels only; 0 for all.
        train_split: as of `COCO`.
        val_split: as of `COCO`.
        test_split: as of `COCO`.
        faulty: as of `COCO`.
    """

    id_space = "coco"

    def __init__(
        self,
        root: str | None = None,
        classes: Literal["voc", "coco"] = "voc",
        overlaps: Literal["ignore", "smaller"] = "ignore",
        crowds: Literal["label", "ignore"] = "label",
        min_pixels: int = 1000,
        train_split: str = "train2017",
        val_split: str = "val2017",
        test_split: str = "val2017",
        faulty: Literal["error", "drop"] = "drop",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        choice("classes", classes, ("voc", "coco"))
        choice("overlaps", overlaps, ("ignore", "smaller"))
        choice("crowds", crowds, ("label", "ignore"))
        if min_pixels < 0:
            raise ValueError(f"data.min_pixels is {min_pixels}; it must be 0 or more.")
        self.objects = COCO(root, train_split, val_split, test_split, faulty, check=self.check)
        names = self.objects.classes
        if classes == "voc":
            if missing := [name for name in VOC_NAMES if name not in names]:
                raise DataError(
                    f"{self.objects.root}/annotations does not list {listing(missing)}, which classes of VOC need. "
                    "Take COCO's own files, or say data.classes: coco for all classes that are there."
                )
            self.classes, self.palette = VOC.classes, VOC.palette
            labels = [VOC.classes.index(VOC_NAMES[name]) if name in VOC_NAMES else 0 for name in names]
        else:
            if len(names) >= IGNORE_INDEX:
                raise DataError(f"{self.objects.root} lists {len(names)} categories; labels have room for 254.")
            self.classes, self.palette = ("background", *names), ((0, 0, 0), *class_colours(len(names)))
            labels = range(1, len(names) + 1)
        self.labels = np.array(labels, np.uint8)
        self.rules = (overlaps, crowds)
        self.min_pixels = min_pixels

    def dataset(self, split: Split) -> COCOLabels:
        """The images of a split; for training those with enough labelled pixels."""
        least = self.min_pixels if split == "train" else 0
        return COCOLabels(self.objects.dataset(split), self.labels, *self.rules, least)
