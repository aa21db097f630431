"""`InstanceModel`: what all instance segmentation models share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seglight.models.base import BaseModel

if TYPE_CHECKING:
    from seglight.types import Detections, InstanceBatch, InstanceTarget


class InstanceModel(BaseModel):
    """Objects with boxes, classes, scores and masks.

    Works with any network called as `network(images, targets) -> (losses, detections)`: `images` are normalised float
    tensors (3, H_i, W_i), `targets` follow `seglight.types.InstanceTarget` or are None, `losses` is a dict of 0-dim
    tensors (empty without targets) and `detections` a list of `seglight.types.Detections` in pixels of the images
    (empty while training). A network with a background class shifts its labels itself.
    """

    def training_step(self, batch: InstanceBatch, batch_idx: int) -> Tensor:
        """The sum of the network's losses; each goes to the running mean."""
        losses, _ = self.network(self._normalized(batch["image"]), batch["target"])
        total = torch.stack(list(losses.values())).sum()
        self.track({"loss": total, **{f"loss_{name}": value for name, value in losses.items()}})
        return total

    def _normalized(self, images: list[Tensor]) -> list[Tensor]:
        return [self.normalize(image[None])[0] for image in images]

    def forward(self, images: list[Tensor], targets: list[InstanceTarget] | None = None) -> list[Detections]:
        """Detections of images (3, H_i, W_i), RGB 0..255, in training and in evaluation mode alike."""
        training = self.network.training
        self.network.eval()
        _, detections = self.network(self._normalized(images), None)
        self.network.train(training)
        return detections

    def validation_step(self, batch: InstanceBatch, batch_idx: int) -> dict[str, Any]:
        """Detections under `detections`."""
        return {"detections": self(batch["image"])}

    def test_step(self, batch: InstanceBatch, batch_idx: int) -> dict[str, Any]:
        """As `validation_step`."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: InstanceBatch, batch_idx: int) -> list[Detections]:
        """Detections of the batch's images, in order."""
        return self(batch["image"])
