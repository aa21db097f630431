"""What the VOC and the Cityscapes benchmark share: everybody brings the same files to batches on one core."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch.utils.data import default_collate
from torchvision.io import ImageReadMode, decode_image

from seglight.benchmarks.recipes import MEAN, STD, albumentations_recipe, research_recipe, torchvision_recipes
from seglight.data.dataset import SemanticDataset
from seglight.data.decode import read_image, read_mask
from seglight.data.files import FileDataset
from seglight.data.transforms import TrainTransform, train_batch


def contestants(data: FileDataset, height: int, crop: int, batch: int) -> dict[str, Callable[[], object]]:
    """Functions that bring all images from files to batches.

    Args:
        data: images of one height, masks whose values `data.lut` maps.
        height: of the images.
        crop: side of the crop.
        batch: samples of a batch.
    """
    count = len(data)
    pairs = [(str(image), str(mask)) for image, mask in zip(data.image_paths, data.mask_paths, strict=True)]

    def decode_only(image: str, mask: str) -> None:
        cv2.imread(image, cv2.IMREAD_COLOR_RGB)
        decode_image(mask, ImageReadMode.UNCHANGED)

    def decode_only_seglight(image: str, mask: str) -> None:
        read_image(image)
        read_mask(mask)

    def each(read: Callable) -> Callable[[], None]:
        return lambda: [read(*pair) for pair in pairs] and None

    def collated(sample: Callable) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, count, batch):
                default_collate([sample(*pair) for pair in pairs[start : start + batch]])

        return run

    peers = torchvision_recipes(height, crop, data.lut)
    peers["research recipe, OpenCV"] = research_recipe(crop, False, data.lut)
    peers["research recipe with colours"] = research_recipe(crop, True, data.lut)
    if albumentations := albumentations_recipe(crop, data.lut):
        peers["Albumentations"] = albumentations
    return {
        "seglight": ours(data, crop, batch),
        "seglight, colours": ours(data, crop, batch, jitter=0.5),
        "seglight, normalised": ours(data, crop, batch, normalise=True),
        "decode only": each(decode_only),
        "decode only, seglight": each(decode_only_seglight),
        **{name: collated(recipe) for name, recipe in peers.items()},
    }


def ours(
    data: SemanticDataset, crop: int, batch: int, jitter: float = 0.0, normalise: bool = False
) -> Callable[[], None]:
    """All samples to batches, as the loader's worker does it; `normalise` adds what the model does on its device."""
    transform, epoch = TrainTransform(crop, jitter=jitter), iter(range(1 << 30))
    mean, std = (torch.tensor([255 * v for v in values]).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    scale, shift = 1 / std, -mean / std

    def run() -> None:
        number = next(epoch)
        for start in range(0, len(data), batch):
            found = train_batch(data, [(number, index) for index in range(start, start + batch)], transform, seed=0)
            if normalise:
                torch.addcmul(shift, found["image"].float(), scale)
                found["mask"].long()

    return run


def sizes(data: FileDataset) -> str:
    """Mean size of the files, for the title of a table."""
    image, mask = (
        np.mean([path.stat().st_size for path in paths]) / 1000 for paths in (data.image_paths, data.mask_paths)
    )
    return f"{len(data)} images of {image:.0f} kB, masks of {mask:.1f} kB"


def per_second(rows: list, count: int) -> None:
    """Print images/s."""
    print("images/s: " + ", ".join(f"{row.name} {count / row.ms * 1000:.0f}" for row in rows))


MARKS = {
    "decode only": ">= 0.70, OpenCV and torchvision",
    "decode only, seglight": "the limit: without a cache nothing can be faster",
    "torchvision v2, tensors": ">= 3",
    "torchvision v2, tensors, uint8": "as above, normalisation left to the device as seglight does",
    "research recipe with colours": "with crops of mixed classes and photometric distortion",
    "seglight, colours": "its own random colours",
    "seglight, normalised": "as if the model did it on this core",
}
