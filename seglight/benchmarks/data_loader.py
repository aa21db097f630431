"""Batches/s of 2 worker processes against those of 1, on VOC-like files. Mark: at least 1.8 on two idle cores."""

from __future__ import annotations

import argparse
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
    """Print rates and their ratio."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    draw, order = random.Random(0), [1, 2]
    with tempfile.TemporaryDirectory() as folder:
        data = voc_like(Path(folder) / "files", options.images or 32)
        for _ in range(options.rounds):
            draw.shuffle(order)
            for workers in order:
                rates[workers].append(_rate(data, workers))
    ratios = sorted(two / one for one, two in zip(rates[1], rates[2], strict=True))
    middle = statistics.median(ratios)
    print(
        f"loader: {statistics.median(rates[1]):.0f} images/s with 1 worker, {statistics.median(rates[2]):.0f} with 2; "
        f"median of {options.rounds} paired ratios {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); mark >= 1.8, "
        f"{'met' if middle >= 1.8 else 'MISSED (are two cores idle?)'}"
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
