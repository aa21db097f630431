"""Logits to labels against interpolate + argmax: `python -m seglight.benchmarks.labels`.

Mark: at most 0.5 of the time, with equal labels, without torch.compile.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from seglight.benchmarks.timing import paired
from seglight.inference import labels

CASES = (
    # classes, logits, label, picture
    (21, (128, 128), (512, 512), "noise"),
    (21, (128, 128), (512, 512), "smooth"),
    (21, (47, 63), (375, 500), "noise"),
    (150, (128, 128), (512, 512), "noise"),
)


def main(argv: list[str] | None = None) -> int:
    """Print one table per case."""
    parser = argparse.ArgumentParser(prog="seglight bench labels", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    for classes, small, size, picture in CASES:
        x = logits(classes, small, picture)
        last = x.contiguous(memory_format=torch.channels_last)
        different = int((labels(x, size) != resized(x, size).argmax(1)).sum())
        paired(
            {
                "interpolate + argmax": lambda x=x, size=size: resized(x, size).argmax(1),
                "seglight": lambda x=x, size=size: labels(x, size),
                "channels_last + argmax": lambda last=last, size=size: resized(last, size).argmax(1),
                "image by image": lambda x=x, size=size: [resized(i, size).argmax(1) for i in x.split(1)],
                "softmax first": lambda x=x, size=size: resized(x, size).softmax(1).argmax(1),
                "argmax, then nearest": lambda x=x, size=size: F.interpolate(x.argmax(1)[None].float(), size),
            },
            baseline="interpolate + argmax",
            rounds=options.rounds,
            marks={
                "seglight": f"<= 0.5; {different} of {2 * size[0] * size[1]:,} labels differ",
                "channels_last + argmax": "all in memory",
                "softmax first": "pure waste",
                "argmax, then nearest": "other labels; about the least one can do",
            },
            title=f"2 x {classes} x {small[0]} x {small[1]} to {size[0]} x {size[1]}, {picture}",
        )
    return 0


def logits(classes: int, size: tuple[int, int], picture: str) -> torch.Tensor:
    """Logits float32 (2, K, h, w): independent normal numbers, or blurred so that classes form regions."""
    x = torch.randn(2, classes, *size, generator=torch.Generator().manual_seed(classes))
    return x if picture == "noise" else F.avg_pool2d(x, 15, stride=1, padding=7) * 15


def resized(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear resizing at full memory."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


if __name__ == "__main__":
    raise SystemExit(main())
