"""What an instance model says of one picture: the object that `model.predict` gives back, and COCO's results format."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seglight import masks as mask_tools
from seglight import visualize_objects
from seglight.types import RLE

if TYPE_CHECKING:
    from PIL import Image


MASK = re.compile(r"\d{3,}_.*_[01]\.\d\d\.png")
"""Name of a mask of `InstancePrediction.save`: rank, class, score."""


def coco_results(
    image_id: int | str,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    rles: Sequence[RLE],
    category_ids: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Objects of one image as entries of a COCO results file, plain JSON values.

    Boxes are there for the scores of boxes. pycocotools takes the size of a detection from its box, where there is one,
    also when it scores masks: for its APs, APm, APl, ARs, ARm and ARl of masks drop `bbox` first, as detectron2 does.

    Args:
        image_id: as in the annotation file.
        boxes: (N, 4), x1 y1 x2 y2.
        labels: (N,), 0..K-1.
        scores: (N,), 0..1.
        rles: N masks.
        category_ids: K ids of the annotation file; 1..K without.
    """
    return [
        {
            "image_id": image_id,
            "category_id": int(label) + 1 if category_ids is None else int(category_ids[label]),
            "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
            "score": float(score),
            "segmentation": {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")},
        }
        for (x1, y1, x2, y2), label, score, rle in zip(boxes, labels, scores, rles, strict=True)
    ]


@dataclass
class InstancePrediction:
    """What an instance model says of one picture, best object first."""

    image: np.ndarray
    """uint8 (H, W, 3), RGB."""
    boxes: np.ndarray
    """float32 (N, 4), x1 y1 x2 y2 in pixels."""
    labels: np.ndarray
    """int64 (N,), 0..K-1."""
    scores: np.ndarray
    """float32 (N,), 0..1."""
    rles: list[RLE]
    """N masks as run lengths."""
    classes: list[str]
    palette: list[tuple[int, int, int]] | None = None

    def __len__(self) -> int:
        return len(self.rles)

    @property
    def masks(self) -> np.ndarray:
        """bool (N, H, W)."""
        return mask_tools.decode(self.rles, self.image.shape[:2])

    @property
    def names(self) -> list[str]:
        """Class name of each object."""
        return [self.classes[label] for label in self.labels]

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """The picture with its objects, each in a colour of its own, with class and score."""
        from PIL import Image

        objects = visualize_objects.Objects(self.labels, self.rles, self.scores)
        return Image.fromarray(visualize_objects.overlay(self.image, objects, self.classes, alpha=alpha))

    def to_coco(self, image_id: int | str = 0, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Entries of a COCO results file; see `coco_results`."""
        return coco_results(image_id, self.boxes, self.labels, self.scores, self.rles, category_ids)

    def save(self, path: str | Path) -> None:
        """Write NAME.json (COCO results), NAME_overlay.jpg and NAME_objects/000_class_0.98.png, a mask per object.

        Masks of an earlier prediction, known by such names, are removed from that folder; other files are kept.
        """
        import cv2

        from seglight.predict import objects_path, overlay_path, with_suffix

        path = with_suffix(Path(path), ".json")
        folder = objects_path(path)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_coco(path.stem)) + "\n")
        self.overlay().save(overlay_path(path), quality=92)
        for old in folder.glob("*.png"):
            if MASK.fullmatch(old.name):  # of an earlier prediction, which the caller chose to replace
                old.unlink()
        for i, (rle, name, score) in enumerate(zip(self.rles, self.names, self.scores, strict=True)):
            mask = mask_tools.decode([rle])[0].astype(np.uint8) * 255
            file = folder / f"{i:03}_{re.sub(r'[^-.0-9A-Za-z]+', '_', name)}_{score:.2f}.png"
            file.write_bytes(cv2.imencode(".png", mask)[1].tobytes())

    def _repr_png_(self) -> bytes:
        """Notebooks show the overlay."""
        return self.overlay()._repr_png_()
