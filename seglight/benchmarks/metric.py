"""The confusion matrix against torchmetrics and against the memory: `python -m seglight.benchmarks.metric`.

Marks: at least 15 times faster than `MulticlassJaccardIndex.update` at its defaults on 8 x 512 x 512, for 21, 60 and
150 classes, and 150 classes at most 1.10 times as dear as 21.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from seglight.benchmarks.timing import paired, single_thread
from seglight.metrics import ConfusionMatrix

CLASSES = (21, 60, 150)


def main(argv: list[str] | None = None) -> int:
    """Print one table per number of classes, one for the growth with it, and the memory."""
    parser = argparse.ArgumentParser(prog="seglight bench metric", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    from torchmetrics.classification import MulticlassJaccardIndex

    grown = {}
    for classes in CLASSES:
        labels, mask = pictures(classes)
        small, void = labels.byte(), mask.byte()
        theirs = MulticlassJaccardIndex(classes, ignore_index=255)
        ours = ConfusionMatrix(classes)
        constant = torch.zeros_like(void)
        grown[f"{classes} classes"] = lambda ours=ours, small=small, void=void: ours.update(small, void)
        paired(
            {
                "torchmetrics": lambda theirs=theirs, labels=labels, mask=mask: theirs.update(labels, mask),
                "seglight, uint8": grown[f"{classes} classes"],
                "seglight, int64": lambda ours=ours, labels=labels, mask=mask: ours.update(labels, mask),
                "seglight, uint8, one class": lambda ours=ours, constant=constant: ours.update(constant, constant),
                "read both, uint8": lambda small=small, void=void: (small.amax(), void.amax()),
            },
            baseline="torchmetrics",
            rounds=options.rounds,
            marks={
                "torchmetrics": "defaults, int64",
                "seglight, uint8": "<= 0.067 (what the models use)",
                "seglight, int64": "<= 0.067",
                "seglight, uint8, one class": "the worst picture for a histogram",
                "read both, uint8": "limit: memory bandwidth",
            },
            title=f"metric update, 8 x 512 x 512, {classes} classes",
        )
        with single_thread():
            memory = {
                "torchmetrics": peak(lambda theirs=theirs, labels=labels, mask=mask: theirs.update(labels, mask)),
                "seglight": peak(grown[f"{classes} classes"]),
            }
        if None not in memory.values():
            print("extra memory at the peak: " + ", ".join(f"{k} {v:.1f} MB" for k, v in memory.items()) + "\n")
    first, *_, last = grown
    paired(grown, baseline=first, rounds=5 * options.rounds, marks={last: "<= 1.10"}, title="growth with the classes")
    return 0


def pictures(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and ground truth int64 (8, 512, 512): random, 70 % right, 5 % void."""
    generator = torch.Generator().manual_seed(classes)
    mask, guess = torch.randint(0, classes, (2, 8, 512, 512), generator=generator)
    chance = torch.rand(mask.shape, generator=generator)
    return torch.where(chance < 0.7, mask, guess), mask.masked_fill(chance > 0.95, 255)


def peak(call: Callable[[], object]) -> float | None:
    """Megabytes by which the memory of the process grows at most during a call; None except on Linux with glibc."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def resident(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    try:
        ctypes.CDLL(None).malloc_trim(0)  # or memory freed earlier would be used again, unseen
        reset.write_text("5")  # forgets the peak so far
        before = resident("VmRSS")
    except (OSError, AttributeError):
        return None
    call()
    return (resident("VmHWM") - before) / 1024


if __name__ == "__main__":
    raise SystemExit(main())
