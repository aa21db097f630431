"""Image and mask files to arrays: fast for common files, and an error rather than wrong pixels for the others.

Decoders forgive too much for training data: OpenCV pads a truncated JPEG with grey, cuts 16 bits to 8, turns images by
their EXIF tag and paints a palette mask with its colours, all without a word. So the header is read first, in about
one microsecond, and decides whether a file is decoded by OpenCV, by Pillow (slower, knows more formats) or refused.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps
from zlib_ng import zlib_ng

from seglight.data.findings import DataError

if TYPE_CHECKING:
    from seglight.data.archive import AnyPath, Member

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_PNG_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}
_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_TOO_LARGE = (
    "too many pixels for the decoder that its kind of file needs ({}). Cut it into tiles, each with its labels."
)
_HEAD, _TAIL = 1 << 16, 64  # bytes that usually hold the whole header, and the end marker

# Pillow warns from half of the number of pixels on that it refuses: a sound file of that size is nothing to tell of.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Header(NamedTuple):
    """What a file says of itself before it is decoded."""

    kind: str
    """JPEG, PNG, or Pillow's name of the format."""
    width: int
    height: int
    bits: int
    """Per channel."""
    mode: str
    """Pillow's names: L grey, RGB, P palette, CMYK, RGBA, 1 two-valued..."""
    orientation: int
    """EXIF orientation, 1 (upright) to 8."""
    pages: int
    """Images in the file."""
    complete: bool
    """False when the end marker of a JPEG or PNG is missing."""


def read_image(path: str | AnyPath, exif: bool = False) -> np.ndarray:
    """Decode an image file to uint8 (H, W, 3) RGB.

    Grey is repeated over the channels, a palette is looked up, CMYK is converted by Pillow (without its ICC profile)
    and alpha is dropped: hidden pixels keep the colour that the file stores for them.

    Args:
        path: JPEG, PNG, BMP, TIFF, WebP or whatever else Pillow reads.
        exif: turn upright what EXIF says is stored rotated or mirrored, as viewers do. If False such a file is
            refused, because a mask may have been drawn on either version.

    Raises:
        DataError: truncated or undecodable file, more than 8 bits per channel, several pages, refused orientation.
        FileNotFoundError: no such file.
    """
    data = contents(path)
    header = _header(data, path)
    if fault := image_fault(header, exif):
        raise DataError(f"{path}: {fault}")
    turn = exif and header.orientation != 1
    image = None
    if header.kind in ("JPEG", "PNG") and header.mode != "CMYK" and not turn:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        except cv2.error:  # larger than OpenCV allows; Pillow may still do it, or says what is wrong
            image = None
    if image is None:
        picture = pillow(data, path)
        picture = ImageOps.exif_transpose(picture) if turn else picture
        image = np.array(picture.convert("RGB"))
    return image


def read_mask(path: str | AnyPath) -> np.ndarray:
    """Decode a label file to uint8 (H, W): the indices of a palette image, the values of a grey one, 0/1 of mode 1.

    Raises:
        DataError: as `read_image`, and for RGB masks (no labels without a colour map) and JPEG (does not keep labels).
        FileNotFoundError: no such file.
    """
    data = contents(path)
    header = _header(data, path)
    if fault := mask_fault(header):
        raise DataError(f"{path}: {fault}")
    mask = None
    if header.kind == "PNG" and header.bits == 8:
        mask = _unfiltered_png(data, header, path)
    if mask is None:
        mask = np.array(pillow(data, path)).astype(np.uint8, copy=False)
    return mask


def contents(path: str | AnyPath) -> bytes:
    """The bytes of a file, on disk or in an archive.

    Raises:
        FileNotFoundError: no such file.
    """
    return Path(path).read_bytes() if isinstance(path, str) else path.read_bytes()


def probe(path: str | AnyPath) -> Header:
    """The header of a file, from its first and last bytes only.

    The last bytes of a deflated member of an archive are behind all others, so a large one counts as complete: the
    checksum tells when it is read.

    Raises:
        DataError: not an image.
        FileNotFoundError: no such file.
    """
    if not isinstance(path, (str, Path)):
        return _probe_member(path)
    with open(path, "rb") as file:
        data = file.read(_HEAD)
        size = file.seek(0, io.SEEK_END)
        if size > _HEAD and data.startswith((_JPEG, _PNG)):
            file.seek(-_TAIL, io.SEEK_END)
            try:
                header = _header(data + file.read(), path)
            except DataError:  # the header is longer than what was read, or broken: the whole file tells
                header = None
            if header is not None and header.complete:
                return header
        if size > _HEAD:
            file.seek(0)
            data = file.read()
    return _header(data, path)


def _probe_member(path: Member) -> Header:
    if path.stat().st_size > _HEAD:
        head, tail = path.ends(_HEAD, _TAIL)
        if head.startswith((_JPEG, _PNG)):
            try:
                header = _header(head + (tail or b""), path)
            except DataError:  # as in `probe`
                header = None
            if header is not None and tail is None:
                header = header._replace(complete=True)
            if header is not None and header.complete:
                return header
    return _header(path.read_bytes(), path)


def image_fault(header: Header, exif: bool = False) -> str | None:
    """Why an image with this header is refused and what to do, to be written after its name; None if it is fine."""
    if not header.complete:
        return f"truncated, the end marker of its {header.kind} data is missing. Copy it again from its source."
    if header.bits > 8:
        return (
            f"{header.bits} bits per channel; images need 8. Choose the grey values that matter and convert it once: "
            "cv2.imwrite(out, cv2.normalize(cv2.imread(path, -1), None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U))."
        )
    if header.pages > 1:
        return f"{header.pages} pages in one file; every image needs its own. Save the pages one by one."
    if not exif and header.orientation != 1:
        return (
            f"stored rotated (EXIF orientation {header.orientation}), and the mask may fit either version. If it fits "
            "the upright one, turn the pixels: ImageOps.exif_transpose(Image.open(path)).save(path), with Pillow. If "
            "it fits the stored one, remove the tag: exiftool -Orientation= FILE."
        )
    return None


def mask_fault(header: Header, colours: bool = False) -> str | None:
    """As `image_fault`, for a mask: of label numbers, or of RGB colours if `colours`."""
    if header.kind == "JPEG":
        return "a JPEG changes values near edges, so it cannot hold labels. Export the mask as PNG."
    if header.complete and header.bits > 8:
        return (
            f"{header.bits} bits per channel; labels have 8 (0..254, 255 = ignore). If the values fit, convert it "
            "once: cv2.imwrite(out, cv2.imread(path, -1).astype('uint8'))."
        )
    if fault := image_fault(header):
        return fault
    if colours:
        return None
    if header.mode not in ("L", "P", "1"):
        return (
            f"mode {header.mode}, but a mask has one channel of label numbers. For masks that show classes as colours "
            "give Folder a colour map, data.colors: {name: [r, g, b]}."
        )
    if header.mode == "L" and header.bits in (2, 4):
        return f"{header.bits}-bit grey, which decoders stretch to 0..255. Save the mask with 8 bits or a palette."
    return None


def pillow(data: bytes, path: str | AnyPath) -> Image.Image:
    """Pillow's picture, fully decoded; unlike OpenCV it raises when pixels are missing.

    Args:
        data: the bytes of a file.
        path: of the file, for messages.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {_TOO_LARGE.format(error)}") from error
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path}: cannot be decoded ({error}). Copy it again from its source.") from error
    return picture


def _unfiltered_png(data: bytes, header: Header, path: str | AnyPath) -> np.ndarray | None:
    """Pixels of an 8-bit one-channel PNG with unfiltered rows, or None if it is not one.

    Palette PNGs are unfiltered by convention, so inflating is all they need: less than a third of Pillow's time,
    independent of what decoder versions do with palettes, and strict, because the stream carries a length and a
    checksum.
    """
    chunks, at = [], 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IDAT":
            chunks.append(data[at + 8 : at + 8 + length])
        at += 12 + length
    if data[28]:  # interlaced
        return None
    stride, inflate = header.width + 1, zlib_ng.decompressobj()
    try:
        rows = inflate.decompress(b"".join(chunks), header.height * stride + 1)
    except zlib_ng.error as error:
        raise DataError(f"{path}: cannot be decoded ({error}). Copy it again from its source.") from error
    if not inflate.eof or len(rows) != header.height * stride:  # Pillow would fill missing rows with 0
        raise DataError(f"{path}: its pixels are not those of {header.width}x{header.height}. Copy it again.")
    table = np.frombuffer(rows, np.uint8).reshape(header.height, stride)
    return None if table[:, 0].any() else np.ascontiguousarray(table[:, 1:])  # column 0: how a row is filtered


def _header(data: bytes, path: str | AnyPath) -> Header:
    try:
        if data.startswith(_JPEG):
            return _jpeg_header(data)
        if data.startswith(_PNG):
            return _png_header(data)
        with Image.open(io.BytesIO(data)) as picture:
            return _pillow_header(picture)
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {_TOO_LARGE.format(error)}") from error
    except (LookupError, struct.error, SyntaxError, OSError, ValueError) as error:
        what = "not an image, or its header is broken" if data else "an empty file"
        raise DataError(f"{path}: {what}. Copy it again from its source.") from error


def _jpeg_header(data: bytes) -> Header:
    at, orientation = 2, 1
    while True:
        while data[at + 1] == 0xFF:  # fill bytes before a marker
            at += 1
        if data[at] != 0xFF:
            raise IndexError("no marker where one belongs")
        marker, (length,) = data[at + 1], struct.unpack_from(">H", data, at + 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame; the others are tables
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            break
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _orientation(data[at + 4 : at + 2 + length])
        at += 2 + length
    # Inside image data FF is always followed by 0 or a restart marker, so the last start of scan (FFDA) and the last
    # end of image (FFD9) are real; a thumbnail's own end comes before the scan, bytes after the end do no harm.
    complete = data.endswith(b"\xff\xd9") or data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
    return Header("JPEG", width, height, bits, _JPEG_MODES[channels], orientation, 1, complete)


def _png_header(data: bytes) -> Header:
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    exif = data.find(b"eXIf")
    orientation = _orientation(data[exif + 4 :]) if exif > 0 else 1
    mode = "1" if bits == 1 and colour == 0 else _PNG_MODES[colour]
    return Header("PNG", width, height, bits, mode, orientation, 1, b"IEND\xaeB`\x82" in data)


def _pillow_header(picture: Image.Image) -> Header:
    depths = {"I": 32, "F": 32, "1": 1}
    bits = 16 if picture.mode.startswith("I;16") else depths.get(picture.mode, 8)
    if picture.format == "TIFF":  # Pillow opens 16-bit RGB as mode RGB
        bits = max(picture.tag_v2.get(258, (bits,)))
    width, height = picture.size
    orientation = picture.getexif().get(0x0112, 1)
    pages = getattr(picture, "n_frames", 1)
    return Header(picture.format or "?", width, height, bits, picture.mode, orientation, pages, True)


def _orientation(block: bytes) -> int:
    exif = Image.Exif()
    try:
        exif.load(block)
        value = exif.get(0x0112, 1)
    except (SyntaxError, struct.error, ValueError, OSError):  # a damaged EXIF block says nothing about orientation
        return 1
    return value if value in range(1, 9) else 1
