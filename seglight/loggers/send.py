"""Pictures and tables for whatever loggers a Trainer has, or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from seglight.loggers.dashboard import Masked, WandB
from seglight.loggers.harmless import never_stops


def log_masks(
    loggers: Iterable[Logger],
    key: str,
    pictures: Sequence[Masked],
    class_labels: Mapping[str, Mapping[int, str]],
    step: int,
) -> None:
    """Send pictures with switchable masks to the loggers that can show them: WandB."""
    for logger in loggers:
        if isinstance(logger, WandB):
            logger.log_masks(key, pictures, class_labels, step)


def log_pictures(
    loggers: Iterable[Logger], key: str, pictures: Sequence[np.ndarray], step: int, captions: Sequence[str] = ()
) -> None:
    """Send uint8 (H, W, 3) arrays to every logger that takes pictures: WandB, Lightning's W&B, TensorBoard."""
    for logger in loggers:
        _log_pictures(logger, key, pictures, step, list(captions) or [""] * len(pictures))


@never_stops
def _log_pictures(logger: Logger, key: str, pictures: Sequence[np.ndarray], step: int, captions: list[str]) -> None:
    if isinstance(logger, WandB):
        logger.log_picture(key, pictures, step, captions)
    elif isinstance(logger, WandbLogger):
        logger.log_image(key, list(pictures), step, caption=captions)
    elif isinstance(logger, TensorBoardLogger):
        for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            name = key if len(pictures) == 1 else f"{key}/{caption or i}"
            logger.experiment.add_image(name, picture, step, dataformats="HWC")


def log_table(
    loggers: Iterable[Logger], key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """Send a table to every logger that takes one: WandB, Lightning's W&B, TensorBoard (as text)."""
    for logger in loggers:
        _log_table(logger, key, list(columns), [list(row) for row in rows], step)


@never_stops
def _log_table(logger: Logger, key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
    if isinstance(logger, WandbLogger):
        logger.log_table(key, columns=columns, data=rows, step=step)
    elif isinstance(logger, TensorBoardLogger):
        lines = ["| " + " | ".join(map(str, row)) + " |" for row in (columns, ["---"] * len(columns), *rows)]
        logger.experiment.add_text(key, "\n".join(lines), step)
