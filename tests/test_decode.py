"""Every decoder path against Pillow, and every kind of bad file."""

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from seglight.data import decode
from seglight.data.decode import probe, read_image, read_mask
from seglight.data.findings import DataError

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)
PHOTO = cv2.resize(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8), (53, 37), interpolation=cv2.INTER_CUBIC)
LABELS = RNG.integers(0, 21, (37, 53), dtype=np.uint8)
PALETTE = RNG.integers(0, 256, 768).tolist()


def save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette(PALETTE)
        assert image.mode == "P"
    elif mode:
        image = image.convert(mode)
    image.save(path, **options)
    return path


def pillow(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


@pytest.mark.parametrize("name, mode, options", [
    ("a.jpg", None, {"quality": 95}),
    ("a.jpg", None, {"quality": 90, "progressive": True}),
    ("a.jpg", None, {"quality": 95, "subsampling": 0, "keep_rgb": True}),
    ("a.jpg", "L", {}),
    ("a.png", None, {}),
    ("a.png", "L", {}),
    ("a.png", "1", {}),
    ("a.png", "P", {}),
    ("a.png", "LA", {}),
    ("a.bmp", None, {}),
    ("a.tif", None, {}),
    ("a.webp", None, {"lossless": True}),
    ("a.gif", "P", {}),
])  # fmt: skip
def test_images_equal_pillow(tmp_path, name, mode, options):
    path = tmp_path / name
    image = Image.fromarray(PHOTO).convert(mode) if mode else Image.fromarray(PHOTO)
    image.save(path, **options)
    result = read_image(path)
    assert (
        result.dtype == np.uint8
        and result.shape == (37, 53, 3)
        and result.flags.c_contiguous
        and result.flags.writeable
    )
    np.testing.assert_array_equal(result, pillow(path))


def test_alpha_is_dropped_not_blended(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.dstack([NOISE, np.zeros((37, 53), np.uint8)])).save(path)
    np.testing.assert_array_equal(read_image(path), NOISE)


def test_cmyk_has_the_right_colours(tmp_path):
    """Adobe's CMYK JPEGs are inverted; a decoder that does not know gives a negative."""
    path = tmp_path / "a.jpg"
    Image.fromarray(PHOTO).convert("CMYK").save(path, quality=98, subsampling=0)
    assert probe(path).mode == "CMYK"
    assert np.abs(read_image(path).astype(int) - PHOTO).mean() < 0.7, "OpenCV is off by 1.5 here"


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.gif"])
@pytest.mark.parametrize("mode", ["P", "L"])
def test_masks_keep_their_numbers(tmp_path, name, mode):
    path = save(tmp_path / name, LABELS, "P" if mode == "P" else None)
    result = read_mask(path)
    assert result.dtype == np.uint8 and result.flags.c_contiguous and result.flags.writeable
    np.testing.assert_array_equal(result, LABELS)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_of_few_bits_keep_their_indices(tmp_path, bits):
    """decode_png(UNCHANGED) of torchvision 0.26 to 0.29 returns packed bytes for these, without an error."""
    labels = LABELS & (2**bits - 1)
    path = save(tmp_path / "a.png", labels * 0, "P", bits=bits)
    assert not read_mask(path).any()
    path = save(tmp_path / "a.png", labels, "P", bits=bits)
    assert path.read_bytes()[24:26] == bytes((bits, 3))
    np.testing.assert_array_equal(read_mask(path), labels)


def test_two_valued_masks_are_zero_and_one(tmp_path):
    save(tmp_path / "a.png", LABELS > 7)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), LABELS > 7)


def test_transparency_does_not_change_labels(tmp_path):
    path = save(tmp_path / "a.png", LABELS, "P", transparency=0)
    np.testing.assert_array_equal(read_mask(path), LABELS)


def png(labels, filters, interlace=0):
    """A palette PNG with a given filter per row, so that each path of the reader is taken."""
    height, width = labels.shape
    rows, above = [], np.zeros(width, np.uint8)
    for row, kind in zip(labels, filters, strict=True):
        rows.append(bytes([kind]) + (row - above if kind == 2 else row).tobytes())
        above = row

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    stream = zlib.compress(b"".join(rows))
    parts = [stream[i : i + 100] for i in range(0, len(stream), 100)]  # several IDAT chunks
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            chunk(b"IHDR", head),
            chunk(b"PLTE", bytes(PALETTE)),
            *(chunk(b"IDAT", part) for part in parts),
            chunk(b"IEND", b""),
        ]
    )


@pytest.mark.parametrize(
    "filters, fast", [([0] * 37, True), ([2] * 37, False), ([0] * 36 + [2], False), ([0] * 9 + [2] * 28, False)]
)
def test_fast_png_path_is_taken_only_where_it_holds(tmp_path, filters, fast):
    (tmp_path / "a.png").write_bytes(data := png(LABELS, filters))
    result = decode._unfiltered_png(data, probe(tmp_path / "a.png"), "a.png")
    assert (result is not None) == fast
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), LABELS)


def test_wrong_picture_data_is_an_error(tmp_path):
    """Fewer rows than the header says, and a flipped bit: the checksum of the stream notices."""
    short = tmp_path / "a.png"
    data = bytearray(png(LABELS, [0] * 37))
    struct.pack_into(">I", data, 20, 99)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    short.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.png: its pixels are not those of 53x99"):
        read_mask(short)
    flipped = bytearray(png(LABELS, [0] * 37))
    flipped[1000] ^= 0x10
    short.write_bytes(flipped)
    with pytest.raises(DataError, match=r"a\.png"):
        read_mask(short)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2],
    lambda data: data[:-2],
    lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),  # a download at full length
])  # fmt: skip
def test_truncated_images_are_refused(tmp_path, name, damage):
    path = save(tmp_path / name, cv2.resize(NOISE, (400, 300)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{name}: truncated.*Copy it again"):
        read_image(path)
    assert not probe(path).complete


@pytest.mark.parametrize("name", ["a.tif", "a.bmp", "a.webp"])
def test_other_truncated_formats_are_refused(tmp_path, name):
    path = save(tmp_path / name, cv2.resize(NOISE, (400, 300)))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match=name):
        read_image(path)


def test_a_thumbnail_does_not_hide_truncation(tmp_path):
    """The end marker of the small image inside the EXIF block is not that of the file."""
    small = io.BytesIO()
    Image.fromarray(NOISE).save(small, "JPEG")
    large = RNG.integers(0, 256, (400, 500, 3), dtype=np.uint8)
    path, extra = save(tmp_path / "a.jpg", large), small.getvalue()
    data = path.read_bytes()
    data = data[:2] + b"\xff\xe2" + struct.pack(">H", len(extra) + 2) + extra + data[2:]
    path.write_bytes(data)
    assert read_image(path).shape == (400, 500, 3)
    path.write_bytes(data[:-3000])
    assert not probe(path).complete
    with pytest.raises(DataError, match="truncated, the end marker"):
        read_image(path)
    path.write_bytes(data + b"appended by some phone" * 5000)
    assert read_image(path).shape == (400, 500, 3) and probe(path).complete


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_refused(tmp_path, name, channels):
    path = tmp_path / name
    cv2.imwrite(str(path), RNG.integers(0, 65536, (20, 30, channels), dtype=np.uint16).squeeze())
    with pytest.raises(DataError, match=rf"{name}: 16 bits.*convert"):
        read_image(path)
    with pytest.raises(DataError, match=rf"{name}: 16 bits.*convert"):
        read_mask(path)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_exif_orientation(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / name, PHOTO, exif=exif)
    with pytest.raises(DataError, match=rf"{name}: stored rotated \(EXIF orientation {orientation}\)"):
        read_image(path)
    upright = read_image(path, exif=True)
    turned = Image.open(path).transpose({
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[orientation])  # fmt: skip
    np.testing.assert_array_equal(upright, np.array(turned.convert("RGB")))


def test_exif_without_rotation_is_fine(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 1, "a camera"
    assert read_image(save(tmp_path / "a.jpg", PHOTO, exif=exif)).shape == (37, 53, 3)


@pytest.mark.parametrize("make, words", [
    (lambda path: save(path, NOISE), "mode RGB.*colour map"),
    (lambda path: save(path, NOISE, "RGBA"), "mode RGBA"),
    (lambda path: save(path, NOISE, "LA"), "mode LA"),
    (lambda path: path.write_bytes(b""), "empty"),
    (lambda path: path.write_text("<html>404</html>"), "not an image"),
    (lambda path: Image.fromarray(LABELS).save(path, "JPEG"), "JPEG changes values"),
    (lambda path: path.write_bytes(png(LABELS, [0] * 37)[:-200]), "truncated"),
])  # fmt: skip
def test_unusable_masks_are_refused(tmp_path, make, words):
    make(tmp_path / "m.png")
    with pytest.raises(DataError, match=rf"m\.png: .*{words}"):
        read_mask(tmp_path / "m.png")


def test_four_bit_grey_is_refused(tmp_path):
    """Decoders multiply such samples by 17, which is right for grey and wrong for labels."""
    packed = zlib.compress(b"\0\x01\x23" * 4)
    head = struct.pack(">IIBBBBB", 4, 4, 4, 0, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", head), (b"IDAT", packed), (b"IEND", b""))
    )
    (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert np.array(Image.open(tmp_path / "m.png")).max() == 51
    with pytest.raises(DataError, match="4-bit grey"):
        read_mask(tmp_path / "m.png")


def test_several_pages_are_refused(tmp_path):
    pages = [Image.fromarray(LABELS), Image.fromarray(LABELS)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match="2 pages"):
        read_image(tmp_path / "a.tif")


def test_a_missing_file_is_a_missing_file(tmp_path):
    for read in (read_image, read_mask, probe):
        with pytest.raises(FileNotFoundError, match=r"no\.png"):
            read(tmp_path / "no.png")


def test_probe_reads_little(tmp_path, monkeypatch):
    """Headers of large files come from their first 64 kB, and are the same as those of the whole file."""
    for name in ("a.jpg", "a.png"):
        path = save(
            tmp_path / name,
            cv2.resize(NOISE, (900, 700), interpolation=cv2.INTER_NEAREST)
            ^ RNG.integers(0, 64, (700, 900, 3), dtype=np.uint8),
        )
        size = path.stat().st_size
        assert size > 1 << 17
        read = []
        original = decode._header
        monkeypatch.setattr(
            decode, "_header", lambda data, where, o=original, r=read: r.append(len(data)) or o(data, where)
        )
        header = probe(path)
        monkeypatch.setattr(decode, "_header", original)
        assert max(read) < size and header == original(path.read_bytes(), path)
        assert (header.width, header.height, header.bits, header.mode, header.complete) == (900, 700, 8, "RGB", True)


def test_real_masks_take_the_fast_path(real_data):
    folder = real_data / "voc2012/VOCdevkit/VOC2012/SegmentationClass"
    for path in sorted(folder.glob("*.png"))[::20]:
        expected = np.array(Image.open(path))
        np.testing.assert_array_equal(decode._unfiltered_png(path.read_bytes(), probe(path), path), expected)
        np.testing.assert_array_equal(read_mask(path), expected)


def test_real_photographs_equal_pillow(real_data):
    for path in sorted((real_data / "voc2012/VOCdevkit/VOC2012/JPEGImages").glob("*.jpg"))[::60]:
        assert (
            np.abs(read_image(path).astype(int) - pillow(path)).max() <= 3
        )  # two libjpeg builds may round differently


@pytest.mark.parametrize("name, read", [("a.tif", read_image), ("a.png", read_mask)])
def test_too_many_pixels_are_called_so(tmp_path, monkeypatch, name, read):
    rows = np.repeat(LABELS[:2], 30, 0)
    path = save(tmp_path / name, rows, optimize=True) if name == "a.png" else save(tmp_path / name, rows)
    monkeypatch.setattr(decode, "_unfiltered_png", lambda data, header, path: None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", rows.size // 2 - 1)
    with pytest.raises(DataError, match=r"too many pixels .*3180 pixels.*Cut it into tiles"):
        read(path)


def test_large_sound_files_are_no_warning(tmp_path):
    path = save(tmp_path / "a.tif", NOISE)
    code = "from PIL import Image; from seglight.data.decode import read_image; Image.MAX_IMAGE_PIXELS = 1000; "
    done = subprocess.run(
        [sys.executable, "-c", code + f"print(read_image({str(path)!r}).shape)"], capture_output=True, text=True
    )
    assert done.stdout == "(37, 53, 3)\n" and not done.stderr
