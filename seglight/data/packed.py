"""Annotations in a few flat arrays, which loader processes share instead of copying.

Python objects cannot be shared: reading one changes its reference count, so a forked worker ends up with a copy of
every page it has looked at, and full COCO as dicts takes several GB of them. Numpy arrays are left alone by forked
workers. Workers that are spawned get the data through pickle; there the arrays travel as files that all of them map.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Packed:
    """Arrays by name, as attributes. Pickled, those that are not yet in files become files in the temporary folder,
    deleted with the original."""

    def __init__(self, **arrays: np.ndarray):
        self._folder: str | None = None
        self._arrays = arrays
        self._files: dict[str, Path] = {}

    @classmethod
    def map(cls, folder: Path, names: Iterable[str]) -> Packed:
        """The arrays of the files NAME.npy in a folder, mapped into memory; read-only."""
        found = cls()
        found.__setstate__({"files": {name: folder / f"{name}.npy" for name in names}})
        return found

    def replaced(self, **arrays: np.ndarray) -> Packed:
        """The same, with these arrays instead of those of their names."""
        new = Packed(**{**self._arrays, **arrays})
        if self._folder is None:  # else the files go with this object
            new._files = {name: path for name, path in self._files.items() if name not in arrays}
        return new

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["_arrays"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def forget(self, name: str) -> None:
        """Let go of the pages of a mapped array until somebody looks at them again; nothing where it is not mapped, or
        where somebody may have written to it."""
        base = array = self._arrays[name]
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and not array.flags.writeable and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)

    def save(self, folder: Path) -> None:
        """Write the arrays as NAME.npy, but for files that are there."""
        for name, array in self._arrays.items():
            if not (folder / f"{name}.npy").exists():
                np.save(folder / f"{name}.npy", array)

    def __getstate__(self) -> dict[str, Any]:
        if self._folder is None and self._arrays.keys() - self._files.keys():
            self._folder = tempfile.mkdtemp(prefix="seglight-")
            weakref.finalize(self, _remove, self._folder, os.getpid())
            for name in self._arrays.keys() - self._files.keys():
                self._files[name] = Path(self._folder) / f"{name}.npy"
                np.save(self._files[name], self._arrays[name])
        return {"files": {name: self._files[name] for name in self._arrays}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._folder, self._files = None, state["files"]  # a copy of the copy maps the same files
        self._arrays = {name: _map(path) for name, path in self._files.items()}


class Strings(Sequence):
    """A list of strings in two arrays."""

    def __init__(self, text: np.ndarray, starts: np.ndarray):
        self.text, self.starts = text, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        return self.raw(index).decode()

    def raw(self, index: int) -> bytes:
        """A string as it is kept, in UTF-8."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no string {index}; the list holds {len(self)}.")
        index %= len(self)
        return self.text[self.starts[index] : self.starts[index + 1]].tobytes()


class Paths(Sequence):
    """Paths on disk, or None, in two arrays: 118,000 of them take 8 MB once rather than 45 MB in every worker.

    Args:
        paths: to pack; a `pathlib.Path` is made anew for whoever asks.
    """

    def __init__(self, paths: Iterable[Path | None]):
        self.names = Strings(*pack_bytes(os.fsencode(path) if path is not None else b"" for path in paths))

    @staticmethod
    def of(paths: Sequence[Any]) -> Sequence[Any]:
        """Packed, unless some of them are something else, such as files in an archive."""
        return Paths(paths) if all(path is None or isinstance(path, Path) for path in paths) else list(paths)

    @staticmethod
    def to_open(paths: Sequence[Any], index: int) -> Any:
        """What to open for one of the `paths`: text if they are packed, since every part of the name of a
        `pathlib.Path` enters a table of the interpreter's, which a worker would have to copy."""
        if not isinstance(paths, Paths):
            return paths[index]
        name = paths.names.raw(index)
        return os.fsdecode(name) if name else None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = self.to_open(self, index)
        return Path(name) if name else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None


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
