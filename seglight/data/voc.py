"""PASCAL VOC segmentation, in the layout of the devkit as it is downloaded (Everingham et al., IJCV 2010 and 2015)."""

from __future__ import annotations

import logging
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seglight.data.base import SemanticDataModule, Split
from seglight.data.files import FileDataset, locate, names_in, read_ids, refuse_leaks, warn_of_missing
from seglight.data.findings import DataError
from seglight.data.instance_maps import MapDataset, objects_of
from seglight.data.instances import InstanceDataModule
from seglight.data.objects import Objects
from seglight.data.palette import palette
from seglight.data.sbd import CLASSES, LABEL_ADVICE, SBDFiles, SBDMasks, find_sbd
from seglight.types import IGNORE_INDEX

log = logging.getLogger(__name__)

_ADVICE = (
    "To get it: `seglight data prepare voc` (2 GB), or VOCtrainval_11-May-2012.tar, unpacked, from "
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/. Or a miniature: `seglight data sample --format voc OUT`."
)
PUBLISHED = {
    "train": 1464, "val": 1449, "trainval": 2913, "trainaug": 10582, "seg11valid": 736,
    "sbd_train": 8498, "sbd_val": 2857,
}  # fmt: skip
"""Images of each list for 2012."""
Kind = Literal["Class", "Object"]


class VOC(SemanticDataModule):
    """20 object classes and background; object borders are void (255).

    A split is the name of a list in ImageSets/Segmentation without ".txt", or a text file (any path that ends so), or

    - "trainaug": the images of VOC train, SBD train and SBD val without those of VOC val, 10,582. The list is made
      here; masks are VOC's where VOC has one, else SBD's as downloaded. Where there is no SBD, the list trainaug.txt
      and the folder SegmentationClassAug that other toolboxes make are read.
    - "sbd_train", "sbd_val" and so on: a list of SBD, with SBD's masks.
    - "seg11valid": the images of VOC 2011 val that are not in SBD train, 736, with VOC's masks, as FCN is judged. It
      needs the list in ImageSets/Segmentation, or VOC2011 beside VOC2012, and SBD.

    Args:
        root: the folder VOC2012, VOCdevkit or the one that contains it. Default: $SEGLIGHT_DATA or ./data, and there
            voc2012.
        year: of the challenge, part of the folder name.
        train_split: see above.
        val_split: the same, for validation. It must not share images with `train_split`.
        test_split: the same, for `seglight test`. The labels of VOC's own "test" are not public: it can be predicted.
        masks: folder of the masks of all splits, for lists that come with masks of their own.
        sbd: the folder benchmark_RELEASE. Default: beside VOC2012 or one or two folders further up, or sbd in
            $SEGLIGHT_DATA or ./data.
    """

    classes = CLASSES
    palette = palette(21)
    protocol = "VOC devkit: num_classes 21, background: yes"
    id_space = "voc"

    def __init__(
        self,
        root: str | None = None,
        year: str = "2012",
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "val",
        masks: str | None = None,
        sbd: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        inside = (f"VOCdevkit/VOC{year}", f"VOC{year}", "")
        self.root = locate(root, f"voc{year}", inside, "ImageSets/Segmentation", _ADVICE)
        self.lists = {"train": train_split, "val": val_split, "test": test_split}
        self.year, self.masks, self._sbd_root = year, masks, sbd
        if masks is not None and not (self.root / masks).is_dir():
            raise FileNotFoundError(
                f"There is no folder {self.root / masks} (data.masks). Leave data.masks out to read the masks of VOC, "
                "and for trainaug those of SBD, as downloaded."
            )

    @cached_property
    def sbd(self) -> SBDFiles:
        """SBD's files.

        Raises:
            FileNotFoundError: there are none.
        """
        root = Path(os.path.abspath(self.root))
        return SBDFiles(Path(os.path.abspath(find_sbd(self._sbd_root, (root, *list(root.parents)[:3])))))

    def dataset(self, split: Split) -> FileDataset:
        """The images of a split with their labels."""
        return self.files(split, "Class")

    def files(self, split: Split, kind: Kind) -> FileDataset:
        """The images of a split with their masks of one kind, after a look that no image is trained and judged on.

        Raises:
            DataError: it is, or a list does not have the number of images that it must.
            FileNotFoundError: a list or SBD is missing.
        """
        name, ids = self.lists[split], self._ids(split)
        if split == "train":
            refuse_leaks("VOC", ids, self._ids)
        if kind == "Class" and self.year == "2012" and name in PUBLISHED:
            warn_of_missing(f"VOC {name}", len(ids), PUBLISHED[name])
        if not self._with_sbd(name):
            folder = self.root / self._mask_folder(name, kind)
            images = [self.root / "JPEGImages" / f"{one}.jpg" for one in ids]
            hidden = split == "test" and name == "test" and not names_in(folder, ".png").intersection(ids)
            return FileDataset(f"VOC {name}", ids, images, None if hidden else [folder / f"{one}.png" for one in ids])
        root = Path(os.path.abspath(self.root))  # as SBD's: messages name files below a common folder
        masks = {one: self.sbd.mask(one, kind) for one in ids}
        if name == "trainaug":  # VOC's masks win; one of the list that is missing is a fault
            folder = root / f"Segmentation{kind}"
            own = names_in(folder, ".png") | set(self._list("train"))
            masks |= {one: folder / f"{one}.png" for one in ids if one in own}
        here = names_in(root / "JPEGImages", ".jpg")
        theirs = {one for one in ids if one not in here and masks[one].suffix == ".mat"}
        images = [self.sbd.image(one) if one in theirs else root / "JPEGImages" / f"{one}.jpg" for one in ids]
        lut = np.arange(256)
        return SBDMasks(f"VOC {name}", ids, images, [masks[one] for one in ids], lut, advice=LABEL_ADVICE)

    def _ids(self, split: Split) -> list[str]:
        name = self.lists[split]
        if self._with_sbd(name):
            return self._trainaug() if name == "trainaug" else self.sbd.ids(name.removeprefix("sbd_"))
        if name == "seg11valid" and not self._file(name).is_file():
            return self._seg11valid()
        return self._list(name)

    def _list(self, name: str) -> list[str]:
        return read_ids(self._file(name))

    def _file(self, name: str) -> Path:
        if name.endswith(".txt"):
            return Path(name).expanduser()
        return self.root / "ImageSets/Segmentation" / f"{name}.txt"

    def _with_sbd(self, name: str) -> bool:
        """Whether a split is read from SBD's own files."""
        if self.masks is not None or name.endswith(".txt"):
            return False
        if name != "trainaug":
            return name.startswith("sbd_")
        try:
            return bool(self.sbd)
        except FileNotFoundError as error:
            if self._sbd_root is None and self._file(name).is_file() and (self.root / _MADE).is_dir():
                return False
            raise FileNotFoundError(
                f"trainaug is VOC and SBD together, and SBD is missing. {error} The files that other toolboxes make, "
                f"{self._file(name)} and {self.root / _MADE}, would do as well."
            ) from None

    def _mask_folder(self, name: str, kind: Kind) -> str:
        if kind == "Class" and self.masks is not None:
            return self.masks
        return _MADE if kind == "Class" and name == "trainaug" else f"Segmentation{kind}"

    def _trainaug(self) -> list[str]:
        """VOC train, SBD train and SBD val, without VOC val; sorted."""
        parts = {"VOC train": self._list("train"), "VOC val": self._list("val")}
        parts |= {f"SBD {name}": self.sbd.ids(name) for name in ("train", "val")}
        train, val, *sbd = (set(names) for names in parts.values())
        found = sorted((train | sbd[0] | sbd[1]) - val)
        counts = {name: len(names) for name, names in parts.items()}
        if counts == _OFFICIAL and len(found) != PUBLISHED["trainaug"]:
            raise DataError(
                f"trainaug has {len(found)} images, but the official lists give {PUBLISHED['trainaug']}. One of the "
                f"lists in {self.root / 'ImageSets/Segmentation'} or {self.sbd.folder} was changed: unpack it again."
            )
        held = ", ".join(f"{name} {count}" for name, count in counts.items())
        log.info("trainaug: %d images (%s; SBD in %s).", len(found), held, self.sbd.folder)
        return found

    def _seg11valid(self) -> list[str]:
        """VOC 2011 val without SBD train, in the order of the former."""
        older = self.root.parent / "VOC2011/ImageSets/Segmentation/val.txt"
        if not older.is_file():
            raise FileNotFoundError(
                f"There is no list {self._file('seg11valid')}, and no {older} to make it from. Put FCN's list there "
                "(seg11valid.txt, 736 lines, from github.com/shelhamer/fcn.berkeleyvision.org), give its path instead "
                "of the name, or unpack VOC2011 beside VOC2012. For scores of VOC alone say data.val_split: val and "
                "data.train_split: train."
            )
        seen = set(self.sbd.ids("train"))
        return [name for name in read_ids(older) if name not in seen]


_MADE = "SegmentationClassAug"
_OFFICIAL = {"VOC train": 1464, "VOC val": 1449, "SBD train": 8498, "SBD val": 2857}


class VOCObjects(MapDataset):
    """Images of VOC with SegmentationObject, where object n has value n, and SegmentationClass, which says its class.

    Args:
        labels: images with class masks.
        numbers: the same images with object masks.
    """

    def __init__(self, labels: FileDataset, numbers: FileDataset):
        super().__init__(labels, numbers)
        self.labels, self.numbers = labels, numbers

    def objects(self, index: int) -> Objects:
        """The objects, without their void border. An object's class is that of most of its pixels.

        Raises:
            DataError: an object on background only.
        """
        numbers, classes = self.numbers.values(index), self.labels.values(index)
        votes = np.bincount(numbers.ravel() * np.int64(256) + classes.ravel(), minlength=1 << 16).reshape(256, 256)
        votes[:, IGNORE_INDEX] = votes[0] = votes[IGNORE_INDEX] = 0
        seen = np.flatnonzero(votes.any(1))
        label = votes.argmax(1)
        if len(wrong := seen[label[seen] == 0]):
            raise DataError(
                f"{self.numbers.mask_paths[index]}: object {wrong[0]} lies on background of "
                f"{self.labels.mask_paths[index].parent.name}. The two masks do not belong together."
            )
        return objects_of(numbers, {int(n): (int(label[n]) - 1, False) for n in seen})

    def look(self, index: int) -> None:
        """Raise DataError if the two masks do not fit."""
        if self.numbers.values(index).shape != self.labels.values(index).shape:
            raise DataError(f"{self.numbers.mask_paths[index]} and {self.labels.mask_paths[index]} differ in size.")
        self.objects(index)


class VOCInstances(InstanceDataModule):
    """The objects of VOC's 20 classes (SegmentationObject): 1,464 images to train on, 1,449 to validate on in 2012.

    Nothing is a crowd; pixels of the void border (255) belong to no object. With SBD's objects as well: `train_split`
    "trainaug" or "sbd_train".

    Args:
        root: as in `VOC`, like the others.
        year: of the challenge.
        train_split: name of a list in ImageSets/Segmentation, without ".txt".
        val_split: the same, for validation.
        test_split: the same, for `seglight test`.
        sbd: the folder benchmark_RELEASE.
    """

    classes = VOC.classes[1:]
    palette = VOC.palette[1:]

    def __init__(
        self,
        root: str | None = None,
        year: str = "2012",
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "val",
        sbd: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        lists = {"train_split": train_split, "val_split": val_split, "test_split": test_split}
        self.voc = VOC(root, year, **lists, sbd=sbd)

    def dataset(self, split: Split) -> VOCObjects:
        """The images of a split list."""
        return VOCObjects(self.voc.files(split, "Class"), self.voc.files(split, "Object"))
