"""The findings on one screen of a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from seglight.doctor.findings import ORDER, Finding, Report

if TYPE_CHECKING:
    from collections.abc import Sequence

LINES = 40
_MARKS = {"error": ("✗", "bold red"), "warning": ("!", "bold yellow"), "note": ("·", "cyan")}
_NAMES = 3
_BLOCK = 5  # lines of YAML shown; all of them are in the page


def show(report: Report, console: Console | None = None, lines: int = LINES, more: str = "--html PAGE") -> None:
    """Print a report, worst findings first, as many as fit into `lines` lines, and how many are left.

    Args:
        report: what was found.
        console: to print on.
        lines: of the screen.
        more: the option that shows everything.
    """
    console = console or Console()
    head = _head(report)
    used = _height(console, head) + 1
    parts: list[RenderableType] = [head]
    left = list(report.findings)
    brief = False
    while left:
        one = _finding(left[0], brief)
        tail = _tail(left[1:], more) if len(left) > 1 else None
        needed = used + _height(console, one) + (_height(console, tail) if tail else 0)
        if needed > lines:
            if not brief:
                brief = True  # a line each, before any is left out
                continue
            break
        parts.append(one)
        used += _height(console, one)
        left.pop(0)
    if left:
        parts.append(_tail(left, more))
    console.print(Group(*parts))


def _head(report: Report) -> RenderableType:
    title = Text(report.source, style="bold")
    title.append(f"  {report.name}", style="default")
    if report.classes:
        title.append(f", {len(report.classes)} classes")
    if report.root and report.root != report.source:
        title.append(f"\nfiles below {report.root}", style="dim")
    samples = " and ".join(f"{count:,} in {split}" for split, count in report.samples.items()) or "nothing"
    rate = f" in {report.seconds:.1f} s" if report.seconds >= 0.1 else ""
    counts = [(severity, report.count(severity)) for severity in ORDER]
    line = Text(f"\n{samples}, all decoded{rate}: " if report.samples else "\n")
    if not report.findings:
        line.append("nothing wrong", style="bold green")
    for i, (severity, count) in enumerate(pair for pair in counts if pair[1]):
        line.append(", " if i else "")
        line.append(f"{count} {severity}{'' if count == 1 else 's'}", style=_MARKS[severity][1])
    return title + line


def _finding(one: Finding, brief: bool = False) -> RenderableType:
    mark, style = _MARKS[one.severity]
    text = Text(f"{mark} ", style=style)
    text.append(_capital(one.head), style="default")
    lines: list[RenderableType] = [Padding(text, (0, 0, 0, 0))]
    if brief:
        text.no_wrap, text.overflow = True, "ellipsis"
        return Group(text)
    if one.places:
        names = ", ".join(map(str, one.places[:_NAMES]))
        names += f" and {len(one.places) - _NAMES:,} more" if len(one.places) > _NAMES else ""
        lines.append(Padding(Text(names, style="dim"), (0, 0, 0, 4)))
    if one.fix:
        lines.append(Padding(Text.assemble(("→ ", "green"), one.fix), (0, 0, 0, 2)))
    if one.block:
        block = one.block.splitlines()
        rest = len(block) - _BLOCK
        shown = block if rest <= 1 else [*block[:_BLOCK], f"  ... {rest} more lines"]
        lines += [Padding(Text(line, style="bold", no_wrap=True, overflow="ellipsis"), (0, 0, 0, 6)) for line in shown]
    return Group(*lines)


def _tail(left: Sequence[Finding], more: str) -> RenderableType:
    counts = [(severity, sum(one.severity == severity for one in left)) for severity in ORDER]
    words = ", ".join(f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts if count)
    return Text(f"... and {words} more: {more} shows all", style="dim")


def _height(console: Console, what: RenderableType) -> int:
    return len(console.render_lines(what, pad=False))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
