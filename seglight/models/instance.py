"""`InstanceModel`: what all instance segmentation models share: losses, whole-set scores, inference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seglight import inference, official
from seglight.models.base import BaseModel

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from seglight.detection_metrics import InstanceScores
    from seglight.official import OfficialResult, OfficialScores
    from seglight.predict_instances import InstancePrediction
    from seglight.types import RLE, Detections, InstanceBatch, InstanceEvalBatch


class InstanceModel(BaseModel):
    """Objects with boxes, classes, scores and masks.

    Works with any network called as `network(images, targets) -> (losses, detections)`: `images` are normalised float
    tensors (3, H_i, W_i), which it pads itself; `targets` follow `seglight.types.InstanceTarget` or are None; `losses`
    is a dict of 0-dim tensors (empty without targets) and `detections` a list of `seglight.types.Detections` in pixels
    of these images (empty while training). A network with a background class shifts its labels itself.

    Args:
        network: see above.
        num_classes: K, without a background.
        test_short_side: test-time: the image is resized so that its shorter side has this many pixels; none leaves it.
        test_long_side: test-time: but its longer side has this many at most.
        test_scales: test-time: several shorter sides instead, whose detections are merged by `seglight.ensemble`.
        test_flip: test-time: merge with the detections of the mirrored image.
        test_threshold: test-time: probability from which on a pixel belongs to an object.
    """

    task = "instance"
    monitor = "val/AP"
    show = ("val/AP50", "val/box_AP")
    agnostic = False
    """Whether scores ignore the classes."""
    limits: tuple[int, ...] = (1, 10, 100)
    """Detections per image that the scores are taken over; the last one is how many are kept."""

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        test_short_side: int | None = 800,
        test_long_side: int = 1333,
        test_scales: list[int] | None = None,
        test_flip: bool = False,
        test_threshold: float = 0.5,
        **kwargs: Any,
    ):
        super().__init__(network=network, num_classes=num_classes, **kwargs)
        if not 0 < test_threshold < 1:
            raise ValueError(f"test_threshold is {test_threshold}; a probability between 0 and 1, usually 0.5.")
        for side in (*(test_scales or [test_short_side]), test_long_side):
            if side is not None and side < 1:
                raise ValueError(f"A side of {side} pixels is asked for at test time; give at least 1.")
        self.test_short_side, self.test_long_side = test_short_side, test_long_side
        self.test_scales, self.test_flip, self.test_threshold = test_scales, test_flip, test_threshold
        from seglight.detection_metrics import AveragePrecision

        self.metric = AveragePrecision(self.classes, self.limits, self.agnostic)
        self.scores: InstanceScores | None = None
        """Of the last validation or test."""
        self.official: OfficialResult | None = None
        """Further scores of the dataset's benchmark, of the last `test` or `validate`; see `seglight.official`."""
        self._official: OfficialScores | None = None

    @property
    def names(self) -> list[str]:
        """What the labels of detections mean: the classes, or `object` for all of them where classes do not count."""
        return ["object"] if self.agnostic else self.classes

    # ------------------------------------------------------------------ training

    def training_step(self, batch: InstanceBatch, batch_idx: int) -> Tensor:
        """The sum of the network's losses; each goes to the running mean."""
        losses, _ = self.network([self.normalize(image[None])[0] for image in batch["image"]], batch["target"])
        total = torch.stack(list(losses.values())).sum()
        self.track({"loss": total, **{f"loss_{name}": value for name, value in losses.items()}})
        return total

    # ----------------------------------------------------------------- inference

    def resize(self, image: Tensor, short_side: int | None) -> Tensor:
        """A normalised image (3, H, W) at test size: bilinear, sizes rounded down, as torchvision's detectors do."""
        if short_side is None:
            return image
        low, high = sorted(image.shape[-2:])
        scale = min(short_side / low, self.test_long_side / high)
        size = [max(1, int(side * scale)) for side in image.shape[-2:]]
        return nn.functional.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]

    def _view(self, images: list[Tensor], short_side: int | None, flipped: bool) -> list[Detections]:
        """Detections of one look at the images, in pixels of the images."""
        from seglight import ensemble

        inputs = [self.resize(self.normalize(image[None])[0], short_side) for image in images]
        if flipped:
            inputs = [image.flip(-1) for image in inputs]
        _, detections = self.network(inputs, None)
        if flipped:
            found = zip(detections, inputs, strict=True)
            detections = [ensemble.flip(detection, image.shape[-1]) for detection, image in found]
        for detection, image, small in zip(detections, images, inputs, strict=True):
            (height, width), (h, w) = image.shape[-2:], small.shape[-2:]
            detection.update(ensemble.scale(detection, width / w, height / h))
            detection["scores"], detection["masks"] = detection["scores"].float(), detection["masks"].float()
        return detections

    def detect(self, images: list[Tensor]) -> list[Detections]:
        """Detections under the test-time options; the network must be in evaluation mode.

        Args:
            images: tensors (3, H_i, W_i), RGB 0..255.

        Returns:
            for each image its objects, in pixels of it, best first.
        """
        if not images:
            return []
        sides = self.test_scales or [self.test_short_side]
        looks = [(side, flipped) for side in sides for flipped in ([False, True] if self.test_flip else [False])]
        views = [self._view(images, *look) for look in looks]
        if len(views) == 1:
            return views[0]
        from seglight import ensemble

        return [ensemble.merge(list(of_image), limit=self.limits[-1]) for of_image in zip(*views, strict=True)]

    def forward(self, images: list[Tensor]) -> list[Detections]:
        """`detect`, in training and in evaluation mode alike."""
        with inference.evaluating(self):
            return self.detect(images)

    def _rles(self, detection: Detections, size: tuple[int, int]) -> list[RLE]:
        from seglight import masks

        return masks.encode(detection["masks"], detection["windows"], size, self.test_threshold)

    @torch.inference_mode()
    def predict(self, source: str | Path | np.ndarray | Image.Image, min_score: float = 0.5) -> InstancePrediction:
        """Find the objects of one picture: a file, a PIL image or a uint8 RGB array (H, W, 3).

        Args:
            source: the picture.
            min_score: objects below it are left out.
        """
        from seglight.predict import as_array
        from seglight.predict_instances import InstancePrediction

        image = as_array(source)
        with inference.evaluating(self):
            (found,) = self.detect([torch.from_numpy(image).permute(2, 0, 1).to(self.device)])
        keep = found["scores"] >= min_score
        found = {name: value[keep] for name, value in found.items()}
        return InstancePrediction(
            image=image,
            boxes=found["boxes"].cpu().numpy(),
            labels=found["labels"].cpu().numpy(),
            scores=found["scores"].cpu().numpy(),
            rles=self._rles(found, image.shape[:2]),
            classes=self.names,
            palette=self.palette,
        )

    # ---------------------------------------------------------------- evaluation

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """As Lightning's; but the ground truth of an evaluation stays on the host, where it is counted."""
        if self.trainer.training or "target" not in batch:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        rest = {name: value for name, value in batch.items() if name != "target"}
        return {**super().transfer_batch_to_device(rest, device, dataloader_idx), "target": batch["target"]}

    def _found(self, images: list[Tensor]) -> dict[str, Any]:
        detections = self.detect(images)
        rles = [self._rles(d, image.shape[-2:]) for d, image in zip(detections, images, strict=True)]
        return {"detections": detections, "rles": rles}

    def on_validation_epoch_start(self) -> None:
        """Further scores of the dataset, in a validation of its own. Class-agnostic proposals have none."""
        self._official = None if self.agnostic else official.of_trainer(self.trainer, "val")

    def on_test_epoch_start(self) -> None:
        """Further scores of the dataset."""
        self._official = None if self.agnostic else official.of_trainer(self.trainer, "test")

    def validation_step(self, batch: InstanceEvalBatch, batch_idx: int) -> dict[str, Any]:
        """`detections` and their masks as `rles`, per image; they are counted in the metric."""
        result = self._found(batch["image"])
        for i, name in enumerate(batch["image_id"]):
            found = {**result["detections"][i], "rles": result["rles"][i]}
            self.metric.update(name, tuple(batch["image"][i].shape[-2:]), found, batch["target"][i])
            if self._official is not None:
                self._official.update(name, found, batch["target"][i])
        return result

    def test_step(self, batch: InstanceEvalBatch, batch_idx: int) -> dict[str, Any]:
        """As `validation_step`."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: InstanceEvalBatch, batch_idx: int) -> dict[str, Any]:
        """As `validation_step`, without looking at the ground truth."""
        return self._found(batch["image"])

    def _log_scores(self, stage: str) -> None:
        if not self.trainer.sanity_checking:
            self.scores = self.metric.compute()
            self.official, self._official = self._official and self._official.compute(), None
            further = {} if self.official is None else self.official.as_dict(stage)
            self.log_dict({**self.scores.as_dict(stage), **further}, sync_dist=False)  # every rank has the whole set's
            self.log("step", float(self.trainer.global_step), sync_dist=False)
        self.metric.reset()

    def on_validation_epoch_end(self) -> None:
        """Scores of the whole set, over all ranks."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Scores of the whole set, over all ranks."""
        self._log_scores("test")
