"""`seglight data check`: what is wrong with a dataset, worst first, and what to do about it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DESCRIPTION = """Look at every file of a dataset, decode all of them, and say what is wrong, worst first, with the fix.
Nothing is changed.

SOURCE is an experiment (YAML), a run folder, a checkpoint, the name of a dataset class, a dataset's folder, a json in
COCO's format, or a folder with images and masks that nobody has described yet: then the label values are explained and
the lines for the experiment are suggested. Options of the dataset are those of `seglight fit`: --data.root DIR.

Exit status: 0 nothing but notes, 1 errors (with --strict also warnings), 2 wrong usage."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `seglight data check`."""
    parser.add_argument("source", metavar="SOURCE", help="the dataset")
    parser.add_argument("--split", choices=("train", "val", "test"), help="only this one")
    parser.add_argument("--strict", action="store_true", help="warnings count as errors")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with all findings and thumbnails")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings for machines; - prints them")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.set_defaults(overrides=[])


def run(options: argparse.Namespace) -> int:
    """Examine and print; returns the exit status."""
    import json

    from seglight.cli.verb import console, writable
    from seglight.doctor.examination import examine
    from seglight.doctor.report import show

    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers is {options.workers}; it must be at least 1.")
    for option in ("html", "json"):
        file = getattr(options, option)
        if file is not None:
            writable(file.parent)
        if file is not None and file.is_dir():
            raise ValueError(f"--{option} {file} is a folder; give the name of a file to write.")
    try:
        report = examine(options.source, options.overrides, options.split, options.workers, _progress)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error  # wrong usage rather than a finding
    if options.json == Path("-"):
        print(json.dumps(report.as_dict(), indent=1))
        return report.status(options.strict)
    show(report, console())
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    if options.html is not None:
        from seglight.doctor.page import write

        write(report, options.html)
        print(f"Page: {options.html}")
    return report.status(options.strict)


def _progress(found: Iterable[Any], count: int, name: str) -> Iterable[Any]:
    """A bar on the error stream, where that is a terminal."""
    from tqdm import tqdm

    return tqdm(found, desc=name, total=count, unit=" files", disable=None, leave=False)
