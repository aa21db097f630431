"""Planted faults of COCO's format are found, each alone and with its remedy."""

import json
import shutil
from pathlib import Path

import pytest
from clinic import SIZE, alarms, found

from seglight.data.coco import COCO, COCOFormat


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
