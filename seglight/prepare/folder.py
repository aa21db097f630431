"""The folder of a dataset while it is prepared: one process at a time, and what has been done so far.

All that is not the dataset's own lies in `.seglight-prepare` of the folder: the lock, the record, half-unpacked
archives. Downloads lie beside the dataset, with `.part` behind their names until they are whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seglight.data.store import lock
from seglight.prepare.words import PrepareError, Say

OWN = ".seglight-prepare"


class Record:
    """What was done with each archive, kept on disk.

    Args:
        root: folder of the dataset; it need not exist.
    """

    def __init__(self, root: Path):
        self.path = root / OWN / "record.json"
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):  # a record that cannot be read is a record that is not there: all is looked at
            found = {}
        self.entries: dict[str, dict[str, Any]] = found if isinstance(found, dict) else {}

    def __getitem__(self, archive: str) -> dict[str, Any]:
        entry = self.entries.get(archive)
        return entry if isinstance(entry, dict) else {}

    def set(self, archive: str, **entry: Any) -> None:
        """Remember, on disk and whole."""
        self.entries[archive] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name("record.json.new")
        new.write_text(json.dumps(self.entries, indent=1))
        os.replace(new, self.path)


@contextmanager
def alone(root: Path, say: Say) -> Iterator[None]:
    """Hold the folder for this process; the system lets go of it however the process ends.

    Raises:
        PrepareError: another process has it.
    """
    path = root / OWN / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise PrepareError(
            f"{root} cannot be written to: {error.strerror}. Choose another folder: --root DIR."
        ) from error
    try:
        try:
            lock(file, wait=False)
        except BlockingIOError as error:
            holder = os.pread(file, 20, 0).decode(errors="replace") if hasattr(os, "pread") else ""
            raise PrepareError(
                f"{root} is being prepared by another process{f' ({holder})' if holder else ''}. Wait for it, or stop "
                "it; the same command continues its work then."
            ) from error
        except OSError as error:
            say(f"  {root} cannot be locked ({error.strerror}): start no second preparation of it.")
        os.truncate(file, 0) if os.truncate in os.supports_fd else None
        os.write(file, f"process {os.getpid()}".encode())
        yield
    finally:
        os.close(file)
