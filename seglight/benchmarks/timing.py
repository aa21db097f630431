"""Compare ways of doing the same thing: absolute times wander with the machine's load, ratios of one run repeat."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What `paired` found out about one contestant."""

    name: str
    ms: float
    """Median time of a call, in milliseconds."""
    ratio: float
    """Median over rounds of (time of this contestant) / (time of the baseline in the same round); lower is faster."""
    mark: str
    """The goal, or what the contestant stands for."""


def paired(
    contestants: dict[str, Callable[[], object]],
    baseline: str,
    rounds: int = 7,
    marks: dict[str, str] | None = None,
    title: str = "",
) -> list[Row]:
    """Time the contestants on one thread, print a table and return its rows.

    Each is called once to warm up. Then, in every round, all are called once in a shuffled order, so that a slow moment
    of the machine hits all of them alike.

    Args:
        contestants: by name; a callable must wait for its own result (on a GPU: synchronise).
        baseline: the name that the ratios refer to.
        rounds: at least 7 for a ratio worth quoting.
        marks: text to print beside a name, such as the goal "<= 0.5".
        title: above the table.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    draw = random.Random(0)
    with single_thread():
        for call in contestants.values():
            call()
        for _ in range(rounds):
            draw.shuffle(order)
            for name in order:
                gc.collect()
                start = time.perf_counter()
                contestants[name]()
                times[name].append(time.perf_counter() - start)
    rows = []
    for name, taken in times.items():
        ratio = statistics.median(t / base for t, base in zip(taken, times[baseline], strict=True))
        rows.append(Row(name, 1000 * statistics.median(taken), ratio, (marks or {}).get(name, "")))
    show(rows, baseline, rounds, title)
    return rows


@contextmanager
def single_thread() -> Iterator[None]:
    """One torch thread inside, the former number after."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def show(rows: list[Row], baseline: str, rounds: int, title: str = "") -> None:
    """Print rows as a table, the way they were measured under it."""
    from rich.console import Console
    from rich.table import Table

    how = f"one thread, {rounds} interleaved rounds; x = median paired ratio to {baseline}"
    table = Table(title=title, caption=how)
    table.add_column("contestant", overflow="fold")
    table.add_column("ms", justify="right")
    table.add_column("x", justify="right")
    table.add_column("mark", overflow="fold")
    for row in rows:
        table.add_row(row.name, f"{row.ms:.2f}", f"{row.ratio:.3f}", row.mark)
    Console().print(table)
