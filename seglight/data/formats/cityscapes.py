"""Cityscapes, leftImg8bit and gtFine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from seglight.data.formats.files import Splits, new_folder, numbered, save, write_json
from seglight.data.formats.outlines import pieces
from seglight.data.scenes import MOON, RING, SQUARE, STAR, SUN, THINGS, TRIANGLE, VOID, WIRE, Scene

CITYSCAPES_LABELS = {
    0: (23, "sky", (70, 130, 180)),
    SQUARE: (26, "car", (0, 0, 142)),
    TRIANGLE: (24, "person", (220, 20, 60)),
    STAR: (25, "rider", (255, 0, 0)),
    RING: (33, "bicycle", (119, 11, 32)),
    WIRE: (17, "pole", (153, 153, 153)),
    SUN: (27, "truck", (0, 0, 70)),
    MOON: (28, "bus", (0, 60, 100)),
    VOID: (0, "unlabeled", (0, 0, 0)),
}
"""labelId, name and colour that stand for each class."""
CITYSCAPES_CITIES = {
    "train": ("aachen", "zurich"),
    "val": ("frankfurt", "lindau"),
    "test": ("berlin", "bonn"),
}


def write_cityscapes(out: str | Path, splits: Splits) -> Path:
    """Cityscapes: OUT/leftImg8bit and OUT/gtFine, each {split}/{city}/{city}_{seq:06d}_{frame:06d}_...

    `CITYSCAPES_LABELS` says which of its labels stands for which class. Borders are 0, unlabeled. `_instanceIds` holds
    1000 * labelId + number for objects and the bare labelId for crowds, poles and sky; `_polygons` holds the outlines
    of what `_labelIds` shows, an object in several when it is cut apart.
    """
    ids = np.zeros(256, np.uint8)
    colours = np.zeros((256, 4), np.uint8)
    for label, (label_id, _, colour) in CITYSCAPES_LABELS.items():
        ids[label], colours[label] = label_id, (*colour, 255)
    with new_folder(out) as folder:
        for split, number, scene in numbered(splits):
            cities = CITYSCAPES_CITIES[split]
            city = cities[number % len(cities)]
            name = f"{city}_{number:06d}_000019"
            labels = f"gtFine/{split}/{city}/{name}_gtFine"
            save(folder / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", scene.image)
            save(folder / f"{labels}_labelIds.png", ids[scene.mask])
            save(folder / f"{labels}_instanceIds.png", _cityscapes_instances(scene, ids))
            save(folder / f"{labels}_color.png", colours[scene.mask])
            write_json(folder / f"{labels}_polygons.json", _cityscapes_polygons(scene))
    return Path(out)


def _cityscapes_instances(scene: Scene, ids: np.ndarray) -> np.ndarray:
    """uint16 (H, W). Objects of a class count from 0 within a picture."""
    values = ids[scene.mask].astype(np.uint16)
    counted = dict.fromkeys(THINGS, 0)
    for number, one in enumerate(scene.objects, start=1):
        if not one.crowd:
            inside = (scene.instances == number) & (scene.mask != VOID)
            values[inside] = 1000 * int(ids[one.label]) + counted[one.label]
            counted[one.label] += 1
    return values


def _cityscapes_polygons(scene: Scene) -> dict[str, Any]:
    """Corners are centres of border pixels, which belong to the polygon."""
    known = scene.mask != VOID
    regions = [(CITYSCAPES_LABELS[label][1], scene.mask == label) for label in (0, WIRE)]
    for one, mask in zip(scene.objects, scene.object_masks(), strict=True):
        regions.append((CITYSCAPES_LABELS[one.label][1] + "group" * one.crowd, mask & known))
    objects = []
    for label, region in regions:
        for piece in pieces(region):
            (contour, *_), _ = cv2.findContours(piece.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            objects.append({"label": label, "polygon": contour[:, 0].tolist()})
    height, width = scene.mask.shape
    return {"imgHeight": height, "imgWidth": width, "objects": objects}
