"""COCO's json format: what is read, what is refused, and what it costs."""

import json
import mmap
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seglight.data.coco import COCO, COCODataset, COCOFormat
from seglight.data.cocojson.check import _covers, degenerate
from seglight.data.cocojson.document import pixels
from seglight.data.cocojson.reader import read
from seglight.data.findings import DataError
from seglight.data.formats.coco import COCO_CATEGORIES, write_coco
from seglight.data.rle import decode_into, run_lengths
from seglight.data.scenes import split_scenes
from seglight.data.transforms import Geometry
from seglight.data_show import _training_keys

mask_tools = pytest.importorskip("pycocotools.mask")
HEIGHT, WIDTH = 40, 50
SQUARE = [[5.0, 5.0, 15.0, 5.0, 15.0, 15.0, 5.0, 15.0]]


def whole(height=HEIGHT, width=WIDTH):
    return Geometry((height, width), (0, 0, height, width), (0, 0, height, width))


def annotation(number, image=0, **changes):
    found = {"id": number, "image_id": image, "category_id": 3, "iscrowd": 0, "area": 100.0}
    found |= {"bbox": [5.0, 5.0, 10.0, 10.0], "segmentation": SQUARE, **changes}
    return {key: value for key, value in found.items() if value is not ...}


@pytest.fixture
def make(tmp_path):
    """Writes images and a json file, whose parts may be changed, and returns the file."""

    def write(annotations, count=3, images=None, categories=None):
        listed = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(count)]
        (tmp_path / "images").mkdir(exist_ok=True)
        for one in listed:
            Image.new("RGB", (WIDTH, HEIGHT), (one["id"], 0, 0)).save(tmp_path / "images" / one["file_name"])
        path = tmp_path / "objects.json"
        content = {
            "annotations": annotations,  # before the images: the order of the lists must not matter
            "info": {"nested": [1, {"images": []}]},
            "images": listed if images is None else images,
            "categories": categories or [{"id": 7, "name": "fig"}, {"id": 3, "name": "date"}],
        }
        path.write_text(json.dumps(content))
        return path

    return write


def dataset(path, **options):
    return COCODataset("Test train", read(path), path.parent / "images", **options)


def complaint(path):
    with pytest.raises(DataError) as error:
        dataset(path).check(2)
    return str(error.value)


# ---------------------------------------------------------------- reading


def compare_with_pycocotools(data, path, capsys, step=1):
    from pycocotools.coco import COCO as Official

    official, total = Official(str(path)), 0
    capsys.readouterr()
    for index in range(0, len(data), step):
        name = data.ids[index]
        entries, objects, size = official.imgToAnns[int(name)], data.objects(index), data.size(index)
        assert len(entries) == len(objects)
        masks, rles = objects.masks(whole(*size)), objects.rles(size)
        for k, entry in enumerate(entries):
            assert np.array_equal(masks[k], official.annToMask(entry))
            assert rles[k]["counts"] == official.annToRLE(entry)["counts"] and list(rles[k]["size"]) == list(size)
            x, y, w, h = entry["bbox"]
            assert np.allclose(objects.boxes[k], [x, y, x + w, y + h], atol=1e-4)
            assert objects.area[k] == entry["area"] and objects.iscrowd[k] == entry["iscrowd"]
            assert sorted(official.cats)[objects.labels[k]] == entry["category_id"]
            total += 1
    return total


@pytest.mark.fidelity
def test_generated_files_as_pycocotools_reads_them(tmp_path, capsys, caplog):
    scenes = {"train": split_scenes("train", 16), "val": split_scenes("val", 4)}
    module = COCO(str(write_coco(tmp_path / "coco", scenes)))
    assert module.category_ids == tuple(sorted(COCO_CATEGORIES.values())) and module.num_classes == 6
    for split in ("train", "val"):
        data = module.dataset(split)
        data.check(6)
        path = tmp_path / f"coco/annotations/instances_{split}2017.json"
        assert compare_with_pycocotools(data, path, capsys) > 20
    assert "COCO val2017 has 4 of the 5,000 published samples" in caplog.text and "left out" not in caplog.text
    train = module.dataset("train")
    assert train.data.iscrowd.any() and len(train) == 16, "one of them has no object"
    left = module.split("train")
    assert len(left) == 15 and left.fingerprint()["without_objects"] == 1 and len(list(left.ids)) == 15
    assert len(COCO(str(tmp_path / "coco"), skip_empty=False).split("train")) == 16
    scene = next(iter(split_scenes("val", 1)))
    masks = module.dataset("val").objects(0).masks(whole(160, 192))
    assert np.array_equal(masks, scene.object_masks()), "polygons along pixel edges cover exactly these pixels"


@pytest.mark.fidelity
def test_the_real_files_as_pycocotools_reads_them(real_data, capsys):
    coco = COCO(str(real_data / "coco"))
    assert coco.num_classes == 80 and coco.classes[0] == "person" and coco.category_ids[-1] == 90
    nuclei = real_data / "nuclei"
    parts = {split: (nuclei / split, nuclei / f"annotations/instances_{split}.json") for split in ("train", "val")}
    cells = COCOFormat(*map(str, parts["train"]), *map(str, parts["val"]))
    total = 0
    for module, path in ((coco, real_data / "coco/annotations/instances_{}2017.json"), (cells, parts["train"][1])):
        for split in ("train", "val"):
            data = module.split(split)
            data.check(module.num_classes)
            file = str(path).format(split) if module is coco else parts[split][1]
            total += compare_with_pycocotools(data, file, capsys, step=8)
    assert total > 700


def test_two_paths_are_enough(real_data):
    folder = real_data / "fruitsnuts"
    module = COCOFormat(str(folder / "images"), str(folder / "trainval.json"))
    train, val = module.split("train"), module.split("val")
    assert (len(train), len(val)) == (14, 4) and not set(train.ids) & set(val.ids) and "0" in {*train.ids, *val.ids}
    assert module.classes == ("date", "fig", "hazelnut") and module.split("test").ids[0] == val.ids[0]
    train.check(3)
    assert list(COCOFormat(str(folder / "images"), str(folder / "trainval.json"), seed=5).split("val").ids) == [
        *val.ids
    ]
    other = COCOFormat(str(folder / "images"), str(folder / "trainval.json"), split_seed=1).split("val")
    assert list(other.ids) != list(val.ids)


def test_all_ways_to_write_a_mask(make):
    dense = np.zeros((HEIGHT, WIDTH), np.uint8)
    dense[5:15, 5:15] = 1
    compressed = mask_tools.encode(np.asfortranarray(dense))["counts"].decode()
    flat = dense.ravel(order="F")
    plain = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
    outlines = (SQUARE, {"size": [HEIGHT, WIDTH], "counts": compressed}, {"size": [HEIGHT, WIDTH], "counts": plain})
    halves = [[5, 5, 10, 5, 10, 15, 5, 15], [9, 5, 15, 5, 15, 15, 9, 15]]
    path = make([annotation(i, segmentation=outline) for i, outline in enumerate([*outlines, halves])])
    data = dataset(path)
    data.check(2)
    assert data.ids[0] == "0" and data.data.ids.tolist() == [0, 1, 2, 3], "ids from 0 are legal"
    objects = data.objects(0)
    assert all(np.array_equal(mask, dense) for mask in objects.masks(whole()))
    assert len({rle["counts"] for rle in objects.rles((HEIGHT, WIDTH))}) == 1
    assert objects.labels.tolist() == [0] * 4 and data.document.categories == ("date", "fig"), "in the order of ids"
    assert [len(data.objects(i)) for i in range(3)] == [4, 0, 0] and data.trainable().tolist() == [True, False, False]


def test_what_may_be_left_out(make):
    dense = np.zeros((HEIGHT, WIDTH), np.uint8)
    dense[5:15, 5:15] = 1
    rle = {"size": [HEIGHT, WIDTH], "counts": mask_tools.encode(np.asfortranarray(dense))["counts"].decode()}
    gone = {"bbox": ..., "area": ..., "iscrowd": ...}
    data = dataset(make([annotation(1, **gone), annotation(2, segmentation=rle, **gone)]))
    data.check(2)
    objects = data.objects(0)
    assert objects.boxes.tolist() == [[5, 5, 15, 15]] * 2 and objects.area.tolist() == [100, 100]
    assert not objects.iscrowd.any()


def test_run_lengths_of_any_mask():
    rng = np.random.default_rng(0)
    for density in (0.0, 0.01, 0.3, 0.99, 1.0):
        dense = (rng.random((37, 53)) < density).astype(np.uint8)
        rle = mask_tools.encode(np.asfortranarray(dense))
        runs = run_lengths(rle["counts"])
        assert runs.sum() == dense.size and runs[1::2].sum() == dense.sum()
        out = np.zeros(dense.shape, bool)
        decode_into(rle, out)
        assert np.array_equal(out, dense)
    assert run_lengths(b"") is None and run_lengths(b"\x10") is None and run_lengths(b"o") is None


# ---------------------------------------------------------------- faults


def test_broken_json_names_line_and_place(make):
    path = make([annotation(1), annotation(2)])
    text = json.dumps(json.loads(path.read_text()), indent=1)
    path.write_text(text[: text.index('"id": 2')])
    line = text[: text.index('"id": 2')].count("\n") + 1
    with pytest.raises(DataError, match=rf"objects\.json: line {line}, column \d+, at annotations\[1\].*cut off"):
        read(path)
    for broken, place in (("[]", "the beginning"), ('{"images": [1 2]}', r"images\[0\]"), ('{"a": }', "'a'")):
        path.write_text(broken)
        with pytest.raises(DataError, match=rf"line 1, column \d+, at {place}"):
            read(path)
    path.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(DataError, match="not text in UTF-8"):
        read(path)
    path.write_text('{"images": [], "annotations": []}')
    with pytest.raises(DataError, match="has no categories"):
        read(path)


BAD_RLE = {"size": [HEIGHT, WIDTH], "counts": [10, 20]}
SMALL_RLE = {"size": [10, 10], "counts": [50, 50]}
NAN = float("nan")
FAULTS = {
    "an odd number of coordinates": {"segmentation": [[1, 1, 9, 1, 9, 9, 1]]},
    "fewer than 3 points": {"segmentation": [[1, 1, 9, 9]]},
    "each a list": {"segmentation": [1, 1, 9, 1, 9, 9]},
    "something else than numbers": {"segmentation": [[1, 1, "9", 1, 9, 9]]},
    "no 'segmentation'": {"segmentation": []},
    "do not add up": {"segmentation": BAD_RLE},
    "of another size than its image": {"segmentation": SMALL_RLE},
    "an RLE needs its 'size'": {"segmentation": {"counts": [10, 20]}},
    "compressed string": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "\x01\x02"}},
    "NaN or infinity": {"bbox": [NAN, 5, 10, 10]},
    "NaN or infinity in": {"segmentation": [[1, 1, 9, 1, NAN, 9]]},
    "NaN or infinity in the": {"area": float("inf")},
    "must be four numbers": {"bbox": [1, 2, 3]},
    "category is not listed": {"category_id": 4},
    "image is not in the list": {"image_id": 99},
    "'category_id' must be int": {"category_id": "3"},
    "no 'image_id'": {"image_id": ...},
    "id is that of another annotation": {"id": 1},
    "must be 0 or 1": {"iscrowd": 2},
}
DEGENERATE = {
    "lies outside of the image": {"bbox": [60, 5, 10, 10]},
    "leaves the image": {"bbox": [45, 5, 10, 10]},
    "no width or no height": {"bbox": [5, 5, 10, 0]},
    "mask has no pixel": {"segmentation": [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]]},
    "area is 0 or less": {"area": 0},
}


@pytest.mark.parametrize("words", [*FAULTS, *DEGENERATE])
def test_each_fault_is_named_and_can_be_dropped(make, words):
    changes = {**FAULTS, **DEGENERATE}[words]
    bad = annotation(17, 1, **changes)
    path = make([annotation(1), annotation(2, 1), bad])
    text = complaint(path)
    assert words in text and f"annotation {bad.get('id')}" in text and str(path) in text and "found 1 fault" in text
    assert "data.faulty: drop" in text
    data = dataset(path, faulty="drop")
    data.check(2)
    assert data.data.ids.tolist() == [1, 2] and data.fingerprint()["dropped"] == {
        next(rule for rule in data.dropped if words in rule): 1
    }
    kept = dataset(path, faulty="drop", evaluation=True)
    assert len(kept.data.ids) == 2 + (words in DEGENERATE), "COCO's evaluation counts objects without a pixel"


def test_unusable_entries_are_refused_without_the_check_too(make):
    with pytest.raises(DataError, match="annotation 17"):
        dataset(make([annotation(17, segmentation=[[1, 1, 9, 9]])]))


def test_one_bad_part_costs_the_whole_object(make):
    data = dataset(make([annotation(1), annotation(2, segmentation=[*SQUARE, [1, 1, 9, 9]])]), faulty="drop")
    assert data.data.ids.tolist() == [1] and len(data.data.points) == 8


def test_faults_of_images(make):
    path = make([annotation(1, 0), annotation(2, 1), annotation(3, 2), annotation(4, 3), annotation(5, 4)], 6)
    folder = path.parent / "images"
    (folder / "0.png").unlink()
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(folder / "1.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:-20])
    content = json.loads(path.read_text())
    content["images"][4] = {**content["images"][3], "id": 4}
    content["images"][5]["id"] = 3
    content["images"].append({"id": 9, "file_name": "9.png", "width": 3})
    path.write_text(json.dumps(content))
    text = complaint(path)
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    order = (
        "no 'height'",
        "its file is listed",
        "its id is that",
        "missing",
        "truncated",
        "another size than the json",
    )
    assert len(lines) == len(order) and all(any(words in line for line in lines) for words in order)
    assert "no 'height'" in lines[0] and "another size" in lines[-1], "worst first"
    assert "1.png (image 1): 51x40, json 50x40" in text and "image 9" in text
    data = dataset(path, faulty="drop")
    assert list(data.ids) == ["3"] and data.data.ids.tolist() == [4], "annotations of dropped images go with them"
    with pytest.raises(DataError, match=r"51x40 pixels, but .* says 50x40"):
        sound = replace(read(path).keep(np.array([0, 1, 0, 0], bool), np.ones(4, bool)), faults=[])
        COCODataset("x", sound, folder).image(0)


def test_images_are_turned_as_exif_says(make):
    path = make([annotation(1)], 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((WIDTH, HEIGHT, 3), np.uint8)
    stored[:5] = 255
    Image.fromarray(stored).save(path.parent / "images/0.png", exif=exif)
    data = dataset(path)
    data.check(2)
    image = data.image(0)
    assert image.shape == (HEIGHT, WIDTH, 3) and (image[:, -5:] == 255).all() and (image[:, :-5] == 0).all()


def test_categories(make):
    same = [{"id": 3, "name": "date"}, {"id": 3, "name": "fig"}]
    with pytest.raises(DataError, match="categories with the same ids: 3"):
        read(make([], categories=same))
    with pytest.raises(DataError, match="same names: fig"):
        read(make([], categories=[{"id": 1, "name": "fig"}, {"id": 3, "name": "fig"}]))
    path = make([annotation(1)])
    other = path.with_name("val.json")
    other.write_text(path.read_text().replace('"fig"', '"nut"'))
    module = COCOFormat(str(path.parent / "images"), str(path), val_annotations=str(other))
    with pytest.raises(DataError, match="do not list the same categories"):
        module.dataset("val"), module.dataset("train")


def test_upright_images_share_no_training_batch_with_others(tmp_path):
    listed = [{"id": i, "file_name": f"{i}.png", "height": (40, 80)[i % 3 == 0], "width": 60} for i in range(30)]
    (tmp_path / "images").mkdir()
    for one in listed:
        Image.new("RGB", (one["width"], one["height"])).save(tmp_path / "images" / one["file_name"])
    square = [[5, 5, 20, 5, 20, 20, 5, 20]]
    objects = [{"id": i, "image_id": i, "category_id": 1, "segmentation": square} for i in range(1, 30)]
    path = tmp_path / "objects.json"
    path.write_text(json.dumps({"images": listed, "annotations": objects, "categories": [{"id": 1, "name": "x"}]}))
    options = {"batch_size": 4, "short_side": 40, "long_side": 80, "val_fraction": 0.2, "flip": 0, "workers": 0}

    def shapes(**more):
        module = COCOFormat(str(tmp_path / "images"), str(path), **options, **more)
        return [[tuple(image.shape[1:]) for image in batch["image"]] for batch in module.train_batches(12)]

    together, apart = shapes(group_aspect=False), shapes()
    module = COCOFormat(str(tmp_path / "images"), str(path), **options)
    shown = [keys for keys, _ in zip(_training_keys(module, len(module.split("train")), 0), range(4), strict=False)]
    upright = module.split("train").upright()
    assert [{bool(upright[i]) for _, i in keys} for keys in shown] == [{b[0][0] > b[0][1]} for b in apart[:4]]
    assert any(len(set(batch)) == 2 for batch in together) and all(len(set(batch)) == 1 for batch in apart)
    assert {shape for batch in apart for shape in batch} == {(40, 60), (53, 40)}
    jittered = {"scale": (0.5, 1.0), "crop": 64}
    assert shapes(**jittered) == shapes(**jittered, group_aspect=False), "all of one size anyway"


def test_the_part_that_validates_is_drawn_by_name(make, caplog):
    """Whatever is lost, dropped, looked at or listed elsewhere, no image changes sides."""
    path = make([annotation(i, i) for i in range(20)], 20)
    images = path.parent / "images"

    def sides(**options):
        module = COCOFormat(str(images), str(path), faulty="drop", **options)
        return [set(module.split(split).ids) for split in ("train", "val")]

    train, val = sides()
    assert len(val) == 4 and len(train) == 16 and sides(split_seed=1)[1] != val
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "images": content["images"][::-1]}))
    assert sides() == [train, val]
    for lost in (sorted(train)[3], sorted(val)[0]):
        (images / f"{lost}.png").rename(images.parent / "away.png")
        assert sides() == [train - {lost}, val - {lost}]
        assert sides(check=False) == [train, val], "what nobody looked for is not dropped"
        (images.parent / "away.png").rename(images / f"{lost}.png")
    (images / f"{sorted(val)[0]}.png").unlink()
    caplog.clear()
    sides()
    assert caplog.text.count("left out") == 1 and "COCOFormat val: 1 of 4 images are faulty" in caplog.text
    prints = [
        COCOFormat(str(images), str(path), split_seed=seed).dataset("train").fingerprint()["ids_sha256"]
        for seed in (0, 0, 1)
    ]
    assert prints[0] == prints[1] != prints[2]


def test_images_of_a_test_file_are_not_trained_on(make):
    path = make([annotation(i, i) for i in range(10)], 10)
    images, content = str(path.parent / "images"), json.loads(path.read_text())
    val = set(COCOFormat(images, str(path)).split("val").ids)
    test = path.with_name("test.json")

    def train(kept):
        test.write_text(json.dumps({**content, "images": kept, "annotations": []}))
        return COCOFormat(images, str(path), test_annotations=str(test)).split("train")

    with pytest.raises(DataError, match="8 of the training samples are also in the test split"):
        train(content["images"])
    assert len(train([one for one in content["images"] if str(one["id"]) in val])) == 8
    assert len(train([{**content["images"][0], "file_name": "other.png"}])) == 8


def test_options(make, tmp_path):
    path = make([annotation(i, i) for i in range(3)])
    images = str(path.parent / "images")
    copy = path.with_name("val.json")
    copy.write_text(path.read_text())
    with pytest.raises(DataError, match="3 of the training samples are also in the val split"):
        COCOFormat(images, str(path), val_annotations=str(copy)).dataset("train")
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        COCOFormat(images + "x", str(path))
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        COCOFormat(images, str(path) + "x")
    for options, words in (
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"val_images": images}, "say data.val_annotations, too"),
        ({"faulty": "ignore"}, "error or drop"),
    ):
        with pytest.raises(ValueError, match=words):
            COCOFormat(images, str(path), **options)
    with pytest.raises(DataError, match="none is left to train on"):
        COCOFormat(images, str(path), val_fraction=0.9).dataset("train")
    half = COCOFormat(images, str(make([annotation(i, i) for i in range(4)], 8)), val_fraction=0.5)
    train, val = half.split("train"), half.split("val")
    assert len(val) == 4 and not val.trainable().all(), "images without objects stay in evaluation"
    assert train.trainable().all() and len(train) == 4 - val.trainable().sum()
    with pytest.raises(DataError, match="no crowd"):
        only = make([annotation(i, i, iscrowd=1) for i in range(3)])
        COCOFormat(images, str(only)).split("train")
    with pytest.raises(FileNotFoundError, match=r"cocodataset\.org.*seglight data sample --format coco"):
        COCO(str(tmp_path / "nowhere"))


# ---------------------------------------------------------------- memory


def private_memory(pid):
    """Bytes that belong to one process alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private"))


def touch(data, pipe):
    before = private_memory("self")
    total = sum(len(data.objects(i)) + len(data.ids[i]) + len(str(data.path(i))) for i in range(len(data)))
    pipe.send((total, private_memory("self") - before))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_share_the_annotations(make, method):
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(4000)]
    outline = [(np.arange(400) % 30).tolist()]
    data = dataset(make([annotation(i, i, segmentation=outline) for i in range(4000)], 0, images))
    assert data.data.nbytes > 12e6
    ours, theirs = multiprocessing.get_context(method).Pipe()
    worker = multiprocessing.get_context(method).Process(target=touch, args=(data, theirs))
    worker.start()
    total, grown = ours.recv()
    worker.join()
    assert total == 4000 + sum(len(str(i)) for i in range(4000)) + sum(len(str(data.path(i))) for i in range(4000))
    assert grown < 4e6, "what a worker needs besides the arrays"


def test_a_pickled_dataset_maps_files_that_vanish_with_the_original(make):
    data = dataset(make([annotation(1), annotation(2, 2)]))
    text = pickle.dumps(data)
    folder = Path(data.data._folder)
    copy = pickle.loads(text)
    assert len(text) < 5000 and folder.is_dir()
    assert isinstance(copy.data.points.base, np.memmap | mmap.mmap), "mapped, not read"
    assert np.array_equal(copy.objects(2).masks(whole()), data.objects(2).masks(whole())) and list(copy.ids) == [
        *data.ids
    ]
    del copy
    assert folder.is_dir()
    del data
    assert not folder.exists()


# ---------------------------------------------------------------- the quick look at outlines


def test_outlines_that_surely_have_a_pixel_have_one(make):
    rng = np.random.default_rng(0)
    outlines = []
    for number in range(600):
        corners, (x, y) = int(rng.integers(3, 9)), rng.uniform(-5, 50, 2)
        points = np.stack([x + rng.normal(0, 4, corners), y + rng.normal(0, rng.choice([0.05, 1, 4]), corners)], 1)
        if number % 2:
            angle, radius = np.sort(rng.uniform(0, 2 * np.pi, 8)), rng.uniform(0.2, 20)
            points = np.stack([25 + radius * np.cos(angle), 20 + radius * np.sin(angle)], 1)
        if number % 40 == 1:  # beside the image, on each of its sides
            points += [(-50, 0), (0, -50), (50, 0), (0, 50)][number // 40 % 4]
        outlines.append([points.ravel().tolist() for _ in range(int(rng.integers(1, 3)))])
    boxes = {"bbox": [5, 5, 10, 10]}
    document = read(make([annotation(i, segmentation=one, **boxes) for i, one in enumerate(outlines)], 1))
    sure, count = _covers(document), pixels(document, np.arange(600))
    assert (count[sure] > 0).all() and 20 < sure.sum() < 500 and (count == 0).sum() > 50
    bad, faults = degenerate(document)
    assert np.array_equal(bad, count == 0) and len(faults) == bad.sum()
    official = [mask_tools.area(mask_tools.merge(mask_tools.frPyObjects(one, HEIGHT, WIDTH))) for one in outlines]
    assert np.array_equal(count, official)
