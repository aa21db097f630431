"""The run folder: everything that a run leaves behind, on the local disk, whatever loggers there are."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only

from seglight.callbacks.best import Checkpoints
from seglight.detection_metrics import InstanceScores
from seglight.loggers import RunLogger
from seglight.metrics import Scores
from seglight.official import OfficialResult, write_csv

log = logging.getLogger("seglight")
log.addHandler(logging.NullHandler())  # train.log is for these; the terminal is told by print

PACKAGES = (
    "seglight", "torch", "torchvision", "pytorch-lightning", "torchmetrics", "timm", "segmentation-models-pytorch",
    "numpy", "opencv-python-headless", "wandb",
)  # fmt: skip


def run_dir(trainer: Trainer) -> Path:
    """Where this run writes: its RunFolder's path, else Lightning's default_root_dir."""
    for callback in trainer.callbacks:
        if isinstance(callback, RunFolder):
            return callback.path
    return Path(trainer.default_root_dir)


class RunFolder(Callback):
    """Writes config.yaml, env.json, data.json, train.log, best.json and scores; tells where they are.

    Its state in a checkpoint holds the resolved config and the W&B run id, so that `seglight test --ckpt_path`
    needs no YAML and a resumed job continues the same dashboard run.

    Args:
        path: the run folder; created when the run starts.
        config: the resolved experiment as YAML.
    """

    def __init__(self, path: str | Path, config: str | None = None):
        self.path, self.config = Path(path), config
        self._handler: logging.Handler | None = None
        self._level = logging.NOTSET
        self._trainer: Trainer | None = None

    @property
    def state_key(self) -> str:
        """One name for good: checkpoints are searched by it."""
        return "RunFolder"

    def state_dict(self) -> dict[str, Any]:
        """Config and W&B run id, plain strings."""
        loggers = self._trainer.loggers if self._trainer else []
        ids = [logger.run_id for logger in loggers if getattr(logger, "run_id", None)]
        return {"config": self.config, "wandb_id": ids[0] if ids else None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the folder and write what is known before the first step."""
        self._trainer = trainer
        # Rank 0 chose the folder; one that it made meanwhile must not send the others elsewhere.
        self.path = Path(trainer.strategy.broadcast(str(self.path)))
        if not trainer.is_global_zero:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if stage == "fit":
            self._open_log(trainer)
        if self.config is not None:
            (self.path / "config.yaml").write_text(self.config)
        _write_json(self.path / "env.json", environment())

    def _open_log(self, trainer: Trainer) -> None:
        self._handler = logging.FileHandler(self.path / "train.log")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._level = log.level
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
        for name in ("seglight", "pytorch_lightning", "py.warnings"):
            logging.getLogger(name).addHandler(self._handler)
        logging.captureWarnings(True)
        log.info("started: %s", " ".join(sys.argv))

    def _close_log(self) -> None:
        if self._handler is None:
            return
        logging.captureWarnings(False)
        log.setLevel(self._level)
        for name in ("seglight", "pytorch_lightning", "py.warnings"):
            logging.getLogger(name).removeHandler(self._handler)
        self._handler.close()
        self._handler = None

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The data's fingerprint and one screen that says what is about to happen."""
        data = getattr(trainer, "datamodule", None)
        lines = summary(trainer, pl_module, self.path)  # first, since it opens both splits
        if hasattr(data, "fingerprint"):
            self._note_data(data.fingerprint(), resumed=bool(trainer.ckpt_path))
        for logger in trainer.loggers:
            if self.config is not None and hasattr(logger, "log_config"):
                logger.log_config(yaml.safe_load(self.config))
        for line in lines:
            print(line, flush=True)
            log.info(line)

    def _note_data(self, found: dict[str, Any], resumed: bool) -> None:
        """Write data.json, or say of a resumed run what has changed since."""
        path, found = self.path / "data.json", json.loads(json.dumps(found, default=str))
        if resumed and path.is_file() and (others := _differences(json.loads(path.read_text()), found)):
            text = (
                f"The data are not those that this run began with: {', '.join(others)}. If samples have moved between "
                "training and validation, scores mean nothing: bring the data back, or start a run of its own."
            )
            print(text, flush=True)
            log.warning(text)
        else:
            _write_json(path, found)

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run repeats the steps after its checkpoint, so what was recorded of them goes."""
        for logger in trainer.loggers:
            if trainer.global_step and isinstance(logger, RunLogger):
                logger.resume(trainer.global_step)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One line in the log file; the terminal has its own."""
        scores = getattr(pl_module, "scores", None)
        if scores is None or trainer.sanity_checking:
            return
        text = ", ".join(f"{name} {value:.4f}" for name, value in scores.headline.items())
        log.info("step %d: %s", trainer.global_step, text)
        if trainer.state.fn == "validate":
            self._report(pl_module, "val")

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Per-class table, the number and its definition; the same as JSON with full precision."""
        self._report(pl_module, "test")

    def _report(self, model: LightningModule, stage: str) -> None:
        scores = getattr(model, "scores", None)
        if scores is None:
            return
        record = {**scores.as_dict(stage), "definition": scores.definition}
        further = getattr(model, "official", None)
        if further is not None:
            record |= {**further.as_dict(stage), f"{further.name}_definition": further.definition}
            write_csv(self.path / f"{further.name}_{stage}.csv", further)
        _write_json(self.path / f"scores_{stage}.json", record)
        print_scores(scores)
        if further is not None:
            print_scores(further)
        print(f"Written to {self.path}", flush=True)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how it went and what to type next."""
        ours = [c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints) and c.monitor]
        best = next((c for c in ours if c.best_model_path), None)
        if best is not None and best.best_model_score is not None:
            score = float(best.best_model_score)
            step = torch.load(best.best_model_path, weights_only=True, map_location="cpu", mmap=True)["global_step"]
            record = {best.monitor: score, "step": step, "checkpoint": "checkpoints/best.ckpt"}
            _write_json(self.path / "best.json", record)
            scores = getattr(pl_module, "scores", None)
            if scores is not None:
                print_scores(scores, title=f"Last validation, step {trainer.global_step}")
            lines = [
                f"Best {best.monitor} {score:.4f} at step {step}. Everything is in {self.path}:",
                f"  pictures  {self.path}/images and {self.path}/plots",
                f"  scores    seglight test --ckpt_path {best.best_model_path}",
                f"  use it    seglight predict --ckpt_path {best.best_model_path} --source YOUR_PICTURES --out OUT",
            ]
            print("\n".join(lines), flush=True)
        if trainer.global_step < trainer.max_steps:
            print(
                f"Ended at step {trainer.global_step} of {trainer.max_steps}, "
                f"as trainer.max_time or a callback such as EarlyStopping asked for.",
                flush=True,
            )
        log.info("finished at step %d", trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The reason goes to the log file too, and an interrupted run says how it goes on."""
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit" and trainer.is_global_zero:
            last = self.path / "checkpoints" / "last.ckpt"
            kept = f"--resume goes on from {last}, the last validation." if last.is_file() else "Nothing was saved yet."
            print(f"\nseglight: interrupted at step {trainer.global_step}. {kept}", flush=True)
        log.error("stopped at step %d: %s: %s", trainer.global_step, type(exception).__name__, exception)
        self._close_log()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the log file."""
        self._close_log()


def print_scores(scores: Scores | InstanceScores | OfficialResult, title: str | None = None) -> None:
    """The per-class table and, below the number, what it means."""
    from rich.console import Console

    table = scores.as_table()
    table.title = title or table.title
    Console().print(table)


def summary(trainer: Trainer, model: LightningModule, out: Path) -> list[str]:
    """The first screen of a training run."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    data = getattr(trainer, "datamodule", None)
    lines = [f"model   {type(model).__name__}, {total:,} parameters ({trainable:,} trained)"]
    if hasattr(data, "split"):
        sizes = ", ".join(f"{len(data.split(name))} {name}" for name in ("train", "val"))
        lines.append(f"data    {type(data).__name__}: {sizes}, {data.num_classes} classes")
        effective = trainer.world_size * data.batch_size * trainer.accumulate_grad_batches
        parts = f"{trainer.world_size} device(s) x {data.batch_size} x {trainer.accumulate_grad_batches} accumulated"
        lines.append(f"batch   {effective} = {parts}")
    if hasattr(model, "lr"):
        lines.append(
            f"steps   {trainer.estimated_stepping_batches:,}, {model.optimizer} lr {model.lr:g}, {model.schedule}; "
            f"{trainer.strategy.root_device}, precision {trainer.precision}"
        )
    return [*lines, f"folder  {out}"]


def environment() -> dict[str, Any]:
    """Versions, machine and git state; no environment variables, because those hold secrets."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "packages": versions,
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Commit and changed files of the repository one stands in; None outside of one."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "changed": [line[3:] for line in status.stdout.splitlines()]}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What two fingerprints say otherwise: "val (samples, sha256)"."""
    found = []
    for key in sorted(before.keys() & now.keys()):
        old, new = before[key], now[key]
        if old != new:
            both = isinstance(old, dict) and isinstance(new, dict)
            names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name)) if both else []
            found.append(f"{key} ({', '.join(names)})" if names else key)
    return found


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")
