"""COCO-Stuff 164k: pixel maps of 80 things and 91 stuff classes on COCO 2017 (Caesar et al., CVPR 2018)."""

from __future__ import annotations

from typing import Any

import numpy as np

from seglight.data.archive import AnyPath, files_below, opened
from seglight.data.base import SemanticDataModule, Split
from seglight.data.coco import PUBLISHED, class_colours
from seglight.data.coco_names import STUFF, THINGS
from seglight.data.files import FileDataset, locate, refuse_same, refuse_unpaired, warn_of_missing
from seglight.types import IGNORE_INDEX

_ADVICE = (
    "To get it: `seglight data prepare coco --with stuff` (21 GB), or train2017.zip and val2017.zip from "
    "https://cocodataset.org/#download and stuffthingmaps_trainval2017.zip from https://github.com/nightrome/cocostuff "
    "in one folder, as they are or unpacked (the last one into stuffthingmaps). Or a miniature: `seglight data sample "
    "--format cocostuff OUT`."
)
_LABEL_ADVICE = "Maps hold id - 1 of one of the 171 classes: take stuffthingmaps, not maps that were converted."
MAPS = "stuffthingmaps_trainval2017.zip"
_NO_CLASS = 254
_CONVERTED = "_labelTrainIds"  # what mmsegmentation's converter writes beside the maps


class COCOStuff(SemanticDataModule):
    """171 classes: COCO's 80 things, then 91 of stuff. Unlabelled pixels (255 in the maps) are ignored.

    Of the 182 ids of the maps 11 are never used; labels 0..170 leave them out, in the order of the ids.

    Args:
        root: the folder with train2017, val2017 and stuffthingmaps (or the images in `images` and the maps in
            `annotations`, as the authors unpack them), or with the zip archives. Default: $SEGLIGHT_DATA or ./data, and
            there coco.
        train_split: folder of images and of maps.
        val_split: the same, for validation.
        test_split: the same, for `seglight test`.
    """

    classes = (*THINGS.values(), *STUFF.values())
    palette = class_colours(len(classes))
    id_space = "coco"

    def __init__(
        self,
        root: str | None = None,
        train_split: str = "train2017",
        val_split: str = "val2017",
        test_split: str = "val2017",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        needed = ("stuffthingmaps", "stuffthingmaps_trainval2017", MAPS, f"annotations/{val_split}")
        self.root = locate(root, "coco", ("", "coco", "cocostuff"), needed, _ADVICE)
        refuse_same("COCOStuff", train_split, val_split, test_split)
        self.folders = {"train": train_split, "val": val_split, "test": test_split}

    def dataset(self, split: Split) -> FileDataset:
        """The images of a split that have a map."""
        folder = self.folders[split]
        images = self._found((folder, f"images/{folder}"), f"{folder}.zip", ".jpg")
        tops = ("stuffthingmaps/", "stuffthingmaps_trainval2017/", "annotations/", "")
        maps = self._found(tuple(f"{top}{folder}" for top in tops), MAPS, ".png")
        if missing := [kind for kind, found in (("images", images), ("maps", maps)) if not found]:
            raise FileNotFoundError(f"There are no {' and no '.join(missing)} of {folder} in {self.root}. {_ADVICE}")
        name = f"COCOStuff {folder}"
        refuse_unpaired(name, images, maps, "Unpack the archives again, completely.")
        warn_of_missing(name, len(images), PUBLISHED.get(folder, len(images)))
        lut = np.full(256, _NO_CLASS)
        lut[[number - 1 for number in (*THINGS, *STUFF)]] = np.arange(len(self.classes))
        lut[255] = IGNORE_INDEX
        ids = sorted(images)
        return FileDataset(name, ids, [images[i] for i in ids], [maps[i] for i in ids], lut, advice=_LABEL_ADVICE)

    def _found(self, folders: tuple[str, ...], archive: str, end: str) -> dict[str, AnyPath] | None:
        """Files by stem, of the first folder that has any: on disk, else in the archive."""
        for folder in folders:
            if found := _named(files_below(self.root, folder, ()), end):
                return found
        for folder in folders if (self.root / archive).is_file() else ():
            if found := _named(opened(self.root / archive).below(folder), end):
                return found
        return None


def _named(found: dict[str, AnyPath] | None, end: str) -> dict[str, AnyPath]:
    named = {path.removesuffix(end): file for path, file in (found or {}).items() if path.endswith(end)}
    return {name: file for name, file in named.items() if not name.endswith(_CONVERTED)}
