"""COCO-like files: JPEG 640x480 with 10 outlined objects each, to training batches of 2 at a shorter side of 800.

Everybody makes boxes, labels and a mask per object at the size of the resized image. No mark is set for this one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from seglight.benchmarks.data_semantic import per_second
from seglight.benchmarks.recipes import MEAN, STD, one_core
from seglight.benchmarks.timing import paired
from seglight.data.coco import COCODataset
from seglight.data.cocojson.reader import read
from seglight.data.instance_transforms import InstanceTransform, train_batch
from seglight.data.scenes import scene

SHORT, LONG, BATCH, OBJECTS = 800, 1333, 2, 10


def run(options: argparse.Namespace) -> None:
    """Print one table."""
    count = options.images or 16
    with tempfile.TemporaryDirectory() as folder, one_core():
        data = coco_like(Path(folder), count)
        rows = paired(
            contestants(data),
            baseline="seglight",
            rounds=options.rounds,
            marks={"decode only": "images alone", "torchvision v2": "polygons filled by pycocotools, then resized"},
            title=f"COCO: {count} images of 640x480, {OBJECTS} objects each, shorter side {SHORT}",
        )
    per_second(rows, count)


def coco_like(folder: Path, count: int) -> COCODataset:
    """Write images and their json."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(count):
        Image.fromarray(scene(0, index, (480, 640)).image).save(folder / f"{index}.jpg", quality=95)
        images.append({"id": index, "file_name": f"{index}.jpg", "height": 480, "width": 640})
        for _ in range(OBJECTS):
            radius, angle = rng.uniform(10, 120), np.sort(rng.uniform(0, 2 * np.pi, 28))
            x, y = (rng.uniform(radius, side - radius) for side in (640, 480))
            points = np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1).round(2)
            (left, top), (width, height) = points.min(0).tolist(), np.ptp(points, axis=0).tolist()
            entry = {
                "id": len(annotations) + 1,
                "image_id": index,
                "category_id": 1,
                "bbox": [left, top, width, height],
            }
            annotations.append({**entry, "area": width * height / 2, "segmentation": [points.ravel().tolist()]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "objects.json").write_text(json.dumps(content))
    return COCODataset("COCO-like", read(folder / "objects.json"), folder)


def contestants(data: COCODataset) -> dict:
    """Functions that bring all images from files to batches."""
    from pycocotools import mask as coco

    count, epoch, transform = len(data), iter(range(1 << 30)), InstanceTransform(SHORT, LONG)
    recipe = v2.Compose(
        [
            v2.RandomShortestSize(SHORT, LONG, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(MEAN, STD),
            v2.SanitizeBoundingBoxes(),
        ]
    )

    def seglight() -> None:
        number = next(epoch)
        for start in range(0, count, BATCH):
            train_batch(data, [(number, index) for index in range(start, start + BATCH)], transform, seed=0)

    def torchvision() -> None:
        for index in range(count):
            image = tv_tensors.Image(decode_image(str(data.path(index)), ImageReadMode.RGB))
            objects, size = data.objects(index), data.size(index)
            masks = [coco.decode(coco.merge(coco.frPyObjects(outline, *size))) for outline in objects.segmentations]
            target = {
                "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(objects.boxes), format="XYXY", canvas_size=size),
                "masks": tv_tensors.Mask(torch.from_numpy(np.stack(masks))),
                "labels": torch.from_numpy(objects.labels),
            }
            recipe(image, target)

    def decode_only() -> None:
        for index in range(count):
            cv2.imread(str(data.path(index)), cv2.IMREAD_COLOR_RGB)

    return {"seglight": seglight, "decode only": decode_only, "torchvision v2": torchvision}
