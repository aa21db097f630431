"""Loggers: `RunLogger` writes into the run folder, `WandB` to Weights & Biases; `log_*` send to any of them."""

from seglight.loggers.dashboard import Masked, WandB
from seglight.loggers.local import RunLogger, read_metrics
from seglight.loggers.send import log_masks, log_pictures, log_table

__all__ = ["Masked", "RunLogger", "WandB", "log_masks", "log_pictures", "log_table", "read_metrics"]
