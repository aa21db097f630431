"""Leaves a run that is told to stop between two steps, saved, and puts its SLURM job back into the queue."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning import Callback, LightningModule, Trainer

from seglight.callbacks.best import Checkpoints
from seglight.models.base import end_process_group

log = logging.getLogger("seglight")


class ToldToStop(Callback):
    """On SIGTERM, and on SLURM's SIGUSR1, finishes the step, writes `last.ckpt` and ends the process.

    SIGTERM comes before preemption, at the end of a time limit and from `kill`; SIGUSR1 from `sbatch
    --signal=SIGUSR1@90`, ahead of the limit, and then rank 0 requeues the job as it ends. All ranks leave after the
    same step, though signals reach them at different moments. Lightning's own handlers save and talk to the other ranks
    wherever they happen to interrupt, which can hang or save half a step (its issue 21406).

    A signal during a validation ends that too, and the resumed run begins it anew; after the last step there is no such
    checkpoint, and it goes on from the validation before.

    The exit status is 128 + the number of the signal, as if the signal had ended the process.
    """

    EVERY = 4
    """Batches between two questions to the other ranks, for each of which the host waits for the device."""

    def __init__(self) -> None:
        self._received = 0
        self._agreed = 0
        self._common = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        self._received = self._agreed = 0

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which gives them back to their former owners when the fit ends."""
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._receive)
        cluster = trainer._accelerator_connector.cluster_environment
        if isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue:
            signal.signal(cluster.requeue_signal, self._receive)
        # Lightning asks the ranks for its SIGTERM before every batch and waits for the answer; it gets none any more.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where there is no sanity check."""
        self.on_sanity_check_start(trainer, pl_module)

    def _receive(self, number: int, _: Any) -> None:
        """Only note it, as this runs between any two instructions of the program. The first signal counts."""
        self._received = self._received or number

    def _ask(self, trainer: Trainer, count: int) -> int:
        """The signal that any rank has received, asked by all of them after the same batch; 0 for none."""
        if trainer.world_size == 1:
            return self._received
        if count % self.EVERY:
            return 0
        received = torch.tensor(self._received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save what a step has made, unless a validation follows, which will see to it."""
        loop = trainer.fit_loop
        if loop._should_accumulate():
            return
        self._agreed = self._ask(trainer, trainer.global_step)
        if self._agreed and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            _save(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave before the next step, when the records of the last one are written."""
        if self._agreed:
            self._leave(trainer, self._agreed)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """How many batches all ranks have; one may have another more."""
        self._common = sum(trainer.num_val_batches)
        if trainer.world_size > 1 and trainer.state.fn == "fit":
            count = torch.tensor(self._common, device=trainer.strategy.root_device)
            self._common = int(trainer.strategy.reduce(count, reduce_op="min"))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Leave in the middle of a validation."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or batch_idx >= self._common:
            return
        number = self._ask(trainer, batch_idx + 1)
        if not number:
            return
        if trainer.global_step < trainer.max_steps or trainer.max_steps < 0:
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            kept = progress.state_dict()
            for counts in (progress.total, progress.current):  # as if it had come to its first batch
                counts.ready = counts.started = 1
                counts.processed = counts.completed = 0
            _save(trainer)
            progress.load_state_dict(kept)
        self._leave(trainer, number)

    def _leave(self, trainer: Trainer, number: int) -> None:
        """End the process."""
        atexit.register(end_process_group)
        if not trainer.is_global_zero:
            raise SystemExit(0)  # another status would have Lightning's launcher kill rank 0 before it has ended well
        again = "with the same command and --resume"
        if number != signal.SIGTERM:
            again = "when SLURM starts it again"
            atexit.register(requeue)  # at the very end, as SLURM then ends all processes of the job, the workers first
        last = _last(trainer)
        kept = f"It goes on from {last} {again}." if last and last.is_file() else "There is no checkpoint."
        text = f"{signal.Signals(number).name} at step {trainer.global_step}: the run stops here. {kept}"
        log.info(text)
        print(f"\nseglight: {text}", flush=True)
        raise SystemExit(128 + number)


def _last(trainer: Trainer) -> Path | None:
    """Where the checkpoint that `--resume` takes is; None without `trainer.enable_checkpointing`."""
    keepers = [c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints) and c.monitor is None]
    return Path(keepers[0].dirpath) / "last.ckpt" if keepers else None


def _save(trainer: Trainer) -> None:
    if (last := _last(trainer)) is not None and not trainer.fast_dev_run:
        trainer.save_checkpoint(last)


def requeue() -> None:
    """Put this SLURM job back into the queue, or say that SLURM refuses."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        print(f"seglight: SLURM does not take job {job} back into its queue ({reason}). Submit it again with --resume.")
