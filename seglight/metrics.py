"""The numbers of semantic segmentation, all from one table of pixel counts.

`ConfusionMatrix` only holds the counts (and lets torchmetrics sum them over ranks); `count` and `scores` do the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from seglight.official import mean, or_none, percent
from seglight.types import IGNORE_INDEX

if TYPE_CHECKING:
    from rich.table import Table

BINS = 258
"""Rows and columns of the raw counts: below 0, the values 0..255, above 255. Value v has row v + 1."""
PIECE = 2**18
"""Pixels counted at a time on a CPU: their index (1 MiB) stays in cache, and memory does not grow with the batch."""
FEW = 2**15
"""Below this many pixels a table of their own would cost more than adding them one by one."""
LANES = 16
"""Private tables on an accelerator, so that a mask of one constant class does not queue for one memory address."""


@dataclass(eq=False)
class Scores:
    """Scores of one confusion matrix; numpy arrays and plain floats, on the host. All lie in 0..1.

    With T(i, j) the pixels of class i predicted as j, IoU_i = T(i, i) / (sum_j T(i, j) + sum_j T(j, i) - T(i, i))
    (Long et al. 2015, section 5, where pixAcc, mAcc, mIoU and fwIoU come from).
    """

    table: np.ndarray
    """int64 (K, K), pixels of class [row] predicted as [column]; void rows are gone."""
    classes: tuple[str, ...]
    """K names."""
    iou: np.ndarray
    """float64 (K,); nan for a class that neither the truth nor the prediction holds."""
    accuracy: np.ndarray
    """float64 (K,), share of the class' pixels that were found; nan without support."""
    support: np.ndarray
    """int64 (K,), pixels of the class in the ground truth."""
    miou: float
    """Mean of `iou` over the classes that are not nan: a class absent everywhere counts neither as 0 nor as 1."""
    pixacc: float
    """Share of the labelled pixels that are right."""
    macc: float
    """Mean of `accuracy` over the classes with support."""
    fwiou: float
    """`iou` weighted by support."""
    protocol: str = ""
    """What the dataset says of its benchmark; part of the definition."""

    @property
    def definition(self) -> str:
        """One sentence that says what mIoU means here and which classes it leaves out."""
        absent = [name for name, iou in zip(self.classes, self.iou, strict=True) if np.isnan(iou)]
        text = (
            f"mIoU over {len(self.classes) - len(absent)} of {len(self.classes)} classes: one confusion matrix over "
            "the whole set, at label resolution, void excluded"
        )
        if absent:
            more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
            text += f"; classes absent from truth and prediction left out: {', '.join(absent[:10])}{more}"
        return f"{self.protocol}; {text}" if self.protocol else text

    @property
    def headline(self) -> dict[str, float]:
        """The two numbers of a log line, the one that selects checkpoints first."""
        return {"mIoU": self.miou, "pixAcc": self.pixacc}

    def per_class(self) -> tuple[list[str], list[list]]:
        """Columns and rows of a table with a line per class; None where there is no number."""
        rows = zip(self.classes, self.iou, self.accuracy, self.support, strict=True)
        return (
            ["class", "IoU", "accuracy", "pixels"],
            [[name, or_none(iou), or_none(accuracy), int(support)] for name, iou, accuracy, support in rows],
        )

    figure = "confusion"
    """Name of the picture that `draw` makes."""

    def draw(self, path: str | Path) -> None:
        """Draw the confusion matrix as a PNG."""
        from seglight import visualize

        visualize.confusion_png(path, self.table, self.classes)

    def as_dict(self, prefix: str = "val") -> dict[str, float]:
        """Return the scores under their logged names: `val/mIoU` ... and `val_class/<name>`, the IoU per class.

        Classes absent from truth and prediction have no entry. Without any labelled pixel the four means are nan.
        """
        means = {"mIoU": self.miou, "pixAcc": self.pixacc, "mAcc": self.macc, "fwIoU": self.fwiou}
        out = {f"{prefix}/{name}": value for name, value in means.items()}
        pairs = zip(self.classes, self.iou, strict=True)
        out.update({f"{prefix}_class/{name}": float(v) for name, v in pairs if not np.isnan(v)})
        return out

    def as_table(self) -> Table:
        """Return a rich table with a line per class, in order up to 30 classes, else worst first. In percent."""
        from rich.table import Table
        from rich.text import Text  # names as they are: square brackets in strings are styles

        names = self.classes
        order = np.arange(len(names)) if len(names) <= 30 else np.argsort(self.iou, kind="stable")  # nan goes last
        table = Table(caption=Text(self.definition, style="table.caption"), caption_justify="left")
        for title in ("class", "IoU", "accuracy", "share of pixels"):
            table.add_column(title, justify="left" if title == "class" else "right")
        share = self.support / max(self.support.sum(), 1)
        for i in order:
            table.add_row(Text(names[i]), percent(self.iou[i]), percent(self.accuracy[i]), percent(share[i]))
        table.add_section()
        table.add_row("mean (mIoU, mAcc)", percent(self.miou), percent(self.macc), "", style="bold")
        table.add_row("by pixels (fwIoU, pixAcc)", percent(self.fwiou), percent(self.pixacc), "")
        return table


def scores(table: Tensor | np.ndarray, classes: Sequence[str] | None = None) -> Scores:
    """Return the scores of a confusion matrix.

    Args:
        table: integers (K, K), pixels of true class [row] predicted as class [column], void left out.
        classes: K names; "0", "1", ... without them.
    """
    table = np.asarray(table.cpu() if isinstance(table, Tensor) else table).astype(np.int64)
    hit, support, predicted = np.diag(table), table.sum(1), table.sum(0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan: absent
        iou, accuracy = hit / (support + predicted - hit), hit / support
    present = support > 0
    total = int(support.sum())
    return Scores(
        table=table,
        classes=_names(classes, len(table)),
        iou=iou,
        accuracy=accuracy,
        support=support,
        miou=mean(iou),
        pixacc=int(hit.sum()) / total if total else float("nan"),
        macc=mean(accuracy[present]),
        fwiou=float((support[present] / total * iou[present]).sum()) if total else float("nan"),
    )


def count(labels: Tensor, mask: Tensor, table: Tensor | None = None) -> Tensor:
    """Count the pairs (ground truth, prediction) of any integer values, without a host synchronisation.

    No pixel is filtered out (boolean indexing is what makes the usual way slow): void has a row of its own, and so has
    every illegal value. The time does not depend on the number of classes. Sums of integers, so deterministic.

    Args:
        labels: predictions, integers (..., H, W).
        mask: ground truth, integers of the same shape.
        table: counts to add to, in place, int64 (258, 258); zeros if none.

    Returns:
        int64 (258, 258), [ground truth + 1, prediction + 1], see `BINS`.
    """
    if table is None:
        table = torch.zeros(BINS, BINS, dtype=torch.int64, device=labels.device)
    if labels.device.type == "cpu":
        for guess, truth in zip(labels.reshape(-1).split(PIECE), mask.reshape(-1).split(PIECE), strict=True):
            cell = _cell(guess, truth)
            if cell.numel() < FEW:
                one = torch.ones((), dtype=torch.int64)
                table.view(-1).scatter_add_(0, cell.long(), one.expand(cell.numel()))
            else:
                table.view(-1).add_(torch.bincount(cell, minlength=BINS * BINS))
    else:
        table += _scatter(_cell(labels, mask)).view(BINS, BINS)  # bincount would wait for the device
    return table


def _cell(labels: Tensor, mask: Tensor) -> Tensor:
    """Index int32 of each pixel's cell in the flattened counts."""
    return _clip(mask).mul_(BINS).add_(_clip(labels)).add_(BINS + 1)


def _clip(values: Tensor) -> Tensor:
    """Bring integers into -1..256 as a new int32 tensor; uint8 cannot be outside."""
    return values.int() if values.dtype == torch.uint8 else values.long().clamp(-1, 256).int()


def _scatter(cell: Tensor) -> Tensor:
    """Histogram of cell indices int32 (..., H, W) by atomic additions, image rows dealt to private tables in turn."""
    lane = torch.arange(cell.shape[-2], device=cell.device, dtype=torch.int32) % LANES
    cell = cell + (lane * BINS * BINS)[:, None]
    one = torch.ones((), dtype=torch.int32, device=cell.device)
    tables = torch.zeros(LANES * BINS * BINS, dtype=torch.int32, device=cell.device)
    tables.scatter_add_(0, cell.reshape(-1).long(), one.expand(cell.numel()))
    return tables.view(LANES, -1).sum(0)


class ConfusionMatrix(Metric):
    """One table of pixel counts over a whole set, on the device, summed over ranks.

    Args:
        num_classes: K, 1 to 255.
        classes: K names, used in `Scores.definition` and the table.
        **kwargs: passed to `torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    counts: Tensor

    def __init__(self, num_classes: int, classes: Sequence[str] | None = None, **kwargs):
        super().__init__(**kwargs)
        if not 1 <= num_classes <= IGNORE_INDEX:
            raise ValueError(
                f"num_classes is {num_classes}, but must be 1 to {IGNORE_INDEX}: labels are bytes, and the value "
                f"{IGNORE_INDEX} means ignore. Merge classes in the dataset."
            )
        self.num_classes = num_classes
        self.classes = _names(classes, num_classes)
        self.add_state("counts", torch.zeros(BINS, BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, labels: Tensor, mask: Tensor) -> None:
        """Count one image or batch, at the resolution of the ground truth.

        Nothing here waits for the device, so a value that is no class is reported by `compute`. uint8 is fastest.

        Args:
            labels: predictions 0..K-1, uint8 or another integer type, (H, W) or (B, H, W).
            mask: ground truth 0..K-1 or 255 (ignore), integers of the same shape.
        """
        if labels.shape != mask.shape or labels.ndim < 2:
            raise ValueError(
                f"Predictions have the shape {tuple(labels.shape)} and the ground truth {tuple(mask.shape)}; both must "
                "be (H, W) or (B, H, W) and equal. Resize the logits to the label, never the label to the logits."
            )
        for what, values in (("predictions", labels), ("ground truth", mask)):
            if values.is_floating_point():
                raise ValueError(
                    f"The {what} are {values.dtype}, but labels must be integers. Take the argmax of the logits first, "
                    "for example with seglight.inference.labels."
                )
        count(labels, mask, self.counts)

    def compute(self) -> Scores:
        """Return the scores of everything counted so far.

        Raises:
            ValueError: a ground-truth value was neither 0..K-1 nor 255, or a prediction was not 0..K-1.
        """
        counts = self.counts.cpu()
        last = self.num_classes - 1
        _check(
            counts.sum(1),
            [*range(self.num_classes), IGNORE_INDEX],
            f"The ground truth holds {{}}, but with {self.num_classes} classes only 0..{last} and {IGNORE_INDEX} "
            f"(ignore) are legal. Map other values to {IGNORE_INDEX} in the dataset, or check the number of classes.",
        )
        _check(
            counts.sum(0),
            range(self.num_classes),
            f"The predictions hold {{}}, but with {self.num_classes} classes only 0..{last} are legal. "
            "Check that the network has as many outputs as the metric has classes.",
        )
        return scores(counts[1 : self.num_classes + 1, 1 : self.num_classes + 1], self.classes)


def _check(pixels: Tensor, legal: Sequence[int], message: str) -> None:
    """Raise ValueError with `message` if any of `pixels` (258,) counted a value outside `legal`."""
    illegal = pixels.clone()
    illegal[torch.tensor(legal) + 1] = 0
    rows = illegal.nonzero().flatten().tolist()
    if rows:
        names = {0: "values below 0", BINS - 1: "values above 255"}
        found = [f"{names.get(row, f'the value {row - 1}')} ({illegal[row]:,} pixels)" for row in rows[:5]]
        more = f" and {len(rows) - 5} more values" if len(rows) > 5 else ""
        raise ValueError(message.format(", ".join(found) + more))


def _names(classes: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    if classes is None:
        return tuple(str(i) for i in range(num_classes))
    if len(classes) != num_classes:
        raise ValueError(f"{len(classes)} class names were given for {num_classes} classes; give one name each.")
    return tuple(classes)
