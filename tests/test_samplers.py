from collections import Counter

import numpy as np
import pytest

from seglight.data.samplers import NOTHING, EvalSampler, TrainSampler


def batches(sampler, size):
    keys = list(sampler)
    return [keys[i : i + size] for i in range(0, len(keys), size)]


def test_every_sample_once_per_pass():
    keys = list(TrainSampler(7, 2, 14, seed=3))
    assert len(keys) == 28
    for number in range(4):
        assert sorted(index for p, index in keys if p == number) == list(range(7))


def test_passes_are_shuffled_differently_and_seeded():
    keys = list(TrainSampler(50, 5, 20, seed=3))
    first, second = [i for p, i in keys if p == 0], [i for p, i in keys if p == 1]
    assert first != second != list(range(50))
    assert keys == list(TrainSampler(50, 5, 20, seed=3)) != list(TrainSampler(50, 5, 20, seed=4))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_of_one_rank(world):
    whole = batches(TrainSampler(11, 6, 9, seed=1), 6)
    parts = [batches(TrainSampler(11, 6 // world, 9, seed=1, rank=r, world=world), 6 // world) for r in range(world)]
    for b, batch in enumerate(whole):
        assert sorted(batch) == sorted(key for rank in parts for key in rank[b])


def test_resumed_stream_continues():
    whole = list(TrainSampler(5, 2, 10))
    sampler = TrainSampler(5, 2, 10, skip=4)
    assert list(sampler) == whole[8:]
    assert len(sampler) == 20, "Lightning counts a resumed epoch from its beginning"
    assert list(sampler) == whole, "only the first epoch after the resume is shortened"


def test_epochs_follow_on():
    sampler, whole = TrainSampler(5, 2, 4), list(TrainSampler(5, 2, 8))
    sampler.set_epoch(1)
    assert list(sampler) == whole[8:]


def test_batch_larger_than_the_dataset():
    assert Counter(i for _, i in TrainSampler(3, 9, 1)) == {0: 3, 1: 3, 2: 3}


APART = np.isin(np.arange(50), [3, 4, 11, 17, 20, 33, 34, 48, 49])  # 9 of 50


def test_groups_share_no_batch_and_every_sample_counts_the_same():
    whole = batches(TrainSampler(50, 4, 200, seed=2, apart=APART), 4)
    kinds = [{bool(APART[i]) for _, i in batch} for batch in whole]
    assert all(len(kind) == 1 for kind in kinds) and len({keys for batch in whole for keys in batch}) == 800
    assert set(Counter(i for batch in whole for _, i in batch).values()) == {16}
    turns = [step for step, kind in enumerate(kinds) if kind == {True}]
    assert set(np.diff(turns).tolist()) == {5, 6}, "the smaller group's turns are spread evenly"
    assert whole != batches(TrainSampler(50, 4, 200, seed=3, apart=APART), 4)


def test_groups_on_several_ranks_and_after_a_resume():
    whole = batches(TrainSampler(50, 4, 90, seed=2, apart=APART), 4)
    parts = [batches(TrainSampler(50, 2, 90, seed=2, rank=r, world=2, apart=APART), 2) for r in range(2)]
    assert [sorted(batch) for batch in whole] == [sorted(a + b) for a, b in zip(*parts, strict=True)]
    assert batches(TrainSampler(50, 4, 90, seed=2, skip=37, apart=APART), 4) == whole[37:]
    later = TrainSampler(50, 4, 30, seed=2, apart=APART)
    later.set_epoch(2)
    assert batches(later, 4) == whole[60:]


@pytest.mark.parametrize("apart", [np.zeros(7, bool), np.ones(7, bool)])
def test_one_group_is_as_none(apart):
    assert list(TrainSampler(7, 2, 14, seed=3, apart=apart)) == list(TrainSampler(7, 2, 14, seed=3))


@pytest.mark.parametrize("length", [0, 1, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_each_sample_once(length, world):
    seen = [i for rank in range(world) for i in EvalSampler(length, rank, world) if i != NOTHING]
    assert sorted(seen) == list(range(length))
    assert all(
        len(EvalSampler(length, rank, world)) == len(list(EvalSampler(length, rank, world))) for rank in range(world)
    )


def test_a_seed_may_be_negative():
    assert sorted(TrainSampler(5, 5, 1, seed=-1)) == [(0, i) for i in range(5)]
    assert list(TrainSampler(9, 3, 3, seed=-1)) == list(TrainSampler(9, 3, 3, seed=2**64 - 1))
