"""Batches/s of 2 worker processes against those of 1, on VOC-like files. Mark: at least 1.8 on two idle cores.

The limit is what two processes reach that make the same batches for nobody: cores that share memory and a host with
others do not double anything.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from seglight.benchmarks.data_voc import BATCH, CROP, voc_like
from seglight.data.base import SemanticDataModule

WARM, TIMED = 8, 40  # batches


class _Files(SemanticDataModule):
    """VOC-like files as a datamodule."""

    classes = tuple(map(str, range(21)))

    def __init__(self, data: Any, **options: Any):
        super().__init__(crop=CROP, batch_size=BATCH, **options)
        self._datasets["train"] = data


def run(options: argparse.Namespace) -> None:
    """Print rates and their ratios."""
    contestants = {"loader": _rate, "limit": _free_rate}
    rates: dict[tuple[str, int], list[float]] = {(name, n): [] for name in contestants for n in (1, 2)}
    draw, order = random.Random(0), list(rates)
    with tempfile.TemporaryDirectory() as folder:
        data = voc_like(Path(folder) / "files", options.images or 32)
        for _ in range(options.rounds):
            draw.shuffle(order)
            for name, processes in order:
                rates[name, processes].append(contestants[name](data, processes))
    print(f"loader: images/s with 1 and with 2 processes, and the median of {options.rounds} paired ratios")
    for name in contestants:
        one, two = rates[name, 1], rates[name, 2]
        ratios = sorted(b / a for a, b in zip(one, two, strict=True))
        middle, who = statistics.median(ratios), {"loader": "workers", "limit": "free, the limit"}[name]
        verdict = "" if name == "limit" else f"; mark >= 1.8, {'met' if middle >= 1.8 else 'MISSED'}"
        print(
            f"  {who:16}{statistics.median(one):5.0f} {statistics.median(two):5.0f}   "
            f"{middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}){verdict}"
        )


def _rate(data: Any, workers: int) -> float:
    """Images/s after the workers have started."""
    batches = iter(_Files(data, workers=workers, seed=0).train_batches(WARM + TIMED + 4 * workers))
    for _ in range(WARM):
        next(batches)
    start = time.perf_counter()
    for _ in range(TIMED):
        next(batches)
    return TIMED * BATCH / (time.perf_counter() - start)


def _free_rate(data: Any, processes: int) -> float:
    """Images/s of processes that keep what they make."""
    context = multiprocessing.get_context("fork")
    ready, seconds = context.Barrier(processes), context.Queue()
    share = TIMED // processes
    crew = [context.Process(target=_make, args=(data, share, number, ready, seconds)) for number in range(processes)]
    for one in crew:
        one.start()
    slowest = max(seconds.get() for _ in crew)
    for one in crew:
        one.join()
    return share * processes * BATCH / slowest


def _make(data: Any, count: int, number: int, ready: Any, seconds: Any) -> None:
    import cv2

    cv2.setNumThreads(0)
    build = _Files(data, workers=0, seed=number).train_builder()
    batches = [[(k, index % len(data)) for index in range(BATCH * k, BATCH * (k + 1))] for k in range(WARM + count)]
    for keys in batches[:WARM]:
        build(keys)
    ready.wait()
    start = time.perf_counter()
    for keys in batches[WARM:]:
        build(keys)
    seconds.put(time.perf_counter() - start)
