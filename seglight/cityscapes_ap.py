"""Cityscapes' instance-level scores, AP and AP50, by the rules of its benchmark (Cordts et al. 2016, section 4.3).

They differ from COCO's: ground truth is the `instanceIds` image itself, with void pixels and groups that are neither
found nor missed; objects below 100 pixels are ignored; an overlap must exceed the IoU; of several detections of one
object the best counts and the others are false; and the precision-recall curve is integrated stepwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from seglight.official import or_none, percent

if TYPE_CHECKING:
    from rich.table import Table

    from seglight.types import RLE

IDS = {"person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33}
"""labelId of the 8 classes that have instances and count, in the order of the labels 0..7."""
VOID = (-1, 0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
"""labelIds that no evaluation looks at."""
OVERLAPS = np.arange(0.5, 1.0, 0.05)
"""As the benchmark makes them: some differ from the round number in the last digit, and the comparison is strict."""
SMALLEST = 100
"""Pixels of an object that counts."""
FIRST_INSTANCE = 1000
"""Below it a value of `instanceIds` is a labelId: pixels of a class, or of a group of objects not told apart."""


class CityscapesImage(NamedTuple):
    """Areas and overlaps of one image: all that the scores need."""

    truth: np.ndarray
    """int64 (G, 3): label, pixels, and 1 for a group."""
    found: np.ndarray
    """int64 (D, 3): label, pixels, pixels on void."""
    scores: np.ndarray
    """float64 (D,)"""
    pairs: np.ndarray
    """int64 (P, 3): object, detection of the same class, and the pixels that they share, at least one."""


@dataclass(eq=False)
class CityscapesScores:
    """Scores of a whole set; 0..1, nan for a class without objects of at least 100 pixels."""

    ap: float
    """Mean of `table` over all classes with objects and all IoUs."""
    ap50: float
    """The same at IoU 0.5."""
    table: np.ndarray
    """float64 (8, 10): AP of each class at each IoU of `OVERLAPS`."""
    classes: tuple[str, ...] = tuple(IDS)

    name = "cityscapes"
    definition = (
        "Cityscapes AP: mean over classes with objects and IoU 0.50:0.05:0.95 of the stepwise area under the "
        "precision-recall curve; objects below 100 pixels, groups and void neither found nor missed"
    )

    def as_dict(self, prefix: str = "val") -> dict[str, float]:
        """Return `val/cityscapes_AP`, `val/cityscapes_AP50` and `val_cityscapes/<name>`, AP of classes with objects."""
        out = {f"{prefix}/cityscapes_AP": self.ap, f"{prefix}/cityscapes_AP50": self.ap50}
        pairs = zip(self.classes, self.table.mean(1), strict=True)
        return out | {f"{prefix}_cityscapes/{name}": float(value) for name, value in pairs if not np.isnan(value)}

    def per_class(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of a table with a line per class; None where there is no number."""
        rows = zip(self.classes, self.table.mean(1), self.table[:, 0], strict=True)
        return (
            ["class", "AP", "AP50"],
            [[name, *map(or_none, values)] for name, *values in rows],
        )

    def as_table(self) -> Table:
        """Return a rich table with a line per class. In percent."""
        from rich.table import Table

        table = Table(title="Cityscapes, instance level", caption=self.definition, caption_justify="left")
        for title in ("class", "AP", "AP50"):
            table.add_column(title, justify="left" if title == "class" else "right")
        for name, row in zip(self.classes, self.table, strict=True):
            table.add_row(name, percent(row.mean()), percent(row[0]))
        table.add_section()
        table.add_row("mean", percent(self.ap), percent(self.ap50), style="bold")
        return table


class CityscapesAP:
    """AP and AP50 of a set, exact over any number of ranks; no mask is kept. AP at distances is not computed."""

    def __init__(self):
        self.images: dict[str, CityscapesImage] = {}

    def update(self, image_id: str, instance_ids: np.ndarray, detections: Mapping[str, Any]) -> None:
        """Add one image.

        Args:
            image_id: unique in the set.
            instance_ids: integers (H, W), the content of `_gtFine_instanceIds.png`.
            detections: `labels` 0..7 in the order of `IDS`, `scores`, and `rles` of the image's size. One without any
                pixel is left out, as the benchmark does.

        Raises:
            ValueError: an image for the second time, or detections that do not fit.
        """
        if image_id in self.images:
            raise ValueError(f"Image {image_id} was counted twice: ids must be unique. Call reset between two passes.")
        instance_ids = np.asarray(instance_ids)
        if instance_ids.ndim != 2 or instance_ids.dtype.kind not in "iu":
            raise ValueError(
                f"Image {image_id}: instance ids are {instance_ids.dtype} {instance_ids.shape}, but must be integers "
                "(H, W), as in _gtFine_instanceIds.png."
            )
        labels, scores = (np.asarray(detections[key]) for key in ("labels", "scores"))
        rles: Sequence[RLE] = detections["rles"]
        if not len(labels) == len(scores) == len(rles) or not np.isfinite(scores).all():
            raise ValueError(
                f"Image {image_id}: {len(labels)} labels, {len(scores)} scores and {len(rles)} masks; give one each, "
                "with finite scores."
            )
        if len(labels) and not (labels.min() >= 0 and labels.max() < len(IDS)):
            raise ValueError(
                f"Image {image_id}: labels {labels.min()} to {labels.max()}, but the classes are 0..{len(IDS) - 1}: "
                f"{', '.join(IDS)}."
            )
        self.images[image_id] = _overlaps(image_id, instance_ids, labels, scores.astype(np.float64), rles)

    def compute(self) -> CityscapesScores:
        """Return the scores of all images of all ranks; every rank must call it."""
        from seglight.detection_metrics import over_ranks

        return over_ranks(self.images, _scores)

    def reset(self) -> None:
        """Forget all images."""
        self.images = {}


class CityscapesObjectScores:
    """`CityscapesAP` as `seglight test` feeds it; see `seglight.official.OfficialScores`.

    Args:
        numbers: gives the content of `_gtFine_instanceIds.png`, integers (H, W), of an image id.
    """

    def __init__(self, numbers: Callable[[str], np.ndarray]):
        self.numbers, self.metric = numbers, CityscapesAP()

    def update(self, image_id: str, prediction: Mapping[str, Any], truth: Any = None) -> None:
        """Add one image: `labels` and `scores`, tensors on any device, and `rles`."""
        found = {key: prediction[key].detach().float().cpu().numpy() for key in ("labels", "scores")}
        found["labels"] = found["labels"].astype(np.int64)
        self.metric.update(image_id, self.numbers(image_id), {**found, "rles": prediction["rles"]})

    def compute(self) -> CityscapesScores:
        """As `CityscapesAP.compute`."""
        return self.metric.compute()


def _overlaps(
    image_id: str, instance_ids: np.ndarray, labels: np.ndarray, scores: np.ndarray, rles: Sequence[RLE]
) -> CityscapesImage:
    from seglight.masks import decode

    values, where, pixels = np.unique(instance_ids, return_inverse=True, return_counts=True)
    where = where.reshape(instance_ids.shape)
    void = np.isin(values, VOID)
    label_ids = np.where(values < FIRST_INSTANCE, values, values // FIRST_INSTANCE)
    of_class = np.full(len(values), -1)
    for label, label_id in enumerate(IDS.values()):
        of_class[label_ids == label_id] = label
    counted = np.flatnonzero(of_class >= 0)
    truth = np.stack([of_class[counted], pixels[counted], values[counted] < FIRST_INSTANCE], 1).astype(np.int64)
    found, kept, pairs = [], [], []
    for label, score, rle in zip(labels.tolist(), scores, rles, strict=True):
        if tuple(rle["size"]) != instance_ids.shape:
            raise ValueError(
                f"Image {image_id} is {instance_ids.shape[0]} x {instance_ids.shape[1]}, but a mask is "
                f"{rle['size'][0]} x {rle['size'][1]} (height x width)."
            )
        shared = np.bincount(where[decode([rle])[0]], minlength=len(values))
        if not shared.any():
            continue
        here = np.flatnonzero((truth[:, 0] == label) & (shared[counted] > 0))
        pairs += [(g, len(found), shared[counted[g]]) for g in here]
        found.append((label, shared.sum(), shared[void].sum()))
        kept.append(score)
    return CityscapesImage(
        truth,
        np.array(found, dtype=np.int64).reshape(-1, 3),
        np.array(kept, dtype=np.float64),
        np.array(pairs, dtype=np.int64).reshape(-1, 3),
    )


def _scores(images: Mapping[str, CityscapesImage]) -> CityscapesScores:
    if not images:
        raise ValueError("There is no image to evaluate: the metric was never updated, or the split is empty.")
    ordered = [images[name] for name in sorted(images)]
    objects = np.cumsum([0] + [len(image.truth) for image in ordered])
    detections = np.cumsum([0] + [len(image.found) for image in ordered])
    truth, found, scores = (np.concatenate([getattr(i, key) for i in ordered]) for key in ("truth", "found", "scores"))
    shift = zip(ordered, objects, detections, strict=False)
    pairs = np.concatenate([image.pairs + np.array([g, d, 0]) for image, g, d in shift])
    table = np.full((len(IDS), len(OVERLAPS)), np.nan)
    for label in range(len(IDS)):
        mine = pairs[truth[pairs[:, 0], 0] == label]
        for i, overlap in enumerate(OVERLAPS):
            table[label, i] = _average_precision(truth, found, scores, mine, label, overlap)
    present = ~np.isnan(table[:, 0])
    if not present.any():
        return CityscapesScores(float("nan"), float("nan"), table)
    return CityscapesScores(float(table[present].mean()), float(table[present, 0].mean()), table)


def _average_precision(
    truth: np.ndarray, found: np.ndarray, scores: np.ndarray, pairs: np.ndarray, label: int, overlap: float
) -> float:
    """AP of one class at one IoU; `pairs` are those of the class."""
    g, d, shared = pairs.T
    group, small = truth[:, 2] == 1, truth[:, 1] < SMALLEST
    counts = (truth[:, 0] == label) & ~group & ~small
    if not counts.any():
        return float("nan")
    hit = shared / (truth[g, 1] + found[d, 1] - shared) > overlap
    right = hit & counts[g]
    best = np.full(len(truth), -np.inf)
    np.maximum.at(best, g[right], scores[d[right]])
    met = np.zeros(len(truth), dtype=bool)
    met[g[right]] = True
    # of several detections of one object all but one are false
    twice = np.sort(scores[d[right]])
    true = best[met]
    for score in true:
        twice = np.delete(twice, np.searchsorted(twice, score))
    # detections that met nothing are false, unless too much of them lies on what does not count
    free = found[:, 2].astype(np.float64)
    np.add.at(free, d, shared * (group[g].astype(int) + small[g]))  # a small group counts twice, there as here
    alone = found[:, 0] == label
    alone[d[hit]] = False
    alone[alone] = free[alone] / found[alone, 1] <= overlap
    y = np.concatenate([np.ones(len(true)), np.zeros(len(twice) + alone.sum())])
    return _area(y, np.concatenate([true, twice, scores[alone]]), int(counts.sum()))


def _area(y: np.ndarray, scores: np.ndarray, objects: int) -> float:
    """Area under the precision-recall curve: `y` is 1 for true and 0 for false detections."""
    order = np.argsort(scores, kind="stable")
    below = np.concatenate([[0], np.cumsum(y[order])])
    _, first = np.unique(scores[order], return_index=True)
    true = below[-1] - below[first]
    precision = np.append(true / (len(y) - first), 1.0)  # the last point is none of the detector's
    recall = np.append(true / objects, 0.0)
    around = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (around[:-2] - around[2:]) / 2)
