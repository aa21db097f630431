"""Stops a run whose loss is no longer a number, before it can spoil a checkpoint."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from seglight.callbacks.run_folder import run_dir


class Guard(Callback):
    """Raises FloatingPointError when a training loss is nan or infinite, and keeps the batch that did it.

    The batch (its tensors, image ids, step and loss) goes to nan_batch.pt in the run folder, loadable with
    `torch.load(..., weights_only=True)`; on rank r > 0 to nan_batch_rank<r>.pt. A checkpoint is refused while a loss is
    unchecked or any weight is not finite, so `last.ckpt` stays one that can be continued.

    On a CPU a loss is read at once. On an accelerator it is copied asynchronously and read when the copy has arrived,
    at most `DELAY` steps later, so that the guard never makes the host wait within a healthy run.
    """

    DELAY = 4
    """Steps whose loss may be in flight; as many batches stay in device memory."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, Any, Any, int]] = deque()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take this step's loss; look at those that have arrived."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):  # training_step skipped the batch
            return
        self._pending.append((*_to_host(loss.detach()), batch, trainer.global_step))
        while self._pending:
            arrived = self._pending[0][1]
            if arrived is not None and not arrived.query() and len(self._pending) <= self.DELAY:
                break
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        """Wait for the oldest loss and judge it."""
        value, arrived, batch, step = self._pending.popleft()
        if arrived is not None:
            arrived.synchronize()
        if not math.isfinite(loss := value.item()):
            self._pending.clear()
            raise FloatingPointError(_report(trainer, loss, batch, step))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let no checkpoint through before every loss up to now and every weight is known to be finite."""
        while self._pending:
            self._look(trainer)
        weights = {
            name: weight
            for name, weight in checkpoint.get("state_dict", {}).items()
            if isinstance(weight, Tensor) and weight.is_floating_point()
        }
        names = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
        if names:
            raise FloatingPointError(
                f"At step {trainer.global_step} {len(names)} weights are nan or infinite, the first is {names[0]}; "
                f"the checkpoint is not written and the previous one is kept. Lower model.lr, lengthen model.warmup or "
                f"set trainer.gradient_clip_val, then start again or --resume."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last steps count too."""
        while self._pending:
            self._look(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget what is in flight: the run has its error already."""
        self._pending.clear()


def _to_host(loss: Tensor) -> tuple[Tensor, Any]:
    """The loss in host memory, and the event after which it may be read (None: now)."""
    if loss.device.type != "cuda":
        return loss.cpu(), None
    value = torch.empty((), dtype=loss.dtype, pin_memory=True)
    value.copy_(loss.reshape(()), non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return value, arrived


def _report(trainer: Trainer, value: float, batch: Any, step: int) -> str:
    """Save the batch and say what happened."""
    ids = list(batch.get("image_id", [])) if isinstance(batch, dict) else []
    rank = trainer.global_rank
    path = run_dir(trainer) / (f"nan_batch_rank{rank}.pt" if rank else "nan_batch.pt")
    kept = {"loss": value, "step": step, "batch": _plain(batch)}
    where = f"The batch is kept in {path}."
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        where = f"The batch could not be kept in {path} ({error})."
    images = f" on the images {', '.join(map(str, ids))}" if ids else ""
    return (
        f"The training loss became {value} at step {step}{images}. {where} The checkpoint before it is untouched. "
        f"Usual causes: a learning rate too high (lower model.lr, lengthen model.warmup or set "
        f"trainer.gradient_clip_val), 16-bit precision (try trainer.precision 32-true), or a fault in these images."
    )


def _plain(value: Any) -> Any:
    """Tensors on the CPU and plain types only, so that the file loads with weights_only=True."""
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor).cpu().clone()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
