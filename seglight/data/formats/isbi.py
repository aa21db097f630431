"""ISBI 2012, TIFF stacks."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from seglight.data.formats.files import Splits, new_folder
from seglight.data.scenes import VOID, Scene


def write_isbi(out: str | Path, splits: Splits) -> Path:
    """OUT/train-volume.tif, OUT/train-labels.tif and OUT/test-volume.tif, one page per scene, 8 bits, uncompressed.

    Slices of train and then of val are the labelled volume; the test volume, without labels, has those of val upside
    down. Things and wires have a dark membrane around them: 0 in the labels, where all else is 255.
    """
    with new_folder(out) as folder:
        scenes = {split: list(of) for split, of in splits.items()}
        labelled = [one for of in scenes.values() for one in of]
        save_stack(folder / "train-volume.tif", [slice_of(one) for one in labelled])
        save_stack(folder / "train-labels.tif", [labels_of(one) for one in labelled])
        save_stack(folder / "test-volume.tif", [slice_of(one)[::-1] for one in scenes.get("val") or labelled])
    return Path(out)


def slice_of(scene: Scene) -> np.ndarray:
    """uint8 (H, W), grey."""
    grey = cv2.cvtColor(scene.image, cv2.COLOR_RGB2GRAY)
    return np.where(scene.mask == VOID, grey // 3, 85 + grey // 3 * 2).astype(np.uint8)


def labels_of(scene: Scene) -> np.ndarray:
    """uint8 (H, W): 0 membrane, 255 cell."""
    return np.where(scene.mask == VOID, 0, 255).astype(np.uint8)


def save_stack(path: Path, pages: list[np.ndarray]) -> None:
    """Grey uint8 (H, W) images as the pages of a TIFF file."""
    first, *others = (Image.fromarray(np.ascontiguousarray(page)) for page in pages)
    first.save(path, save_all=True, append_images=others)
