"""ADE20K's scene parsing benchmark: 150 classes (Zhou et al., CVPR 2017; sceneparsing.csail.mit.edu)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from seglight.data.archive import files_below, opened
from seglight.data.base import SemanticDataModule, Split
from seglight.data.files import FileDataset, locate, refuse_same, refuse_unpaired, warn_of_missing
from seglight.data.findings import DataError
from seglight.data.palette import palette
from seglight.types import IGNORE_INDEX

_ADVICE = (
    "To get it: `seglight data prepare ade20k` (967 MB), or ADEChallengeData2016.zip from "
    "http://sceneparsing.csail.mit.edu/, unpacked or as it is. Or a miniature: "
    "`seglight data sample --format ade20k OUT`."
)
_LABEL_ADVICE = (
    "Masks hold 1..150, and 0 for other objects: they are those of ADEChallengeData2016, not of the full ADE20K."
)
ARCHIVE = "ADEChallengeData2016.zip"
FOLDER = "ADEChallengeData2016"
PUBLISHED = {"training": 20_210, "validation": 2_000}
"""Images of each split."""
_NAMES = (
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, "
    "door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, "
    "field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, "
    "signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, "
    "stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, "
    "coffee table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, "
    "swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, "
    "streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, "
    "ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, "
    "swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, "
    "trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, "
    "vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, "
    "glass, clock, flag"
)
NAMES = tuple(_NAMES.split(", "))
"""The first of the synonyms that objectInfo150.txt gives each class, in label order."""


class ADE20K(SemanticDataModule):
    """150 classes of scenes: 20,210 images to train on, 2,000 to validate on.

    Other objects, 0 in the files, are ignored. Class names are those of objectInfo150.txt, each the first of its
    synonyms.

    Args:
        root: the folder with ADEChallengeData2016 or ADEChallengeData2016.zip, or ADEChallengeData2016 itself. Default:
            $SEGLIGHT_DATA or ./data, and there ade20k.
        train_split: a folder of images and annotations.
        val_split: the same, for validation.
        test_split: the same, for `seglight test`. The labels of the benchmark's test images are not public.
    """

    def __init__(
        self,
        root: str | None = None,
        train_split: str = "training",
        val_split: str = "validation",
        test_split: str = "validation",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        needed = (f"{FOLDER}/annotations", "annotations/training", ARCHIVE)
        self.root = locate(root, "ade20k", ("",), needed, _ADVICE)
        if (self.root / needed[1]).is_dir():
            here = Path(os.path.abspath(self.root))  # "." has neither parent nor name
            self.root, self.inside = here.parent, here.name
        else:
            self.inside = FOLDER
        refuse_same("ADE20K", train_split, val_split, test_split)
        self.folders = {"train": train_split, "val": val_split, "test": test_split}
        self.classes = self._names()
        self.palette = palette(len(NAMES) + 1)[1:]

    def dataset(self, split: Split) -> FileDataset:
        """The images of a split folder with their annotations."""
        folder = self.folders[split]
        images, masks = (
            files_below(self.root, f"{self.inside}/{kind}/{folder}", (ARCHIVE,)) for kind in ("images", "annotations")
        )
        if missing := [kind for kind, found in (("images", images), ("annotations", masks)) if not found]:
            raise FileNotFoundError(
                f"There is no {' and no '.join(f'{kind}/{folder}' for kind in missing)} in {self.root / self.inside}. "
                f"{_ADVICE}"
            )
        images = {path.removesuffix(".jpg"): file for path, file in images.items() if path.endswith(".jpg")}
        masks = {path.removesuffix(".png"): file for path, file in masks.items() if path.endswith(".png")}
        name = f"ADE20K {folder}"
        refuse_unpaired(name, images, masks, f"Unpack {ARCHIVE} again, completely.")
        warn_of_missing(name, len(images), PUBLISHED.get(folder, len(images)))
        lut = np.full(256, len(NAMES))
        lut[0] = lut[255] = IGNORE_INDEX
        lut[1 : len(NAMES) + 1] = np.arange(len(NAMES))
        return FileDataset(
            name, list(images), list(images.values()), [masks[key] for key in images], lut, advice=_LABEL_ADVICE
        )

    def _names(self) -> tuple[str, ...]:
        """Of objectInfo150.txt, or the built-in ones."""
        file = self.root / self.inside / "objectInfo150.txt"
        if file.is_file():
            text = file.read_text()
        elif (self.root / ARCHIVE).is_file() and not (self.root / self.inside).is_dir():
            archive = opened(self.root / ARCHIVE)
            file = archive.path / f"{FOLDER}/objectInfo150.txt"
            if not archive.below(FOLDER).get("objectInfo150.txt"):
                return NAMES
            text = archive.member(f"{FOLDER}/objectInfo150.txt").read_text()
        else:
            return NAMES
        rows = [line.split("\t") for line in text.splitlines() if line[:1].isdigit()]
        names = tuple(row[-1].replace(";", ",").split(",")[0].strip() for row in rows)
        if len(set(names)) != len(NAMES) or [row[0] for row in rows] != [str(k) for k in range(1, len(NAMES) + 1)]:
            raise DataError(
                f"{file} lists {len(set(names))} classes, not the {len(NAMES)} of the benchmark, one per line with "
                f"tabs between number and name. Unpack {ARCHIVE} again, or remove the file: the names are known."
            )
        return names
