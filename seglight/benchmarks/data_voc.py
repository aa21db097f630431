"""VOC-like files: JPEG 500x375 of about 90 kB and palette PNG; scale 0.5 to 2, crop 512, mirror, batches of 8.

Marks: at least 3 times the images/s of a plain torchvision.transforms.v2 recipe, and 0.7 of decoding alone.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from seglight.benchmarks.data_semantic import MARKS, contestants, ours, per_second, sizes
from seglight.benchmarks.recipes import one_core
from seglight.benchmarks.timing import paired
from seglight.data.cache import Cached
from seglight.data.cache_write import plan, write
from seglight.data.files import FileDataset
from seglight.data.palette import palette
from seglight.data.scenes import scene

CROP, BATCH = 512, 8


def run(options: argparse.Namespace) -> None:
    """Print one table."""
    count = options.images or 32
    with tempfile.TemporaryDirectory() as folder, one_core():
        data = voc_like(Path(folder) / "files", count)
        rows = paired(
            {**contestants(data, 375, CROP, BATCH), "seglight, cache": ours(cached(data, folder), CROP, BATCH)},
            baseline="seglight",
            rounds=options.rounds,
            marks={**MARKS, "seglight, cache": "decoded before"},
            title=f"VOC: {sizes(data)}",
        )
    per_second(rows, count)


def voc_like(folder: Path, count: int) -> FileDataset:
    """Write scenes of VOC's size with its compression."""
    folder.mkdir(parents=True)
    colours = np.array(palette(256), np.uint8).tobytes()
    names = [f"{index:04}" for index in range(count)]
    for index, name in enumerate(names):
        sample = scene(0, index, (375, 500))
        (folder / f"{name}.jpg").write_bytes(_jpeg(sample.image, 90_000))
        mask = Image.fromarray(sample.mask)
        mask.putpalette(colours)
        mask.save(folder / f"{name}.png")
    return FileDataset("VOC-like", names, [folder / f"{n}.jpg" for n in names], [folder / f"{n}.png" for n in names])


def cached(data: FileDataset, folder: str | Path) -> Cached:
    """The same samples from a cache in a folder, made on the spot."""
    place = Path(folder) / "cache"
    write(plan({"train": data}, [], place), place)
    return Cached(data, place, [])


def _jpeg(image: np.ndarray, size: int) -> bytes:
    """The quality whose file comes nearest to `size` bytes, with colours at half resolution as in VOC."""
    low, high = 1, 100
    while low < high:
        quality, buffer = (low + high) // 2, io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=2)
        low, high = (quality + 1, high) if buffer.tell() < size else (low, quality)
    return buffer.getvalue()
