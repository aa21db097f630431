"""Guard, Progress and Pictures inside real (tiny) trainings."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from seglight.callbacks import guard as guard_module
from seglight.callbacks.guard import Guard
from seglight.callbacks.pictures import Pictures, spaced
from seglight.callbacks.progress import Progress, _duration
from seglight.loggers import RunLogger

ROOT = Path(__file__).parents[1]


def trainer(folder, *callbacks, steps=4, val=2, **options):
    options = {
        "max_steps": steps, "val_check_interval": val, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0,
        "accelerator": "cpu", "logger": False, "enable_model_summary": False, "use_distributed_sampler": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), "default_root_dir": folder,
        "enable_progress_bar": any(isinstance(c, Progress) for c in callbacks), **options,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **options)


class Scripted(tiny.Tiny):
    """Its loss at each step is given."""

    def __init__(self, losses=(), **kwargs):
        super().__init__(num_classes=4, classes=list(tiny.Blocks.classes), palette=list(tiny.Blocks.palette), **kwargs)
        self.script = list(losses)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * 0 + self.script[batch_idx] if self.script else loss


# ----------------------------------------------------------------------- Guard


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_loss_stops_the_run_and_keeps_batch_and_checkpoint(tmp_path, bad):
    data = tiny.Blocks()
    last = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1, enable_version_counter=False)
    seen = []

    class See(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch)

    with pytest.raises(FloatingPointError) as error:
        trainer(tmp_path, See(), Guard(), last, steps=6, val=6).fit(Scripted([1.0, 2.0, bad, 1.0, 1.0, 1.0]), data)
    message = str(error.value)
    kept = torch.load(tmp_path / "nan_batch.pt", weights_only=True)
    assert len(seen) == 3
    for part in ("step 3", str(tmp_path / "nan_batch.pt"), "model.lr", *seen[2]["image_id"]):
        assert part in message
    assert kept["batch"]["image_id"] == seen[2]["image_id"] and kept["step"] == 3
    assert torch.equal(kept["batch"]["image"], seen[2]["image"]) and torch.equal(kept["batch"]["mask"], seen[2]["mask"])
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2 and all(w.isfinite().all() for w in checkpoint["state_dict"].values())


def test_nan_weights_behind_a_finite_loss_are_not_saved(tmp_path):
    class Poison(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                pl_module.network.head.bias.data[0] = float("nan")

    last = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(FloatingPointError, match=r"network\.head\.bias.*previous one is kept"):
        trainer(tmp_path, Guard(), Poison(), last, steps=5, val=5).fit(Scripted(), tiny.Blocks())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


class Flight:
    """Stands for a CUDA event: done after a number of questions, or when one waits for it."""

    waited = 0

    def __init__(self, questions):
        self.questions = questions

    def query(self):
        self.questions -= 1
        return self.questions < 0

    def synchronize(self):
        if self.questions >= 0:
            Flight.waited += 1
            self.questions = -1


def fly(monkeypatch, questions):
    Flight.waited = 0
    monkeypatch.setattr(guard_module, "_to_host", lambda loss: (loss.clone(), Flight(questions)))


def test_on_an_accelerator_the_loss_is_looked_at_later_and_the_right_batch_is_kept(tmp_path, monkeypatch):
    fly(monkeypatch, questions=1)  # arrives while the next step runs
    with pytest.raises(FloatingPointError, match="at step 2"):
        trainer(tmp_path, Guard(), steps=6, val=6).fit(Scripted([1.0, float("nan"), 1.0, 1.0, 1.0, 1.0]), tiny.Blocks())
    assert Flight.waited == 0, "a step never waits for the device"
    assert torch.load(tmp_path / "nan_batch.pt", weights_only=True)["step"] == 2


def test_losses_in_flight_are_awaited_before_a_checkpoint_and_at_the_end(tmp_path, monkeypatch):
    fly(monkeypatch, questions=10**6)
    last = ModelCheckpoint(tmp_path, "last", every_n_train_steps=3, enable_version_counter=False)
    with pytest.raises(FloatingPointError, match="at step 3"):
        trainer(tmp_path, Guard(), last, steps=6, val=6).fit(Scripted([1.0, 1.0, float("nan"), 1, 1, 1]), tiny.Blocks())
    assert not (tmp_path / "last.ckpt").exists()
    fly(monkeypatch, questions=10**6)
    with pytest.raises(FloatingPointError, match="at step 2"):
        trainer(tmp_path, Guard(), steps=2, val=2).fit(Scripted([1.0, float("nan")]), tiny.Blocks())
    fly(monkeypatch, questions=10**6)
    runner = trainer(tmp_path, Guard(), steps=9, val=9)
    with pytest.raises(FloatingPointError, match="at step 1"):
        runner.fit(Scripted([float("nan")] + [1.0] * 8), tiny.Blocks())
    assert Flight.waited == 1 and runner.global_step == 1 + Guard.DELAY, "no more batches in flight than DELAY"


def test_a_batch_that_cannot_be_kept_is_said(tmp_path):
    (tmp_path / "nan_batch.pt").mkdir()
    with pytest.raises(FloatingPointError, match="could not be kept"):
        trainer(tmp_path, Guard(), steps=1, val=1).fit(Scripted([float("nan")]), tiny.Blocks())


# -------------------------------------------------------------------- Progress


def test_one_line_per_validation(tmp_path, capsys):
    bar = Progress()
    model = Scripted([1.0, 3.0, 5.0, 5.0])
    trainer(tmp_path, bar, num_sanity_val_steps=1).fit(model, tiny.Blocks())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step") and "mIoU" in line]
    pattern = r"step (\d+)  mIoU ([\d.]+) \(best ([\d.]+) @ (\d+)\)  pixAcc [\d.]+  loss ([\d.]+)  [\d.e-]+ s"
    found = [re.fullmatch(pattern, line) for line in lines]
    assert len(lines) == 2 and all(found), lines
    assert [m[1] for m in found] == ["2", "4"] and [m[5] for m in found] == ["2", "5"], "mean loss since the last line"
    assert float(found[1][2]) == pytest.approx(100 * model.scores.miou, abs=0.06)
    assert float(found[1][3]) == max(float(m[2]) for m in found)
    assert bar.state_dict()["best_step"] == int(found[1][4])


def test_lines_without_a_terminal(tmp_path, capsys):
    trainer(tmp_path, Progress(lines_every=0.0), val=4).fit(Scripted([4.0, 2.0, 1.0, 0.5]), tiny.Blocks())
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"step \d/4", line)]
    assert [re.search(r"loss (\S+)", line)[1] for line in lines] == ["4", "2", "1", "0.5"]
    assert all(re.search(r"lr \S+  \S+ it/s  data \d+ %  .*ETA \d+:\d\d", line) for line in lines), lines


def test_the_loss_is_not_divided_by_the_accumulated_batches(tmp_path, capsys):
    options = {"steps": 2, "val": 4, "accumulate_grad_batches": 2}
    trainer(tmp_path, Progress(lines_every=0.0), **options).fit(Scripted([4.0, 4.0, 2.0, 2.0]), tiny.Blocks())
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"step \d/2 ", line)]
    assert [re.search(r"loss (\S+)", line)[1] for line in lines] == ["4", "4", "2", "2"]


def test_nothing_is_read_from_the_device_between_refreshes(tmp_path, monkeypatch):
    from seglight.callbacks import progress

    reads = []
    value = progress._Mean.value
    monkeypatch.setattr(progress._Mean, "value", lambda self: reads.append(1) or value(self))
    trainer(tmp_path, Progress(lines_every=1e9), steps=8, val=8).fit(Scripted(), tiny.Blocks())
    assert len(reads) <= 3


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_over_the_whole_budget(tmp_path, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    runner = trainer(tmp_path, Progress(every=0.0), steps=6, val=3)
    model, data = Scripted(), tiny.Blocks()
    runner.fit(model, data)
    runner.validate(model, data, verbose=False)
    runner.test(model, data, verbose=False)
    runner.predict(model, data.val_dataloader())
    monkeypatch.undo()
    text = out.getvalue()
    lines = text.replace("\r", "\n").splitlines()
    pattern = r" 17%\|.*\| 1/6, loss \S+  lr \S+  \S+ it/s  data \d+ %  ETA \d:\d\d"
    assert any(re.match(pattern, line) for line in lines), lines
    assert max(map(len, lines)) <= 80, "a narrow terminal"
    assert any(re.match(r"100%\|.*\| 6/6,", line) for line in lines) and "/3," not in text, "one bar for the budget"
    assert re.search(r"validate 3/5", text) and re.search(r"\nstep 3  mIoU", "\n".join(lines))
    assert all(re.search(rf"{verb} 100%\|.*\| 5/5", text) for verb in ("validate", "test", "predict"))


def test_a_resumed_run_goes_on_at_its_step_and_knows_its_best(tmp_path, monkeypatch, capsys):
    first = Progress()
    trainer(tmp_path, first, ModelCheckpoint(tmp_path, "last", every_n_train_steps=2)).fit(Scripted(), tiny.Blocks())
    first.best = 0.999  # never reached again
    runner = trainer(tmp_path, first, steps=4)
    runner.fit(Scripted(), tiny.Blocks())
    runner.save_checkpoint(tmp_path / "best.ckpt")
    capsys.readouterr()
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    resumed = Progress(every=0.0)
    trainer(tmp_path, resumed, steps=8).fit(Scripted(), tiny.Blocks(), ckpt_path=tmp_path / "best.ckpt")
    monkeypatch.undo()
    text = out.getvalue()
    assert "| 4/8" in text and "| 5/8" in text and "| 0/8" not in text and "(best 99.9 @" in text
    assert resumed.best == 0.999


def test_share_of_waiting_for_data(tmp_path, capsys):
    class Slow(tiny.Blocks):
        def train_dataloader(self):
            for batch in super().train_dataloader():
                time.sleep(0.08)
                yield batch

    class Busy(Scripted):
        def training_step(self, batch, batch_idx):
            time.sleep(0.08)
            return super().training_step(batch, batch_idx)

        def on_validation_epoch_start(self):
            time.sleep(0.3)

    def shares(model, data, val):
        trainer(tmp_path, Progress(lines_every=0.0), steps=6, val=val).fit(model, data)
        return sorted(map(int, re.findall(r"data (\d+) %", capsys.readouterr().out)))

    waiting, working = shares(Scripted(), Slow(), val=6), shares(Busy(), tiny.Blocks(), val=2)
    assert waiting[len(waiting) // 2] > 60, waiting
    assert working[-1] < 60, f"a validation of 0.3 s is no waiting: {working}"


def test_other_ranks_are_silent(tmp_path, capsys):
    bar = Progress(lines_every=0.0)
    runner = trainer(tmp_path, bar)
    bar.disable()
    runner.fit(Scripted(), tiny.Blocks())
    assert "step" not in capsys.readouterr().out and bar.best is not None, "but every rank knows the best"


def test_metrics_of_another_task(tmp_path, capsys):
    trainer(tmp_path, Progress(monitor="val/AP", show=("val/mAcc", "nothing"))).fit(Scripted(), tiny.Blocks())
    assert re.search(r"step 2  mAcc [\d.]+  loss", capsys.readouterr().out), "a missing metric is no reason to fail"


@pytest.mark.parametrize("seconds, text", [(5, "0:05"), (192.4, "3:12"), (3792, "1:03:12"), (59.9, "1:00")])
def test_duration(seconds, text):
    assert _duration(seconds) == text


# -------------------------------------------------------------------- Pictures


def test_pictures_of_a_run(tmp_path):
    runner = trainer(tmp_path, Pictures(count=3), logger=RunLogger(tmp_path), log_every_n_steps=1)
    model, data = Scripted(), tiny.Blocks()
    runner.fit(model, data)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["train_batch0.jpg", "val_00_scene100.png", "val_01_scene102.png", "val_02_scene104.png"]
    for name in names:
        picture = Image.open(tmp_path / "images" / name)
        assert picture.mode == "RGB" and (picture.width > 1500) == name.startswith("val")
    for name in ("confusion", "results"):
        assert Image.open(tmp_path / "plots" / f"{name}.png").mode.startswith("RGB")
    with open(tmp_path / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(data.classes)
    assert [int(row["pixels"]) for row in rows] == model.scores.support.tolist() and rows[3]["accuracy"] == ""
    assert float(rows[0]["IoU"]) == pytest.approx(model.scores.iou[0])
    before = {name: (tmp_path / "images" / name).stat().st_mtime_ns for name in names}
    runner.test(model, data, verbose=False)
    assert sorted(p.name for p in (tmp_path / "images").glob("test*")) == [
        f"test_{i:02}_scene{200 + 2 * i}.png" for i in range(3)
    ]
    assert (tmp_path / "plots/confusion_test.png").exists() and (tmp_path / "per_class_test.csv").exists()
    assert before == {name: (tmp_path / "images" / name).stat().st_mtime_ns for name in names}


def test_the_first_batch_is_drawn_as_the_network_gets_it(tmp_path):
    batches = []

    class See(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batches.append(batch)

    trainer(tmp_path, See(), Pictures(count=0)).fit(Scripted(), tiny.Blocks(crop=64))
    sheet = np.array(Image.open(tmp_path / "images/train_batch0.jpg")).astype(int)
    assert sheet.shape == (2 * 64 + 12, 2 * 64 + 18, 3)
    for i in range(2):
        shown = sheet[6:70, 6 + 70 * i : 70 + 70 * i]
        assert np.abs(shown - batches[0]["image"][i].permute(1, 2, 0).numpy()).mean() < 12, "JPEG is not exact"
    assert [p.name for p in (tmp_path / "images").iterdir()] == ["train_batch0.jpg"], "count=0: no images"


def test_pictures_every_second_validation_and_of_a_limited_one(tmp_path):
    pictures = Pictures(count=2, every=2)
    drawn = []
    pictures._write_images = lambda trainer, model, stage, items: drawn.append([item[0] for item in items])
    runner = trainer(tmp_path, pictures, steps=6, val=2, limit_val_batches=2, num_sanity_val_steps=1)
    runner.fit(Scripted(), tiny.Blocks())
    assert drawn == [["scene100", "scene101"], [], ["scene100", "scene101"]]


def test_loaders_without_a_datamodule(tmp_path):
    data = tiny.Blocks()
    model = Scripted()
    model.palette = None
    trainer(tmp_path, Pictures(count=2)).fit(model, data.train_dataloader(), data.val_dataloader())
    assert len(list((tmp_path / "images").glob("val_*.png"))) == 2


def test_a_disk_that_takes_no_pictures_does_not_stop_training(tmp_path):
    (tmp_path / "images").write_text("in the way")
    runner = trainer(tmp_path, Pictures())
    with pytest.warns(RuntimeWarning, match="Pictures.write_images failed, training goes on"):
        runner.fit(Scripted(), tiny.Blocks())
    assert runner.global_step == 4


@pytest.mark.parametrize(
    "length, count, expected", [(5, 8, [0, 1, 2, 3, 4]), (101, 3, [0, 50, 100]), (4, 0, []), (0, 3, []), (10, 1, [0])]
)
def test_spaced(length, count, expected):
    assert spaced(length, count) == expected


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="every is 0"):
        Pictures(every=0)


TWO_RANKS = """
import sys
from pytorch_lightning import Trainer
import tiny
from seglight.callbacks.pictures import Pictures
from seglight.callbacks.progress import Progress
from seglight.loggers import RunLogger, WandB

if __name__ == "__main__":
    out, ranks = sys.argv[1], int(sys.argv[2])
    data = tiny.Blocks(batch_size=4 // ranks)
    import torch
    torch.manual_seed(0)
    model = tiny.Tiny(num_classes=4, classes=list(data.classes), loss_weights={"out": 1.0, "aux": 0.4})
    trainer = Trainer(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_steps=2,
        val_check_interval=1, check_val_every_n_epoch=None, callbacks=[Pictures(count=4), Progress()],
        logger=[RunLogger(out), WandB(save_dir=out)], default_root_dir=out, enable_checkpointing=False,
        use_distributed_sampler=False, enable_model_summary=False, log_every_n_steps=1)
    trainer.fit(model, data)
"""


@pytest.mark.slow
def test_two_ranks_give_the_same_pictures_and_one_dashboard_run(tmp_path):
    (tmp_path / "job.py").write_text(TWO_RANKS)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    for ranks in (1, 2):
        command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / f"run{ranks}"), str(ranks)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(re.findall(r"^step 2  mIoU", done.stdout, re.MULTILINE)) == 1, done.stdout
        assert len(list((tmp_path / f"run{ranks}/wandb").glob("offline-run-*"))) == 1
    one, two = (sorted(p.name for p in (tmp_path / f"run{n}/images").iterdir()) for n in (1, 2))
    assert one == two and len([name for name in two if name.startswith("val")]) == 4
    lines = [(tmp_path / f"run{n}/metrics.jsonl").read_text().count("\n") for n in (1, 2)]
    assert lines[0] == lines[1] == 4


def test_the_bar_is_closed_before_others_print(tmp_path):
    """Lightning calls callbacks in their order, and the table of a test is printed at its end."""
    from seglight.callbacks.parts import trainer_parts

    names = [type(part).__name__ for part in trainer_parts(tmp_path)["callbacks"]]
    assert names.index("Progress") < names.index("RunFolder")
