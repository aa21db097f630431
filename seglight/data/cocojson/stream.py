"""The entries of a json file one after another, so that the file is never there as Python objects as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from seglight.data.findings import DataError

_BLANK = re.compile(r"[ \t\n\r]*")


def text_of(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}). Export it again."
        ) from error


def entries(path: Path, text: str, lists: Collection[str]) -> Iterator[tuple[str, int | None, Any]]:
    """List, number and content of every entry; the number is None once at the beginning of each of the `lists`."""
    decode, at, place = json.JSONDecoder().raw_decode, 0, "the beginning"

    def skip(to: int) -> int:
        return _BLANK.match(text, to).end()

    def expect(characters: str, to: int) -> str:
        if text[to : to + 1] not in characters or to >= len(text):
            raise json.JSONDecodeError(f"Expecting {' or '.join(map(repr, characters))}", text, to)
        return text[to]

    try:
        at = skip(0)
        expect("{", at)
        at = skip(at + 1)
        while text[at : at + 1] != "}":
            expect('"', at)
            name, at = decode(text, at)
            place, at = repr(name), skip(at)
            expect(":", at)
            at = skip(at + 1)
            if name in lists and text[at : at + 1] == "[":
                yield name, None, None
                number, at = 0, skip(at + 1)
                while text[at : at + 1] != "]":
                    place = f"{name}[{number}]"
                    one, at = decode(text, at)
                    yield name, number, one
                    at = skip(at)
                    if expect(",]", at) == ",":
                        number, at = number + 1, skip(at + 1)
                        if text[at : at + 1] == "]":
                            raise json.JSONDecodeError("Illegal trailing comma", text, at)
                at += 1
            else:
                _, at = decode(text, at)
            at = skip(at)
            if expect(",}", at) == ",":
                at = skip(at + 1)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {error.lineno}, column {error.colno}, at {place}: {error.msg}. The file is broken or cut "
            "off. Export or copy it again."
        ) from error
