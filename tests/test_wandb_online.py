"""`WandB` against a server of our own: online, resumed, uploaded later, and with a server that fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import wandb
from pytorch_lightning import Trainer
from wandb_server import KEY, Run, Server

from seglight.callbacks.pictures import Pictures
from seglight.loggers import Masked, RunLogger, WandB

ROOT = Path(__file__).parents[1]


def variables(server: Server, home: Path) -> dict[str, str]:
    """The environment of somebody who is logged in at the server."""
    folders = {f"WANDB_{name}_DIR": str(home) for name in ("CONFIG", "CACHE", "DATA", "ARTIFACT")}
    access = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}
    return {**folders, **access, "NETRC": str(home / "netrc")}


HURRY = "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL"
"""Seconds between two parts of a history, 15 otherwise: so that a test need not wait for the end of a run."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server and the environment that leads to it; wandb reads that once, so it begins anew before and after."""
    with Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in variables(server, tmp_path_factory.mktemp("home")).items():
            patch.setenv(name, value)
        for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_SILENT"):
            patch.delenv(name, raising=False)
        wandb.teardown()
        yield server
        server.fault = None
        wandb.teardown()


@pytest.fixture
def server(served):
    yield served
    served.fault = None


@pytest.fixture
def hurried(server, monkeypatch):
    monkeypatch.setenv(HURRY, "1")
    wandb.teardown()
    yield server
    wandb.teardown()


def until(condition, seconds: float = 20.0):
    """Wait for what a process beside this one will do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def steps(run: Run) -> list[int]:
    return [entry["step"] for entry in run.lines("history")]


def axes(run: Run) -> dict[str, str | None]:
    """The x axis of each metric that is defined; wandb's fields are 1 name, 2 name with a star, 5 axis, from 1 on."""
    metrics = run.config["_wandb"]["m"]
    names = [metric.get("1", metric.get("2")) for metric in metrics]
    return {
        name: names[metric["5"] - 1] if "5" in metric else None for name, metric in zip(names, metrics, strict=True)
    }


@pytest.fixture(scope="module")
def trained(served, tmp_path_factory):
    """A training through the front classes: the server's run, its id, the folder."""
    folder = tmp_path_factory.mktemp("online")
    before = len(served.calls)
    data = tiny.Blocks()
    logger = WandB(project="proj", save_dir=folder, tags=["t"])
    trainer = Trainer(
        max_steps=4, val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=1, log_every_n_steps=1,
        logger=[RunLogger(folder), logger], callbacks=[Pictures(count=2)], default_root_dir=folder, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    logger.log_config({"model": {"class_path": "Tiny", "init_args": {"lr": 0.1}}})
    trainer.fit(tiny.Tiny(num_classes=4, classes=list(data.classes), palette=list(data.palette)), data)
    logger.finish()
    return served.runs[logger.run_id], logger.run_id, folder, served.calls[before:]


def test_one_run_with_its_config_before_its_history(trained):
    run, name, _, calls = trained
    assert {given["name"] for operation, given in calls if operation == "UpsertBucket"} == {name}
    configured = next(i for i, (_, given) in enumerate(calls) if '"Tiny"' in str(given.get("config")))
    first = next(i for i, (_, given) in enumerate(calls) if "wandb-history.jsonl" in (given.get("files") or ()))
    assert configured < first
    assert run.config["model"] == {"class_path": "Tiny", "init_args": {"lr": 0.1}} and run.state == "finished"


def test_history_summary_and_axis_arrive(trained):
    run = trained[0]
    history = run.lines("history")
    assert {"train/loss", "val/mIoU", "val_class/dark", "media/val", "val/confusion"} <= set().union(*history)
    assert steps(run) == sorted(steps(run)) and set(steps(run)) == {0, 1, 2, 3, 4}
    best = max(entry["val/mIoU"] for entry in history if "val/mIoU" in entry)
    assert run.lines("summary")[-1]["val/mIoU"] == {"max": best}
    assert axes(run) == {"step": None, "*": "step", "val/mIoU": "step", "val/AP": "step"}


def test_pictures_masks_and_tables_arrive(trained, served):
    run, name, _, _ = trained
    for entry in run.lines("history"):
        for item in (entry.get(key) for key in ("media/val", "media/val_colours", "val/confusion")):
            assert item is None or set(item["filenames"]) <= set(run.files)
    masks = [mask for masks in run.lines("summary")[-1]["media/val"]["all_masks"] for mask in masks.values()]
    assert len(masks) == 6 and all(run.files[mask["path"]].startswith(b"\x89PNG") for mask in masks)
    (table,) = (files for artifact, files in served.artifacts.items() if name in artifact)
    content = json.loads(table["val_class/table.table.json"])
    assert [row[0] for row in content["data"]] == ["dark", "middle", "bright", "never"]


def test_the_key_is_written_nowhere(trained):
    run, _, folder, _ = trained
    local = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert len(local) > 10 and not any(KEY.encode() in content for content in [*local, *run.files.values()])


def test_masks_leave_the_axis_alone(server, tmp_path):
    image = np.zeros((8, 9, 3), np.uint8)
    logger = WandB(save_dir=tmp_path)
    logger.log_masks("media/val", [Masked(image, {"prediction": image[..., 0]})], {"prediction": {0: "a"}}, 1)
    run = server.runs[logger.run_id]
    until(lambda: "mask/class_labels" in run.config["_wandb"])  # wandb sends its config every 5 s
    assert axes(run)["*"] == "step", "before the end of the run, too"
    logger.finish()


def test_a_resumed_job_continues_its_run(server, tmp_path):
    best = []
    for values in ((0.5, 0.9), (0.6, 0.7)):
        logger, local = WandB(save_dir=tmp_path, id="resumed"), RunLogger(tmp_path)
        logger.log_config({"out": "x", "job": len(best)})
        first = 1 + 2 * len(best)
        for step, value in enumerate(values, first):
            for each in (local, logger):
                each.log_metrics({"val/mIoU": value}, step)
        local.finalize("success")
        logger.finish()
        best.append(server.runs["resumed"].lines("summary")[-1]["val/mIoU"])
    run = server.runs["resumed"]
    assert [(entry["_step"], entry["step"]) for entry in run.lines("history")] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert best == [{"max": 0.9}, {"max": 0.9}], "the best value of the job before is not forgotten"
    assert run.config["job"] == 1 and run.config["out"] == "x" and run.state == "finished"


@pytest.mark.parametrize("status, state", [("success", "finished"), ("failed", "failed")])
def test_the_end_of_a_training_is_the_end_of_its_run(server, tmp_path, status, state):
    logger = WandB(save_dir=tmp_path, id=status)
    logger.log_metrics({"train/loss": 1.0}, 1)
    logger.finalize(status)  # what Lightning calls, also after an error
    logger.finish()
    assert server.runs[status].state == state


def test_the_printed_command_uploads_what_was_recorded_offline(server, tmp_path, monkeypatch, capsys):
    image = np.zeros((8, 9, 3), np.uint8)
    for step in (1, 2):
        logger = WandB(save_dir=tmp_path, id="later", offline=True)
        logger.log_config({"job": step})
        logger.log_metrics({"val/mIoU": step / 10}, step)
        logger.log_masks("media/val", [Masked(image, {"prediction": image[..., 0]})], {"prediction": {0: "a"}}, step)
        logger.log_table("val_class/table", ["class"], [["a"]], step=step)
        logger.finalize("success")
        logger.finish()
        time.sleep(1.1)  # wandb names its folders by the second
    assert "later" not in server.runs
    command = capsys.readouterr().out.splitlines()[-1].split("To upload:  ")[1].split()
    assert command[:2] == ["wandb", "sync"]
    done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    run = server.runs["later"]
    assert steps(run) == [1, 1, 1, 2, 2, 2] and run.config["job"] == 2 and run.state == "finished"
    assert axes(run)["*"] == "step"
    assert {path.rpartition(".")[2] for path in run.files} >= {"jpg", "png"}
    assert any("later" in artifact for artifact in server.artifacts)


def test_a_server_that_is_lost_costs_a_limited_time_at_the_end(hurried, tmp_path, monkeypatch, capfd):
    server = hurried
    monkeypatch.setattr(WandB, "END_TIMEOUT", 1.0)
    logger = WandB(save_dir=tmp_path)
    logger.log_metrics({"train/loss": 1.0}, 1)
    until(lambda: steps(server.runs[logger.run_id]) == [1])
    server.fault = 500
    logger.log_metrics({"train/loss": 0.5}, 2)
    logger.finalize("success")
    start = time.monotonic()
    logger.finish()
    assert time.monotonic() - start < 10
    out, _ = capfd.readouterr()
    line = out.splitlines()[-1]
    assert line.startswith(f"W&B: {server.url} has not taken the whole run") and steps(server.runs[logger.run_id]) == [
        1
    ]
    server.fault = None
    command = line.split("later:  ")[1].split()
    done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and 2 in steps(server.runs[logger.run_id]), done.stderr


@pytest.mark.parametrize("fault, reason", [(None, "401"), (0, "deadline"), (500, "deadline")])
def test_a_server_that_cannot_be_used_means_offline(server, tmp_path, monkeypatch, capfd, fault, reason):
    server.fault = fault
    monkeypatch.setattr(WandB, "START_TIMEOUT", 2.0)
    before = len(server.runs)
    settings = wandb.Settings(silent=True, init_timeout=2.0, api_key="f" * 40 if fault is None else KEY)
    logger = WandB(save_dir=tmp_path, settings=settings)
    start = time.monotonic()
    logger.log_metrics({"a": 1.0}, 1)
    assert time.monotonic() - start < 15
    logger.finalize("success")
    logger.finish()
    said = capfd.readouterr().out.splitlines()
    assert said[0].startswith(f"W&B: {server.url} cannot be used (") and reason in said[0] and "relogin" in said[0]
    assert said[1].startswith("W&B: recorded offline. To upload:  wandb sync ") and len(server.runs) == before


def test_tables_pause_when_one_has_to_wait(tmp_path, monkeypatch, capsys):
    class Slow:
        id, logged = "x", 0

        def log(self, values):
            Slow.logged += 1
            time.sleep(0.2)

    monkeypatch.setattr(WandB, "TABLE_TIMEOUT", 0.1)
    logger = WandB(save_dir=tmp_path)
    logger._experiment = Slow()
    for pause, logged in ((600.0, 1), (600.0, 1)):
        monkeypatch.setattr(WandB, "TABLE_PAUSE", pause)
        logger.log_table("val_class/table", ["class"], [["a"]], step=1)
        assert Slow.logged == logged
    assert capsys.readouterr().out.count("W&B: the table val_class/table kept the training waiting") == 1
    logger._no_tables_until = 0.0
    logger.log_table("val_class/table", ["class"], [["a"]], step=2)
    assert Slow.logged == 2, "after the pause there are tables again"


# ---------------------------------------------------------- through the command line


def command(out: Path, *more: str) -> list[str]:
    small = ["--trainer.max_steps", "12", "--val_every", "3", "--trainer.log_every_n_steps", "1", "--data.workers", "0"]
    small += ["--data.train_size", "32", "--data.val_size", "4", "--data.image_size", "[64, 64]"]
    experiment = ["-c", str(ROOT / "experiments/shapes/quickstart.yaml"), "--trainer.accelerator", "cpu"]
    return [sys.executable, "-m", "seglight", "fit", *experiment, *small, "--out", str(out), *more]


@pytest.fixture
def job(tmp_path):
    """A server, and the options of subprocesses that are logged in there."""
    with Server() as server:
        known = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        env = {**known, **variables(server, tmp_path / "home"), "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        yield (
            server,
            {"env": env, "cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        )


@pytest.mark.slow
def test_a_killed_job_resumes_its_run(job, tmp_path):
    server, options = job
    steady = ["--model.schedule", "constant"]  # the steps that are made twice are the same
    endless = [*steady, "--trainer.max_steps", "999999"]  # however fast it is, it does not end before it is killed
    hurry = {**options, "env": {**options["env"], HURRY: "1"}}
    killed = subprocess.Popen(command(tmp_path / "run", *endless), **hurry)
    until(lambda: any(6 in steps(run) for run in server.runs.values()), 200)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and [run.state for run in server.runs.values()] == ["running"]
    kept = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    (name,) = server.runs
    before = steps(server.runs[name])
    more = [*steady, "--trainer.max_steps", str(kept + 6), "--resume"]
    done = subprocess.run(command(tmp_path / "run", *more), timeout=300, **options)
    assert done.returncode == 0, done.stdout
    run = server.runs[name]
    assert list(server.runs) == [name] and run.state == "finished" and KEY not in done.stdout
    assert steps(run)[: len(before)] == before, "what the killed job sent stays"
    assert [entry["_step"] for entry in run.lines("history")] == list(range(len(run.lines("history"))))
    validated = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    best = max(record["val/mIoU"] for record in validated if "val/mIoU" in record)
    assert run.lines("summary")[-1]["val/mIoU"]["max"] == pytest.approx(best, abs=1e-6)


@pytest.mark.slow
def test_two_ranks_make_one_run(job, tmp_path):
    server, options = job
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(command(tmp_path / "run", *ranks), timeout=300, **options)
    assert done.returncode == 0, done.stdout
    (run,) = server.runs.values()
    assert run.state == "finished" and set(steps(run)) == set(range(13))
    assert len(re.findall("^W&B: http", done.stdout, re.MULTILINE)) == 1


@pytest.mark.slow
def test_a_job_that_loses_its_server_finishes(job, tmp_path):
    server, options = job
    longer = ["--trainer.max_steps", "40", "--val_every", "20"]
    server.lost = True  # not from here: a fast job may have sent all there is before this process looks
    done = subprocess.run(command(tmp_path / "run", *longer), timeout=400, **options)
    assert done.returncode == 0 and len(server.runs) == 1 and server.fault == 0, done.stdout
    assert (tmp_path / "run/best.json").is_file() and done.stdout.count("has not taken the whole run") == 1
