"""`seglight data stats`: what is in a dataset, in a table, a picture and numbers to paste."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from seglight.cli.datamodule import HELP

DESCRIPTION = f"""Count one split of a dataset: classes, sizes, colours, places, objects, and class weights to paste.

{HELP}"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `seglight data stats`."""
    parser.add_argument("source", metavar="SOURCE", help="the dataset")
    parser.add_argument("--split", default="train", choices=("train", "val", "test"), help="default: train")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write stats.json and stats.png there")
    parser.set_defaults(overrides=[])


def run(options: argparse.Namespace) -> int:
    """Count and print; returns the exit status."""
    from seglight.cli.datamodule import resolve
    from seglight.cli.verb import console, writable
    from seglight.data_show import refuse_foreign
    from seglight.data_stats import statistics
    from seglight.data_stats.text import lines

    numbers, picture = (options.out / name if options.out else None for name in ("stats.json", "stats.png"))
    if options.out:
        writable(options.out)
        refuse_foreign(picture)
        _refuse_foreign_json(numbers)
    stats = statistics(resolve(options.source, options.overrides), options.split)
    screen = console()
    screen.print(f"{stats.name} {stats.split}", style="bold", markup=False)
    screen.print(stats.as_table())
    for line in lines(stats):
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        numbers.write_text(json.dumps(stats.as_dict()) + "\n")
        stats.draw(picture)
        print(f"\nWrote {numbers} and {picture}")
    return 0


def _refuse_foreign_json(path: Path) -> None:
    """Raise ValueError if the file is there and is not of this command."""
    if path.exists() and '"made_by": "seglight data stats"' not in path.read_text(errors="replace")[:200]:
        raise ValueError(f"{path} exists and was not written by `seglight data stats`. Choose another --out.")
