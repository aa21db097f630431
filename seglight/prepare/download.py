"""A file from a server, whole or not at all: an interrupted download continues where it stopped."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from seglight.prepare.words import Bar, PrepareError, Say, shown, silent, size

TIMEOUT = 30.0
"""Seconds without data, or with less than `SLOW` bytes, after which a connection counts as dead."""
SLOW = 1024
TRIES = 6
"""Failures of one server without `PROGRESS` bytes in between, after which the next server is asked."""
PROGRESS = 1 << 20
WAIT = 1.0
"""Seconds before the second attempt; they double up to `LONGEST`."""
LONGEST = 30.0
RESERVE = 64 << 20
"""Bytes of the disk that are left free."""
BLOCK = 1 << 20
AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""HTTP statuses that may be gone a moment later."""


@dataclass(frozen=True)
class Download:
    """One file to fetch.

    Args:
        path: where it is to lie. It must not exist. Until it is whole and checked, it is `path` with `.part` behind.
        urls: servers, asked in this order. A user and password in them are sent to that host alone and never shown.
        size: bytes it must have; None where nobody knows.
        digest: "md5:...", "sha1:..." or "sha256:..." of its content; None where nobody knows.
    """

    path: Path
    urls: Sequence[str]
    size: int | None = None
    digest: str | None = None

    @property
    def part(self) -> Path:
        """What has arrived."""
        return self.path.with_name(self.path.name + ".part")

    @property
    def note(self) -> Path:
        """Where that came from, and how the server tells one version of the file from another."""
        return self.path.with_name(self.path.name + ".part.json")

    @property
    def done(self) -> int:
        """Bytes that have arrived."""
        return self.part.stat().st_size if self.part.is_file() else 0


class _Again(Exception):
    """Worth another attempt.

    Args:
        reason: what was wrong.
        after: how long the server asks to wait, in seconds.
        cost: how many attempts it counts for: a server that is not there at all is given up sooner.
    """

    def __init__(self, reason: str, after: float = 0.0, cost: int = 1):
        super().__init__(reason)
        self.after, self.cost = after, cost


class _Useless(Exception):
    """This server cannot help."""


def download(job: Download, say: Say = silent, bar: Bar = silent) -> Path:
    """Fetch a file, continuing what is there of it, and check it before it gets its name.

    What arrived of another version of the file, or does not have the digest, is thrown away; everything else stays for
    the next attempt, also after Ctrl-C or a kill.

    Raises:
        PrepareError: no server had it, with what was wrong with each; or the disk is full.
        FileExistsError: there is a file of that name.
    """
    if job.path.exists():
        raise FileExistsError(f"{job.path} exists. Nothing is overwritten.")
    job.path.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    for number, url in enumerate(job.urls, start=1):
        try:
            _from_server(job, url, say, bar)
            os.replace(job.part, job.path)
            job.note.unlink(missing_ok=True)
            return job.path
        except _Useless as error:
            reasons.append(f"{shown(url)}: {error}")
            if number < len(job.urls):
                say(f"{reasons[-1]}; next: {shown(job.urls[number])}")
    left = f" What has arrived, {size(job.done)}, is kept: the same command continues it." if job.done else ""
    raise PrepareError(
        f"{job.path.name} could not be downloaded.{left}\n" + "\n".join(f"  - {reason}" for reason in reasons)
    )


def _from_server(job: Download, url: str, say: Say, bar: Bar) -> None:
    """Fill `job.part` from one server and check it.

    Raises:
        _Useless: the server does not have the file, does not answer, or has another one.
    """
    tries, restarts = 0, 0
    while True:
        before = job.done
        try:
            _attempt(job, url, say, bar)
            wrong = fault(job.part, job.size, job.digest, bar)
            if wrong is None:
                return
            _forget(job)
            if not before or restarts:
                raise _Useless(f"sent a file that {wrong}")
            restarts += 1
            say(f"{job.path.name} {wrong}: starting it anew")
        except _Again as error:
            tries = error.cost if job.done - before >= PROGRESS else tries + error.cost
            if tries >= TRIES:
                raise _Useless(f"{error}; given up after {tries // error.cost} attempts") from error
            wait = max(min(WAIT * 2 ** (tries - 1), LONGEST), min(error.after, 2 * LONGEST))
            say(f"{shown(url)}: {error}; trying again in {wait:.0f} s, from {size(job.done)}")
            time.sleep(wait)


def _attempt(job: Download, url: str, say: Say, bar: Bar) -> None:
    """One request, up to the end of the file."""
    note, done = _note(job), job.done
    whole = job.size or note.get("total")
    same = note.get("url") == shown(url)
    version = note.get("version", "") if same else ""
    if done and ((whole and done > whole) or (not version and job.digest is None)):
        _forget(job)  # in the second case nobody could tell whether the two halves belong together
        done = 0
    if done and done == whole:
        return
    request = _request(url)
    if done:
        request.add_header("Range", f"bytes={done}-")
        if version and not version.startswith("W/"):
            request.add_header("If-Range", version)
    try:
        with _OPENER.open(request, timeout=TIMEOUT) as response:
            start, total = _place(job, response, done)
            now = _version(response)
            changed = (version and now and version != now) or (whole and total and whole != total)
            if start and (start != done or changed):  # the latter from a server that does not know If-Range
                _forget(job)
                raise _Again("the file has changed on the server, or it sends another part than asked for")
            if start == 0:
                if done:
                    say(f"{shown(url)}: sends the file from its beginning, because it changed or cannot be continued")
                _forget(job)
                job.note.write_text(json.dumps({"url": shown(url), "version": now, "total": total}))
            _receive(job, response, start, total, bar)
    except urllib.error.HTTPError as error:
        with error:
            _refused(job, error, done)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise _Again(f"nothing came for {TIMEOUT:.0f} s") from error
        text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise _Again(text, cost=2 if isinstance(error, urllib.error.URLError) else 1) from error


def _request(url: str) -> urllib.request.Request:
    """Nothing compressed on the way; a password goes to this host and is not repeated to one that it redirects to."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise _Useless("not an address that begins with http:// or https://")
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    request = urllib.request.Request(bare, headers={"Accept-Encoding": "identity", "User-Agent": "seglight"})
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        secret = base64.b64encode(pair.encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    return request


def _opener() -> urllib.request.OpenerDirector:
    """What speaks http and https and follows redirections, and nothing else: no file://, no ftp://."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


_OPENER = _opener()


def _place(job: Download, response: http.client.HTTPResponse, done: int) -> tuple[int, int | None]:
    """Where in the file the answer begins, -1 for somewhere else than asked, and the bytes of the whole file."""
    if response.headers.get_content_type() == "text/html":
        raise _Useless("sent a web page instead of the file: a login, or a notice")
    start, total = 0, None
    if response.status == 206:
        found = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        start = int(found[1]) if found and done else -1
        total = int(found[2]) if found and found[2] != "*" else None
        start = -1 if start == 0 else start
    elif (length := response.headers.get("Content-Length", "")).isdigit():
        total = int(length)
    if job.size is not None and total is not None and total != job.size:
        raise _Useless(f"has another file: {total:,} bytes instead of {job.size:,}")
    return start, total


def _receive(job: Download, response: http.client.HTTPResponse, start: int, total: int | None, bar: Bar) -> None:
    """Append what comes to `job.part`."""
    total = total or job.size
    room(job.part.parent, (total or start) - start, job.path.name)
    done, window, in_window = start, time.monotonic(), 0
    with open(job.part, "ab", buffering=0) as file:
        bar("downloading", done, total)
        while block := response.read1(BLOCK):
            try:
                file.write(block)
            except OSError as error:
                raise PrepareError(
                    f"{job.part} could not be written: {error.strerror}. What has arrived, {size(job.done)}, is kept: "
                    "make room, and the same command continues it."
                ) from error
            done, in_window = done + len(block), in_window + len(block)
            bar("downloading", done, total)
            if total is not None and done > total:
                break
            if (now := time.monotonic()) - window > TIMEOUT:
                if in_window < SLOW:
                    raise _Again(f"less than {SLOW} bytes came in {TIMEOUT:.0f} s")
                window, in_window = now, 0
        os.fsync(file.fileno())
    if total is not None and done > total:
        _forget(job)
        raise _Useless(f"sends more than the {total:,} bytes of the file")
    if total is not None and done < total:
        raise _Again(f"the connection ended after {done:,} of {total:,} bytes")


def _refused(job: Download, error: urllib.error.HTTPError, done: int) -> None:
    """What follows from an HTTP status that is no success."""
    if error.code == 416 and done:
        _forget(job)
        raise _Again("what has arrived does not fit its file") from error
    if error.code not in AGAIN:
        login = " (it wants a login)" if error.code in (401, 403) else ""
        raise _Useless(f"answers {error.code} {str(error.reason).splitlines()[0]}{login}") from error
    after = error.headers.get("Retry-After", "")
    raise _Again(f"answers {error.code} {error.reason}", float(after) if after.isdigit() else 0.0) from error


def _version(response: http.client.HTTPResponse) -> str:
    """What the server calls this version of the file: the ETag, else the date; "" for nothing usable."""
    if tag := response.headers.get("ETag", ""):
        return tag
    date = response.headers.get("Last-Modified", "")
    try:
        parsedate_to_datetime(date)
    except (TypeError, ValueError):
        return ""
    return date


def _note(job: Download) -> dict[str, Any]:
    try:
        note = json.loads(job.note.read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _forget(job: Download) -> None:
    job.part.unlink(missing_ok=True)
    job.note.unlink(missing_ok=True)


def room(folder: Path, needed: int, what: str) -> None:
    """Raise PrepareError if `needed` bytes do not fit on the disk of `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed + RESERVE:
        raise PrepareError(
            f"{what} needs {size(needed)} in {folder}, but {size(free)} are free there. Make room, or choose another "
            "disk with --root."
        )


def fault(path: Path, expected: int | None, digest: str | None, bar: Bar = silent) -> str | None:
    """What is wrong with a file, as the rest of a sentence; None for nothing.

    Args:
        path: the file.
        expected: its bytes, if known.
        digest: as in `Download`.
        bar: told how much has been read.
    """
    total = path.stat().st_size
    if expected is not None and total != expected:
        return f"has {total:,} bytes instead of {expected:,}"
    if digest is None:
        return None
    kind, _, wanted = digest.partition(":")
    found, done = hashlib.new(kind, usedforsecurity=False), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
            done += len(block)
            bar("checking", done, total)
    return None if found.hexdigest() == wanted else f"has {kind} {found.hexdigest()} instead of {wanted}"
