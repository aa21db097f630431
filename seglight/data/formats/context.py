"""PASCAL-Context, MATLAB label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from seglight.data.formats.files import Splits, new_folder, numbered, save, write_lists
from seglight.data.scenes import MOON, RING, SQUARE, STAR, SUN, TRIANGLE, VOID, WIRE

CONTEXT_LABELS = {
    0: (360, "sky"),
    SQUARE: (454, "window"),
    TRIANGLE: (420, "tree"),
    STAR: (159, "flower"),
    RING: (295, "plate"),
    WIRE: (144, "fence"),
    SUN: (232, "light"),
    MOON: (104, "cup"),
    VOID: (431, "unknown"),
}
"""Number and name among PASCAL-Context's 459 that stand for each class. All but "unknown" are among the 59."""


def write_context(out: str | Path, splits: Splits) -> Path:
    """PASCAL-Context: OUT/VOCdevkit/VOC2010 with JPEGImages and ImageSets/Main, OUT/trainval/{id}.mat, OUT/labels.txt.

    The MATLAB files hold `LabelMap`, uint16 (H, W), numbers among 459; `CONTEXT_LABELS` says which stands for which
    class. labels.txt has the lines "360: sky" of those numbers only, where the real one has 459.
    """
    from scipy.io import savemat

    ids = np.zeros(256, np.uint16)
    for label, (number, _) in CONTEXT_LABELS.items():
        ids[label] = number
    with new_folder(out) as folder:
        root = folder / "VOCdevkit/VOC2010"
        lists: dict[str, list[str]] = {}
        for split, number, scene in numbered(splits):
            name = f"{2008 + number % 3}_{2 + 5 * number:06d}"
            lists.setdefault(split, []).append(name)
            save(root / f"JPEGImages/{name}.jpg", scene.image)
            (folder / "trainval").mkdir(exist_ok=True)
            savemat(folder / f"trainval/{name}.mat", {"LabelMap": ids[scene.mask]}, do_compression=True)
        write_lists(root / "ImageSets/Main", lists)
        lines = [f"{number}: {name}" for number, name in sorted(CONTEXT_LABELS.values())]
        (folder / "labels.txt").write_text("\n".join(lines) + "\n")
    return Path(out)
