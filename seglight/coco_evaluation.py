"""Scores of a file of results against a file of annotations, both in COCO's json format: what a server would say."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seglight.detection_metrics import Image, evaluate
from seglight.instance_scores import InstanceScores


def evaluate_json(
    annotations: str | Path,
    results: str | Path,
    max_detections: Sequence[int] = (1, 10, 100),
    agnostic: bool = False,
    reference: bool = False,
) -> InstanceScores:
    """Return the scores of results such as `seglight predict` writes. Every image of `annotations` counts.

    Args:
        annotations: `images`, `annotations` and `categories`, as instances_val2017.json.
        results: a list of detections with `image_id`, `category_id`, `score` and a `segmentation` (run lengths), a
            `bbox` (x y width height) or both. Without segmentations in one of the files only boxes are scored; without
            boxes they are the masks' own.
        max_detections, agnostic, reference: as `seglight.detection_metrics.AveragePrecision`.

    Raises:
        ValueError: a file of another kind, or an entry that lacks something or names what is not listed.
    """
    truth, found = _read(annotations), _read(results)
    if not isinstance(truth, dict) or not {"images", "annotations", "categories"} <= set(truth):
        raise ValueError(f"{annotations} is no annotation file: it must hold images, annotations and categories.")
    if not isinstance(found, list):
        raise ValueError(f"{results} is no result file: it must hold a list of detections.")
    names = _by_id(truth["categories"], f"{annotations}: category", ("name",))
    names = {category: one["name"] for category, one in names.items()}
    labels = {category: label for label, category in enumerate(sorted(names))}
    sizes = _by_id(truth["images"], f"{annotations}: image", ("height", "width"))
    sizes = {image: (one["height"], one["width"]) for image, one in sizes.items()}
    objects, detections = defaultdict(list), defaultdict(list)
    for path, entries, lists in ((annotations, truth["annotations"], objects), (results, found, detections)):
        numbers = ("area",) if lists is objects else ("score",)
        needed = ("image_id", "category_id", *numbers, *(("bbox",) if lists is objects else ()))
        for i, one in enumerate(entries):
            one = _entry(one, f"{path}: entry {i}", needed)
            where = f"{path}: annotation {one['id']}" if "id" in one and lists is objects else f"{path}: entry {i}"
            if one["image_id"] not in sizes:
                raise ValueError(f"{where} is of image {one['image_id']}, which {annotations} does not list.")
            if one["category_id"] not in labels:
                raise ValueError(f"{where} has the category {one['category_id']}, which {annotations} does not list.")
            if not _finite([one[key] for key in numbers]):
                raise ValueError(f"{where} has the {numbers[0]} {one[numbers[0]]!r}, which is no finite number.")
            box = one.get("bbox", [0, 0, 0, 0])
            if type(box) is not list or len(box) != 4 or not _finite(box) or min(box[2:]) < 0:
                raise ValueError(f"{where} has the bbox {box}; it must be x, y, width and height, the last two from 0.")
            if "segmentation" in one:
                one["segmentation"] = _rle(one["segmentation"], sizes[one["image_id"]], where)
            lists[one["image_id"]].append(one)
    outlined = all("segmentation" in one for of_image in detections.values() for one in of_image)
    if not outlined:
        without = next((i for i, one in enumerate(found) if one.get("bbox") is None), None)
        if without is not None:
            raise ValueError(f"{results}: entry {without} has no bbox, and not every entry has a segmentation.")
    bare = [one for of_image in objects.values() for one in of_image if "segmentation" not in one]
    masked = outlined and len(bare) < max(1, len(truth["annotations"]))  # else only boxes can be compared
    if masked and bare:
        raise ValueError(f"{annotations}: annotation {bare[0].get('id')} has no segmentation, but others have.")
    images = {}
    for image, size in sizes.items():
        there, got = objects[image], detections[image]
        rles = [one["segmentation"] for one in got] if outlined else None
        images[str(image)] = Image(
            size=size,
            boxes=_boxes(got, rles, size),
            labels=np.array([labels[one["category_id"]] for one in got], dtype=np.int64),
            scores=np.array([one["score"] for one in got], dtype=np.float64),
            rles=rles if masked else None,
            truth_boxes=_boxes(there, None, size),
            truth_labels=np.array([labels[one["category_id"]] for one in there], dtype=np.int64),
            truth_rles=[one["segmentation"] for one in there] if masked else None,
            crowd=np.array([bool(one.get("iscrowd", 0)) for one in there], dtype=bool),
            area=np.array([one["area"] for one in there], dtype=np.float64),
        )
    classes = [names[category] for category in sorted(names)]
    return evaluate(images, classes, tuple(max_detections), agnostic, reference)


def _read(path: str | Path) -> Any:
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no json file: {error}.") from error


def _entry(one: Any, where: str, needed: Sequence[str]) -> dict[str, Any]:
    """The entry of a list without its nulls."""
    if not isinstance(one, dict):
        raise ValueError(f"{where} is {one!r}; it must be a mapping.")
    one = {key: value for key, value in one.items() if value is not None}
    if missing := [key for key in needed if key not in one]:
        raise ValueError(f"{where} has no {missing[0]}.")
    for key in ("id", "image_id", "category_id"):
        if key in one and not isinstance(one[key], (int, str)):
            raise ValueError(f"{where} has the {key} {one[key]!r}; it must be a number or a name.")
    return one


def _by_id(entries: Sequence[Any], what: str, needed: Sequence[str]) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for i, one in enumerate(entries):
        one = _entry(one, f"{what} [{i}]", ("id", *needed))
        if found.setdefault(one["id"], one) is not one:
            raise ValueError(f"{what} {one['id']} is listed twice; ids must be unique.")
    return found


def _finite(values: Sequence[Any]) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def _rle(segmentation: Any, size: tuple[int, int], where: str) -> bytes:
    """Compressed run lengths of polygons, of run lengths or of compressed ones."""
    from pycocotools import mask

    from seglight.data.cocojson.lists import Unusable, polygons_of, rle_of

    try:
        if not isinstance(segmentation, dict):
            return mask.merge(mask.frPyObjects([list(one) for one in polygons_of(segmentation)], *size))["counts"]
        counts, given = rle_of(segmentation)
    except Unusable as error:
        raise ValueError(f"{where}: {error}") from error
    if given != tuple(size):
        raise ValueError(
            f"{where} has a mask of the size {list(given)}, but its image has {list(size)} (height, width)."
        )
    return counts


def _boxes(entries: list[dict], rles: list[bytes] | None, size: tuple[int, int]) -> np.ndarray:
    """float64 (N, 4), x y width height, as written; those of the masks where nothing is written."""
    if rles is not None and not all("bbox" in one for one in entries):
        from pycocotools import mask

        return mask.toBbox([{"size": list(size), "counts": counts} for counts in rles]).reshape(-1, 4)
    return np.array([one["bbox"] for one in entries], dtype=np.float64).reshape(-1, 4)
