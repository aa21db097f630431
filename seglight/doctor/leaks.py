"""Pictures that are there twice: within a split a waste, across splits a score that means nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from seglight.data.decode import contents, read_image
from seglight.data.findings import DataError
from seglight.doctor.crew import muted
from seglight.doctor.duplicates import SAME, SIDE, Pair, alike, same_picture
from seglight.doctor.findings import Finding, Place, below

_CHECKED = 2000  # pairs whose pictures are decoded again; more are judged by their thumbnails


def duplicate_findings(
    paths: Sequence[Any], thumbs: Sequence[np.ndarray | None], splits: Sequence[str], root: str
) -> list[Finding]:
    """Findings over all pictures of all splits.

    Args:
        paths: of the pictures.
        thumbs: of each, None if it cannot be decoded.
        splits: of each.
        root: that files are named relative to.
    """
    blank = np.zeros((SIDE, SIDE), np.uint8)
    known = sorted(set(splits))
    group = np.array([known.index(split) for split in splits])
    pairs = alike(np.stack([blank if one is None else one for one in thumbs]), group) if len(thumbs) else []
    pairs = [pair for pair in pairs if str(paths[pair.first]) != str(paths[pair.second])]
    pairs += _shared(paths, group)
    kinds: dict[tuple[str, str, str], list[Place]] = defaultdict(list)
    told: set[tuple[str, str, str, str]] = set()
    similar: dict[tuple[str, str], dict[int, tuple[float, Place]]] = defaultdict(dict)
    for number, pair in enumerate(sorted(pairs, key=lambda pair: -pair.score)):
        a, b = (pair.first, pair.second) if _order(splits[pair.first]) > _order(splits[pair.second]) else pair[1::-1]
        kind = _kind(paths[a], paths[b], pair, number < _CHECKED)
        place = Place(below(paths[a], root), below(paths[b], root), paths[a], paths[b])
        if kind != "similar":
            key = kind, splits[a], splits[b]
            if (*key, place.name) not in told:  # an image once, though it has many likes
                told.add((*key, place.name))
                kinds[key].append(place)
        elif group[a] != group[b] and pair.score > similar[splits[a], splits[b]].get(a, (0.0, place))[0]:
            similar[splits[a], splits[b]][a] = (pair.score, place)
    findings = [_found(kind, late, early, tuple(places)) for (kind, late, early), places in kinds.items()]
    for (late, early), found in similar.items():
        already = {place.name for (_, *two), places in kinds.items() if two == [late, early] for place in places}
        places = tuple(place for _, place in found.values() if place.name not in already)
        if places:
            share = 100 * len(places) / max(1, list(splits).count(late))
            what = (
                f"much like one in {early} ({share:.0f} % of the split): frames of one video or shots of one "
                "place. The scores will be better than on new places."
            )
            fix = "If so, put whole videos or places into one split. If they only look alike, leave it so."
            findings.append(Finding("warning", "similar", what, fix, places, "image", (late,)))
    return findings


def _kind(first: Any, second: Any, pair: Pair, look: bool) -> str:
    if str(first) == str(second):
        return "file"
    if pair.score < SAME:
        return "similar"
    if not look:
        return "copy" if pair.score > 0.99 else "similar"
    try:
        if contents(first) == contents(second):
            return "file"
        with muted():
            one, other = read_image(first, exif=True), read_image(second, exif=True)
    except (DataError, OSError):
        return "similar"
    if not same_picture(one, other[:, ::-1] if pair.mirrored else other):
        return "similar"
    return "mirror" if pair.mirrored else "copy"


def _found(kind: str, late: str, early: str, places: tuple[Place, ...]) -> Finding:
    how = {
        "file": "as the very same file",
        "copy": "as the same picture, saved again",
        "mirror": "as the same picture, mirrored",
    }[kind]
    if late == early:
        what = f"there twice, {how}."
        fix = "Remove one of each, unless it is meant to count double."
        return Finding("warning", "duplicate", what, fix, places, "image", (late,))
    what = f"also in {early}, {how}: the scores would be those of pictures learned by heart."
    fix = f"Take them out of {early} or out of {late}."
    return Finding("error", "leak", what, fix, places, "image", (late,))


def _shared(paths: Sequence[Any], group: np.ndarray) -> list[Pair]:
    """One file in two splits."""
    seen: dict[str, int] = {}
    found = []
    for index, path in enumerate(map(str, paths)):
        if path in seen and group[seen[path]] != group[index]:
            found.append(Pair(seen[path], index, 1.0, False))
        seen.setdefault(path, index)
    return found


def _order(split: str) -> int:
    """Training first: leaks are named after the split that is judged."""
    order: Callable[[str], int] = {"train": 0, "val": 1, "test": 2}.get
    return order(split, 1) if split in ("train", "val", "test") else 0
