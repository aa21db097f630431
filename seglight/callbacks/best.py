"""Lightning's `ModelCheckpoint`, for run folders that may be moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import ModelCheckpoint


class Checkpoints(ModelCheckpoint):
    """Keeps its best score when the run folder was copied, renamed or is mounted elsewhere.

    Lightning's forgets it where paths differ, and then takes the next checkpoint for the best.
    """

    @property
    def state_key(self) -> str:
        """That of the parent, under which earlier checkpoints have its state."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

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
