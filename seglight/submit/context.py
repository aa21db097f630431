"""PASCAL-Context. It has no server: the archive is for others who score the same predictions.

A zip with {id}.png for every image, of the image's size and with VOC's palette, and classes.txt, whose line n names
label n: papers order and count the classes differently.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from seglight.data.findings import DataError, Fault
from seglight.submit.archive import Reader
from seglight.submit.benchmark import Score, Submission, Verdict, compare_names, label_files, png
from seglight.submit.voc import COLOURS

NAMES = "classes.txt"


class ContextSubmission(Submission):
    """Labels are those of the dataset's order, with or without a background."""

    title = "PASCAL-Context"
    datasets: ClassVar = {"semantic": "PascalContext"}
    splits: ClassVar = {"val": "val"}
    upload = "PASCAL-Context has no server: give the archive, with its classes.txt, to whom it concerns"

    def entries(self, data: Any, image_id: str, index: int, prediction: np.ndarray) -> list[tuple[str, bytes]]:
        """One palette PNG."""
        return [(f"{image_id}.png", png(prediction, COLOURS))]

    def closing(self, data: Any) -> list[tuple[str, bytes]]:
        """The names of the labels."""
        return [(NAMES, _names(data))]

    def look(self, archive: Reader, data: Any) -> Verdict:
        """Names, palette, size and values of every PNG, and the names of the labels."""
        dataset = data.split("test")
        expected = {f"{name}.png": index for index, name in enumerate(dataset.ids)}
        faults = compare_names(archive.names, [*expected, NAMES])
        try:
            if NAMES in archive.names and archive.read(NAMES) != _names(data):
                rule = (
                    f"names other classes than the dataset ({data.protocol}). Give the dataset's options as they were, "
                    "--data.background and --data.order."
                )
                faults.append(Fault(1, rule, NAMES))
        except DataError as error:
            faults.append(Fault(1, str(error), NAMES))
        score = Score(data)
        legal = np.arange(256) < data.num_classes
        for index, labels in label_files(archive, dataset, expected, legal, COLOURS[: 3 * data.num_classes], faults):
            score.add(index, labels)
        return Verdict(faults, len(archive.names), score.table(faults))


def _names(data: Any) -> bytes:
    return "".join(f"{name}\n" for name in data.classes).encode()
