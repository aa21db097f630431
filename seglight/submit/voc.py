"""PASCAL VOC's evaluation server (host.robots.ox.ac.uk:8080), segmentation.

The devkit (sections 5.2 and 5.3): for each test image one PNG with VOC's palette, values 0..20 and no void, at the size
of the image, in results/VOC2012/Segmentation/comp5_test_cls or comp6_test_cls, in a tar archive packed with gzip.
comp5: trained on VOC's own training data only. comp6: on anything but the test data.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

import numpy as np

from seglight.data.palette import palette
from seglight.submit.archive import Reader
from seglight.submit.benchmark import Score, Submission, Verdict, compare_names, label_files, png

COLOURS = np.array(palette(256), np.uint8).tobytes()
LABELS = 21


class VOCSubmission(Submission):
    """Of either competition.

    Args:
        split: one of `splits`.
        comp: "comp5" (VOC's own training data only) or "comp6" (any other). Without it comp6 is written, for even
            ImageNet weights are other data, and of an archive both are right.
    """

    title = "PASCAL VOC segmentation"
    datasets: ClassVar = {"semantic": "VOC"}
    splits: ClassVar = {"test": "test", "val": "val"}
    suffixes: ClassVar = (".tgz", ".tar.gz")
    upload = (
        "http://host.robots.ox.ac.uk:8080 (an account with an institutional address; few submissions are allowed, so "
        "choose the model on val)"
    )

    def __init__(self, split: str, comp: Literal["comp5", "comp6"] | None = None):
        super().__init__(split)
        self.comp = comp

    def prepare(self, data: Any) -> None:
        """Whether the test images are there.

        Raises:
            FileNotFoundError: the list of the test images is missing.
        """
        lists = data.root / "ImageSets/Segmentation"
        if self.split == "test" and not (lists / "test.txt").is_file():
            raise FileNotFoundError(
                f"There is no {lists / 'test.txt'}. The 1,456 test images and their list are in VOC2012test.tar, which "
                "the server gives to those with an account (http://host.robots.ox.ac.uk:8080); unpack it over the "
                "other images. For a rehearsal give --split val."
            )
        self.folder = f"results/VOC{data.year}/Segmentation/{self.comp or 'comp6'}_{self.split}_cls"

    def _name(self, image_id: str) -> str:
        return f"{self.folder}/{image_id}.png"

    def entries(self, data: Any, image_id: str, index: int, prediction: np.ndarray) -> list[tuple[str, bytes]]:
        """One palette PNG."""
        return [(self._name(image_id), png(prediction, COLOURS))]

    def look(self, archive: Reader, data: Any) -> Verdict:
        """Names, palette, size and values of every PNG."""
        if self.comp is None:  # both are right; which one it is, the archive says
            folders = {str(PurePosixPath(name).parent) for name in archive.names}
            other = self.folder.replace("comp6_", "comp5_")
            self.folder = other if folders == {other} else self.folder
        dataset = data.split("test")
        expected = {self._name(name): index for index, name in enumerate(dataset.ids)}
        faults = compare_names(archive.names, list(expected))
        legal = np.arange(256) < LABELS
        score = Score(data)
        for index, labels in label_files(archive, dataset, expected, legal, COLOURS[: 3 * LABELS], faults):
            score.add(index, labels)
        return Verdict(faults, len(archive.names), score.table(faults))
