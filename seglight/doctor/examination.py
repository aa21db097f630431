"""The examination: opens what a person names, looks at every file, and collects the findings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from seglight.data.check import value_counts
from seglight.data.cocojson.document import Document
from seglight.data.dataset import InstanceDataset
from seglight.data.files import FileDataset
from seglight.data.findings import DataError, Fault, listing
from seglight.data.instance_maps import MapDataset
from seglight.doctor import objects, semantic
from seglight.doctor.case import Case, Part
from seglight.doctor.crew import each
from seglight.doctor.duplicates import thumbnail
from seglight.doctor.findings import Finding, Place, Report, below, of_faults, worst_first
from seglight.doctor.leaks import duplicate_findings
from seglight.doctor.look import Sample, look_at_file, look_at_pair
from seglight.doctor.sources import open_source
from seglight.types import IGNORE_INDEX

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Wraps an iterable of a known length with a name, and shows how far it is."""


class Examination:
    """One run over one source."""

    def __init__(self, case: Case, workers: int | None = None, progress: Progress | None = None):
        self.case, self.workers, self.progress = case, workers, progress
        self.findings = [
            replace(one, places=tuple(replace(place, name=below(place.name, case.root)) for place in one.places))
            for one in case.findings
        ]
        self.samples: dict[str, int] = {}
        self.paths: list[Any] = []
        self.thumbs: list[np.ndarray | None] = []
        self.splits: list[str] = []
        self.counts: dict[str, np.ndarray] = {}
        self.unit = "pixel"
        self.pairs: list[tuple[str, FileDataset, list[Sample]]] = []
        self.partial = False
        """Some labels are numbered otherwise, so that classes cannot be counted over all parts."""

    def run(self) -> list[Finding]:
        """All findings, worst first."""
        for part in self.case.parts:
            self.samples[part.split] = self.samples.get(part.split, 0) + len(part.data)
            if isinstance(part.data, Document):
                self._document(part)
            elif isinstance(part.data, FileDataset):
                self._pairs(part, part.data, self._classes(part) or None)
            elif isinstance(part.data, MapDataset):
                self._maps(part)
            else:
                self._samples(part)
        self.findings += semantic.undescribed(self.pairs, self.case.classes, self.case.root)
        self.findings += duplicate_findings(self.paths, self.thumbs, self.splits, self.case.root)
        classes = self.case.classes
        if classes:
            self.findings += objects.class_name_findings(classes) if self.unit == "pixel" else []
            counts = {split: values for split, values in self.counts.items() if len(values) == len(classes)}
            if not self.partial:
                self.findings += semantic.coverage(counts, classes, self.case.own, self.unit)
        shown = {one.rule for one in self.findings if one.places}
        return worst_first(one for one in self.findings if one.places or one.rule not in shown)

    def _each(self, look: Callable[[Any, int], Any], shared: Any, count: int, name: str) -> Iterator[Any]:
        found = each(look, shared, count, self.workers)
        return iter(self.progress(found, count, name) if self.progress else found)

    def _add(self, split: str, paths: Sequence[Any], thumbs: Sequence[np.ndarray | None]) -> None:
        self.paths += paths
        self.thumbs += thumbs
        self.splits += [split] * len(paths)

    def _pairs(self, part: Part, data: FileDataset, classes: tuple[str, ...] | None) -> None:
        looks = list(self._each(look_at_pair, data, len(data), part.split))
        self.findings += semantic.pair_findings(data, part.split, looks, classes, self.case.root)
        self.findings += semantic.name_findings(data, part.split, self.case.root)
        if classes and any(path is not None for path in data.mask_paths):
            self._count(part, semantic.label_counts(data, looks, len(classes)))
        self.pairs.append((part.split, data, looks))
        self._add(part.split, data.image_paths, [look.picture.thumb for look in looks])

    def _document(self, part: Part) -> None:
        document, root = part.data, self.case.root
        self.unit = "object"
        found, bad = objects.document_findings(document, part.folder, part.split, root, part.drop)
        self.findings += found
        chosen = part.chosen or {part.split: np.arange(len(document))}
        for split, images in chosen.items():
            self.counts[split] = objects.object_counts(document, images)
        if part.folder is None:
            return
        paths = objects.paths_of(document, part.folder)
        good = np.flatnonzero(~bad)
        kept = [paths[i] for i in good]
        pictures = list(self._each(look_at_file, kept, len(kept), part.split))
        self.findings += semantic.picture_findings(
            pictures, lambda index: Place(below(kept[index], root), image=kept[index]), part.split
        )
        of = {int(image): split for split, images in chosen.items() for image in images}
        for index, path, picture in zip(good.tolist(), kept, pictures, strict=True):
            self._add(of.get(index, part.split), [path], [picture.thumb])

    def _maps(self, part: Part) -> None:
        """Objects drawn as numbers: the files first, then whether the masks of a sample fit each other."""
        self.unit = "object"
        first: FileDataset = part.data.parts[0]
        before = len(self.findings)
        for data in part.data.parts:
            names = tuple(map(str, range(part.data.values_of(data, len(self.case.classes or ())))))
            looks = list(self._each(look_at_pair, data, len(data), part.split))
            self.findings += [
                one
                for one in semantic.pair_findings(data, part.split, looks, names, self.case.root)
                if one.rule not in ("mask-constant", "unlabelled", "mask-shared", "palette-differs")
            ]
            if data is first:
                self._add(part.split, data.image_paths, [look.picture.thumb for look in looks])
        if any(one.severity == "error" for one in self.findings[before:]):
            return  # masks that cannot be read have no objects
        total = np.zeros(len(self.case.classes or ()), np.int64)
        where: list[tuple[Fault, Place]] = []
        for index, found in enumerate(self._each(_objects, part.data, len(part.data), part.split)):
            if isinstance(found, str):
                path = first.mask_paths[index]
                where.append(
                    (Fault(6, found.removeprefix(f"{path}: "), str(path)), _place(first, index, self.case.root))
                )
            else:
                total += np.bincount(found, minlength=len(total))
        self.findings += of_faults([fault for fault, _ in where], [place for _, place in where], part.split)
        self.counts[part.split] = total

    def _samples(self, part: Part) -> None:
        """Datasets whose files only they can read, or that are not made of files."""
        data, split = part.data, part.split
        instances = isinstance(data, InstanceDataset)
        self.unit = "object" if instances else "pixel"
        classes = self._classes(part)
        total, wrong, thumbs = np.zeros(256, np.int64), [], []
        for index, found in enumerate(self._each(_objects if instances else _labels, data, len(data), split)):
            if isinstance(found, str):
                wrong.append((Fault(4, found, str(data.ids[index])), Place(str(data.ids[index]))))
                thumbs.append(None)
            elif instances:
                total += np.bincount(found, minlength=256)
            else:
                total += found[0]
                thumbs.append(found[1])
        self.findings += of_faults([fault for fault, _ in wrong], [place for _, place in wrong], split, unit="image")
        self._count(part, total[: len(classes)])
        if instances:
            return
        self._add(split, [f"{split}/{name}" for name in data.ids], thumbs)
        self.findings += semantic.ignored_finding(split, int(total[IGNORE_INDEX]), int(total.sum()))
        if bad := [value for value in np.flatnonzero(total).tolist() if len(classes) <= value < IGNORE_INDEX]:
            what = f"labels {listing(bad)}, but there are {len(classes)} classes, 0 to {len(classes) - 1}."
            fix = "The masks are not those of this dataset, or its classes are not all named."
            self.findings.append(Finding("error", "label-values", what, fix, (), "", (split,)))

    def _classes(self, part: Part) -> tuple[str, ...]:
        return part.classes or self.case.classes or ()

    def _count(self, part: Part, counts: np.ndarray) -> None:
        """Add to what a split has of each class, where its labels are those of the whole."""
        if part.classes in (None, self.case.classes):
            self.counts[part.split] = self.counts.get(part.split, 0) + counts
        else:
            self.partial = True


def examine(
    source: Any,
    overrides: Sequence[str] = (),
    split: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Look at every file of a dataset, decoding all of them; nothing is changed.

    Args:
        source: a datamodule, or anything of `seglight.doctor.sources.open_source`.
        overrides: options of the dataset, as on the command line.
        split: only train, val or test.
        workers: see `seglight.doctor.crew.each`.
        progress: see `Progress`.

    Raises:
        FileNotFoundError: there is no such thing, or no dataset in it.
        ValueError: it names no dataset, or an option is wrong.
    """
    begin = time.perf_counter()
    case = open_source(source, overrides, split)
    examination = Examination(case, workers, progress)
    findings = examination.run()
    name = source if isinstance(source, str) else getattr(source, "name", None) or type(source).__name__
    report = Report(str(name), case.name, case.root, case.classes or (), examination.samples, findings)
    report.seconds = time.perf_counter() - begin
    return report


def _objects(dataset: InstanceDataset, index: int) -> np.ndarray | str:
    """Labels of the objects of a sample, or what is wrong with it."""
    try:
        if isinstance(dataset, MapDataset):
            dataset.look(index)
        return dataset.objects(index).labels
    except (DataError, OSError) as error:
        return str(error)


def _labels(dataset: Any, index: int) -> tuple[np.ndarray, np.ndarray] | str:
    """int64 (256,), how often each label occurs in a sample, and its thumbnail; or what is wrong with it."""
    try:
        image, labels = dataset.read(index)
        return value_counts(labels), thumbnail(image)
    except (DataError, OSError) as error:
        return str(error)


def _place(data: FileDataset, index: int, root: str) -> Place:
    path = data.mask_paths[index]
    return Place(below(path, root), "", data.image_paths[index], path)
