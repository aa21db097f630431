"""Each network learns eight pictures by heart: what it cannot even repeat, it cannot learn.

The embedded scenes, drawn small and enlarged, so that labels at a network's own stride can tell their classes at all.
Dropout is off and batch norm uses the batch: the network is tried, not its recipe.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from seglight import models
from seglight.data.scenes import CLASSES, scene
from seglight.metrics import ConfusionMatrix

RESNET = {"backbone": "resnet10t", "batch_norm": "train"}
NETWORKS = {  # options, enlargement, learning rate, steps within which mIoU passes 0.95
    "FCN8s": ({"width": 16}, 2, 1e-3, 200),
    "ParseNet": ({"width": 12, "skip_layers": ["conv3_3", "conv4_3"]}, 2, 1e-3, 150),
    "SemanticFPN": (
        {"backbone": "resnet18", "batch_norm": "train", "pyramid_width": 64, "head_width": 64},
        2,
        1e-3,
        75,
    ),
    "PSPNet": ({**RESNET, "width": 32}, 3, 2e-3, 100),
    "DeepLabV3Plus": (
        {"backbone": "resnet18", "batch_norm": "train", "test_output_stride": 16},
        2,
        1e-3,
        125,
    ),
    "EncNet": ({**RESNET, "width": 32, "codewords": 8}, 3, 2e-3, 100),
    "SMP": ({"encoder": "resnet18"}, 2, 1e-3, 75),
}

SIZE = {"DeepLabV3Plus": (97, 129)}
"""What is cut out of the enlarged pictures: other sizes than 16 k + 1 are padded in evaluation, but not in training."""


def enlarged(array: np.ndarray, factor: int) -> torch.Tensor:
    return torch.from_numpy(np.repeat(np.repeat(array, factor, 0), factor, 1))


@pytest.mark.slow
@pytest.mark.fidelity
@pytest.mark.parametrize("name", NETWORKS)
def test_eight_pictures_are_learned_by_heart(name):
    options, factor, rate, steps = NETWORKS[name]
    drawn = (50, 66) if name in SIZE else (48, 64)
    scenes = [scene(0, index, drawn, simple=True) for index in range(8)]
    image = torch.stack([enlarged(one.image, factor).permute(2, 0, 1) for one in scenes])
    mask = torch.stack([enlarged(one.mask, factor) for one in scenes])
    height, width = SIZE.get(name, image.shape[-2:])
    image, mask = image[..., :height, :width], mask[:, :height, :width]
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=len(CLASSES), **options)
    for layer in model.network.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = 0.0
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=rate, weight_decay=0.0)
    scores = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, step / 20)
        model.train()
        loss = model.loss(model.network(model.normalize(image)), {"image": image, "mask": mask, "image_id": []})["loss"]
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
