"""Training pipelines as other libraries do them, from two files to a pair of tensors."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Recipe = Callable[[str, str], tuple[Tensor, Tensor]]


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """OpenCV on one thread inside."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def torchvision_recipes(height: int, crop: int, table: np.ndarray | None = None) -> dict[str, Recipe]:
    """Random scale 0.5 to 2 of images of a height, mirror, crop, normalise.

    Args:
        height: of the images, if that is their shorter side.
        crop: side of the crop.
        table: label of each value in the masks, uint8 (256,).
    """
    fill = {tv_tensors.Image: 0, Image.Image: 0, tv_tensors.Mask: 255}
    geometry = [
        v2.RandomResize(height // 2, 2 * height, antialias=True),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomCrop(crop, pad_if_needed=True, fill=fill),
    ]
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    whole, as_bytes = v2.Compose([*geometry, *normalise]), v2.Compose(geometry)
    pillow = v2.Compose([*geometry, v2.ToImage(), *normalise])
    labels = None if table is None else torch.from_numpy(table)

    def mask_of(mask: Tensor) -> tv_tensors.Mask:
        return tv_tensors.Mask(mask if labels is None else labels[mask.long()])

    def tensors(image: str, mask: str, recipe: v2.Compose = whole) -> tuple[Tensor, Tensor]:
        pair = tv_tensors.Image(decode_image(image, ImageReadMode.RGB)), decode_image(mask, ImageReadMode.UNCHANGED)
        picture, target = recipe(pair[0], mask_of(pair[1]))
        return picture, target[0].long() if recipe is whole else target[0]

    def with_pillow(image: str, mask: str) -> tuple[Tensor, Tensor]:
        picture, target = pillow(
            Image.open(image).convert("RGB"), mask_of(torch.from_numpy(np.array(Image.open(mask))[None]))
        )
        return picture, target[0].long()

    return {
        "torchvision v2, tensors": tensors,
        "torchvision v2, tensors, uint8": lambda image, mask: tensors(image, mask, as_bytes),
        "torchvision v2, Pillow": with_pillow,
    }


def research_recipe(crop: int, colours: bool, table: np.ndarray | None = None) -> Recipe:
    """The usual order of research frameworks, with OpenCV: resize everything by 0.5 to 2, then crop, mirror, normalise
    to float, pad.

    Args:
        crop: side of the crop; the first of up to ten in which no class has more than three quarters of the pixels.
        colours: random brightness, contrast, saturation and hue, each with probability 1/2.
        table: label of each value in the masks.
    """
    rng = np.random.default_rng(0)

    def sample(image_file: str, mask_file: str) -> tuple[Tensor, Tensor]:
        image, mask = cv2.imread(image_file), np.array(Image.open(mask_file))
        mask = mask if table is None else cv2.LUT(mask, table)
        scale = rng.uniform(0.5, 2)
        size = round(image.shape[1] * scale), round(image.shape[0] * scale)
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
        for _ in range(10):
            top, left = (int(rng.integers(max(0, length - crop) + 1)) for length in mask.shape)
            window = np.s_[top : top + crop, left : left + crop]
            counts = np.bincount(mask[window].ravel(), minlength=256)[:255]
            if np.count_nonzero(counts) > 1 and counts.max() < 0.75 * counts.sum():
                break
        image, mask = image[window], mask[window]
        if rng.random() < 0.5:
            image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
        if colours:
            image = _colours(image, rng)
        image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_BGR2RGB).astype(np.float32)
        image = (image - 255 * np.float32(MEAN)) / (255 * np.float32(STD))
        below, right = crop - mask.shape[0], crop - mask.shape[1]
        image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=0)
        mask = cv2.copyMakeBorder(mask, 0, below, 0, right, cv2.BORDER_CONSTANT, value=255)
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), torch.from_numpy(mask.astype(np.int64))

    return sample


def _colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Photometric distortion as in SSD (Liu et al., ECCV 2016), BGR uint8 to BGR uint8."""

    def chance() -> bool:
        return rng.random() < 0.5

    late = chance()  # contrast comes before or after the hue
    if chance():
        image = cv2.convertScaleAbs(image, alpha=1, beta=rng.uniform(-32, 32))
    if not late and chance():
        image = cv2.convertScaleAbs(image, alpha=rng.uniform(0.5, 1.5))
    if chance():
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[..., 1] = cv2.convertScaleAbs(hsv[..., 1], alpha=rng.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if chance():
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if late and chance():
        image = cv2.convertScaleAbs(image, alpha=rng.uniform(0.5, 1.5))
    return image


def albumentations_recipe(crop: int, table: np.ndarray | None = None) -> Recipe | None:
    """The same work by Albumentations; None, with a line, if it is not installed."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network otherwise
    try:
        library = importlib.import_module("albumentations")
    except ImportError:
        print("Albumentations is not installed, so it is left out (an optional peer).")
        return None
    pipeline = library.Compose(
        [
            library.RandomScale((-0.5, 1.0), p=1.0),
            library.PadIfNeeded(crop, crop, border_mode=cv2.BORDER_CONSTANT, fill=0, fill_mask=255),
            library.RandomCrop(crop, crop),
            library.HorizontalFlip(p=0.5),
            library.Normalize(MEAN, STD),
        ]
    )

    def sample(image: str, mask: str) -> tuple[Tensor, Tensor]:
        picture, target = cv2.imread(image, cv2.IMREAD_COLOR_RGB), np.array(Image.open(mask))
        found = pipeline(image=picture, mask=target if table is None else cv2.LUT(target, table))
        return torch.from_numpy(np.ascontiguousarray(found["image"].transpose(2, 0, 1))), torch.from_numpy(
            found["mask"]
        ).long()

    return sample
