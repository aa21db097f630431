"""`seglight bench NAME`: speed as ratios against peers, measured side by side in one run."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "data": "images/s of the training pipeline, against decoding alone and torchvision's transforms",
    "doctor": "the data doctor, against decoding alone",
    "metric": "the confusion matrix, against torchmetrics",
    "detectors": "a training step of Mask R-CNN, against torchvision's",
    "labels": "logits to labels, against interpolate + argmax",
    "crf": "the fully connected CRF, against pydensecrf2",
    "masks": "mask grids to run lengths and to AP, against torchvision's paste and torchmetrics",
    "networks": "our networks, against those of torchvision and smp on the same trunk",
    "step": "what Trainer, loggers and callbacks add to a step, against a bare loop",
}


def main(argv: list[str]) -> int:
    """Run one benchmark and print its table."""
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in BENCHMARKS:
        print("usage: seglight bench NAME [options]\n")
        print("\n".join(f"  {name:11}{what}" for name, what in BENCHMARKS.items()))
        if argv and argv[0] not in ("-h", "--help"):
            print(f"\nseglight: there is no benchmark {argv[0]!r}.", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    return importlib.import_module(f"seglight.benchmarks.{argv[0]}").main(argv[1:]) or 0
