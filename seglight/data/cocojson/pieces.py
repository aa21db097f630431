"""The annotations of a large COCO file, read in pieces by several processes.

Where an entry ends can only be told by reading from the beginning, so the places to cut at are guesses: `}, {` after
every few MB. A guess is proven when the reader of the piece before it ends exactly there. If one is wrong (an
annotation with a list of mappings in it) or anything else is unusual, the file is read in one go instead.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from seglight.data.cocojson import quick
from seglight.data.cocojson.lists import Annotations, Unusable
from seglight.data.findings import Fault

MARK = "the annotations were cut out"
"""The only annotation in what is left of the file."""
SMALLEST = 32 << 20
"""Bytes of a file that is worth several processes."""
PIECE = 1 << 20
"""Bytes of a piece: what is made of one stays in a processor's cache."""

_BEGIN = re.compile(rb'"annotations"[ \t\n\r]*:[ \t\n\r]*\[[ \t\n\r]*(?=\{)')
_BETWEEN = re.compile(rb"\}[ \t\n\r]*,[ \t\n\r]*\{")
_BLANK = re.compile(r"[ \t\n\r]*")
_ENTRY = 1 << 13  # bytes that most annotations are shorter than
_HEADER = 128  # bytes before the numbers in a .npy of one dimension
_OUTLINES = "parts", "part_lengths", "rle_lengths", "rle_sizes", "rle"


class Piece(NamedTuple):
    """What one process has read."""

    columns: dict[str, np.ndarray]
    """See `seglight.data.cocojson.lists.Annotations.columns`."""
    entries: int
    unusable: list[tuple[int, Unusable, object]]
    """Number in the piece, why, and the entry."""
    end: int | None
    """Byte of the file that closes the list; None if the next piece goes on."""
    corners: tuple[int, int] = (0, 0)
    """Bytes of the file for `points` between which those of this piece lie."""


def read_pieces(path: Path, points: Path | None) -> tuple[bytes, dict[str, np.ndarray], list[Fault]] | None:
    """The file without its annotations but for `MARK`, the columns of its annotations, and their faults.

    Args:
        path: of the json.
        points: file for the array `points`, which is mapped then. The outlines lie in the order that the processes
            were done in, and the column `rows` says where that of each annotation is.

    Returns:
        None if the file is small, unusual or broken, or there is nobody to share the work with.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if path.stat().st_size < SMALLEST or multiprocessing.current_process().daemon:
        return None
    if "fork" not in multiprocessing.get_all_start_methods():
        return None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if not (found := _BEGIN.search(data)):
            return None
        bounds = _bounds(file, found.end(), len(data))
        try:
            read = _read_all(path, bounds, min(workers, 16), points)
        except BrokenProcessPool:  # killed for want of memory, most likely
            read = None
        if read is None:
            if points:
                points.unlink()
            return None
        columns, faults, end = read
        rest = data[: found.end()] + json.dumps(MARK).encode() + data[end:]
    return rest, columns, faults


def _bounds(file: BinaryIO, begin: int, end: int) -> list[int]:
    """Where pieces begin, and the end of the file. Pages of a mapped file would count as memory of this process."""
    bounds = [begin]
    while bounds[-1] + PIECE < end and (found := _between(file, bounds[-1] + PIECE)):
        bounds.append(found)
    return [*bounds, end]


def _between(file: BinaryIO, start: int) -> int | None:
    """Where the first entry behind a byte seems to begin."""
    length = _ENTRY
    while True:
        file.seek(start)
        text = file.read(length)
        if found := _BETWEEN.search(text):
            return start + found.end() - 1
        if len(text) < length:
            return None
        length *= 4


def _read_all(
    path: Path, bounds: list[int], workers: int, points: Path | None
) -> tuple[dict[str, np.ndarray], list[Fault], int] | None:
    """Columns, faults, and where the list ends."""
    pieces: list[Piece] = []
    faults, entries, end = [], 0, None
    if points:
        points.write_bytes(bytes(_HEADER))
    # A child of fork has the modules loaded; it uses neither torch nor threads.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        for piece in pool.map(partial(_piece, path, points), bounds[:-1], bounds[1:]):
            if piece is None:
                break
            faults += [error.fault("annotations", one, entries + number) for number, error, one in piece.unusable]
            entries += piece.entries
            pieces.append(piece)
            if (end := piece.end) is not None:
                break
        pool.shutdown(cancel_futures=True)  # what lies behind the list was read in vain
    columns = _joined(pieces, points) if end is not None else None
    return None if columns is None else (columns, faults, end)


def _joined(pieces: list[Piece], points: Path | None) -> dict[str, np.ndarray] | None:
    """The columns of all pieces; None unless their corners fill the file."""
    stored = sorted(range(len(pieces)), key=lambda number: pieces[number].corners)
    if points:
        bounds = [_HEADER, *(end for number in stored for end in pieces[number].corners), points.stat().st_size]
        if bounds[::2] != bounds[1::2]:  # those of another list are there, too, or the disk is full
            return None
        with open(points, "r+b") as file:
            header = {"descr": "<f8", "fortran_order": False, "shape": ((bounds[-1] - _HEADER) // 8,)}
            np.lib.format.write_array_header_1_0(file, header)
    counts = [len(piece.columns["ids"]) for piece in pieces]
    begins = np.zeros(len(pieces), np.int64)
    begins[stored] = np.cumsum([0, *(counts[number] for number in stored[:-1])])
    columns = {"rows": np.concatenate([begin + np.arange(count) for begin, count in zip(begins, counts, strict=True)])}
    for name in pieces[0].columns:
        order = stored if name in _OUTLINES else range(len(pieces))
        columns[name] = np.concatenate([pieces[number].columns[name] for number in order])
    if points:
        columns["points"] = np.load(points, mmap_mode="r" if bounds[-1] > _HEADER else None)
    return columns


def _piece(path: Path, points: Path | None, begin: int, end: int) -> Piece | None:
    """As `read_piece`, with the corners in a file if there is one."""
    piece = read_piece(path, begin, end)
    if piece is None or points is None:
        return piece
    numbers = piece.columns.pop("points")
    with open(points, "ab", buffering=0) as file:  # appended in one go, whoever else does so at the same time
        file.write(numbers)
        return piece._replace(corners=(file.tell() - numbers.nbytes, file.tell()))


def read_piece(path: Path, begin: int, end: int) -> Piece | None:
    """Read the entries between two bytes of a file; None if they do not begin and end there, or are no json."""
    with open(path, "rb") as file:
        file.seek(begin)
        data = file.read(end - begin)
    head, comma, tail = data.rpartition(b",")
    if comma and not tail.strip() and (columns := quick.columns(b"[" + head + b"]")):
        return Piece(columns, len(columns["ids"]), [], None)
    annotations, unusable, number, at = Annotations(), [], 0, 0
    decode = json.JSONDecoder().raw_decode
    try:
        text = data.decode()
        while at < len(text):
            one, at = decode(text, at)
            try:
                annotations.add(one)
            except Unusable as error:
                unusable.append((number, error, one))
            number, at = number + 1, _BLANK.match(text, at).end()
            if text[at : at + 1] == "]":
                return Piece(annotations.columns(), number, unusable, begin + len(text[:at].encode()))
            if text[at : at + 1] != ",":
                return None
            at = _BLANK.match(text, at + 1).end()
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None
    return Piece(annotations.columns(), number, unusable, None)
