"""Cityscapes, pixel labels of 19 classes of street scenes (Cordts et al., CVPR 2016), in the layout of its archives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from seglight.data.archive import AnyPath, files_below
from seglight.data.base import SemanticDataModule, Split
from seglight.data.decode import Header, pillow, probe
from seglight.data.files import FileDataset, locate, refuse_unpaired, warn_of_missing
from seglight.data.findings import DataError, choice, listing
from seglight.data.instance_maps import MapDataset, objects_of
from seglight.data.instances import InstanceDataModule
from seglight.data.objects import Objects
from seglight.types import IGNORE_INDEX

if TYPE_CHECKING:
    from seglight.official import OfficialScores

_ADVICE = (
    "To get it: an account at www.cityscapes-dataset.com, and from there leftImg8bit_trainvaltest.zip (11 GB) and "
    "gtFine_trainvaltest.zip (241 MB); for coarse labels also leftImg8bit_trainextra.zip (44 GB) and gtCoarse.zip "
    "(1.3 GB). Put them into one folder, unpacked or as they are; `seglight data prepare cityscapes` counts them. "
    "Or a miniature: `seglight data sample --format cityscapes OUT`."
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
ARCHIVES = {
    "leftImg8bit": ("leftImg8bit_trainvaltest.zip", "leftImg8bit_trainextra.zip"),
    "gtFine": ("gtFine_trainvaltest.zip",),
    "gtCoarse": ("gtCoarse.zip",),
}
"""The downloads that hold each top folder."""
COUNTS = {
    "train": {
        "aachen": 174, "bochum": 96, "bremen": 316, "cologne": 154, "darmstadt": 85, "dusseldorf": 221, "erfurt": 109,
        "hamburg": 248, "hanover": 196, "jena": 119, "krefeld": 99, "monchengladbach": 94, "strasbourg": 365,
        "stuttgart": 196, "tubingen": 144, "ulm": 95, "weimar": 142, "zurich": 122,
    },
    "val": {"frankfurt": 267, "lindau": 59, "munster": 174},
    "test": {"berlin": 544, "bielefeld": 181, "bonn": 46, "leverkusen": 58, "mainz": 298, "munich": 398},
}  # fmt: skip
"""Images of each city."""
BLACK = "troisdorf_000000_000073"
"""An image of train_extra that is all black in the first release. It is left out of any release, so that all train on
the same 19,997."""
_TRAIN_EXTRA = 19_997
LAST_ID = 33
_NO_CLASS = 254
_LABEL_ADVICE = f"labelIds are 0..{LAST_ID}: unpack gtFine again, and look for files that another program wrote."


class Cityscapes(SemanticDataModule):
    """19 classes at 2048x1024; every other labelId is ignored. Read from `_labelIds.png`: no conversion first.

    Args:
        root: the folder with leftImg8bit and gtFine, or with the zip archives that hold them. What is unpacked counts
            first. Default: $SEGLIGHT_DATA or ./data, and there cityscapes.
        train_labels: "fine" (2,975 images), "coarse" (train and train_extra, 22,972), or "fine+coarse" (fine train and
            coarse train_extra, as the papers' best results).
        val_split: a folder of gtFine.
        test_split: the same, for `seglight test`. The labels of "test" are not public: they are all ignored, and so
            are those of its 1,525 images where gtFine has none.
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
        self.root = locate(root, "cityscapes", ("", "cityscapes"), ("leftImg8bit", *ARCHIVES["leftImg8bit"]), _ADVICE)
        choice("train_labels", train_labels, ("fine", "coarse", "fine+coarse"))
        fine = [("gtFine", "train")]
        coarse = [("gtCoarse", "train_extra")]
        train = {"fine": fine, "coarse": [("gtCoarse", "train"), *coarse], "fine+coarse": fine + coarse}
        self.parts = {"train": train[train_labels], "val": [("gtFine", val_split)], "test": [("gtFine", test_split)]}
        if {"train", "train_extra"} & {val_split, test_split}:
            raise DataError("Cityscapes: the training split cannot be validated on. Use val.")

    def dataset(self, split: Split) -> FileDataset:
        """The images of a split."""
        return self.files(split, "labelIds")

    def files(self, split: Split, kind: Literal["labelIds", "instanceIds"]) -> FileDataset:
        """The images of a split with their masks of one kind."""
        found = [(name, *files) for part in self.parts[split] for name, files in self._pairs(*part, kind).items()]
        names, images, masks = zip(*found, strict=True)
        lut = np.full(256, _NO_CLASS)
        lut[: LAST_ID + 1] = lut[255] = IGNORE_INDEX  # 255: how a licence plate, labelId -1, looks in a byte
        for label, (label_id, _) in enumerate(CLASSES.values()):
            lut[label_id] = label
        name = " and ".join("/".join(part) for part in self.parts[split])
        kind_of = FileDataset if kind == "labelIds" else InstanceIds
        return kind_of(f"Cityscapes {name}", list(names), list(images), list(masks), lut, advice=_LABEL_ADVICE)

    def official_scores(self, split: Split) -> OfficialScores | None:
        """IoU of categories and iIoU, see `seglight.cityscapes_scores`; without _instanceIds.png no iIoU."""
        from seglight.cityscapes_scores import CityscapesPixels

        if self.split(split).mask_paths[0] is None:
            return None
        try:
            return CityscapesPixels(self.numbers(split))
        except (DataError, FileNotFoundError):
            return CityscapesPixels()

    def numbers(self, split: Split) -> Callable[[str], np.ndarray]:
        """What gives the content of `_instanceIds.png`, uint16 (H, W), of an image id of a split."""
        files = self.files(split, "instanceIds")
        places = {name: index for index, name in enumerate(files.ids)}
        return lambda image_id: files.numbers(places[image_id])

    def _pairs(self, labels: str, split: str, kind: str) -> dict[str, tuple[AnyPath, AnyPath | None]]:
        """Image and mask by name ("aachen_000000_000019"), in the order of the names."""
        images, masks = (
            self._found(folder, split, f"_{end}.png")
            for folder, end in (("leftImg8bit", "leftImg8bit"), (labels, f"{labels}_{kind}"))
        )
        unlabelled = split == "test" and not masks
        missing = [
            f"{folder}/{split} (unpacked or in {' or '.join(ARCHIVES[folder])})"
            for folder, found in (("leftImg8bit", images), (labels, masks))
            if found is None and not (unlabelled and folder == labels)
        ]
        if missing:
            raise FileNotFoundError(f"There is no {' and no '.join(missing)} in {self.root}. {_ADVICE}")
        if not images:
            raise DataError(f"Cityscapes: {self.root}/leftImg8bit/{split} holds no CITY/*_leftImg8bit.png. {_ADVICE}")
        if unlabelled:
            masks = dict.fromkeys(images)
        name = f"Cityscapes {labels}/{split}"
        advice = "Unpack the archives again, completely; or remove what is unpacked, and the archives are read."
        refuse_unpaired(name, images, masks, advice)
        pairs = {one: (images[one], masks[one]) for one in sorted(images) if one != BLACK}
        _compare(name, split, pairs)
        return pairs

    def _found(self, folder: str, split: str, end: str) -> dict[str, AnyPath] | None:
        """Files of one kind by name; None without the folder."""
        found = files_below(self.root, f"{folder}/{split}", ARCHIVES[folder])
        if found is None:
            return None
        return {path.rsplit("/", 1)[-1].removesuffix(end): file for path, file in found.items() if path.endswith(end)}


def _compare(name: str, split: str, pairs: Collection[str]) -> None:
    """Say which cities are not whole."""
    found = Counter(one.split("_")[0] for one in pairs)
    if split == "train_extra":
        warn_of_missing(name, len(pairs), _TRAIN_EXTRA)
    elif split in COUNTS:
        cities = [f"{city} {found[city]} of {n}" for city, n in COUNTS[split].items() if found[city] != n]
        warn_of_missing(name, len(pairs), sum(COUNTS[split].values()), listing(cities, 3))


class InstanceIds(FileDataset):
    """Masks of 16 bits that hold 1000 * labelId + number for an object and the bare labelId for anything else."""

    def numbers(self, index: int) -> np.ndarray:
        """What the mask file holds, uint16 (H, W)."""
        path = self.mask_paths[index]
        if path is None:
            header = probe(self.image_paths[index])
            return np.zeros((header.height, header.width), np.uint16)
        values = np.array(pillow(path.read_bytes(), path))
        if values.ndim != 2 or values.min() < 0 or values.max() >= 1 << 16:
            raise DataError(f"{path}: not one channel of 16 bits, as instanceIds have. Unpack gtFine again.")
        return values.astype(np.uint16)

    def values(self, index: int) -> np.ndarray:
        """The labelIds, uint8 (H, W); 255 for a licence plate."""
        numbers = self.numbers(index)
        labels = np.where(numbers < 1000, numbers, numbers // 1000)
        return np.where(numbers == 0xFFFF, 255, np.minimum(labels, 254)).astype(np.uint8)

    def probe_mask(self, path: AnyPath) -> Header:
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
        root: as in `Cityscapes`, like the others.
        val_split: a folder of gtFine.
        test_split: the same, for `seglight test`; the images of "test" show no object that is public.
        short_side: as elsewhere; tests at full size want the model's `test_short_side` 1024 and `test_long_side` 2048.
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
        short_sides = short_side if isinstance(short_side, int) else list(short_side)
        super().__init__(short_side=short_sides, long_side=long_side, **kwargs)
        self.labels = Cityscapes(root, val_split=val_split, test_split=test_split)

    def dataset(self, split: Split) -> CityscapesObjects:
        """The images of a split."""
        return CityscapesObjects(self.labels.files(split, "instanceIds"))

    def official_scores(self, split: Split) -> OfficialScores | None:
        """Cityscapes' AP and AP50, which differ from COCO's; see `seglight.cityscapes_ap`."""
        from seglight.cityscapes_ap import CityscapesObjectScores

        if self.split(split).parts[0].mask_paths[0] is None:
            return None
        return CityscapesObjectScores(self.labels.numbers(split))
