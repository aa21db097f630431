"""What is examined: the splits of a dataset, and what their labels mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from seglight.data.base import Split
from seglight.doctor.findings import Finding

SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass
class Part:
    """One split: a dataset of some kind, and what its labels mean."""

    split: str
    data: Any
    """A `FileDataset`, an `InstanceDataset`, another `SemanticDataset`, or a `Document`."""
    folder: Path | None = None
    """Of the images of a `Document`; None where there are none."""
    chosen: dict[str, np.ndarray] | None = None
    """Images of a `Document` that each split has, where it holds several."""
    drop: bool = False
    """Degenerate objects of a `Document` are left out of training by option."""
    classes: tuple[str, ...] | None = None
    """Where they are not those of the case."""


@dataclass
class Case:
    """What is examined."""

    name: str
    root: str
    classes: tuple[str, ...] | None
    """None where nobody has named them yet."""
    own: bool
    """The classes are the user's, rather than those of a published dataset."""
    parts: list[Part] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    """Made on the way."""
