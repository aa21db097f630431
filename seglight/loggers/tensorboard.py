"""TensorBoard, by Lightning's logger."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from seglight.loggers.harmless import never_stops


class TensorBoard(TensorBoardLogger):
    """Lightning's `TensorBoardLogger`; what it cannot write does not stop a training."""

    @rank_zero_only
    @never_stops
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log values at an optimiser step."""
        super().log_metrics(metrics, step)

    @rank_zero_only
    @never_stops
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log the configuration."""
        super().log_hyperparams(params, *args, **kwargs)

    @rank_zero_only
    @never_stops
    def save(self) -> None:
        """Write what is pending."""
        super().save()

    @rank_zero_only
    @never_stops
    def finalize(self, status: str) -> None:
        """Close the file."""
        super().finalize(status)
