"""PASCAL-Context: whole scenes labelled on the images of VOC 2010 (Mottaghi et al., CVPR 2014), as downloaded."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seglight.data.base import SemanticDataModule, Split
from seglight.data.context_json import ContextFile
from seglight.data.decode import Header
from seglight.data.files import FileDataset, locate, read_ids, refuse_leaks, warn_of_missing
from seglight.data.findings import DataError, choice, listing
from seglight.data.matlab import read_mat
from seglight.data.palette import palette
from seglight.data.voc import VOC
from seglight.types import IGNORE_INDEX

_ADVICE = (
    "To get it: `seglight data prepare context` (1.3 GB; `--with json` for the polygon labels), or "
    "VOCtrainval_03-May-2010.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2010/ and trainval.tar.gz from "
    "https://cs.stanford.edu/~roozbeh/pascal-context/, both unpacked into one folder. Or a miniature: `seglight data "
    "sample --format context OUT`."
)
_JSON = "trainval_merged.json"
_DEVKITS = ("VOCdevkit/VOC2010", "VOC2010", "")
PUBLISHED = {
    "mat": {"train": 4998, "val": 5105, "trainval": 10103},
    "json": {"train": 4996, "val": 5104, "trainval": 10100},
}
"""Images of each list, by the kind of labels."""

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
    The labels come from the authors' .mat files (4,998 and 5,105 images) or from trainval_merged.json, as in EncNet's
    and mmsegmentation's code (4,996 and 5,104); the run folder says from which.

    Args:
        root: the folder with VOCdevkit/VOC2010 (or VOC2010) and trainval/*.mat; trainval_merged.json lies there or in
            VOC2010. Default: $SEGLIGHT_DATA or ./data, and there pascal_context.
        background: everything else is class 0 (60 classes); otherwise it is ignored (59).
        order: of the 59: "alphabetical" (EncNet) or "fcn" (VOC's classes first).
        labels: "mat" or "json". Default: what is there, the .mat files first.
        train_split: name of a list in ImageSets/Main, without ".txt". With json labels "train", "val" and "trainval"
            are the phases of the file.
        val_split: the same, for validation. It must not share images with `train_split`.
        test_split: the same, for `seglight test`. The test images of VOC 2010 have no labels here.
    """

    id_space = "voc"

    def __init__(
        self,
        root: str | None = None,
        background: bool = True,
        order: Literal["alphabetical", "fcn"] = "alphabetical",
        labels: Literal["mat", "json"] | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "val",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        choice("order", order, ("alphabetical", "fcn"))
        if labels is not None:
            choice("labels", labels, ("mat", "json"))
        files = [f"{folder}/{_JSON}".lstrip("/") for folder in _DEVKITS]
        needed = {"mat": ["trainval"], "json": files, None: ["trainval", *files]}[labels]
        self.root = locate(root, "pascal_context", ("", "pascal-context"), needed, _ADVICE)
        devkit = [self.root / folder for folder in _DEVKITS]
        self.devkit = next((folder for folder in devkit if (folder / "JPEGImages").is_dir()), devkit[0])
        self.kind = labels or ("mat" if (self.root / "trainval").is_dir() else "json")
        self.json = next((self.root / file for file in files if (self.root / file).is_file()), None)
        self.lists = {"train": train_split, "val": val_split, "test": test_split}
        names = tuple(NUMBERS) if order == "alphabetical" else FCN_ORDER
        self.classes = ("background", *names) if background else names
        colours = palette(60)
        self.palette = colours if background else colours[1:]
        shown = "yes" if background else "no"
        self.protocol = f"PASCAL-Context: num_classes {len(self.classes)}, background: {shown}, order: {order}"
        self.labels = np.full(460, 0 if background else IGNORE_INDEX, np.uint8)
        self.labels[[NUMBERS[name] for name in names]] = np.arange(59) + background

    def dataset(self, split: Split) -> ContextDataset:
        """The images of a split list."""
        ids, name = self._ids(split), self.lists[split]
        if split == "train":
            refuse_leaks("PASCAL-Context", ids, self._ids)
        if name in PUBLISHED[self.kind]:
            warn_of_missing(f"PASCAL-Context {name} ({self.kind})", len(ids), PUBLISHED[self.kind][name])
        images = [self.devkit / "JPEGImages" / f"{one}.jpg" for one in ids]
        if self.kind == "mat":
            masks = [self.root / "trainval" / f"{one}.mat" for one in ids]
            return ContextDataset(f"PASCAL-Context {name}", ids, images, masks, self.labels)
        if unknown := sorted(set(ids) - self._file.places().keys()):
            raise DataError(
                f"PASCAL-Context {name}: {len(unknown)} images that {self.json} does not hold: {listing(unknown, 3)}. "
                "Take them out of the list, or read the .mat files (data.labels: mat)."
            )
        return JsonDataset(f"PASCAL-Context {name}", ids, images, self._file, self.labels)

    @property
    def _file(self) -> ContextFile:
        return _read(self.json)

    def _ids(self, split: Split) -> list[str]:
        name = self.lists[split]
        if self.kind == "json" and name in PUBLISHED["json"]:
            return self._file.ids(None if name == "trainval" else name)
        return read_ids(self.devkit / "ImageSets/Main" / f"{name}.txt")


class ContextDataset(FileDataset):
    """Masks are MATLAB files with the numbers 1..459 in `LabelMap`.

    Args:
        name: of dataset and split, for messages.
        ids: names of the samples.
        image_paths: one file per sample.
        mask_paths: one .mat file per sample.
        labels: uint8 (460,), the label of each number.
    """

    source, what = "mat", "LabelMap"
    """Where the labels come from, for the fingerprint, and what it calls them."""

    def __init__(self, name: str, ids: list[str], image_paths: list[Path], mask_paths: list[Path], labels: np.ndarray):
        super().__init__(name, ids, image_paths, mask_paths)
        self.labels = labels

    def numbers(self, index: int) -> np.ndarray:
        """Numbers 0..459, (H, W)."""
        return _label_map(self.mask_paths[index])

    def values(self, index: int) -> np.ndarray:
        """Labels uint8 (H, W)."""
        numbers = self.numbers(index)
        if numbers.max(initial=0) >= len(self.labels):
            raise DataError(
                f"{self.mask_paths[index]}: {self.what} holds {numbers.max()}, but the numbers are 1..459. Download or "
                "unpack it again."
            )
        return self.labels[numbers]

    def probe_mask(self, path: Path) -> Header:
        """The size of the label map; it has to be read for that."""
        height, width = _label_map(path).shape
        return Header("MAT", width, height, 8, "L", 1, 1, True)

    def fingerprint(self) -> dict[str, Any]:
        """As of other files, and where the labels come from."""
        return {"labels": self.source, **super().fingerprint()}


class JsonDataset(ContextDataset):
    """Masks are painted from the segments of trainval_merged.json. In messages a mask is called FILE/2008_000002.

    Args:
        name: of dataset and split, for messages.
        ids: names of the samples.
        image_paths: one file per sample.
        file: the json file.
        labels: uint8 (460,), the label of each number.
    """

    source, what = "json", "category_id"

    def __init__(self, name: str, ids: list[str], image_paths: list[Path], file: ContextFile, labels: np.ndarray):
        super().__init__(name, ids, image_paths, [file.path / one for one in ids], labels)
        places = file.places()
        self.file, self.places = file, np.array([places[one] for one in ids])

    def numbers(self, index: int) -> np.ndarray:
        """Numbers 0..459, uint16 (H, W)."""
        return self.file.label_map(self.places[index])

    def probe_mask(self, path: Path) -> Header:
        """The size that the file gives."""
        height, width = self.file.size(self.places[self.ids.index(path.name)])
        return Header("JSON", width, height, 8, "L", 1, 1, True)

    def fingerprint(self) -> dict[str, Any]:
        """Number of samples, and what identifies the file."""
        return {"labels": self.source, "samples": len(self), **self.file.fingerprint()}


@lru_cache(maxsize=1)
def _read(path: Path) -> ContextFile:
    """Read once for all splits and datamodules of a process."""
    return ContextFile(path)


def _label_map(path: Path) -> np.ndarray:
    """uint16 (H, W).

    Raises:
        FileNotFoundError: no such file.
        DataError: not a MATLAB file with a label map.
    """
    return read_mat(
        path, "LabelMap", advice="Unpack trainval.tar.gz again: the labels are its, not those of the parts."
    )
