"""Boxes of objects in label maps, and training crops around them (DeconvNet, Noh, Hong and Han 2015, section 4).

A box is x1, y1, x2, y2 in pixels, with x2 and y2 just outside.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from seglight.data.dataset import SemanticDataset
from seglight.data.transforms import Geometry, TrainTransform
from seglight.types import IGNORE_INDEX

Around = Literal["objects", "proposals"]

CONTEXT = 1.2
"""How much longer and wider than its object a crop is."""
RESIZE = 250 / 224
"""Boxes are stretched to 250x250 pixels, of which the network sees a random 224x224."""
OVERLAP = 0.5
"""Smallest intersection over union of a proposal with an object."""
SMALLEST = 16
"""Pixels of the longer side, below which a connected part is a splinter rather than an object."""
BLACK = (0, 0, 0)
"""RGB outside of the image, as in the release."""


def objects(mask: np.ndarray, background: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of the connected parts (by sides and corners) of each class, those shorter than 16 pixels left out.

    Args:
        mask: uint8 (H, W), labels; 255 belongs to no object.
        background: the class that is no object, if there is one.

    Returns:
        boxes int64 (N, 4) and their labels int64 (N,), by label; N = 0 is legal.
    """
    boxes, labels = [], []
    for label in np.flatnonzero(np.bincount(mask.ravel(), minlength=1)):
        if label in (background, IGNORE_INDEX):
            continue
        _, _, stats, _ = cv2.connectedComponentsWithStats((mask == label).astype(np.uint8))
        for x, y, width, height, _ in stats[1:].tolist():
            if max(width, height) >= SMALLEST:
                boxes.append((x, y, x + width, y + height))
                labels.append(label)
    return np.array(boxes, np.int64).reshape(-1, 4), np.array(labels, np.int64)


def extend(boxes: np.ndarray, factor: float = CONTEXT) -> np.ndarray:
    """Stretch boxes (N, 4) about their centres; they may leave the image. Float (N, 4)."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    return np.hstack([centre - factor * half, centre + factor * half])


def overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (N, 4) with others (M, 4), float (N, M)."""
    boxes, others = (np.asarray(of, np.float64).reshape(-1, 4) for of in (boxes, others))
    low, high = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    area, other_area = ((of[:, 2:] - of[:, :2]).prod(-1) for of in (boxes, others))
    return common / (area[:, None] + other_area - common)


class BoxTransform(TrainTransform):
    """Training crops of boxes instead of random places, otherwise as `TrainTransform`.

    A box is drawn, made 1.2 times as long and wide, and stretched to 250/224 of the crop's size, whatever its shape;
    the crop is a random part of that. Pixels outside of the image are black and have the label 255. An image without
    an object is taken as one box.

    Args:
        around: "objects" (stage 1) draws an object of the label map and calls all other classes background. "proposals"
            (stage 2) draws a box that overlaps an object by half or more, and keeps all labels.
        proposals: boxes (N, 4) by image id, of which those with enough overlap are drawn. Without, an object's box with
            its sides moved at random stands for a proposal.
        options: of `TrainTransform`. `crop` is needed; `scale` above 1 shows less than the whole box.
    """

    def __init__(
        self,
        around: Around | None,
        proposals: Mapping[str, np.ndarray] | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        if around != "proposals" and proposals is not None:
            raise ValueError(f'data.proposals goes with data.crop_around "proposals", which is {around!r}; set that.')
        if around not in ("objects", "proposals"):
            raise ValueError(f'crop_around is {around!r}; choose "objects" or "proposals".')
        if self.crop is None:
            raise ValueError(f"crop_around {around} needs a crop size: set data.crop (224 for DeconvNet).")
        self.around, self.proposals = around, proposals
        self.background: int | None = None

    def of(self, classes: Sequence[str]) -> BoxTransform:
        """With the label of the class "background", which is no object.

        Raises:
            ValueError: stage 1 needs such a class, and there is none.
        """
        bound = copy.copy(self)
        bound.background = list(classes).index("background") if "background" in classes else None
        if self.around == "objects" and bound.background is None:
            raise ValueError(
                'data.crop_around "objects" calls everything but the object "background", and no class has that name; '
                'use "proposals", which keeps all labels.'
            )
        return bound

    def sample(
        self,
        dataset: SemanticDataset,
        index: int,
        rng: np.random.Generator,
        out: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Image and labels of a crop. Depends on the sample and on `rng` alone."""
        image, mask = dataset.view(index)
        box, label = self._box(dataset.ids[index], mask, rng)
        geometry, colours = self.draw_box(rng, mask.shape, box), self.draw_colours(rng)
        image_out, mask_out = out or (None, None)
        image, mask = geometry.image(image, image_out, colours), geometry.mask(mask, mask_out)
        if label is not None:
            mask[(mask != label) & (mask != IGNORE_INDEX)] = self.background
        return image, mask

    def draw_box(self, rng: np.random.Generator, size: tuple[int, int], box: np.ndarray) -> Geometry:
        """The geometry of a crop around a box (4,) of an image of `size` (height, width)."""
        u = rng.random(7)
        scale = RESIZE * (self.scale[0] + u[0] * (self.scale[1] - self.scale[0]))
        x1, y1, x2, y2 = extend(box)[0]
        spans = [
            _window(start, stop, length, crop, of_axis, scale)
            for start, stop, length, crop, of_axis in zip((y1, x1), (y2, x2), size, self.crop, u[1:3], strict=True)
        ]
        return dataclasses.replace(self._geometry(rng, u, spans), pad=BLACK)

    def _box(self, name: str, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int | None]:
        """A box (4,), and the one class that stays in it, if only one does."""
        boxes, labels = objects(mask, self.background)
        pick, numbers = rng.random(), rng.uniform(-1 / 3, 1 / 3, (32, 4))
        if not len(boxes):
            return np.array([0, 0, mask.shape[1], mask.shape[0]]), None
        if self.around == "objects":
            number = int(pick * len(boxes))
            return boxes[number], int(labels[number])
        if self.proposals is not None:
            if name not in self.proposals:
                raise ValueError(f"The proposals have no boxes of {name}; make the file from this split.")
            proposed = np.asarray(self.proposals[name], np.float64).reshape(-1, 4)
            fit = proposed[(overlap(proposed, boxes) >= OVERLAP).any(1)] if len(proposed) else proposed
            if len(fit):
                return fit[int(pick * len(fit))], None
        box = boxes[int(pick * len(boxes))]
        moved = np.clip(box + numbers * np.tile(box[2:] - box[:2], 2), 0, np.tile(mask.shape[::-1], 2))
        return np.vstack([moved[overlap(moved, box)[:, 0] >= OVERLAP], box])[0], None


def _window(start: float, stop: float, length: int, crop: int, u: float, scale: float) -> tuple[int, int, int, int]:
    """One axis: start and length in the source, start and length in the crop.

    The crop shows 1 / scale of start..stop, at the place that u says, in whole pixels. What lies outside of the image,
    0..length, is left out of both.
    """
    seen = (stop - start) / scale
    extent = max(1, round(seen))
    low = round(start + u * (stop - start - seen))
    low = min(max(low, 1 - extent), length - 1)  # however far it is zoomed in, one pixel of the image stays
    first, last = max(low, 0), min(low + extent, length)
    to_first, to_last = (round((side - low) * crop / extent) for side in (first, last))
    to_first = min(to_first, crop - 1)
    return first, last - first, to_first, max(1, to_last - to_first)


def save_proposals(dataset: SemanticDataset, provider: Callable[[np.ndarray], np.ndarray], path: str | Path) -> None:
    """Write the boxes of every image of a split for `data.proposals`, an `.npz` with one array by image id.

    Args:
        dataset: the split.
        provider: from an image uint8 (H, W, 3) to boxes (N, 4), without context.
        path: of the file.
    """
    boxes = {name: np.asarray(provider(dataset.read(index)[0]), np.float32) for index, name in enumerate(dataset.ids)}
    np.savez_compressed(Path(path).with_suffix(".npz"), **boxes)


def load_proposals(path: str | Path) -> dict[str, np.ndarray]:
    """Boxes by image id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no `.npz`, or an array in it is not (N, 4).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No proposals {path}; write them with seglight.data.boxes.save_proposals.")
    try:
        with np.load(path, allow_pickle=False) as file:
            boxes = dict(file)
    except (ValueError, AttributeError, OSError) as error:
        raise ValueError(
            f"{path} is not an .npz of boxes; write it with seglight.data.boxes.save_proposals."
        ) from error
    for name, array in boxes.items():
        if array.ndim != 2 or array.shape[1] != 4:
            raise ValueError(f"{path}: the boxes of {name} have the shape {array.shape}; it must be (N, 4).")
    return boxes
