"""What the writers write, read back by other means than the ones that wrote it."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from seglight.cli.data import main
from seglight.cli.data_sample import FORMATS
from seglight.data import formats
from seglight.data.formats.outlines import outline, pieces, rle
from seglight.data.scenes import CLASSES, MOON, PALETTE, RING, SQUARE, STAR, SUN, THINGS, TRIANGLE, VOID, WIRE, scene

SIZE = (90, 110)
WRITERS = (
    *(formats.write_voc, formats.write_coco, formats.write_cityscapes, formats.write_context, formats.write_folder),
    *(formats.write_sbd, formats.write_context_json, formats.write_isbi),
)


@pytest.fixture(scope="module")
def splits():
    """Twelve scenes to train on, the last without objects, and three to validate on."""
    return {"train": [scene(0, i, SIZE) for i in range(12)], "val": [scene(0, i, SIZE) for i in (100, 101, 102)]}


def all_scenes(splits):
    return [*splits["train"], *splits["val"]]


def similar(path, image):
    """Whether a JPEG file shows an image."""
    with Image.open(path) as file:
        assert (file.format, file.mode) == ("JPEG", "RGB")
        return np.abs(np.array(file).astype(int) - image).mean() < 8


# ---------------------------------------------------------------- one format after another


def test_voc(tmp_path, splits):
    root = formats.write_voc(tmp_path / "out", splits) / "VOCdevkit/VOC2012"
    lists = {name: (root / f"ImageSets/Segmentation/{name}.txt").read_text().split() for name in (*splits, "trainval")}
    assert [len(lists[name]) for name in ("train", "val", "trainval")] == [12, 3, 15]
    assert sorted(lists["train"] + lists["val"]) == lists["trainval"]
    assert lists["train"][0] == "2007_000032"
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 4: (0, 0, 128), 7: (128, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    for name, one in zip(lists["train"] + lists["val"], all_scenes(splits), strict=True):
        assert re.fullmatch(r"20(07|08|09|10|11)_\d{6}", name)
        assert similar(root / f"JPEGImages/{name}.jpg", one.image)
        mask, objects = (Image.open(root / f"Segmentation{kind}/{name}.png") for kind in ("Class", "Object"))
        assert mask.mode == objects.mode == "P"
        for image in (mask, objects):
            palette = image.getpalette()
            assert {label: tuple(palette[3 * label : 3 * label + 3]) for label in colours} == colours
        mask, objects = np.array(mask), np.array(objects)
        assert np.array_equal(mask, one.mask)
        assert np.array_equal(objects == 255, mask == 255)
        assert np.array_equal(objects == 0, mask == 0)
        for number, thing in enumerate(one.objects, start=1):
            assert set(mask[objects == number]) == {thing.label}


def test_coco(tmp_path, splits):
    out = formats.write_coco(tmp_path / "out", splits)
    ids, crowds, empty, many = set(), 0, 0, 0
    for split, scenes in splits.items():
        document = json.loads((out / f"annotations/instances_{split}2017.json").read_text())
        names = {category["id"]: category["name"] for category in document["categories"]}
        assert set(names.values()) == {CLASSES[label] for label in THINGS}
        assert sorted(names) != list(range(1, 7)), "ids without gaps"
        assert len(document["images"]) == len(scenes)
        for entry, one in zip(document["images"], scenes, strict=True):
            assert re.fullmatch(r"\d{12}\.jpg", entry["file_name"])
            assert int(entry["file_name"][:12]) == entry["id"]
            assert (entry["height"], entry["width"]) == SIZE
            assert similar(out / f"{split}2017" / entry["file_name"], one.image)
            ids.add(entry["id"])
            annotations = [a for a in document["annotations"] if a["image_id"] == entry["id"]]
            assert len(annotations) == len(one.objects)
            empty += not annotations
            for annotation, thing, mask in zip(annotations, one.objects, one.object_masks(), strict=True):
                assert names[annotation["category_id"]] == CLASSES[thing.label]
                x, y, w, h = annotation["bbox"]
                assert (x, y, x + w, y + h) == thing.box
                assert annotation["area"] == mask.sum()
                assert annotation["iscrowd"] == thing.crowd
                outline = annotation["segmentation"]
                if thing.crowd:
                    crowds += 1
                    assert outline["size"] == list(SIZE)
                    runs = [np.full(n, k % 2) for k, n in enumerate(outline["counts"])]
                    drawn = np.concatenate(runs).reshape(SIZE[::-1]).T.astype(bool)
                else:
                    many += len(outline) > 1
                    drawn = np.any([inside(polygon) for polygon in outline], axis=0)
                    assert sum(map(area, outline)) == annotation["area"]
                assert np.array_equal(drawn, mask)
    assert len(ids) == 15
    assert (crowds > 0, empty > 0, many > 0) == (True, True, True)
    annotation_ids = [a["id"] for a in document["annotations"]]
    assert len(set(annotation_ids)) == len(annotation_ids)


def inside(polygon):
    """Pixels whose centre lies in a polygon: an odd number of sides is crossed on the way left."""
    xs, ys = np.array(polygon[::2]), np.array(polygon[1::2])
    px, py = np.arange(SIZE[1]) + 0.5, np.arange(SIZE[0]) + 0.5
    crossings = np.zeros(SIZE, int)
    for x1, y1, x2, y2 in zip(xs, ys, np.roll(xs, -1), np.roll(ys, -1), strict=True):
        if x1 == x2:  # sides are upright or level
            crossings += np.outer((min(y1, y2) < py) & (py < max(y1, y2)), px > x1)
        else:
            assert y1 == y2
    return crossings % 2 == 1


def area(polygon):
    x, y = np.array(polygon[::2]), np.array(polygon[1::2])
    return abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


# pycocotools 2.0.11 has not followed numpy 2 yet
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_coco_as_the_official_tool_reads_it(tmp_path, splits):
    coco = pytest.importorskip("pycocotools.coco")
    out = formats.write_coco(tmp_path / "out", splits)
    for split, scenes in splits.items():
        data = coco.COCO(out / f"annotations/instances_{split}2017.json")
        for image_id, one in zip(data.getImgIds(), scenes, strict=True):
            masks = [data.annToMask(a) for a in data.loadAnns(data.getAnnIds(imgIds=image_id))]
            assert np.array_equal(np.array(masks, bool).reshape(-1, *SIZE), one.object_masks())


def test_run_lengths_begin_with_what_is_off():
    assert rle(np.array([[True, False], [True, True]])) == {"counts": [0, 2, 1, 1], "size": [2, 2]}
    assert rle(np.array([[False, True], [True, True]])) == {"counts": [1, 3], "size": [2, 2]}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_outlines_of_awkward_shapes():
    pytest.importorskip("pycocotools")
    from pycocotools import mask as tool

    pictures = [
        ["#"],
        ["#.#", ".#.", "#.#"],
        ["####", "#..#", "#.##", "####"],
        ["#####", "#.#.#", "#####", "#.#.#", "#####"],
        [".#.", "#.#", ".#."],
        ["#######", "#.....#", "#.###.#", "#.#.#.#", "#.###.#", "#.....#", "#######"],
    ]
    for picture in pictures:
        mask = np.array([[c == "#" for c in line] for line in picture])
        polygons = [outline(piece) for piece in pieces(mask)]
        drawn = tool.decode(tool.merge(tool.frPyObjects(polygons, *mask.shape)))
        assert np.array_equal(drawn, mask)
        assert sum(map(area, polygons)) == mask.sum()


def test_cityscapes(tmp_path, splits):
    out = formats.write_cityscapes(tmp_path / "out", splits)
    numbers = {0: 23, SQUARE: 26, TRIANGLE: 24, STAR: 25, RING: 33, WIRE: 17, SUN: 27, MOON: 28, VOID: 0}
    names = {23: "sky", 26: "car", 24: "person", 25: "rider", 33: "bicycle", 17: "pole", 27: "truck", 28: "bus"}
    found = {split: sorted((out / f"leftImg8bit/{split}").glob("*/*")) for split in splits}
    assert {path.parent.name for path in found["train"]} == {"aachen", "zurich"}
    assert {path.parent.name for path in found["val"]} <= {"frankfurt", "lindau"}
    for path in found["train"] + found["val"]:
        stem = path.name.removesuffix("_leftImg8bit.png")
        city, number, _ = re.fullmatch(r"([a-z]+)_(\d{6})_(\d{6})", stem).groups()
        assert city == path.parent.name
        one = all_scenes(splits)[int(number)]
        assert np.array_equal(np.array(Image.open(path)), one.image)
        labels = str(out / "gtFine" / path.parent.relative_to(out / "leftImg8bit") / f"{stem}_gtFine")
        ids, instances, colour = (Image.open(f"{labels}_{kind}.png") for kind in ("labelIds", "instanceIds", "color"))
        assert (ids.mode, instances.mode, colour.mode) == ("L", "I;16", "RGBA")
        ids, instances, colour = np.array(ids), np.array(instances).astype(int), np.array(colour)
        assert np.array_equal(ids, np.vectorize(numbers.get)(one.mask))
        assert np.array_equal(np.where(instances < 1000, instances, instances // 1000), ids)
        if (ids == 26).any():
            assert set(map(tuple, colour[ids == 26].tolist())) == {(0, 0, 142, 255)}
        for k, thing in enumerate(one.objects, start=1):
            values = set(instances[(one.instances == k) & (one.mask != VOID)].tolist())
            assert len(values) == 1
            assert (min(values) < 1000) == thing.crowd
        things = [thing for thing in one.objects if not thing.crowd]
        assert len(set(instances[instances >= 1000].tolist())) == len(things)

        polygons = json.loads(Path(f"{labels}_polygons.json").read_text())
        assert (polygons["imgHeight"], polygons["imgWidth"]) == SIZE
        drawn = np.zeros(SIZE, np.uint8)
        values = {name: value for value, name in names.items()}
        for shape in polygons["objects"]:  # corners are pixels, and belong to the polygon
            cv2.fillPoly(drawn, [np.array(shape["polygon"])], values[shape["label"].removesuffix("group")])
        assert np.array_equal(drawn, ids)
    assert any(shape["label"] == "sky" for shape in polygons["objects"])


def test_context(tmp_path, splits):
    out = formats.write_context(tmp_path / "out", splits)
    root = out / "VOCdevkit/VOC2010"
    lists = {split: (root / f"ImageSets/Main/{split}.txt").read_text().split() for split in splits}
    names = dict(line.split(": ") for line in (out / "labels.txt").read_text().splitlines())
    # Numbers of PASCAL-Context's own list of 459 categories.
    expected = {0: "sky", SQUARE: "window", TRIANGLE: "tree", STAR: "flower", RING: "plate", WIRE: "fence"}
    expected |= {SUN: "light", MOON: "cup", VOID: "unknown"}
    numbers = {"sky": 360, "window": 454, "tree": 420, "flower": 159, "plate": 295, "fence": 144}
    numbers |= {"light": 232, "cup": 104, "unknown": 431}
    assert {name: int(number) for number, name in names.items()} == numbers
    for name, one in zip(lists["train"] + lists["val"], all_scenes(splits), strict=True):
        assert similar(root / f"JPEGImages/{name}.jpg", one.image)
        labels = loadmat(out / f"trainval/{name}.mat")["LabelMap"]
        assert labels.dtype == np.uint16
        assert np.array_equal(labels, np.vectorize(lambda label: numbers[expected[label]])(one.mask))


def test_cityscapes_with_everything(tmp_path, splits):
    few = {"train": splits["train"][:8], "test": splits["val"][:1], "train_extra": splits["val"][1:2]}
    out = formats.write_cityscapes(tmp_path / "out", few, coarse=True, plates=True)
    folders = {path.relative_to(out).as_posix() for path in out.glob("*/*")}
    assert folders == {
        *("leftImg8bit/train", "leftImg8bit/test", "leftImg8bit/train_extra"),
        *("gtFine/train", "gtFine/test", "gtCoarse/train", "gtCoarse/train_extra"),
    }
    plates = 0
    for path in sorted(out.glob("gt*/*/*/*_labelIds.png")):
        ids = np.array(Image.open(path))
        numbers = np.array(Image.open(str(path).replace("labelIds", "instanceIds"))).astype(int)
        if path.parents[1].name == "test":
            assert set(np.unique(ids)) == {0, 1, 2} and np.array_equal(ids, numbers)
            assert json.loads(Path(str(path).replace("labelIds.png", "polygons.json")).read_text())["objects"] == []
            continue
        assert np.array_equal(ids == 255, numbers == 65535)
        plates += (ids == 255).sum()
        if path.parts[-4] == "gtCoarse" and path.parents[1].name == "train":
            fine = np.array(Image.open(str(path).replace("gtCoarse", "gtFine")))
            assert ((ids == fine) | (ids == 0)).all() and 0.3 < (ids > 0).mean() < (fine > 0).mean()
    assert plates
    black = out / "leftImg8bit/train_extra/troisdorf/troisdorf_000000_000073_leftImg8bit.png"
    assert not np.array(Image.open(black)).any()


def test_cocostuff(tmp_path, splits):
    out = formats.write_cocostuff(tmp_path / "out", {**splits, "test": splits["val"][:1]})
    # Lines of labels.txt of the official repository; a map holds one less.
    numbers = {0: 157, SQUARE: 1, TRIANGLE: 3, STAR: 7, RING: 13, SUN: 27, MOON: 90, WIRE: 113, VOID: 256}
    for split, scenes in splits.items():
        document = json.loads((out / f"annotations/instances_{split}2017.json").read_text())
        assert len(document["categories"]) == 80 and document["categories"][-1] == {
            "supercategory": "thing", "id": 90, "name": "toothbrush"
        }  # fmt: skip
        for entry, one in zip(document["images"], scenes, strict=True):
            assert similar(out / f"{split}2017" / entry["file_name"], one.image)
            with Image.open(out / f"stuffthingmaps/{split}2017" / entry["file_name"].replace("jpg", "png")) as file:
                assert file.mode == "L" and np.array_equal(np.array(file), np.vectorize(numbers.get)(one.mask) - 1)
    info = json.loads((out / "annotations/image_info_test-dev2017.json").read_text())
    assert "annotations" not in info and len(info["categories"]) == 80
    assert [path.name for path in (out / "test2017").iterdir()] == [info["images"][0]["file_name"]]
    assert not (out / "stuffthingmaps/test2017").exists()


def test_ade20k(tmp_path, splits):
    out = formats.write_ade20k(tmp_path / "out", splits) / "ADEChallengeData2016"
    rows = [line.split("\t") for line in (out / "objectInfo150.txt").read_text().splitlines()]
    assert rows[0] == ["Idx", "Ratio", "Train", "Val", "Name"] and len(rows) == 151
    names = {0: "sky", SQUARE: "car", TRIANGLE: "tree", STAR: "flower", RING: "plate", WIRE: "pole", SUN: "light"}
    numbers = {row[-1]: int(row[0]) for row in rows[1:]}
    values = {label: numbers[name] for label, name in {**names, MOON: "flag"}.items()} | {VOID: 0}
    for split, folder in (("train", "training"), ("val", "validation")):
        for k, one in enumerate(splits[split], start=1):
            assert similar(out / f"images/{folder}/ADE_{split}_{k:08d}.jpg", one.image)
            with Image.open(out / f"annotations/{folder}/ADE_{split}_{k:08d}.png") as file:
                assert file.mode == "L" and np.array_equal(np.array(file), np.vectorize(values.get)(one.mask))


@pytest.mark.parametrize("name", ["cityscapes", "cocostuff", "ade20k"])
def test_archives_hold_the_same_files(tmp_path, splits, name):
    few = {split: scenes[:2] for split, scenes in splits.items()}
    write = getattr(formats, f"write_{name}")
    plain, zipped = write(tmp_path / "plain", few), write(tmp_path / "zipped", few, zipped=True)
    content = {path.relative_to(plain).as_posix(): path.read_bytes() for path in plain.rglob("*.*")}
    inside = {path.relative_to(zipped).as_posix(): path.read_bytes() for path in zipped.rglob("*.json")}
    archives = sorted(zipped.glob("*.zip"))
    for path in archives:
        top = "stuffthingmaps/" if path.name.startswith("stuffthingmaps") else ""
        with zipfile.ZipFile(path) as archive:
            names = [one for one in archive.namelist() if not one.endswith("/")]
            inside |= {top + one: archive.read(one) for one in names}
    assert archives and inside == content


@pytest.mark.parametrize("masks", ["index", "palette", "rgb"])
def test_folder(tmp_path, splits, masks):
    out = formats.write_folder(tmp_path / "out", splits, masks=masks)
    assert (out / "classes.txt").read_text().splitlines() == list(CLASSES)
    for split, scenes in splits.items():
        images, labels = (sorted((out / split / kind).iterdir()) for kind in ("images", "masks"))
        assert [path.stem for path in images] == [path.stem for path in labels]
        for image, label, one in zip(images, labels, scenes, strict=True):
            assert np.array_equal(np.array(Image.open(image)), one.image)
            mask = Image.open(label)
            assert mask.mode == {"index": "L", "palette": "P", "rgb": "RGB"}[masks]
            if masks == "rgb":
                colours = np.array([*PALETTE, *[(1, 2, 3)] * 247, (224, 224, 192)])
                assert np.array_equal(np.array(mask), colours[one.mask])
            else:
                assert np.array_equal(np.array(mask), one.mask)
            if masks == "palette":
                assert tuple(mask.getpalette()[3:6]) == PALETTE[1]


def test_folder_masks_of_another_kind(tmp_path, splits):
    with pytest.raises(ValueError, match="'jpg'"):
        formats.write_folder(tmp_path / "out", splits, masks="jpg")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- nothing is lost, nothing is half


@pytest.mark.parametrize("write", WRITERS)
def test_an_occupied_folder_is_refused(tmp_path, splits, write):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write(tmp_path, splits)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write(tmp_path / "precious.txt", splits)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("write", WRITERS)
def test_an_interrupted_run_leaves_nothing(tmp_path, splits, write):
    def breaking():
        yield splits["train"][0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", {"train": breaking()})
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path, splits):
    (tmp_path / "empty").mkdir()
    few = {"train": splits["train"][:1], "val": splits["val"][:1]}
    assert (formats.write_folder(tmp_path / "empty", few) / "classes.txt").is_file()
    assert (formats.write_folder(tmp_path / "a/b/c", few) / "classes.txt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


# ---------------------------------------------------------------- the command


def test_sample_writes_the_scenes_of_shapes(tmp_path, capsys):
    from seglight.data.shapes import Shapes

    out = tmp_path / "out"
    arguments = ["sample", "--format", "folder", str(out), "--train", "3", "--val", "2", "--size", "60", "70"]
    assert main([*arguments, "--seed", "4"]) == 0
    printed = capsys.readouterr().out
    assert f"--data.root {out}" in printed
    assert (out / "train/images").is_dir()
    data = Shapes(image_size=(60, 70), scene_seed=4)
    for split, count in (("train", 3), ("val", 2)):
        files = sorted((out / split / "masks").iterdir())
        assert len(files) == count
        for index, path in enumerate(files):
            assert np.array_equal(np.array(Image.open(path)), data.dataset(split).read(index)[1])
    assert main(arguments) == 1
    assert "is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_sample_knows_every_format(tmp_path, capsys, name):
    out = tmp_path / "out"
    assert main(["sample", "--format", name, str(out), "--train", "2", "--val", "1", "--size", "48", "50"]) == 0
    look = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Look at:")).split()[-1]
    assert len(list((tmp_path / look).rglob("*.*"))) >= 2


@pytest.mark.parametrize(
    "name, reader", [("cityscapes", "Cityscapes"), ("cocostuff", "COCOStuff"), ("ade20k", "ADE20K")]
)
def test_sample_writes_archives(tmp_path, capsys, name, reader):
    from seglight import data

    out = tmp_path / "out"
    size = ["--size", "48", "50"]
    assert main(["sample", "--format", name, "--zipped", str(out), "--train", "2", "--val", "1", *size]) == 0
    printed = capsys.readouterr().out
    assert f"Look at:   {out}\n" in printed and f"--data {reader} --data.root {out}" in printed
    found = getattr(data, reader)(root=str(out)).dataset("train")
    assert len(found) == 2 and found.fingerprint()["archives"]
    assert main(["sample", "--format", "voc", "--zipped", str(tmp_path / "voc")]) == 2
    assert "--zipped goes with --format ade20k" in capsys.readouterr().err and not (tmp_path / "voc").exists()


def test_the_printed_command_reads_the_masks(tmp_path, capsys):
    """The colours that `--masks rgb` prints are those that `Folder` needs."""
    from seglight.data.folder import Folder

    out = tmp_path / "out"
    small = ["--train", "2", "--val", "1", "--size", "60", "70"]
    assert main(["sample", "--format", "folder", "--masks", "rgb", str(out), *small]) == 0
    printed = capsys.readouterr().out
    colors = json.loads(re.search(r"--data.colors '(.*?)'", printed)[1])
    folder = Folder(root=str(out), colors=colors, ignore=["void"])
    assert folder.classes == CLASSES
    for index, one in enumerate([scene(0, 0, (60, 70)), scene(0, 1, (60, 70))]):
        assert np.array_equal(folder.dataset("train").read(index)[1], one.mask)


def test_voc_reader_agrees(tmp_path, splits):
    from seglight.data.voc import VOC

    out = formats.write_voc(tmp_path / "out", splits)
    data = VOC(root=str(out)).dataset("val")
    assert [np.array_equal(data.read(i)[1], one.mask) for i, one in enumerate(splits["val"])] == [True] * 3


@pytest.mark.parametrize(
    "wrong", [["--train", "0"], ["--size", "20", "20"], ["--masks", "rgb"], ["--seed", "-1"], ["--format", "voice"]]
)
def test_wrong_usage_writes_nothing(tmp_path, capsys, wrong):
    assert main(["sample", "--format", "voc", str(tmp_path / "out"), "--train", "1", "--val", "1", *wrong]) == 2
    assert len(capsys.readouterr().err) > 20
    assert not list(tmp_path.iterdir())


def test_help_is_instant():
    code = (
        "import sys; from seglight.cli.data import main; status = main(['sample', '--help']); "
        "sys.exit(status or 'numpy' in sys.modules or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "PASCAL-Context" in done.stdout
