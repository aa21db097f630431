"""What `seglight data`, `submit` and `explain-metric` share: how options are read, and how a command ends."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

FOREIGN = ("--data.", "--model.")
"""Options of the dataset and of the model, which are for their constructors."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, with the nearest right word; no option may be abbreviated."""

    def __init__(self, **kwargs):
        kwargs = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs}
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        choice = re.match(r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", message)
        if choice:
            known = [word.strip("'") for word in choice[3].split(", ")]
            message = f"{choice[1]} is {choice[2]!r}.{nearest(choice[2], known)} Choose from {', '.join(known)}."
        message = message.replace("the following arguments are required:", "missing:")
        self.exit(2, f"{self.prog}: {message}{'' if message.endswith(('.', '?')) else '.'} See {self.prog} --help.\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """All of the words must be known."""
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            self.unknown(rest)
        return options

    def unknown(self, words: Sequence[str]) -> NoReturn:
        """Refuse what nothing takes."""
        word = words[0].partition("=")[0]
        if not word.startswith("-"):
            self.error(f"{words[0]!r} is one word too many")
        self.error(f"there is no option {word}.{nearest(word, re.findall(r'--[a-z][a-z-]+', self.format_help()))}")


def nearest(word: str, known: Sequence[str]) -> str:
    """` Did you mean ...?`, or nothing."""
    near = difflib.get_close_matches(word.lower(), known, 1)
    return f" Did you mean {near[0]}?" if near else ""


def take(argv: Sequence[str], kinds: Sequence[str] = FOREIGN) -> tuple[list[str], dict[str, list[str]]]:
    """What is left of a command line, and the options that begin with each of `kinds`, with their values.

    Raises:
        ValueError: one of them has no value.
    """
    left, found = [], {kind: [] for kind in kinds}
    words = iter(argv)
    for word in words:
        kind = next((kind for kind in kinds if word.startswith(kind)), None)
        if kind is None:
            left.append(word)
        elif "=" in word:
            found[kind].append(word)
        else:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise ValueError(f"{word} has no value.")
            found[kind] += [word, value]
    return left, found


def writable(folder: Path) -> None:
    """Raise ValueError, before any work is done, if no file can be written into a folder, which need not exist yet."""
    place = next(one for one in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(one))
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder, so nothing can be written into {folder}. Choose another place.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{place} may not be written to. Choose another place.")


def console() -> Console:
    """Of the width of the terminal; elsewhere that of COLUMNS, or 120 columns."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


def guarded(name: str, call: Callable[[], int]) -> int:
    """Exit status of a command: 0 done, 1 failed or findings, 2 wrong usage, 130 stopped by Ctrl-C.

    With SEGLIGHT_TRACEBACK in the environment errors are not caught.

    Args:
        name: of the command, for messages.
        call: the command, which returns the status if nothing is raised.
    """
    try:
        status = call()
        sys.stdout.flush()  # where nobody reads on, this is the moment to hear of it
        return status
    except SystemExit as error:  # the parser has said why
        return int(error.code or 0)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, ValueError) as error:
        if os.environ.get("SEGLIGHT_TRACEBACK"):
            raise
        from seglight.data.findings import DataError

        text = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            text = f"{error.filename}: {error.strerror}."
        print(f"{name}: {text}", file=sys.stderr)
        return 1 if isinstance(error, (OSError, DataError)) else 2
