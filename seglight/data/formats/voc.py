"""PASCAL VOC 2012, as the devkit unpacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from seglight.data.formats.files import Splits, new_folder, numbered, save, write_lists
from seglight.data.palette import palette
from seglight.data.scenes import VOID, WIRE


def write_voc(out: str | Path, splits: Splits) -> Path:
    """PASCAL VOC 2012: OUT/VOCdevkit/VOC2012 with JPEGImages, SegmentationClass, SegmentationObject and the lists.

    Masks are palette PNGs with the devkit's colours, 255 on borders; label numbers are the scenes' own. Objects count
    from 1; the wires of a picture are one object together, for in VOC every labelled pixel belongs to one.
    """
    colours = np.array(palette(256), np.uint8)
    with new_folder(out) as folder:
        root = folder / "VOCdevkit/VOC2012"
        lists: dict[str, list[str]] = {}
        for split, number, scene in numbered(splits):
            name = f"{2007 + number % 5}_{32 + 7 * number:06d}"
            lists.setdefault(split, []).append(name)
            objects = np.where(scene.mask == WIRE, len(scene.objects) + 1, scene.instances)
            objects = np.where(scene.mask == VOID, VOID, objects).astype(np.uint8)
            save(root / f"JPEGImages/{name}.jpg", scene.image)
            save(root / f"SegmentationClass/{name}.png", scene.mask, colours)
            save(root / f"SegmentationObject/{name}.png", objects, colours)
        write_lists(root / "ImageSets/Segmentation", lists)
    return Path(out)
