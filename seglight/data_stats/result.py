"""The counts of one split, and what follows from them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from seglight.types import IGNORE_INDEX

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

GRID = 32
"""Rows and columns of the map of places."""
SMALL, LARGE = 32**2, 96**2
"""COCO's size ranges: small objects have an area below, large ones one above, in pixels (cocoeval.py, areaRng)."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
WEIGHTS = {
    "median": (
        "median of f / f(c), f(c) = pixels of c / pixels of the images that hold c",
        "Eigen and Fergus, ICCV 2015, section 6.3.2; used by SegNet",
    ),
    "inverse_log": (
        "1 / ln(1.02 + p(c)), p(c) = share of c in the labelled pixels",
        "ENet, Paszke et al. 2016",
    ),
    "effective": (
        "(1 - b) / (1 - b^n(c)) with sum K, n(c) = images that hold c, b = 0.999",
        "Cui et al., CVPR 2019",
    ),
}
"""Class weights: formula and source of each kind."""


@dataclass
class Statistics:
    """Counts over one split. K classes, G = `GRID`.

    In data with objects, a class covers the pixels in which any of its objects lies, crowds included.
    """

    name: str
    """Of the datamodule."""
    split: str
    task: str
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    """K RGB colours of the classes."""
    images: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Number of images of each height and width."""
    values: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """int64 (256,), pixels of each label, 255 without one. Data with objects: those without any at 255, others at 0."""
    holding: np.ndarray = None
    """int64 (K,), images in which the class has a pixel (an object)."""
    holding_pixels: np.ndarray = None
    """int64 (K,), all pixels of these images, unlabelled ones too."""
    together: np.ndarray = None
    """int64 (K, K), images that hold both classes."""
    places: np.ndarray = None
    """int64 (K, G, G), pixels of the class in each part of the picture; row r of H lies in part r * G // H."""
    places_held: np.ndarray = None
    """int64 (K, G, G), all labelled pixels there (all, if objects) of the images that hold the class."""
    places_all: np.ndarray = None
    """int64 (G, G), the same of all images."""
    intensities: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), np.int64))
    """int64 (3, 256), pixels of each red, green and blue value."""
    unlabelled_images: int = 0
    """Images without any labelled pixel, or without any object."""
    objects: np.ndarray = field(default_factory=lambda: np.zeros((0, 5)))
    """float64 (N, 5) of all objects but crowds: label, annotated area, width and height of the box (in pixels of the
    image), and the factor by which training resizes the image (of several or random ones the middle)."""
    crowds: np.ndarray = None
    """int64 (K,), crowds of each class."""
    objects_in_image: Counter[int] = field(default_factory=Counter)
    """Number of images with so many objects, crowds left out."""

    def __post_init__(self):
        count = len(self.classes)
        shapes = {
            **dict.fromkeys(("holding", "holding_pixels", "crowds"), (count,)),
            "together": (count, count),
            "places": (count, GRID, GRID),
            "places_held": (count, GRID, GRID),
            "places_all": (GRID, GRID),
        }
        for name, shape in shapes.items():
            if getattr(self, name) is None:
                setattr(self, name, np.zeros(shape, np.int64))

    def add(self, other: Statistics) -> None:
        """Add the counts of further images."""
        self.images += other.images
        self.unlabelled_images += other.unlabelled_images
        self.sizes.update(other.sizes)
        self.objects_in_image.update(other.objects_in_image)
        counts = ("values", "holding", "holding_pixels", "together", "intensities", "crowds")
        for name in (*counts, "places", "places_held", "places_all"):
            mine = getattr(self, name)
            mine += getattr(other, name)

    @property
    def pixels(self) -> np.ndarray:
        """int64 (K,), pixels of each class."""
        return self.places.sum((1, 2))

    @property
    def total(self) -> int:
        """All pixels."""
        return int(self.values.sum())

    @property
    def labelled(self) -> int:
        """Pixels of a class."""
        return int(self.places_all.sum()) if self.task == "semantic" else self.total

    @property
    def unlabelled_share(self) -> float:
        """Share of the pixels that no loss sees (255); in data with objects, of those without any object. 0..1."""
        return int(self.values[IGNORE_INDEX]) / max(1, self.total)

    @property
    def strange(self) -> dict[int, int]:
        """Label values that are no class, and their pixels: a fault that `seglight data check` explains."""
        if self.task != "semantic":
            return {}
        found = np.flatnonzero(self.values[:IGNORE_INDEX])
        return {int(value): int(self.values[value]) for value in found if value >= len(self.classes)}

    @property
    def frequency(self) -> np.ndarray:
        """float64 (K,), share of each class in the labelled pixels (data with objects: in all pixels), 0..1."""
        return self.pixels / max(1, self.labelled)

    @property
    def heat(self) -> np.ndarray:
        """float64 (K, G, G), 0..1: share of the class in each part of the picture, over the images that hold it."""
        return self.places / np.maximum(1, self.places_held)

    @property
    def mean(self) -> list[float]:
        """Of red, green and blue over all pixels, 0..1."""
        return [float(value) for value in self._moments[0] / 255]

    @property
    def std(self) -> list[float]:
        """Standard deviation of red, green and blue over all pixels, 0..1."""
        first, second = self._moments
        return [float(value) for value in np.sqrt(second - first**2) / 255]

    @property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        value, count = np.arange(256), self.intensities.sum(1).clip(1)
        return (self.intensities @ value) / count, (self.intensities @ value**2) / count

    def class_weights(self, kind: str = "median", beta: float = 0.999) -> list[float]:
        """K weights for `class_weights` of a model; `WEIGHTS` has the formulas and their sources.

        A class without a pixel gets 1: no loss will use it.

        Args:
            kind: "median", "inverse_log" or "effective".
            beta: of "effective", 0 <= beta < 1; larger ones tell frequent classes apart.

        Raises:
            ValueError: unknown kind, beta outside of its range, objects instead of labels.
        """
        if self.task != "semantic":
            raise ValueError(f"{self.name} has objects; models of objects take no class weights.")
        if kind not in WEIGHTS:
            raise ValueError(f"There are no class weights {kind!r}; choose one of {', '.join(WEIGHTS)}.")
        if not 0 <= beta < 1:
            raise ValueError(f"beta is {beta}; it must be at least 0 and less than 1.")
        there = self.pixels > 0
        weights = np.ones(len(self.classes))
        if not there.any():
            return weights.tolist()
        if kind == "median":
            share = self.pixels[there] / self.holding_pixels[there]
            weights[there] = np.median(share) / share
        elif kind == "inverse_log":
            weights[there] = 1 / np.log(1.02 + self.frequency[there])
        else:
            raw = (1 - beta) / (1 - beta ** self.holding[there])
            weights[there] = raw * there.sum() / raw.sum()
        return weights.tolist()

    def object_sizes(self, label: int | None = None) -> dict[str, Any]:
        """How many objects of a class (of all) are there, how large and of which shape; crowds are left out.

        Returns:
            count; small, medium, large by COCO's ranges of the annotated area; quantiles (5, 25, 50, 75, 95 %) of the
            square root of the area in the image, of the square root of the box at training size (what anchors must
            fit), and of height / width of the box.
        """
        chosen = self.objects if label is None else self.objects[self.objects[:, 0] == label]
        _, area, width, height, factor = chosen.T
        small, large = int((area < SMALL).sum()), int((area > LARGE).sum())
        found = {"count": len(chosen), "small": small, "medium": len(chosen) - small - large, "large": large}
        columns = {
            "side": np.sqrt(area),
            "training_box": factor * np.sqrt(width * height),
            "aspect": height / np.maximum(width, 1e-9),
        }
        for name, column in columns.items():
            found[name] = np.quantile(column, QUANTILES).tolist() if len(chosen) else None
        return found

    def anchors(self, levels: int = 5) -> list[int]:
        """Anchor sizes in pixels at training size, one for each pyramid level, each twice the last.

        The first is the power of two nearest to the side that 5 % of the boxes do not reach, but at least 4 pixels.
        An anchor has an IoU of at least 0.5 with boxes of its centre and shape of 0.71 to 1.41 times its side.

        Raises:
            ValueError: no objects.
        """
        if not len(self.objects):
            raise ValueError(f"{self.name} {self.split} has no objects, so there is nothing that anchors could fit.")
        smallest = max(4.0, self.object_sizes()["training_box"][0])
        first = 2 ** round(math.log2(smallest))
        return [first * 2**level for level in range(levels)]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, for stats.json: exact counts, and what follows from them."""
        per_class = []
        for k, name in enumerate(self.classes):
            one = {"name": name, "pixels": int(self.pixels[k]), "images": int(self.holding[k])}
            one |= {"share": float(self.frequency[k]), "pixels_of_its_images": int(self.holding_pixels[k])}
            if self.task == "instance":
                one |= {"objects": self.object_sizes(k), "crowds": int(self.crowds[k])}
            per_class.append(one)
        found = {
            "made_by": "seglight data stats",
            "dataset": self.name,
            "split": self.split,
            "task": self.task,
            "images": self.images,
            "pixels": self.total,
            "unlabelled_share": self.unlabelled_share,
            "images_without_labels": self.unlabelled_images,
            "label_values_without_class": self.strange,
            "sizes": [[height, width, count] for (height, width), count in sorted(self.sizes.items())],
            "mean": self.mean,
            "std": self.std,
            "classes": per_class,
            "together": self.together.tolist(),
            "places": self.places.tolist(),
        }
        if self.task == "semantic":
            found["class_weights"] = {kind: self.class_weights(kind) for kind in WEIGHTS}
        else:
            found["objects"] = self.object_sizes()
            found["objects_in_image"] = [list(item) for item in sorted(self.objects_in_image.items())]
        return found

    def as_table(self) -> Table:
        """A line per class, the most frequent first."""
        from seglight.data_stats.text import table

        return table(self)

    def draw(self, path: str | Path | IO[bytes]) -> None:
        """Write one picture (PNG) of everything."""
        from seglight.data_stats.draw import draw

        draw(self, path)
