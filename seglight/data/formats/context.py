"""PASCAL-Context, MATLAB label maps or one json file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from seglight.data.formats.files import Splits, new_folder, numbered, save, write_json, write_lists
from seglight.data.scenes import MOON, RING, SQUARE, STAR, SUN, TRIANGLE, VOID, WIRE, Scene

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


def write_context(out: str | Path, splits: Splits) -> Path:
    """PASCAL-Context: OUT/VOCdevkit/VOC2010 with JPEGImages and ImageSets/Main, OUT/trainval/{id}.mat, OUT/labels.txt.

    The MATLAB files hold `LabelMap`, uint16 (H, W), numbers among 459; `CONTEXT_LABELS` says which stands for which
    class. labels.txt has the lines "360: sky" of those numbers only, where the real one has 459.
    """
    from scipy.io import savemat

    with new_folder(out) as folder:
        (folder / "trainval").mkdir()
        for name, _, scene in _devkit(folder, splits):
            savemat(folder / f"trainval/{name}.mat", {"LabelMap": _numbers(scene)}, do_compression=True)
        lines = [f"{number}: {name}" for number, name in sorted(CONTEXT_LABELS.values())]
        (folder / "labels.txt").write_text("\n".join(lines) + "\n")
    return Path(out)


def write_context_json(out: str | Path, splits: Splits) -> Path:
    """PASCAL-Context: OUT/VOCdevkit/VOC2010 with JPEGImages, ImageSets/Main and trainval_merged.json.

    As in the real file, segments are compressed RLEs of one category or object each, some lie on others and the later
    one counts, stuff is a crowd, image ids are 2008000002 for 2008_000002.jpg, pixels without a segment are borders,
    and there are lists that no label map needs. The last of three and more validation images is not in the file.
    """
    with new_folder(out) as folder:
        document: dict[str, Any] = {"info": {"description": "Generated scenes"}, "images": [], "annos_segmentation": []}
        listed = {split: list(of) for split, of in splits.items()}
        count = {split: len(of) for split, of in listed.items()}
        seen = dict.fromkeys(count, 0)
        for name, split, scene in _devkit(folder, listed):
            seen[split] += 1
            if split == "val" and seen[split] == count[split] >= 3:
                continue
            height, width = scene.mask.shape
            image = {"image_id": int(name.replace("_", "")), "file_name": f"{name}.jpg", "phase": split}
            document["images"].append({**image, "height": height, "width": width, "date_captured": "31-Oct-2007"})
            for number, crowd, mask in _segments(scene):
                document["annos_segmentation"].append(
                    {
                        "id": len(document["annos_segmentation"]) + 1,
                        "image_id": image["image_id"],
                        "category_id": number,
                        "segmentation": _rle(mask),
                        "area": int(mask.sum()),
                        "iscrowd": int(crowd),
                        "parts": [],
                    }
                )
        document["categories"] = [
            {"category_id": number, "name": name, "onlysemantic": 0, "supercategory": "object", "parts": []}
            for number, name in CONTEXT_LABELS.values()
        ]
        document |= {
            "parts": [],
            "annos_occlusion": [{"image_id": 0, "ne": 0}],
            "annos_boundary": [],
            "annos_joints": [],
        }
        write_json(folder / "VOCdevkit/VOC2010/trainval_merged.json", document)
    return Path(out)


def _devkit(folder: Path, splits: Splits) -> Iterator[tuple[str, str, Scene]]:
    """Writes the images and, at the end, the lists; gives name, split and scene of each."""
    root = folder / "VOCdevkit/VOC2010"
    lists: dict[str, list[str]] = {}
    for split, number, scene in numbered(splits):
        name = f"{2008 + number % 3}_{2 + 5 * number:06d}"
        lists.setdefault(split, []).append(name)
        save(root / f"JPEGImages/{name}.jpg", scene.image)
        yield name, split, scene
    write_lists(root / "ImageSets/Main", lists)


def _numbers(scene: Scene) -> np.ndarray:
    """uint16 (H, W), numbers among 459."""
    ids = np.zeros(256, np.uint16)
    for label, (number, _) in CONTEXT_LABELS.items():
        ids[label] = number
    return ids[scene.mask]


def _segments(scene: Scene) -> Iterator[tuple[int, bool, np.ndarray]]:
    """Number, whether it is a crowd, and pixels. The sky comes first, and lies below everything but borders."""
    known = scene.mask != VOID
    yield CONTEXT_LABELS[0][0], True, known
    yield CONTEXT_LABELS[WIRE][0], True, known & (scene.mask == WIRE)
    for one, mask in zip(scene.objects, scene.object_masks(), strict=True):
        yield CONTEXT_LABELS[one.label][0], one.crowd, mask & known & (scene.mask == one.label)


def _rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths, as text."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}
