"""The scores of a benchmark beyond mIoU or COCO's AP, computed by `seglight test` and `seglight validate`.

A datamodule offers them with `official_scores(split)`. They are left out while fitting, where they would cost time.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from rich.table import Table


class OfficialResult(Protocol):
    """What comes out. The scores lie in 0..1, nan where there is nothing to score."""

    name: str
    """Of the benchmark, part of logged names and file names."""

    @property
    def definition(self) -> str:
        """One sentence that says what the numbers are."""
        ...

    def as_dict(self, prefix: str) -> dict[str, float]:
        """Under their logged names, `{prefix}/{name}_...`, and `{prefix}_{name}/...` where there is one per class."""
        ...

    def as_table(self) -> Table:
        """A rich table, in percent."""
        ...

    def per_class(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of a table with a line per class; None where there is no number."""
        ...


class OfficialScores(Protocol):
    """Gathers what was predicted, image by image, on any number of ranks."""

    def update(self, image_id: str, prediction: Any, truth: Any) -> None:
        """Add one image, once over all ranks.

        Args:
            image_id: as in the dataset, from which the scores read whatever else they need.
            prediction: a label map, integers (H, W); or of an instance model `labels`, `scores` and `rles`.
            truth: as in an evaluation batch: labels (H, W) or a `seglight.types.InstanceTruth`.
        """
        ...

    def compute(self) -> OfficialResult:
        """The scores of all images of all ranks; every rank must call it."""
        ...


def of_trainer(trainer: Trainer, split: str) -> OfficialScores | None:
    """What the datamodule of a `test` or `validate` offers for a split; None for others and while fitting."""
    if trainer.state.fn not in ("test", "validate"):
        return None
    offer = getattr(getattr(trainer, "datamodule", None), "official_scores", None)
    return None if offer is None else offer(split)


def protocol_of(trainer: Trainer) -> str:
    """What the datamodule says about how its benchmark scores; "" without one."""
    return getattr(getattr(trainer, "datamodule", None), "protocol", "")


def percent(value: float | None, digits: int = 1) -> str:
    """For a table: a dash where there is no number."""
    return "–" if value is None or np.isnan(value) else f"{100 * value:.{digits}f}"


def or_none(value: float) -> float | None:
    """For JSON and CSV, where nan is no number."""
    return None if np.isnan(value) else float(value)


def mean(values: np.ndarray) -> float:
    """Over what is not nan; nan without any."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def write_csv(path: str | Path, result: OfficialResult) -> None:
    """Write the table per class; numbers in full, empty where there is none."""
    columns, rows = result.per_class()
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
