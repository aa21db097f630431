"""ISBI 2012 challenge: membranes in electron microscopy slices (Arganda-Carreras et al., Front. Neuroanat. 2015)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from seglight.data.base import SemanticDataModule, Split
from seglight.data.dataset import SemanticDataset
from seglight.data.decode import read_mask
from seglight.data.files import FileDataset, locate, warn_of_missing
from seglight.data.findings import DataError, choice, listing

_ADVICE = (
    "To get it: train-volume.tif, train-labels.tif and test-volume.tif of the ISBI 2012 segmentation challenge "
    "(https://imagej.net/events/isbi-2012-segmentation-challenge), in one folder; or the slices as PNGs in train/image "
    "and train/label, named by their numbers. Or a miniature: `seglight data sample --format isbi OUT`."
)
_IMAGES, _LABELS, _TEST = "train-volume.tif", "train-labels.tif", "test-volume.tif"
_LUT = np.full(256, 2, np.uint8)  # no class: `check` reports it
_LUT[0], _LUT[255] = 0, 1
_LABEL_ADVICE = "The labels are 0 (membrane) and 255 (cell). Unpack or download them again."


class ISBI(SemanticDataModule):
    """Two classes, membrane (0 in the files) and cell (255, which is a class here); 30 slices of 512x512 pixels.

    Read from the challenge's TIFF stacks, or from PNGs in train/image and train/label whose names are the numbers of
    the slices, without leading zeros: 10.png comes after 9.png. Neighbouring slices look alike, so the validation
    slices are those at the end, not a random draw.

    Args:
        root: the folder. Default: $SEGLIGHT_DATA or ./data, and there isbi2012.
        val_slices: places, counted from 0, of the labelled slices to validate on. Default: the last fifth.
        test_split: "val", or "test" for the slices of test-volume.tif (or test/*.png), whose labels are not public:
            they can be predicted, not scored.
    """

    classes = ("membrane", "cell")
    palette = ((0, 0, 0), (255, 255, 255))

    def __init__(
        self,
        root: str | None = None,
        val_slices: list[int] | None = None,
        test_split: Literal["val", "test"] = "val",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        choice("test_split", test_split, ("val", "test"))
        self.root = locate(root, "isbi2012", ("", "isbi"), (_IMAGES, "train/label"), _ADVICE)
        self.stacks = (self.root / _IMAGES).is_file()
        self.names = self._names()
        count = len(self.names)
        chosen = list(range(count - max(1, round(count / 5)), count)) if val_slices is None else sorted(val_slices)
        if strange := [place for place in chosen if not 0 <= place < count]:
            raise ValueError(f"data.val_slices has {listing(strange)}, but the {count} slices are 0..{count - 1}.")
        if not 0 < len(set(chosen)) == len(chosen) < count:
            raise ValueError(
                f"data.val_slices is {chosen}: name each slice once, one at least, and leave some of the {count} to "
                "train on."
            )
        self.val_slices, self.test_split = chosen, test_split

    def dataset(self, split: Split) -> SemanticDataset:
        """The slices of a split."""
        if split == "test" and self.test_split == "test":
            return self._test()
        val = set(self.val_slices)
        keep = [place for place in range(len(self.names)) if (place in val) != (split == "train")]
        names = [self.names[place] for place in keep]
        if split == "train":
            warn_of_missing("ISBI", len(self.names), 30)
        if self.stacks:
            return Stack(f"ISBI {split}", names, keep, self.root / _IMAGES, self.root / _LABELS)
        files = [[self.root / f"train/{kind}/{name}.png" for name in names] for kind in ("image", "label")]
        return FileDataset(f"ISBI {split}", names, *files, _LUT, advice=_LABEL_ADVICE)

    def _test(self) -> SemanticDataset:
        if self.stacks:
            count = _pages(self.root / _TEST)
            return Stack("ISBI test", [str(place) for place in range(count)], range(count), self.root / _TEST, None)
        places = [self.root / part for part in ("test/image", "test")]
        folder = next((one for one in places if _slices(one)), None)
        if folder is None:
            raise FileNotFoundError(f"There are no slices in {places[1]} (data.test_split). {_ADVICE}")
        names = _slices(folder)
        return FileDataset("ISBI test", names, [folder / f"{name}.png" for name in names], None)

    def _names(self) -> list[str]:
        """The labelled slices, in the order of their numbers."""
        if self.stacks:
            files = [self.root / name for name in (_IMAGES, _LABELS)]
            if missing := [str(file) for file in files if not file.is_file()]:
                raise FileNotFoundError(f"There is no {' and no '.join(missing)}. {_ADVICE}")
            pages = [_pages(file) for file in files]
            if pages[0] != pages[1]:
                raise DataError(f"{files[0]} has {pages[0]} slices, but {files[1]} {pages[1]}. Download both again.")
            return [str(place) for place in range(pages[0])]
        folders = [self.root / "train" / kind for kind in ("image", "label")]
        found = [_slices(folder) for folder in folders]
        first = self.root / f"train/label/{found[1][0]}.png" if found[1] else None
        if first is None or not set(np.unique(read_mask(first)).tolist()) <= {0, 255}:
            raise FileNotFoundError(
                f"{folders[1]} holds no PNGs named by numbers with the values 0 and 255, so this is not ISBI. {_ADVICE}"
            )
        if alone := set(found[0]) ^ set(found[1]):
            raise DataError(f"{folders[0]} and {folders[1]}: not in both: {listing(sorted(alone))}. Copy them again.")
        return found[0]


class Stack(SemanticDataset):
    """Pages of a TIFF file of grey images, and those of another of labels 0 and 255. Held in memory: 8 MB for 30.

    Args:
        name: of dataset and split, for messages.
        ids: of the samples.
        pages: their places in the files.
        images: the file.
        labels: the file; None makes every label 255, "ignore".
    """

    def __init__(self, name: str, ids: Sequence[str], pages: Sequence[int], images: Path, labels: Path | None):
        self.name, self.ids, self.files = name, list(ids), [images, *([labels] if labels else [])]
        self.images = _read(images, pages)
        self.labels = _read(labels, pages) if labels else None
        if labels and self.labels.shape != self.images.shape:
            raise DataError(f"{images} and {labels} differ in size: {self.images.shape[1:]}, {self.labels.shape[1:]}.")

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H, W, 3), grey, and labels uint8 (H, W)."""
        image = np.repeat(self.images[index][..., None], 3, -1)
        labels = np.full(image.shape[:2], 255, np.uint8) if self.labels is None else _LUT[self.labels[index]]
        return image, labels

    def check(self, num_classes: int) -> None:
        """Look for values that are no label.

        Raises:
            DataError: with the pages.
        """
        if self.labels is None:
            return
        wrong = [name for name, page in zip(self.ids, self.labels, strict=True) if (_LUT[page] == 2).any()]
        if wrong:
            values = sorted(set(np.unique(self.labels).tolist()) - {0, 255})
            raise DataError(f"{self.files[1]}: values {listing(values)} in slices {listing(wrong)}. {_LABEL_ADVICE}")

    def fingerprint(self) -> dict[str, Any]:
        """Number of slices, and a SHA-256 of their pixels."""
        digest = hashlib.sha256(self.images.tobytes())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return {"samples": len(self), "sha256": digest.hexdigest()}


def _slices(folder: Path) -> list[str]:
    """Names of the PNGs that are named by a number, in the order of those."""
    return sorted((path.stem for path in folder.glob("*.png") if path.stem.isdecimal()), key=int)


_BROKEN = (OSError, EOFError, SyntaxError, ValueError, TypeError, KeyError)
"""What Pillow raises on TIFF files that are cut off."""


def _pages(path: Path) -> int:
    with _open(path) as file:
        try:
            return getattr(file, "n_frames", 1)
        except _BROKEN as error:
            raise DataError(f"{path}: its pages cannot be counted ({error}). Download it again.") from error


def _read(path: Path, pages: Sequence[int]) -> np.ndarray:
    """uint8 (N, H, W)."""
    found = []
    with _open(path) as file:
        for page in pages:
            try:
                file.seek(page)
                found.append(np.array(file))
            except _BROKEN as error:
                raise DataError(f"{path}: page {page} cannot be read ({error}). Download it again.") from error
            if found[-1].ndim != 2 or found[-1].dtype not in (np.uint8, bool):
                raise DataError(f"{path}: page {page} is {file.mode}, but slices are grey with 8 bits.")
    if len({one.shape for one in found}) > 1:
        raise DataError(f"{path}: pages differ in size: {listing(sorted({one.shape for one in found}))}.")
    return np.stack([one.astype(np.uint8) * (255 if one.dtype == bool else 1) for one in found])


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no {path}. {_ADVICE}") from None
    except _BROKEN as error:
        raise DataError(f"{path}: not a TIFF file, or its header is broken ({error}). Download it again.") from error
