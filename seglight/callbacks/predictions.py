"""What `seglight predict -c EXPERIMENT` writes: the label maps of a datamodule's test split, on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
from pytorch_lightning import Callback, LightningModule, Trainer

from seglight.callbacks.run_folder import run_dir
from seglight.predict import SemanticPrediction


class Predictions(Callback):
    """Saves each picture's labels as predictions/<image id>.png, and its overlay, in the run folder."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write one batch."""
        folder = run_dir(trainer) / "predictions"
        for name, image, labels in zip(batch["image_id"], batch["image"], outputs, strict=True):
            pixels = np.ascontiguousarray(image.cpu().numpy().transpose(1, 2, 0))
            labels = labels.to("cpu").numpy().astype(np.uint8)
            SemanticPrediction(pixels, labels, pl_module.classes, pl_module.palette).save(
                folder / name.replace("/", "_").replace("\\", "_")
            )
