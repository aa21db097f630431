"""What the model sees and says, as pictures: on the local disk and in whatever loggers there are."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from seglight import visualize, visualize_objects
from seglight.callbacks.run_folder import run_dir
from seglight.detection_metrics import InstanceScores
from seglight.loggers import Masked, RunLogger, log_masks, log_pictures, log_table, read_metrics
from seglight.loggers.harmless import never_stops
from seglight.metrics import Scores
from seglight.official import write_csv
from seglight.types import IGNORE_INDEX

ERROR_LABELS = {0: "right", 1: "wrong", IGNORE_INDEX: "void"}


class Pictures(Callback):
    """After each validation or test, draws the same few images, the confusion matrix and the curves.

    In the run folder: images/train_batch0.jpg (the first batch as the network gets it, labels below),
    images/val_<n>_<id>.png (image, ground truth, prediction, error; the newest), plots/confusion.png or, of instance
    models, plots/precision_recall.png, plots/results.png and per_class.csv; of a test images/test_...,
    plots/confusion_test.png and per_class_test.csv.
    Loggers get the same, W&B with masks that can be switched on and off.

    The images are evenly spaced over the set and known by their ids, so they are the same in every validation, every
    run and on any number of ranks; each rank draws the ones it holds and rank 0 writes them. A full disk or a failing
    logger does not stop the training.

    Args:
        count: images.
        every: validations from one drawing of the images to the next.
        longest: the longer side of an image sent to W&B, pixels.
        min_score: objects of an instance model are drawn from this score on.
    """

    RESULTS_EVERY = 15.0
    """Seconds between two drawings of the curves, which take about half a second."""

    def __init__(self, count: int = 8, every: int = 1, longest: int = 640, min_score: float = 0.5):
        if count < 0 or every < 1:
            raise ValueError(f"count is {count} and every is {every}; count must be at least 0 and every at least 1.")
        self.count, self.every, self.longest, self.min_score = count, every, longest, min_score
        self._wanted: list[str] | None = None
        self._drawn: dict[str, tuple[np.ndarray, Masked]] = {}
        self._collecting = False
        self._validations = 0
        self._results_at = -self.RESULTS_EVERY

    # ------------------------------------------------------------------ training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The very first batch of a run."""
        if trainer.global_step == 0 and batch_idx == 0 and trainer.is_global_zero:
            self._write_batch(trainer, pl_module, batch)

    @never_stops
    def _write_batch(self, trainer: Trainer, model: LightningModule, batch: Any) -> None:
        if not (isinstance(batch, dict) and ("mask" in batch or "target" in batch)):
            return  # of a model that follows no contract of ours
        cells = [self._cell(model, batch, i) for i in range(min(16, len(batch["image"])))]
        sheet = visualize.grid(cells)
        _save(run_dir(trainer) / "images" / "train_batch0.jpg", sheet)
        log_pictures(trainer.loggers, "media/train_batch0", [sheet], trainer.global_step)

    def _cell(self, model: LightningModule, batch: Any, i: int) -> np.ndarray:
        """A training image above the same with its labels."""
        image = _pixels(batch["image"][i])
        if "target" in batch:
            target = batch["target"][i]
            objects = visualize_objects.Objects.dense(target["labels"].cpu().numpy(), target["masks"].cpu().numpy())
            below = visualize_objects.overlay(image, objects, model.classes)
            return np.concatenate([visualize.shrink(image, 384), visualize.shrink(below, 384)])
        pixels, labels = visualize.shrink(image, 384), visualize.shrink(_labels(batch["mask"][i]), 384, labels=True)
        return np.concatenate([pixels, visualize.overlay(pixels, labels, _palette(model), 0.6)])

    # ---------------------------------------------------------------- evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the images."""
        batches = trainer.num_val_batches
        self._collecting = not trainer.sanity_checking and self._validations % self.every == 0
        self._choose(trainer, "val", sum(batches) if isinstance(batches, list) else batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the images."""
        batches = trainer.num_test_batches
        self._collecting = True
        self._choose(trainer, "test", sum(batches) if isinstance(batches, list) else batches)

    def _choose(self, trainer: Trainer, split: str, batches: float) -> None:
        data = getattr(trainer, "datamodule", None)
        ids = data.split(split).ids if hasattr(data, "split") else None
        self._drawn = {}
        self._wanted = None
        if ids is not None:  # of a limited validation, the part that is seen
            seen = int(min(len(ids), batches * data.val_batch_size * trainer.world_size))
            self._wanted = [ids[i] for i in spaced(seen, self.count)]

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Draw the chosen images of this batch."""
        self._collect(pl_module, outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Draw the chosen images of this batch."""
        self._collect(pl_module, outputs, batch)

    @never_stops
    def _collect(self, model: LightningModule, outputs: Any, batch: Any) -> None:
        known = isinstance(outputs, dict) and isinstance(batch, dict)
        semantic = known and "labels" in outputs and "mask" in batch
        if not (self._collecting and (semantic or (known and "rles" in outputs and "target" in batch))):
            return
        for i, name in enumerate(batch["image_id"]):
            wanted = name in self._wanted if self._wanted is not None else len(self._drawn) < self.count
            if wanted and name not in self._drawn:
                if semantic:
                    sample = batch["image"][i], batch["mask"][i], outputs["labels"][i]
                    self._drawn[name] = self._draw(model, name, *sample)
                else:
                    found = {**outputs["detections"][i], "rles": outputs["rles"][i]}
                    self._drawn[name] = self._draw_objects(model, name, batch["image"][i], batch["target"][i], found)

    def _draw(self, model: LightningModule, name: str, *sample: Tensor) -> tuple[np.ndarray, Masked]:
        image, mask, labels = _pixels(sample[0]), _labels(sample[1]), _labels(sample[2])
        picture = visualize.triptych(image, mask, labels, model.classes, _palette(model), title=name)
        error = np.where(mask == IGNORE_INDEX, IGNORE_INDEX, mask != labels).astype(np.uint8)
        masks = {"ground truth": mask, "prediction": labels, "error": error}
        small = {key: visualize.shrink(value, self.longest, labels=True) for key, value in masks.items()}
        return picture, Masked(visualize.shrink(image, self.longest), small, name)

    def _draw_objects(
        self, model: LightningModule, name: str, image: Tensor, target: Any, found: Any
    ) -> tuple[np.ndarray, Masked]:
        """As `_draw`, for the objects that an instance model found."""
        pixels = _pixels(image)
        truth = visualize_objects.Objects(
            target["labels"].cpu().numpy(), target["rles"], crowd=target["iscrowd"].cpu().numpy()
        )
        scored = visualize_objects.Objects(
            found["labels"].cpu().numpy(), found["rles"], found["scores"].float().cpu().numpy()
        )
        best = scored.above(self.min_score)
        picture = visualize_objects.panels(
            pixels, truth, best, model.classes, model.agnostic, title=name, min_score=self.min_score
        )
        size, small = pixels.shape[:2], visualize.shrink(pixels, self.longest)
        objects = {"ground truth": truth, "prediction": best}
        masks = {
            key: visualize.shrink(visualize_objects.label_map(value, size), self.longest, labels=True)
            for key, value in objects.items()
        }
        scale = small.shape[1] / size[1]
        boxes = {key: visualize_objects.box_data(value, _names(model, key), scale) for key, value in objects.items()}
        return picture, Masked(small, masks, name, boxes)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything."""
        if not trainer.sanity_checking:
            self._finish(trainer, pl_module, "val")
            self._validations += 1

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything."""
        self._finish(trainer, pl_module, "test")

    def _finish(self, trainer: Trainer, model: LightningModule, stage: str) -> None:
        drawn = self._gather(trainer)
        self._drawn = {}
        if trainer.is_global_zero:
            self._write_images(trainer, model, stage, drawn)
            self._write_scores(trainer, model, stage)
            due = time.monotonic() - self._results_at > self.RESULTS_EVERY
            if trainer.state.fn == "fit" and due:
                self._write_results(trainer)

    def _gather(self, trainer: Trainer) -> list[tuple[str, np.ndarray, Masked]]:
        """The pictures of all ranks on rank 0, in the order of the set."""
        drawn = self._drawn
        if trainer.world_size > 1 and self._collecting:
            parts: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
            torch.distributed.gather_object(drawn, parts)
            drawn = {name: item for part in parts or () for name, item in part.items()}
        order = self._wanted if self._wanted is not None else list(drawn)[: self.count]
        return [(name, *drawn[name]) for name in order if name in drawn]

    @never_stops
    def _write_images(
        self, trainer: Trainer, model: LightningModule, stage: str, drawn: list[tuple[str, np.ndarray, Masked]]
    ) -> None:
        if not drawn:
            return
        for i, (name, picture, _) in enumerate(drawn):
            _save(run_dir(trainer) / "images" / f"{stage}_{i:02}_{re.sub(r'[^-.0-9A-Za-z_]+', '_', name)}.png", picture)
        names, pictures, masked = zip(*drawn, strict=True)
        labels = {
            name: ERROR_LABELS if name == "error" else {**dict(enumerate(_names(model, name))), IGNORE_INDEX: "void"}
            for name in masked[0].masks
        }
        step = trainer.global_step
        log_masks(trainer.loggers, f"media/{stage}", masked, labels, step)
        log_pictures(trainer.loggers, f"media/{stage}_colours", pictures, step, names)

    @never_stops
    def _write_scores(self, trainer: Trainer, model: LightningModule, stage: str) -> None:
        scores: Scores | InstanceScores | None = getattr(model, "scores", None)
        if scores is None:
            return
        folder, suffix = run_dir(trainer), "" if stage == "val" else f"_{stage}"
        plot = folder / "plots" / f"{scores.figure}{suffix}.png"
        plot.parent.mkdir(parents=True, exist_ok=True)
        scores.draw(plot)
        columns, rows = scores.per_class()
        write_csv(folder / f"per_class{suffix}.csv", scores)
        step = trainer.global_step
        log_table(trainer.loggers, f"{stage}_class/table", columns, rows, step)
        from PIL import Image

        log_pictures(trainer.loggers, f"{stage}/{scores.figure}", [np.asarray(Image.open(plot).convert("RGB"))], step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The curves once more, complete."""
        if trainer.is_global_zero:
            self._write_results(trainer)

    @never_stops
    def _write_results(self, trainer: Trainer) -> None:
        """Draw what the local logger has recorded."""
        local = next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)
        if local is None:
            return
        local.flush()
        if local.path.exists():
            plot = run_dir(trainer) / "plots" / "results.png"
            plot.parent.mkdir(parents=True, exist_ok=True)
            visualize.results_png(plot, read_metrics(local.path))
            self._results_at = time.monotonic()


def spaced(length: int, count: int) -> list[int]:
    """At most `count` different indices, evenly spaced from the first to the last of `length`."""
    return sorted({round(float(i)) for i in np.linspace(0, length - 1, min(length, count))})


def _names(model: LightningModule, mask: str) -> list[str]:
    """What the labels of a mask mean; proposals, unlike their ground truth, have no classes."""
    return getattr(model, "names", model.classes) if mask == "prediction" else model.classes


def _palette(model: LightningModule) -> visualize.Palette:
    return getattr(model, "palette", None) or visualize.default_palette(len(model.classes))


def _pixels(image: Tensor) -> np.ndarray:
    """(3, H, W), uint8 or 0..255, as uint8 (H, W, 3)."""
    return np.ascontiguousarray(image.detach().clamp(0, 255).to("cpu", torch.uint8).permute(1, 2, 0).numpy())


def _labels(mask: Tensor) -> np.ndarray:
    return mask.detach().to("cpu", torch.uint8).numpy()


def _save(path: Path, picture: np.ndarray) -> None:
    """Write uint8 (H, W, 3) RGB. cv2's PNG is several times faster than PIL's; written by hand, a full disk raises."""
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    options = [cv2.IMWRITE_PNG_COMPRESSION, 3] if path.suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 90]
    path.write_bytes(cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)[1].tobytes())
