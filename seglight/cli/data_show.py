"""`seglight data show`: the batches as the network gets them, with labels, in one picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from seglight.cli.datamodule import HELP

DESCRIPTION = f"""Draw samples with their labels as the network gets them: augmented in training, as stored elsewhere.

{HELP}"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `seglight data show`."""
    parser.add_argument("source", metavar="SOURCE", help="the dataset")
    parser.add_argument("--split", default="train", choices=("train", "val", "test"), help="default: train")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="samples (default: 8)")
    parser.add_argument("--batch", type=int, default=0, metavar="N", help="batch to begin with (default: 0)")
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="only samples in which this class shows")
    parser.add_argument("--id", action="append", metavar="NAME", help="this sample; may be repeated")
    parser.add_argument("--index", action="append", type=int, metavar="N", help="the sample at this position; the same")
    parser.add_argument("--augment", type=int, default=0, metavar="N", help="N augmentations of one sample")
    parser.add_argument("--epoch", type=int, default=0, metavar="N", help="pass that --id, --index, --augment show")
    parser.add_argument(
        "--panel", type=int, metavar="PIXELS", help="longest side of each picture (default: 320 or 440)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.png", default=Path("data_show.png"), help="default: data_show.png"
    )
    parser.set_defaults(overrides=[])


def run(options: argparse.Namespace) -> int:
    """Draw and write; returns the exit status."""
    from seglight.cli.datamodule import resolve
    from seglight.cli.verb import writable
    from seglight.data_show import refuse_foreign, save, show

    writable(options.out.parent)
    refuse_foreign(options.out)
    ids = [*(options.id or []), *(options.index or [])] or None
    picture = show(
        resolve(options.source, options.overrides),
        options.split,
        options.count,
        options.batch,
        options.class_name,
        ids,
        options.augment,
        options.epoch,
        options.panel,
    )
    save(picture, options.out)
    print(f"Wrote {options.out} ({picture.width}x{picture.height}).")
    return 0
