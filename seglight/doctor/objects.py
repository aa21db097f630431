"""What is wrong with annotated objects: entries of a json file, boxes and outlines against each other, sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seglight.data.cocojson.check import degenerate, image_faults
from seglight.data.cocojson.document import Document, pixels
from seglight.data.findings import Fault
from seglight.data.packed import Strings
from seglight.doctor.findings import Finding, Place, below, of_faults

TINY = 16.0  # pixels of area, 4x4
_SLACK = 2.0  # pixels that a box may differ from its outline: tools round and pad
_SHARE = 0.1  # and the share of its size
_AREA = 0.3  # share that an area may differ from that of the outline; parts may overlap


def document_findings(
    document: Document, folder: Path | None, split: str, root: str, drop: bool = False
) -> tuple[list[Finding], np.ndarray]:
    """Findings of one json file, and bool (N,) which of its image files are broken by their header."""
    show = _Show(document, folder, root)
    bad = np.zeros(len(document), bool)
    image_found: list[Fault] = []
    if folder is not None:
        bad, image_found = image_faults(document, folder)
    entry_found = list(document.faults)
    findings = of_faults(image_found, [show.of(fault) for fault in image_found], split, unit="image")
    findings += of_faults(entry_found, [show.of(fault) for fault in entry_found], split, unit="case")
    if len(document.packed.ids):
        scale = _scale(document, show, split)
        findings += scale or _outlines(document, show, split, drop)
        findings += _numbers(document, show, split)
    findings += class_name_findings(document.categories, split)
    if folder is not None:
        findings += _unlisted(document, folder, split, root)
    return findings, bad


def object_counts(document: Document, images: np.ndarray | None = None) -> np.ndarray:
    """int64 (K,), objects of each class that are no crowd, in some of the images."""
    data = document.packed
    chosen = ~data.iscrowd
    if images is not None:
        chosen = chosen & np.isin(_of_image(document), images)
    return np.bincount(data.labels[chosen], minlength=len(document.categories)).astype(np.int64)


def paths_of(document: Document, folder: Path) -> list[Path]:
    """The image files, in order."""
    names = Strings(document.packed.names, document.packed.name_starts)
    return [folder / name for name in names]


class _Show:
    """Places of images and annotations by their numbers."""

    def __init__(self, document: Document, folder: Path | None, root: str):
        self.document, self.folder, self.root = document, folder, root
        self.names = Strings(document.packed.names, document.packed.name_starts)

    def path(self, image: int) -> Path | None:
        return None if self.folder is None else self.folder / self.names[image]

    def annotation(self, index: int, detail: str = "") -> Place:
        data = self.document.packed
        image = int(np.searchsorted(data.first, index, "right") - 1)
        label = self.document.categories[data.labels[index]]
        name = f"annotation {data.ids[index]} of {self.names[image]}"
        box = tuple(data.boxes[index].tolist())
        return Place(name, f"{label}, {detail}" if detail else label, self.path(image), box=box)

    def of(self, fault: Fault) -> Place:
        if self.folder is not None and fault.where.startswith(str(self.folder)):
            name, _, detail = fault.where.partition(" (image ")
            return Place(below(name, self.root), detail.partition("): ")[2], Path(name))
        found = re.search(r"\(image (-?\d+)\)", fault.where)
        image = np.flatnonzero(self.document.packed.image_ids == int(found[1])) if found else ()
        return Place(fault.where, "", self.path(int(image[0])) if len(image) else None)


def _of_image(document: Document) -> np.ndarray:
    return np.repeat(np.arange(len(document)), np.diff(document.packed.first))


def _extents(document: Document) -> np.ndarray:
    """float64 (A, 4), x1 y1 x2 y2 of the outlines; NaN where there is none."""
    from pycocotools import mask as coco

    data = document.packed
    found = np.full((len(data.ids), 4), np.nan)
    counts = np.diff(data.parts)[data.rows]
    if len(data.points):
        corners = data.points.reshape(-1, 2)
        starts = data.part_starts[:-1] // 2
        low, high = np.minimum.reduceat(corners, starts), np.maximum.reduceat(corners, starts)
        begins = np.flatnonzero(np.diff(data.parts) > 0)
        rows_low = np.minimum.reduceat(low, data.parts[begins])
        rows_high = np.maximum.reduceat(high, data.parts[begins])
        place = np.searchsorted(begins, data.rows)
        some = counts > 0
        found[some, :2], found[some, 2:] = rows_low[place[some]], rows_high[place[some]]
    for index in np.flatnonzero(counts == 0).tolist():
        outline = document.outline(index)
        if isinstance(outline, dict):
            x, y, width, height = coco.toBbox(outline)
            found[index] = x, y, x + width, y + height
    return found


def _areas(document: Document) -> np.ndarray:
    """float64 (A,), area inside the polygons, summed over the parts; pixels of run lengths."""
    data = document.packed
    found = np.zeros(len(data.ids))
    counts = np.diff(data.parts)[data.rows]
    if len(data.points):
        corners = data.points.reshape(-1, 2)
        first, last = data.part_starts[:-1] // 2, data.part_starts[1:] // 2 - 1
        following = np.roll(corners, -1, 0)
        following[last] = corners[first]
        twice = np.add.reduceat(corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0], first)
        sums = np.concatenate([[0.0], np.cumsum(np.abs(twice) / 2)])
        found = sums[data.parts[data.rows + 1]] - sums[data.parts[data.rows]]
    runs = np.flatnonzero(counts == 0)
    found[runs] = pixels(document, runs)
    return found


def _scale(document: Document, show: _Show, split: str) -> list[Finding]:
    """Outlines given as shares of the image."""
    data = document.packed
    extents = _extents(document)
    side = np.stack([data.widths, data.heights], 1)[_of_image(document)].max(1)
    small = (np.nan_to_num(extents[:, 2:], nan=2.0).max(1) <= 1.0) & (side > 8)
    if not len(small) or small.mean() < 0.5:
        return []
    what = "outlines between 0 and 1: shares of the image's size, where pixels belong."
    fix = "Multiply x by the width and y by the height of the image, in outlines and boxes."
    places = tuple(show.annotation(i) for i in np.flatnonzero(small))
    return [Finding("error", "shares", what, fix, places, "annotation", (split,))]


def _outlines(document: Document, show: _Show, split: str, drop: bool) -> list[Finding]:
    """Boxes, areas and outlines that do not fit each other or the image."""
    data = document.packed
    extents, boxes = _extents(document), data.boxes.astype(np.float64)
    given = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)  # as in the file
    slack = _SLACK + _SHARE * np.nan_to_num(extents[:, 2:] - extents[:, :2]).max(1, initial=0)
    known = np.isfinite(extents).all(1)
    mismatch = known & (np.abs(boxes - np.nan_to_num(extents)).max(1) > slack)
    corners = mismatch & (np.abs(given - np.nan_to_num(extents)).max(1) <= slack)
    findings: list[Finding] = []
    bad, faults = degenerate(document)
    if corners.sum() > 0.5 * max(1, mismatch.sum()):
        what = "the box holds two corners, x1 y1 x2 y2, where COCO has x, y, width, height."
        fix = "Write the box as [x1, y1, x2 - x1, y2 - y1], or leave bbox out: it is then made of the outline."
        findings.append(_of(show, corners, "error", "box-corners", what, fix, split))
        faults = [fault for fault in faults if "the box" not in fault.rule]
        mismatch &= ~corners
    severity = "note" if drop else "error"
    places = [show.of(fault) for fault in faults]
    by_id = {int(number): index for index, number in enumerate(data.ids)}
    for i, fault in enumerate(faults):
        if (found := re.match(r"annotation (-?\d+) ", fault.where)) and int(found[1]) in by_id:
            index = by_id[int(found[1])]
            places[i] = show.annotation(index, f"box {_four(given[index])}")
    findings += of_faults(faults, places, split, severity, "annotation")
    mismatch &= ~bad & ~data.iscrowd
    if mismatch.any():
        what = "the box does not fit the outline."
        fix = "One of them is of another object or in other units. Make the box anew, or leave bbox out."
        details = {i: f"box {_four(boxes[i])}, outline {_four(extents[i])}" for i in np.flatnonzero(mismatch)}
        findings.append(_of(show, mismatch, "warning", "box-outline", what, fix, split, details))
    area = _areas(document)
    wrong = (np.abs(area - data.area) > np.maximum(10, _AREA * np.maximum(area, data.area))) & ~bad & ~data.iscrowd
    if wrong.any():
        suspects = np.flatnonzero(wrong)  # polygons may overlap or be drawn around holes: count the pixels
        counted = pixels(document, suspects)
        real = np.abs(counted - data.area[suspects]) > np.maximum(10, _AREA * np.maximum(counted, data.area[suspects]))
        wrong[suspects[~real]] = False
        details = {i: f"area {data.area[i]:g}, mask {n}" for i, n in zip(suspects, counted, strict=True)}
    if wrong.any():
        what = "the area is not that of the mask, so scores by size (small, medium, large) may count it wrongly."
        fix = "Leave 'area' out: it is then counted from the outline."
        findings.append(_of(show, wrong, "warning", "area-outline", what, fix, split, details))
    return findings


def _numbers(document: Document, show: _Show, split: str) -> list[Finding]:
    """Ids that begin with 0, objects annotated twice, tiny ones, images without objects."""
    data = document.packed
    findings = []
    if (data.ids == 0).any():
        what = "the id is 0, which COCO's evaluation takes for 'no match': it counts as a miss even when it is found."
        fix = "Number the annotations from 1."
        findings.append(_of(show, data.ids == 0, "warning", "annotation-id-0", what, fix, split))
    if 0 in document.category_ids:
        name = document.categories[document.category_ids.index(0)]
        what = "the id is 0, which other tools take for background. It is read correctly here."
        fix = "Number categories from 1 if others read the file, too."
        findings.append(Finding("note", "category-id-0", what, fix, (Place(name),), "category", (split,)))
    key = np.concatenate(
        [_of_image(document)[:, None], data.labels[:, None], np.round(data.boxes * 10).astype(np.int64)], 1
    )
    _, first, inverse, counts = np.unique(key, axis=0, return_index=True, return_inverse=True, return_counts=True)
    again = (counts[inverse.ravel()] > 1) & (first[inverse.ravel()] != np.arange(len(key))) & ~data.iscrowd
    if again.any():
        what = "there twice, with the same class and box: a perfect detector finds it once."
        findings.append(_of(show, again, "warning", "object-twice", what, "Remove the copies.", split))
    area = np.where(data.area > 0, data.area, np.inf)
    tiny = (area < TINY) & ~data.iscrowd
    if tiny.any():
        share = 100 * tiny.mean()
        what = f"smaller than {TINY:g} pixels ({share:.1f} % of all): hardly a cell of any feature map."
        fix = "Look whether they are meant. To learn them, train at a larger size (data.short_side)."
        findings.append(_of(show, tiny, "note", "tiny", what, fix, split))
    empty = np.flatnonzero(np.diff(data.first) == 0)
    if len(empty):
        most = len(empty) > 0.5 * len(document)
        what = "without an object. " + ("That is most of them." if most else "Training leaves them out.").strip()
        places = tuple(Place(show.names[i], "", show.path(int(i))) for i in empty)
        fix = "Look whether annotations were lost." if most else "Fine if nothing is in them (data.skip_empty)."
        findings.append(Finding("warning" if most else "note", "no-object", what, fix, places, "image", (split,)))
    return findings


def class_name_findings(classes: Sequence[str], split: str = "") -> list[Finding]:
    """Class names that look like one to a reader."""
    plain = [" ".join(name.lower().split()) for name in classes]
    double = tuple(Place(repr(name)) for name, key in zip(classes, plain, strict=True) if plain.count(key) > 1)
    if not double:
        return []
    what = "names that differ in case or blanks only: probably one class."
    return [Finding("warning", "class-names", what, "Merge them in the annotations.", double, "class",
                    (split,) if split else ())]  # fmt: skip


def _unlisted(document: Document, folder: Path, split: str, root: str) -> list[Finding]:
    """Image files that the json does not list."""
    from seglight.data.folder import IMAGES

    listed = {str(path) for path in paths_of(document, folder)}
    others = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGES)
    places = tuple(Place(below(path, root), image=path) for path in others if str(path) not in listed)
    if not places:
        return []
    fix = "Fine if the json is a part of the dataset; else annotations are missing."
    return [Finding("note", "image-not-listed", "not in the json, so never used.", fix, places, "image", (split,))]


def _of(
    show: _Show,
    wrong: np.ndarray,
    severity: Any,
    rule: str,
    what: str,
    fix: str,
    split: str,
    details: dict[int, str] | None = None,
) -> Finding:
    which: Iterable[int] = np.flatnonzero(wrong).tolist()
    places = tuple(show.annotation(i, (details or {}).get(i, "")) for i in which)
    return Finding(severity, rule, what, fix, places, "annotation", (split,))


def _four(values: np.ndarray) -> str:
    return " ".join(f"{value:g}" for value in np.round(values, 1))
