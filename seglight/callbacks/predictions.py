"""What a run leaves of its predictions: label maps of semantic models, COCO results of instance models."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from seglight.callbacks.run_folder import run_dir
from seglight.predict import SemanticPrediction, path_of
from seglight.predict_instances import InstancePrediction, coco_results


class Predictions(Callback):
    """Saves the predictions of a datamodule's test split in the run folder, from any number of ranks.

    Of a semantic model `seglight predict` writes each picture's labels as predictions/<image id>.png with its overlay;
    an id with slashes makes subfolders.
    Of an instance model `test` and `predict` write results.json, COCO's results format with the image and category ids
    of the annotation file, and `predict` also predictions/<image id>_overlay.jpg and a mask per object. Drop `bbox` of
    results.json before pycocotools scores masks by size, see `coco_results`.

    Args:
        min_score: objects are drawn and saved as masks from this score on; results.json holds all.
    """

    def __init__(self, min_score: float = 0.5):
        self.min_score = min_score
        self._results: list[dict[str, Any]] = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keep the results of one batch, a few bytes per object."""
        if isinstance(outputs, dict) and "rles" in outputs:
            self._keep(trainer, outputs, batch)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Write one batch."""
        folder = run_dir(trainer) / "predictions"
        instance = isinstance(outputs, dict) and "rles" in outputs
        if instance:
            self._keep(trainer, outputs, batch)
        for i, (name, image) in enumerate(zip(batch["image_id"], batch["image"], strict=True)):
            pixels = np.ascontiguousarray(image.cpu().numpy().transpose(1, 2, 0))
            if instance:
                prediction: Any = self._objects(pl_module, pixels, outputs["detections"][i], outputs["rles"][i])
            else:
                labels = outputs[i].to("cpu").numpy().astype(np.uint8)
                prediction = SemanticPrediction(pixels, labels, pl_module.classes, pl_module.palette)
            prediction.save(path_of(folder, name, ".json" if instance else ".png"))

    def _objects(self, model: LightningModule, pixels: np.ndarray, found: Any, rles: list[Any]) -> InstancePrediction:
        arrays = {name: found[name].float().cpu().numpy() for name in ("boxes", "scores")}
        labels = found["labels"].cpu().numpy()
        keep = np.flatnonzero(arrays["scores"] >= self.min_score)
        return InstancePrediction(
            pixels,
            arrays["boxes"][keep],
            labels[keep],
            arrays["scores"][keep],
            [rles[i] for i in keep],
            model.names,
            model.palette,
        )

    def _keep(self, trainer: Trainer, outputs: Any, batch: Any) -> None:
        ids = getattr(trainer.datamodule, "category_ids", None)
        for name, found, rles in zip(batch["image_id"], outputs["detections"], outputs["rles"], strict=True):
            image_id = int(name) if name.isdecimal() and str(int(name)) == name else name
            arrays = [found[key].float().cpu().numpy() for key in ("boxes", "scores")]
            labels = found["labels"].cpu().numpy()
            self._results += coco_results(image_id, arrays[0], labels, arrays[1], rles, ids)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write results.json."""
        self._write(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write results.json."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if getattr(trainer.lightning_module, "task", None) != "instance":
            return
        results, self._results = self._results, []
        if trainer.world_size > 1:
            parts: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
            torch.distributed.gather_object(results, parts)
            results = [entry for part in parts or () for entry in part]
        if trainer.is_global_zero:
            results.sort(key=lambda entry: (str(entry["image_id"]), -entry["score"]))
            (run_dir(trainer) / "results.json").write_text(json.dumps(results) + "\n")
