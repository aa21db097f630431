"""COCO instances (Lin et al., ECCV 2014), and any other data in the format of its json files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seglight.data.base import Split
from seglight.data.cocojson.check import degenerate
from seglight.data.cocojson.document import Document
from seglight.data.cocojson.index import document as read_document
from seglight.data.cocojson.index import file_digest, image_faults
from seglight.data.dataset import InstanceDataset, Subset
from seglight.data.decode import read_image
from seglight.data.files import locate, refuse_overlap, refuse_same, validation_part, warn_of_missing
from seglight.data.findings import DataError, choice, listing, paragraphs
from seglight.data.instances import InstanceDataModule
from seglight.data.objects import Objects
from seglight.data.packed import Packed, Strings
from seglight.data.palette import palette

log = logging.getLogger(__name__)

_ADVICE = (
    "To get it: `seglight data prepare coco` (20 GB), or train2017.zip, val2017.zip and annotations_trainval2017.zip "
    "from https://cocodataset.org/#download, unpacked into one folder. Or a miniature: "
    "`seglight data sample --format coco OUT`."
)
PUBLISHED = {"train2017": 118_287, "val2017": 5_000}
"""Images of each split."""


class COCODataset(InstanceDataset):
    """The images and objects of one json file.

    Args:
        name: of dataset and split, for messages.
        document: the file, see `seglight.data.cocojson.reader.read`.
        folder: that the file names are relative to.
        faulty: "error" lets `check` refuse data with any fault; "drop" leaves out what is faulty, and says how much.
        evaluation: keep objects without a pixel or extent when dropping, as COCO's own evaluation counts them.
        look: at the headers of all images when dropping; the next time only at those that have changed.

    Raises:
        DataError: an entry that cannot be used, with `faulty` "error". All findings are in the message, as in `check`.
    """

    def __init__(
        self,
        name: str,
        document: Document,
        folder: Path,
        faulty: Literal["error", "drop"] = "error",
        evaluation: bool = False,
        look: bool = True,
    ):
        self.name, self.folder, self.faulty = name, folder, faulty
        self.document, self.dropped = document, {}
        if faulty == "drop":
            self._drop(evaluation, look)
        elif document.faults:
            self.check(len(document.categories))
        if not len(self.document):
            raise DataError(f"{name}: {document.path} holds no usable image.")
        self.ids = Numbers(self.data.image_ids)

    @property
    def data(self) -> Packed:
        """All annotations."""
        return self.document.packed

    def path(self, index: int) -> Path:
        """The image file."""
        return self.folder / Strings(self.data.names, self.data.name_starts)[index]

    def image(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3), RGB, turned upright as EXIF says and annotation tools show it.

        Raises:
            DataError: a file that `seglight.data.decode` refuses, or of another size than the json says.
        """
        image = read_image(self.path(index), exif=True)
        if image.shape[:2] != self.size(index):
            height, width = self.size(index)
            raise DataError(
                f"{self.path(index)} has {image.shape[1]}x{image.shape[0]} pixels, but {self.document.path} says "
                f"{width}x{height}. Use the images that were annotated."
            )
        return image

    def size(self, index: int) -> tuple[int, int]:
        """Height and width, as the json says."""
        return int(self.data.heights[index]), int(self.data.widths[index])

    def objects(self, index: int) -> Objects:
        """What is annotated in the image, in the order of the file."""
        data = self.data
        chosen = slice(data.first[index], data.first[index + 1])
        return Objects(
            data.boxes[chosen].copy(),  # whoever gets it may write to it
            data.labels[chosen].copy(),
            data.iscrowd[chosen].copy(),
            data.area[chosen].copy(),
            [self.document.outline(i) for i in range(chosen.start, chosen.stop)],
        )

    def trainable(self) -> np.ndarray:
        """bool (images,): an object that is no crowd and whose box has an extent."""
        data = self.data
        useful = ~data.iscrowd & (data.boxes[:, 2:] > data.boxes[:, :2]).all(1)
        of_image = np.repeat(np.arange(len(self.document)), np.diff(data.first))
        return np.bincount(of_image[useful], minlength=len(self.document)) > 0

    def upright(self) -> np.ndarray:
        """bool (images,): higher than wide, as the json says."""
        return self.data.heights > self.data.widths

    def check(self, num_classes: int) -> None:
        """Entries, outlines and the headers of all image files.

        Measured on two cores: 0.7 s to read 100,000 annotations and 0.1 s to judge their outlines.

        Raises:
            DataError: all findings in one message, worst first, each with its file and annotation.
        """
        if self.faulty == "drop":
            return  # they are gone
        faults = [*self.document.faults, *image_faults(self.document, self.folder)[1], *degenerate(self.document)[1]]
        if faults:
            head = (
                f"{self.name}: the check of {len(self.document)} images and {len(self.data.ids)} annotations in "
                f"{self.document.path} found {len(faults)} faults. Images are below {self.folder}. To leave out what "
                "is faulty, say data.faulty: drop."
            )
            raise DataError("\n".join([head, *paragraphs(faults, "case", str(self.folder))]))

    def _drop(self, evaluation: bool, look: bool) -> None:
        bad_images, faults = np.zeros(len(self.document), bool), []
        if look:
            bad_images, faults = image_faults(self.document, self.folder)
        faults = [*self.document.faults, *faults]
        bad = np.zeros(len(self.data.ids), bool)
        if not evaluation:
            bad, more = degenerate(self.document)
            faults += more
        if not faults:
            return
        self.document = self.document.keep(~bad_images, ~bad)
        self.dropped = dict(Counter(fault.rule for fault in faults))
        log.info(
            "%s: dropped what is faulty in %s:\n%s",
            self.name,
            self.document.path,
            "\n".join(paragraphs(faults, "case", str(self.folder))),
        )

    def fingerprint(self) -> dict[str, Any]:
        """Number of images and annotations, a SHA-256 of the json file, and what was dropped."""
        sha256 = self.document.sha256 or file_digest(self.document.path)
        found = {"samples": len(self), "annotations": len(self.data.ids), "sha256": sha256}
        return {**found, "dropped": self.dropped} if self.dropped else found


class Numbers(Sequence):
    """Whole numbers as strings, without holding them."""

    def __init__(self, numbers: np.ndarray):
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> str:
        return str(self.numbers[index])


class COCOFormat(InstanceDataModule):
    """Objects from json files in COCO's format: classes, sizes and outlines are what the files say.

    Polygons, RLEs, compressed or not, and crowds; ids are any whole numbers and categories get labels 0..K-1 in the
    order of their ids; images without objects are legal. `bbox`, `area` and `iscrowd` may be left out.

    Args:
        images: folder of the images, to which the file names of the json are relative.
        annotations: the json file. Without `val_annotations` a part of its images is for validation.
        val_images: folder of the validation images; by default `images`.
        val_annotations: json file of the validation images.
        test_images: the same for `seglight test`; by default the validation images.
        test_annotations: json file of the test images. It may lack the list of annotations: such images can be
            predicted, and show no object in evaluation.
        val_fraction: share of the images that validate when there is one file only; drawn by their file names, so that
            an image that is lost or dropped moves no other one.
        split_seed: of that draw. It does not follow the seed of the run, so that runs stay comparable.
        faulty: what to do about broken entries, images and outlines: "error" refuses to start and lists them, "drop"
            leaves them out of training and lists them. Evaluation drops only what cannot be used at all. With
            data.check false images are not looked at: a broken one stops the run when it is read.
    """

    category_ids: tuple[int, ...]
    """K ids in the files: what a results json says instead of labels 0..K-1."""

    def __init__(
        self,
        images: str,
        annotations: str,
        val_images: str | None = None,
        val_annotations: str | None = None,
        test_images: str | None = None,
        test_annotations: str | None = None,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        faulty: Literal["error", "drop"] = "error",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction is {val_fraction}; it must lie between 0 and 1.")
        for part, folder, file in (("val", val_images, val_annotations), ("test", test_images, test_annotations)):
            if folder and not file:
                raise ValueError(f"data.{part}_images is given; say data.{part}_annotations, too.")
        choice("faulty", faulty, ("error", "drop"))
        train = (images, annotations)
        val = (val_images or images, val_annotations) if val_annotations else train
        test = (test_images or images, test_annotations) if test_annotations else val
        parts = zip(("train", "val", "test"), (train, val, test), strict=True)
        self.files = {split: tuple(Path(part).expanduser() for part in pair) for split, pair in parts}
        for folder, file in self.files.values():
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"There is no folder of images {folder}. Name yours: --data.images DIR --data.annotations FILE."
                )
            if not file.is_file():
                raise FileNotFoundError(
                    f"There is no annotation file {file}. Name yours, in COCO's format: --data.annotations FILE."
                )
        self.val_fraction, self.split_seed, self.faulty = val_fraction, split_seed, faulty
        self._documents: dict[Path, Document] = {}
        smallest = min((file for _, file in self.files.values()), key=lambda file: file.stat().st_size)
        first = self._document(smallest)
        self.classes, self.category_ids = first.categories, first.category_ids
        self.palette = class_colours(len(self.classes))

    def dataset(self, split: Split) -> InstanceDataset:
        """The images of a split, with and without objects."""
        folder, file = self.files[split]
        document = self._document(file)
        if (document.categories, document.category_ids) != (self.classes, self.category_ids):
            raise DataError(
                f"The files do not list the same categories: {file} has {listing(document.categories, 5)} (ids "
                f"{listing(document.category_ids, 5)}), but another one {listing(self.classes, 5)} (ids "
                f"{listing(self.category_ids, 5)}). Labels would mean different things: list all of them in each file."
            )
        name = f"{type(self).__name__} {split}"
        data = COCODataset(name, document, folder, self.faulty, evaluation=split != "train", look=self.check)
        shared = self.files["train"] == self.files["val"]
        kept = self._part(data, document, split) if shared and self.files[split] == self.files["train"] else data
        for other in ("val", "test") if split == "train" else ():
            if not shared or self.files[other] != self.files["train"]:
                self._refuse_overlap(data, kept, other)
        if split != "train":
            listed = set(_file_names(document))
            if shared and kept is not data:
                listed = validation_part(listed, self.val_fraction, self.split_seed)
            if lost := len(listed) - len(kept):
                log.warning(
                    "%s: %d of %d images are faulty and left out, so its scores do not compare with others. "
                    "`seglight data check` says which.",
                    *(name, lost, len(listed)),
                )
        return kept

    def _part(self, data: COCODataset, document: Document, split: Split) -> Subset:
        """Training or validation images of a file that has both: drawn among all that it lists, dropped or not."""
        listed, names = _file_names(document), _file_names(data.document)
        val = validation_part(listed, self.val_fraction, self.split_seed)
        chosen = [index for index, name in enumerate(names) if (name in val) == (split != "train")]
        if not chosen:
            purpose = "train on" if split == "train" else "validate by"
            raise DataError(
                f"{document.path} holds {len(data)} images; with data.val_fraction {self.val_fraction} none is left to "
                f"{purpose}. Add images, or give data.val_annotations."
            )
        return Subset(data, np.array(chosen), "in_other_splits")

    def _refuse_overlap(self, data: COCODataset, kept: COCODataset | Subset, other: Literal["val", "test"]) -> None:
        """Compare the files of the training images, which are `data` or a part of it, with those of another split."""
        folder, file = self.files[other]
        train = _file_names(data.document, data.folder)
        if isinstance(kept, Subset):
            train = [train[index] for index in kept.indices]
        refuse_overlap(type(self).__name__, train, _file_names(self._document(file), folder), other)

    def _document(self, file: Path) -> Document:
        if file not in self._documents:
            labelled = file != self.files["test"][1] or file in (self.files["train"][1], self.files["val"][1])
            self._documents[file] = read_document(file, labelled)
        return self._documents[file]


class COCO(COCOFormat):
    """COCO 2017: 80 classes, 118,287 images to train on and 5,000 to validate on, crowds included.

    Args:
        root: the folder with annotations, train2017 and val2017. Default: $SEGLIGHT_DATA or ./data, and there coco.
        train_split: folder of images, and part of the file name annotations/instances_{split}.json.
        val_split: the same, for validation.
        test_split: the same, for `seglight test`; or "test-dev2017" or "test2017", whose images are in test2017 and
            listed in annotations/image_info_{split}.json. Their labels are not public: they can be predicted.
        faulty: as in `COCOFormat`. The official training file has a box without height, hence "drop".
    """

    def __init__(
        self,
        root: str | None = None,
        train_split: str = "train2017",
        val_split: str = "val2017",
        test_split: str = "val2017",
        faulty: Literal["error", "drop"] = "drop",
        **kwargs: Any,
    ):
        needed = f"annotations/instances_{val_split}.json"
        self.root = locate(root, "coco", ("", "coco"), needed, _ADVICE)
        refuse_same("COCO", train_split, val_split, test_split)
        file = str(self.root / "annotations/instances_{}.json")
        unlabelled = test_split.startswith("test") and not Path(file.format(test_split)).is_file()
        super().__init__(  # each argument by its name: the command line's help leaves out what is given here
            images=str(self.root / train_split),
            annotations=file.format(train_split),
            val_images=str(self.root / val_split),
            val_annotations=file.format(val_split),
            test_images=str(self.root / ("test2017" if unlabelled else test_split)),
            test_annotations=str(self.root / f"annotations/image_info_{test_split}.json")
            if unlabelled
            else file.format(test_split),
            faulty=faulty,
            **kwargs,
        )

    def dataset(self, split: Split) -> InstanceDataset:
        """As that of `COCOFormat`; says so if it is not all of COCO."""
        data, folder = super().dataset(split), self.files[split][0].name
        warn_of_missing(f"COCO {folder}", len(data), PUBLISHED.get(folder, len(data)))
        return data


def _file_names(document: Document, folder: Path | None = None) -> list[str]:
    """Of all images: as listed, or in full if they lie in `folder`."""
    prefix = f"{folder.resolve()}/" if folder else ""
    return [prefix + name for name in Strings(document.packed.names, document.packed.name_starts)]


def class_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """RGB colours of `count` classes without a background; from the 256th on they repeat."""
    colours = palette(256)[1:]
    return tuple(colours[i % len(colours)] for i in range(count))
