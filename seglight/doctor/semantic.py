"""What is wrong with images and masks: files, pairs, label values, classes."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from seglight.data.check import label_faults
from seglight.data.findings import Fault
from seglight.doctor.findings import Finding, Place, below, of_faults, of_text
from seglight.doctor.look import Picture, Sample
from seglight.doctor.values import Advice, colour_advice, palette_conflicts, value_advice
from seglight.types import IGNORE_INDEX

if TYPE_CHECKING:
    from seglight.data.files import FileDataset

SMALL, LONG, LARGE = 32, 6.0, 64_000_000  # pixels of a side, ratio of the sides, pixels
RARE = 1e-4  # share of the labelled pixels
SHARED = 200  # pictures of one mask that each of the others is compared with
_ALL_IGNORED = "ignored wholly (every pixel is 255), so there is nothing to learn from or to be judged by."


def pair_findings(
    data: FileDataset, split: str, looks: Sequence[Sample], classes: tuple[str, ...] | None, root: str
) -> list[Finding]:
    """Findings of one split; `classes` is None where they have no names yet."""
    places = [_Places(data, index, root) for index in range(len(data))]
    faults, where = [], []
    for place, look in zip(places, looks, strict=True):
        for fault in _kept(look, data, place.index):
            faults.append(fault)
            where.append(place.of(fault, look))
    findings = of_faults(faults, where, split)
    if any(look.colours for look in looks):
        findings = [finding for finding in findings if finding.rule != "mask-colours"]  # see `undescribed`
    findings += picture_findings([look.picture for look in looks], lambda index: places[index].image(), split)
    if classes is not None:
        findings += _values(data, split, looks, classes, places)
    findings += _masks(split, looks, places, data)
    findings += palette_conflicts(
        [(place.mask, look.palette) for place, look in zip(places, looks, strict=True)], split
    )
    return findings


def undescribed(
    parts: Sequence[tuple[str, FileDataset, Sequence[Sample]]], classes: tuple[str, ...] | None, root: str
) -> list[Finding]:
    """What masks hold that nobody has described yet, over all splits, because one seldom has every class.

    Args:
        parts: split, dataset and what was seen of each.
        classes: names; None if there are none, and every mask needs a description. Else only those that show colours
            where numbers belong.
        root: that files are named relative to.
    """
    findings = []
    seen = [(split, _Places(data, i, root), look) for split, data, looks in parts for i, look in enumerate(looks)]
    if coloured := [one for one in seen if one[2].colours]:
        advice = colour_advice([look.colours for _, _, look in coloured], classes)
        findings.append(_described(advice, "mask-colours", coloured))
    if numbered := [one for one in seen if one[2].counts is not None and classes is None]:
        looks = [look for _, _, look in numbered]
        advice = value_advice(_total(looks), _palette(looks), None)
        findings.append(_described(advice, advice.rule, numbered))
    return findings


def _described(advice: Advice, rule: str, found: Sequence[tuple[str, _Places, Sample]]) -> Finding:
    splits = tuple(dict.fromkeys(split for split, _, _ in found))
    places = tuple(place.mask() for _, place, _ in found)
    return Finding("error", rule, advice.what, advice.fix, places, "mask", splits, advice.block)


def picture_findings(pictures: Sequence[Picture], place_of: Callable[[int], Place], split: str) -> list[Finding]:
    """Findings about image files: what decoding showed, and sizes that are out of the ordinary."""
    groups: dict[tuple[str, str], list[Place]] = defaultdict(list)
    for index, picture in enumerate(pictures):
        for severity, texts in (("error", picture.errors), ("warning", picture.warnings)):
            for text in texts:
                groups[severity, text].append(place_of(index))
        if picture.size is None:
            continue
        width, height = picture.size
        if min(width, height) >= SMALL and max(width, height) <= LONG * min(width, height) and width * height <= LARGE:
            continue
        sized = replace(place_of(index), detail=f"{width}x{height}")
        if min(width, height) < SMALL:
            text = f"less than {SMALL} pixels high or wide. Networks of stride 32 see one cell of it: leave it out, or "
            groups["warning", text + "look whether thumbnails got in."].append(sized)
        elif max(width, height) > LONG * min(width, height):
            text = (
                f"more than {LONG:g} times as long as wide. Look whether it is a panorama or a strip; cut it in pieces."
            )
            groups["note", text].append(sized)
        else:
            text = (
                f"more than {LARGE // 1_000_000} million pixels. Cut it into tiles: decoding it for one crop is slow."
            )
            groups["note", text].append(sized)
    return [of_text(text, found, split, severity, "image") for (severity, text), found in groups.items()]


def name_findings(data: Any, split: str, root: str) -> list[Finding]:
    """File names that other systems or lists will not keep apart."""
    groups = defaultdict(list)
    for path in data.image_paths:
        groups[str(path).lower()].append(path)
    double = [Place(below(path, root), image=path) for paths in groups.values() if len(paths) > 1 for path in paths]
    blank = [Place(below(path, root), image=path) for path in data.image_paths if any(c.isspace() for c in path.name)]
    findings = []
    if double:
        what = "names that differ in case only: on macOS and Windows one of them overwrites the other."
        findings.append(Finding("warning", "name-case", what, "Rename one.", tuple(double), "image", (split,)))
    if blank:
        what = "a blank in the name; lists of names, shells and other tools cut names there."
        fix = "Write _ instead, in image and mask."
        findings.append(Finding("note", "name-blank", what, fix, tuple(blank), "image", (split,)))
    return findings


def coverage(
    counts: dict[str, np.ndarray], classes: tuple[str, ...], own: bool, unit: str
) -> list[Finding]:
    """Classes that a split lacks, from how often each label occurs in each split: int64 (K,)."""
    if "train" not in counts:
        return []
    train = counts["train"]
    others = {split: values for split, values in counts.items() if split != "train"}
    elsewhere = sum(others.values(), np.zeros(len(classes), np.int64))
    findings = []
    never = np.flatnonzero((train == 0) & (elsewhere == 0))
    unseen = np.flatnonzero((train == 0) & (elsewhere > 0))
    if len(unseen):
        where = " and ".join(others)
        what = f"no {unit} in train, but some in {where}: nothing can be learned of what the scores ask for."
        fix = "Move samples of these classes into the training split, or leave the classes out."
        findings.append(_classes("warning", "class-untrained", what, fix, unseen, classes))
    if len(never) and train.any():
        what = f"no {unit} in any split."
        fix = (
            "Look whether the names stand in label order, or take these out."
            if own
            else "They have no score; the mean over classes leaves them out."
        )
        findings.append(_classes("warning" if own else "note", "class-absent", what, fix, never, classes))
    for split, values in others.items():
        unjudged = np.flatnonzero((train > 0) & (values == 0))
        if len(unjudged) and values.any():
            what = f"no {unit} in {split}, so there is no score there; the mean over classes leaves them out."
            fix = "Fine for a part of a dataset; else move some samples over."
            findings.append(_classes("note", "class-unjudged", what, fix, unjudged, classes))
    if unit == "pixel" and train.sum():
        share = train / train.sum()
        rare = np.flatnonzero((train > 0) & (share < RARE))
        if len(rare):
            what = f"less than {100 * RARE:g} % of the labelled pixels in train."
            fix = "Class weights or crops around objects help: seglight data stats gives ready ones."
            finding = _classes("note", "class-rare", what, fix, rare, classes)
            details = [f"{100 * share[i]:.4f} %" for i in rare]
            places = tuple(Place(p.name, detail) for p, detail in zip(finding.places, details, strict=True))
            findings.append(Finding("note", "class-rare", what, fix, places, "class"))
    return findings


def label_counts(data: FileDataset, looks: Sequence[Sample], count: int) -> np.ndarray:
    """int64 (K,), pixels of each label."""
    total = _total(looks)
    labels = np.arange(256) if data.lut is None else data.lut
    return np.bincount(labels, total, 256)[:count].astype(np.int64)


def ignored_finding(split: str, ignored: int, total: int) -> list[Finding]:
    """A finding if much of a split is unlabelled."""
    share = ignored / max(1, total)
    if share < 0.25:
        return []
    what = f"{100 * share:.0f} % of the pixels are unlabelled (255)."
    if share >= 0.9:
        return [Finding("warning", "unlabelled", what, "Look whether 255 is a class after all (Folder: data.values).",
                        (), "", (split,))]  # fmt: skip
    fix = "Fine if it is meant: they train and judge nothing."
    return [Finding("note", "unlabelled", what, fix, (), "", (split,))]


class _Places:
    """Where the files of one sample are."""

    def __init__(self, data: FileDataset, index: int, root: str):
        self.data, self.index, self.root = data, index, root

    @property
    def paths(self) -> tuple[Any, Any]:
        """Image and mask; made when asked for, since most samples are sound."""
        return self.data.image_paths[self.index], self.data.mask_paths[self.index]

    def image(self, detail: str = "") -> Place:
        return Place(below(self.paths[0], self.root), detail, *self.paths)

    def mask(self, detail: str = "") -> Place:
        return Place(below(self.paths[1], self.root), detail, *self.paths)

    def of(self, fault: Fault, look: Sample) -> Place:
        image, mask = map(str, self.paths)
        if fault.where.startswith(mask):
            return self.mask(fault.where.removeprefix(mask).strip(" ()"))
        detail = ""
        if "EXIF orientation" in fault.rule and look.header and look.picture.size:
            stored, size = look.picture.size, (look.header.width, look.header.height)
            turned = stored[::-1] if any(f"orientation {n}" in fault.rule for n in range(5, 9)) else stored
            if turned != stored:
                fits = {stored: "the mask fits the stored one", turned: "the mask fits the upright one"}
                detail = fits.get(size, "the mask fits neither")
        return self.image(detail or fault.where.removeprefix(image).strip(" ()"))


def _kept(look: Sample, data: FileDataset, index: int) -> list[Fault]:
    """Faults without those that only follow from another one: a turned picture differs in size from its mask."""
    turned = any("EXIF orientation" in fault.rule for fault in look.faults)
    if not turned or not look.header or not look.picture.size:
        return look.faults
    fits = (look.header.height, look.header.width) == look.picture.size
    return [fault for fault in look.faults if fault.rank != 3 or not fits]


def _total(looks: Sequence[Sample]) -> np.ndarray:
    return sum((look.counts for look in looks if look.counts is not None), np.zeros(256, np.int64))


def _palette(looks: Sequence[Sample]) -> dict[int, Any]:
    return {value: colour for look in looks for value, colour in look.palette.items()}


def _values(
    data: FileDataset, split: str, looks: Sequence[Sample], classes: tuple[str, ...], places: Sequence[_Places]
) -> list[Finding]:
    """Label values that fit no class, and masks without labels."""
    held = [look.counts for look in looks]
    if not any(values is not None for values in held):
        return []
    total = _total(looks)
    advice = value_advice(total, _palette(looks), classes)
    faults = label_faults(data, len(classes), held)
    if not faults:
        share = total[IGNORE_INDEX] if data.lut is None else np.bincount(data.lut, total, 256)[IGNORE_INDEX]
        return ignored_finding(split, int(share), int(total.sum()))
    by_mask = {str(place.paths[1]): place for place in places}
    where = []
    for fault in faults:
        path = next((mask for mask in (fault.where, fault.where.rpartition(" (")[0]) if mask in by_mask), "")
        detail = fault.where.removeprefix(path).strip(" ()")
        where.append(by_mask[path].mask(detail) if path else Place(fault.where))
    found = of_faults(faults, where, split, unit="mask")
    if data.lut is not None or len(faults) < 0.5 * len(held) or not (advice.block or advice.sure):
        return found  # a few strange masks are no reason to read all of them in another way
    return [replace(one, block=advice.block, fix=advice.fix if advice.sure else one.fix) for one in found]


def _masks(split: str, looks: Sequence[Sample], places: Sequence[_Places], data: FileDataset) -> list[Finding]:
    """Masks that hold one value, and masks that two images share."""
    labels = np.arange(256) if data.lut is None else data.lut
    constant, ignored, same = Counter(), [], defaultdict(list)
    single: dict[int, list[Place]] = defaultdict(list)
    for place, look in zip(places, looks, strict=True):
        if look.counts is None:
            continue
        present = np.flatnonzero(look.counts)
        if set(labels[present].tolist()) == {IGNORE_INDEX}:
            ignored.append(place.mask())
        elif len(present) == 1:
            constant[int(present[0])] += 1
            single[int(present[0])].append(place.mask(f"all {present[0]}"))
        elif len(present) > 1:
            same[look.counts.tobytes()].append(place)  # masks that are equal have equal counts
    findings = []
    if ignored:
        findings.append(of_text(_ALL_IGNORED + " Leave them out.", ignored, split, "warning", "mask"))
    counted = sum(look.counts is not None for look in looks)
    if constant:
        where = tuple(place for found in single.values() for place in found)
        most = len(where) > 0.5 * counted and counted > 2
        what = "one value only." if not most else f"one value only, in most of the {counted} masks."
        fix = "Fine for pictures without an object; else the masks were exported empty or blank."
        findings.append(Finding("warning" if most else "note", "mask-constant", what, fix, where, "mask", (split,)))
    shared = [place for group in same.values() if len(group) > 1 for place in _shared(data, group, looks)]
    if shared:
        what = "the same labels as in the mask of another, different picture."
        fix = "A mask was copied or saved under a wrong name: look at them and export the right ones."
        where = tuple(place.mask() for place in shared)
        findings.append(Finding("warning", "mask-shared", what, fix, where, "mask", (split,)))
    return findings


def _shared(data: FileDataset, group: Sequence[_Places], looks: Sequence[Sample]) -> list[_Places]:
    """Those of a group whose mask is that of another one, although their pictures differ."""
    equal: dict[bytes, list[_Places]] = defaultdict(list)
    for place in group:  # one at a time: a fixed camera may have the same mask a thousand times
        mask = data.values(place.index)
        equal[hashlib.sha256(f"{mask.shape}".encode() + mask.tobytes()).digest()].append(place)
    found = []
    for same in equal.values():
        seen = [place for place in same if looks[place.index].picture.thumb is not None]
        thumbs = np.array([looks[place.index].picture.thumb for place in seen], np.int16)
        found += [place for place, one in zip(seen, thumbs, strict=True) if _apart(thumbs[:SHARED], one)]
    return sorted(found, key=lambda place: place.index)


def _apart(thumbs: np.ndarray, one: np.ndarray) -> bool:
    """Whether one thumbnail differs from any of several."""
    return bool((np.abs(thumbs - one).reshape(len(thumbs), -1).mean(1) > 8).any())


def _classes(severity: Any, rule: str, what: str, fix: str, which: np.ndarray, classes: tuple[str, ...]) -> Finding:
    return Finding(severity, rule, what, fix, tuple(Place(classes[i]) for i in which), "class")
