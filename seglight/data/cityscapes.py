"""Cityscapes, pixel labels of 19 classes of street scenes (Cordts et al., CVPR 2016), in the layout of its archives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from seglight.data.base import SemanticDataModule, Split
from seglight.data.check import listing
from seglight.data.decode import DataError, Header, _pillow, probe
from seglight.data.files import FileDataset, locate
from seglight.data.instance_maps import MapDataset, objects_of
from seglight.data.instances import InstanceDataModule, Objects
from seglight.types import IGNORE_INDEX

_ADVICE = (
    "To get it: an account at www.cityscapes-dataset.com, and from there leftImg8bit_trainvaltest.zip (11 GB) and "
    "gtFine_trainvaltest.zip (241 MB), unpacked into one folder; for coarse labels also leftImg8bit_trainextra.zip and "
    "gtCoarse.zip. Or a miniature: `seglight data sample --format cityscapes OUT`."
)

CLASSES = {
    "road": (7, (128, 64, 128)), "sidewalk": (8, (244, 35, 232)), "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)), "fence": (13, (190, 153, 153)), "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)), "traffic sign": (20, (220, 220, 0)), "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)), "sky": (23, (70, 130, 180)), "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)), "car": (26, (0, 0, 142)), "truck": (27, (0, 0, 70)), "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)), "motorcycle": (32, (0, 0, 230)), "bicycle": (33, (119, 11, 32)),
}  # fmt: skip
"""labelId in the files and colour of each of the 19 classes, in the order of their train ids."""
THINGS = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
"""The 8 classes whose objects are told apart."""
LAST_ID = 33
_ILLEGAL = 254
_LABEL_ADVICE = f"labelIds are 0..{LAST_ID}: unpack gtFine again, and look for files that another program wrote."


class Cityscapes(SemanticDataModule):
    """19 classes at 2048x1024; every other labelId is ignored. Read from `_labelIds.png`: no conversion first.

    Args:
        root: the folder with leftImg8bit and gtFine. Default: $SEGLIGHT_DATA or ./data, and there cityscapes.
        train_labels: "fine" (2,975 images), "coarse" (train and train_extra, 22,973), or "fine+coarse" (fine train and
            coarse train_extra, as the papers' best results).
        val_split: a folder of gtFine.
        test_split: the same, for `seglight test`. The labels of the test split are not public.
    """

    classes = tuple(CLASSES)
    palette = tuple(colour for _, colour in CLASSES.values())

    def __init__(
        self,
        root: str | None = None,
        train_labels: Literal["fine", "coarse", "fine+coarse"] = "fine",
        val_split: str = "val",
        test_split: str = "val",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.root = locate(root, "cityscapes", ("", "cityscapes"), "leftImg8bit", _ADVICE)
        fine = [("gtFine", "train")]
        coarse = [("gtCoarse", "train_extra")]
        train = {"fine": fine, "coarse": [("gtCoarse", "train"), *coarse], "fine+coarse": fine + coarse}
        self.parts = {"train": train[train_labels], "val": [("gtFine", val_split)], "test": [("gtFine", test_split)]}
        if "train" in (val_split, test_split) and train_labels != "coarse":
            raise DataError("Cityscapes: the training split cannot be validated on. Use val.")

    def dataset(self, split: Split) -> FileDataset:
        """The images of a split that have labels."""
        return self.files(split, "labelIds")

    def files(self, split: Split, kind: Literal["labelIds", "instanceIds"]) -> FileDataset:
        """The images of a split with their masks of one kind."""
        found = [(name, *files) for part in self.parts[split] for name, files in self._pairs(*part, kind).items()]
        names, images, masks = zip(*found, strict=True)
        lut = np.full(256, _ILLEGAL)
        lut[: LAST_ID + 1] = lut[255] = IGNORE_INDEX  # 255: how a licence plate, labelId -1, looks in a byte
        for label, (label_id, _) in enumerate(CLASSES.values()):
            lut[label_id] = label
        name = " and ".join("/".join(part) for part in self.parts[split])
        kind_of = FileDataset if kind == "labelIds" else InstanceIds
        return kind_of(f"Cityscapes {name}", list(names), list(images), list(masks), lut, advice=_LABEL_ADVICE)

    def _pairs(self, labels: str, split: str, kind: str) -> dict[str, tuple[Path, Path]]:
        """Image and mask by name ("aachen_000000_000019"), in the order of the names."""
        suffix = f"_{labels}_{kind}.png"
        folders = self.root / "leftImg8bit" / split, self.root / labels / split
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"There is no {folder}. {_ADVICE}")
        images = {path.name.removesuffix("_leftImg8bit.png"): path for path in folders[0].glob("*/*_leftImg8bit.png")}
        masks = {path.name.removesuffix(suffix): path for path in folders[1].glob(f"*/*{suffix}")}
        if alone := sorted(set(images) ^ set(masks)):
            raise DataError(
                f"Cityscapes: {len(alone)} images without a mask or masks without an image in {folders[0]} and "
                f"{folders[1]}: {listing(alone, 3)}. Unpack the archives again, completely."
            )
        if not images:
            raise DataError(f"Cityscapes: {folders[0]} holds no CITY/*_leftImg8bit.png. Unpack the archives again.")
        return {name: (images[name], masks[name]) for name in sorted(images)}


class InstanceIds(FileDataset):
    """Masks of 16 bits that hold 1000 * labelId + number for an object and the bare labelId for anything else."""

    def numbers(self, index: int) -> np.ndarray:
        """What the mask file holds, uint16 (H, W)."""
        path = self.mask_paths[index]
        values = np.array(_pillow(path.read_bytes(), path))
        if values.ndim != 2 or values.min() < 0 or values.max() >= 1 << 16:
            raise DataError(f"{path}: not one channel of 16 bits, as instanceIds have. Unpack gtFine again.")
        return values.astype(np.uint16)

    def values(self, index: int) -> np.ndarray:
        """The labelIds, uint8 (H, W); 255 for a licence plate."""
        numbers = self.numbers(index)
        labels = np.where(numbers < 1000, numbers, numbers // 1000)
        return np.where(numbers == 0xFFFF, 255, np.minimum(labels, 254)).astype(np.uint8)

    def probe_mask(self, path: Path) -> Header:
        """As of a grey image of 8 bits, which is what `values` makes of it."""
        header = probe(path)
        return header._replace(bits=8, mode="L") if header.bits == 16 else header


class CityscapesObjects(MapDataset):
    """Images of Cityscapes with their objects."""

    def objects(self, index: int) -> Objects:
        """Objects of the 8 classes that have them; a group that nobody could take apart is a crowd."""
        numbers = self.parts[0].numbers(index)
        ids = {CLASSES[name][0]: label for label, name in enumerate(THINGS)}
        seen = np.flatnonzero(np.bincount(numbers.ravel())).tolist()
        known = {value: (ids.get(value if value < 1000 else value // 1000), value < 1000) for value in seen}
        return objects_of(numbers, {value: one for value, one in known.items() if one[0] is not None})

    def values_of(self, part: FileDataset, num_classes: int) -> int:
        """The 19 classes of the label map."""
        return len(CLASSES)


class CityscapesInstances(InstanceDataModule):
    """The objects of 8 classes, from `_instanceIds.png` of gtFine: 2,975 images to train on, 500 to validate on.

    Args:
        root: the folder with leftImg8bit and gtFine. Default: $SEGLIGHT_DATA or ./data, and there cityscapes.
        val_split: a folder of gtFine.
        test_split: the same, for `seglight test`.
        short_side: as elsewhere.
        long_side: as elsewhere.
    """

    classes = THINGS
    palette = tuple(CLASSES[name][1] for name in THINGS)

    def __init__(
        self,
        root: str | None = None,
        val_split: str = "val",
        test_split: str = "val",
        short_side: int | list[int] = (800, 832, 864, 896, 928, 960, 992, 1024),  # Mask R-CNN paper, appendix A
        long_side: int = 2048,
        **kwargs: Any,
    ):
        super().__init__(short_side=list(short_side), long_side=long_side, **kwargs)
        self.labels = Cityscapes(root, val_split=val_split, test_split=test_split)

    def dataset(self, split: Split) -> CityscapesObjects:
        """The images of a split that have labels."""
        return CityscapesObjects(self.labels.files(split, "instanceIds"))
