"""Cityscapes' pixel-level scores: IoU and iIoU of classes and categories (Cordts et al., CVPR 2016, section 4.1).

Equal to the benchmark's evalPixelLevelSemanticLabeling. IoU weighs every pixel alike, so large objects decide; iIoU
("instance-level") weighs the pixels of an object by the mean size of its class over its own size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import torch

from seglight.cityscapes_ap import FIRST_INSTANCE, IDS
from seglight.metrics import count
from seglight.official import mean, or_none, percent

if TYPE_CHECKING:
    from rich.table import Table

CLASSES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
"""labelId of the 19 classes that are scored, in the order of the labels 0..18. All others are void."""
CATEGORIES = {
    "flat": (7, 8), "construction": (11, 12, 13), "object": (17, 19, 20), "nature": (21, 22), "sky": (23,),
    "human": (24, 25), "vehicle": (26, 27, 28, 31, 32, 33),
}  # fmt: skip
"""labelIds of each category that are scored."""
INSTANCE_CATEGORIES = {"human": (24, 25), "vehicle": (26, 27, 28, 29, 30, 31, 32, 33)}
"""Categories of objects throughout. For their iIoU the scripts take caravan and trailer for vehicles, too."""
MEAN_PIXELS = {
    "person": 3462.4756337644, "rider": 3930.4788056518, "car": 12794.0202738185, "truck": 27855.1264367816,
    "bus": 35732.1511111111, "train": 67583.7075812274, "motorcycle": 6298.7200839748, "bicycle": 4672.3249222261,
}  # fmt: skip
"""Mean size of an object, as the scripts have it."""


class PixelImage(NamedTuple):
    """Counts of one image: all that the scores need."""

    pairs: np.ndarray
    """int64 (P, 3): labelId in truth, in prediction, and how many pixels."""
    objects: np.ndarray
    """int64 (N, 4): labelId of an object, its pixels, those labelled right, and those labelled as its category."""


@dataclass(eq=False)
class CityscapesPixelScores:
    """Scores of a whole set; 0..1, nan where truth and prediction hold nothing. Arrays are float64."""

    iou: np.ndarray
    """(19,), of `CLASSES`."""
    iiou: np.ndarray
    """(19,); nan for the 11 classes without objects."""
    category_iou: np.ndarray
    """(7,), of `CATEGORIES`."""
    category_iiou: np.ndarray
    """(7,); nan for the 5 categories without objects."""
    objects: np.ndarray
    """int64 (19,), objects in the truth."""
    has_objects: bool = True
    """Whether instanceIds were there to tell objects apart; without them there is no iIoU."""

    name = "cityscapes"

    @property
    def means(self) -> dict[str, float]:
        """The four numbers of the benchmark's table: means over what is not nan."""
        values = {
            "IoU": self.iou, "category_IoU": self.category_iou, "iIoU": self.iiou, "category_iIoU": self.category_iiou
        }  # fmt: skip
        return {name: mean(value) for name, value in values.items()}

    @property
    def definition(self) -> str:
        """One sentence."""
        text = (
            "Cityscapes' pixel-level scores: one table over the whole set, predictions on void not counted; for a "
            "category any of its classes is right; iIoU weighs the pixels of an object by its class' mean size over "
            "its own size, but not false positives; means over classes or categories that occur"
        )
        return text if self.has_objects else text + "; no iIoU, because there are no _instanceIds.png"

    def as_dict(self, prefix: str = "val") -> dict[str, float]:
        """Return `val/cityscapes_IoU` (equal to mIoU), `..._category_IoU`, `..._iIoU`, `..._category_iIoU`."""
        return {f"{prefix}/{self.name}_{name}": value for name, value in self.means.items()}

    def per_class(self) -> tuple[list[str], list[list[Any]]]:
        """A line per class, then a line per category."""
        classes = zip(CLASSES, self.iou, self.iiou, self.objects, strict=True)
        rows: list[list[Any]] = [
            ["class", name, or_none(a), or_none(b), int(n) if name in IDS else None] for name, a, b, n in classes
        ]
        categories = zip(CATEGORIES, self.category_iou, self.category_iiou, strict=True)
        rows += [["category", name, or_none(a), or_none(b), None] for name, a, b in categories]
        return ["kind", "name", "IoU", "iIoU", "objects"], rows

    def as_table(self) -> Table:
        """Return a rich table. In percent."""
        from rich.table import Table

        table = Table(title="Cityscapes, pixel level", caption=self.definition, caption_justify="left")
        for title in ("", "IoU", "iIoU", "objects"):
            table.add_column(title, justify="right" if title else "left")
        means, (_, rows) = self.means, self.per_class()
        ends = {
            "class": ("mean of classes", means["IoU"], means["iIoU"]),
            "category": ("mean of categories", means["category_IoU"], means["category_iIoU"]),
        }
        for kind, (title, *values) in ends.items():
            for _, name, iou, iiou, number in (row for row in rows if row[0] == kind):
                table.add_row(name, percent(iou), percent(iiou), "" if number is None else f"{number:,}")
            table.add_row(title, *map(percent, values), "", style="bold")
            table.add_section()
        return table


class CityscapesPixels:
    """Pixel-level scores of a set, exact over any number of ranks and any order of images.

    Args:
        numbers: gives the content of `_gtFine_instanceIds.png`, integers (H, W), of an image id; without it there is
            no iIoU.
    """

    def __init__(self, numbers: Callable[[str], np.ndarray] | None = None):
        self.numbers = numbers
        self.images: dict[str, PixelImage] = {}

    def update(self, image_id: str, prediction: Any, truth: Any) -> None:
        """Add one image.

        Args:
            image_id: unique in the set.
            prediction: labels 0..18, integers (H, W), a tensor on any device or an array.
            truth: labels 0..18 or 255 of the same shape.

        Raises:
            ValueError: an image for the second time, or shapes that differ.
        """
        to_ids = np.zeros(256, np.uint8)
        to_ids[: len(CLASSES)] = list(CLASSES.values())
        ids = [cv2.LUT(_bytes(part), to_ids) for part in (prediction, truth)]
        self.add(image_id, ids[0], ids[1])

    def add(self, image_id: str, prediction: np.ndarray, truth: np.ndarray) -> None:
        """As `update`, with the labelIds of the files, uint8 (H, W)."""
        if image_id in self.images:
            raise ValueError(f"Image {image_id} was counted twice: ids must be unique.")
        numbers = None if self.numbers is None else np.asarray(self.numbers(image_id))
        shapes = [part.shape for part in (prediction, truth, numbers) if part is not None]
        if len(set(shapes)) > 1:
            raise ValueError(f"Image {image_id}: prediction, labels and instance ids have the shapes {shapes}.")
        table = count(torch.from_numpy(prediction), torch.from_numpy(truth)).numpy()[1:257, 1:257]
        rows, columns = table.nonzero()
        pairs = np.stack([rows, columns, table[rows, columns]], 1)
        objects = np.zeros((0, 4), np.int64) if numbers is None else _objects(numbers, prediction)
        self.images[image_id] = PixelImage(pairs, objects)

    def compute(self) -> CityscapesPixelScores:
        """Return the scores of all images of all ranks; every rank must call it.

        Raises:
            ValueError: no image at all, or one on two ranks.
        """
        from seglight.detection_metrics import over_ranks

        scores = over_ranks(self.images, _scores)
        scores.has_objects = self.numbers is not None
        if not scores.has_objects:
            scores.iiou[:] = scores.category_iiou[:] = np.nan
        return scores


def _objects(numbers: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """`PixelImage.objects` of the scored classes."""
    inside = numbers > FIRST_INSTANCE  # more than, as in the scripts
    numbers, prediction = numbers[inside].astype(np.int64), prediction[inside]
    size = int(numbers.max(initial=0)) + 1
    pixels = np.bincount(numbers, minlength=size)
    values = np.flatnonzero(pixels)
    values = values[np.isin(values // 1000, list(IDS.values()))]
    category = np.arange(256)
    for ids in INSTANCE_CATEGORIES.values():
        category[list(ids)] = ids[0]
    label = numbers // 1000
    right = np.bincount(numbers[label == prediction], minlength=size)
    label = np.minimum(label, 255)  # a licence plate is 65535
    near = np.bincount(numbers[category[label] == category[prediction]], minlength=size)
    return np.stack([values // 1000, pixels[values], right[values], near[values]], 1)


def _scores(images: Mapping[str, PixelImage]) -> CityscapesPixelScores:
    if not images:
        raise ValueError("There is no image to evaluate: the metric was never updated, or the split is empty.")
    table = np.zeros((256, 256), np.int64)
    for image in images.values():
        table[image.pairs[:, 0], image.pairs[:, 1]] += image.pairs[:, 2]
    objects = np.concatenate([images[name].objects for name in sorted(images)])  # one order, hence one sum
    scored = list(CLASSES.values())
    sizes = {IDS[name]: size for name, size in MEAN_PIXELS.items()}
    weight = np.array([sizes[label] for label in objects[:, 0].tolist()]) / np.maximum(objects[:, 1], 1)
    hit, missed = objects[:, 2] * weight, (objects[:, 1] - objects[:, 2]) * weight
    near, far = objects[:, 3] * weight, (objects[:, 1] - objects[:, 3]) * weight
    iou, iiou, number = [], [], []
    for label in scored:
        right, all_of = table[label, label], table[label].sum()
        false = table[scored, label].sum() - right
        mine = objects[:, 0] == label
        iou.append(_ratio(right, all_of + false))
        weighted = hit[mine].sum(), missed[mine].sum()
        iiou.append(_ratio(weighted[0], sum(weighted) + false) if label in sizes else np.nan)
        number.append(mine.sum())
    category_iou, category_iiou = [], []
    for name, ids in CATEGORIES.items():
        others = [label for label in scored if label not in ids]
        right, all_of = table[np.ix_(ids, ids)].sum(), table[list(ids)].sum()
        category_iou.append(_ratio(right, all_of + table[np.ix_(others, ids)].sum()))
        wide = INSTANCE_CATEGORIES.get(name, ())
        mine = np.isin(objects[:, 0], wide)
        false = table[np.ix_(others, wide)].sum() if wide else 0
        weighted = near[mine].sum(), far[mine].sum()
        category_iiou.append(_ratio(weighted[0], sum(weighted) + false) if wide else np.nan)
    parts = (np.array(values, dtype=np.float64) for values in (iou, iiou, category_iou, category_iiou))
    return CityscapesPixelScores(*parts, objects=np.array(number, dtype=np.int64))


def _bytes(labels: Any) -> np.ndarray:
    labels = labels.cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    return np.ascontiguousarray(labels, dtype=np.uint8)


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else float("nan")
