"""Writes scenes in the file formats of well-known datasets, so that their readers can be tried without a download.

Each writer takes an output folder and the scenes of each split, and returns that folder. The folder must be new or
empty. Files are written beside it under a temporary name and moved when all are there: an interrupted run leaves no
half dataset. Names, folders, types and values are as in the real dataset; what the values stand for is written here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

from seglight.data.palette import palette
from seglight.data.scenes import CLASSES, MOON, PALETTE, RING, SQUARE, STAR, SUN, THINGS, TRIANGLE, VOID, WIRE, Scene

Splits = Mapping[str, Iterable[Scene]]
"""Scenes by split name: "train", "val"."""

COCO_CATEGORIES = {SQUARE: 1, TRIANGLE: 3, STAR: 7, RING: 13, SUN: 27, MOON: 90}
"""Category id of each countable class. Ids have gaps, as COCO's have; background and wires are not annotated."""

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

CONTEXT_LABELS = {
    0: (360, "sky"),
    SQUARE: (454, "window"),
    TRIANGLE: (420, "tree"),
    STAR: (159, "flower"),
    RING: (295, "plate"),
    WIRE: (144, "fence"),
    SUN: (232, "light"),
    MOON: (104, "cup"),
    VOID: (431, "unknown"),
}
"""Number and name among PASCAL-Context's 459 that stand for each class. All but "unknown" are among the 59."""

VOID_COLOUR = (224, 224, 192)


def write_voc(out: str | Path, splits: Splits) -> Path:
    """PASCAL VOC 2012: OUT/VOCdevkit/VOC2012 with JPEGImages, SegmentationClass, SegmentationObject and the lists.

    Masks are palette PNGs with the devkit's colours, 255 on borders; label numbers are the scenes' own. Objects count
    from 1; the wires of a picture are one object together, for in VOC every labelled pixel belongs to one.
    """
    colours = np.array(palette(256), np.uint8)
    with _new_folder(out) as folder:
        root = folder / "VOCdevkit/VOC2012"
        lists: dict[str, list[str]] = {}
        for split, number, scene in _numbered(splits):
            name = f"{2007 + number % 5}_{32 + 7 * number:06d}"
            lists.setdefault(split, []).append(name)
            objects = np.where(scene.mask == WIRE, len(scene.objects) + 1, scene.instances)
            objects = np.where(scene.mask == VOID, VOID, objects).astype(np.uint8)
            _save(root / f"JPEGImages/{name}.jpg", scene.image)
            _save(root / f"SegmentationClass/{name}.png", scene.mask, colours)
            _save(root / f"SegmentationObject/{name}.png", objects, colours)
        _write_lists(root / "ImageSets/Segmentation", lists)
    return Path(out)


def write_coco(out: str | Path, splits: Splits) -> Path:
    """COCO 2017: OUT/{split}2017/000000000009.jpg and OUT/annotations/instances_{split}2017.json.

    Objects are polygons along the edges of the pixels, so they cover exactly the annotated ones; crowds are
    uncompressed RLE. Pictures without an object are listed and have no annotation.
    """
    with _new_folder(out) as folder:
        documents: dict[str, dict[str, Any]] = {}
        for split, number, scene in _numbered(splits):
            document = documents.setdefault(split, _coco_document(split))
            height, width = scene.mask.shape
            image_id = 9 + 16 * number
            name = f"{image_id:012d}.jpg"
            _save(folder / f"{split}2017/{name}", scene.image)
            document["images"].append(
                {"id": image_id, "file_name": name, "height": height, "width": width, "license": 1}
            )
            for index, (one, mask) in enumerate(zip(scene.objects, scene.object_masks(), strict=True)):
                x1, y1, x2, y2 = map(float, one.box)
                outline = _rle(mask) if one.crowd else [_outline(piece) for piece in _pieces(mask)]
                document["annotations"].append(
                    {
                        "id": 1000 * image_id + index,
                        "image_id": image_id,
                        "category_id": COCO_CATEGORIES[one.label],
                        "segmentation": outline,
                        "area": float(one.area),
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "iscrowd": int(one.crowd),
                    }
                )
        for split, document in documents.items():
            _write_json(folder / f"annotations/instances_{split}2017.json", document)
    return Path(out)


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
    with _new_folder(out) as folder:
        for split, number, scene in _numbered(splits):
            cities = CITYSCAPES_CITIES[split]
            city = cities[number % len(cities)]
            name = f"{city}_{number:06d}_000019"
            labels = f"gtFine/{split}/{city}/{name}_gtFine"
            _save(folder / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", scene.image)
            _save(folder / f"{labels}_labelIds.png", ids[scene.mask])
            _save(folder / f"{labels}_instanceIds.png", _cityscapes_instances(scene, ids))
            _save(folder / f"{labels}_color.png", colours[scene.mask])
            _write_json(folder / f"{labels}_polygons.json", _cityscapes_polygons(scene))
    return Path(out)


def write_context(out: str | Path, splits: Splits) -> Path:
    """PASCAL-Context: OUT/VOCdevkit/VOC2010 with JPEGImages and ImageSets/Main, OUT/trainval/{id}.mat, OUT/labels.txt.

    The MATLAB files hold `LabelMap`, uint16 (H, W), numbers among 459; `CONTEXT_LABELS` says which stands for which
    class. labels.txt has the lines "360: sky" of those numbers only, where the real one has 459.
    """
    from scipy.io import savemat

    ids = np.zeros(256, np.uint16)
    for label, (number, _) in CONTEXT_LABELS.items():
        ids[label] = number
    with _new_folder(out) as folder:
        root = folder / "VOCdevkit/VOC2010"
        lists: dict[str, list[str]] = {}
        for split, number, scene in _numbered(splits):
            name = f"{2008 + number % 3}_{2 + 5 * number:06d}"
            lists.setdefault(split, []).append(name)
            _save(root / f"JPEGImages/{name}.jpg", scene.image)
            (folder / "trainval").mkdir(exist_ok=True)
            savemat(folder / f"trainval/{name}.mat", {"LabelMap": ids[scene.mask]}, do_compression=True)
        _write_lists(root / "ImageSets/Main", lists)
        lines = [f"{number}: {name}" for number, name in sorted(CONTEXT_LABELS.values())]
        (folder / "labels.txt").write_text("\n".join(lines) + "\n")
    return Path(out)


def write_folder(out: str | Path, splits: Splits, masks: Literal["index", "palette", "rgb"] = "index") -> Path:
    """The layout of one's own data: OUT/{split}/images and OUT/{split}/masks, all PNG, and OUT/classes.txt.

    Args:
        out: folder to make.
        splits: scenes of each split.
        masks: "index" and "palette" hold label numbers and 255, in a grey or a palette PNG; "rgb" shows the colours of
            `seglight.data.scenes.PALETTE`, and (224, 224, 192) on borders.
    """
    if masks not in ("index", "palette", "rgb"):
        raise ValueError(f"masks is {masks!r}; it must be index, palette or rgb.")
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(PALETTE)], colours[VOID] = PALETTE, VOID_COLOUR
    with _new_folder(out) as folder:
        for split, number, scene in _numbered(splits):
            name = f"scene_{number:04d}.png"
            _save(folder / split / "images" / name, scene.image)
            mask = colours[scene.mask] if masks == "rgb" else scene.mask
            _save(folder / split / "masks" / name, mask, colours if masks == "palette" else None)
        (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return Path(out)


# ---------------------------------------------------------------- files


@contextmanager
def _new_folder(out: str | Path) -> Iterator[Path]:
    """A folder under a temporary name that becomes `out` when the block ends well and vanishes when it does not."""
    out = Path(out).expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder. Nothing is overwritten: choose a new one.")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _numbered(splits: Splits) -> Iterator[tuple[str, int, Scene]]:
    """Split, running number over all splits, scene."""
    number = 0
    for split, scenes in splits.items():
        for scene in scenes:
            yield split, number, scene
            number += 1


def _save(path: Path, array: np.ndarray, palette: np.ndarray | None = None) -> None:
    """Grey (H, W) uint8 or uint16, RGB or RGBA (H, W, 3 or 4), or with a palette (256, 3) a palette image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette.tobytes())
    image.save(path, quality=92, subsampling=0) if path.suffix == ".jpg" else image.save(path)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _write_lists(folder: Path, lists: dict[str, list[str]]) -> None:
    """One text file per split, and trainval."""
    folder.mkdir(parents=True)
    both = sorted(name for names in lists.values() for name in names)
    for split, names in {**lists, "trainval": both}.items():
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


# ---------------------------------------------------------------- outlines


def _rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths: column by column, off and on in turn, beginning with off."""
    flat = mask.ravel(order="F")
    bounds = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), flat.size]
    counts = np.diff(bounds).tolist()
    return {"counts": [0, *counts] if flat[0] else counts, "size": list(mask.shape)}


def _pieces(mask: np.ndarray) -> list[np.ndarray]:
    """Connected parts, bool (H, W) each, none with a hole: a polygon has one outline, so a ring is cut in two."""
    pixels = mask.astype(np.uint8)
    contours, hierarchy = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    inner = hierarchy[0, :, 3] >= 0 if contours else []
    holes = [points for points, is_hole in zip(contours, inner, strict=True) if is_hole]
    if not holes:
        count, parts = cv2.connectedComponents(pixels, connectivity=8)
        return [parts == part for part in range(1, count)]
    columns = holes[0][..., 0]
    cut = np.arange(mask.shape[1]) < (int(columns.min()) + int(columns.max())) // 2
    return _pieces(mask & cut) + _pieces(mask & ~cut)


def _outline(piece: np.ndarray) -> list[float]:
    """Corners x, y, x, y, ... of the polygon along the pixel edges of a part without holes, clockwise on the screen."""
    padded = np.pad(piece, 1)
    steps = ((1, 0), (0, 1), (-1, 0), (0, -1))  # right, down, left, up: the part is on the right-hand side
    outside = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    starts = ((0, 0), (1, 0), (1, 1), (0, 1))
    edges = set()
    for way, (beyond, (dx, dy)) in enumerate(zip(outside, starts, strict=True)):
        ys, xs = np.nonzero(piece & ~beyond)
        edges |= {(x + dx, y + dy, way) for x, y in zip(xs.tolist(), ys.tolist(), strict=True)}
    x, y, way = first = min(edges, key=lambda edge: (edge[1], edge[0], edge[2]))
    corners: list[float] = []
    while True:
        corners += [float(x), float(y)]
        while True:  # along one straight side
            x, y = x + steps[way][0], y + steps[way][1]
            # Where two pixels touch at a corner only, turning left keeps them in one outline.
            turn = next(turn for turn in (3, 0, 1) if (x, y, (way + turn) % 4) in edges)
            if turn:
                break
        way = (way + turn) % 4
        if (x, y, way) == first:
            return corners


def _coco_document(split: str) -> dict[str, Any]:
    names = [
        {"supercategory": "light" if label in (SUN, MOON) else "shape", "id": number, "name": CLASSES[label]}
        for label, number in COCO_CATEGORIES.items()
    ]
    return {
        "info": {"description": f"Generated scenes, {split}", "version": "1.0", "year": 2017},
        "licenses": [{"id": 1, "name": "Public domain", "url": ""}],
        "images": [],
        "annotations": [],
        "categories": names,
    }


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
        for piece in _pieces(region):
            (contour, *_), _ = cv2.findContours(piece.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            objects.append({"label": label, "polygon": contour[:, 0].tolist()})
    height, width = scene.mask.shape
    return {"imgHeight": height, "imgWidth": width, "objects": objects}
