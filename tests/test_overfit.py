"""Each network learns eight pictures by heart: what it cannot even repeat, it cannot learn.

The embedded scenes, thinned out and enlarged, so that labels at a network's own stride can tell their classes at all.
Dropout is off and batch norm uses the batch: the network is tried, not its recipe.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from seglight import models
from seglight.data.boxes import extend, objects
from seglight.data.scenes import CLASSES, scene
from seglight.metrics import ConfusionMatrix

RESNET10 = {"backbone": "resnet10t", "batch_norm": "train"}
RESNET18 = {"backbone": "resnet18", "batch_norm": "train"}


class Case(NamedTuple):
    """How a network is tried."""

    options: dict[str, Any]
    size: tuple[int, int]
    """Of the pictures. Where evaluation pads those that are not 8 k + 1 or 16 k + 1, training would not."""
    factor: int
    """How many times a scene is enlarged; 0 for crops around objects, as DeconvNet is trained."""
    rate: float
    """Learning rate."""
    steps: int
    """Within which mIoU passes 0.95."""
    thin: int = 1
    """Only every so many pixels of a scene are kept before."""
    begin: int = 0
    """Row and column of the enlarged scene at which the picture begins, so that scores lie in the middle of a cell."""
    context_rate: float = 1.0
    """Learning rate of a context module that starts as the identity, times `rate`: the paper trains it by itself."""


NETWORKS = {
    "FCN8s": Case({"width": 16}, (160, 160), 8, 1e-3, 75),
    "FCN8sAtOnce": Case({"width": 16}, (160, 160), 8, 1e-3, 75),
    "FCN16s": Case({"width": 16}, (160, 160), 8, 1e-3, 75),
    "FCN32s": Case({"width": 16}, (128, 128), 16, 1e-3, 100, thin=2),
    "FCN32sAlexNet": Case({"width": 16}, (128, 128), 16, 1e-3, 100, thin=2),
    "FCN32sGoogLeNet": Case({"width": 16}, (128, 128), 16, 1e-3, 125, thin=2),
    "ParseNet": Case({"width": 12, "skip_layers": ["conv3_3", "conv4_3"]}, (96, 128), 2, 1e-3, 150),
    "UNet": Case({"width": 12, "in_channels": 3}, (100, 132), 2, 1e-3, 225),
    "SemanticFPN": Case({**RESNET18, "pyramid_width": 64, "head_width": 64}, (96, 128), 2, 1e-3, 75),
    "PSPNet": Case({**RESNET10, "width": 32}, (144, 192), 3, 2e-3, 100),
    "DeconvNet": Case({"width": 8, "test_boxes": "image", "test_floor": False}, (224, 224), 0, 1e-2, 300),
    "DeepLabV2": Case(RESNET10, (97, 97), 8, 1e-3, 50, begin=4),
    "DeepLabV2VGG": Case({"width": 16}, (129, 129), 8, 1e-3, 75, begin=4),
    "DeepLabV3": Case({**RESNET18, "output_stride": 8, "channels": 64}, (97, 97), 4, 1e-3, 125, begin=2),
    "DeepLabV3Cascade": Case({**RESNET18, "output_stride": 8, "last_block": 5}, (97, 97), 8, 1e-3, 50, begin=4),
    "DeepLabV3Plus": Case({**RESNET18, "test_output_stride": 16}, (97, 129), 2, 1e-3, 125),
    "Dilation": Case({"width": 8}, (97, 97), 8, 1e-3, 100, begin=4, context_rate=0.03),
    "Dilation, basic": Case({"width": 8, "context": "basic"}, (97, 97), 8, 1e-3, 100, begin=4),
    "EncNet": Case({**RESNET10, "width": 32, "codewords": 8}, (144, 192), 3, 2e-3, 100),
    "SMP": Case({"encoder": "resnet18"}, (96, 128), 2, 1e-3, 75),
}


def pictures(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (8, 3, H, W) and labels uint8 (8, H, W)."""
    if not case.factor:
        return objects_of_each_class(case.size)
    cells = [-(-(case.begin + length) // case.factor) * case.thin for length in case.size]
    scenes = [scene(0, index, tuple(max(48, n) for n in cells), simple=True) for index in range(8)]

    def cut(array: np.ndarray) -> torch.Tensor:
        thinned = array[:: case.thin, :: case.thin]
        large = torch.from_numpy(np.repeat(np.repeat(thinned, case.factor, 0), case.factor, 1))
        return large[case.begin :, case.begin :][: case.size[0], : case.size[1]]

    images, masks = [cut(one.image).permute(2, 0, 1) for one in scenes], [cut(one.mask) for one in scenes]
    return torch.stack(images), torch.stack(masks)


def objects_of_each_class(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """As `pictures`: the largest object of a class with its context, one class after another, stretched to a size."""
    found, index = [], 0
    while len(found) < 8:
        one, index = scene(0, index, (96, 128), simple=True), index + 1
        boxes, labels = objects(one.mask, background=0)
        boxes = boxes[labels == 1 + len(found) % (len(CLASSES) - 1)]
        if len(boxes):
            largest = boxes[[np.argmax((boxes[:, 2:] - boxes[:, :2]).prod(1))]]
            left, top, right, bottom = extend(largest)[0].round().astype(int).clip(0)
            cut = (array[top:bottom, left:right] for array in (one.image, one.mask))
            found.append([cv2.resize(array, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT) for array in cut])
    images, masks = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*found, strict=True))
    return images.permute(0, 3, 1, 2), masks


def test_no_architecture_is_left_out():
    bases, peers = {"BaseModel", "SemanticModel", "InstanceModel"}, {"TorchvisionSegmentation"}
    kinds = {name: getattr(models, name) for name in models.__all__ if name not in bases | peers}
    assert {name for name, kind in kinds.items() if issubclass(kind, models.SemanticModel)} == {
        name.partition(",")[0] for name in NETWORKS
    }


@pytest.mark.slow
@pytest.mark.fidelity
@pytest.mark.parametrize("name", NETWORKS)
def test_eight_pictures_are_learned_by_heart(name):
    case = NETWORKS[name]
    image, mask = shown, labels = pictures(case)
    if name == "UNet":  # valid convolutions: it labels what lies 92 pixels inside, and mirrors in evaluation
        shown = nn.functional.pad(image.float(), (92,) * 4, mode="reflect")
        labels = nn.functional.pad(mask, (92,) * 4, value=255)
    torch.manual_seed(0)
    model = getattr(models, name.partition(",")[0])(num_classes=len(CLASSES), **case.options)
    for layer in model.network.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = 0.0
    rates = [
        case.rate * (case.context_rate if key.startswith("ctx_") else 1) for key, _ in model.network.named_parameters()
    ]
    groups = [{"params": [one], "lr": rate} for one, rate in zip(model.network.parameters(), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    scores = []
    for step in range(1, case.steps + 1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, step / 20)
        model.train()
        scored = model.network(model.normalize(shown))
        loss = model.loss(scored, {"image": shown, "mask": labels, "image_id": []})["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.network.parameters(), 5.0)
        optimizer.step()
        if step % 25 == 0:
            confusion = ConfusionMatrix(len(CLASSES))
            model.eval()
            with torch.inference_mode():
                for one, truth in zip(image, mask, strict=True):
                    confusion.update(model.labels([one])[0][0], truth)
            scores.append(confusion.compute().miou)
            if scores[-1] > 0.95:
                return
    raise AssertionError(f"mIoU after every 25 steps: {[round(score, 3) for score in scores]}")
