"""`seglight data prepare`: an official dataset, from its archives to the folder that its DataModule reads."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from seglight.cli.verb import nearest

DESCRIPTION = """Download, check and unpack an official dataset; what needs a login is taken from where you put it.

What is there is kept: the command can be interrupted and repeated. Nothing of yours is overwritten or removed.

  seglight data prepare --list             what there is, how large, what is here
  seglight data prepare voc                into $SEGLIGHT_DATA/voc2012 or data/voc2012
  seglight data prepare coco --with stuff  with an optional part
  seglight data prepare cityscapes --from ~/Downloads
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `seglight data prepare`."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="a dataset of --list")
    parser.add_argument("--list", action="store_true", help="show all datasets")
    parser.add_argument("--root", type=Path, metavar="DIR", help="the dataset's folder; with --list the one of all")
    parser.add_argument(
        "--with", dest="parts", action="append", default=[], metavar="PART", help="an optional part, see --list"
    )
    parser.add_argument("--from", dest="source", type=Path, metavar="DIR", help="take archives from here; only read")
    parser.add_argument(
        "--mirror",
        dest="mirrors",
        action="append",
        default=[],
        metavar="URL",
        help="a server that has the files by their official names, instead of the official ones; may be repeated",
    )
    parser.add_argument("--unpack", action="store_true", help="unpack zips that could be read as they are, too")
    parser.add_argument(
        "--remove-archives", action="store_true", help="remove archives from DIR when their content is verified"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare sizes, checksums and counts with the official ones"
    )


def run(options: argparse.Namespace) -> int:
    """Prepare one dataset or show all; returns the exit status."""
    from seglight.prepare.recipes import RECIPES
    from seglight.prepare.terminal import Terminal, recipes_table

    with Terminal() as terminal:
        if options.list and options.name in (None, *RECIPES):
            chosen = [RECIPES[options.name]] if options.name else list(RECIPES.values())
            terminal.console.print(recipes_table(chosen, options.root))
            return 0
        if options.name not in RECIPES:
            what = (
                f"there is no dataset {options.name!r}.{nearest(options.name, list(RECIPES))}"
                if options.name
                else "which dataset?"
            )
            print(f"seglight data prepare: {what} There are {', '.join(RECIPES)}; see --list.", file=sys.stderr)
            return 2
        return _prepare(options, RECIPES[options.name], terminal)


def _prepare(options: argparse.Namespace, recipe: object, terminal: object) -> int:
    from seglight.prepare.run import prepare
    from seglight.prepare.state import Options
    from seglight.prepare.terminal import counts_table
    from seglight.prepare.words import PrepareError, size

    root = (options.root or recipe.home()).expanduser()
    source = options.source.expanduser() if options.source else None
    choice = Options(
        tuple(options.mirrors),
        source,
        tuple(options.parts),
        not options.no_verify,
        options.unpack,
        options.remove_archives,
    )
    terminal.console.print(f"{recipe.title}: {root}", style="bold", markup=False)
    try:
        states = prepare(recipe, root, choice, terminal.say, terminal.bar)
    except PrepareError as error:
        terminal.close()
        print(f"seglight data prepare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        terminal.close()
        print("\nInterrupted. What has been done is kept: the same command continues it.", file=sys.stderr)
        return 130
    terminal.console.print(counts_table(states, choice.verify))
    if options.no_verify:
        print("There, but not verified: sizes, checksums and numbers were not compared with the official ones.")
    else:
        print("Complete: the numbers are the official ones.")
    kept = [state.file for state in states if state.file and state.file.parent == root and not state.read]
    if kept:
        total = size(sum(path.stat().st_size for path in kept))
        print(f"Archives are kept ({total})" + ("; --remove-archives removes them." if choice.verify else "."))
    if recipe.note:
        print(recipe.note)
    where = "" if options.root is None else f" --data.root {shlex.quote(str(root))}"
    print(f"Use it:   --data {recipe.reader}{where}")
    return 0
