"""What other definitions of mIoU would have said of the same predictions: why papers and libraries disagree.

`Tally` counts once per image; every definition is arithmetic on these counts, so one pass gives them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from seglight.metrics import count, scores
from seglight.official import mean, percent
from seglight.types import IGNORE_INDEX

if TYPE_CHECKING:
    from rich.table import Table


class Tally:
    """Pixel counts of label maps, image by image; about 32 bytes per class and image.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.table = np.zeros((num_classes, num_classes), np.int64)
        """(K, K), pixels of class [row] predicted as [column], void left out."""
        self.rows: list[np.ndarray] = []
        """int64 (4, K) per image: right, in truth, predicted where there is a label, predicted on void."""

    def add(self, image_id: str, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Count one image.

        Args:
            image_id: for messages.
            prediction: labels 0..K-1, uint8 (H, W).
            truth: labels 0..K-1 or 255, uint8 (H, W).

        Raises:
            ValueError: shapes that differ, or a value that is no label.
        """
        if prediction.shape != truth.shape:
            raise ValueError(
                f"Image {image_id}: the prediction has the shape {prediction.shape}, the ground truth {truth.shape}. "
                "Predictions are compared at the size of the labels; save them at that size."
            )
        prediction, truth = (np.ascontiguousarray(part, np.uint8) for part in (prediction, truth))
        counts = count(torch.from_numpy(prediction), torch.from_numpy(truth)).numpy()[1:257, 1:257]
        classes = self.num_classes
        legal = {"prediction": counts.sum(0)[classes:], "ground truth": counts.sum(1)[classes:IGNORE_INDEX]}
        for what, illegal in legal.items():
            if illegal.any():
                value = classes + int(np.flatnonzero(illegal)[0])
                raise ValueError(
                    f"Image {image_id}: the {what} holds the value {value}, but with {classes} classes labels are "
                    f"0..{classes - 1}. Does it belong to this dataset?"
                )
        table = counts[:classes, :classes]
        self.table += table
        self.rows.append(np.stack([np.diag(table), table.sum(1), table.sum(0), counts[IGNORE_INDEX, :classes]]))

    @property
    def counts(self) -> np.ndarray:
        """int64 (4, images, K), see `rows`."""
        return np.stack(self.rows, 1)


@dataclass(frozen=True)
class Definition:
    """One way to compute the number, and what it gives."""

    key: str
    text: str
    value: float
    """0..1, nan where it is undefined."""
    who: str
    """Who computes it so, with public reports of the confusion."""
    is_miou: bool = True
    """Whether it is called mIoU by those who use it, rather than by another name."""


def resized(labels: np.ndarray, side: int) -> np.ndarray:
    """A label map squeezed into a square by nearest neighbour, as networks of fixed input size get it."""
    return cv2.resize(np.ascontiguousarray(labels, np.uint8), (side, side), interpolation=cv2.INTER_NEAREST)


def definitions(
    tally: Tally, classes: Sequence[str], batch: int = 8, square: Tally | None = None, side: int = 512
) -> list[Definition]:
    """The same predictions by every definition in use, ours first.

    Args:
        tally: of the whole set, images in the order of the dataset.
        classes: K names.
        batch: images per batch, for means over batches.
        square: of the same images after `resized`.
        side: the side of that square.

    Raises:
        ValueError: no image.
    """
    if not tally.rows:
        raise ValueError("There is no image to score.")
    hit, truth, found, on_void = tally.counts
    whole, ours = _iou(hit.sum(0), truth.sum(0), found.sum(0)), scores(tally.table, classes)
    per_image = _iou(hit, truth, found)
    starts = np.arange(0, len(hit), batch)
    per_batch = _iou(*(np.add.reduceat(part, starts) for part in (hit, truth, found)))
    labelled = tally.table[1:]
    out = [
        Definition("dataset", "one table over the whole set; classes absent from truth and prediction left out",
                   ours.miou, "seglight; VOC devkit, Cityscapes, mmsegmentation, torchmetrics JaccardIndex(macro)"),
        Definition("in truth", "... classes absent from the truth left out, even where predicted",
                   mean(whole[truth.sum(0) > 0]), "Detectron2, Ultralytics"),
        Definition("absent 0", "... absent classes count 0", float(np.nan_to_num(whole, nan=0).mean()),
                   "PyTorch-Encoding; torchmetrics average=None, then mean (EoMT's log; lightning#3097)"),
        Definition("absent 1", "... absent classes count 1", float(np.nan_to_num(whole, nan=1).mean()),
                   "PaddleSeg; smp.metrics macro by default"),
    ]  # fmt: skip
    if classes[0] == "background":
        out.append(
            Definition("without background", "... without the background class", mean(whole[1:]),
                       "papers that score objects only; PASCAL-Context's 59 of 60 classes")
        )  # fmt: skip
    out += [
        Definition("label 0 ignored", f"... pixels of {classes[0]} (label 0) left out like void",
                   mean(_iou(np.append(0, np.diag(labelled, 1)), np.append(0, labelled.sum(1)), labelled.sum(0))),
                   "Hugging Face's semantic example (ignore_index=0)"),
        Definition("void counted", "... void not left out: whatever is predicted there is wrong",
                   mean(_iou(hit.sum(0), truth.sum(0), (found + on_void).sum(0))),
                   "metrics without ignore_index (torchmetrics MeanIoU)"),
        Definition("micro", "pixels of all classes pooled into one IoU",
                   float(_iou(hit.sum(), truth.sum(), found.sum())), "TorchGeo; smp.metrics micro (smp#226)"),
        Definition("per image", "mean over all pairs of an image and a class in it", mean(per_image.ravel()),
                   "torchmetrics.segmentation.MeanIoU (torchmetrics#2558)"),
        Definition("per case", "mean over images for each class, then over classes", mean(_mean_rows(per_image.T)),
                   "nnU-Net, MONAI"),
        Definition("imagewise", "mean over images and classes; a class absent from an image counts 1",
                   float(np.nan_to_num(per_image, nan=1).mean()), "smp.metrics macro-imagewise"),
        Definition("per batch", f"mean over batches of {batch} images of the batch's own mIoU",
                   mean(_mean_rows(per_batch)), "training loops that average (torchmetrics#552, smp#207)"),
    ]  # fmt: skip
    if square is not None:
        out.append(
            Definition("resized", f"labels and prediction resized to {side}x{side}, then as the first",
                       scores(square.table).miou, "Hugging Face's example, Ultralytics (labels at network size)")
        )  # fmt: skip
    with np.errstate(invalid="ignore"):
        dice = 2 * hit.sum(0) / (truth.sum(0) + found.sum(0))
    others = (
        ("Dice", "mean over classes of 2 IoU / (1 + IoU), also called F1", mean(dice), "medical imaging"),
        ("pixAcc", "share of the labelled pixels that are right", ours.pixacc, "most toolboxes, also as aAcc"),
        ("mAcc", "mean over classes of the share of their pixels found", ours.macc, "most toolboxes; FCN"),
        ("fwIoU", "IoU weighted by the pixels of the class", ours.fwiou, "FCN, Detectron2"),
    )
    return out + [Definition(key, f"{key}: {text}", value, who, False) for key, text, value, who in others]


def as_table(found: Sequence[Definition], title: str | None = None, protocol: str = "") -> Table:
    """A rich table: each definition with its value, its difference from the first, and who uses it. In percent."""
    from rich.table import Table

    caption = "In percent; difference from the first line in points. The network ran once: only the arithmetic differs."
    table = Table(title=title, caption=f"{protocol}. {caption}" if protocol else caption, caption_justify="left")
    table.add_column("definition", overflow="fold", ratio=5)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("diff.", justify="right", no_wrap=True)
    table.add_column("who uses it", overflow="fold", ratio=4)
    first = found[0].value
    for group in (True, False):
        for one in (one for one in found if one.is_miou is group):
            apart = f"{100 * (one.value - first):+.2f}" if group and one is not found[0] else ""
            style = "bold" if one is found[0] else None
            table.add_row(one.text, percent(one.value, 2), apart.replace("+nan", "–"), one.who, style=style)
        table.add_section()
    return table


def as_records(found: Iterable[Definition]) -> list[dict[str, Any]]:
    """Plain JSON values; null where a value is undefined."""
    return [
        {"key": one.key, "definition": one.text, "value": None if np.isnan(one.value) else one.value, "who": one.who}
        for one in found
    ]


def _iou(hit: np.ndarray, truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Of counts of any shape; nan where there is nothing."""
    with np.errstate(invalid="ignore"):
        return np.asarray(hit / (truth + found - hit))


def _mean_rows(values: np.ndarray) -> np.ndarray:
    return np.array([mean(row) for row in values])
