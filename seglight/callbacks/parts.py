"""The callbacks, logger and checkpoints of every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seglight.callbacks.best import Checkpoints
from seglight.callbacks.guard import Guard
from seglight.callbacks.pictures import Pictures
from seglight.callbacks.predictions import Predictions
from seglight.callbacks.progress import Progress
from seglight.callbacks.run_folder import RunFolder
from seglight.callbacks.told_to_stop import ToldToStop
from seglight.checkpoints import AtomicCheckpointIO
from seglight.loggers import RunLogger


def trainer_parts(
    out: str | Path,
    config: str | None = None,
    monitor: str = "val/mIoU",
    loggers: Any = (),
    show: tuple[str, ...] = ("val/pixAcc",),
) -> dict:
    """What the command line adds to a `Trainer`, for scripts and notebooks: `Trainer(..., **trainer_parts("runs/x"))`.

    Args:
        out: the run folder.
        config: the resolved experiment as YAML, stored in the folder and in every checkpoint.
        monitor: the metric whose highest value marks `best.ckpt`; `model.monitor` names that of a model.
        loggers: Lightning loggers beside the local one.
        show: further metrics of the line after a validation; `model.show`.

    Returns:
        `callbacks`, `logger`, `plugins` and `default_root_dir` for the Trainer.
    """
    out = Path(out)
    keep = {"dirpath": out / "checkpoints", "enable_version_counter": False, "save_on_train_epoch_end": False}
    return {
        "callbacks": [
            Progress(monitor=monitor, show=show),  # first, so that its bar is closed when others print
            RunFolder(out, config),
            Guard(),
            Pictures(),
            Predictions(),
            ToldToStop(),
            Checkpoints(filename="best", monitor=monitor, mode="max", **keep),
            Checkpoints(filename="last", **keep),
        ],
        "logger": [RunLogger(out), *loggers],
        "plugins": [AtomicCheckpointIO()],
        "default_root_dir": str(out),
    }
