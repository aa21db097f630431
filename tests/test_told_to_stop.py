"""A run that a signal stops, wherever it arrives, and that is resumed, ends as if nothing had happened."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.plugins.environments import SLURMEnvironment
from tiny import Blocks, Tiny

from seglight.callbacks.parts import trainer_parts
from seglight.callbacks.told_to_stop import requeue
from seglight.models.base import end_process_group

ROOT = Path(__file__).parents[1]
LOOKS = {"classes": list(Blocks.classes), "palette": list(Blocks.palette)}


class Kill(Callback):
    """Sends this process a signal at a hook's n-th call, and keeps the batches that were trained on."""

    def __init__(self, hook=None, count=0, number=signal.SIGTERM):
        self.hook, self.left, self.number, self.seen = hook, count, number, []

    def _at(self, hook):
        if hook == self.hook:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer, *_):
        self._at("start")

    def on_before_zero_grad(self, *_):
        self._at("step")

    def on_after_backward(self, *_):
        self._at("backward")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(tuple(batch["image_id"]))
        self._at("end")

    def on_validation_batch_start(self, trainer, *_):
        if not trainer.sanity_checking:
            self._at("validation")


def fit(folder, kill=None, resume=False, plugins=(), val_every=4, val_size=5, **options):
    """Batches seen, weights, exit status of 12 steps."""
    seed_everything(1)
    kill = kill or Kill()
    parts = trainer_parts(folder)
    parts["callbacks"] = [kill, *parts["callbacks"]]
    parts["plugins"] += plugins
    every = val_every * options.get("accumulate_grad_batches", 1)
    runner = Trainer(
        accelerator="cpu", max_steps=12, val_check_interval=every, check_val_every_n_epoch=None, log_every_n_steps=3,
        use_distributed_sampler=False, **parts, **options,
    )  # fmt: skip
    model, status = Tiny(4, dropout=0.5, loss_weights={"out": 1.0, "aux": 0.4}, **LOOKS), 0
    last = folder / "checkpoints/last.ckpt"
    try:
        runner.fit(model, Blocks(seed=3, val_size=val_size), ckpt_path=last if resume else None)
    except SystemExit as left:
        status = left.code
    return kill.seen, model.network.state_dict(), status


def curve(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nobody stopped, with one and with two batches to a step."""
    runs = {}
    for count in (1, 2):
        folder = tmp_path_factory.mktemp("whole")
        seen, weights, status = fit(folder, accumulate_grad_batches=count)
        assert status == 0 and len(seen) == 12 * count
        runs[count] = seen, weights, curve(folder)
    return runs


@pytest.mark.parametrize(
    ("hook", "count", "accumulate", "kept"),
    [
        ("start", 1, 1, 1),
        ("backward", 6, 1, 6),
        ("step", 6, 1, 6),
        ("end", 6, 1, 6),
        ("backward", 3, 2, 2),  # the first of two batches: the step is finished
        ("end", 3, 2, 2),
        ("end", 4, 2, 2),
        ("backward", 4, 1, 4),  # a validation follows
        ("validation", 3, 1, 4),  # in the middle of one: it is begun anew
        ("validation", 7, 1, 8),
        ("end", 16, 2, 8),
        ("validation", 12, 1, 8),  # after the last step
        ("end", 11, 1, 11),
    ],
)  # fmt: skip
def test_a_stopped_run_goes_on_as_if_never_stopped(tmp_path, whole, hook, count, accumulate, kept, capsys):
    seen, weights, records = whole[accumulate]
    before = signal.getsignal(signal.SIGTERM)
    first, _, status = fit(tmp_path, Kill(hook, count), accumulate_grad_batches=accumulate)
    assert status == 128 + 15 and signal.getsignal(signal.SIGTERM) is before
    last = tmp_path / "checkpoints/last.ckpt"
    said = " ".join(capsys.readouterr().out.split())
    assert torch.load(last, weights_only=True)["global_step"] == kept
    assert "SIGTERM at step" in said and "--resume" in said
    then, resumed, status = fit(tmp_path, resume=True, accumulate_grad_batches=accumulate)
    assert status == 0 and first[: kept * accumulate] + then == seen
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert curve(tmp_path) == records


class KilledInValidation(Kill):
    def on_validation_batch_start(self, trainer, *_):
        if not trainer.sanity_checking:
            raise RuntimeError("killed")


def test_no_checkpoint_comes_between_a_step_and_its_validation(tmp_path):
    """Lightning would go on from there without that validation."""
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, KilledInValidation("backward", 4))
    assert not (tmp_path / "checkpoints/last.ckpt").exists()


def test_a_run_without_validations(tmp_path):
    """The records of the last step are written, and the end is an end."""
    seen, weights, _ = fit(tmp_path / "whole", limit_val_batches=0)
    first, _, status = fit(tmp_path / "run", Kill("backward", 4), limit_val_batches=0)
    assert status == 128 + 15 and first == seen[:4]
    then, resumed, _ = fit(tmp_path / "run", resume=True, limit_val_batches=0)
    assert first + then == seen and all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert fit(tmp_path / "last", Kill("backward", 12), limit_val_batches=0)[2] == 0


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM job whose `scontrol` writes down what it was told."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def answer(status):
        script = f'#!/bin/sh\necho "$@" >> {folder}/told\necho "Requested operation not supported" >&2\nexit {status}\n'
        (folder / "scontrol").write_text(script)
        (folder / "scontrol").chmod(0o755)
        return folder / "told"

    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return answer


class OneTask(SLURMEnvironment):
    """As in a job of one task."""

    def world_size(self):
        return 1

    def validate_settings(self, num_devices, num_nodes):
        pass


@pytest.mark.parametrize(("hook", "count", "kept"), [("backward", 6, 6), ("validation", 7, 8)])
def test_slurm_puts_the_job_back(tmp_path, slurm, whole, hook, count, kept, capsys, monkeypatch):
    told, at_exit = slurm(0), []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    run = tmp_path / "run"
    seen, _, status = fit(run, Kill(hook, count, signal.SIGUSR1), plugins=[OneTask()])
    assert status == 128 + signal.SIGUSR1 and not told.exists()
    of_gloo, when_all_is_ended = at_exit
    assert of_gloo is end_process_group
    when_all_is_ended()
    assert told.read_text() == "requeue 7\n"
    assert "when SLURM starts it again" in " ".join(capsys.readouterr().out.split())
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == kept
    assert not list(run.rglob("hpc_ckpt*"))
    then, weights, _ = fit(run, resume=True)
    assert seen[:kept] + then == whole[1][0]
    assert all(torch.equal(weights[name], whole[1][1][name]) for name in weights)


def test_slurm_may_refuse(slurm, capsys):
    told = slurm(1)
    requeue()
    said = capsys.readouterr().out
    assert told.read_text() == "requeue 7\n"
    assert "job 7 back into its queue (Requested operation not supported)" in said and "--resume" in said


def test_the_task_of_an_array_is_put_back_alone(slurm, monkeypatch, capsys):
    told = slurm(0)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue()
    assert told.read_text() == "requeue 40_3\n"
    monkeypatch.setenv("PATH", "")
    requeue()
    assert "No such file" in capsys.readouterr().out


def test_workers_leave_the_signals_to_the_ranks():
    """SLURM sends them to every process, and a worker has the handlers that its rank had when it was started."""
    others = set(multiprocessing.active_children())
    before = signal.signal(signal.SIGUSR1, lambda *_: os._exit(3))
    try:
        batches = iter(Blocks(workers=1).train_batches(20))
        first = next(batches)
        (worker,) = set(multiprocessing.active_children()) - others
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(worker.pid, number)
        assert len([first, *batches]) == 20
    finally:
        signal.signal(signal.SIGUSR1, before)


SCRIPT = """
    from tiny import Blocks
    if __name__ == "__main__":
        loader = Blocks(workers=1)
        batches, evaluation = iter(loader.train_batches(20)), loader.val_dataloader()
        next(batches)
        for batch in evaluation:
            break
"""


def test_a_script_that_leaves_a_loader_ends(tmp_path):
    """Python tells each worker once to end, which ours let pass, and would wait for it for ever."""
    (tmp_path / "job.py").write_text(textwrap.dedent(SCRIPT))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(tmp_path / "job.py")], env=env, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_stop_is_that_of_one_fit(tmp_path):
    """A notebook goes on after it, with the same callbacks."""
    kill, parts = Kill("backward", 2), trainer_parts(tmp_path)
    options = {"accelerator": "cpu", "max_steps": 4, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    parts["callbacks"] = [kill, *parts["callbacks"]]
    with pytest.raises(SystemExit):
        Trainer(**options, **parts).fit(Tiny(4, **LOOKS), Blocks())
    again = Trainer(**options, **parts)
    again.fit(Tiny(4, **LOOKS), Blocks())
    assert again.global_step == 4


def test_validations_by_the_clock(tmp_path):
    clock = {"val_check_interval": "00:00:10:00", "check_val_every_n_epoch": None}
    runner = Trainer(accelerator="cpu", max_steps=3, use_distributed_sampler=False, **clock, **trainer_parts(tmp_path))
    runner.fit(Tiny(4, **LOOKS), Blocks())
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


JOB = """
    import os
    import sys
    from pathlib import Path
    import torch
    from test_told_to_stop import CASES, Kill, fit

    here = os.environ.get("LOCAL_RANK", "0")
    options = {"devices": 2, "strategy": "ddp", "val_every": 6, "val_size": 11}
    whole = fit(Path("whole"), **options)
    results = []
    for rank, hook, count, _ in CASES:
        folder = Path(f"{rank}{hook}")
        first = fit(folder, Kill(hook, count) if here == rank else None, **options)
        step = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
        results.append((first, step, fit(folder, resume=True, **options)))
    torch.save((whole, results), f"{here}.pt")
"""

CASES = [  # rank that is told, where, and the step that the run goes on from
    ("1", "backward", 3, 4),
    ("0", "step", 5, 6),  # in the validation after the next step
    ("0", "backward", 7, 8),
    ("1", "validation", 2, 6),
]


def test_all_ranks_leave_after_the_same_batch(tmp_path):
    """One of two is told, in the middle of a step; Lightning would talk to the other from within that step."""
    (tmp_path / "job.py").write_text(textwrap.dedent(JOB))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "job.py")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        (seen, weights, _), results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert len(results) == len(CASES)
        for (_, _, _, kept), (first, step, then) in zip(CASES, results, strict=True):
            assert first[2] == (0 if rank else 128 + 15) and then[2] == 0
            assert step == kept and first[0] == seen[:kept] and first[0] + then[0] == seen
            assert all(torch.equal(then[1][name], weights[name]) for name in weights)
