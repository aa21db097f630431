"""What the doctor finds: one record per kind of fault, with its places and its remedy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from seglight.data.findings import Fault

Severity = Literal["error", "warning", "note"]
ORDER: tuple[Severity, ...] = ("error", "warning", "note")
"""Errors stop or spoil a training; warnings cost accuracy or honest scores; notes are worth knowing."""

_NAMES = (
    ("end marker", "truncated"),
    ("missing. Copy", "missing"),
    ("cannot be read", "unreadable"),
    ("an empty file", "empty-file"),
    ("not an image", "not-an-image"),
    ("cannot be decoded", "undecodable"),
    ("its pixels are not those", "undecodable"),
    ("not a readable MATLAB", "undecodable"),
    ("pages in one file", "animated"),
    ("EXIF orientation", "exif-rotation"),
    ("a JPEG changes values", "jpeg-mask"),
    ("-bit grey", "mask-bits"),
    ("but a mask has one channel", "mask-colours"),
    ("colours that are not in the colour map", "unknown-colours"),
    ("bits per channel", "bit-depth"),
    ("of another size than the json", "image-size"),
    ("differ in size", "sizes-differ"),
    ("the masks hold 0 and 255", "binary-mask"),
    ("in the masks; with", "label-values"),
    ("the box lies outside", "box-outside"),
    ("the box leaves", "box-outside"),
    ("the box has no", "box-empty"),
    ("the mask has no pixel", "mask-empty"),
    ("the area is 0", "area"),
    ("its file is listed for another", "image-twice"),
    ("its id is that of another image", "image-id-twice"),
    ("their id is that of another annotation", "annotation-id-twice"),
    ("their image is not in the list", "image-unlisted"),
    ("their category is not listed", "category-unlisted"),
    ("an RLE", "rle"),
    ("'counts' of an RLE", "rle"),
    ("a polygon with", "polygon"),
    ("'segmentation'", "polygon"),
    ("'bbox' must", "box-entry"),
    ("NaN or infinity", "not-finite"),
    ("have no category", "no-category"),
    ("training samples are also in", "leak"),
    ("without a mask", "unpaired"),
    ("without an image", "unpaired"),
    ("more than once", "listed-twice"),
    ("no samples", "empty-split"),
    ("holds no usable image", "empty-split"),
    ("There is no", "not-there"),
    ("lists no category", "no-category"),
    ("categories with the same", "category-twice"),
    ("no COCO instance file", "json"),
    ("is broken or cut", "json"),
    ("See https://cocodataset", "json-entry"),
    ("damaged inside", "damaged"),
    ("that belong to no pixel", "damaged"),
    ("transparent pixels", "transparent"),
    ("in CMYK", "cmyk"),
    ("one colour only", "one-colour"),
    ("ignored wholly", "mask-ignored"),
    ("pixels high or wide", "too-small"),
    ("as long as wide", "elongated"),
    ("million pixels", "too-large"),
    ("too many pixels", "too-large"),
    ("no text in UTF-8", "encoding"),
    ("which one is meant", "named-alike"),
)
"""Part of a text, and the name of its rule for machines: the texts stay where the checks are made."""


@dataclass(frozen=True)
class Place:
    """Where a finding was made."""

    name: str
    """A file, seen from the dataset's folder, or an annotation, a class..."""
    detail: str = ""
    """What is particular about this one."""
    image: Any = None
    """Path of a picture to show, if there is one."""
    mask: Any = None
    """Path of its mask, or of a picture to be compared with."""
    box: tuple[float, float, float, float] | None = None
    """x1, y1, x2, y2 of what is meant in the picture."""

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


@dataclass(frozen=True)
class Finding:
    """One kind of fault of a dataset."""

    severity: Severity
    rule: str
    """Name of the rule, for machines: "truncated"."""
    what: str
    """What is wrong, to be read after "3 files in train: "."""
    fix: str
    """What to do about it."""
    places: tuple[Place, ...] = ()
    unit: str = "file"
    """What the places are, in the singular; "" where they only illustrate."""
    splits: tuple[str, ...] = ()
    block: str = field(default="", compare=False)
    """Lines of YAML to paste into the experiment."""

    @property
    def head(self) -> str:
        """`3 files in train: what is wrong.`"""
        splits = " and ".join(self.splits)
        if not self.unit or not self.places:
            return f"{splits}: {self.what}" if splits else self.what
        plural = {"class": "classes", "category": "categories"}.get(self.unit, self.unit + "s")
        count = f"{len(self.places):,} {self.unit if len(self.places) == 1 else plural}"
        return f"{count}{' in ' + splits if splits else ''}: {self.what}"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = {"severity": self.severity, "rule": self.rule, "splits": list(self.splits), "what": self.what}
        found |= {"fix": self.fix, "count": len(self.places), "unit": self.unit, "where": [*map(str, self.places)]}
        return found | {"yaml": self.block} if self.block else found


@dataclass
class Report:
    """All that was found out about one source."""

    source: str
    name: str
    """What the dataset is: a class, or what its files look like."""
    root: str
    """The folder that files are named relative to."""
    classes: tuple[str, ...]
    samples: dict[str, int]
    """Examined, by split."""
    findings: list[Finding] = field(default_factory=list)
    """Worst first."""
    seconds: float = 0.0

    def count(self, severity: Severity) -> int:
        """Findings of one severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def status(self, strict: bool = False) -> int:
        """Exit status: 1 with errors (or warnings if strict), else 0."""
        return int(bool(self.count("error") or (strict and self.count("warning"))))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        counts = {f"{severity}s": self.count(severity) for severity in ORDER}
        found = {"source": self.source, "dataset": self.name, "root": self.root, "classes": list(self.classes)}
        found |= {"samples": self.samples, **counts, "seconds": round(self.seconds, 2)}
        return found | {"findings": [finding.as_dict() for finding in self.findings]}


def rule_of(text: str) -> str:
    """The name of the rule that a text of the checks speaks of."""
    return next((name for part, name in _NAMES if part in text), "fault")


def told(text: str) -> tuple[str, str]:
    """A text of the checks as what is wrong and what to do."""
    what, _, fix = text.strip().partition(". ")
    return what.rstrip(".") + ".", fix


def of_text(
    text: str, places: Iterable[Place] = (), split: str = "", severity: Severity = "error", unit: str = "file"
) -> Finding:
    """A finding that the checks before training also make, in their words."""
    what, fix = told(text)
    return Finding(severity, rule_of(text), what, fix, tuple(places), unit, (split,) if split else ())


def of_faults(
    faults: Sequence[Fault], places: Sequence[Place], split: str, severity: Severity = "error", unit: str = "file"
) -> list[Finding]:
    """One finding per rule, in the order of their ranks."""
    groups: dict[tuple[int, str], list[Place]] = {}
    for fault, place in sorted(zip(faults, places, strict=True), key=lambda pair: pair[0].rank):
        groups.setdefault((fault.rank, fault.rule), []).append(place)
    return [of_text(rule, found, split, severity, unit) for (_, rule), found in groups.items()]


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sorted by severity, then by the number of places; equal ones of several splits become one."""
    merged: dict[tuple[str, ...], Finding] = {}
    for one in findings:
        key = (one.severity, one.rule, one.what, one.fix, one.unit, one.block)
        if key in merged:
            before = merged[key]
            splits = tuple(dict.fromkeys(before.splits + one.splits))
            merged[key] = replace(before, places=tuple(dict.fromkeys(before.places + one.places)), splits=splits)
        else:
            merged[key] = one
    return sorted(merged.values(), key=lambda one: (ORDER.index(one.severity), -len(one.places)))


def below(path: Any, root: str) -> str:
    """A path as seen from a folder."""
    return str(path).removeprefix(root + os.sep) if root else str(path)
