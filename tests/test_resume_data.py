"""A run that is stopped and resumed sees the batches that the run would have seen, however its length is given."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
from tiny import Blocks, Tiny

QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)


class Record(pl.Callback):
    """The batches that were trained on; a checkpoint, and the end, at a step."""

    def __init__(self, path=None, stop=None):
        self.path, self.stop, self.seen = path, stop, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((tuple(batch["image_id"]), float(batch["image"].float().mean())))
        if trainer.global_step == self.stop:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def train(record, path=None, **options):
    trainer = pl.Trainer(accelerator="cpu", callbacks=[record], num_sanity_val_steps=0, **QUIET, **options)
    data = Blocks(workers=0, batch_size=2, seed=3)
    try:
        trainer.fit(Tiny(num_classes=4, loss_weights={"out": 1.0, "aux": 0.4}), data, ckpt_path=path)
    except (KeyboardInterrupt, SystemExit):
        assert record.stop
    return record.seen


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (5, {"max_steps": 9}),
        (3, {"max_steps": 6, "accumulate_grad_batches": 2}),
        (6, {"max_steps": 9, "limit_train_batches": 4}),
        (4, {"max_steps": 9, "limit_train_batches": 4}),  # at the end of an epoch
        (6, {"max_epochs": 3}),
        (4, {"max_epochs": 3}),
        (6, {"max_steps": 9, "max_epochs": 5}),
        (9, {"max_epochs": 4, "limit_train_batches": 3}),
    ],
)
def test_a_resumed_run_sees_the_batches_that_were_left(tmp_path, stop, options):
    whole = train(Record(), **options)
    first = train(Record(tmp_path / "last.ckpt", stop), **options)
    assert first == whole[: len(first)] and 0 < len(first) < len(whole)
    assert first + train(Record(), tmp_path / "last.ckpt", **options) == whole


def test_twice_resumed(tmp_path):
    whole = train(Record(), max_epochs=4)
    seen = train(Record(tmp_path / "1.ckpt", 3), max_epochs=4)
    seen += train(Record(tmp_path / "2.ckpt", 10), tmp_path / "1.ckpt", max_epochs=4)
    assert seen + train(Record(), tmp_path / "2.ckpt", max_epochs=4) == whole


def test_a_longer_run_goes_on_where_the_short_one_ended(tmp_path):
    first = train(Record(tmp_path / "last.ckpt", 4), max_steps=4)
    assert first + train(Record(), tmp_path / "last.ckpt", max_steps=9) == train(Record(), max_steps=9)


@pytest.mark.parametrize("count", [2, 0.5])
def test_a_few_batches_can_be_learned_by_heart(count):
    """trainer.overfit_batches, for which Lightning takes samples in their order."""
    seen = train(Record(), max_epochs=3, overfit_batches=count)
    names = [batch[0] for batch in seen]
    assert names == 3 * [("scene0", "scene1"), ("scene2", "scene3")]
