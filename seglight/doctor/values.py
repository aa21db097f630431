"""What the values or colours of masks seem to mean, and the lines of YAML that say so."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from seglight.data.findings import listing
from seglight.data.palette import Colour, palette
from seglight.doctor.findings import Finding, Place
from seglight.types import IGNORE_INDEX

_VOID = {(224, 224, 192), (255, 255, 255)}
"""Colours in which borders or unlabelled pixels are often painted."""
_FEW = 0.02  # share of the pixels that values between labels may have, where smoothing made them
_COLOURS = 40  # more are no classes


class Advice(NamedTuple):
    """What masks seem to hold."""

    rule: str
    what: str
    fix: str
    block: str
    """Lines of YAML to paste."""
    sure: bool = False
    """It holds whatever the classes are."""


def value_advice(
    counts: np.ndarray, colours: dict[int, Colour] | None = None, classes: tuple[str, ...] | None = None
) -> Advice:
    """What the values of all masks mean.

    Args:
        counts: int64 (256,), how often each occurs.
        colours: of the values, if the masks have a palette.
        classes: names, if there are some; their number tells ids from 1 from ids from 0.
    """
    present = np.flatnonzero(counts).tolist()
    shares = counts / max(1, counts.sum())
    shown = listing([f"{value} ({_percent(shares[value])})" for value in present], 12)
    held = f"the values {shown}."
    labels = [value for value in present if value != IGNORE_INDEX]
    if smooth := _smooth(counts):
        fix = (
            f"They were resized or drawn with smooth edges: {listing(smooth, 6)} are labels, the other values only "
            "edges between them. Export them again without smoothing, resized with nearest neighbour."
        )
        return Advice("mask-smooth", held, fix, "", sure=True)
    if len(present) == 2 and 0 in present and (present[1] == IGNORE_INDEX or present[1] > 1):
        names = classes if classes and len(classes) == 2 else ("background", "object")
        fix = f"Two classes, {present[1]} for the object: say so."
        return Advice("binary-mask", held, fix, _mapping("values", dict(zip(present, names, strict=True))))
    if len(present) == 1:
        return Advice("label-values", held, "There is nothing to tell apart: export the masks again.", "")
    if colours and any(_is_colourful(colours.get(value)) for value in labels):
        names = _names(labels, classes)
        lines = [f"  {value}: {names[value]}  # {_rgb(colours.get(value))}" for value in labels]
        fix = "They have a palette, whose colours tell what is what: give each value a name."
        if _is_voc(colours, labels):
            fix += " The colours are those of VOC."
        return Advice("no-classes", held, fix, "\n".join(["data.values:", *lines]))
    if labels and labels[0] == 1 and labels == list(range(1, len(labels) + 1)):
        names = _names(labels, classes)
        fix = "They start at 1: with data.values they are shifted to 0 when they are read."
        return Advice("label-values", held, fix, _mapping("values", names))
    if labels == list(range(len(labels))):
        fix = "These are labels already: give them names, in this order (or write classes.txt, one name a line)."
        return Advice("no-classes", held, fix, f"data.classes: [{', '.join(_names(labels, classes).values())}]")
    fix = "They have gaps: give a name to each, and list under data.ignore what is no class."
    return Advice("label-values", held, fix, _mapping("values", _names(labels, classes)))


def colour_advice(masks: Sequence[dict[int, int]], classes: tuple[str, ...] | None) -> Advice:
    """What masks that show colours mean, from the pixels of each colour, red << 16 | green << 8 | blue, in each."""
    total: Counter[int] = Counter()
    for one in masks:
        total.update(one)
    pixels = sum(total.values())
    ranked = [((code >> 16, code >> 8 & 255, code & 255), count) for code, count in total.most_common()]
    main = [colour for colour, count in ranked if count >= 2e-4 * pixels][:_COLOURS]
    grey = all(red == green == blue for (red, green, blue), _ in ranked)
    if grey and len(ranked) <= 256:
        counts = np.zeros(256, np.int64)
        for (value, _, _), count in ranked:
            counts[value] = count
        inner = value_advice(counts, None, classes)
        what = f"three channels that are all the same: grey, saved as RGB; {inner.what}"
        fix = "Save one channel: Image.open(path).getchannel(0).save(path), with Pillow. "
        return Advice("mask-colours", what, fix + inner.fix, inner.block)
    blurred = len(ranked) > 2 * len(main) and len(ranked) > 16
    count = f"{len(ranked)} colours" if len(ranked) < 1000 else "1000 colours or more"
    what = f"classes shown as colours: {count} in all, {listing([f'({_rgb(colour)})' for colour in main], 4)}."
    fix = "Give each colour a name, and list under data.ignore the names that are no class."
    if blurred:
        fix = (
            f"Only {len(main)} of them are frequent, the others are edges: the masks were saved as JPEG once, or "
            "resized with smoothing. Export them again; then name the frequent ones."
        )
    names = _colour_names(main, classes)
    lines = [f"  {name}: [{_rgb(colour)}]" for name, colour in names.items()]
    ignore = ["data.ignore: [void]"] if "void" in names else []
    return Advice("mask-colours", what, fix, "\n".join(["data.colors:", *lines, *ignore]))


def palette_conflicts(masks: Sequence[tuple[Callable[[], Place], dict[int, Colour]]], split: str) -> list[Finding]:
    """Palette masks in which one value has different colours in different files."""
    seen: dict[int, Counter[Colour]] = defaultdict(Counter)
    for _, colours in masks:
        for value, colour in colours.items():
            seen[value][colour] += 1
    usual = {value: counter.most_common(1)[0][0] for value, counter in seen.items()}
    odd = []
    for place, colours in masks:
        wrong = [value for value, colour in colours.items() if colour != usual[value]]
        if wrong:
            value = wrong[0]
            detail = f"{value} is ({_rgb(colours[value])}), elsewhere ({_rgb(usual[value])})"
            odd.append(replace(place(), detail=detail))
    if not odd:
        return []
    what = "another palette than the others have, so the same number may mean another class there."
    fix = (
        "An editor made a palette of its own when saving. If the colours are right, take those: open each with Pillow "
        "as .convert('RGB'), save it, and give data.colors."
    )
    return [Finding("warning", "palette-differs", what, fix, tuple(odd), "mask", (split,))]


def _smooth(counts: np.ndarray) -> list[int]:
    """The labels, if all other values are rare and many, as between them where masks were smoothed; else nothing."""
    shares = counts / max(1, counts.sum())
    present = np.flatnonzero(counts)
    main = np.flatnonzero(shares >= _FEW / 4)
    others = np.setdiff1d(present, main)
    inside = len(main) > 1 and len(others) and (others > main.min()).all() and (others < main.max()).all()
    rare = shares[others].sum() <= 10 * _FEW
    return main.tolist() if inside and rare and len(others) >= max(8, 2 * len(main)) else []


def _names(labels: Sequence[int], classes: tuple[str, ...] | None) -> dict[int, str]:
    if classes and len(classes) == len(labels):
        return dict(zip(labels, classes, strict=True))
    return {value: "background" if value == 0 else f"class_{value}" for value in labels}


def _colour_names(colours: Sequence[Colour], classes: tuple[str, ...] | None) -> dict[str, Colour]:
    void = [colour for colour in colours if colour in _VOID][:1]
    others = [colour for colour in colours if colour not in void]
    if classes and len(classes) == len(others):
        known = {f"class_{i}": colour for i, colour in enumerate(others, 1)}  # which is which only a person knows
    else:
        black = [colour for colour in others if colour == (0, 0, 0)]
        known = {"background": black[0]} if black else {}
        rest = [colour for colour in others if colour not in black]
        known |= {f"class_{i}": colour for i, colour in enumerate(rest, 1)}
    return {**known, "void": void[0]} if void else known


def _mapping(option: str, names: dict[int, str]) -> str:
    return f"data.{option}: {{{', '.join(f'{value}: {name}' for value, name in names.items())}}}"


def _is_colourful(colour: Colour | None) -> bool:
    return colour is not None and len(set(colour)) > 1


def _is_voc(colours: dict[int, Colour], labels: Sequence[int]) -> bool:
    voc = palette(256)
    return len(labels) > 1 and all(colours.get(value) == voc[value] for value in labels)


def _rgb(colour: Colour | None) -> str:
    return ", ".join(map(str, colour)) if colour else "no colour"


def _percent(share: float) -> str:
    return "< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"
