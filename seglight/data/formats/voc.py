"""PASCAL VOC 2012, as the devkit unpacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from seglight.data.formats.files import Splits, new_folder, numbered, save, write_lists
from seglight.data.palette import palette
from seglight.data.scenes import VOID, WIRE, Scene

COLOURS = np.array(palette(256), np.uint8)
"""(256, 3), of the devkit."""


def write_voc(out: str | Path, splits: Splits) -> Path:
    """PASCAL VOC 2012: OUT/VOCdevkit/VOC2012 with JPEGImages, SegmentationClass, SegmentationObject and the lists.

    Masks are palette PNGs with the devkit's colours, 255 on borders; label numbers are the scenes' own. Objects count
    from 1; the wires of a picture are one object together, for in VOC every labelled pixel belongs to one. Pictures of
    "test" have no masks.
    """
    with new_folder(out) as folder:
        root = folder / "VOCdevkit/VOC2012"
        lists: dict[str, list[str]] = {}
        for split, number, scene in numbered(splits):
            lists.setdefault(split, []).append(name := voc_name(number))
            save(root / f"JPEGImages/{name}.jpg", scene.image)
            if split != "test":
                save_masks(root, name, scene)
        write_lists(root / "ImageSets/Segmentation", lists)
    return Path(out)


def voc_name(number: int) -> str:
    """Name of a picture, such as 2008_000039."""
    return f"{2007 + number % 5}_{32 + 7 * number:06d}"


def save_masks(root: Path, name: str, scene: Scene) -> None:
    """SegmentationClass and SegmentationObject of a picture."""
    save(root / f"SegmentationClass/{name}.png", scene.mask, COLOURS)
    save(root / f"SegmentationObject/{name}.png", object_numbers(scene), COLOURS)


def object_numbers(scene: Scene) -> np.ndarray:
    """uint8 (H, W): 1, 2, ... on objects, 255 on borders."""
    objects = np.where(scene.mask == WIRE, len(scene.objects) + 1, scene.instances)
    return np.where(scene.mask == VOID, VOID, objects).astype(np.uint8)
