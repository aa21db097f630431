"""`seglight data VERB`: make, fetch, check and look at datasets."""

from __future__ import annotations

import argparse
import importlib
import sys

VERBS = {
    "prepare": "download, check and unpack an official dataset",
    "check": "find what is wrong with a dataset, worst first, with the fix",
    "stats": "count classes, sizes, colours and objects; class weights to paste",
    "show": "picture of the batches as the network gets them, with labels",
    "cache": "decode once into large files that training maps",
    "sample": "write generated scenes in a well-known file format",
}
"""Each verb and what it does. The module `seglight.cli.data_VERB` declares its options and runs it.

With `parser.set_defaults(overrides=[])` it takes the dataset's own options as well: what is left on the command line,
such as `--data.crop 128`, arrives in `options.overrides`, for `seglight.cli.datamodule.resolve`.
"""


def main(argv: list[str]) -> int:
    """Run `seglight data ...`; returns the exit status: 0 done, 1 failed or findings, 2 wrong usage."""
    verb = argv[0] if argv and argv[0] in VERBS else None
    try:
        parser = _parser(verb)
        options, rest = parser.parse_known_args(argv)
        if rest and not (hasattr(options, "overrides") and rest[0].startswith("--data.")):
            parser.error(f"there is no option {rest[0]}; see seglight data {verb} --help")
        options.overrides = rest
    except SystemExit as error:  # argparse has printed why
        return int(error.code or 0)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"seglight data: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"seglight data: {error}", file=sys.stderr)
        return 1


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """Of all verbs, with the options of the chosen one, whose module alone is imported."""
    parser = argparse.ArgumentParser(prog="seglight data", description="Make, fetch, check and look at datasets.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb, purpose in VERBS.items():
        if verb != chosen:
            verbs.add_parser(verb, help=purpose)
            continue
        module = importlib.import_module(f"seglight.cli.data_{verb}")
        one = verbs.add_parser(
            verb,
            help=purpose,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(one)
        one.set_defaults(run=module.run)
    return parser
