"""SBD: segmentations of 11,355 images of PASCAL VOC 2011 (Hariharan et al., ICCV 2011), from its MATLAB files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seglight.data.base import SemanticDataModule, Split
from seglight.data.decode import Header
from seglight.data.files import FileDataset, locate, read_ids, refuse_leaks
from seglight.data.findings import DataError
from seglight.data.matlab import read_mat
from seglight.data.palette import palette

ADVICE = (
    "To get it: `seglight data prepare sbd` (1.4 GB), or benchmark.tgz, unpacked, from "
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/. Or a miniature: "
    "`seglight data sample --format sbd OUT`."
)
_INSIDE = ("benchmark_RELEASE/dataset", "dataset", "", "benchmark/benchmark_RELEASE/dataset")
_UNPACK = "Unpack benchmark.tgz again."
LABEL_ADVICE = "VOC's labels are 0..20, and 255 on borders; SBD has no borders. Unpack the archives again."

CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""Of VOC and SBD, in label order."""


def find_sbd(sbd: str | None, beside: Sequence[Path] = ()) -> Path:
    """The folder with img, cls, inst, train.txt and val.txt.

    Args:
        sbd: where the user says it is: benchmark_RELEASE, its dataset folder, or the folder that contains it.
        beside: folders to look in when nobody says; then $SEGLIGHT_DATA/sbd, ./data/sbd and those two themselves.

    Raises:
        FileNotFoundError: with the folders tried and how to get it.
    """
    if sbd is None:
        for folder in beside:
            for part in ("benchmark_RELEASE/dataset", "sbd/benchmark_RELEASE/dataset", "sbd", "SBD"):
                if (folder / part / "cls").is_dir():
                    return folder / part
    return locate(sbd, "sbd", _INSIDE, "cls", ADVICE, option="sbd")


class SBDFiles:
    """Where things are in SBD.

    Args:
        folder: with img, cls, inst, train.txt and val.txt.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def ids(self, name: str) -> list[str]:
        """The names of a list."""
        return read_ids(self.folder / f"{name}.txt")

    def image(self, name: str) -> Path:
        """JPEG file of a sample; those of VOC are the same pictures."""
        return self.folder / "img" / f"{name}.jpg"

    def mask(self, name: str, kind: Literal["Class", "Object"] = "Class") -> Path:
        """MATLAB file of a sample: labels of classes or numbers of objects."""
        return self.folder / ("cls" if kind == "Class" else "inst") / f"{name}.mat"


class SBDMasks(FileDataset):
    """Masks are PNGs as VOC has them, or SBD's MATLAB files (`GTcls` or `GTinst`), which have no border of 255."""

    def values(self, index: int) -> np.ndarray:
        """Labels or numbers of objects, uint8 (H, W)."""
        path = self.mask_paths[index]
        return _segmentation(path) if getattr(path, "suffix", None) == ".mat" else super().values(index)

    def probe_mask(self, path: Path) -> Header:
        """The size of a mask; a MATLAB file has to be read for that."""
        if path.suffix != ".mat":
            return super().probe_mask(path)
        height, width = _segmentation(path).shape
        return Header("MAT", width, height, 8, "L", 1, 1, True)


def _segmentation(path: Path) -> np.ndarray:
    """uint8 (H, W)."""
    values = read_mat(path, "GTinst" if path.parent.name == "inst" else "GTcls", "Segmentation", _UNPACK)
    if values.dtype != np.uint8 and values.max(initial=0) > 255:
        raise DataError(f"{path}: Segmentation holds {values.max()}, but labels have 8 bits. {_UNPACK}")
    return np.ascontiguousarray(values, np.uint8)


class SBD(SemanticDataModule):
    """SBD alone, with its own masks and images: 8,498 images to train on and 2,857 to validate on, 21 classes.

    For training on SBD and scores on VOC's masks see `VOC`: `train_split` "trainaug" or "sbd_train".

    Args:
        root: benchmark_RELEASE, its dataset folder, or the folder that contains it. Default: $SEGLIGHT_DATA or ./data,
            and there sbd.
        train_split: name of a list beside the folders img, cls and inst, without ".txt".
        val_split: the same, for validation. It must not share images with `train_split`.
        test_split: the same, for `seglight test`.
    """

    classes = CLASSES
    palette = palette(21)
    id_space = "voc"

    def __init__(
        self,
        root: str | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "val",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.root = locate(root, "sbd", _INSIDE, "cls", ADVICE)
        self.lists = {"train": train_split, "val": val_split, "test": test_split}

    def dataset(self, split: Split) -> SBDMasks:
        """The images of a list."""
        sbd = SBDFiles(self.root)
        ids = sbd.ids(self.lists[split])
        if split == "train":
            refuse_leaks("SBD", ids, lambda other: sbd.ids(self.lists[other]))
        images, masks = [sbd.image(name) for name in ids], [sbd.mask(name) for name in ids]
        return SBDMasks(f"SBD {self.lists[split]}", ids, images, masks, np.arange(256), advice=LABEL_ADVICE)
