"""What the server of a benchmark takes, and what every benchmark shares."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from seglight.data.decode import probe
from seglight.data.findings import DataError, Fault

if TYPE_CHECKING:
    from rich.table import Table

    from seglight.submit.archive import Reader


class Verdict(NamedTuple):
    """What a look at an archive found."""

    faults: list[Fault]
    """Empty if the server can take it."""
    files: int
    """That were looked at."""
    score: Table | None
    """By the benchmark's rule, where the split has public labels."""


class Submission:
    """One benchmark. Subclasses set the fields and write `entries`, `look` and, for one file at the end, `closing`.

    Args:
        split: one of `splits`.
    """

    title: ClassVar[str]
    datasets: ClassVar[dict[str, str]]
    """Class of the datamodule by the task of the model."""
    splits: ClassVar[dict[str, str]]
    """What --split means as data.test_split of that class. The first is the default."""
    suffixes: ClassVar[tuple[str, ...]] = (".zip",)
    """Of the archive."""
    upload: ClassVar[str]
    """Where it goes and by what rules, printed when it is done."""

    def __init__(self, split: str):
        self.split = split

    def prepare(self, data: Any) -> None:
        """Look at the datamodule once before anything is written or read.

        Raises:
            ValueError: its options do not fit the server.
        """

    name = ""
    """Of the archive."""

    def rule_of_name(self) -> str | None:
        """Why the server would not take an archive of this name."""

    def entries(self, data: Any, image_id: str, index: int, prediction: Any) -> list[tuple[str, bytes]]:
        """Files of one image: names and contents. Called from several threads, in any order.

        Args:
            data: the datamodule.
            image_id: of the image.
            index: of the image in `data.split("test")`.
            prediction: a label map uint8 (H, W), or of an instance model `labels`, `scores` and `rles`.
        """
        raise TypeError(f"{type(self).__name__} must define entries.")

    def closing(self, data: Any) -> list[tuple[str, bytes]]:
        """Files after those of the images."""
        return []

    def look(self, archive: Reader, data: Any) -> Verdict:
        """Compare every file of an archive with the list of images; nothing but archive and dataset is read."""
        raise TypeError(f"{type(self).__name__} must define look.")


def size_of(dataset: Any, index: int) -> tuple[int, int]:
    """Height and width of an image of a dataset, from its header where it is a file."""
    files = dataset.parts[0] if hasattr(dataset, "parts") else dataset
    if hasattr(files, "image_paths"):
        header = probe(files.image_paths[index])
        return header.height, header.width
    return dataset.size(index)


def has_labels(dataset: Any) -> bool:
    """Whether the split has public labels."""
    files = dataset.parts[0] if hasattr(dataset, "parts") else dataset
    return not hasattr(files, "mask_paths") or any(path is not None for path in files.mask_paths)


def compare_names(found: Sequence[str], expected: Sequence[str]) -> list[Fault]:
    """Files that are missing, too many, or there twice."""
    have, want = Counter(found), set(expected)
    twice = {name for name, count in have.items() if count > 1}
    faults = [
        Fault(0, "missing: the server wants one for every image of the split.", n) for n in expected if n not in have
    ]
    faults += [Fault(1, "not of this split, or in another folder: the server refuses or misreads it.", n)
               for n in sorted(have.keys() - want)]  # fmt: skip
    return faults + [Fault(1, "there more than once.", name) for name in sorted(twice)]


def read_labels(content: bytes, size: tuple[int, int], legal: np.ndarray, palette: bytes | None) -> np.ndarray:
    """The values of a label PNG, uint8 (H, W).

    Args:
        content: of the file.
        size: height and width that it must have.
        legal: bool (256,), values that may occur.
        palette: the colours that it must have, or None for plain grey.

    Raises:
        DataError: it is not what the server wants; the text is the rule.
    """
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError("no readable picture.") from error
    wanted = "L" if palette is None else "P"
    kinds = {"L": "plain grey of 8 bits (mode L)", "P": "an image with a palette (mode P)"}
    if picture.format != "PNG" or picture.mode != wanted:
        raise DataError(f"a {picture.format} of mode {picture.mode}, but it must be a PNG, {kinds[wanted]}.")
    if palette is not None and bytes(picture.getpalette() or b"")[: len(palette)] != palette:
        raise DataError("its palette is not the benchmark's, so labels and colours do not belong together.")
    if (picture.height, picture.width) != size:
        raise DataError("not of the size of its image; results are compared pixel by pixel.")
    values = np.array(picture)
    seen = np.flatnonzero(np.bincount(values.ravel(), minlength=256) * ~legal)
    if len(seen):
        known = np.flatnonzero(legal)
        span = f"{known[0]}..{known[-1]}" if len(known) == known[-1] - known[0] + 1 else f"{', '.join(map(str, known))}"
        raise DataError(f"holds the value {seen[0]}; legal are {span}.")
    return values


def label_files(
    archive: Reader,
    dataset: Any,
    expected: dict[str, int],
    legal: np.ndarray,
    palette: bytes | None,
    faults: list[Fault],
) -> Iterator[tuple[int, np.ndarray]]:
    """Index of the image and labels of every good file; what is wrong with the others is added to `faults`.

    Args:
        archive: to read.
        dataset: the split.
        expected: index of the image by the name of its file.
        legal: as `read_labels`, like `palette`.
        faults: to add to.
    """
    seen = set()
    for name, content in archive:
        index = expected.get(name)
        if index is None or name in seen:
            continue
        seen.add(name)
        try:
            yield index, read_labels(content(), size_of(dataset, index), legal, palette)
        except DataError as error:
            faults.append(Fault(2, str(error).removeprefix(f"{name}: "), name))


class Score:
    """mIoU of the label maps in an archive, where the split has public labels.

    Args:
        data: the datamodule.
    """

    def __init__(self, data: Any):
        from seglight.metrics import ConfusionMatrix

        self.data, self.dataset = data, data.split("test")
        self.metric = ConfusionMatrix(data.num_classes, data.classes) if has_labels(self.dataset) else None

    def add(self, index: int, labels: np.ndarray) -> None:
        """Count the labels uint8 (H, W) of one image."""
        import torch

        if self.metric is not None:
            self.metric.update(torch.from_numpy(labels), torch.from_numpy(self.dataset.read(index)[1]))

    def table(self, faults: Sequence[Fault]) -> Table | None:
        """The table of `seglight test`; None without labelled pixels, and when not all files were good."""
        if self.metric is None or faults:
            return None
        scores = self.metric.compute()
        scores.protocol = self.data.protocol
        return scores.as_table() if scores.support.any() else None


def png(values: np.ndarray, palette: bytes | None = None) -> bytes:
    """A PNG of uint8 (H, W), grey or with a palette."""
    if palette is None:
        import cv2

        return cv2.imencode(".png", values)[1].tobytes()
    from PIL import Image

    picture, buffer = Image.fromarray(np.ascontiguousarray(values, dtype=np.uint8)), io.BytesIO()
    picture.putpalette(palette)
    picture.save(buffer, "PNG")
    return buffer.getvalue()
