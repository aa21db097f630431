"""`seglight data cache`: decoded samples in a few large files, for `--data.cache`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from seglight.cli.datamodule import HELP

DESCRIPTION = f"""Decode the images and labels of a dataset once, into a few large files that training then maps:
the same pixels, without the time to decode them. It takes 4 bytes per pixel: 8 GB for VOC's trainaug, 29 GB for fine
Cityscapes. It may be interrupted, goes on where it stopped, and adds what a changed dataset lacks.

{HELP}"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `seglight data cache`."""
    parser.add_argument("source", metavar="SOURCE", help="the dataset")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder of the cache, new or to go on with"
    )
    parser.add_argument(
        "--split", nargs="+", default=("train", "val"), choices=("train", "val", "test"), help="default: train val"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and stop")
    parser.set_defaults(overrides=[])


def run(options: argparse.Namespace) -> int:
    """Write the cache; returns the exit status."""
    from seglight.cli.datamodule import resolve
    from seglight.cli.verb import writable
    from seglight.data.base import SemanticDataModule
    from seglight.data.cache_write import plan, write

    folder = options.out.expanduser()
    writable(folder)
    module = resolve(options.source, options.overrides)
    if not isinstance(module, SemanticDataModule):
        raise ValueError(
            f"{type(module).__name__} holds objects; pixels are cached for semantic datasets only. Nothing is written."
        )
    datasets = {split: module.dataset(split) for split in dict.fromkeys(options.split)}
    parts = plan(datasets, list(module.classes), folder)
    _tell(parts, folder)
    if options.dry_run:
        return 0
    try:
        for part in parts:
            if part.todo:
                part.dataset.check(module.num_classes)
        write(parts, folder, _bar)
    except KeyboardInterrupt:
        print(
            f"\nStopped. What is written stays; the same command goes on from there. Cache: {folder}", file=sys.stderr
        )
        return 130
    print(f"Done.      {folder} holds {sum(part.count for part in parts):,} samples.")
    print(f"Use it:    seglight fit ... --data.cache {folder}")
    return 0


def _tell(parts: list[Any], folder: Path) -> None:
    """What will be written, before it is."""
    import shutil

    from seglight.prepare.words import size

    for part in parts:
        print(
            f"{part.split:<11}{part.count:,} samples of {getattr(part.dataset, 'name', 'the dataset')}; "
            f"{part.count - len(part.todo):,} are there, {len(part.todo):,} to write: {size(part.bytes)}"
        )
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    print(f"Disk:      {size(sum(part.bytes for part in parts))} of {size(shutil.disk_usage(place).free)} free")


def _bar(samples: Iterable[Any], part: Any) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(samples, desc=part.split, total=len(part.todo), unit=" samples", disable=None, dynamic_ncols=True)
