"""What a GPU changes by default, channels_last and a fused optimiser, tried on the CPU, which knows both; and ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from tiny import Blocks, Tiny
from torch._subclasses.fake_tensor import FakeTensorMode

from seglight.models.base import BaseModel, _settle

ROOT = Path(__file__).parents[1]
QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)


def pretend(monkeypatch, on_gpu):
    monkeypatch.setattr(BaseModel, "trains_on_gpu", property(lambda self: on_gpu))


def fit(model, steps, path=None, **options):
    trainer = Trainer(accelerator="cpu", max_steps=steps, limit_val_batches=0, **QUIET, **options)
    trainer.fit(model, Blocks(seed=3), ckpt_path=path)
    return trainer


def tiny(**options):
    torch.manual_seed(0)
    return Tiny(num_classes=4, schedule="constant", loss_weights={"out": 1.0, "aux": 0.4}, **options)


def test_a_gpu_gets_channels_last_and_a_fused_optimiser(monkeypatch):
    for on_gpu in (False, True):
        pretend(monkeypatch, on_gpu)
        model = tiny()
        trainer = fit(model, 1)
        assert bool(trainer.optimizers[0].param_groups[0]["fused"]) == on_gpu
        last = model.network.backbone.weight.is_contiguous(memory_format=torch.channels_last)
        assert model.channels_last == last == on_gpu


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_gradients_can_be_clipped_on_a_gpu(monkeypatch, optimizer):
    """Lightning refuses that for fused optimisers under mixed precision."""
    pretend(monkeypatch, True)
    start = tiny().network.backbone.weight
    model = tiny(optimizer=optimizer, lr=0.1)
    trainer = fit(model, 1, precision="bf16-mixed", gradient_clip_val=1e-4)
    assert not trainer.optimizers[0].param_groups[0]["fused"]
    change = (model.network.backbone.weight - start).norm()
    assert change < 2e-5 if optimizer == "sgd" else change > 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_goes_on_as_it_was_on_another_device(monkeypatch, tmp_path, optimizer):
    """A checkpoint brings the layout of the momentum and the choice of a fused kernel from the device it is from."""

    def run(first, then):
        options = {"optimizer": optimizer, "lr": 0.05 if optimizer == "sgd" else 0.003}
        pretend(monkeypatch, first)
        fit(tiny(**options), 4).save_checkpoint(tmp_path / "last.ckpt")
        pretend(monkeypatch, then)
        model = tiny(**options)
        trainer = fit(model, 8, tmp_path / "last.ckpt")
        assert trainer.global_step == 8 and bool(trainer.optimizers[0].param_groups[0]["fused"]) == then
        return model.network.backbone.weight.detach()

    cpu = run(False, False)
    for first, then in ((True, True), (True, False), (False, True)):
        torch.testing.assert_close(run(first, then), cpu, rtol=1e-5, atol=1e-6)


def test_steps_are_counted_where_the_kernel_looks_for_them():
    """On the device by a fused AdamW, on the host by others, wherever the checkpoint is from."""
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(3, 4, device="cuda"))
        optimizer = torch.optim.AdamW([weight], fused=None)
        for fused, device in ((True, "cuda"), (None, "cpu")):
            state = {
                "step": torch.empty((), device="cpu" if fused else "cuda"),
                "exp_avg": torch.empty(3, 4, device="cuda"),
            }
            optimizer.state[weight] = state
            _settle(optimizer, fused=fused)
            assert optimizer.state[weight]["step"].device.type == device
            assert optimizer.param_groups[0]["fused"] is fused


@pytest.mark.parametrize(("crop", "expected"), [(16, [False, True, True, True]), (None, [False] * 4)])
def test_kernels_are_chosen_by_trial_for_crops_of_one_size_alone(monkeypatch, crop, expected):
    """And neither in the sanity check nor in a validation, where each image may have a size of its own."""
    seen = {"train": [], "val": []}

    class Watched(Tiny):
        def training_step(self, batch, batch_idx):
            seen["train"].append(torch.backends.cudnn.benchmark)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            seen["val"].append(torch.backends.cudnn.benchmark)
            return super().validation_step(batch, batch_idx)

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    model = Watched(num_classes=4, loss_weights={"out": 1.0, "aux": 0.4})
    data = Blocks(crop=crop, scale=(1.0, 1.0), batch_size=1, seed=3)
    Trainer(accelerator="cpu", max_steps=4, val_check_interval=2, benchmark=True, **QUIET).fit(model, data)
    assert seen["train"] == expected and len(seen["val"]) > 4 and not any(seen["val"])


JOB = """
    import sys
    import torch
    from pytorch_lightning import Trainer
    from seglight.models.base import BaseModel, _settle
    from test_gpu_defaults import QUIET, tiny
    from tiny import Blocks

    weights = []
    for on_gpu in (False, True):
        BaseModel.trains_on_gpu = property(lambda self: on_gpu)
        model = tiny()
        trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=3, limit_val_batches=0,
                          use_distributed_sampler=False, **QUIET)
        trainer.fit(model, Blocks(seed=3))
        weights.append(model.network.backbone.weight.detach().clone())
    if trainer.is_global_zero:
        torch.save(weights, sys.argv[1])
"""


def test_ranks_share_the_gradients_of_channels_last_weights(tmp_path):
    """DDP notes the layout of the weights when it is set up, and copies gradients into buckets of that layout."""
    (tmp_path / "job.py").write_text(textwrap.dedent(JOB))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "weights.pt")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert (first - tiny().network.backbone.weight).abs().max() > 1e-3
    torch.testing.assert_close(last, first, rtol=1e-5, atol=1e-6)


LONELY = """
    import atexit
    import json
    import os
    import sys
    from datetime import timedelta
    from pytorch_lightning import Trainer
    from pytorch_lightning.strategies import DDPStrategy
    from test_gpu_defaults import QUIET, tiny
    from tiny import Blocks
    from torch import distributed

    atexit.register(lambda: distributed.is_initialized() or os.mkdir(f"{sys.argv[1]}/ended {trainer.global_rank}"))
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    model, data = tiny(), Blocks(seed=3, val_size=1, workers=1)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=2, val_check_interval=1, **QUIET)
    trainer.fit(model, data)
    fitted = float(trainer.callback_metrics["val/mIoU"])
    (validated,) = trainer.validate(model, data, verbose=False)
    with open(f"{sys.argv[1]}/{trainer.global_rank}.json", "w") as file:
        json.dump([fitted, validated["val/mIoU"]], file)
"""


def test_a_rank_without_an_image_to_evaluate_keeps_nobody_waiting(tmp_path):
    (tmp_path / "job.py").write_text(textwrap.dedent(LONELY))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert zero == one and zero[0] == zero[1] and 0 <= zero[0] <= 1
    assert {path.name for path in tmp_path.glob("ended *")} == {"ended 0", "ended 1"}, "gloo's threads may abort"
