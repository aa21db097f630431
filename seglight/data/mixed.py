"""Several datasets as one training set: COCO with VOC, fine with coarse labels, several folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from seglight.data.archive import AnyPath, Member
from seglight.data.base import SemanticDataModule, Split
from seglight.data.cache import Cached
from seglight.data.dataset import SemanticDataset
from seglight.data.findings import DataError, listing
from seglight.types import IGNORE_INDEX

IGNORE = "ignore"
_NO_CLASS = 254  # what is no label of a part must not become one, nor vanish


class Mixed(SemanticDataModule):
    """Trains on the training splits of several datasets, and validates and tests on those of one.

    Classes are those of the dataset that validates, in its order; the others are matched by name, so their labels may
    be numbered otherwise. Names that differ need `rename`. Crops, batch size, workers and all other options of training
    are those given here; those of the parts do not count. A picture that the model is judged by may be in no part's
    training split: parts with ids of one space (`DataModule.id_space`, as VOC, SBD and PASCAL-Context) are compared by
    id, others by file.

    Args:
        parts: the datasets, by a name of your choice, which stands before the ids of their samples: "voc/2008_000002".
        repeats: how often a pass over the data shows the samples of a part, each time augmented anew: {voc: 3}.
        rename: for each part, its class names and ours, or "ignore": {coco: {couch: sofa, person: ignore}}.
        evaluate: name of the part to validate and test on. Default: the first.
    """

    def __init__(
        self,
        parts: dict[str, SemanticDataModule],
        repeats: dict[str, int] | None = None,
        rename: dict[str, dict[str, str]] | None = None,
        evaluate: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not parts:
            raise ValueError("data.parts is empty; name at least one dataset.")
        if odd := [name for name in parts if "/" in name or not name]:
            raise ValueError(f"data.parts: {listing(odd)} cannot be a name, since it stands before ids: NAME/id.")
        if odd := [name for name, part in parts.items() if not isinstance(part, SemanticDataModule)]:
            raise ValueError(f"data.parts: {listing(odd)} has no pixel labels; datasets of objects cannot be mixed.")
        evaluate = next(iter(parts)) if evaluate is None else evaluate
        for option, named in (("repeats", repeats or {}), ("rename", rename or {}), ("evaluate", [evaluate])):
            if unknown := [name for name in named if name not in parts]:
                raise ValueError(f"data.{option} names {listing(unknown)}; the parts are {listing(list(parts))}.")
        if wrong := {name: count for name, count in (repeats or {}).items() if count < 1}:
            raise ValueError(f"data.repeats: {wrong}; at least 1. Leave a part out of data.parts instead.")
        self.parts, self.evaluate = parts, evaluate
        self.repeats = {name: (repeats or {}).get(name, 1) for name in parts}
        judge = parts[evaluate]
        self.classes, self.palette, self.protocol = judge.classes, judge.palette, judge.protocol
        self.id_space = judge.id_space
        self.tables = {name: _table(name, part, self.classes, (rename or {}).get(name)) for name, part in parts.items()}

    def dataset(self, split: Split) -> SemanticDataset:
        """All parts for training, else the samples of one.

        Raises:
            DataError: a training sample of one part is one that another is judged by.
        """
        if split != "train":
            return self.parts[self.evaluate].split(split)
        data = {name: part.split("train") for name, part in self.parts.items()}
        self._refuse_leaks(data)
        counts = {name: part.num_classes for name, part in self.parts.items()}
        return MixedDataset(data, self.repeats, counts, self.tables)

    def official_scores(self, split: Split) -> Any:
        """Those of the part that validates."""
        return self.parts[self.evaluate].official_scores(split)

    def _refuse_leaks(self, data: dict[str, SemanticDataset]) -> None:
        judge = self.parts[self.evaluate]
        self._refuse_overlap(data, judge.split("val"), "validation")
        with suppress(FileNotFoundError):  # it may be missing as long as nobody tests
            self._refuse_overlap(data, judge.split("test"), "test")

    def _refuse_overlap(self, data: dict[str, SemanticDataset], samples: SemanticDataset, split: str) -> None:
        judged = _keys(self.parts[self.evaluate], samples)
        found = []
        for name, part in self.parts.items():
            keys = _keys(part, data[name])
            if both := sorted(set(keys) & set(judged)):
                names = [f"{name}/{keys[key]}" for key in both]
                found.append(f"{len(both)} samples of {name}: {listing(names, 3)}")
        if found:
            raise DataError(
                f"Mixed: the {split} split of {self.evaluate} has pictures that are trained on, so its scores would "
                f"mean nothing: {'; '.join(found)}. Choose other splits of these parts."
            )


class MixedDataset(SemanticDataset):
    """Samples of several datasets one after the other, with the labels of one.

    Args:
        data: the datasets by name.
        repeats: how often each of them is there. From the second time on ids end in "#2" and so on.
        counts: how many classes each of them has.
        tables: our label of each of their labels, uint8 (256,), or None where they are the same.
    """

    def __init__(
        self,
        data: dict[str, SemanticDataset],
        repeats: dict[str, int],
        counts: dict[str, int],
        tables: dict[str, np.ndarray | None],
    ):
        self.data, self.repeats, self.counts, self.tables = data, repeats, counts, tables
        self.spans = [(name, time) for name in data for time in range(1, repeats[name] + 1)]
        lengths = [len(data[name]) for name, _ in self.spans]
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.ids = [
            f"{name}/{one}" + (f"#{time}" if time > 1 else "") for name, time in self.spans for one in data[name].ids
        ]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One sample: image uint8 (H, W, 3) RGB and labels uint8 (H, W)."""
        name, at = self._place(index)
        return self._translated(name, *self.data[name].read(at))

    def view(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """As `read`, without copying what a part only maps."""
        name, at = self._place(index)
        return self._translated(name, *self.data[name].view(at))

    def files_of(self, index: int) -> tuple[AnyPath | None, ...]:
        """Those of the part."""
        name, at = self._place(index)
        return self.data[name].files_of(at)

    def content_id(self, index: int) -> str:
        """The id of a sample where it is first."""
        name, at = self._place(index)
        return f"{name}/{self.data[name].content_id(at)}"

    def _place(self, index: int) -> tuple[str, int]:
        """The part that a sample is from, and its index there."""
        span = int(np.searchsorted(self.starts, index, "right")) - 1
        return self.spans[span][0], index - int(self.starts[span])

    def _translated(self, name: str, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        table = self.tables[name]
        return image, mask if table is None else table[mask]

    def check(self, num_classes: int) -> None:
        """The checks of all parts.

        Raises:
            DataError: with all findings.
        """
        found = []
        for name, part in self.data.items():
            try:
                part.check(self.counts[name])
            except DataError as error:
                found.append(f"{name}: {error}")
        if found:
            raise DataError("\n".join(found))

    def fingerprint(self) -> dict[str, Any]:
        """Number of samples, and the fingerprint of each part."""
        parts = {name: {"repeats": self.repeats[name], **part.fingerprint()} for name, part in self.data.items()}
        return {"samples": len(self), "parts": parts}


def _table(
    name: str, part: SemanticDataModule, classes: Sequence[str], rename: dict[str, str] | None
) -> np.ndarray | None:
    """uint8 (256,), our label of each of the part's labels; None if they are the same."""
    rename = rename or {}
    if unknown := [theirs for theirs in rename if theirs not in part.classes]:
        raise ValueError(
            f"data.rename.{name}: {listing(unknown)} is no class of {name}, which has {listing(part.classes, 30)}."
        )
    ours = [rename.get(theirs, theirs) for theirs in part.classes]
    strange = [
        (theirs, our)
        for theirs, our in zip(part.classes, ours, strict=True)
        if our not in classes and (our != IGNORE or theirs not in rename)
    ]
    if strange:
        names = [theirs if theirs == our else f"{theirs} (renamed {our})" for theirs, our in strange]
        raise ValueError(
            f"data.parts.{name} has classes that the others do not know: {listing(names, 30)}. Say in "
            f'data.rename.{name} what each is called here, or "{IGNORE}". The classes here: {listing(classes, 30)}.'
        )
    if tuple(ours) == tuple(classes):
        return None
    table = np.full(256, _NO_CLASS, np.uint8)
    table[IGNORE_INDEX] = IGNORE_INDEX
    table[: len(ours)] = [IGNORE_INDEX if our not in classes else classes.index(our) for our in ours]
    return table


def _keys(part: SemanticDataModule, data: SemanticDataset) -> dict[tuple[str, ...], str]:
    """What tells which picture a sample shows, and the id of the sample; nothing for generated pictures."""
    data = data.dataset if isinstance(data, Cached) else data
    if isinstance(data, MixedDataset):
        inner = {name: _keys(one, data.data[name]) for name, one in part.parts.items()}
        return {key: f"{name}/{one}" for name, keys in inner.items() for key, one in keys.items()}
    if part.id_space:
        return {(part.id_space, one.lstrip("0")): one for one in data.ids}  # COCO's ids, and its names of 12 digits
    paths = getattr(data, "image_paths", None)
    return {_file(path): one for path, one in zip(paths, data.ids, strict=True)} if paths else {}


def _file(path: AnyPath) -> tuple[str, ...]:
    """The same for all paths that lead to a file, whether relative or by links."""
    if isinstance(path, Member):
        return "member", os.path.realpath(path.archive.path), path.archive.names[path.place]
    with suppress(FileNotFoundError):
        state = path.stat()
        return "file", str(state.st_dev), str(state.st_ino)
    return "missing", str(path)
