"""Files that several processes make and read: whole or not there, and made by one process at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from zlib_ng import zlib_ng

_BLOCK = 1 << 20


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

    Where a disk knows no locks several may come in.

    Raises:
        BlockingIOError: another process holds the lock, if not `wait`.
    """
    with open(path, "w") as file:
        try:
            lock(file.fileno(), wait)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield


def lock(handle: int, wait: bool) -> None:
    """Lock an open file until it is closed; on Windows `wait` is for ten seconds at most.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the disk knows no locks.
    """
    try:
        import fcntl
    except ImportError:
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(*error.args) from error
    else:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def checksum(path: Path) -> int:
    """CRC-32 of a file, by reading: mapped pages would count as memory of this process."""
    total = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            total = zlib_ng.crc32(block, total)
    return total
