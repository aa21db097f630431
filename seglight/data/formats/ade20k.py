"""ADE20K, as the scene parsing benchmark packs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from seglight.data.formats.archives import zip_folders
from seglight.data.formats.files import Splits, new_folder, numbered, save
from seglight.data.scenes import MOON, RING, SQUARE, STAR, SUN, TRIANGLE, VOID, WIRE

ADE20K_LABELS = {
    0: 3,  # sky
    SQUARE: 21,  # car
    TRIANGLE: 5,  # tree
    STAR: 67,  # flower
    RING: 143,  # plate
    WIRE: 94,  # pole
    SUN: 83,  # light
    MOON: 150,  # flag
    VOID: 0,  # other objects
}
"""Value in the files, 1..150 and 0 for anything else, that stands for each class."""
ADE20K_SPLITS = {"train": "training", "val": "validation"}


def write_ade20k(out: str | Path, splits: Splits, zipped: bool = False) -> Path:
    """ADE20K: OUT/ADEChallengeData2016 with images and annotations of training and validation, and objectInfo150.txt.

    `ADE20K_LABELS` says which value stands for which class; borders are 0, other objects.

    Args:
        out: folder to make.
        splits: scenes of "train" and "val".
        zipped: all of it in OUT/ADEChallengeData2016.zip.
    """
    from seglight.data.ade20k import NAMES

    values = np.zeros(256, np.uint8)
    for label, value in ADE20K_LABELS.items():
        values[label] = value
    with new_folder(out) as folder:
        root = folder / "ADEChallengeData2016"
        counted = dict.fromkeys(ADE20K_SPLITS, 0)
        for split, _, scene in numbered(splits):
            counted[split] += 1
            name = f"{ADE20K_SPLITS[split]}/ADE_{split}_{counted[split]:08d}"
            save(root / f"images/{name}.jpg", scene.image)
            save(root / f"annotations/{name}.png", values[scene.mask])
        lines = ["Idx\tRatio\tTrain\tVal\tName"]
        lines += [f"{k}\t0.0\t{counted['train']}\t{counted.get('val', 0)}\t{n}" for k, n in enumerate(NAMES, start=1)]
        (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
        if zipped:
            zip_folders(folder, {"ADEChallengeData2016.zip": ["ADEChallengeData2016"]})
    return Path(out)
