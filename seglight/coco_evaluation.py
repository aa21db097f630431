"""Scores of a file of results against a file of annotations, both in COCO's json format: what a server would say."""

from __future__ import annotations

import json
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
            `bbox` (x y width height) or both. Without segmentations only boxes are scored; without boxes they are the
            masks' own.
        max_detections, agnostic, reference: as `seglight.detection_metrics.AveragePrecision`.

    Raises:
        ValueError: a file of another kind, or an entry that lacks something or names what is not listed.
    """
    truth, found = _read(annotations), _read(results)
    if not isinstance(truth, dict) or not {"images", "annotations", "categories"} <= set(truth):
        raise ValueError(f"{annotations} is no annotation file: it must hold images, annotations and categories.")
    if not isinstance(found, list):
        raise ValueError(f"{results} is no result file: it must hold a list of detections.")
    names = {one["id"]: one["name"] for one in truth["categories"]}
    labels = {category: label for label, category in enumerate(sorted(names))}
    sizes = {one["id"]: (one["height"], one["width"]) for one in truth["images"]}
    objects, detections = defaultdict(list), defaultdict(list)
    for path, entries, lists in ((annotations, truth["annotations"], objects), (results, found, detections)):
        for i, one in enumerate(entries):
            where = f"{path}: annotation {one['id']}" if "id" in one and lists is objects else f"{path}: entry {i}"
            needed = ("image_id", "category_id", *(("area", "bbox") if lists is objects else ("score",)))
            missing = [key for key in needed if key not in one]
            if missing:
                raise ValueError(f"{where} has no {missing[0]}.")
            if one["image_id"] not in sizes:
                raise ValueError(f"{where} is of image {one['image_id']}, which {annotations} does not list.")
            if one["category_id"] not in labels:
                raise ValueError(f"{where} has the category {one['category_id']}, which {annotations} does not list.")
            lists[one["image_id"]].append(one)
    masked = bool(found) and all("segmentation" in one for one in found)
    if not masked:
        without = next((i for i, one in enumerate(found) if "bbox" not in one), None)
        if without is not None:
            raise ValueError(f"{results}: entry {without} has no bbox, and not every entry has a segmentation.")
    masked = masked or not found
    images = {}
    for image, size in sizes.items():
        there, got = objects[image], detections[image]
        rles = [_rle(one["segmentation"], size) for one in got] if masked else None
        images[str(image)] = Image(
            size=size,
            boxes=_boxes(got, rles, size),
            labels=np.array([labels[one["category_id"]] for one in got], dtype=np.int64),
            scores=np.array([one["score"] for one in got], dtype=np.float64),
            rles=rles,
            truth_boxes=_boxes(there, None, size),
            truth_labels=np.array([labels[one["category_id"]] for one in there], dtype=np.int64),
            truth_rles=[_rle(one["segmentation"], size) for one in there] if masked else None,
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


def _rle(segmentation: Any, size: tuple[int, int]) -> bytes:
    """Compressed run lengths of polygons, of run lengths or of compressed ones."""
    from pycocotools import mask

    if isinstance(segmentation, list):
        return mask.merge(mask.frPyObjects(segmentation, *size))["counts"]
    counts = segmentation["counts"]
    if isinstance(counts, list):
        return mask.frPyObjects(segmentation, *size)["counts"]
    return counts.encode() if isinstance(counts, str) else counts


def _boxes(entries: list[dict], rles: list[bytes] | None, size: tuple[int, int]) -> np.ndarray:
    """float64 (N, 4), x y width height, as written; those of the masks where nothing is written."""
    if rles is not None and not all("bbox" in one for one in entries):
        from pycocotools import mask

        return mask.toBbox([{"size": list(size), "counts": counts} for counts in rles]).reshape(-1, 4)
    return np.array([one["bbox"] for one in entries], dtype=np.float64).reshape(-1, 4)
