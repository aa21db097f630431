"""What a dataset is: samples of one split at their original size, read one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from seglight.data.objects import Objects

if TYPE_CHECKING:
    from seglight.data.archive import AnyPath


class Samples(Dataset):
    """What datasets of pixels and of objects share."""

    ids: Sequence[str]
    """Names of the samples, unique, in a stable order. COCO's are its image ids."""

    def __len__(self) -> int:
        return len(self.ids)

    def check(self, num_classes: int) -> None:
        """Look for faults before training starts. Datasets made of files look at every one of them.

        Raises:
            seglight.data.findings.DataError: with all findings, worst first.
        """

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data, for the run folder: plain JSON values."""
        return {"samples": len(self)}


class SemanticDataset(Samples):
    """Images and label maps of one split, at their original size.

    Subclasses set `ids` and write `read`.
    """

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One sample: image uint8 (H, W, 3) RGB and label map uint8 (H, W) with 0..K-1 or 255."""
        raise TypeError(f"{type(self).__name__} must define read(index).")

    def view(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """As `read`, for those who only look: the arrays may be read-only, and fetched where they are looked at."""
        return self.read(index)

    def files_of(self, index: int) -> tuple[AnyPath | None, ...]:
        """The one or two files that are a sample's own, None for one that it lacks; nothing if it is generated."""
        return ()

    def content_id(self, index: int) -> str:
        """The id of a sample, or of the one that it repeats."""
        return self.ids[index]


class InstanceDataset(Samples):
    """Images and their objects of one split, at their original size.

    Subclasses set `ids` and write `image`, `size` and `objects`.
    """

    def image(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3), RGB."""
        raise TypeError(f"{type(self).__name__} must define image(index).")

    def size(self, index: int) -> tuple[int, int]:
        """Height and width, without decoding the image where the data say so."""
        return self.image(index).shape[:2]

    def objects(self, index: int) -> Objects:
        """What is annotated in the image."""
        raise TypeError(f"{type(self).__name__} must define objects(index).")

    def trainable(self) -> np.ndarray:
        """bool (samples,): whether there is an object to learn from. All True where only decoding would tell."""
        return np.ones(len(self), bool)

    def upright(self) -> np.ndarray:
        """bool (samples,): whether the image is higher than wide. All False where all have one size."""
        return np.zeros(len(self), bool)


class Names(Sequence):
    """Some of a sequence of names, without a copy."""

    def __init__(self, names: Sequence[str], indices: np.ndarray):
        self.names, self.indices = names, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> str:
        return self.names[self.indices[index]]


class Subset(InstanceDataset):
    """Some samples of a dataset.

    Args:
        dataset: all of them.
        indices: of those that stay.
        why: what to call the number of the others in the fingerprint.
    """

    def __init__(self, dataset: InstanceDataset, indices: np.ndarray, why: str):
        self.whole, self.indices, self.why = dataset, np.asarray(indices, np.int64), why
        self.ids = Names(dataset.ids, self.indices)

    def image(self, index: int) -> np.ndarray:
        """As `InstanceDataset.image`."""
        return self.whole.image(self.indices[index])

    def size(self, index: int) -> tuple[int, int]:
        """As `InstanceDataset.size`."""
        return self.whole.size(self.indices[index])

    def objects(self, index: int) -> Objects:
        """As `InstanceDataset.objects`."""
        return self.whole.objects(self.indices[index])

    def trainable(self) -> np.ndarray:
        """As `InstanceDataset.trainable`."""
        return self.whole.trainable()[self.indices]

    def upright(self) -> np.ndarray:
        """As `InstanceDataset.upright`."""
        return self.whole.upright()[self.indices]

    def check(self, num_classes: int) -> None:
        """The check of the whole dataset: a fault in what is left out is a fault."""
        self.whole.check(num_classes)

    def fingerprint(self) -> dict[str, Any]:
        """That of the whole, how many samples are left, and a SHA-256 of their ids."""
        ids = hashlib.sha256("\n".join(self.ids).encode(errors="surrogateescape")).hexdigest()
        left_out = len(self.whole) - len(self)
        return {**self.whole.fingerprint(), "samples": len(self), self.why: left_out, "ids_sha256": ids}
