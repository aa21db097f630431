"""`seglight data sample`: generated scenes in the file formats of well-known datasets."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

FORMATS = {
    "voc": "PASCAL VOC 2012, as the devkit unpacks",
    "coco": "COCO 2017 instances",
    "cityscapes": "Cityscapes, leftImg8bit and gtFine",
    "context": "PASCAL-Context, MATLAB label maps",
    "folder": "train/images, train/masks, val/images, val/masks and classes.txt",
}


_LOOK = {
    "voc": "VOCdevkit/VOC2012/JPEGImages",
    "coco": "train2017",
    "cityscapes": "leftImg8bit/train",
    "context": "VOCdevkit/VOC2010/JPEGImages",
    "folder": "train/images",
}


def main(argv: list[str]) -> int:
    """Run `seglight data ...`; returns the exit status: 0 written, 1 the folder could not be written, 2 wrong usage."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as error:  # argparse has printed why
        return int(error.code or 0)
    try:
        _sample(options)
    except ValueError as error:
        print(f"seglight data: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"seglight data: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="seglight data", description="Make a small dataset without any download.")
    verbs = parser.add_subparsers(required=True, metavar="sample")
    kinds = "\n".join(f"  {name:12}{what}" for name, what in FORMATS.items())
    sample = verbs.add_parser(
        "sample",
        help="write generated scenes in a well-known file format",
        description=f"Write generated scenes as a dataset in one of these file formats:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sample.add_argument("out", metavar="OUT", type=Path, help="folder to make; it must not exist or be empty")
    sample.add_argument("--format", required=True, choices=FORMATS, help="file format")
    sample.add_argument("--train", type=int, default=20, metavar="N", help="training scenes (default: 20)")
    sample.add_argument("--val", type=int, default=10, metavar="N", help="validation scenes (default: 10)")
    sample.add_argument(
        "--size", type=int, nargs=2, default=(160, 192), metavar=("H", "W"), help="in pixels (default: 160 192)"
    )
    sample.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    sample.add_argument("--simple", action="store_true", help="a colour for each class: learned in minutes")
    sample.add_argument(
        "--masks", choices=("index", "palette", "rgb"), default="index", help="kind of masks of --format folder"
    )
    return parser


def _sample(options: argparse.Namespace) -> None:
    from seglight.data import formats
    from seglight.data.scenes import split_scenes

    counts = {"train": options.train, "val": options.val}
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"--{split} is {count}; it must be at least 1.")
    if options.masks != "index" and options.format != "folder":
        raise ValueError(
            f"--masks {options.masks} goes with --format folder; {options.format} has its own kind of masks."
        )
    size = tuple(options.size)
    splits = {split: split_scenes(split, count, options.seed, size, options.simple) for split, count in counts.items()}
    extra = {"masks": options.masks} if options.format == "folder" else {}
    getattr(formats, f"write_{options.format}")(options.out, splits, **extra)
    print(f"Wrote {options.train} training and {options.val} validation scenes of {size[0]}x{size[1]} pixels.")
    print(f"Look at:   {options.out / _LOOK[options.format]}")
    print(f"Next:      {_next(options)}")


def _next(options: argparse.Namespace) -> str:
    """The command that uses the new dataset."""
    readers = {"voc": "VOC", "folder": "Folder", "cityscapes": "Cityscapes", "context": "PascalContext"}
    height, width = options.size
    if options.format == "coco":
        side, root = min(height, width), shlex.quote(str(options.out))
        return (
            "seglight fit --model MaskRCNN --model.backbone resnet18 --model.batch_norm train "
            f"--model.trainable_layers 5 --model.test_short_side {side} --data COCO --data.root {root} "
            f"--data.short_side {side} --trainer.max_steps 200"
        )
    command = (
        f"seglight fit --model SMP --model.arch Unet --model.encoder resnet18 --data {readers[options.format]} "
        f"--data.root {shlex.quote(str(options.out))} --data.crop [{height},{width}] --trainer.max_steps 200"
    )
    if options.masks == "rgb":
        from seglight.data.formats import VOID_COLOUR
        from seglight.data.scenes import CLASSES, PALETTE

        colors = {name: list(colour) for name, colour in zip(CLASSES, PALETTE, strict=True)}
        colors["void"] = list(VOID_COLOUR)
        command += f" --data.colors {shlex.quote(json.dumps(colors))} --data.ignore [void]"
    return command
