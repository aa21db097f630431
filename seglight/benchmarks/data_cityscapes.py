"""Cityscapes-like files: PNG 2048x1024 of about 2.3 MB and labelIds; scale 0.5 to 2, crop 768, mirror, batches of 4.

Mark: with the cache at least 3 times the images/s of a plain torchvision.transforms.v2 recipe.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import cv2
import numpy as np

from seglight.benchmarks.data_semantic import MARKS, contestants, ours, per_second, sizes
from seglight.benchmarks.data_voc import cached
from seglight.benchmarks.recipes import one_core
from seglight.benchmarks.timing import paired
from seglight.data.cityscapes import CLASSES, LAST_ID
from seglight.data.files import FileDataset
from seglight.data.scenes import scene
from seglight.types import IGNORE_INDEX

CROP, BATCH = 768, 4


def run(options: argparse.Namespace) -> None:
    """Print one table, and how many times faster than torchvision the cache makes it."""
    count = options.images or 8
    with tempfile.TemporaryDirectory() as folder, one_core():
        data = cityscapes_like(Path(folder) / "files", count)
        marks = {name: mark for name, mark in MARKS.items() if not name.startswith("decode only")}
        rows = paired(
            {**contestants(data, 1024, CROP, BATCH), "seglight, cache": ours(cached(data, folder), CROP, BATCH)},
            baseline="seglight, cache",
            rounds=options.rounds,
            marks={**marks, "torchvision v2, tensors": ">= 3", "seglight": "without the cache"},
            title=f"Cityscapes: {sizes(data)}",
        )
    per_second(rows, count)


def cityscapes_like(folder: Path, count: int) -> FileDataset:
    """Write scenes of Cityscapes' size, with as much noise as makes files of its size."""
    folder.mkdir(parents=True)
    ids = np.array([label_id for label_id, _ in CLASSES.values()], np.uint8)
    lut = np.full(256, IGNORE_INDEX, np.uint8)
    lut[ids] = np.arange(len(ids))
    names, rng = [f"{index:04}" for index in range(count)], np.random.default_rng(0)
    for index, name in enumerate(names):
        sample = scene(0, index, (512, 1024))
        image = cv2.resize(sample.image, (2048, 1024), interpolation=cv2.INTER_CUBIC)
        noise = cv2.resize(rng.normal(0, 6, (512, 1024)), (2048, 1024), interpolation=cv2.INTER_LINEAR)[..., None]
        image = np.clip(image + noise + rng.normal(0, 0.3, (1024, 2048, 1)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{name}.png"), image[..., ::-1])
        mask = cv2.resize(sample.mask, (2048, 1024), interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(folder / f"{name}_labels.png"), np.where(mask == 255, LAST_ID - 33, ids[mask % len(ids)]))
    images = [folder / f"{name}.png" for name in names]
    return FileDataset("Cityscapes-like", names, images, [folder / f"{name}_labels.png" for name in names], lut)
