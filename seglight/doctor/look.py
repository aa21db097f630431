"""What single files show: every picture decoded wholly, every mask counted."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from seglight.data.check import headers, value_counts
from seglight.data.decode import Header, contents, image_fault, probe, read_image
from seglight.data.findings import DataError, Fault
from seglight.doctor.crew import heard
from seglight.doctor.duplicates import thumbnail

if TYPE_CHECKING:
    from seglight.data.archive import AnyPath
    from seglight.data.files import FileDataset

MANY_COLOURS = 1000  # of one mask: more are only counted
COPY = "Copy it again from its source."
DAMAGED = f"damaged inside, though it ends as it should: a part of it will be grey or shifted. {COPY}"
SURPLUS = (
    "has bytes inside that belong to no pixel, which is what damage in the middle of a JPEG looks like, though some "
    "cameras write padding. Look at it; if a part is grey, smeared or shifted, copy it again from its source."
)
CHECKSUM = f"damaged inside: the checksum of a part of the PNG is wrong. {COPY}"
ALPHA = (
    "has transparent pixels, whose hidden colours the network would see. Put it on a background once: "
    "Image.alpha_composite(Image.new('RGBA', i.size, 'white'), i).convert('RGB'), with Pillow."
)
CMYK = "in CMYK, which is converted without its colour profile. Convert it once to RGB, with an image editor."
FLAT = "shows one colour only. Look whether it is meant to be in the dataset."


class Picture(NamedTuple):
    """What an image file shows."""

    errors: list[str]
    warnings: list[str]
    size: tuple[int, int] | None
    """Width and height."""
    thumb: np.ndarray | None
    """uint8 (32, 32); None if it cannot be decoded."""


class Sample(NamedTuple):
    """What an image and its mask show."""

    picture: Picture
    faults: list[Fault]
    """Of the check before training."""
    header: Header | None
    """Of the mask."""
    counts: np.ndarray | None
    """int64 (256,), of the values in the mask."""
    palette: dict[int, tuple[int, int, int]]
    """Colours of the values of a palette mask."""
    colours: dict[int, int]
    """Pixels of each colour, red << 16 | green << 8 | blue, of a mask that shows colours and has no colour map."""


def look_at_picture(path: AnyPath, exif: bool = False, header: Header | None = None) -> Picture:
    """Decode an image; its faults of the header are those of `seglight.data.decode.image_fault`."""
    errors: list[str] = []
    warnings: list[str] = []
    try:
        header = header or probe(path)
        if image_fault(header, exif):
            return Picture([], [], (header.width, header.height), None)
        image, words = heard(lambda: read_image(path, exif))
    except (DataError, OSError) as error:
        text = str(error).removeprefix(f"{path}: ") if isinstance(error, DataError) else f"cannot be read ({error}). "
        return Picture([text], [], None, None)
    if header.kind == "JPEG" and "extraneous bytes" in words:
        warnings.append(SURPLUS)
    elif header.kind == "JPEG" and ("Corrupt JPEG" in words or "Premature end" in words):
        errors.append(DAMAGED)
    elif header.kind == "PNG" and not _intact(contents(path)):
        errors.append(CHECKSUM)
    if header.mode in ("RGBA", "LA") and _hides(path):
        warnings.append(ALPHA)
    if header.mode == "CMYK":
        warnings.append(CMYK)
    thumb = thumbnail(image)
    if thumb.min() == thumb.max() and not np.ptp(image, (0, 1)).any():
        warnings.append(FLAT)
    return Picture(errors, warnings, (image.shape[1], image.shape[0]), thumb)


def look_at_pair(dataset: FileDataset, index: int) -> Sample:
    """Image and mask of one sample."""
    faults, (image_header, mask_header) = headers(dataset, index)
    image_path, mask_path = dataset.image_paths[index], dataset.mask_paths[index]
    if image_header is None:
        picture = Picture([], [], None, None)
    else:
        picture = look_at_picture(image_path, header=image_header)
    counts, colours, palette = None, {}, {}
    wrong = {fault.rule for fault in faults if fault.where.startswith(str(mask_path)) and fault.rank != 3}
    if mask_header is not None and mask_path is not None and not wrong:
        try:
            values = dataset.values(index)
        except DataError as error:
            faults.append(Fault(4, str(error).removeprefix(f"{mask_path}: "), str(mask_path)))
        except OSError as error:
            faults.append(Fault(0, f"cannot be read ({error.strerror}).", str(mask_path)))
        else:
            counts = value_counts(values)
            if mask_header.mode == "P" and mask_header.kind == "PNG":
                palette = _palette(contents(mask_path), np.flatnonzero(counts))
    elif mask_header is not None and mask_path is not None and mask_header.mode in ("RGB", "RGBA", "LA"):
        colours = _colours(mask_path)
    return Sample(picture, faults, mask_header, counts, palette, colours)


def look_at_file(paths: Any, index: int) -> Picture:
    """A picture of a list; EXIF rotation counts, as for objects."""
    return look_at_picture(paths[index], exif=True)


def _intact(data: bytes) -> bool:
    """Whether the checksums of a PNG are right; OpenCV decodes some without looking."""
    at = 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if zlib.crc32(memoryview(data)[at + 4 : at + 8 + length]) != int.from_bytes(
            data[at + 8 + length : at + 12 + length], "big"
        ):
            return False
        if kind == b"IEND":
            return True
        at += 12 + length
    return False


def _hides(path: AnyPath) -> bool:
    """Whether an image with transparency uses it."""
    with Image.open(io.BytesIO(contents(path))) as picture:
        return picture.getchannel("A").getextrema()[0] < 255


def _palette(data: bytes, values: np.ndarray) -> dict[int, tuple[int, int, int]]:
    at = data.find(b"PLTE")
    length = int.from_bytes(data[at - 4 : at], "big")
    table = data[at + 4 : at + 4 + length]
    return {int(v): tuple(table[3 * v : 3 * v + 3]) for v in values if 3 * v + 3 <= length}


def _colours(path: AnyPath) -> dict[int, int]:
    try:
        image = read_image(path)
    except (DataError, OSError):  # reported elsewhere
        return {}
    codes = cv2.cvtColor(image, cv2.COLOR_RGB2BGRA).view("<u4")[..., 0].ravel() & 0xFFFFFF
    found, counts = np.unique(codes, return_counts=True)
    most = np.argsort(-counts)[:MANY_COLOURS]
    return dict(zip(found[most].tolist(), counts[most].tolist(), strict=True))
