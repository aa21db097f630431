"""Planted faults of images and masks, also in VOC and Cityscapes, are found, each alone and with its remedy."""

import shutil

import numpy as np
import pytest
from clinic import SIZE, found, judge, picture, save_like
from PIL import Image

from seglight.data.cityscapes import Cityscapes
from seglight.data.folder import Folder
from seglight.data.scenes import CLASSES, scene
from seglight.data.voc import VOC
from seglight.doctor import examine


def image(root, number=2, split="train"):
    return sorted((root / split / "images").iterdir())[number]


def mask(root, number=2, split="train"):
    return sorted((root / split / "masks").iterdir())[number]


def without_mask(root):
    mask(root).unlink()
    return "unpaired", [image(root)], "Add what is missing"


def without_image(root):
    image(root).unlink()
    return "unpaired", [mask(root)], "Add what is missing"


def cut_png(root):
    path = image(root)
    path.write_bytes(path.read_bytes()[:-400])
    return "truncated", [path], "Copy it again"


def damaged_png(root):
    path = image(root)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    return {"undecodable", "damaged"}, [path], "Copy it again"


def wrong_checksum(root):
    """Pixels that decode, in a chunk whose checksum says that something else was written."""
    path = image(root)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"IEND") - 5] ^= 0x40
    path.write_bytes(data)
    return {"undecodable", "damaged"}, [path], "Copy it again"


def empty_file(root):
    image(root).write_bytes(b"")
    return "empty-file", [image(root)], "Copy it again"


def no_image(root):
    image(root).write_text("<html>404 not found</html>")
    return "not-an-image", [image(root)], "Copy it again"


def damaged_mask(root):
    path = mask(root)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    return "undecodable", [path], "Copy it again"


def other_size(root):
    path = mask(root)
    picture(path).resize((100, 96), Image.NEAREST).save(path)
    return "sizes-differ", [path], "resize it"


def turned(root):
    path, exif = image(root), Image.Exif()
    exif[0x0112] = 6
    picture(path).save(path.with_suffix(".jpg"), exif=exif, quality=95)
    path.unlink()
    return "exif-rotation", [path.with_suffix(".jpg")], "exif_transpose"


def turned_upright(root):
    """The mask fits what a viewer shows: still one finding, which says so."""
    turned(root)
    path = mask(root)
    picture(path).rotate(-90, expand=True).save(path)
    return "exif-rotation", [image(root)], "exif_transpose"


def deep_image(root):
    path = image(root)
    grey = np.array(picture(path).convert("L"), np.uint16) * 200
    Image.fromarray(grey).save(path)
    return "bit-depth", [path], "cv2.normalize"


def deep_mask(root):
    path = mask(root)
    Image.fromarray(np.array(picture(path)).astype(np.uint16)).save(path)
    return "bit-depth", [path], "astype('uint8')"


def transparent(root):
    path = image(root)
    see = picture(path).convert("RGBA")
    see.putalpha(Image.fromarray(np.tile(np.arange(112, dtype=np.uint8), (96, 1)) + 100))
    see.save(path)
    return "transparent", [path], "alpha_composite"


def cmyk(root):
    path = image(root)
    picture(path).convert("CMYK").save(path.with_suffix(".jpg"), quality=95)
    path.unlink()
    return "cmyk", [path.with_suffix(".jpg")], "RGB"


def animated(root):
    path = image(root)
    pages = [picture(path), picture(image(root, 3))]
    pages[0].save(path.with_suffix(".tif"), save_all=True, append_images=pages[1:])
    path.unlink()
    return "animated", [path.with_suffix(".tif")], "one by one"


def strange_value(root):
    path = mask(root)
    labels = np.array(picture(path))
    labels[10:20, 10:20] = 77
    Image.fromarray(labels).save(path)
    return "label-values", [path], "Name more classes"


def coloured_mask(root):
    path = mask(root)
    labels = np.array(picture(path))
    Image.fromarray(np.stack([labels * 20, labels, labels], 2)).save(path)
    return "mask-colours", [path], "Give each colour a name"


def jpeg_mask(root):
    path = mask(root)
    picture(path).convert("L").save(path.with_suffix(".jpg"))
    path.unlink()
    return "jpeg-mask", [path.with_suffix(".jpg")], "as PNG"


def shared_mask(root):
    shutil.copy(mask(root, 1), mask(root, 2))
    return "mask-shared", [mask(root, 1), mask(root, 2)], "look at them"


def ignored_mask(root):
    Image.fromarray(np.full(SIZE, 255, np.uint8)).save(mask(root))
    return "mask-ignored", [mask(root)], "Leave them out"


def one_colour(root):
    Image.new("RGB", SIZE[::-1], (10, 200, 30)).save(image(root))
    return "one-colour", [image(root)], "meant to be"


def add(root, name, of, labels, split="train"):
    of.save(root / split / "images" / name)
    labels.save((root / split / "masks" / name).with_suffix(".png"))
    return root / split / "images" / name


def thumbnail_size(root):
    other = scene(9, 1, (48, 60))
    path = add(
        root, "tiny.png", Image.fromarray(other.image).resize((30, 24)), Image.fromarray(other.mask).resize((30, 24), 0)
    )
    return "too-small", [path], "thumbnails"


def strip(root):
    other = scene(9, 1, (96, 640))
    path = add(root, "wide.png", Image.fromarray(other.image), Image.fromarray(other.mask))
    return "elongated", [path], "panorama"


def twice(root):
    path = add(root, "zz.png", picture(image(root)), picture(mask(root)))
    return "duplicate", [path], "Remove one"


def leak(root):
    path = add(root, "zz.png", picture(image(root)), picture(mask(root)), "val")
    return "leak", [path], "Take them out of train or out of val"


def leak_saved_again(root):
    again = picture(image(root)).resize((150, 128), Image.BICUBIC)
    path = add(root, "zz.png", again, picture(mask(root)).resize((150, 128), 0), "val")
    again.save(path.with_suffix(".jpg"), quality=60)
    path.unlink()
    return "leak", [path.with_suffix(".jpg")], "Take them out of train"


def leak_mirrored(root):
    turn = Image.Transpose.FLIP_LEFT_RIGHT
    path = add(root, "zz.png", picture(image(root)).transpose(turn), picture(mask(root)).transpose(turn), "val")
    return "leak", [path], "Take them out of train"


def next_frame(root):
    """The same place a moment later: things have moved."""
    still = np.array(picture(image(root)))
    moved = still.copy()
    moved[30:62, 20:60] = still[34:66, 52:92]
    path = add(root, "zz.png", Image.fromarray(moved), picture(mask(root, 3)), "val")
    mask_path = root / "val/masks/zz.png"
    labels = np.array(picture(mask_path))
    labels[0, 0] = 1 - min(1, labels[0, 0])
    Image.fromarray(labels).save(mask_path)
    return "similar", [path], "whole videos"


def names_in_case(root):
    path = image(root)
    other = scene(9, 5, SIZE)
    more = add(
        root, path.name.upper().replace(".PNG", ".png"), Image.fromarray(other.image), Image.fromarray(other.mask)
    )
    return "name-case", [path, more], "Rename one"


def name_with_blank(root):
    other = scene(9, 5, SIZE)
    path = add(root, "my photo (1).png", Image.fromarray(other.image), Image.fromarray(other.mask))
    return "name-blank", [path], "Write _"


def untrained_class(root):
    for path in (root / "train/masks").iterdir():
        labels = np.array(picture(path))
        labels[labels == 3] = 0
        Image.fromarray(labels).save(path)
    return "class-untrained", ["star"], "Move samples"


def unused_class(root):
    (root / "classes.txt").write_text("\n".join([*CLASSES, "comet"]) + "\n")
    return "class-absent", ["comet"], "label order"


def double_class(root):
    (root / "classes.txt").write_text("\n".join([*CLASSES[:-1], "Sun"]) + "\n")
    return "class-names", ["'sun'", "'Sun'"], "Merge"


FOLDER = [
    *(
        without_mask,
        without_image,
        cut_png,
        damaged_png,
        wrong_checksum,
        empty_file,
        no_image,
        damaged_mask,
        other_size,
        turned,
    ),
    *(turned_upright, deep_image, deep_mask, transparent, cmyk, animated, strange_value, coloured_mask, jpeg_mask),
    *(
        shared_mask,
        ignored_mask,
        one_colour,
        thumbnail_size,
        strip,
        twice,
        leak,
        leak_saved_again,
        leak_mirrored,
        next_frame,
    ),
    *(names_in_case, name_with_blank, untrained_class, unused_class, double_class),
]


@pytest.fixture(scope="module")
def clean(originals):
    """What is worth noting in the sound data, by format."""
    made = {"folder": Folder, "voc": VOC, "cityscapes": Cityscapes}
    return {name: found(kind(root=str(originals[name]))) for name, kind in made.items()}


@pytest.mark.parametrize("fault", FOLDER, ids=lambda fault: fault.__name__)
def test_a_fault_of_a_folder_is_found_alone(fault, copy, clean):
    root = copy("folder")
    expected = fault(root)
    one = judge(fault.__name__, root, expected, found(Folder(root=str(root))), clean["folder"])
    assert one.severity == ("note" if fault in (strip, name_with_blank) else one.severity)
    if fault in (leak, leak_saved_again, leak_mirrored, without_mask, cut_png, strange_value):
        assert one.severity == "error"
    if fault is turned_upright:
        assert "fits the upright one" in one.places[0].detail


def test_two_files_of_one_name_stop_a_split(copy):
    root = copy("folder")
    picture(image(root)).save(image(root).with_suffix(".bmp"))
    one = found(Folder(root=str(root)))["named-alike"]
    assert one.severity == "error" and f"{image(root).name}" in one.what + one.fix


def test_a_mask_of_many_pictures(tmp_path):
    """A fixed camera: the same mask for all pictures; one with as many pixels elsewhere is another mask."""
    from seglight.data.files import FileDataset
    from seglight.doctor.look import look_at_pair
    from seglight.doctor.semantic import pair_findings

    generator, count = np.random.default_rng(0), 40
    labels = np.zeros((40, 48), np.uint8)
    labels[:20] = 1
    names = {kind: [tmp_path / f"{i}_{kind}.png" for i in range(count)] for kind in ("image", "mask")}
    for i in range(count):
        grey = np.full((40, 48, 3), 30 if i < 2 else generator.integers(60, 250), np.uint8)
        Image.fromarray(grey).save(names["image"][i])
        Image.fromarray(labels[::-1] if i == 5 else labels).save(names["mask"][i])
    data = FileDataset("camera", [str(i) for i in range(count)], names["image"], names["mask"])
    looks = [look_at_pair(data, i) for i in range(count)]
    found = {one.rule: one for one in pair_findings(data, "train", looks, ("a", "b"), str(tmp_path))}
    assert len(found["mask-shared"].places) == count - 1, "all but the one that is upside down"


# ---------------------------------------------------------------- VOC and Cityscapes


def jpeg(root, number=2):
    names = (root / "ImageSets/Segmentation/train.txt").read_text().split()
    return root / f"JPEGImages/{names[number]}.jpg"


def class_mask(root, number=2):
    return root / "SegmentationClass" / f"{jpeg(root, number).stem}.png"


def missing_file(root):
    jpeg(root).unlink()
    return "missing", [jpeg(root)], "Copy the dataset again"


def cut_jpeg(root):
    jpeg(root).write_bytes(jpeg(root).read_bytes()[:-500])
    return "truncated", [jpeg(root)], "Copy it again"


def damaged_jpeg(root):
    """Whole by its ends: only the decoder's murmur tells."""
    data = bytearray(jpeg(root).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    jpeg(root).write_bytes(data)
    return "damaged", [jpeg(root)], "copy it again"


def cut_palette_mask(root):
    data = class_mask(root).read_bytes()
    class_mask(root).write_bytes(data[: len(data) // 2])
    return "truncated", [class_mask(root)], "Copy it again"


def value_beyond(root):
    labels = np.array(picture(class_mask(root)))
    labels[:9, :9] = 21
    save_like(class_mask(root), labels)
    return "label-values", [class_mask(root)], "Name more classes"


def own_palette(root):
    labels = picture(class_mask(root))
    colours = np.array(labels.getpalette(), np.uint8)
    colours[:3] = 200, 10, 10
    labels.putpalette(colours.tobytes())
    labels.save(class_mask(root))
    return "palette-differs", [class_mask(root)], "data.colors"


@pytest.mark.parametrize(
    "fault",
    [missing_file, cut_jpeg, damaged_jpeg, cut_palette_mask, value_beyond, own_palette],
    ids=lambda fault: fault.__name__,
)
def test_a_fault_of_voc_is_found_alone(fault, copy, clean):
    root = copy("voc") / "VOCdevkit/VOC2012"
    expected = fault(root)
    judge(fault.__name__, root, expected, found(VOC(root=str(root)), workers=1), clean["voc"])


def test_lists_that_overlap(copy):
    root = copy("voc") / "VOCdevkit/VOC2012"
    with open(root / "ImageSets/Segmentation/val.txt", "a") as file:
        file.write(jpeg(root).stem + "\n")
    one = found(VOC(root=str(root)))["leak"]
    assert jpeg(root).stem in one.what and one.severity == "error"


def test_cityscapes(copy, clean):
    root = copy("cityscapes")
    path = sorted((root / "gtFine/train").rglob("*_labelIds.png"))[1]
    labels = np.array(picture(path))
    labels[:5, :5] = 60
    Image.fromarray(labels).save(path)
    judge(
        "label 60",
        root,
        ("label-values", [path], "labelIds are 0..33"),
        found(Cityscapes(root=str(root))),
        clean["cityscapes"],
    )
    path.unlink()
    one = found(Cityscapes(root=str(root)))["unpaired"]
    assert path.name.removesuffix("_gtFine_labelIds.png") in one.what


def test_one_folder_without_a_mask_is_no_leak(tmp_path):
    """What is kept for validation is cut out of it; it is not there twice."""
    generator = np.random.default_rng(0)
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for i in range(10):
        Image.fromarray(generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(tmp_path / f"images/{i}.png")
        Image.fromarray(generator.integers(0, 2, (60, 80), dtype=np.uint8)).save(tmp_path / f"masks/{i}.png")
    (tmp_path / "masks/7.png").unlink()
    findings = found(Folder(root=str(tmp_path)))
    assert {rule for rule, one in findings.items() if one.severity == "error"} == {"unpaired"}


def test_an_image_with_many_likes_is_one_image(copy):
    root = copy("folder")
    late = image(root, 0, "val")
    for number in range(3):
        shutil.copy(late, image(root, number))
    findings = [one for one in examine(Folder(root=str(root)), workers=0).findings if one.rule in ("leak", "duplicate")]
    assert {one.rule: len(one.places) for one in findings} == {"leak": 1, "duplicate": 2}
