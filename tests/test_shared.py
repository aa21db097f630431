"""Blocks that loader processes fill again and again: nothing that somebody still looks at is written over."""

import gc
import itertools
import multiprocessing
import pickle
import weakref

import pytest
import torch
from pytorch_lightning.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, get_worker_info

from seglight.data import VOC, shared
from seglight.data.faults import _BLOCKS, Loader, Stop
from seglight.data.formats import write_voc
from seglight.data.scenes import split_scenes
from seglight.data.shared import Arena

pytestmark = pytest.mark.skipif(not Arena.possible(), reason="loader processes are not forked here")
SHAPES = (3, 4, 5, 3), (3, 4, 5)


class Numbers(torch.utils.data.Dataset):
    """Batches that are full of their number."""

    def __init__(self, shapes=SHAPES):
        self.shapes = shapes

    def __len__(self):
        return 60

    def __getitems__(self, keys):
        (number,) = keys
        if number == 50:
            shared.empty(*self.shapes)
            return Stop("the fiftieth is broken.")
        images, masks = shared.empty(*self.shapes)
        images[:], masks[:] = number, number + 100
        worker = get_worker_info()
        where = worker.id if worker else None
        return {"image": images[:2].permute(0, 3, 1, 2), "mask": masks[:2], "worker": where, "faulty": []}


def loader(workers, block=240, **options):
    return Loader(Numbers(**options), batch_size=1, num_workers=workers, block=block, collate_fn=shared.ship)


def check(batch, number):
    assert batch["image"].shape == (2, 3, 4, 5) and batch["mask"].shape == (2, 4, 5)
    assert batch["image"].unique().tolist() == [number] and batch["mask"].unique().tolist() == [number + 100]


def first(batches, count):
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_blocks_are_used_again(workers):
    places, made = set(), loader(workers)
    batches = iter(made)
    for number in range(48):
        batch = next(batches)
        check(batch, number)
        assert batch["worker"] == (number % workers if workers else None)
        storage = batch["image"].untyped_storage()
        assert workers == 0 or batch["mask"].untyped_storage().data_ptr() == storage.data_ptr()
        places.add(storage.data_ptr())
    if workers:
        blocks = made.arena.blocks
        assert len(places) <= workers * _BLOCKS and {(place - blocks.ctypes.data) % 4096 for place in places} == {0}
        assert len(places) < 30, "not one for each batch"


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_kept_is_not_written_over(workers):
    batches = iter(loader(workers))
    kept = first(batches, 40)  # far more than there are blocks
    parts = [batch["image"][1, 2, 3:] for batch in kept[:3]]  # a view keeps the block
    for number, batch in enumerate(kept):
        check(batch, number)
    del kept[:3], batch
    first(batches, 9)
    assert [part.tolist() for part in parts] == [[[number] * 5] for number in range(3)]
    for number, batch in enumerate(kept, start=3):
        check(batch, number)


def test_a_batch_that_is_too_large_or_that_nobody_sees_takes_no_block():
    large = loader(1, block=8, shapes=((3, 40, 50, 3), (3, 40, 50)))
    for number, batch in enumerate(first(large, 20)):
        assert batch["image"].unique().tolist() == [number]
    assert not large.arena.states.any()
    made = loader(1)
    stops = [isinstance(batch, Stop) for batch in DataLoader.__iter__(made)]  # without the look that stops at the 50th
    assert stops == [number == 50 for number in range(60)]
    assert not made.arena.states.any(), "the block of what was thrown away is free"


def test_another_process_does_not_give_blocks_back():
    arena = Arena(1, 2, 100)
    tensor, other = arena.receive(0), arena.receive(1)
    arena.states[:] = 1

    def drop():
        nonlocal tensor
        del tensor
        gc.collect()

    process = multiprocessing.get_context("fork").Process(target=drop)
    process.start()
    process.join()
    assert process.exitcode == 0 and arena.states.tolist() == [1, 1]
    other = other[3:7]
    gc.collect()
    assert arena.states.tolist() == [1, 1]
    del tensor, other
    assert arena.states.tolist() == [0, 0]


def test_blocks_go_with_the_last_tensor():
    arena = Arena(2, 3, 5000)
    gone, batch = weakref.ref(arena), arena.receive(4)
    assert arena.size == 8192 and len(batch) == 8192
    del arena
    gc.collect()
    batch[:] = 7
    assert gone() is None and batch.sum() == 7 * 8192


def test_outside_of_a_loader_process_batches_are_what_they_are():
    images, masks = shared.empty(*SHAPES)
    batch = {"image": images, "mask": masks}
    assert shared.ship(batch) is batch and not images.is_shared() and images.shape == SHAPES[0]
    assert pickle.loads(pickle.dumps(shared._Part((1,), (1,), 0))) == ((1,), (1,), 0)


def test_a_loader_that_lightning_makes_anew_has_blocks_of_its_own(tmp_path):
    root = write_voc(tmp_path / "voc", {part: split_scenes(part, 6, 0, (64, 72)) for part in ("train", "val")})
    old = VOC(str(root), batch_size=3, crop=48, workers=1, seed=1).train_batches(4)
    new = _update_dataloader(old, old.sampler)
    assert isinstance(new, Loader) and new.arena is not old.arena and new.block == old.block
    blocks = new.arena.blocks
    for batch in new:
        assert 0 <= batch["image"].data_ptr() - blocks.ctypes.data < blocks.nbytes
    assert not old.arena.states.any()


def test_training_batches_come_in_blocks(tmp_path):
    root = write_voc(tmp_path / "voc", {part: split_scenes(part, 6, 0, (64, 72)) for part in ("train", "val")})

    def batches(workers):
        data = VOC(str(root), batch_size=3, crop=48, workers=workers, seed=1)
        made = data.train_batches(30)
        assert hasattr(made, "arena") == bool(workers)
        return made, list(made)

    _, expected = batches(0)
    made, found = batches(2)
    assert len(expected) == len(found) == 30 and made.arena.size >= 3 * 48 * 48 * 4
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys() and one["image_id"] == other["image_id"]
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["mask"], other["mask"])
        assert one["image"].stride() == other["image"].stride()
    blocks = made.arena.blocks
    inside = [0 <= one["image"].data_ptr() - blocks.ctypes.data < blocks.nbytes for one in found]
    assert inside[:4] == [True] * 4 and sum(inside) == 2 * _BLOCKS, "the others found none that was free"
    assert not hasattr(VOC(str(root), batch_size=1, crop=None, workers=2).train_batches(3), "arena")
