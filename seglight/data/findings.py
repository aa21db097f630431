"""What is found wrong with data or options, and how it is said."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple


class DataError(ValueError):
    """Data that cannot be trained on. The message names the file, the rule and what to do."""


class Fault(NamedTuple):
    """One finding."""

    rank: int
    """0 is worst."""
    rule: str
    """What is wrong and what to do about it: faults with the same rule are reported together."""
    where: str


def listing(names: Sequence[Any], limit: int = 10) -> str:
    """`a, b, c and 7 more`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(str(name) for name in names[:limit]) + more


def choice(option: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError if an option has none of the values that it may have."""
    if value not in known:
        raise ValueError(f"data.{option} is {value!r}; it must be {' or '.join(known)}.")


def paragraphs(faults: Sequence[Fault], kind: str = "file", root: str = "") -> list[str]:
    """One paragraph per rule, worst first: how many of this kind, what is wrong, and where, seen from `root`."""
    groups: dict[tuple[int, str], list[str]] = defaultdict(list)
    for fault in faults:
        groups[fault.rank, fault.rule].append(fault.where)
    lines = []
    for (_, rule), where in sorted(groups.items(), key=lambda group: (group[0][0], -len(group[1]))):
        names = [name.removeprefix(root + os.sep) for name in where]
        lines.append(f"- {len(where)} {kind if len(where) == 1 else kind + 's'}: {rule}\n  {listing(names)}")
    return lines
