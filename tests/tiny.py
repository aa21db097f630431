"""The smallest model and dataset that go through the front door; importing this makes their short names known."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from seglight.data.base import SemanticDataModule
from seglight.data.dataset import SemanticDataset
from seglight.models.semantic import SemanticModel


class TinyNetwork(nn.Module):
    def __init__(self, num_classes: int, width: int = 4, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.backbone = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.head = nn.Conv2d(width, num_classes, 1)
        self.aux = nn.Conv2d(width, num_classes, 1)

    def forward(self, image):
        features = self.dropout(self.backbone(image).relu())
        return {"out": self.head(features), "aux": self.aux(features)}


class Tiny(SemanticModel):
    """A three-layer network."""

    def __init__(self, num_classes: int, width: int = 4, dropout: float = 0.0, **kwargs):
        super().__init__(network=TinyNetwork(num_classes, width, dropout), num_classes=num_classes, **kwargs)


class BlockScenes(SemanticDataset):
    """Images whose brightness gives the class of each quarter; sizes differ from image to image."""

    def __init__(self, size: int, offset: int):
        self.ids, self.offset = [f"scene{offset + i}" for i in range(size)], offset

    def read(self, index):
        rng = np.random.default_rng(self.offset + index)
        height, width = 20 + index % 3 * 4, 24 + index % 2 * 6
        mask = np.repeat(np.repeat(rng.integers(0, 3, (2, 2)), height // 2, 0), width // 2, 1).astype(np.uint8)
        image = (60 + 80 * mask[..., None] + rng.integers(-20, 20, (*mask.shape, 3))).clip(0, 255).astype(np.uint8)
        mask[0] = 255
        return image, mask


class Blocks(SemanticDataModule):
    """Three classes by brightness, one more that never occurs."""

    classes = ("dark", "middle", "bright", "never")
    palette = ((10, 10, 10), (120, 120, 120), (250, 250, 250), (255, 0, 0))

    def __init__(self, val_size: int = 5, crop: int | None = 16, workers: int = 0, batch_size: int = 2, **kwargs):
        super().__init__(crop=crop, workers=workers, batch_size=batch_size, **kwargs)
        self.val_size = val_size

    def dataset(self, split):
        return {"train": BlockScenes(8, 0), "val": BlockScenes(self.val_size, 100), "test": BlockScenes(5, 200)}[split]


def picture(height: int = 21, width: int = 34) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
