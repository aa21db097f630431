"""Planted faults are found, each with its files and its remedy and nothing else; sound data is left in peace."""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seglight.data import formats
from seglight.data.cityscapes import Cityscapes, CityscapesInstances
from seglight.data.coco import COCO, COCOFormat
from seglight.data.folder import Folder
from seglight.data.scenes import CLASSES, scene
from seglight.data.voc import VOC, VOCInstances
from seglight.doctor import examine
from seglight.doctor.findings import Finding, Place, Report

SIZE = (96, 112)
SCENES = {"train": [*range(8), 11], "val": [*range(100, 106)]}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A small dataset in each format, written once."""
    home = tmp_path_factory.mktemp("originals")
    splits = {split: [scene(3, i, SIZE) for i in numbers] for split, numbers in SCENES.items()}
    made = {
        name: getattr(formats, f"write_{name}")(home / name, splits) for name in ("voc", "coco", "cityscapes", "folder")
    }
    for masks in ("palette", "rgb"):
        made[masks] = formats.write_folder(home / masks, splits, masks)
    return made


@pytest.fixture
def copy(originals, tmp_path):
    """A dataset of one's own to break."""
    return lambda name: Path(shutil.copytree(originals[name], tmp_path / name))


def found(source, **options):
    """Findings by rule, of all severities."""
    findings = {}
    for one in examine(source, **{"workers": 0, **options}).findings:
        assert one.rule not in findings, f"{one.rule} twice: {one.head} | {findings.get(one.rule)}"
        findings[one.rule] = one
    return findings


def alarms(findings):
    return {rule for rule, one in findings.items() if one.severity != "note"}


def picture(path):
    with Image.open(path) as image:
        return image.copy()


# ---------------------------------------------------------------- faults of a folder of images and masks


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


def judge(fault, root, expected, findings, clean):
    """One more finding than in the sound data, with these places and this remedy."""
    rules, places, fix = expected
    rules = {rules} if isinstance(rules, str) else rules
    extra = set(findings) - set(clean)
    assert len(extra) == 1 and extra <= rules, f"{fault}: {[one.head for one in findings.values()]}"
    one = findings[extra.pop()]
    names = {Path(str(place)).name for place in places}
    assert {Path(place.name).name for place in one.places} == names, f"{one.head} {one.places}"
    assert fix in one.fix, one.fix
    assert one.what.endswith(".") and one.head[0] != " "
    return one


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


def save_like(path, labels):
    before = picture(path)
    after = Image.fromarray(labels)
    after.putpalette(before.getpalette())
    after.save(path)


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


# ---------------------------------------------------------------- objects


def content(root, split="train"):
    return json.loads((root / f"annotations/instances_{split}2017.json").read_text())


def rewrite(root, change, split="train"):
    document = content(root, split)
    change(document)
    (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(document))


def module(root):
    files = [str(root / f"annotations/instances_{split}2017.json") for split in ("train", "val")]
    return COCOFormat(str(root / "train2017"), files[0], str(root / "val2017"), files[1])


def setting(where, number, **values):
    return lambda document: document[where][number].update(values)


def polygon(document):
    return next(one for one in document["annotations"] if not one["iscrowd"] and one["area"] > 150)


def of_polygon(**values):
    return lambda document: polygon(document).update(values)


def corners(document):
    for one in document["annotations"]:
        x, y, width, height = one["bbox"]
        one["bbox"] = [x, y, x + width, y + height]


def shares(document):
    sizes = {one["id"]: (one["width"], one["height"]) for one in document["images"]}
    document["annotations"] = [one for one in document["annotations"] if not one["iscrowd"]]
    for one in document["annotations"]:
        width, height = sizes[one["image_id"]]
        one["segmentation"] = [[v / (height if i % 2 else width) for i, v in enumerate(p)] for p in one["segmentation"]]
        one["bbox"] = [v / (height if i % 2 else width) for i, v in enumerate(one["bbox"])]


def repeat(document):
    document["annotations"].append({**polygon(document), "id": 999_999})


def empty_mask(document):
    one = polygon(document)
    x, y, _, _ = one["bbox"]
    one["segmentation"] = [[x, y, x + 0.1, y, x + 0.1, y + 0.1]]


def odd_rle(document):
    polygon(document)["segmentation"] = {"size": list(SIZE), "counts": [5, 10, 96 * 112]}


def drop_image(document):
    document["images"] = [one for one in document["images"] if one["id"] != polygon(document)["image_id"]]


def tiny_object(document):
    one = polygon(document)
    x, y, _, _ = one["bbox"]
    one.update(bbox=[x, y, 3, 3], area=9, segmentation=[[x, y, x + 3, y, x + 3, y + 3, x, y + 3]])


def category_zero(document):
    first = document["categories"][0]
    for one in document["annotations"]:
        one["category_id"] = 0 if one["category_id"] == first["id"] else one["category_id"]
    first["id"] = 0


def same_class(document):
    document["categories"][1]["name"] = document["categories"][0]["name"].upper()


OBJECTS = {
    "box outside": (of_polygon(bbox=[500, 500, 20, 20]), "box-outside", "error", "x, y, width, height|in pixels"),
    "box without height": (lambda d: polygon(d)["bbox"].__setitem__(3, 0), "box-empty", "error", ""),
    "box elsewhere": (lambda d: polygon(d).update(bbox=[0, 0, 9, 9]), "box-outline", "warning", "leave bbox out"),
    "corners": (corners, "box-corners", "error", "x2 - x1"),
    "shares": (shares, "shares", "error", "Multiply x by the width"),
    "area": (of_polygon(area=4000.0), "area-outline", "warning", "Leave 'area' out"),
    "no area": (of_polygon(area=0), "area", "error", ""),
    "mask without a pixel": (empty_mask, "mask-empty", "error", "draw it larger"),
    "two points": (of_polygon(segmentation=[[1, 1, 5, 5]]), "polygon", "error", "Remove the part"),
    "no outline": (of_polygon(segmentation=[]), "polygon", "error", "outline"),
    "odd run lengths": (odd_rle, "rle", "error", ""),
    "not a number": (of_polygon(area=float("nan")), "not-finite", "error", ""),
    "unknown category": (of_polygon(category_id=77), "category-unlisted", "error", "Add it to 'categories'"),
    "unknown image": (drop_image, "image-unlisted", "error", "Add the image"),
    "image id twice": (
        lambda d: d["images"].append({**d["images"][1], "file_name": "other.jpg"}),
        "image-id-twice",
        "error",
        "id of its own",
    ),
    "annotation id twice": (setting("annotations", 1, id=9000), "annotation-id-twice", "error", "id of its own"),
    "annotation 0": (of_polygon(id=0), "annotation-id-0", "warning", "from 1"),
    "category 0": (category_zero, "category-id-0", "note", "from 1"),
    "object twice": (repeat, "object-twice", "warning", "Remove the copies"),
    "tiny": (tiny_object, "tiny", "note", "larger size"),
    "class in capitals": (same_class, "class-names", "warning", "Merge"),
    "size in the json": (lambda d: d["images"][1].update(width=60, height=50), "image-size", "error", "were annotated"),
    "listed wrongly": (lambda d: d["images"][1].update(file_name="absent.jpg"), "missing", "error", "Copy the images"),
}


@pytest.fixture(scope="module")
def sound_objects(originals):
    return found(module(originals["coco"]))


@pytest.mark.parametrize("name", OBJECTS)
def test_a_fault_of_objects_is_found_alone(name, copy, sound_objects):
    change, rule, severity, fix = OBJECTS[name]
    root = copy("coco")
    before = content(root)
    if name in ("category 0", "class in capitals"):
        rewrite(root, change, "val")
    rewrite(root, change)
    after = content(root)
    try:
        findings = found(module(root))
    except ValueError:
        findings = found(str(root / "annotations/instances_train2017.json"))
    follows = {"image-not-listed", "no-object", "class-untrained", "class-unjudged", "class-absent", "box-outside"} - {
        rule
    }
    extra = set(findings) - set(sound_objects) - follows
    assert extra == {rule}, [one.head for one in findings.values()]
    one = findings[rule]
    assert one.severity == severity and all(part in one.fix for part in fix.split("|")), one.fix
    changed = {
        str(new["id"]) for old, new in zip(before["annotations"], after["annotations"], strict=False) if old != new
    }
    if name in ("box outside", "area", "two points", "annotation 0", "mask without a pixel", "not a number"):
        assert len(one.places) == 1 and changed <= set(str(one.places[0]).split()) | {"0"}


def test_json_files_that_are_none(copy):
    root = copy("coco")
    file = root / "annotations/instances_train2017.json"
    rewrite(root, lambda document: document.pop("categories"))
    assert "categories" in found(str(file))["json"].what
    file.write_text('{"images": [')
    assert "json" in found(str(file))
    file.write_text("[1, 2]")
    assert alarms(found(str(file))) == {"json"}


def test_a_json_without_its_images(copy):
    root = copy("coco")
    shutil.rmtree(root / "train2017")
    findings = found(str(root / "annotations/instances_train2017.json"))
    assert alarms(findings) == set() and "no-images" in findings


def test_broken_pictures_of_objects(copy, sound_objects):
    root = copy("coco")
    path = sorted((root / "train2017").iterdir())[3]
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    path.write_bytes(data)
    shutil.copy(
        sorted((root / "train2017").iterdir())[1], root / "val2017" / sorted((root / "val2017").iterdir())[0].name
    )
    findings = found(module(root), workers=1)
    assert alarms(findings) == {"damaged", "leak"}
    assert [Path(place.name).name for place in findings["damaged"].places] == [path.name]


def test_dropping_makes_notes_of_degenerate_objects(copy, sound_objects):
    root = copy("coco")
    rewrite(root, of_polygon(bbox=[500, 500, 20, 20]))
    found_ = found(COCO(root=str(root)))
    assert found_["box-outside"].severity == "note" and not alarms(found_)


# ---------------------------------------------------------------- masks that nobody has described


def relabelled(copy, name, change):
    """A folder without classes.txt whose masks are changed."""
    root = copy(name)
    (root / "classes.txt").unlink()
    for path in root.glob("*/masks/*"):
        change(path)
    return root


def mapped(change):
    def rewrite(path):
        Image.fromarray(change(np.array(picture(path))).astype(np.uint8)).save(path)

    return rewrite


def smoothed(labels):
    big = np.where((labels > 0) & (labels < 255), 255, 0).astype(np.uint8)
    return np.array(Image.fromarray(big).resize((224, 192), 0).resize((112, 96), Image.BICUBIC))


FOUND = {
    "0 and 255": (
        lambda v: np.where((v > 0) & (v < 255), 255, 0),
        "binary-mask",
        "data.values: {0: background, 255: object}",
    ),
    "from 1": (lambda v: np.where(v == 255, 1, v + 1), "label-values", "data.values: {1: class_1, 2: class_2"),
    "gaps": (lambda v: np.where(v == 255, 0, v * 10), "label-values", "10: class_10, 20: class_20"),
    "labels": (lambda v: v, "no-classes", "data.classes: [background, class_1"),
    "smooth": (smoothed, "mask-smooth", ""),
}


@pytest.mark.parametrize("name", FOUND)
def test_values_are_explained(name, copy):
    change, rule, block = FOUND[name]
    root = relabelled(copy, "folder", mapped(change))
    findings = found(str(root))
    assert alarms(findings) == {rule}, [one.head for one in findings.values()]
    one = findings[rule]
    words = {"0 and 255": "255 for the object", "from 1": "start at 1", "gaps": "gaps", "smooth": "without smoothing"}
    assert words.get(name, "names") in one.fix
    assert block in one.block and one.splits == ("train", "val") and len(one.places) == 15


def test_the_suggested_lines_work(copy):
    """What the doctor says, done: the dataset is sound."""
    import yaml

    for name, kind in (("folder", FOUND["0 and 255"][0]), ("rgb", None)):
        root = relabelled(copy, name, mapped(kind) if kind else lambda path: None)
        one = next(one for one in found(str(root)).values() if one.severity == "error")
        options = {key.removeprefix("data."): value for key, value in yaml.safe_load(one.block).items()}
        assert not alarms(found(Folder(root=str(root), **options)))


def test_a_palette_shows_its_colours(copy):
    one = found(str(relabelled(copy, "palette", lambda path: None)))["no-classes"]
    assert "  1: class_1  # 226, 74, 51" in one.block


def test_colours_become_a_map(copy):
    one = found(str(relabelled(copy, "rgb", lambda path: None)))["mask-colours"]
    assert "[226, 74, 51]" in one.block and "void: [224, 224, 192]" in one.block and "data.ignore: [void]" in one.block
    assert one.block.count("\n") == 10


def test_grey_saved_as_rgb(copy):
    root = relabelled(copy, "folder", lambda path: picture(path).convert("RGB").save(path))
    one = found(str(root))["mask-colours"]
    assert "grey, saved as RGB" in one.what and "getchannel(0)" in one.fix and "data.classes" in one.block


def test_mask_suffixes_and_other_folder_names(copy):
    root = copy("folder")
    (root / "classes.txt").unlink()
    for split in ("train", "val"):
        (root / split / "images").rename(root / split / "JPEGImages")
        (root / split / "masks").rename(root / split / "gt")
        for path in (root / split / "gt").iterdir():
            path.rename(path.with_name(f"{path.stem}_seg.png"))
    findings = found(str(root))
    assert findings["mask-suffix"].block == "data.mask_suffix: '_seg'" and alarms(findings) == {"no-classes"}


def test_an_experiment_with_a_typo(copy, tmp_path):
    root = copy("folder")
    file = tmp_path / "mine.yaml"
    file.write_text(f"data:\n  class_path: Folder\n  init_args:\n    root: {root}\n    croop: 3\n")
    findings = found(str(file))
    assert alarms(findings) == {"experiment"} and "croop" in findings["experiment"].what + findings["experiment"].fix


# ---------------------------------------------------------------- sound data


@pytest.mark.parametrize("name", ["voc", "coco", "cityscapes", "folder", "palette"])
def test_sound_data_gives_no_alarm(name, originals):
    assert not alarms(found(str(originals[name])))


def test_colours_with_their_map_give_no_alarm(originals):
    from seglight.data.formats.folder import VOID_COLOUR
    from seglight.data.scenes import PALETTE

    colors = {**{name: list(c) for name, c in zip(CLASSES, PALETTE, strict=True)}, "void": list(VOID_COLOUR)}
    assert not alarms(found(Folder(root=str(originals["rgb"]), colors=colors, ignore=["void"])))


def test_objects_of_maps_and_generated_scenes(originals, copy):
    for kind, name in ((VOCInstances, "voc"), (CityscapesInstances, "cityscapes")):
        assert not alarms(found(kind(root=str(originals[name]))))
    root = copy("voc") / "VOCdevkit/VOC2012"
    path = next(path for path in sorted((root / "SegmentationObject").iterdir()) if picture(path).getextrema()[1] > 0)
    labels = np.array(picture(root / "SegmentationClass" / path.name))
    labels[labels != 255] = 0
    save_like(root / "SegmentationClass" / path.name, labels)
    findings = found(VOCInstances(root=str(root)))
    assert any("lies on background" in one.what for one in findings.values())


def test_nothing_is_changed(originals):
    def state(root):
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}

    before = state(originals["folder"])
    found(str(originals["folder"]), workers=2)
    assert state(originals["folder"]) == before


# ---------------------------------------------------------------- what is shown


def test_the_screen_has_room_for_the_worst():
    from rich.console import Console

    from seglight.doctor.findings import worst_first
    from seglight.doctor.report import LINES, show

    kinds = ("note", "error", "warning")
    places = tuple(Place(f"a/long/path/to/{'x' * 40}_{i}.png") for i in range(30))
    words = "wrong in some way that takes a good many words to tell, so that it never fits into a single line."
    for count in (0, 1, 5, 12, 90):
        findings = [
            Finding(kinds[i % 3], f"rule-{i}", f"{i} {words}", words, places, block="\n".join("abcdefghijk"))
            for i in range(count)
        ]
        report = Report("data", "Folder", "data", ("a", "b"), {"train": 9}, worst_first(findings))
        for width in (80, 120, 200):
            with open(os.devnull, "w") as nowhere:
                console = Console(width=width, record=True, file=nowhere)
                show(report, console)
            lines = console.export_text().splitlines()
            marks = [line[0] for line in lines if line[:2] in ("✗ ", "! ", "· ")]
            assert len(lines) <= LINES and marks == sorted(marks, key="✗!·".index)
            assert (count > 1) == ("✗" in marks) and ("nothing wrong" in lines[1]) == (not count)
            left = [
                int(n) for line in lines if "--html" in line for n in re.findall(r"(\d+) (?:error|warn|note)", line)
            ]
            assert len(marks) + sum(left) == count


def test_the_command(copy, capsys, tmp_path):
    from seglight.cli.data_check import configure, run

    def check(*argv):
        parser = argparse.ArgumentParser()
        configure(parser)
        options, rest = parser.parse_known_args(["--workers", "1", *map(str, argv)])
        options.overrides = rest
        return run(options), capsys.readouterr().out

    root = copy("folder")
    status, text = check(root)
    assert status == 0 and "9 in train and 6 in val" in text
    unused_class(root)
    assert check(root)[0] == 0 and check(root, "--strict")[0] == 1
    cut_png(root)
    status, text = check(
        root, "--json", tmp_path / "out/found.json", "--html", tmp_path / "out/found.html", "--split", "train"
    )
    assert status == 1 and "truncated" in text and "in val" not in text
    told = json.loads((tmp_path / "out/found.json").read_text())
    assert told["errors"] == 1 and told["samples"] == {"train": 9} and told["findings"][0]["rule"] == "truncated"
    assert told["findings"][0]["where"] == ["images/scene_0002.png"] or "scene_0002" in told["findings"][0]["where"][0]
    page = (tmp_path / "out/found.html").read_text()
    assert "data:image/" in page and "http" not in page.replace("http://www.w3", "") and "scene_0002.png" in page
    status, text = check(root, "--json", "-")
    assert json.loads(text)["findings"] and status == 1
    with pytest.raises(ValueError, match="There is no"):
        check(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least 1"):
        check(root, "--workers", 0)


# ---------------------------------------------------------------- real data


@pytest.mark.slow
@pytest.mark.parametrize("name", ["voc2012", "camvid", "isbi2012", "coco", "nuclei", "fruitsnuts", "cocoapi_eval"])
def test_real_data_give_no_false_alarm(name, real_data):
    findings = found(str(real_data / name), workers=2)
    expected = {"nuclei": {"area-outline"}}  # annotation 1382: a hole that its polygon fills
    assert alarms(findings) == expected.get(name, set())
