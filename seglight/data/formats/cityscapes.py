"""Cityscapes, leftImg8bit, gtFine and gtCoarse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from seglight.data.formats.archives import zip_folders
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
    "train_extra": ("augsburg", "troisdorf"),
}
PLATE = -1
"""labelId of a licence plate: 255 in a file of 8 bits, 65535 in one of 16."""
_EGO, _BORDER = 1, 2  # labelIds of the car that carries the camera, and of what its lens does not see


def write_cityscapes(
    out: str | Path, splits: Splits, coarse: bool = False, plates: bool = False, zipped: bool = False
) -> Path:
    """Cityscapes: OUT/leftImg8bit and OUT/gtFine, each {split}/{city}/{city}_{seq:06d}_{frame:06d}_...

    `CITYSCAPES_LABELS` says which of its labels stands for which class. Borders are 0, unlabeled. `_instanceIds` holds
    1000 * labelId + number for objects and the bare labelId for crowds, poles and sky; `_polygons` holds the outlines
    of what `_labelIds` shows, an object in several when it is cut apart. Labels of "test" show the camera's car and the
    border of the lens only, as the public ones do.

    Args:
        out: folder to make.
        splits: scenes of "train", "val", "test", and of "train_extra", which has coarse labels only and gets one more
            picture: the black one of the first release.
        coarse: write OUT/gtCoarse, too: labels that keep away from every edge.
        plates: give objects that stand for cars a licence plate.
        zipped: all of it in the archives that are downloaded.
    """
    ids = np.zeros(256, np.uint8)
    for label, (label_id, _, _) in CITYSCAPES_LABELS.items():
        ids[label] = label_id
    with new_folder(out) as folder:
        for split, number, scene in numbered(splits):
            cities = CITYSCAPES_CITIES[split]
            city = cities[number % len(cities)]
            name = f"{city}_{number:06d}_000019"
            save(folder / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", scene.image)
            labels, objects = ids[scene.mask], _cityscapes_instances(scene, ids)
            if plates:
                plate = _plates(scene)
                labels[plate], objects[plate] = PLATE & 0xFF, PLATE & 0xFFFF
            if split == "test":
                labels = _stub(labels.shape)
                objects = labels.astype(np.uint16)
            if split != "train_extra":
                _save_labels(folder, "gtFine", split, name, labels, objects)
                polygons = _cityscapes_polygons(scene) if split != "test" else _no_polygons(labels.shape)
                write_json(folder / f"gtFine/{split}/{city}/{name}_gtFine_polygons.json", polygons)
            if split == "train_extra" or (coarse and split != "test"):
                rough = np.where(_edges(scene.mask), np.uint8(0), labels)
                _save_labels(folder, "gtCoarse", split, name, rough, np.where(rough > 0, objects, 0).astype(np.uint16))
        if (extra := folder / "leftImg8bit/train_extra").is_dir():
            black = np.zeros((*labels.shape, 3), np.uint8)
            save(extra / "troisdorf/troisdorf_000000_000073_leftImg8bit.png", black)
            nothing = black[..., 0]
            _save_labels(
                folder, "gtCoarse", "train_extra", "troisdorf_000000_000073", nothing, nothing.astype(np.uint16)
            )
        if zipped:
            _zip(folder)
    return Path(out)


def _save_labels(folder: Path, kind: str, split: str, name: str, labels: np.ndarray, objects: np.ndarray) -> None:
    colours = np.zeros((256, 4), np.uint8)
    for label_id, _, colour in CITYSCAPES_LABELS.values():
        colours[label_id] = (*colour, 255)
    start = folder / f"{kind}/{split}/{name.split('_')[0]}/{name}_{kind}"
    save(Path(f"{start}_labelIds.png"), labels)
    save(Path(f"{start}_instanceIds.png"), objects)
    save(Path(f"{start}_color.png"), colours[labels])


def _plates(scene: Scene) -> np.ndarray:
    """bool (H, W): a few pixels in the middle of each object that stands for a car."""
    plate = np.zeros(scene.mask.shape, bool)
    for number, one in enumerate(scene.objects, start=1):
        x, y = (one.box[0] + one.box[2]) // 2, (one.box[1] + one.box[3]) // 2
        spot = np.s_[y - 1 : y + 1, x - 2 : x + 2]
        plate[spot] |= (one.label == SQUARE) & (scene.instances[spot] == number) & (scene.mask[spot] == SQUARE)
    return plate


def _stub(size: tuple[int, int]) -> np.ndarray:
    labels = np.zeros(size, np.uint8)
    labels[:2] = labels[:, :2] = _BORDER
    labels[-size[0] // 8 :] = _EGO
    return labels


def _edges(mask: np.ndarray) -> np.ndarray:
    """bool (H, W): within two pixels of another label."""
    kernel = np.ones((5, 5), np.uint8)
    return cv2.dilate(mask, kernel) != cv2.erode(mask, kernel)


def _zip(folder: Path) -> None:
    """leftImg8bit_trainvaltest.zip and so on, as the site has them."""
    folders = {
        "leftImg8bit_trainvaltest.zip": [f"leftImg8bit/{split}" for split in ("train", "val", "test")],
        "leftImg8bit_trainextra.zip": ["leftImg8bit/train_extra"],
        "gtFine_trainvaltest.zip": ["gtFine"],
        "gtCoarse.zip": ["gtCoarse"],
    }
    zip_folders(folder, folders)


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


def _no_polygons(size: tuple[int, int]) -> dict[str, Any]:
    return {"imgHeight": size[0], "imgWidth": size[1], "objects": []}
