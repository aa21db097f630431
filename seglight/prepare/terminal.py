"""What `seglight data prepare` shows: lines, a bar, tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from seglight.prepare.recipe import Recipe
from seglight.prepare.state import Options, State, survey
from seglight.prepare.words import size

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table


class Terminal:
    """Lines and, at a terminal, one moving bar; elsewhere a line for every tenth, at most one in ten seconds."""

    STEP = 10.0

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.task, self.verb, self.told, self.when = None, "", 0, 0.0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def say(self, text: str) -> None:
        """One line."""
        self.close()
        self.console.print(f"  {text}", markup=False)

    def bar(self, verb: str, done: int, total: int | None) -> None:
        """How far it is; a new verb is a new bar."""
        if not self.console.is_terminal:
            self._line(verb, done, total)
            return
        if self.progress is None or verb != self.verb:
            self.close()
            self.progress, self.verb = _progress(self.console), verb
            self.task = self.progress.add_task(f"{verb:11}", total=total, completed=done)
            self.progress.start()
        self.progress.update(self.task, completed=done, total=total)
        if done == total:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _line(self, verb: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if verb != self.verb:
            self.verb, self.told, self.when = verb, done, now
        tenth = total is None or (done - self.told) * 10 >= total
        if now - self.when >= self.STEP and (tenth or done == total):
            of = f" of {size(total)}, {done / total:.0%}" if total else ""
            self.console.print(f"            {verb} {size(done)}{of}", markup=False)
            self.told, self.when = done, now


def _progress(console: object) -> Progress:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("            {task.description}"),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def counts_table(states: Sequence[State], verified: bool) -> Table:
    """What was counted, beside the official numbers."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, side in (("  counted", "left"), ("found", "right"), ("official", "right"), ("", "left")):
        table.add_column(name, justify=side, header_style="bold")
    for state in states:
        for count, number in zip(state.archive.counts, state.found, strict=True):
            official = f"{count.expected:,}" + ("+" if count.more else "")
            mark = "ok" if count.fits(number) else "differs"
            table.add_row(f"  {count.what}", f"{number:,}", official, mark if verified else "not compared")
    return table


def recipes_table(recipes: Sequence[Recipe], root: Path | None) -> Table:
    """Every dataset: what, how large, whether it needs a login, what is there."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("name", "what", "download", "login", "checksum", "here"):
        table.add_column(name, justify="right" if name == "download" else "left", overflow="fold")
    for recipe in recipes:
        home = root / recipe.folder if root else recipe.home()
        all_states = survey(recipe, home, Options(parts=tuple(recipe.extras)))
        for part in ("", *recipe.extras):
            archives = [archive for archive in recipe.archives if archive.part == part]
            states = [state for state in all_states if state.archive.part == part]
            login = "no" if all(archive.urls for archive in archives) else "yes"
            checked = [archive.digest is not None for archive in archives]
            table.add_row(
                recipe.name if not part else f"  --with {part}",
                recipe.title if not part else f"  {recipe.extras[part]}",
                size(sum(archive.bytes for archive in archives)),
                login,
                "yes" if all(checked) else f"{sum(checked)} of {len(checked)}" if any(checked) else "none",
                _here(states),
            )
    table.caption, table.caption_justify = f"Looked in the folders of {root or home.parent}.", "left"
    return table


def _here(states: Sequence[State]) -> str:
    if all(state.complete for state in states):
        return "complete"
    notes = ["incomplete"] if any(state.found[:1] != [0] and state.found for state in states) else []
    if any(state.file and state.todo for state in states):
        notes.append("archive here")
    if part := sum(state.part for state in states):
        notes.append(f"{size(part)} downloaded")
    return ", ".join(notes) or "-"
