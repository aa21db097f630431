"""Augmentation: where every output pixel comes from is drawn first, then applied once.

A training crop is a rectangle of the source image, scaled, mirrored and placed in the output. Cutting the rectangle
before scaling it touches only the pixels that are kept, and OpenCV writes them straight into the batch. Images stay
uint8; the model normalises them on its device.

Coordinates are continuous: pixel i covers [i, i + 1) and has its centre at i + 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from seglight.data import shared
from seglight.data.faults import FaultySample, reading, this_or_another, without
from seglight.data.findings import DataError
from seglight.types import IGNORE_INDEX

if TYPE_CHECKING:
    from seglight.data.dataset import SemanticDataset

PAD_COLOUR = (124, 116, 104)
"""RGB of pixels outside the image: the ImageNet mean, which the usual normalisations turn into about 0."""

_LONGEST = 32766  # pixels on a side that cv2.remap takes
_STREAM = 0x5E91  # second word of the generator's key, so that other users of the seed draw other numbers


def rng_for(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one sample in one pass over the data, whoever asks.

    Philox turns a counter into numbers with a keyed permutation: (epoch, index) in the counter's high words gives every
    sample a stretch of 2**128 values that no other sample shares.
    """
    counter, key = (0, 0, index, epoch), (seed % 2**64, _STREAM)
    return np.random.Generator(np.random.Philox(counter=np.array(counter, np.uint64), key=np.array(key, np.uint64)))


@dataclass(frozen=True, eq=False)
class Geometry:
    """A map from a source image to an output of fixed size.

    The rectangle `source` is stretched to `target`, mirrored within it if `flip`; then the whole output is turned by
    `angle` about its centre and bent by `elastic`. Outside of the image lie `pad` and the label 255.
    """

    size: tuple[int, int]
    """Height and width of the output."""
    source: tuple[int, int, int, int]
    """Top, left, height, width of the rectangle in the source image."""
    target: tuple[int, int, int, int]
    """The same, in the output. Smaller than the output where the scaled image is."""
    flip: bool = False
    angle: float = 0.0
    """Degrees, counter-clockwise."""
    elastic: np.ndarray | None = None
    """(2, 3, 3) displacements dx and dy, in output pixels, at the corners, edge midpoints and centre of the output."""
    pad: tuple[int, int, int] = PAD_COLOUR
    """RGB outside of the image."""
    average: bool = False
    """Where the image shrinks to less than half, average all pixels rather than skip some. Not under rotation."""

    def image(self, image: np.ndarray, out: np.ndarray | None = None, colours: np.ndarray | None = None) -> np.ndarray:
        """Map an image, uint8 (H, W, 3), bilinearly; into `out`, uint8 (h, w, 3), if given.

        `colours`, float32 (3, 4), turns RGB into M @ (R, G, B, 1). It leaves `pad` alone.
        """
        out = np.empty((*self.size, 3), np.uint8) if out is None else out
        if self._bent:
            image = image if colours is None else cv2.transform(image, colours)
            return self._remap(image, out, cv2.INTER_LINEAR, self.pad)
        skips = 2 * self.target[2] < self.source[2]  # bilinear sampling looks at two source pixels each way
        slot = self._stretch(image, out, cv2.INTER_AREA if self.average and skips else cv2.INTER_LINEAR)
        if colours is not None:
            cv2.transform(slot, colours, dst=slot)
        for rows, columns in self._outside:
            out[rows, columns] = _canvas(*self.size, self.pad)[rows, columns]
        return out

    def mask(self, mask: np.ndarray, out: np.ndarray | None = None, outside: int = IGNORE_INDEX) -> np.ndarray:
        """Map labels, uint8 (H, W), to the nearest pixel; into `out`, uint8 (h, w), if given."""
        out = np.empty(self.size, np.uint8) if out is None else out
        if self._bent:
            return self._remap(mask, out, cv2.INTER_NEAREST, outside)
        self._stretch(mask, out, cv2.INTER_NEAREST_EXACT)  # INTER_NEAREST is off by up to half a pixel
        for rows, columns in self._outside:
            out[rows, columns] = outside
        return out

    def masks(self, masks: np.ndarray) -> np.ndarray:
        """Map instance masks, bool (N, H, W) to bool (N, h, w); False outside of the image."""
        out = np.zeros((len(masks), *self.size), np.uint8)
        for mask, slot in zip(masks, out, strict=True):
            self.mask(mask.astype(np.uint8), slot, outside=0)
        return out.astype(bool)

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes, float (N, 4) x1 y1 x2 y2, clipped to the output. Those left outside get zero width or height.

        Under rotation or elastic deformation: the smallest box around the output pixels whose source lies in the box.
        """
        boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
        if self._bent:
            return np.array([self._bent_box(box) for box in boxes], np.float32).reshape(-1, 4)
        (top, left, height, width), (to_top, to_left, to_height, to_width) = self.source, self.target
        x = (boxes[:, 0::2] - left) * (to_width / width)
        y = (boxes[:, 1::2] - top) * (to_height / height)
        x, y = np.clip(x, 0, to_width), np.clip(y, 0, to_height)
        if self.flip:
            x = to_width - x[:, ::-1]
        x, y = x + to_left, y + to_top
        return np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)

    @property
    def _bent(self) -> bool:
        return self.angle != 0 or self.elastic is not None

    @property
    def _outside(self) -> list[tuple[slice, slice]]:
        """The up to four rectangles of the output around `target`."""
        (height, width), (top, left, to_height, to_width) = self.size, self.target
        middle = slice(top, top + to_height)
        strips = [
            (slice(0, top), slice(0, width)),
            (slice(top + to_height, height), slice(0, width)),
            (middle, slice(0, left)),
            (middle, slice(left + to_width, width)),
        ]
        return [(rows, columns) for rows, columns in strips if rows.start < rows.stop and columns.start < columns.stop]

    def _stretch(self, array: np.ndarray, out: np.ndarray, interpolation: int) -> np.ndarray:
        """Fill `target` in the output; returns that part of it."""
        (top, left, height, width), (to_top, to_left, to_height, to_width) = self.source, self.target
        slot = out[to_top : to_top + to_height, to_left : to_left + to_width]
        part = array[top : top + height, left : left + width]
        cv2.resize(part, (to_width, to_height), dst=slot, interpolation=interpolation)
        if self.flip:
            cv2.flip(slot, 1, dst=slot)
        return slot

    def _remap(self, array: np.ndarray, out: np.ndarray, interpolation: int, pad: Any) -> np.ndarray:
        """Fill the output by `_map`; OpenCV gets no more than the output shows of an array that is too long for it."""
        x, y = self._map
        if max(array.shape[:2]) > _LONGEST:
            left, right = _shown(x, array.shape[1])
            top, bottom = _shown(y, array.shape[0])
            array, x, y = array[top:bottom, left:right], x - left, y - top
        longest = max(*array.shape[:2], *out.shape[:2])
        if longest > _LONGEST:
            raise DataError(
                f"It cannot be turned or bent: {longest:,} pixels on a side, and OpenCV takes up to {_LONGEST:,}. Cut "
                "the image into tiles, or set data.rotate and data.elastic to 0."
            )
        return cv2.remap(array, x, y, interpolation, out, cv2.BORDER_CONSTANT, pad)

    @cached_property
    def _map(self) -> tuple[np.ndarray, np.ndarray]:
        """For every output pixel, float32 (h, w) each: x and y of its source, as OpenCV counts (0 = first centre)."""
        (h, w), (top, left, height, width), (to_top, to_left, to_height, to_width) = self.size, self.source, self.target
        x, y = np.arange(w) + 0.5 - w / 2, np.arange(h) + 0.5 - h / 2
        cos, sin = np.cos(np.radians(self.angle)), np.sin(np.radians(self.angle))
        scale_x, scale_y = width / to_width, height / to_height
        start_x, start_y = w / 2 - to_left, h / 2 - to_top  # the output's centre, counted from the corner of `target`
        if self.flip:
            scale_x, start_x = -scale_x, start_x - to_width
        map_x = _outer_sum(scale_x * (start_x - sin * y) + left - 0.5, scale_x * cos * x)
        map_y = _outer_sum(scale_y * (start_y + cos * y) + top - 0.5, scale_y * sin * x)
        if self.elastic is not None:
            map_x += _bend(scale_x * self.elastic[0], self.size)
            map_y += _bend(scale_y * self.elastic[1], self.size)
        return map_x, map_y

    def _bent_box(self, box: np.ndarray) -> tuple[float, float, float, float]:
        x, y = self._map[0] + 0.5, self._map[1] + 0.5
        inside = (x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])
        columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
        return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(columns) else (0, 0, 0, 0)


class TrainTransform:
    """Random scale, crop, mirroring, rotation, elastic deformation and colours of one training sample.

    Args:
        crop: height and width of the output, one number for a square, None for the whole (scaled) image. Where the
            scaled image is smaller than the crop it lies at a random place in it.
        scale: range of the uniform random scale. Below 0.5 bilinear sampling starts to skip pixels.
        flip: probability of mirroring left to right.
        rotate: largest rotation, degrees either way.
        elastic: standard deviation, in output pixels, of the random displacements on a 3x3 grid between which bicubic
            interpolation bends the image (U-Net, Ronneberger et al. 2015, section 3.1: 10).
        jitter: brightness, contrast and saturation are multiplied by random factors in 1 - jitter .. 1 + jitter.
    """

    def __init__(
        self,
        crop: int | Sequence[int] | None = 512,
        scale: Sequence[float] = (0.5, 2.0),
        flip: float = 0.5,
        rotate: float = 0.0,
        elastic: float = 0.0,
        jitter: float = 0.0,
    ):
        crop = (crop, crop) if isinstance(crop, int) else crop
        if crop is not None and (len(crop) != 2 or min(crop) < 1):
            raise ValueError(f"crop is {crop}; it must be one or two sizes in pixels (height, width), or null.")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale is {tuple(scale)}; it must be a range (low, high) with 0 < low <= high.")
        for name, value, high in (("flip", flip, 1), ("rotate", rotate, 180), ("elastic", elastic, 1000)):
            if not 0 <= value <= high:
                raise ValueError(f"{name} is {value}; it must lie in 0..{high}.")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter is {jitter}; it must be at least 0 and less than 1.")
        self.crop = None if crop is None else (int(crop[0]), int(crop[1]))
        self.scale, self.flip, self.rotate = (float(scale[0]), float(scale[1])), flip, rotate
        self.elastic, self.jitter = elastic, jitter

    def draw(self, rng: np.random.Generator, size: tuple[int, int]) -> Geometry:
        """The geometry of a sample of `size` (height, width)."""
        u = rng.random(7)
        scale = self.scale[0] + u[0] * (self.scale[1] - self.scale[0])
        if self.crop is None:
            spans = [(0, length, 0, max(1, round(length * scale))) for length in size]
        else:
            spans = [span(*of_axis, scale) for of_axis in zip(size, self.crop, u[1:3], u[3:5], strict=True)]
        return self._geometry(rng, u, spans)

    def _geometry(
        self, rng: np.random.Generator, u: np.ndarray, spans: Sequence[tuple[int, int, int, int]]
    ) -> Geometry:
        """The geometry of two axes, each its start and length in the source and in the output, and of the numbers u."""
        (top, height, to_top, to_height), (left, width, to_left, to_width) = spans
        return Geometry(
            size=self.crop or (to_height, to_width),
            source=(top, left, height, width),
            target=(to_top, to_left, to_height, to_width),
            flip=bool(u[5] < self.flip),
            angle=float((2 * u[6] - 1) * self.rotate),
            elastic=rng.normal(0, self.elastic, (2, 3, 3)) if self.elastic else None,
        )

    def draw_colours(self, rng: np.random.Generator) -> np.ndarray | None:
        """The colour change of a sample for `Geometry.image`, float32 (3, 4), or None if there is none."""
        if not self.jitter:
            return None
        brightness, contrast, saturation = 1 + self.jitter * (2 * rng.random(3) - 1)
        grey = np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601
        mix = saturation * np.eye(3) + (1 - saturation) * grey
        shift = np.full((3, 1), (1 - contrast) * 128)  # contrast keeps middle grey
        return (brightness * np.hstack([contrast * mix, shift])).astype(np.float32)

    def of(self, classes: Sequence[str]) -> TrainTransform:
        """The same for a dataset of these classes; transforms that depend on them override it."""
        return self

    def sample(
        self,
        dataset: SemanticDataset,
        index: int,
        rng: np.random.Generator,
        out: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read, draw and apply; transforms that know more of a sample than its pixels override it."""
        return self(*dataset.view(index), rng, out)

    def __call__(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        rng: np.random.Generator,
        out: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw and apply: image uint8 (H, W, 3) and labels uint8 (H, W) to those of the crop, in `out` if given."""
        geometry = self.draw(rng, image.shape[:2])
        colours = self.draw_colours(rng)
        out = out or (None, None)
        return geometry.image(image, out[0], colours), geometry.mask(mask, out[1])


def train_batch(
    dataset: SemanticDataset,
    keys: Sequence[tuple[int, int]],
    transform: TrainTransform,
    seed: int,
    skip: bool = False,
) -> dict[str, Any]:
    """A `seglight.types.SemanticBatch` of the samples `keys`: pairs of pass number and index.

    A sample depends on (seed, pass, index) alone, not on its place in the batch or on who builds it.

    Args:
        dataset: where they are read.
        keys: of the samples.
        transform: what is done to them.
        seed: of the augmentation.
        skip: in the place of what cannot be read, take the next sample that can; see `seglight.data.faults`.

    Raises:
        ValueError: several samples without a crop, which would not stack.
        FaultySample: a sample cannot be read, without `skip`.
        DataError: none of the dataset can.
    """
    if transform.crop is None and len(keys) != 1:
        raise ValueError(f"{len(keys)} whole images cannot be stacked, sizes differ; set a crop or a batch size of 1.")
    shape = (len(keys), *(transform.crop or (0, 0)))
    images, masks = shared.empty((*shape, 3), shape)
    pixels, labels = images.numpy(), masks.numpy()
    names: list[str] = []
    faults: list[FaultySample] = []
    for slot, (epoch, index) in enumerate(keys):
        out = (pixels[slot], labels[slot]) if transform.crop else None
        read = partial(_sample, dataset, transform, seed, epoch, out)
        index, (image, mask) = this_or_another(read, index, len(dataset), faults) if skip else (index, read(index))
        names.append(dataset.ids[index])
        if not transform.crop:
            images, masks = torch.from_numpy(image[None]), torch.from_numpy(mask[None])
    return without({"image": images.permute(0, 3, 1, 2), "mask": masks, "image_id": names}, faults)


def _sample(
    dataset: SemanticDataset,
    transform: TrainTransform,
    seed: int,
    epoch: int,
    out: tuple[np.ndarray, np.ndarray] | None,
    index: int,
) -> tuple[np.ndarray, np.ndarray]:
    with reading(dataset.ids[index]):
        return transform.sample(dataset, index, rng_for(seed, epoch, index), out)


def eval_batch(dataset: SemanticDataset, indices: Sequence[int]) -> dict[str, Any]:
    """A `seglight.types.SemanticEvalBatch` of the samples `indices`, at their original size.

    Raises:
        FaultySample: a sample cannot be read.
    """
    samples = []
    for index in indices:
        with reading(dataset.ids[index]):
            samples.append(dataset.read(index))
    return {
        "image": [torch.from_numpy(image).permute(2, 0, 1) for image, _ in samples],
        "mask": [torch.from_numpy(mask) for _, mask in samples],
        "image_id": [dataset.ids[index] for index in indices],
    }


def span(length: int, crop: int, u_source: float, u_target: float, scale: float) -> tuple[int, int, int, int]:
    """One axis of a crop: start and length in the source, start and length in the output, in pixels.

    Source rectangles have whole pixels, so the scale of an axis differs from `scale` by up to half a source pixel over
    the crop: at most 0.2 % for a crop of 512 at scale 2.
    """
    if round(length * scale) <= crop:  # all of it fits: place it at random
        extent = max(1, round(length * scale))
        return 0, length, int(u_target * (crop - extent + 1)), extent
    extent = min(length, max(1, round(crop / scale)))
    return int(u_source * (length - extent + 1)), extent, 0, crop


def _shown(places: np.ndarray, length: int) -> tuple[int, int]:
    """From where to where an axis of this length is looked at, with the neighbours; at least one pixel."""
    return int(np.clip(places.min() - 1, 0, length - 1)), int(np.clip(places.max() + 3, 1, length))


@lru_cache(maxsize=4)
def _canvas(height: int, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    """An image of one colour: copying from it takes 1/40 of the time of broadcasting three numbers."""
    return np.full((height, width, 3), colour, np.uint8)


def _outer_sum(column: np.ndarray, row: np.ndarray) -> np.ndarray:
    return column.astype(np.float32)[:, None] + row.astype(np.float32)


def _bend(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float32 (h, w), bicubic interpolation of (3, 3) values. Not by `@`: BLAS would start threads in every worker."""
    rows, columns = (_cubic(length) for length in size)
    return np.einsum("yi,ix->yx", rows, np.einsum("ij,xj->ix", grid.astype(np.float32), columns))


@lru_cache(maxsize=8)
def _cubic(length: int) -> np.ndarray:
    """(length, 3) weights of bicubic interpolation between values at 0, the middle and the end of an axis."""
    basis = torch.eye(3).reshape(1, 3, 3, 1)
    weights = interpolate(basis, size=(length, 1), mode="bicubic", align_corners=True)
    return weights[0, :, :, 0].T.contiguous().numpy()
