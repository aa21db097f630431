"""`seglight data VERB`: make, fetch, check and look at datasets."""

from __future__ import annotations

import importlib

from seglight.cli.verb import Parser, guarded, take

VERBS = {
    "prepare": "download, check and unpack an official dataset",
    "check": "find what is wrong with a dataset, worst first, with the fix",
    "stats": "count classes, sizes, colours and objects; class weights to paste",
    "show": "picture of the batches as the network gets them, with labels",
    "cache": "decode once into large files that training maps",
    "sample": "write generated scenes in a well-known file format",
}
"""Each verb and what it does. The module `seglight.cli.data_VERB` declares its options and runs it.

With `parser.set_defaults(overrides=[])` it takes the dataset's own options as well: `--data.crop 128`, wherever it
stands, arrives in `options.overrides`, for `seglight.cli.datamodule.resolve`.
"""


def main(argv: list[str]) -> int:
    """Run `seglight data ...`; returns the exit status of `seglight.cli.verb.guarded`."""
    verb = argv[0] if argv and argv[0] in VERBS else None
    return guarded(f"seglight data {verb or ''}".rstrip(), lambda: _run(argv, verb))


def _run(argv: list[str], verb: str | None) -> int:
    parser, chosen = _parsers(verb)
    words, found = take(argv, ("--data.",))
    options, rest = parser.parse_known_args(words)
    overrides = found["--data."]
    if not hasattr(options, "overrides"):
        rest += overrides
    if rest:
        chosen.unknown(rest)
    options.overrides = overrides
    return options.run(options)


def _parsers(verb: str | None) -> tuple[Parser, Parser]:
    """Of all verbs, and of the one that is meant, whose module alone is imported."""
    chosen = parser = Parser(prog="seglight data", description="Make, fetch, check and look at datasets.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, purpose in VERBS.items():
        if name != verb:
            verbs.add_parser(name, help=purpose)
            continue
        module = importlib.import_module(f"seglight.cli.data_{name}")
        chosen = verbs.add_parser(name, help=purpose, description=module.DESCRIPTION)
        module.configure(chosen)
        chosen.set_defaults(run=module.run)
    return parser, chosen
