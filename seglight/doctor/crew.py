"""Worker processes that look at files, and hear what decoders print.

libjpeg decodes a picture whose middle is damaged, and the only sign of it is a line on the standard error stream. So
every worker sends that stream of its own to a file and looks whether it grew. Measured on 120 VOC photographs with 512
damaged bytes in the middle: 98 % are found this way (16 bytes 89 %, one bit 33 %); Pillow reports 41 %.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

_shared: Any = None
_stream: Any = None


def each(look: Callable[[Any, int], Any], shared: Any, count: int, workers: int | None = None) -> Iterator[Any]:
    """`look(shared, index)` of 0 to count - 1, in this order, by one process per core.

    Args:
        look: a function of a module, so that it can be sent.
        shared: what all calls need, sent once per worker; forked workers get it for nothing.
        count: of calls.
        workers: number of processes; by default that of the cores this process may use. 0 calls in this process, where
            decoders are not heard.
    """
    if workers == 0:
        yield from (look(shared, index) for index in range(count))
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(workers or cores, count))
    chunk = max(1, min(16, count // (4 * workers)))
    with ProcessPoolExecutor(workers, initializer=_begin, initargs=(shared,)) as pool:
        yield from pool.map(partial(_call, look), range(count), chunksize=chunk)


def heard(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call returns, and what libraries have printed on the standard error stream meanwhile (workers only)."""
    if _stream is None:
        return call(), ""
    before = os.fstat(_stream.fileno()).st_size
    found = call()
    grown = os.fstat(_stream.fileno()).st_size - before
    return found, os.pread(_stream.fileno(), min(grown, 2000), before).decode(errors="replace") if grown else ""


@contextmanager
def muted() -> Iterator[None]:
    """Within it, what decoders print of files that are known to be broken goes nowhere."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _begin(shared: Any) -> None:
    global _shared, _stream
    import cv2

    cv2.setNumThreads(0)  # workers are the parallelism
    _shared, _stream = shared, tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the worker lives)
    os.dup2(_stream.fileno(), 2)


def _call(look: Callable[[Any, int], Any], index: int) -> Any:
    return look(_shared, index)
