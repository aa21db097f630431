"""What becomes of a sample that cannot be read while a run is going on.

Loader processes do not raise: they hand over what happened, so that the message of the run is a sentence and not the
traceback of another process.
"""

from __future__ import annotations

import atexit
import errno
import logging
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import DataLoader

from seglight.data import shared
from seglight.data.findings import DataError, listing
from seglight.data.shared import Arena

log = logging.getLogger(__name__)

Sample = TypeVar("Sample")
KEY = "faulty"
"""Where a batch on its way from a loader process says what it is without: pairs of id and reason."""
_BLOCKS = 5  # for each process: two batches on their way, one in use, one that Lightning fetches ahead, and a spare
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of the machine, whatever the file


class FaultySample(DataError):
    """A sample that cannot be read. The message names the file and says what to do.

    Args:
        name: its id.
        reason: the message.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(reason)
        self.name = name


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Within it, DataError and what the operating system says of a file become `FaultySample` of this id."""
    try:
        yield
    except FaultySample:
        raise
    except DataError as error:
        raise FaultySample(name, str(error)) from error
    except OSError as error:
        if error.errno in _EXHAUSTED:
            raise
        file = f"{error.filename}: " if error.filename else ""
        what = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
        advice = "Copy it again from its source, or take the sample out of the split."
        raise FaultySample(name, f"{file}{what}. {advice}") from error


def this_or_another(
    read: Callable[[int], Sample], index: int, count: int, faults: list[FaultySample]
) -> tuple[int, Sample]:
    """A sample, or one drawn in its place if it cannot be read, and its index.

    A batch keeps its size by that. What is drawn depends on the index alone, so not on who builds the batch; it is not
    the next one, since what is broken often lies together and would have one neighbour.

    Args:
        read: what reads a sample.
        index: the sample that is wanted.
        count: of all samples.
        faults: where to note those that cannot be read.

    Raises:
        DataError: none can.
    """
    try:
        return index, read(index)
    except FaultySample as fault:
        faults.append(fault)
    for place in np.random.default_rng((index, count)).permutation(count).tolist():
        if place == index:
            continue
        try:
            return place, read(place)
        except FaultySample as fault:
            faults.append(fault)
    found = listing([f"{fault.name} ({fault})" for fault in faults[-count:]], 3)
    raise DataError(
        f"None of the {count} training samples can be read: {found}. Look whether their disk is there, and repair the "
        "files."
    )


def without(batch: dict[str, Any], faults: list[FaultySample]) -> dict[str, Any]:
    """A batch that says which samples it had to do without."""
    return {**batch, KEY: [(fault.name, str(fault)) for fault in faults]} if faults else batch


class Stop:
    """What a loader process hands over instead of a batch: why the run has to stop."""

    def __init__(self, reason: str):
        self.reason = reason


class Ledger:
    """The samples that training did without, each named once, also over resumed runs."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        """Note a sample; the log says so the first time."""
        if name not in self.reasons:
            self.reasons[name] = reason
            log.warning("Training goes on without %s: %s", name, reason)

    def report(self) -> None:
        """Tell the log, at the end of a run, unless all could be read."""
        if not self.reasons:
            return
        names = sorted(self.reasons)
        many = f"{len(names)} training samples" if len(names) > 1 else "1 training sample"
        lines = [f"{many} could not be read and took no part in training:"]
        lines += [f"  {name}: {self.reasons[name]}" for name in names[:10]]
        lines += [f"  and {len(names) - 10} more, named above"] if len(names) > 10 else []
        log.warning("\n".join(lines))


_WORKERS: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """End what is left of the loaders' processes, before Python tells each once to end and waits for it.

    They let the first SIGTERM pass, and one that hangs in native code all; see `seglight.data.base`.
    """
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it a fault
    for worker in list(_WORKERS):
        if worker.is_alive():
            worker.kill()


class Loader(DataLoader):
    """A DataLoader that stops with a readable message and keeps a ledger of samples left out.

    Args:
        args: of DataLoader.
        ledger: where to note them.
        advice: what to say after the reason why the run stops.
        block: bytes of a batch, for `seglight.data.shared`; 0 to let batches travel as torch's do.
        kwargs: of DataLoader.
    """

    def __init__(self, *args: Any, ledger: Ledger | None = None, advice: str = "", block: int = 0, **kwargs: Any):
        workers, begin = kwargs.get("num_workers", 0), kwargs.get("worker_init_fn")
        if block and workers and Arena.possible():
            self.arena = Arena(workers, _BLOCKS, block)
            kwargs["worker_init_fn"] = partial(shared.begin, self.arena, begin)
        super().__init__(*args, **kwargs)
        self.ledger, self.advice, self.block = ledger, advice, block

    def __iter__(self) -> Iterator[Any]:
        batches = super().__iter__()  # starts the processes now, not at the first batch
        _WORKERS.update(getattr(batches, "_workers", ()))
        return (self._look(batch) for batch in batches)

    def _look(self, batch: Any) -> Any:
        if isinstance(batch, Stop):
            raise DataError(f"{batch.reason} {self.advice}".strip())
        for name, reason in batch.pop(KEY, ()) if isinstance(batch, dict) else ():
            if self.ledger is not None:
                self.ledger.add(name, reason)
        return batch
