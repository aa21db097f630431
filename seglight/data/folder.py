"""Anybody's own images and masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seglight.data.base import SemanticDataModule, Split
from seglight.data.decode import read_mask
from seglight.data.files import FileDataset, find, read_list, refuse_leaks, validation_part
from seglight.data.findings import DataError, listing
from seglight.data.palette import palette
from seglight.types import IGNORE_INDEX

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MASKS = (".png", ".bmp", ".tif", ".tiff", ".gif", ".jpg", ".jpeg")  # JPEG is refused later, with the reason
_SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


class Folder(SemanticDataModule):
    """Images and masks paired by file name; the suffix may differ.

    One of these below `root` is found without being told ("image" and "label", "labels" or "annotations" do as well)::

        train/images  train/masks  val/images  val/masks        (and test/...)
        images/train  masks/train  images/val  masks/val
        images        masks

    Without a place or list of its own the validation split is cut out of the training images, by name, and
    `seglight test` uses the validation split. A mask is a palette PNG or a one-channel image of label numbers, with 255
    for pixels to ignore; or an RGB image, with `colors`.

    Args:
        root: the folder.
        images: folder of the images relative to `root`, for another layout. `{split}` stands for train, val and test.
        masks: the same, for the masks.
        lists: text files of names, one per line, that say what is in a split, such as "{split}.txt".
        val_fraction: share of the training images to validate on, where there is no other validation split.
        split_seed: changes which ones those are.
        classes: names, in label order. Default: those of `values` or `colors`, or the lines of root/classes.txt.
        values: class of each value in the masks, for masks that do not hold 0..K-1: {0: background, 255: cell}.
        colors: RGB colour of each class, for masks that show colours: {road: [128, 64, 128], car: [0, 0, 142]}.
        ignore: values in the masks, or names from `values` or `colors`, that no loss and no metric sees.
        mask_suffix: what the name of a mask has after that of its image: "_mask" for dog.jpg and dog_mask.png.
    """

    def __init__(
        self,
        root: str,
        images: str | None = None,
        masks: str | None = None,
        lists: str | None = None,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        classes: list[str] | None = None,
        values: dict[int, str] | None = None,
        colors: dict[str, list[int]] | None = None,
        ignore: list[int | str] | None = None,
        mask_suffix: str = "",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise FileNotFoundError(f"There is no folder {self.root} (data.root).")
        if (images is None) != (masks is None):
            raise ValueError("data.images and data.masks belong together: give both, or neither for the usual layouts.")
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction is {val_fraction}; it must lie between 0 and 1.")
        self.images, self.masks = (images, masks) if images and masks else self._layout()
        self.lists, self.val_fraction, self.split_seed, self.mask_suffix = lists, val_fraction, split_seed, mask_suffix
        self.classes = tuple(classes) if classes else self._classes(values or colors, ignore or [])
        self.lut, self.colours = _labels(self.classes, values, colors, ignore or [])
        self.palette = palette(len(self.classes))
        if colors:
            self.palette = tuple(tuple(colors[name]) for name in self.classes)

    def dataset(self, split: Split) -> FileDataset:
        """The pairs of a split."""
        pairs = self._split(split)
        if split == "train":
            train = [str(image) for image, _ in pairs.values()]
            refuse_leaks("Folder", train, lambda other: [str(image) for image, _ in self._split(other).values()])
        images, masks = zip(*pairs.values(), strict=True) if pairs else ((), ())
        return FileDataset(f"Folder {split}", list(pairs), images, masks, self.lut, self.colours)

    def _split(self, split: Split) -> dict[str, tuple[Path, Path]]:
        """Name to (image, mask) of a split."""
        if split == "test" and not self._has("test"):
            split = "val"
        if self._has("val") or split == "test":
            return self._pairs(split)
        pairs = self._pairs("train")
        val = validation_part(pairs, self.val_fraction, self.split_seed)
        return {name: pair for name, pair in pairs.items() if (name in val) == (split == "val")}

    def _has(self, split: Split) -> bool:
        """Whether a split has a list or a place of its own."""
        if self.lists:
            return self._list(split).is_file()
        return "{split}" in self.images and self._place(self.images, split) is not None

    def _list(self, split: Split) -> Path:
        return self.root / self.lists.replace("{split}", split)

    def _place(self, template: str, split: Split) -> Path | None:
        folders = (self.root / template.replace("{split}", name) for name in _SPLIT_NAMES[split])
        return next((folder for folder in folders if folder.is_dir()), None)

    def _layout(self) -> tuple[str, str]:
        """Templates of the image and mask folders, as found."""
        for place in ("{split}/{}", "{}/{split}", "{}"):
            for image in ("images", "image"):
                for mask in ("masks", "mask", "labels", "label", "annotations"):
                    images, masks = place.replace("{}", image), place.replace("{}", mask)
                    if self._place(images, "train") and self._place(masks, "train"):
                        return images, masks
        raise FileNotFoundError(
            f"Neither train/images and train/masks, nor images/train and masks/train, nor images and masks are in "
            f"{self.root}; there is: {listing(sorted(path.name for path in self.root.iterdir())) or 'nothing'}. Say "
            "where they are with data.images and data.masks, relative to data.root."
        )

    def _pairs(self, split: Split) -> dict[str, tuple[Path, Path]]:
        """Name to (image, mask) of everything in the folders or in the list of a split."""
        places = []
        for option, template in (("images", self.images), ("masks", self.masks)):
            places.append(self._place(template, split))
            if places[-1] is None:
                raise FileNotFoundError(f"There is no folder {self.root / template} for {split} (data.{option}).")
        images, found = find(places[0], IMAGES), find(places[1], MASKS)
        end = self.mask_suffix
        masks = {name.removesuffix(end): path for name, path in found.items() if name.endswith(end)}
        if places[0] == places[1] and end:
            images = {name: path for name, path in images.items() if not name.endswith(end)}
        if not images:
            raise DataError(f"{places[0]} holds no images ({', '.join(IMAGES)}). Look at data.root and data.images.")
        if self.lists:
            names = [self._name(line, images) for line in read_list(self._list(split))]
            if unknown := [name for name in names if name not in images]:
                raise DataError(
                    f"{self._list(split)} names {len(unknown)} images that are not in {places[0]}: {listing(unknown)}."
                )
            images = {name: images[name] for name in names}
            masks = {name: path for name, path in masks.items() if name in images}
        _refuse_unpaired(images, masks, places)
        return {name: (images[name], masks[name]) for name in images}

    @staticmethod
    def _name(line: str, images: dict[str, Path]) -> str:
        """The image that a line of a list means: a name, a file name, a path, or a path and that of its mask."""
        for entry in (line, line.split()[0]):
            for name in (entry, str(Path(entry).with_suffix("")), Path(entry).name, Path(entry).stem):
                if name in images:
                    return name
        return line

    def _classes(self, named: dict[Any, Any] | None, ignore: Sequence[int | str]) -> tuple[str, ...]:
        if named:
            names = [name for item in named.items() for name in item if isinstance(name, str)]
            return tuple(dict.fromkeys(name for name in names if name not in ignore))
        file = self.root / "classes.txt"
        if file.is_file():
            return tuple(read_list(file))
        masks = [mask for _, mask in self._pairs("train").values()][:20]
        held = sorted(set().union(*(np.unique(read_mask(mask)).tolist() for mask in masks)))
        raise DataError(
            f"The classes need names: write them into {file}, one per line in label order, or give data.classes or "
            f"data.values. The first {len(masks)} masks hold the values {listing(held, 20)} (255 means ignore)."
        )


def _refuse_unpaired(images: dict[str, Path], masks: dict[str, Path], places: Sequence[Path]) -> None:
    lonely = sorted(images.keys() - masks.keys()), sorted(masks.keys() - images.keys())
    if any(lonely):
        parts = [
            f"{len(names)} {kind} without {other}: {listing(names)}"
            for names, kind, other in zip(lonely, ("images", "masks"), ("a mask", "an image"), strict=True)
            if names
        ]
        raise DataError(
            f"{places[0]} and {places[1]}: {'; '.join(parts)}. An image and its mask have the same name but for the "
            "suffix (data.mask_suffix if the mask's name goes on). Add what is missing or move the others away."
        )


def _labels(
    classes: tuple[str, ...],
    values: dict[int, str] | None,
    colors: dict[str, list[int]] | None,
    ignore: Sequence[int | str],
) -> tuple[np.ndarray | None, dict[tuple[int, int, int], int] | None]:
    """The label of each value (uint8 (256,)), or of each colour; None where the masks hold labels already."""
    if values and colors:
        raise ValueError("data.values and data.colors exclude each other: a mask holds either numbers or colours.")
    if len(set(classes)) != len(classes) or not 2 <= len(classes) < IGNORE_INDEX:
        raise ValueError(f"data.classes needs 2 to 254 different names; it has {len(classes)}: {listing(classes)}.")
    label = {**dict.fromkeys(ignore, IGNORE_INDEX), **{name: index for index, name in enumerate(classes)}}
    named = set(colors or (values or {}).values())
    if named and (strange := sorted((named - set(ignore)) ^ set(classes))):
        raise ValueError(
            f"{listing(strange)}: every class needs a value or colour, and every name in data.values or data.colors "
            f"is one of the classes or in data.ignore. Classes: {listing(classes)}."
        )
    if colors:
        if wrong := [name for name, rgb in colors.items() if len(rgb) != 3 or not all(0 <= c <= 255 for c in rgb)]:
            raise ValueError(f"data.colors: {listing(wrong)} is not [red, green, blue] with 0..255.")
        return None, {tuple(rgb): label[name] for name, rgb in colors.items()}
    if not values and not ignore:
        return None, None
    numbers = [*(values or {}), *(value for value in ignore if isinstance(value, int))]
    if wrong := [value for value in numbers if not 0 <= value <= 255]:
        raise ValueError(f"data.values and data.ignore: masks hold 0..255, not {listing(wrong)}.")
    lut = np.arange(256)
    if values:
        lut[:255] = len(classes)  # no class: `check` reports it
        for value, name in values.items():
            lut[value] = label[name]
    for value in ignore:
        if isinstance(value, int):
            lut[value] = IGNORE_INDEX
    return lut, None
