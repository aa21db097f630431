"""COCO 2017 instances."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seglight.data.coco_names import THINGS
from seglight.data.formats.files import Splits, new_folder, numbered, save, write_json
from seglight.data.formats.outlines import outline, pieces, rle
from seglight.data.scenes import CLASSES, MOON, RING, SQUARE, STAR, SUN, TRIANGLE, Scene

COCO_CATEGORIES = {SQUARE: 1, TRIANGLE: 3, STAR: 7, RING: 13, SUN: 27, MOON: 90}
"""Category id of each countable class. Ids have gaps, as COCO's have; background and wires are not annotated."""


def write_coco(out: str | Path, splits: Splits) -> Path:
    """COCO 2017: OUT/{split}2017/000000000009.jpg and OUT/annotations/instances_{split}2017.json.

    Objects are polygons along the edges of the pixels, so they cover exactly the annotated ones; crowds are
    uncompressed RLE. Pictures without an object are listed and have no annotation. Those of "test" are listed in
    image_info_test-dev2017.json, which has no list of annotations.
    """
    with new_folder(out) as folder:
        for _ in write_coco_into(folder, splits):
            pass
    return Path(out)


def write_coco_into(folder: Path, splits: Splits, official: bool = False) -> Iterator[tuple[str, str, Scene]]:
    """Write as `write_coco`, and give split, name and scene of each picture meanwhile.

    Args:
        folder: where to write.
        splits: scenes of each split.
        official: list COCO's 80 categories, of which the ids of `COCO_CATEGORIES` are used, rather than the names of
            the scenes' classes.
    """
    documents: dict[str, dict[str, Any]] = {}
    for split, number, scene in numbered(splits):
        document = documents.setdefault(split, _coco_document(split, official))
        height, width = scene.mask.shape
        image_id = 9 + 16 * number
        name = f"{image_id:012d}"
        save(folder / f"{split}2017/{name}.jpg", scene.image)
        document["images"].append(
            {"id": image_id, "file_name": f"{name}.jpg", "height": height, "width": width, "license": 1}
        )
        for index, (one, mask) in enumerate(zip(scene.objects, scene.object_masks(), strict=True)):
            x1, y1, x2, y2 = map(float, one.box)
            segmentation = rle(mask) if one.crowd else [outline(piece) for piece in pieces(mask)]
            document["annotations"].append(
                {
                    "id": 1000 * image_id + index,
                    "image_id": image_id,
                    "category_id": COCO_CATEGORIES[one.label],
                    "segmentation": segmentation,
                    "area": float(one.area),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "iscrowd": int(one.crowd),
                }
            )
        yield split, name, scene
    for split, document in documents.items():
        if split == "test":
            del document["annotations"]
        name = "image_info_test-dev2017" if split == "test" else f"instances_{split}2017"
        write_json(folder / f"annotations/{name}.json", document)


def _coco_document(split: str, official: bool) -> dict[str, Any]:
    names = [
        {"supercategory": "light" if label in (SUN, MOON) else "shape", "id": number, "name": CLASSES[label]}
        for label, number in COCO_CATEGORIES.items()
    ]
    if official:
        names = [{"supercategory": "thing", "id": number, "name": name} for number, name in THINGS.items()]
    return {
        "info": {"description": f"Generated scenes, {split}", "version": "1.0", "year": 2017},
        "licenses": [{"id": 1, "name": "Public domain", "url": ""}],
        "images": [],
        "annotations": [],
        "categories": names,
    }
