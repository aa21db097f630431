from collections import Counter

import pytest

from seglight.data.samplers import EvalSampler, TrainSampler


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


@pytest.mark.parametrize("length", [0, 1, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_each_sample_once(length, world):
    seen = [i for rank in range(world) for i in EvalSampler(length, rank, world)]
    assert sorted(seen) == list(range(length))
    assert all(
        len(EvalSampler(length, rank, world)) == len(list(EvalSampler(length, rank, world))) for rank in range(world)
    )
