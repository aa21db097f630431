"""Regions of an image to segment one by one: providers of boxes, and the scores of boxes fused into those of the image.

A provider is any callable from an image uint8 (3, H, W), RGB, to boxes (N, 4) in its pixels: x1, y1, x2, y2, with x2
and y2 just outside, best first. Providers propose boxes of objects; the context around them is added later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seglight.data.boxes import extend
from seglight.inference import Net, window_starts

Provider = Callable[[Tensor], Any]
BATCH = 10
"""Regions in one forward pass."""


def whole(image: Tensor) -> np.ndarray:
    """The image as one box."""
    return np.array([[0, 0, image.shape[-1], image.shape[-2]]])


def grid(image: Tensor, shares: Sequence[float] = (1, 2 / 3, 1 / 2)) -> np.ndarray:
    """The image as one box, then square windows whose side is a share of its shorter side, overlapping by half."""
    height, width = image.shape[-2:]
    boxes = whole(image).tolist()
    for share in shares:
        side = max(1, round(share * min(height, width)))
        stride = max(1, side // 2)
        rows, columns = window_starts(height, side, stride), window_starts(width, side, stride)
        boxes += [(x, y, x + side, y + side) for y in rows for x in columns]
    return np.array(boxes)


def selective_search() -> Provider:
    """Selective search (Uijlings et al. 2013) of OpenCV's contributed modules, in its fast form.

    Raises:
        ValueError: this OpenCV comes without them.
    """
    if not hasattr(getattr(cv2, "ximgproc", None), "segmentation"):
        raise ValueError(
            'Selective search needs OpenCV with its contributed modules: "pip uninstall opencv-python-headless", then '
            '"pip install opencv-contrib-python-headless". Or choose test_boxes "grid", which needs nothing.'
        )

    def provide(image: Tensor) -> np.ndarray:
        search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
        search.setBaseImage(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()[..., ::-1]))
        search.switchToSelectiveSearchFast()
        boxes = np.asarray(search.process()).reshape(-1, 4)  # x, y, width, height
        return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])

    return provide


def detector(path: str | Path) -> Provider:
    """Boxes of an instance model of ours, by its score.

    Args:
        path: of its checkpoint.

    Raises:
        ValueError: the checkpoint holds another kind of model.
    """
    from seglight.checkpoints import load
    from seglight.models.instance import InstanceModel

    model = load(path)
    if not isinstance(model, InstanceModel):
        raise ValueError(f"{path} holds a {type(model).__name__}, which finds no boxes; give one of an instance model.")

    def provide(image: Tensor) -> np.ndarray:
        return model.to(image.device)([image])[0]["boxes"].cpu().numpy()

    return provide


def choose(boxes: Any, size: tuple[int, int], context: float, smallest: int, limit: int) -> list[tuple[int, ...]]:
    """Whole-pixel boxes to segment: with context, large enough, at least partly in the image, the first `limit`.

    Args:
        boxes: (N, 4), best first.
        size: (H, W) of the image.
        context: factor of both sides; the box may leave the image then.
        smallest: shorter side of a box, in pixels with its context, below which it is skipped.
        limit: number of boxes.

    Returns:
        x1, y1, x2, y2 of each; the whole image if no box is left.
    """
    rounded = np.rint(extend(boxes, context)).astype(int)
    sides = rounded[:, 2:] - rounded[:, :2]
    height, width = size
    kept = (sides.min(1) >= max(1, smallest)) & (rounded[:, 2:] > 0).all(1)
    kept &= (rounded[:, :2] < (width, height)).all(1)
    return [tuple(box) for box in rounded[kept][:limit].tolist()] or [(0, 0, width, height)]


def fuse(
    net: Net, image: Tensor, boxes: Sequence[tuple[int, ...]], side: int, outside: Tensor, floor: bool = True
) -> Tensor:
    """Scores of an image from those of its regions: the largest of each pixel and class.

    Each region is resized bilinearly to a square, its scores back to the region. The boxes' order does not matter.

    Args:
        net: from images (n, C, side, side) to scores (n, K, h, w).
        image: float (C, H, W), normalised.
        boxes: as of `choose`.
        side: of the square.
        outside: (C, 1, 1), the normalised colour of what a region shows outside of the image.
        floor: negative scores count as 0.

    Returns:
        (K, H, W), 0 where no region is.
    """
    height, width = image.shape[-2:]
    image = (image - outside)[None]
    nothing = 0.0 if floor else -torch.inf
    canvas = None
    for start in range(0, len(boxes), BATCH):
        part = boxes[start : start + BATCH]
        # A negative padding cuts: this takes the box out of the image, and puts its scores back in place below.
        regions = [F.pad(image, (-x1, x2 - width, -y1, y2 - height)) for x1, y1, x2, y2 in part]
        scores = net(torch.cat([_resize(region, (side, side)) for region in regions]) + outside)
        if canvas is None:
            canvas = scores.new_full((scores.shape[1], height, width), nothing)
        for (x1, y1, x2, y2), of_box in zip(part, scores, strict=True):
            of_box = _resize(of_box[None], (y2 - y1, x2 - x1))[0]
            canvas = torch.maximum(canvas, F.pad(of_box, (x1, width - x2, y1, height - y2), value=nothing))
    return torch.where(canvas == -torch.inf, 0.0, canvas)


def _resize(values: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False)
