"""Cityscapes, pixel labels of 19 classes of street scenes (Cordts et al., CVPR 2016), in the layout of its archives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from seglight.data.base import SemanticDataModule, Split
from seglight.data.check import listing
from seglight.data.decode import DataError
from seglight.data.files import FileDataset, locate
from seglight.types import IGNORE_INDEX

_ADVICE = (
    "To get it: an account at www.cityscapes-dataset.com, and from there leftImg8bit_trainvaltest.zip (11 GB) and "
    "gtFine_trainvaltest.zip (241 MB), unpacked into one folder; for coarse labels also leftImg8bit_trainextra.zip and "
    "gtCoarse.zip. Or a miniature: `seglight data sample --format cityscapes OUT`."
)

CLASSES = {
    "road": (7, (128, 64, 128)), "sidewalk": (8, (244, 35, 232)), "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)), "fence": (13, (190, 153, 153)), "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)), "traffic sign": (20, (220, 220, 0)), "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)), "sky": (23, (70, 130, 180)), "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)), "car": (26, (0, 0, 142)), "truck": (27, (0, 0, 70)), "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)), "motorcycle": (32, (0, 0, 230)), "bicycle": (33, (119, 11, 32)),
}  # fmt: skip
"""labelId in the files and colour of each of the 19 classes, in the order of their train ids."""
LAST_ID = 33
_ILLEGAL = 254
_LABEL_ADVICE = f"labelIds are 0..{LAST_ID}: unpack gtFine again, and look for files that another program wrote."


class Cityscapes(SemanticDataModule):
    """19 classes at 2048x1024; every other labelId is ignored. Read from `_labelIds.png`: no conversion first.

    Args:
        root: the folder with leftImg8bit and gtFine. Default: $SEGLIGHT_DATA or ./data, and there cityscapes.
        train_labels: "fine" (2,975 images), "coarse" (train and train_extra, 22,973), or "fine+coarse" (fine train and
            coarse train_extra, as the papers' best results).
        val_split: a folder of gtFine.
        test_split: the same, for `seglight test`. The labels of the test split are not public.
    """

    classes = tuple(CLASSES)
    palette = tuple(colour for _, colour in CLASSES.values())

    def __init__(
        self,
        root: str | None = None,
        train_labels: Literal["fine", "coarse", "fine+coarse"] = "fine",
        val_split: str = "val",
        test_split: str = "val",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.root = locate(root, "cityscapes", ("", "cityscapes"), "leftImg8bit", _ADVICE)
        fine = [("gtFine", "train")]
        coarse = [("gtCoarse", "train_extra")]
        train = {"fine": fine, "coarse": [("gtCoarse", "train"), *coarse], "fine+coarse": fine + coarse}
        self.parts = {"train": train[train_labels], "val": [("gtFine", val_split)], "test": [("gtFine", test_split)]}
        if "train" in (val_split, test_split) and train_labels != "coarse":
            raise DataError("Cityscapes: the training split cannot be validated on. Use val.")

    def dataset(self, split: Split) -> FileDataset:
        """The images of a split that have labels."""
        found = [(name, *files) for part in self.parts[split] for name, files in self._pairs(*part).items()]
        names, images, masks = zip(*found, strict=True)
        lut = np.full(256, _ILLEGAL)
        lut[: LAST_ID + 1] = lut[255] = IGNORE_INDEX  # 255: how a licence plate, labelId -1, looks in a byte
        for label, (label_id, _) in enumerate(CLASSES.values()):
            lut[label_id] = label
        name = " and ".join("/".join(part) for part in self.parts[split])
        return FileDataset(f"Cityscapes {name}", list(names), list(images), list(masks), lut, advice=_LABEL_ADVICE)

    def _pairs(self, labels: str, split: str) -> dict[str, tuple[Path, Path]]:
        """Image and mask by name ("aachen_000000_000019"), in the order of the names."""
        suffix = f"_{labels}_labelIds.png"
        folders = self.root / "leftImg8bit" / split, self.root / labels / split
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"There is no {folder}. {_ADVICE}")
        images = {path.name.removesuffix("_leftImg8bit.png"): path for path in folders[0].glob("*/*_leftImg8bit.png")}
        masks = {path.name.removesuffix(suffix): path for path in folders[1].glob(f"*/*{suffix}")}
        if alone := sorted(set(images) ^ set(masks)):
            raise DataError(
                f"Cityscapes: {len(alone)} images without a mask or masks without an image in {folders[0]} and "
                f"{folders[1]}: {listing(alone, 3)}. Unpack the archives again, completely."
            )
        if not images:
            raise DataError(f"Cityscapes: {folders[0]} holds no CITY/*_leftImg8bit.png. Unpack the archives again.")
        return {name: (images[name], masks[name]) for name in sorted(images)}
