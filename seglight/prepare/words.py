"""What the parts of prepare say to a person: sizes, addresses without secrets."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

Say = Callable[[str], None]
"""Takes one line for the person at the terminal."""
Bar = Callable[[str, int, "int | None"], None]
"""Takes what is being done, the bytes done and the bytes in all, None where nobody knows."""


class PrepareError(Exception):
    """A dataset could not be prepared. The message says what is there, what is wrong and what to do."""


def silent(*_: object) -> None:
    """Say nothing."""


def size(count: float) -> str:
    """A number of bytes as people write it: "2.0 GB", "241 MB", "12 kB"."""
    for unit, low in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= low:
            return f"{count / low:.{1 if count < 10 * low else 0}f} {unit}"
    return f"{count:.0f} bytes"


def shown(url: str) -> str:
    """The address without a user's name, password or query, which may hold a key."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"
