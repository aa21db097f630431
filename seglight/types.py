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
    """B tensors (H_i, W_i), labels 0..K-1 or 255. All 255 in a test split whose labels are not public."""
    image_id: list[str]


class InstanceTarget(TypedDict):
    """Objects of one training image; N = 0 is legal. There is no background class: R-CNN wrappers shift the labels."""

    boxes: Tensor
    """float32 (N, 4), x1 y1 x2 y2 in pixels, x2 > x1 and y2 > y1."""
    labels: Tensor
    """int64 (N,), 0..K-1."""
    masks: Tensor
    """bool (N, H, W)."""
    iscrowd: Tensor
    """bool (N,). Crowds are nothing to learn from, but no background either."""
    area: Tensor
    """float32 (N,), pixels of the annotated mask: what COCO's size ranges use."""


class InstanceBatch(TypedDict):
    """A training batch: augmented and resized images, of different sizes, so lists throughout."""

    image: list[Tensor]
    """B tensors uint8 (3, H_i, W_i). The model normalises and pads them, on the device, and resizes nothing."""
    target: list[InstanceTarget]
    image_id: list[str]


class RLE(TypedDict):
    """A mask as COCO's tools keep it: column-wise run lengths, compressed."""

    size: list[int]
    """Height and width."""
    counts: bytes


class InstanceTruth(TypedDict):
    """Objects of one image in evaluation, as annotated: nothing resampled, no dense masks. N = 0 is legal, and what a
    test split has whose labels are not public."""

    boxes: Tensor
    """float32 (N, 4), x1 y1 x2 y2 in pixels."""
    labels: Tensor
    """int64 (N,), 0..K-1."""
    rles: list[RLE]
    """N masks."""
    iscrowd: Tensor
    """bool (N,)."""
    area: Tensor
    """float64 (N,), as annotated."""


class InstanceEvalBatch(TypedDict):
    """A validation or test batch: every image at its original size."""

    image: list[Tensor]
    """B tensors uint8 (3, H_i, W_i). The model resizes them, on the device."""
    target: list[InstanceTruth]
    image_id: list[str]


class Detections(TypedDict):
    """What an instance model says of one image, best score first.

    A mask is a small grid of probabilities over a rectangle of the image, its window. `seglight.masks` makes dense
    masks or run lengths of it; nobody else does, and dense ones are never kept.
    """

    boxes: Tensor
    """float32 (N, 4), x1 y1 x2 y2 in pixels of the image."""
    labels: Tensor
    """int64 (N,), 0..K-1."""
    scores: Tensor
    """float32 (N,), 0..1."""
    masks: Tensor
    """float32 (N, m, m), 0..1: cell (i, j) covers that part of the window."""
    windows: Tensor
    """float32 (N, 4), x1 y1 x2 y2: what the grid covers. The boxes themselves for R-CNNs; may leave the image."""
