"""Which samples a rank sees, and in which order: a pure function of seed, position and rank.

Both samplers derive from torch's `DistributedSampler` so that Lightning recognises them as distributed and leaves them
in place; its own replacement pads the evaluation set, which counts some images twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import DistributedSampler


class TrainSampler(DistributedSampler):
    """An endless shuffled stream, cut into `batches` global batches per Lightning epoch.

    Stream position s holds sample `permutation(seed, s // length)[s % length]`, so a pass over the data needs no
    dropped remainder, a batch may be larger than the dataset, and workers never wait at the end of a pass. Global
    batch b holds positions [b * G, (b + 1) * G) with G = batch_size * world; rank r takes every world-th of them. The
    same G therefore gives the same batches on any number of ranks.

    Args:
        length: samples in the dataset.
        batch_size: samples per rank and batch.
        batches: batches in one Lightning epoch (the whole run, when the run is counted in steps).
        seed: of the shuffle.
        rank: this process, 0 <= rank < world.
        world: number of processes.
        skip: batches of the current epoch that a resumed run has already seen.

    Yields:
        `(pass, index)`: the number of the pass over the data and the sample, the two things that an augmentation
        depends on besides the seed.
    """

    def __init__(
        self, length: int, batch_size: int, batches: int, seed: int = 0, rank: int = 0, world: int = 1, skip: int = 0
    ):
        super().__init__(range(length), num_replicas=world, rank=rank, seed=seed)
        self.length, self.batch_size, self.batches, self.skip = length, batch_size, batches, skip

    def __len__(self) -> int:
        """Samples of one whole epoch on this rank, also when a resumed epoch skips its beginning."""
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, order_pass = np.empty(0, int), -1
        first = self.epoch * self.batches
        skip, self.skip = self.skip, 0
        for batch in range(first + skip, first + self.batches):
            for slot in range(self.batch_size):
                position = (batch * self.batch_size + slot) * self.num_replicas + self.rank
                number, offset = divmod(position, self.length)
                if number != order_pass:
                    order, order_pass = np.random.default_rng((self.seed, number)).permutation(self.length), number
                yield number, int(order[offset])


class EvalSampler(DistributedSampler):
    """Every sample exactly once over all ranks, in order; ranks may differ by one sample.

    Args:
        length: samples in the dataset.
        rank: this process; it takes samples rank, rank + world, ...
        world: number of processes.
    """

    def __init__(self, length: int, rank: int = 0, world: int = 1):
        super().__init__(range(length), num_replicas=world, rank=rank, shuffle=False)
        self.indices = range(rank, length, world)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
