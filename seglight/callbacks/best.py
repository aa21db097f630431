"""Lightning's `ModelCheckpoint`, for run folders that may be moved and runs that validate nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint


class Checkpoints(ModelCheckpoint):
    """Keeps its best score when the run folder was copied, renamed or is mounted elsewhere.

    Lightning's forgets it where paths differ, and then takes the next checkpoint for the best. It also writes nothing
    where nothing is validated; the one without a metric does so here when a validation would be due, and at the end.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """As Lightning; and save where a validation is due, if there is nothing to validate."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        every = trainer.val_check_batch  # None: by the clock
        due = every is not None and (trainer.fit_loop.total_batch_idx + 1) % every == 0
        if due and not (trainer.enable_validation and sum(trainer.num_val_batches)):
            self._save_here(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As Lightning; and save the last step, unless that is done."""
        super().on_train_end(trainer, pl_module)
        self._save_here(trainer)

    def _save_here(self, trainer: Trainer) -> None:
        saved = self._last_global_step_saved == trainer.global_step or self._should_skip_saving_checkpoint(trainer)
        if self.monitor is None and not saved:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state over, with the paths that its files have now."""

        def here(path: str) -> str:
            return str(Path(self.dirpath) / Path(path).name) if path else path

        if state_dict["dirpath"] != self.dirpath and Path(here(state_dict["best_model_path"])).is_file():
            paths = ("best_model_path", "kth_best_model_path", "last_model_path")
            state_dict = {
                **state_dict,
                "dirpath": self.dirpath,
                **{name: here(state_dict[name]) for name in paths},
                "best_k_models": {here(path): score for path, score in state_dict["best_k_models"].items()},
            }
        super().load_state_dict(state_dict)
