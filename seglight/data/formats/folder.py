"""The layout of one's own images and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from seglight.data.formats.files import Splits, new_folder, numbered, save
from seglight.data.scenes import CLASSES, PALETTE, VOID

VOID_COLOUR = (224, 224, 192)


def write_folder(out: str | Path, splits: Splits, masks: Literal["index", "palette", "rgb"] = "index") -> Path:
    """The layout of one's own data: OUT/{split}/images and OUT/{split}/masks, all PNG, and OUT/classes.txt.

    Args:
        out: folder to make.
        splits: scenes of each split.
        masks: "index" and "palette" hold label numbers and 255, in a grey or a palette PNG; "rgb" shows the colours of
            `seglight.data.scenes.PALETTE`, and (224, 224, 192) on borders.
    """
    if masks not in ("index", "palette", "rgb"):
        raise ValueError(f"masks is {masks!r}; it must be index, palette or rgb.")
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(PALETTE)], colours[VOID] = PALETTE, VOID_COLOUR
    with new_folder(out) as folder:
        for split, number, scene in numbered(splits):
            name = f"scene_{number:04d}.png"
            save(folder / split / "images" / name, scene.image)
            mask = colours[scene.mask] if masks == "rgb" else scene.mask
            save(folder / split / "masks" / name, mask, colours if masks == "palette" else None)
        (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return Path(out)
