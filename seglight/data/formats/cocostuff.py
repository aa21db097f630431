"""COCO 2017 with its official categories and the pixel maps of COCO-Stuff."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from seglight.data.formats.archives import zip_folders
from seglight.data.formats.coco import COCO_CATEGORIES, write_coco_into
from seglight.data.formats.files import Splits, new_folder, save
from seglight.data.scenes import VOID, WIRE

COCOSTUFF_LABELS = {**COCO_CATEGORIES, 0: 157, WIRE: 113, VOID: 256}
"""Id 1..182 that stands for each class: things as `COCO_CATEGORIES` says (1 person, 3 car, 7 train, 13 stop sign, 27
backpack, 90 toothbrush), sky-other, fence, unlabelled."""


def write_cocostuff(out: str | Path, splits: Splits, zipped: bool = False) -> Path:
    """COCO 2017 with 80 categories, as `write_coco` lays it out, and OUT/stuffthingmaps/{split}2017/000000000009.png.

    A map holds id - 1 (0..181), and 255 for what is unlabelled: borders. Pictures of "test" have neither map nor
    annotation and are listed in image_info_test-dev2017.json.

    Args:
        out: folder to make.
        splits: scenes of "train", "val" and perhaps "test".
        zipped: images and maps in the archives that are downloaded; the annotations are unpacked in any case.
    """
    values = np.full(256, 255, np.uint8)
    for label, number in COCOSTUFF_LABELS.items():
        values[label] = number - 1
    with new_folder(out) as folder:
        for split, name, scene in write_coco_into(folder, splits, official=True):
            if split != "test":
                save(folder / f"stuffthingmaps/{split}2017/{name}.png", values[scene.mask])
        if zipped:
            zip_folders(folder, {f"{split}2017.zip": [f"{split}2017"] for split in ("train", "val", "test")})
            for split in ("train", "val"):
                (folder / f"stuffthingmaps/{split}2017").rename(folder / f"{split}2017")
            zip_folders(folder, {"stuffthingmaps_trainval2017.zip": ["train2017", "val2017"]}, packed=False)
    return Path(out)
