"""Files that several processes make and read: whole or not there, and made by one process at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its place when it is complete."""
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.chmod(name, 0o644)  # others may read it
        os.replace(name, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(name)


@contextmanager
def alone(path: Path, wait: bool = True) -> Iterator[None]:
    """One process of this machine at a time. The lock goes with the process that holds it, however it ends.

    Without locks (Windows, some network disks) several may come in.

    Raises:
        BlockingIOError: another process holds the lock, if not `wait`.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
