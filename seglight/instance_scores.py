"""The scores of instance segmentation, as tables, names and curves; `seglight.detection_metrics` computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seglight.official import or_none, percent

if TYPE_CHECKING:
    from rich.table import Table

IOUS = np.linspace(0.5, 0.95, 10)
"""IoU from which on a detection counts as the object; AP and AR are means over these."""
RECALLS = np.linspace(0, 1, 101)
"""Where precision is read off."""
SIZES = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
"""Pixels of the annotated area, both ends included, by the letter that follows AP or AR."""


@dataclass(eq=False)
class Part:
    """Scores of the masks, or of the boxes. float64, 0..1; nan where there is no object to be found."""

    values: dict[str, float]
    """AP, AP50, AP75, APs, APm, APl, AR1, ..., ARs, ARm, ARl: `InstanceScores.definitions` says what each is."""
    precision: np.ndarray
    """(10, 101, K) at the IoUs `IOUS` and recalls `RECALLS`, objects of all sizes: a precision-recall curve each."""
    ap: np.ndarray
    """(K,), AP of each class."""
    ap50: np.ndarray
    """(K,)"""
    ar: np.ndarray
    """(K,), AR of each class with the most detections allowed."""


@dataclass(eq=False)
class InstanceScores:
    """Scores of a whole set, by COCO's rules (Lin et al. 2014; cocoapi), the same on every rank."""

    classes: tuple[str, ...]
    """K names; ("object",) if classes were not told apart."""
    limits: tuple[int, ...]
    """Detections of a class in an image that may count, best first; see `definitions`."""
    masks: Part | None
    """None if only boxes were given."""
    boxes: Part
    objects: np.ndarray
    """int64 (K,), annotated objects without crowds."""
    images: int
    agnostic: bool = False

    @property
    def main(self) -> Part:
        """The masks' scores, or those of the boxes if there are no masks."""
        return self.boxes if self.masks is None else self.masks

    @property
    def precision(self) -> np.ndarray:
        """`Part.precision` of `main`, for precision-recall plots over `RECALLS`."""
        return self.main.precision

    @property
    def definition(self) -> str:
        """One sentence that says what AP means here and which classes it leaves out."""
        absent = [name for name, count in zip(self.classes, self.objects, strict=True) if not count]
        what = "all classes taken as one" if self.agnostic else f"{self._counted} of {len(self.classes)} classes"
        text = (
            f"{'Box' if self.masks is None else 'Mask'} AP over {what} and {self.images} images, COCO's rules: mean "
            f"over IoU 0.50 to 0.95 of the precision at 101 recalls, at most {ap_limit(self.limits)} detections per "
            "image and class, crowds neither found nor missed"
        )
        if absent and not self.agnostic:
            more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
            text += f"; classes without objects left out: {', '.join(absent[:10])}{more}"
        return text

    @property
    def headline(self) -> dict[str, float]:
        """The numbers of a log line, the one that selects checkpoints first."""
        keys = [f"AR{self.limits[-1]}"] if self.agnostic else ["AP", "AP50"]
        return {key: self.main.values[key] for key in keys}

    def per_class(self) -> tuple[list[str], list[list]]:
        """Columns and rows of a table with a line per class; None where there is no number."""
        numbers = zip(self.classes, self.main.ap, self.main.ap50, self.main.ar, self.objects, strict=True)
        return (
            ["class", "AP", "AP50", f"AR{self.limits[-1]}", "objects"],
            [[name, *map(or_none, values), int(n)] for name, *values, n in numbers],
        )

    figure = "precision_recall"
    """Name of the picture that `draw` makes."""

    def draw(self, path: str | Path) -> None:
        """Draw precision over recall as a PNG."""
        from seglight import visualize_objects

        visualize_objects.precision_recall_png(path, self)

    @property
    def definitions(self) -> dict[str, str]:
        """What each number is, by its name."""
        return definitions(self.limits)

    @property
    def _counted(self) -> int:
        return int((self.objects > 0).sum())

    def as_dict(self, prefix: str = "val") -> dict[str, float]:
        """Return the scores under their logged names: `val/AP` ..., `val/box_AP` ..., and `val_class/<name>`, its AP.

        Without masks there are only the `box_` names. Classes without objects have no entry; a mean over nothing, such
        as APs of a set without small objects, is nan.
        """
        out = {} if self.masks is None else {f"{prefix}/{name}": v for name, v in self.masks.values.items()}
        out.update({f"{prefix}/box_{name}": v for name, v in self.boxes.values.items()})
        if not self.agnostic:
            pairs = zip(self.classes, self.main.ap, strict=True)
            out.update({f"{prefix}_class/{name}": float(v) for name, v in pairs if not np.isnan(v)})
        return out

    def as_table(self) -> Table:
        """Return a rich table with a line per class, in order up to 30 classes, else worst first. In percent."""
        from rich.table import Table
        from rich.text import Text  # names as they are: square brackets in strings are styles

        names, part = self.classes, self.main
        order = np.arange(len(names)) if len(names) <= 30 else np.argsort(part.ap, kind="stable")  # nan goes last
        table = Table(caption=Text(self.definition, style="table.caption"), caption_justify="left")
        most = f"AR{self.limits[-1]}"
        for title in ("class", "AP", "AP50", most, "objects"):
            table.add_column(title, justify="left" if title == "class" else "right")
        for i in order:
            numbers = (part.ap[i], part.ap50[i], part.ar[i])
            table.add_row(Text(names[i]), *map(percent, numbers), f"{self.objects[i]:,}")
        table.add_section()
        for name, one in (("masks", self.masks), ("boxes", self.boxes)):
            if one is not None:
                numbers = [percent(one.values[key]) for key in ("AP", "AP50", most)]
                style = "bold" if one is part else None
                table.add_row(f"mean, {name}", *numbers, f"{self.objects.sum():,}", style=style)
        return table

    def as_summary(self) -> Table:
        """Return a rich table with every number, of masks and boxes, beside its definition. In percent."""
        from rich.table import Table
        from rich.text import Text

        table = Table(caption=Text(self.definition, style="table.caption"), caption_justify="left")
        parts = {name: part for name, part in (("masks", self.masks), ("boxes", self.boxes)) if part is not None}
        table.add_column("score")
        for name in parts:
            table.add_column(name, justify="right")
        table.add_column("what it is", overflow="fold")
        for name, text in self.definitions.items():
            table.add_row(name, *(percent(part.values[name]) for part in parts.values()), text)
        return table


def definitions(limits: Sequence[int] = (1, 10, 100)) -> dict[str, str]:
    """Return what each number is, by its name, in the order of reports.

    Args:
        limits: detections of a class in an image that may count. AP is taken at 100 if that is among them, as COCO
            does, else at the highest; recalls by size at the highest.
    """
    few, most = ap_limit(limits), limits[-1]
    sizes = {"s": "below 32 x 32 pixels", "m": "of 32 x 32 to 96 x 96 pixels", "l": "above 96 x 96 pixels"}
    precision = "area under the precision-recall curve, mean over classes"
    out = {
        "AP": f"{precision} and IoU 0.50:0.05:0.95, at most {few} detections per image and class",
        "AP50": f"{precision}, IoU 0.50",
        "AP75": f"{precision}, IoU 0.75",
    }
    out |= {f"AP{letter}": f"AP of objects {text} of annotated area" for letter, text in sizes.items()}
    recall = "share of the objects found, mean over classes and IoU 0.50:0.05:0.95"
    out |= {f"AR{limit}": f"{recall}, at most {limit} detections per image and class" for limit in limits}
    return out | {f"AR{letter}": f"AR{most} of objects {text} of annotated area" for letter, text in sizes.items()}


def ap_limit(limits: Sequence[int]) -> int:
    """Return the limit that AP is taken at: 100 as in COCO, or the highest if 100 is none of them."""
    return 100 if 100 in limits else limits[-1]
