"""Pictures in which one thing decides, so that a network shows in minutes whether it has what its paper added."""

from __future__ import annotations

from typing import ClassVar

import cv2
import numpy as np

from seglight.data import SemanticDataModule, SemanticDataset


class Scenes(SemanticDataset):
    """Pictures drawn from (seed, index) alone.

    Args:
        size: number of pictures.
        seed: of the set; sets of different seeds share no picture.
        kind: "wires": dark lines 1 to 3 pixels wide and boxes (background, wire, box).
            "context": discs that are suns under a warm and moons under a cold strip at the far edge of the picture
            (background, sun, moon); the discs themselves look the same, and so does all that surrounds them.
            "edges": polygons in colours of their own (background, polygon).
        side: of the square picture, pixels.
    """

    def __init__(self, size: int, seed: int, kind: str, side: int):
        self.ids = [f"{kind} {seed}-{i}" for i in range(size)]
        self.seed, self.kind, self.side = seed, kind, side

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw one picture and its labels."""
        rng = np.random.default_rng((self.seed, index))
        side = self.side
        image = np.full((side, side, 3), rng.integers(110, 170, 3), np.uint8)
        mask = np.zeros((side, side), np.uint8)
        getattr(self, f"_{self.kind}")(rng, image, mask)
        noise = rng.normal(0, 8, image.shape)
        return (image + noise).clip(0, 255).astype(np.uint8), mask

    def _wires(self, rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> None:
        for _ in range(3):
            corner, box = rng.integers(0, self.side - 20, 2), rng.integers(14, 40, 2)
            colour = rng.integers(170, 256, 3).tolist()
            for canvas, value in ((image, colour), (mask, 2)):
                cv2.rectangle(canvas, corner.tolist(), (corner + box).tolist(), value, -1)
        for _ in range(4):
            ends = rng.integers(0, self.side, (2, 2)).tolist()
            width = int(rng.integers(1, 4))
            cv2.line(image, *ends, rng.integers(0, 60, 3).tolist(), width)
            cv2.line(mask, *ends, 1, width)

    def _context(self, rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> None:
        warm = bool(rng.integers(2))
        strip = self.side // 12
        image[-strip:] = (220, 120, 40) if warm else (40, 120, 220)
        for _ in range(3):
            radius = int(rng.integers(6, 14))
            centre = rng.integers(radius, (self.side - radius, self.side // 2)).tolist()
            cv2.circle(image, centre, radius, (240, 240, 240), -1)
            cv2.circle(mask, centre, radius, 1 if warm else 2, -1)

    def _edges(self, rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> None:
        for _ in range(3):
            centre = rng.integers(20, self.side - 20, 2)
            angles = np.sort(rng.uniform(0, 2 * np.pi, 5))
            radii = rng.uniform(10, self.side / 3, 5)[:, None]
            points = centre + radii * np.stack([np.cos(angles), np.sin(angles)], 1)
            colour = np.where(rng.random(3) < 0.5, rng.integers(0, 70, 3), rng.integers(200, 256, 3)).tolist()
            for canvas, value in ((image, colour), (mask, 1)):
                cv2.fillPoly(canvas, [points.round().astype(np.int32)], value)


class Claim(SemanticDataModule):
    """`train` pictures to learn from and 40 to judge by."""

    CLASSES: ClassVar = {
        "wires": ("background", "wire", "box"),
        "context": ("background", "sun", "moon"),
        "edges": ("background", "polygon"),
    }

    def __init__(self, kind: str, side: int = 96, train: int = 400, seed: int = 0, batch_size: int = 8):
        super().__init__(batch_size=batch_size, workers=0, seed=seed, crop=side, scale=(1.0, 1.0), check=False)
        self.kind, self.side, self.train_size = kind, side, train
        self.classes = self.CLASSES[kind]
        self.palette = ((60, 60, 60), (230, 160, 40), (70, 130, 230))[: len(self.classes)]

    def dataset(self, split: str) -> Scenes:
        """The pictures of a split; validation and test are the same."""
        size = self.train_size if split == "train" else 40
        return Scenes(size, 2 * self.seed + (split != "train"), self.kind, self.side)
