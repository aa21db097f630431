"""Which samples a rank sees, and in which order: a pure function of seed, position and rank.

Both samplers derive from torch's `DistributedSampler` so that Lightning recognises them as distributed and leaves them
in place; its own replacement pads the evaluation set, which counts some images twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import DistributedSampler

NOTHING = -1
"""An index that stands for no sample."""


class TrainSampler(DistributedSampler):
    """An endless shuffled stream, cut into `batches` global batches per Lightning epoch.

    Stream position s holds sample `permutation(seed, s // length)[s % length]`, so a pass over the data needs no
    dropped remainder, a batch may be larger than the dataset, and workers never wait at the end of a pass. Global
    batch b holds positions [b * G, (b + 1) * G) with G = batch_size * world; rank r takes every world-th of them. The
    same G therefore gives the same batches on any number of ranks.

    With two groups each is a stream of its own, a global batch is of one of them, and their turns are spread evenly in
    proportion to their sizes, so that every sample is still seen equally often.

    Args:
        length: samples in the dataset.
        batch_size: samples per rank and batch.
        batches: batches in one Lightning epoch (the whole run, when the run is counted in steps).
        seed: of the shuffle.
        rank: this process, 0 <= rank < world.
        world: number of processes.
        skip: batches of the first epoch that a resumed run has already seen.
        start: batches of the stream before the first epoch of a resumed run; without it, `batches` for each epoch.
        apart: bool (length,), True for samples that share no batch with the others; None if all may meet.

    Yields:
        `(pass, index)`: the number of the pass over the data and the sample, the two things that an augmentation
        depends on besides the seed.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        batches: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        skip: int = 0,
        apart: np.ndarray | None = None,
        start: int | None = None,
    ):
        super().__init__(range(length), num_replicas=world, rank=rank, seed=seed)
        self.batch_size, self.batches, self.skip = batch_size, batches, skip
        self.start, self._origin = (0, 0) if start is None else (start, None)
        apart = np.zeros(length, bool) if apart is None else apart
        self.groups = [group for group in (np.flatnonzero(~apart), np.flatnonzero(apart)) if len(group)]

    def __len__(self) -> int:
        """Samples of one whole epoch on this rank, also when a resumed epoch skips its beginning."""
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        orders = [(-1, group) for group in self.groups]
        if self._origin is None:
            self._origin = self.epoch
        first = self.start_of(self.epoch)
        skip, self.skip = self.skip, 0
        for step in range(first + skip, first + self.batches):
            which, batch = self._turn(step)
            group = self.groups[which]
            for slot in range(self.batch_size):
                position = (batch * self.batch_size + slot) * self.num_replicas + self.rank
                number, offset = divmod(position, len(group))
                if number != orders[which][0]:
                    seed = self.seed % 2**64  # as in `seglight.data.transforms.rng_for`: it may be negative
                    key = (seed, number, which) if which else (seed, number)
                    orders[which] = number, np.random.default_rng(key).permutation(group)
                yield number, int(orders[which][1][offset])

    def start_of(self, epoch: int) -> int:
        """How many global batches of the stream lie before an epoch."""
        return self.start + (epoch - (self._origin or 0)) * self.batches

    def _turn(self, step: int) -> tuple[int, int]:
        """Whose global batch this is, and how many that group had before: its share of all batches, rounded down."""
        if len(self.groups) == 1:
            return 0, step
        share, whole = len(self.groups[1]), sum(map(len, self.groups))
        before = step * share // whole
        return (1, before) if (step + 1) * share // whole > before else (0, step - before)


class EvalSampler(DistributedSampler):
    """Every sample exactly once over all ranks, in order; ranks may differ by one sample.

    A rank without any gets `NOTHING`: it has to take part in what ranks do together, and Lightning leaves it out of an
    evaluation that has no batch for it, so that the others wait for ever.

    Args:
        length: samples in the dataset.
        rank: this process; it takes samples rank, rank + world, ...
        world: number of processes.
    """

    def __init__(self, length: int, rank: int = 0, world: int = 1):
        super().__init__(range(length), num_replicas=world, rank=rank, shuffle=False)
        self.indices = range(rank, length, world) or ([NOTHING] if length else [])

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
