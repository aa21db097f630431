"""The terminal during a run: one bar (or plain lines) for the whole budget, one line per validation."""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm


class Progress(ProgressBar):
    """Shows loss, learning rate, steps per second, time spent waiting for data, GPU memory and remaining time.

    The loss is the mean since the last refresh and is read from the device at most once per `every` seconds. "data" is
    the share of the training time between the end of one step and the start of the next, that is, mostly waiting for
    the loader; gaps with a validation or a checkpoint in them are not counted. Speed excludes validation, the
    remaining time includes it. Where stdout is no terminal, a line every `lines_every` seconds takes the place of the
    bar. The best score is part of the checkpoint, so that a resumed run still knows it.

    Args:
        every: seconds between two refreshes of the bar.
        lines_every: seconds between two lines without a terminal.
        monitor: the metric of the validation line, in 0..1; shown in percent.
        show: further metrics of that line.
    """

    def __init__(
        self,
        every: float = 1.0,
        lines_every: float = 10.0,
        monitor: str = "val/mIoU",
        show: tuple[str, ...] = ("val/pixAcc",),
    ):
        super().__init__()
        self.every, self.lines_every, self.monitor, self.show = every, lines_every, monitor, show
        self.best: float | None = None
        self.best_step = 0
        self._enabled = True
        self._bar: tqdm | None = None

    @property
    def state_key(self) -> str:
        """One name whatever the options, so that a resumed run finds its best."""
        return "Progress"

    def state_dict(self) -> dict[str, Any]:
        """The best score so far and its step."""
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def enable(self) -> None:
        """Lightning calls this around its learning rate and batch size finders."""
        self._enabled = True

    def disable(self) -> None:
        """No output, for instance on ranks other than 0."""
        self._enabled = False

    @property
    def terminal(self) -> bool:
        """Whether there is a bar rather than lines."""
        return sys.stdout.isatty()

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Write a line without breaking the bar."""
        if self._enabled:
            text = sep.join(map(str, args))
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)

    def _open_bar(self, description: str, total: float, start: int = 0) -> None:
        self._close_bar()
        if self._enabled and self.terminal:
            known = None if math.isinf(total) else int(total)
            layout = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"  # 80 columns must do
            columns, rows = _size()
            self._bar = tqdm(
                desc=description, total=known, initial=start, file=sys.stdout, ncols=columns, nrows=rows,
                bar_format=layout if known else "{desc}{n_fmt}{postfix}",
            )  # fmt: skip

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, n: int, total: float, text: str, head: str) -> None:
        """Refresh the bar, or write a line."""
        if self._bar is not None:
            self._bar.n, (self._bar.ncols, self._bar.nrows) = n, _size()
            self._bar.set_postfix_str(text)
        else:
            self.print(f"{head} {n}{'' if math.isinf(total) else f'/{int(total)}'}  {text}".rstrip())

    # ------------------------------------------------------------------ training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The bar starts where a resumed run does."""
        self._total = trainer.estimated_stepping_batches
        self._first, self._begun = trainer.global_step, time.perf_counter()
        self._gap_began: float | None = None
        self._step_began = self._begun
        self._validation_loss = _Mean()
        self._open_bar("", self._total, self._first)
        self._new_window(trainer)

    def _new_window(self, trainer: Trainer) -> None:
        """What the numbers of the next refresh are taken over."""
        self._shown = time.perf_counter()
        self._window_step = trainer.global_step
        self._working = self._waiting = 0.0
        self._loss = _Mean()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The data has come."""
        self._step_began = time.perf_counter()
        if self._gap_began is not None:
            self._waiting += self._step_began - self._gap_began

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up; refresh once in a while."""
        if not self._enabled:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._loss.add(loss.detach())
        now = time.perf_counter()
        self._working += now - self._step_began
        if now - self._shown >= (self.every if self._bar is not None else self.lines_every):
            self._refresh(trainer)
            now = time.perf_counter()
        self._gap_began = now

    def _refresh(self, trainer: Trainer) -> None:
        step, spent = trainer.global_step, self._working + self._waiting
        # Lightning divides the loss by the number of accumulated batches
        loss = self._loss.value() * trainer.accumulate_grad_batches
        self._validation_loss.add(loss, self._loss.count)
        parts = [f"loss {loss:.4g}", f"lr {trainer.optimizers[0].param_groups[0]['lr']:.2g}"]
        if spent > 0:
            parts += [f"{(step - self._window_step) / spent:.3g} it/s", f"data {100 * self._waiting / spent:.0f} %"]
        if step > self._first and not math.isinf(self._total):
            pace = (time.perf_counter() - self._begun) / (step - self._first)
            parts.append(f"ETA {_duration(pace * (self._total - step))}")
        if torch.cuda.is_available():  # last: the end of the line is cut in a narrow terminal
            parts.append(f"GPU {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")
        self._show(step, self._total, "  ".join(parts), "step")
        self._new_window(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writing a checkpoint is not waiting for data."""
        self._gap_began = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One closing line."""
        if self._enabled and self._loss.count:
            self._refresh(trainer)
        self._close_bar()
        best = "" if self.best is None else f", best {_name(self.monitor)} {100 * self.best:.1f} @ {self.best_step}"
        steps = trainer.global_step - self._first
        self.print(f"trained {steps} steps in {_duration(time.perf_counter() - self._begun)}{best}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal clean for the message."""
        self._close_bar()

    # ---------------------------------------------------------------- evaluation

    def _start(self, trainer: Trainer, description: str, batches: Any) -> None:
        self._batches = sum(batches) if isinstance(batches, list) else batches
        self._done = 0
        self._eval_began = self._eval_shown = time.perf_counter()
        self._gap_began = None
        if trainer.state.fn != "fit":
            self._open_bar(f"{description} ", self._batches)

    def _advance(self, trainer: Trainer, description: str) -> None:
        self._done += 1
        now = time.perf_counter()
        if not self._enabled or trainer.sanity_checking:
            return
        if now - self._eval_shown < (self.every if self._bar is not None else self.lines_every):
            return
        self._eval_shown = now
        if trainer.state.fn == "fit" and self._bar is not None:  # the bar goes on counting steps
            self._bar.set_postfix_str(f"{description} {self._done}/{self._batches}")
        else:
            self._show(self._done, self._batches, "", description)

    def _finish(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit":
            if self._bar is not None:
                self._bar.n = self._done
                self._bar.refresh()
            self._close_bar()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Within `fit` the training bar tells how far it is, else there is a bar of its own."""
        self._start(trainer, "validate", trainer.num_val_batches)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """One batch done."""
        self._advance(trainer, "validate")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One line: the score, the best one, the mean training loss since the last validation, and the time it took."""
        self._finish(trainer)
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        step, metrics = trainer.global_step, trainer.callback_metrics
        parts = []
        if self.monitor in metrics:
            value = float(metrics[self.monitor])
            if not math.isnan(value) and (self.best is None or value > self.best):
                self.best, self.best_step = value, step
            best = "" if self.best is None else f" (best {100 * self.best:.1f} @ {self.best_step})"
            parts.append(f"{_name(self.monitor)} {100 * value:.1f}{best}")
        parts += [f"{_name(name)} {100 * float(metrics[name]):.1f}" for name in self.show if name in metrics]
        if not self._enabled:
            return
        if self._loss.count:
            self._validation_loss.add(self._loss.value() * trainer.accumulate_grad_batches, self._loss.count)
        if self._validation_loss.count:
            parts.append(f"loss {self._validation_loss.value():.4g}")
        parts.append(f"{time.perf_counter() - self._eval_began:.3g} s")
        self.print(f"step {step}  " + "  ".join(parts))
        self._validation_loss = _Mean()
        self._new_window(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A bar of its own."""
        self._start(trainer, "test", trainer.num_test_batches)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """One batch done."""
        self._advance(trainer, "test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The scores are printed by others."""
        self._finish(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A bar of its own."""
        self._start(trainer, "predict", trainer.num_predict_batches)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """One batch done."""
        self._advance(trainer, "predict")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._finish(trainer)


class _Mean:
    """A running mean that stays on its device until it is read."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, value: Tensor | float, count: int = 1) -> None:
        self.total = self.total + value * count if count != 1 else self.total + value
        self.count += count

    def value(self) -> float:
        return float(self.total) / self.count if self.count else math.nan


def _size() -> tuple[int, int]:
    """Columns and rows of the terminal; 80 x 24 where it says 0 x 0, as in some containers: tqdm would hide."""
    return tuple(shutil.get_terminal_size())


def _name(metric: str) -> str:
    return metric.split("/")[-1]


def _duration(seconds: float) -> str:
    """3 min 12 s as 3:12, more than an hour as 1:03:12."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
