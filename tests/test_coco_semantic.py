"""Pixel labels from COCO's instances: the rules of the papers' pre-training, against an implementation of their own."""

import json

import numpy as np
import pytest
from PIL import Image

from seglight.data.coco import COCO
from seglight.data.coco_names import THINGS
from seglight.data.coco_semantic import VOC_NAMES, COCOSemantic
from seglight.data.findings import DataError
from seglight.data.formats import write_coco, write_cocostuff
from seglight.data.formats.outlines import rle
from seglight.data.scenes import split_scenes
from seglight.data.voc import VOC

# Category ids of the reference's list, in the order of VOC's labels (torchvision, references/segmentation).
REFERENCE = (0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
SIZE = (60, 80)


def square(left, top, right, bottom, category, crowd=False, area=None):
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    outline = [[left, top, right, top, right, bottom, left, bottom]]
    return {
        "category_id": category,
        "segmentation": rle(mask) if crowd else outline,
        "area": float(mask.sum() if area is None else area),
        "bbox": [left, top, right - left, bottom - top],
        "iscrowd": int(crowd),
    }


def write(root, splits, categories=None):
    """Images by split, each with its annotations."""
    categories = categories or [{"id": number, "name": name} for number, name in THINGS.items()]
    for k, (split, images) in enumerate(splits.items()):
        document = {"images": [], "annotations": [], "categories": categories}
        (root / f"{split}2017").mkdir(parents=True)
        for number, found in enumerate(images, start=1 + 100 * k):
            name = f"{number:012d}.jpg"
            Image.new("RGB", SIZE[::-1]).save(root / f"{split}2017/{name}")
            document["images"].append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
            for one in found:
                document["annotations"].append({"id": len(document["annotations"]) + 1, "image_id": number, **one})
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(document))
    return root


def reference(objects, ids, size):
    """Label map of (category id, dense mask) pairs: the largest label where one object is, 255 where several are."""
    drawn = [(ids.index(category), mask) for category, mask in objects if category in ids]
    if not drawn:
        return np.zeros(size, np.uint8)
    stack = np.stack([mask.astype(np.uint8) * label for label, mask in drawn])
    return np.where((stack > 0).sum(0) > 1, 255, stack.max(0)).astype(np.uint8)


@pytest.mark.fidelity
def test_classes_are_those_of_voc():
    number = {name: key for key, name in THINGS.items()}
    names = {voc: coco for coco, voc in VOC_NAMES.items()}
    assert (0, *(number[names[name]] for name in VOC.classes[1:])) == REFERENCE
    assert len(THINGS) == 80 and max(THINGS) == 90
    assert set(range(1, 91)) - set(THINGS) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    splits = {"train": split_scenes("train", 12, 0, (64, 72)), "val": split_scenes("val", 3, 0, (64, 72))}
    splits["test"] = split_scenes("test", 2, 0, (64, 72))
    return write_cocostuff(tmp_path_factory.mktemp("coco") / "out", splits)


@pytest.mark.fidelity
@pytest.mark.parametrize("classes", ["voc", "coco"])
def test_labels_follow_the_reference(scenes, classes):
    module = COCOSemantic(root=str(scenes), classes=classes, min_pixels=0)
    ids = list(REFERENCE) if classes == "voc" else [0, *THINGS]
    assert module.num_classes == len(ids) and len(module.palette) == len(ids)
    objects = COCO(root=str(scenes))
    seen = set()
    for split, count in (("train", 12), ("val", 3)):
        data, truth = module.dataset(split), objects.dataset(split)
        data.check(module.num_classes)
        assert len(data) == count and list(data.ids) == list(truth.ids)
        for i in range(count):
            found = truth.objects(i)
            dense = np.array([_dense(one, truth.size(i)) for one in found.rles(truth.size(i))])
            categories = [objects.category_ids[label] for label in found.labels]
            image, mask = data.read(i)
            assert image.shape == (*mask.shape, 3) and mask.dtype == np.uint8
            assert np.array_equal(mask, reference(list(zip(categories, dense, strict=True)), ids, mask.shape))
            seen |= set(np.unique(mask).tolist())
    assert seen == ({0, 7, 15, 19} if classes == "voc" else {0, 1, 3, 7, 12, 25, 80})


def _dense(one, size):
    from pycocotools import mask as coco

    return coco.decode({"size": list(size), "counts": one["counts"]}).astype(bool)


def test_overlaps_crowds_and_other_classes(tmp_path):
    cat, dog, zebra = 17, 18, 24
    found = [
        square(0, 0, 40, 40, cat),
        square(20, 20, 50, 50, dog),
        square(10, 10, 15, 15, zebra),
        square(60, 0, 80, 30, dog, crowd=True),
        square(70, 10, 80, 20, cat),
        square(0, 50, 10, 60, cat),
        square(5, 50, 15, 60, cat),
    ]
    root = write(tmp_path / "coco", {"train": [found], "val": [[]]})
    label = {name: VOC.classes.index(name) for name in ("cat", "dog")}

    def drawn(**options):
        return COCOSemantic(root=str(root), **options).dataset("train").values(0)

    expected = np.zeros(SIZE, np.uint8)
    expected[:40, :40], expected[20:50, 20:50] = label["cat"], label["dog"]
    expected[20:40, 20:40] = 255
    expected[:30, 60:], expected[10:20, 70:] = label["dog"], 255
    expected[50:, :15], expected[50:, 5:10] = label["cat"], 255
    assert np.array_equal(drawn(), expected)

    smaller = expected.copy()
    smaller[20:40, 20:40], smaller[10:20, 70:], smaller[50:, 5:10] = label["dog"], label["cat"], label["cat"]
    assert np.array_equal(drawn(overlaps="smaller"), smaller)

    nobody = expected.copy()
    nobody[:30, 60:], nobody[10:20, 70:] = 255, label["cat"]
    assert np.array_equal(drawn(crowds="ignore"), nobody)
    both = smaller.copy()
    both[:30, 60:], both[10:20, 70:] = 255, label["cat"]
    assert np.array_equal(drawn(crowds="ignore", overlaps="smaller"), both)

    everything = drawn(classes="coco")
    assert everything[12, 12] == 255 and everything[0, 0] == 1 + sorted(THINGS).index(cat)


def test_training_leaves_out_images_with_few_pixels(tmp_path):
    cat, zebra = 17, 24
    images = [
        [square(0, 0, 40, 25, cat)],  # 1000: not more than 1000
        [square(0, 0, 40, 25, cat), square(50, 50, 51, 51, 18)],
        [square(0, 0, 60, 50, zebra)],
        [],
        [square(0, 0, 40, 40, cat, crowd=True)],
        [square(0, 0, 9, 9, cat, area=1001)],  # the area that is annotated counts
    ]
    root = write(tmp_path / "coco", {"train": images, "val": images})
    module = COCOSemantic(root=str(root))
    assert list(module.dataset("train").ids) == ["2", "5", "6"] and len(module.dataset("val")) == 6
    assert module.dataset("train").fingerprint()["with_few_pixels"] == 3
    kept = COCOSemantic(root=str(root), classes="coco").dataset("train").ids
    assert list(kept) == ["2", "3", "5", "6"]
    assert len(COCOSemantic(root=str(root), min_pixels=0).dataset("train")) == 6
    with pytest.raises(DataError, match=r"none of 6 images has more than 9000 pixels.*data\.min_pixels"):
        COCOSemantic(root=str(root), min_pixels=9000).dataset("train")


def test_the_test_images_have_no_labels(scenes):
    assert "annotations" not in json.loads((scenes / "annotations/image_info_test-dev2017.json").read_text())
    module = COCOSemantic(root=str(scenes), test_split="test-dev2017")
    data = module.dataset("test")
    data.check(module.num_classes)
    assert len(data) == 2 and all((data.read(i)[1] == 255).all() for i in range(2))
    objects = COCO(root=str(scenes), test_split="test-dev2017")
    found = objects.dataset("test")
    found.check(80)
    assert [len(found.objects(i)) for i in range(2)] == [0, 0] and found.image(1).shape == (64, 72, 3)
    objects.workers = 0
    batch = next(iter(objects.test_dataloader()))
    assert batch["target"][0]["boxes"].shape == (0, 4) and batch["image_id"] == [data.ids[0]]


def test_training_files_need_annotations(scenes, tmp_path):
    document = json.loads((scenes / "annotations/instances_train2017.json").read_text())
    del document["annotations"]
    root = write(tmp_path / "coco", {"train": [[]], "val": [[]]})
    (root / "annotations/instances_train2017.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="has no annotations, so it is no COCO instance file"):
        COCO(root=str(root)).dataset("train")


def test_what_is_refused(tmp_path, scenes):
    root = write_coco(tmp_path / "own", {s: split_scenes(s, 1, 0, (64, 72)) for s in ("train", "val")})
    with pytest.raises(DataError, match=r"does not list airplane.*and 10 more.*data\.classes: coco"):
        COCOSemantic(root=str(root))
    module = COCOSemantic(root=str(root), classes="coco", min_pixels=0)
    assert module.classes == ("background", "square", "triangle", "star", "ring", "sun", "moon")
    for option, value in (("classes", "voc2012"), ("overlaps", "last"), ("crowds", "drop"), ("min_pixels", -1)):
        with pytest.raises(ValueError, match=rf"data\.{option} is"):
            COCOSemantic(root=str(scenes), **{option: value})
    with pytest.raises(DataError, match="cannot be trained and judged on"):
        COCOSemantic(root=str(scenes), val_split="train2017")


@pytest.mark.parametrize("check", [True, False])
def test_images_are_looked_at_as_coco_does(tmp_path, check):
    write_cocostuff(
        tmp_path, {"train": list(split_scenes("train", 3, 0, SIZE)), "val": split_scenes("val", 1, 0, SIZE)}
    )
    next((tmp_path / "train2017").glob("*.jpg")).write_bytes(b"broken")
    for kind, options in ((COCO, {}), (COCOSemantic, {"min_pixels": 0})):
        assert len(kind(str(tmp_path), check=check, **options).dataset("train")) == 3 - check


def test_the_fingerprint_knows_the_rules(scenes):
    options = ({}, {"overlaps": "smaller"}, {"crowds": "ignore"}, {"min_pixels": 10})
    modules = [COCOSemantic(root=str(scenes), **{"min_pixels": 20, **one}) for one in options]
    prints = [json.dumps(module.dataset("train").fingerprint()) for module in modules]
    assert len(set(prints)) == 4


@pytest.mark.fidelity
def test_real_images_follow_the_reference(real_data):
    from pycocotools.coco import COCO as Official

    for classes in ("voc", "coco"):
        module = COCOSemantic(root=str(real_data / "coco"), classes=classes)
        ids = list(REFERENCE) if classes == "voc" else [0, *THINGS]
        for split in ("train", "val"):
            data = module.dataset(split)
            data.check(module.num_classes)
            truth = Official(real_data / f"coco/annotations/instances_{split}2017.json")
            areas = dict.fromkeys(truth.getImgIds(), 0.0)
            for one in truth.anns.values():
                areas[one["image_id"]] += one["area"] * (one["category_id"] in ids)
            assert set(map(int, data.ids)) == {i for i, area in areas.items() if split == "val" or area > 1000}
            for i in range(0, len(data), 5):
                found = truth.loadAnns(truth.getAnnIds(imgIds=int(data.ids[i])))
                pairs = [(one["category_id"], truth.annToMask(one)) for one in found]
                image, mask = data.read(i)
                assert np.array_equal(mask, reference(pairs, ids, image.shape[:2]))
