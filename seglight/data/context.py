"""PASCAL-Context: whole scenes labelled on the images of VOC 2010 (Mottaghi et al., CVPR 2014), from .mat files."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seglight.data.base import SemanticDataModule, Split
from seglight.data.decode import DataError, Header
from seglight.data.files import FileDataset, locate, read_list, refuse_overlap
from seglight.data.palette import palette
from seglight.data.voc import VOC
from seglight.types import IGNORE_INDEX

_ADVICE = (
    "To get it: VOCtrainval_03-May-2010.tar (1.3 GB, md5 da459979d0c395079b5c75ee67908abb) from "
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/ and trainval.tar.gz from "
    "https://cs.stanford.edu/~roozbeh/pascal-context/, both unpacked into one folder. Or a miniature: "
    "`seglight data sample --format context OUT`."
)

NUMBERS = {
    "aeroplane": 2, "bag": 9, "bed": 18, "bedclothes": 19, "bench": 22, "bicycle": 23, "bird": 25, "boat": 31,
    "book": 33, "bottle": 34, "building": 44, "bus": 45, "cabinet": 46, "car": 59, "cat": 65, "ceiling": 68,
    "chair": 72, "cloth": 80, "computer": 85, "cow": 98, "cup": 104, "curtain": 105, "dog": 113, "door": 115,
    "fence": 144, "floor": 158, "flower": 159, "food": 162, "grass": 187, "ground": 189, "horse": 207,
    "keyboard": 220, "light": 232, "motorbike": 258, "mountain": 259, "mouse": 260, "person": 284, "plate": 295,
    "platform": 296, "pottedplant": 308, "road": 324, "rock": 326, "sheep": 347, "shelves": 349, "sidewalk": 354,
    "sign": 355, "sky": 360, "snow": 366, "sofa": 368, "table": 397, "track": 415, "train": 416, "tree": 420,
    "truck": 424, "tvmonitor": 427, "wall": 440, "water": 445, "window": 454, "wood": 458,
}  # fmt: skip
"""The 59 classes of the benchmark, in alphabetical order, and their numbers among the 459 of the files."""
FCN_ORDER = (
    *("table" if name == "diningtable" else name for name in VOC.classes[1:]),
    *("bag", "bed", "bench", "book", "building", "cabinet", "ceiling", "cloth", "computer", "cup", "door", "fence"),
    *("floor", "flower", "food", "grass", "ground", "keyboard", "light", "mountain", "mouse", "curtain", "platform"),
    *("sign", "plate", "road", "rock", "shelves", "sidewalk", "sky", "snow", "bedclothes", "track", "tree", "truck"),
    *("wall", "water", "window", "wood"),
)
"""The same classes as FCN numbers them: those of VOC first."""


class PascalContext(SemanticDataModule):
    """59 classes, with or without a background class of everything else: papers report both, and they differ.

    FCN, ParseNet and DeepLab score 60 classes with the background, EncNet 59 without it; the scores say how many.

    Args:
        root: the folder with VOCdevkit/VOC2010 (or VOC2010) and trainval/*.mat. Default: $SEGLIGHT_DATA or ./data, and
            there pascal_context.
        background: everything else is class 0 (60 classes); otherwise it is ignored (59).
        order: of the 59: "alphabetical" (EncNet) or "fcn" (VOC's classes first).
        train_split: name of a list in ImageSets/Main, without ".txt".
        val_split: the same, for validation. It must not share images with `train_split`.
        test_split: the same, for `seglight test`. The test images of VOC 2010 have no labels here.
    """

    def __init__(
        self,
        root: str | None = None,
        background: bool = True,
        order: Literal["alphabetical", "fcn"] = "alphabetical",
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "val",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.root = locate(root, "pascal_context", ("", "pascal-context"), "trainval", _ADVICE)
        devkit = (self.root / "VOCdevkit/VOC2010", self.root / "VOC2010")
        self.devkit = next((folder for folder in devkit if folder.is_dir()), devkit[0])
        self.lists = {"train": train_split, "val": val_split, "test": test_split}
        names = tuple(NUMBERS) if order == "alphabetical" else FCN_ORDER
        self.classes = ("background", *names) if background else names
        colours = palette(60)
        self.palette = colours if background else colours[1:]
        self.labels = np.full(460, 0 if background else IGNORE_INDEX, np.uint8)
        self.labels[[NUMBERS[name] for name in names]] = np.arange(59) + background

    def dataset(self, split: Split) -> ContextDataset:
        """The images of a split list."""
        ids = self._ids(split)
        if split == "train":
            refuse_overlap("PASCAL-Context", ids, self._ids("val"))
        images = [self.devkit / "JPEGImages" / f"{name}.jpg" for name in ids]
        masks = [self.root / "trainval" / f"{name}.mat" for name in ids]
        return ContextDataset(f"PASCAL-Context {self.lists[split]}", ids, images, masks, self.labels)

    def _ids(self, split: Split) -> list[str]:
        lines = read_list(self.devkit / "ImageSets/Main" / f"{self.lists[split]}.txt")
        return [line.split()[0] for line in lines]


class ContextDataset(FileDataset):
    """Masks are MATLAB files with the numbers 1..459 in `LabelMap`.

    Args:
        name: of dataset and split, for messages.
        ids: names of the samples.
        image_paths: one file per sample.
        mask_paths: one .mat file per sample.
        labels: uint8 (460,), the label of each number.
    """

    def __init__(self, name: str, ids: list[str], image_paths: list[Path], mask_paths: list[Path], labels: np.ndarray):
        super().__init__(name, ids, image_paths, mask_paths)
        self.labels = labels

    def values(self, index: int) -> np.ndarray:
        """Labels uint8 (H, W)."""
        numbers = _label_map(path := self.mask_paths[index])
        if numbers.max(initial=0) >= len(self.labels):
            raise DataError(f"{path}: LabelMap holds {numbers.max()}, but the numbers are 1..459. Unpack it again.")
        return self.labels[numbers]

    def probe_mask(self, path: Path) -> Header:
        """The size of the label map; it has to be read for that."""
        height, width = _label_map(path).shape
        return Header("MAT", width, height, 8, "L", 1, 1, True)


def _label_map(path: Path) -> np.ndarray:
    """uint16 (H, W).

    Raises:
        FileNotFoundError: no such file.
        DataError: not a MATLAB file with a label map.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    if not path.is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    try:
        content = loadmat(path)
    except (MatReadError, OSError, ValueError, TypeError, KeyError, IndexError, zlib.error) as error:
        raise DataError(f"{path}: not a readable MATLAB file ({error}). Unpack trainval.tar.gz again.") from error
    if "LabelMap" not in content:
        raise DataError(f"{path}: has no LabelMap. The labels are those of trainval.tar.gz, not of the parts.")
    return content["LabelMap"]
