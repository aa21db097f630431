"""`seglight data sample`: generated scenes in the file formats of well-known datasets."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from seglight.cli.verb import writable

FORMATS = {
    "voc": "PASCAL VOC 2012, as the devkit unpacks",
    "coco": "COCO 2017 instances",
    "cocostuff": "COCO 2017 with its 80 categories, and the pixel maps of COCO-Stuff",
    "ade20k": "ADE20K, ADEChallengeData2016",
    "cityscapes": "Cityscapes, leftImg8bit and gtFine",
    "sbd": "PASCAL VOC 2012 and SBD beside it: trainaug",
    "context": "PASCAL-Context, MATLAB label maps",
    "context_json": "PASCAL-Context, trainval_merged.json",
    "isbi": "ISBI 2012, TIFF stacks",
    "folder": "train/images, train/masks, val/images, val/masks and classes.txt",
}


_LOOK = {
    "voc": "VOCdevkit/VOC2012/JPEGImages",
    "coco": "train2017",
    "cocostuff": "stuffthingmaps/train2017",
    "ade20k": "ADEChallengeData2016/images/training",
    "cityscapes": "leftImg8bit/train",
    "sbd": "benchmark_RELEASE/dataset/img",
    "context": "VOCdevkit/VOC2010/JPEGImages",
    "context_json": "VOCdevkit/VOC2010/JPEGImages",
    "isbi": ".",
    "folder": "train/images",
}
_ZIPPED = ("ade20k", "cityscapes", "cocostuff")


DESCRIPTION = "Write generated scenes as a dataset in one of these file formats:\n" + "\n".join(
    f"  {name:14}{what}" for name, what in FORMATS.items()
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `seglight data sample`."""
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make; it must not exist or be empty")
    parser.add_argument("--format", required=True, choices=FORMATS, help="file format")
    parser.add_argument("--train", type=int, default=20, metavar="N", help="training scenes (default: 20)")
    parser.add_argument("--val", type=int, default=10, metavar="N", help="validation scenes (default: 10)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(160, 192), metavar=("H", "W"), help="in pixels (default: 160 192)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    parser.add_argument("--simple", action="store_true", help="a colour for each class: learned in minutes")
    parser.add_argument(
        "--masks", choices=("index", "palette", "rgb"), default="index", help="kind of masks of --format folder"
    )
    parser.add_argument(
        "--zipped", action="store_true", help=f"in zip archives, as downloaded: formats {', '.join(_ZIPPED)}"
    )


def run(options: argparse.Namespace) -> int:
    """Write the scenes; returns the exit status."""
    from seglight.data import formats
    from seglight.data.scenes import split_scenes

    writable(options.out.parent)
    counts = {"train": options.train, "val": options.val}
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"--{split} is {count}; it must be at least 1.")
    if options.masks != "index" and options.format != "folder":
        raise ValueError(
            f"--masks {options.masks} goes with --format folder; {options.format} has its own kind of masks."
        )
    if options.zipped and options.format not in _ZIPPED:
        raise ValueError(f"--zipped goes with --format {', '.join(_ZIPPED)}; {options.format} is read unpacked.")
    size = tuple(options.size)
    splits = {split: split_scenes(split, count, options.seed, size, options.simple) for split, count in counts.items()}
    extra = {"masks": options.masks} if options.format == "folder" else {}
    extra |= {"zipped": True} if options.zipped else {}
    getattr(formats, f"write_{options.format}")(options.out, splits, **extra)
    print(f"Wrote {options.train} training and {options.val} validation scenes of {size[0]}x{size[1]} pixels.")
    print(f"Look at:   {options.out if options.zipped else options.out / _LOOK[options.format]}")
    print(f"Next:      {_next(options)}")
    return 0


def _next(options: argparse.Namespace) -> str:
    """The command that uses the new dataset."""
    readers = {
        "voc": "VOC", "sbd": "VOC", "folder": "Folder", "cityscapes": "Cityscapes", "context": "PascalContext",
        "context_json": "PascalContext", "isbi": "ISBI", "cocostuff": "COCOStuff", "ade20k": "ADE20K",
    }  # fmt: skip
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
    if options.format == "sbd":
        command += " --data.train_split trainaug"
    if options.format == "isbi":
        last = ",".join(str(options.train + i) for i in range(options.val))
        command += f" --data.val_slices [{last}]"
    if options.masks == "rgb":
        from seglight.data.formats.folder import VOID_COLOUR
        from seglight.data.scenes import CLASSES, PALETTE

        colors = {name: list(colour) for name, colour in zip(CLASSES, PALETTE, strict=True)}
        colors["void"] = list(VOID_COLOUR)
        command += f" --data.colors {shlex.quote(json.dumps(colors))} --data.ignore [void]"
    return command
