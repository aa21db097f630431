"""Images/s of the training pipeline on VOC-like files, one core: `python -m seglight.benchmarks.data`.

Files: JPEG 500x375 of about 90 kB and palette PNG. Work: scale 0.5 to 2, crop 512, mirror, batches of 8.
Marks: at least 3 times the images/s of a plain torchvision.transforms.v2 recipe, and 0.7 of decoding alone.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from seglight.benchmarks.timing import paired
from seglight.data.decode import read_image, read_mask
from seglight.data.files import FileDataset
from seglight.data.palette import palette
from seglight.data.scenes import scene
from seglight.data.transforms import TrainTransform, train_batch

CROP, BATCH = 512, 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(argv: list[str] | None = None) -> int:
    """Print one table."""
    parser = argparse.ArgumentParser(prog="seglight bench data", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--images", type=int, default=32, help="per call, a multiple of 8")
    options = parser.parse_args(argv)
    if options.images < BATCH or options.images % BATCH:
        parser.error(f"--images is {options.images}; it must be a multiple of {BATCH}")
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = voc_like(Path(folder), options.images)
        size = np.mean([path.stat().st_size for path in data.image_paths]) / 1000
        mask_size = np.mean([path.stat().st_size for path in data.mask_paths]) / 1000
        rows = paired(
            contestants(data),
            baseline="seglight",
            rounds=options.rounds,
            marks={
                "decode only": ">= 0.70, OpenCV and torchvision",
                "decode only, seglight": "the limit: without a cache nothing can be faster",
                "torchvision v2, tensors": ">= 3",
                "torchvision v2, tensors, uint8": "as above, normalisation left to the device as seglight does",
                "seglight, normalised": "as if the model did it on this core",
            },
            title=f"{options.images} images of {size:.0f} kB, masks of {mask_size:.1f} kB",
        )
    cv2.setNumThreads(threads)
    print("images/s: " + ", ".join(f"{row.name} {options.images / row.ms * 1000:.0f}" for row in rows))
    return 0


def voc_like(folder: Path, count: int) -> FileDataset:
    """Write scenes of VOC's size with its compression."""
    colours = np.array(palette(256), np.uint8).tobytes()
    names = [f"{index:04}" for index in range(count)]
    for index, name in enumerate(names):
        sample = scene(0, index, (375, 500))
        (folder / f"{name}.jpg").write_bytes(_jpeg(sample.image, 90_000))
        mask = Image.fromarray(sample.mask)
        mask.putpalette(colours)
        mask.save(folder / f"{name}.png")
    return FileDataset("VOC-like", names, [folder / f"{n}.jpg" for n in names], [folder / f"{n}.png" for n in names])


def _jpeg(image: np.ndarray, size: int) -> bytes:
    """The quality whose file comes nearest to `size` bytes, with colours at half resolution as in VOC."""
    low, high = 1, 100
    while low < high:
        quality, buffer = (low + high) // 2, io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=2)
        low, high = (quality + 1, high) if buffer.tell() < size else (low, quality)
    return buffer.getvalue()


def contestants(data: FileDataset) -> dict:
    """Functions that bring all images from files to batches."""
    count, epoch = len(data), iter(range(1_000_000))
    transform = TrainTransform(CROP)
    pairs = [(str(image), str(mask)) for image, mask in zip(data.image_paths, data.mask_paths, strict=True)]
    mean, std = (torch.tensor([255 * v for v in values]).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    scale, shift = 1 / std, -mean / std

    def seglight(normalise: bool = False) -> None:
        number = next(epoch)
        for start in range(0, count, BATCH):
            batch = train_batch(data, [(number, index) for index in range(start, start + BATCH)], transform, seed=0)
            if normalise:
                torch.addcmul(shift, batch["image"].float(), scale)
                batch["mask"].long()

    def decode_only(image: str, mask: str) -> None:
        cv2.imread(image, cv2.IMREAD_COLOR_RGB)
        decode_image(mask, ImageReadMode.UNCHANGED)

    def decode_only_seglight(image: str, mask: str) -> None:
        read_image(image)
        read_mask(mask)

    def each(read) -> None:
        for pair in pairs:
            read(*pair)

    def collated(sample) -> None:
        for start in range(0, count, BATCH):
            default_collate([sample(*pair) for pair in pairs[start : start + BATCH]])

    short = 375
    geometry = [
        v2.RandomResize(short // 2, 2 * short, antialias=True),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomCrop(CROP, pad_if_needed=True, fill={tv_tensors.Image: 0, Image.Image: 0, tv_tensors.Mask: 255}),
    ]
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    tensors, tensors_uint8 = v2.Compose([*geometry, *normalise]), v2.Compose(geometry)
    pillow = v2.Compose([*geometry, v2.ToImage(), *normalise])

    def torchvision_tensors(image: str, mask: str, recipe=tensors):
        image = tv_tensors.Image(decode_image(image, ImageReadMode.RGB))
        image, mask = recipe(image, tv_tensors.Mask(decode_image(mask, ImageReadMode.UNCHANGED)))
        return image, mask[0].long() if recipe is tensors else mask[0]

    def torchvision_pillow(image: str, mask: str):
        picture = Image.open(image).convert("RGB")
        image, mask = pillow(picture, tv_tensors.Mask(np.array(Image.open(mask))[None]))
        return image, mask[0].long()

    rng = np.random.default_rng(0)

    def opencv(image: str, mask: str):
        return opencv_recipe(cv2.imread(image), np.array(Image.open(mask)), rng)

    return {
        "seglight": seglight,
        "decode only": lambda: each(decode_only),
        "decode only, seglight": lambda: each(decode_only_seglight),
        "torchvision v2, tensors": lambda: collated(torchvision_tensors),
        "torchvision v2, tensors, uint8": lambda: collated(lambda i, m: torchvision_tensors(i, m, tensors_uint8)),
        "torchvision v2, Pillow": lambda: collated(torchvision_pillow),
        "OpenCV: resize, crop, normalise": lambda: collated(opencv),
        "seglight, normalised": lambda: seglight(normalise=True),
    }


def opencv_recipe(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator):
    """The usual order of research frameworks: resize everything, then crop, mirror, normalise to float, pad."""
    scale = rng.uniform(0.5, 2)
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
    top, left = (int(rng.integers(max(0, length - CROP) + 1)) for length in mask.shape)
    image, mask = image[top : top + CROP, left : left + CROP], mask[top : top + CROP, left : left + CROP]
    if rng.random() < 0.5:
        image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.float32)
    image = (image - 255 * np.float32(MEAN)) / (255 * np.float32(STD))
    below, right = CROP - mask.shape[0], CROP - mask.shape[1]
    image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=0)
    mask = cv2.copyMakeBorder(mask, 0, below, 0, right, cv2.BORDER_CONSTANT, value=255)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), torch.from_numpy(mask.astype(np.int64))


if __name__ == "__main__":
    raise SystemExit(main())
