"""Memory that loader processes fill with batches again and again.

Fresh pages for every batch take a fifth of a loader process's time, and torch hands each tensor over by a handshake
between two processes. Here the main process maps a few blocks before it forks; a loader process takes one of its own
that is free; and a block is free again when no tensor on it is left in the main process. A batch that finds no free
block travels as torch's batches do. (Blocks need no room in /dev/shm, which containers often keep small.)
"""

from __future__ import annotations

import itertools
import math
import mmap
import multiprocessing
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

_BUSY, _FREE = 1, 0
_arenas: weakref.WeakValueDictionary[int, Arena] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_here: _Worker | None = None
"""In a loader process: its blocks."""


class Arena:
    """Blocks of one size for the processes of a loader.

    Args:
        workers: how many processes.
        each: blocks for each of them.
        size: bytes of a block, at least.
    """

    def __init__(self, workers: int, each: int, size: int):
        self.each, self.number = each, next(_numbers)
        self.size = size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.states = np.frombuffer(mmap.mmap(-1, workers * each), np.uint8)
        self.blocks = np.frombuffer(mmap.mmap(-1, workers * each * size), np.uint8).reshape(workers * each, size)
        _arenas[self.number] = self

    @staticmethod
    def possible() -> bool:
        """Whether loader processes are forks, which see what the main process has mapped."""
        return multiprocessing.get_start_method() == "fork"

    def receive(self, place: int) -> Tensor:
        """The whole block; it is free again when the last tensor on it is gone."""
        block = self.blocks[place]
        weakref.finalize(block, _release, self.states, place, os.getpid()).atexit = False
        return torch.from_numpy(block)


def _release(states: np.ndarray, place: int, owner: int) -> None:
    if os.getpid() == owner:  # a process that was forked meanwhile has the tensors, too, and drops them
        states[place] = _FREE


class _Worker:
    """The blocks of a loader process."""

    def __init__(self, arena: Arena, number: int):
        self.arena, self.places = arena, range(number * arena.each, (number + 1) * arena.each)
        self.taken: int | None = None
        """The block of the batch that is being made."""

    def take(self) -> Tensor | None:
        states = self.arena.states
        self.taken = next((place for place in self.places if states[place] == _FREE), None)
        if self.taken is None:
            return None
        states[self.taken] = _BUSY
        return torch.from_numpy(self.arena.blocks[self.taken])

    def drop(self) -> None:
        if self.taken is not None:
            self.arena.states[self.taken], self.taken = _FREE, None


class _Part(NamedTuple):
    """Where in a block a tensor lies."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Shipment:
    """A batch on its way to the main process; it arrives as the batch."""

    def __init__(self, arena: Arena, place: int, batch: dict[str, Any]):
        self.args = arena.number, place, batch

    def __reduce__(self) -> tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]:
        return _unpacked, self.args


def _unpacked(number: int, place: int, batch: dict[str, Any]) -> dict[str, Any]:
    block = _arenas[number].receive(place)
    return {name: block.as_strided(*one) if isinstance(one, _Part) else one for name, one in batch.items()}


def begin(arena: Arena, then: Callable[[int], None] | None, number: int) -> None:
    """Run in a loader process that has just started, as its `worker_init_fn`."""
    global _here
    if then:  # maybe a `begin`, where Lightning made a loader anew
        then(number)
    _here = _Worker(arena, number)


def empty(*shapes: Sequence[int]) -> list[Tensor]:
    """uint8 tensors of these shapes; in a loader process, memory that the main process sees, too."""
    sizes = [math.prod(shape) for shape in shapes]
    if get_worker_info() is None:
        return [torch.empty(tuple(shape), dtype=torch.uint8) for shape in shapes]
    block = _here.take() if _here and 0 < sum(sizes) <= _here.arena.size else None
    if block is None:
        block = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(sum(sizes)))
    parts = block[: sum(sizes)].split(sizes)
    return [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]


def ship(batch: Any) -> Any:
    """What a loader process hands over for a batch, whose tensors may be on its block."""
    if _here is None or _here.taken is None:
        return batch
    base, place = _here.arena.blocks[_here.taken].ctypes.data, _here.taken
    parts = {
        name: _Part(tuple(one.shape), one.stride(), one.storage_offset())
        for name, one in (batch.items() if isinstance(batch, dict) else ())
        if isinstance(one, Tensor) and one.untyped_storage().data_ptr() == base
    }
    if not parts:
        _here.drop()
        return batch
    _here.taken = None  # it is the main process's now
    return _Shipment(_here.arena, place, {**batch, **parts})
