"""Samples that are pairs of an image file and a mask file."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import cv2
import numpy as np

from seglight.data.archive import AnyPath, sources
from seglight.data.check import SIZE_RULE, check, fingerprint
from seglight.data.dataset import SemanticDataset
from seglight.data.decode import Header, mask_fault, probe, read_image, read_mask
from seglight.data.findings import DataError, listing
from seglight.data.packed import Paths
from seglight.data.palette import Colour
from seglight.types import IGNORE_INDEX

log = logging.getLogger(__name__)


class FileDataset(SemanticDataset):
    """One image file and one mask file per sample.

    Args:
        name: of dataset and split, for messages.
        ids: names of the samples.
        image_paths: one file per sample, on disk or in an archive (`seglight.data.archive`).
        mask_paths: one file per sample. None for a split without public labels: every mask is 255 then, of the size of
            its image, so that the split can be predicted and submitted.
        lut: uint8 (256,), the label of each value in the mask files; None where they are labels already. A value that
            must not occur maps to a number of classes or more below 255, which `check` reports.
        colours: label of each RGB colour, for masks that show colours; palette indices do not count then.
        advice: what to do about values for which `lut` has no label, for messages.
    """

    def __init__(
        self,
        name: str,
        ids: Sequence[str],
        image_paths: Sequence[AnyPath],
        mask_paths: Sequence[AnyPath | None] | None,
        lut: np.ndarray | None = None,
        colours: dict[Colour, int] | None = None,
        advice: str = "They are not in data.values: add them there, or to data.ignore.",
    ):
        masks: Sequence[AnyPath | None] = [None] * len(ids) if mask_paths is None else mask_paths
        if not len(ids) == len(image_paths) == len(masks):
            raise ValueError(f"{name}: {len(ids)} ids, {len(image_paths)} images and {len(masks)} masks.")
        if not ids:
            raise DataError(f"{name} has no samples. Look at the folder and the list that it is read from.")
        if len(set(ids)) != len(ids):
            twice = sorted(name for name, count in Counter(ids).items() if count > 1)
            raise DataError(f"{name}: listed more than once: {listing(twice)}. Edit the list.")
        self.name, self.ids = name, list(ids)
        self.image_paths, self.mask_paths = Paths.of(image_paths), Paths.of(masks)
        self.lut = None if lut is None else np.asarray(lut, np.uint8)
        self.advice = advice
        self.colours = tuple(sorted(colours.items())) if colours else None

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H, W, 3) RGB and labels uint8 (H, W).

        Raises:
            DataError: a file that `seglight.data.decode` refuses, different sizes, a colour that is not in the map.
        """
        image = read_image(Paths.to_open(self.image_paths, index))
        if Paths.to_open(self.mask_paths, index) is None:
            return image, np.full(image.shape[:2], IGNORE_INDEX, np.uint8)
        mask = self.values(index)
        if image.shape[:2] != mask.shape:
            raise DataError(f"{self.image_paths[index]}, {self.mask_paths[index]}: {SIZE_RULE}")
        return image, mask if self.lut is None else cv2.LUT(mask, self.lut)

    def files_of(self, index: int) -> tuple[AnyPath, AnyPath | None]:
        """Image and mask."""
        return self.image_paths[index], self.mask_paths[index]

    def values(self, index: int) -> np.ndarray:
        """What the mask file holds, uint8 (H, W): the labels before `lut`; 255 where there is no file."""
        path = Paths.to_open(self.mask_paths, index)
        if path is None:
            header = probe(Paths.to_open(self.image_paths, index))
            return np.full((header.height, header.width), IGNORE_INDEX, np.uint8)
        return read_mask(path) if self.colours is None else _labels_of_colours(path, self.colours)

    def probe_mask(self, path: AnyPath) -> Header:
        """What a mask file says of itself before it is decoded; masks in other than image files override it."""
        return probe(path)

    def check(self, num_classes: int) -> None:
        """See `seglight.data.check.check`."""
        check(self, num_classes)

    def fingerprint(self) -> dict[str, Any]:
        """See `seglight.data.check.fingerprint`; and the archives that samples are read from, if any."""
        archives = sources(self.image_paths, self.mask_paths)
        return {**fingerprint(self), **({"archives": archives} if archives else {})}


def locate(
    root: str | None, name: str, inside: Sequence[str], needed: str | Sequence[str], advice: str, option: str = "root"
) -> Path:
    """The folder of a known dataset: the one among `inside` that holds the file or folder `needed`, or one of several.

    Args:
        root: where the user says it is; None looks in $SEGLIGHT_DATA and ./data, and there in `name` first.
        name: usual name of the folder.
        inside: subfolders of the root in which the data may lie, "" for the root itself.
        needed: a path that tells that it is the right folder; or several, each of which does.
        advice: how to get the data.
        option: what says where it is, for messages.

    Raises:
        FileNotFoundError: with the folders tried and the advice.
    """
    if root is not None:
        roots = [Path(root).expanduser()]
    else:
        homes = [Path(home) for home in (os.environ.get("SEGLIGHT_DATA"), "data") if home]
        roots = [home / part for home in homes for part in (name, "")]
    needed = [needed] if isinstance(needed, str) else needed
    for folder in roots:
        for part in inside:
            if any((folder / part / one).exists() for one in needed):
                return folder / part
    tried = listing([(folder / part / one).as_posix() for folder in roots for part in inside for one in needed], 4)
    raise FileNotFoundError(f"Found none of {tried}. Give the folder as data.{option}. {advice}")


def read_list(path: Path) -> list[str]:
    """Lines of a split list, without empty ones.

    Raises:
        DataError: the file is not in UTF-8.
        FileNotFoundError: naming the lists that are there.
    """
    if not path.is_file():
        others = sorted(other.stem for other in path.parent.glob("*.txt"))
        raise FileNotFoundError(f"There is no split list {path}. Lists beside it: {listing(others) or 'none'}.")
    try:
        text = path.read_text("utf-8-sig")  # Windows writes a mark before the first name
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}). Save it in that encoding.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_ids(path: Path) -> list[str]:
    """Names of the samples of a split list.

    A line may go on behind the name, and the name may be the path of an image, as in DeepLab's lists:
    "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png".

    Raises:
        FileNotFoundError: as `read_list`.
    """
    return [PurePosixPath(line.split()[0]).name.removesuffix(".jpg") for line in read_list(path)]


def warn_of_missing(name: str, found: int, published: int, what: str = "") -> None:
    """Log that a split is not as large as the published one, so that nobody compares scores unawares."""
    if found != published:
        log.warning(
            "%s has %s of the %s published samples%s. Scores do not compare with published ones.",
            *(name, f"{found:,}", f"{published:,}", f": {what}" if what else ""),
        )


def validation_part(names: Iterable[str], fraction: float, seed: int) -> set[str]:
    """The names that validate where one set of them has to do for both: at least one, and the same ones in any order.

    A name keeps its place among the others whatever else is listed, so that a longer list moves few names or none.
    """

    def rank(name: str) -> bytes:
        return hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest()

    order = sorted(set(names), key=rank)
    return set(order[: max(1, round(len(order) * fraction))])


def refuse_overlap(name: str, train: Iterable[str], judged: Iterable[str], split: Literal["val", "test"]) -> None:
    """Raise DataError if a training sample is also one of those that the model is judged by."""
    if both := sorted(set(train) & set(judged)):
        raise DataError(
            f"{name}: {len(both)} of the training samples are also in the {split} split: {listing(both, 3)}. Its "
            f"scores would mean nothing. Choose another data.train_split or data.{split}_split, or edit the lists."
        )


def refuse_leaks(name: str, train: Iterable[str], samples: Callable[[Literal["val", "test"]], Iterable[str]]) -> None:
    """As `refuse_overlap`, for both splits; one for testing may be missing as long as nobody tests."""
    refuse_overlap(name, train, samples("val"), "val")
    with suppress(FileNotFoundError):
        refuse_overlap(name, train, samples("test"), "test")


def refuse_same(name: str, train: str, *judged: str) -> None:
    """Raise DataError if the training split is also one that the model is judged by."""
    if train in judged:
        raise DataError(f"{name}: {train} cannot be trained and judged on. Choose another data.train_split.")


def refuse_unpaired(name: str, images: Iterable[str], masks: Iterable[str], advice: str) -> None:
    """Raise DataError if an image has no mask or a mask has no image; both are given by the names of the samples."""
    if alone := sorted(set(images) ^ set(masks)):
        raise DataError(
            f"{name}: {len(alone)} images without a mask or masks without an image: {listing(alone, 3)}. {advice}"
        )


def names_in(folder: Path, suffix: str) -> set[str]:
    """Names of the files in a folder, without their suffix; none if there is no folder."""
    if not folder.is_dir():
        return set()
    return {name.removesuffix(suffix) for name in os.listdir(folder) if name.endswith(suffix)}


def find(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files below a folder, by their path without suffix relative to it, sorted; hidden ones are left out.

    Raises:
        DataError: two files of the same name with different suffixes.
    """
    names: list[tuple[str, ...]] = []  # strings rather than paths: a fifth of the time
    for here, _, inside in os.walk(folder, followlinks=True):
        parts = Path(here).relative_to(folder).parts
        kept = (name for name in inside if os.path.splitext(name)[1].lower() in suffixes and name[0] != ".")
        names += [(*parts, name) for name in kept]
    found: dict[str, Path] = {}
    for parts in sorted(names):
        key, path = os.path.splitext("/".join(parts))[0], folder.joinpath(*parts)
        if key in found:
            raise DataError(f"{folder} holds both {found[key].name} and {path.name}; which one is meant? Remove one.")
        found[key] = path
    return found


def _labels_of_colours(path: AnyPath, colours: tuple[tuple[Colour, int], ...]) -> np.ndarray:
    if fault := mask_fault(probe(path), colours=True):
        raise DataError(f"{path}: {fault}")
    image = read_image(path)
    codes = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA).view("<u4")[..., 0] & 0xFFFFFF
    labels = _colour_table(colours)[codes]
    if not labels.all():
        unknown, counts = np.unique(image[labels == 0], axis=0, return_counts=True)
        worst = [f"({', '.join(map(str, unknown[i]))}) in {counts[i]} pixels" for i in np.argsort(-counts)]
        raise DataError(
            f"{path}: colours that are not in the colour map: {listing(worst, 3)}. Add them to data.colors, or name "
            "them there and in data.ignore."
        )
    return (labels - 1).astype(np.uint8)


@lru_cache(maxsize=4)
def _colour_table(colours: tuple[tuple[Colour, int], ...]) -> np.ndarray:
    """uint16 (2**24,), label + 1 at red + green * 256 + blue * 65536, 0 elsewhere. Untouched pages take no memory."""
    table = np.zeros(1 << 24, np.uint16)
    for (red, green, blue), label in colours:
        table[red | green << 8 | blue << 16] = label + 1
    return table
