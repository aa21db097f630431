"""`Shapes`, the embedded dataset: generated scenes, so no file is needed."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from seglight.data.base import SemanticDataModule, Split
from seglight.data.dataset import InstanceDataset, SemanticDataset
from seglight.data.instances import InstanceDataModule
from seglight.data.objects import Bitmap, Objects
from seglight.data.scenes import CLASSES, FIRST_INDEX, MIN_SIZE, PALETTE, THINGS, Scene, scene


class ShapesDataset(SemanticDataset):
    """Scenes of one split, drawn when they are read (about 4 ms for 160x192 pixels on one core).

    Args:
        split: decides which scenes; splits share none.
        size: number of scenes.
        image_size: height and width.
        scene_seed: of the world.
        simple: colour tells most classes, see `seglight.data.scenes.scene`.
    """

    def __init__(
        self,
        split: Split,
        size: int,
        image_size: tuple[int, int] = (160, 192),
        scene_seed: int = 0,
        simple: bool = False,
    ):
        self.ids = [f"{split}_{index:06d}" for index in range(size)]
        self.first, self.image_size, self.scene_seed = FIRST_INDEX[split], image_size, scene_seed
        self.simple = simple

    def scene(self, index: int) -> Scene:
        """Everything that is known about a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"There is no scene {index}; the split holds {len(self)}.")
        return scene(self.scene_seed, self.first + index, self.image_size, simple=self.simple)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H, W, 3) RGB and labels uint8 (H, W) with 255 on borders."""
        sample = self.scene(index)
        return sample.image, sample.mask

    def read_instances(self, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Image, and the arrays of `seglight.types.InstanceTarget`; labels index `Shapes.thing_classes`."""
        sample = self.scene(index)
        objects = sample.objects
        return sample.image, {
            "boxes": np.array([one.box for one in objects], np.float32).reshape(-1, 4),
            "labels": np.array([THINGS.index(one.label) for one in objects], np.int64),
            "masks": sample.object_masks(),
            "iscrowd": np.array([one.crowd for one in objects], bool),
            "area": np.array([one.area for one in objects], np.float32),
        }

    def fingerprint(self) -> dict[str, Any]:
        """How the scenes are made, and a hash of the first one, which tells versions of the generator apart."""
        first = hashlib.sha256(b"".join(array.tobytes() for array in self.read(0))).hexdigest() if self.ids else None
        size = list(self.image_size)
        return {"samples": len(self), "image_size": size, "scene_seed": self.scene_seed, "first_scene_sha256": first}


class Shapes(SemanticDataModule):
    """Squares, triangles, stars, rings, wires, suns and moons over a skyline; `seglight.data.scenes` says what for.

    Whether a disc is sun or moon shows in the windows at the lower edge only, so a crop much smaller than the scene
    leaves discs that nobody can tell apart; the defaults lose the windows in one crop of fifty.

    Args:
        train_size: scenes to train on.
        val_size: scenes to validate on; they stay the same whatever `train_size` is.
        test_size: scenes of the test split.
        image_size: height and width of a scene.
        simple: a grey sky and a colour for each class, which a network learns in minutes; for demonstrations, not for
            telling networks apart.
        scene_seed: of the scenes. It does not follow the seed of the run, so that runs stay comparable.
        crop: as elsewhere, but null means the whole scene.
        scale: as elsewhere.
    """

    classes = CLASSES
    palette = PALETTE
    thing_classes = tuple(CLASSES[label] for label in THINGS)
    """Names of the countable classes, in the order of instance labels."""

    def __init__(
        self,
        train_size: int = 1000,
        val_size: int = 101,  # odd on purpose: no number of ranks or batch size divides it, and scores must not care
        test_size: int = 101,
        image_size: tuple[int, int] = (160, 192),
        scene_seed: int = 0,
        simple: bool = False,
        crop: int | tuple[int, int] | None = None,
        scale: tuple[float, float] = (0.75, 1.5),
        **kwargs: Any,
    ):
        super().__init__(crop=image_size if crop is None else crop, scale=scale, **kwargs)
        sizes = {"train": train_size, "val": val_size, "test": test_size}
        for split, size in sizes.items():
            if not 0 < size <= FIRST_INDEX["val"]:
                raise ValueError(f"data.{split}_size is {size}; it must be between 1 and {FIRST_INDEX['val']}.")
        if min(image_size) < MIN_SIZE:
            raise ValueError(f"data.image_size is {list(image_size)}; each must be at least {MIN_SIZE} pixels.")
        if scene_seed < 0:
            raise ValueError(f"data.scene_seed is {scene_seed}; it must be 0 or more.")
        self.sizes, self.image_size, self.scene_seed, self.simple = sizes, tuple(image_size), scene_seed, simple

    def dataset(self, split: Split) -> ShapesDataset:
        """The scenes of a split."""
        return ShapesDataset(split, self.sizes[split], self.image_size, self.scene_seed, self.simple)


class ShapesObjects(InstanceDataset):
    """The countable objects of generated scenes."""

    def __init__(self, scenes: ShapesDataset):
        self.scenes, self.ids = scenes, scenes.ids
        self._last: tuple[int, tuple[np.ndarray, dict[str, np.ndarray]]] | None = None

    def _read(self, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A scene is drawn once, though image and objects are asked for one after the other."""
        if self._last is None or self._last[0] != index:
            self._last = index, self.scenes.read_instances(index)
        return self._last[1]

    def image(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3), RGB."""
        return self._read(index)[0]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width."""
        return self.scenes.image_size

    def objects(self, index: int) -> Objects:
        """What can be seen of each object; swarms are crowds."""
        _, found = self._read(index)
        outlines = []
        for mask, (x1, y1, x2, y2) in zip(found["masks"], found["boxes"].astype(int), strict=True):
            outlines.append(Bitmap(int(y1), int(x1), mask[y1:y2, x1:x2]))
        area = found["area"].astype(np.float64)
        return Objects(found["boxes"].copy(), found["labels"].copy(), found["iscrowd"].copy(), area, outlines)

    def fingerprint(self) -> dict[str, Any]:
        """That of the scenes."""
        return self.scenes.fingerprint()


class ShapesInstances(InstanceDataModule):
    """The squares, triangles, stars, rings, suns and moons of `Shapes`, one by one; wires are no objects.

    Args:
        train_size: scenes to train on.
        val_size: scenes to validate on; they stay the same whatever `train_size` is.
        test_size: scenes of the test split.
        image_size: height and width of a scene.
        scene_seed: of the scenes.
        simple: a grey sky and a colour for each class, as in `Shapes`.
        short_side: as elsewhere.
        long_side: as elsewhere.
    """

    classes = Shapes.thing_classes
    palette = tuple(PALETTE[label] for label in THINGS)

    def __init__(
        self,
        train_size: int = 1000,
        val_size: int = 101,
        test_size: int = 101,
        image_size: tuple[int, int] = (160, 192),
        scene_seed: int = 0,
        simple: bool = False,
        short_side: int | list[int] = 160,
        long_side: int = 256,
        **kwargs: Any,
    ):
        super().__init__(short_side=short_side, long_side=long_side, **kwargs)
        self.scenes = Shapes(train_size, val_size, test_size, image_size, scene_seed, simple)

    def dataset(self, split: Split) -> ShapesObjects:
        """The scenes of a split."""
        return ShapesObjects(self.scenes.dataset(split))
