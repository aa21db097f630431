"""What the writers share: a folder that appears only when it is whole, pictures, lists."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seglight.data.scenes import Scene

Splits = Mapping[str, Iterable[Scene]]
"""Scenes by split name: "train", "val"."""


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder under a temporary name that becomes `out` when the block ends well and vanishes when it does not."""
    out = Path(out).expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder. Nothing is overwritten: choose a new one.")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def numbered(splits: Splits) -> Iterator[tuple[str, int, Scene]]:
    """Split, running number over all splits, scene."""
    number = 0
    for split, scenes in splits.items():
        for scene in scenes:
            yield split, number, scene
            number += 1


def save(path: Path, array: np.ndarray, palette: np.ndarray | None = None) -> None:
    """Grey (H, W) uint8 or uint16, RGB or RGBA (H, W, 3 or 4), or with a palette (256, 3) a palette image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette.tobytes())
    image.save(path, quality=92, subsampling=0) if path.suffix == ".jpg" else image.save(path)


def write_json(path: Path, content: Any) -> None:
    """A json file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lists(folder: Path, lists: dict[str, list[str]]) -> None:
    """One text file per split, and trainval of all but test."""
    folder.mkdir(parents=True)
    both = sorted(name for split, names in lists.items() if split != "test" for name in names)
    for split, names in {**lists, "trainval": both}.items():
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
