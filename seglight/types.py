"""The data contract: what travels between dataset, model, metric and logger.

Read this page first. Shapes: B batch, H and W pixels, K classes, N objects of one image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = 255
"""Label of pixels that no loss and no metric may see: void, borders, padding. Hence at most 255 classes."""


class SemanticBatch(TypedDict):
    """A training batch: one crop size, stacked."""

    image: Tensor
    """uint8 (B, 3, H, W), RGB 0..255. The model normalises it, on the device."""
    mask: Tensor
    """(B, H, W), labels 0..K-1 or 255; uint8 while it travels, int64 once the model has it on its device."""
    image_id: list[str]
    """B names, unique in their split."""


class SemanticEvalBatch(TypedDict):
    """A validation or test batch: every image and label at its original size, never resampled."""

    image: list[Tensor]
    """B tensors uint8 (3, H_i, W_i)."""
    mask: list[Tensor]
    """B tensors (H_i, W_i), labels 0..K-1 or 255."""
    image_id: list[str]


class InstanceTarget(TypedDict):
    """Objects of one image; N = 0 is legal. There is no background class here: R-CNN wrappers shift the labels."""

    boxes: Tensor
    """float32 (N, 4), x1 y1 x2 y2 in pixels, x2 > x1 and y2 > y1."""
    labels: Tensor
    """int64 (N,), 0..K-1."""
    masks: Tensor
    """bool (N, H, W)."""
    iscrowd: Tensor
    """bool (N,)."""
    area: Tensor
    """float32 (N,), pixels of the annotated mask: what COCO's size ranges use."""


class InstanceBatch(TypedDict):
    """Images of different sizes, so lists throughout."""

    image: list[Tensor]
    """B tensors uint8 (3, H_i, W_i)."""
    target: list[InstanceTarget]
    image_id: list[str]


class Detections(TypedDict):
    """What an instance model says of one image, best score first."""

    boxes: Tensor
    """float32 (N, 4), x1 y1 x2 y2 in pixels of the original image."""
    labels: Tensor
    """int64 (N,), 0..K-1."""
    scores: Tensor
    """float32 (N,), 0..1."""
    masks: Tensor
    """bool (N, H, W)."""
