"""Annotations in a few flat arrays, which loader processes share instead of copying.

Python objects cannot be shared: reading one changes its reference count, so a forked worker ends up with a copy of
every page it has looked at, and full COCO as dicts takes several GB of them. Numpy arrays are left alone by forked
workers. Workers that are spawned get the data through pickle; there the arrays travel as files that all of them map.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Packed:
    """Arrays by name, as attributes. Pickled, they become files in the temporary folder, deleted with the original."""

    def __init__(self, **arrays: np.ndarray):
        self._folder: str | None = None
        self._arrays = arrays

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["_arrays"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def __getstate__(self) -> dict[str, Any]:
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="seglight-")
            weakref.finalize(self, _remove, self._folder, os.getpid())
            for name, array in self._arrays.items():
                np.save(Path(self._folder) / f"{name}.npy", array)
        return {"folder": self._folder, "names": list(self._arrays)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        folder = state["folder"]
        self._folder = folder  # a copy of the copy maps the same files
        self._arrays = {name: _map(Path(folder) / f"{name}.npy") for name in state["names"]}


class Strings(Sequence):
    """A list of strings in two arrays."""

    def __init__(self, text: np.ndarray, starts: np.ndarray):
        self.text, self.starts = text, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no string {index}; the list holds {len(self)}.")
        index %= len(self)
        return self.text[self.starts[index] : self.starts[index + 1]].tobytes().decode()


def pack_bytes(parts: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """uint8, all parts one after the other, and int64 (parts + 1,), where each begins and the last ends."""
    parts = list(parts)
    starts = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=starts[1:])
    return np.frombuffer(b"".join(parts), np.uint8), starts


def _map(path: Path) -> np.ndarray:
    """Read-only; empty files cannot be mapped."""
    array = np.load(path, mmap_mode=None if path.stat().st_size <= 128 else "r")
    return array if type(array) is np.ndarray else array.view(np.ndarray)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker inherits the finaliser, but not the files
        shutil.rmtree(folder, ignore_errors=True)
