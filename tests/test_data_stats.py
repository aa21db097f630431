"""Statistics of datasets: every number against brute force, and the published ones of CamVid."""

import io
import json
import shlex

import numpy as np
import pytest
import yaml
from PIL import Image

from seglight.cli import main
from seglight.data import COCO, CamVid, Shapes, ShapesInstances
from seglight.data.base import SemanticDataModule
from seglight.data.dataset import InstanceDataset, SemanticDataset
from seglight.data.formats import write_coco, write_folder
from seglight.data.instances import InstanceDataModule
from seglight.data.objects import Bitmap, Objects
from seglight.data.scenes import split_scenes
from seglight.data_stats import WEIGHTS, statistics
from seglight.data_stats.count import _histogram, _places
from seglight.data_stats.result import GRID

CLASSES, COLOURS = ("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 255, 0))


class Listed(SemanticDataset):
    def __init__(self, samples):
        self.samples, self.ids = samples, [f"s{i}" for i in range(len(samples))]

    def read(self, index):
        return self.samples[index]


class Arrays(SemanticDataModule):
    """Samples from memory."""

    classes, palette = CLASSES, COLOURS

    def __init__(self, *samples, **kwargs):
        super().__init__(**kwargs)
        self.samples = samples

    def dataset(self, split):
        return Listed(self.samples)


class ListedObjects(InstanceDataset):
    def __init__(self, samples):
        self.samples, self.ids = samples, [f"s{i}" for i in range(len(samples))]

    def image(self, index):
        return self.samples[index][0]

    def objects(self, index):
        return self.samples[index][1]

    def trainable(self):
        return np.array([(~objects.iscrowd).any() for _, objects in self.samples], bool)


class ObjectArrays(InstanceDataModule):
    """Objects from memory."""

    classes, palette = CLASSES, COLOURS

    def __init__(self, *samples, **kwargs):
        super().__init__(**kwargs)
        self.samples = samples

    def dataset(self, split):
        return ListedObjects(self.samples)


def pair(rng, height, width, values):
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, rng.choice(np.array(values, np.uint8), (height, width))


def some_objects(*parts, size):
    """Of (label, crowd, top, left, height, width)."""
    boxes = [(left, top, left + width, top + height) for _, _, top, left, height, width in parts]
    return Objects(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array([part[0] for part in parts], np.int64),
        np.array([part[1] for part in parts], bool),
        np.array([part[4] * part[5] for part in parts], float),
        [Bitmap(top, left, np.ones((height, width), bool)) for _, _, top, left, height, width in parts],
    )


def brute(samples, count):
    """Everything, pixel by pixel."""
    found = {
        name: np.zeros(shape, int)
        for name, shape in {
            "values": 256,
            "holding": count,
            "holding_pixels": count,
            "together": (count, count),
            "places": (count, GRID, GRID),
            "places_held": (count, GRID, GRID),
            "places_all": (GRID, GRID),
        }.items()
    }
    for _, mask in samples:
        present = {int(v) for v in np.unique(mask) if v < count}
        for label in present:
            found["holding"][label] += 1
            found["holding_pixels"][label] += mask.size
            for other in present:
                found["together"][label, other] += 1
        for (y, x), label in np.ndenumerate(mask):
            found["values"][label] += 1
            if label < count:
                place = y * GRID // mask.shape[0], x * GRID // mask.shape[1]
                found["places"][(label, *place)] += 1
                found["places_all"][place] += 1
                for held in present:
                    found["places_held"][(held, *place)] += 1
    return found


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    sizes = ((40, 70), (33, 31), (7, 64), (100, 5), (32, 32), (1, 1))
    values = ((0, 1, 2, 255), (1, 255), (0, 2), (2,), (255,), (0,))
    return [pair(rng, *size, present) for size, present in zip(sizes, values, strict=True)]


def test_semantic_counts_equal_brute_force(samples):
    stats = statistics(Arrays(*samples))
    for name, expected in brute(samples, 3).items():
        assert np.array_equal(getattr(stats, name), expected), name
    assert stats.images == 6 and stats.unlabelled_images == 1 and stats.strange == {}
    assert stats.pixels.tolist() == stats.values[:3].tolist()
    assert stats.total == sum(mask.size for _, mask in samples)
    assert stats.labelled == stats.values[:3].sum()
    assert stats.unlabelled_share == stats.values[255] / stats.total
    assert stats.frequency.sum() == pytest.approx(1)
    assert dict(stats.sizes) == {image.shape[:2]: 1 for image, _ in samples}


def test_colours_equal_numpy(samples):
    stats = statistics(Arrays(*samples))
    pixels = np.concatenate([image.reshape(-1, 3) for image, _ in samples]) / 255
    assert stats.mean == pytest.approx(pixels.mean(0), abs=1e-12)
    assert stats.std == pytest.approx(pixels.std(0), abs=1e-12)
    assert stats.intensities.sum() == pixels.size


def test_all_254_labels_and_the_void_are_told_apart():
    mask = np.arange(256, dtype=np.uint8).repeat(40).reshape(64, 160)
    places = _places(mask, 255)
    assert (places.sum((1, 2)) == 40).all() and places.shape == (255, GRID, GRID)
    for label in (0, 1, 127, 254):
        rows, columns = np.nonzero(mask == label)
        expected = np.zeros((GRID, GRID), int)
        np.add.at(expected, (rows * GRID // 64, columns * GRID // 160), 1)
        assert np.array_equal(places[label], expected)


def test_counts_beyond_float32_are_exact():
    """OpenCV returns float32, which cannot hold 2**24 + 1."""
    mask = np.zeros((4097, 4097), np.uint8)
    assert _histogram(mask)[0] == 4097**2 and _places(mask, 2)[0].sum() == 4097**2
    assert int(np.float32(4097**2)) != 4097**2


def test_views_and_channels_are_counted_right():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for view in (image[:, ::-1], image[::2, ::3]):
        for channel in range(3):
            assert np.array_equal(_histogram(view, channel), np.bincount(view[..., channel].ravel(), minlength=256))
    mask = image[..., 0] % 3
    assert np.array_equal(_places(mask[:, ::-1], 3)[:, :, ::-1].sum((1, 2)), np.bincount(mask.ravel()))


def test_threads_and_order_change_nothing(samples, monkeypatch):
    many = [samples[i % 5] for i in range(50)]
    first = statistics(Arrays(*many)).as_dict()
    for threads in (1, 5):
        monkeypatch.setattr("os.cpu_count", lambda threads=threads: threads)
        assert statistics(Arrays(*many)).as_dict() == first
    assert statistics(Arrays(*reversed(many))).as_dict() == first
    assert first["images"] == 50


def test_objects_come_in_the_order_of_the_samples(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    image = np.zeros((64, 64, 3), np.uint8)
    many = [(image, some_objects((0, False, 0, 0, 1 + i % 60, 5), size=(64, 64))) for i in range(150)]
    stats = statistics(ObjectArrays(*many, short_side=64))
    assert stats.objects[:, 1].tolist() == [5 * (1 + i % 60) for i in range(150)] and stats.images == 150


def test_labels_without_a_class_are_named(samples):
    image = np.zeros((4, 5, 3), np.uint8)
    mask = np.array([[0, 1, 2, 3, 3]] * 3 + [[254, 255, 0, 0, 0]], np.uint8)
    stats = statistics(Arrays((image, mask)))
    assert stats.strange == {3: 6, 254: 1} and stats.labelled == 12 and stats.values[255] == 1
    from seglight.data_stats.text import lines

    assert any("3 (6 pixels), 254 (1 pixels)" in line and "data check" in line for line in lines(stats))


def test_class_weights_by_hand():
    image = np.zeros((10, 10, 3), np.uint8)
    one, two = np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
    one[0] = 1  # 10 of 200 pixels, in one image of two
    two[:2] = 255
    stats = statistics(Arrays((image, one), (image, two)))
    f = [170 / 200, 10 / 100]
    assert stats.class_weights("median") == pytest.approx([np.median(f) / f[0], np.median(f) / f[1], 1])
    p = [170 / 180, 10 / 180]
    assert stats.class_weights("inverse_log") == pytest.approx([1 / np.log(1.02 + p[0]), 1 / np.log(1.02 + p[1]), 1])
    for beta in (0.0, 0.9, 0.999):
        raw = np.array([(1 - beta) / (1 - beta**2), 1.0])
        assert stats.class_weights("effective", beta) == pytest.approx([*(2 * raw / raw.sum()), 1])
    assert stats.class_weights() == stats.class_weights("median")


def test_class_weights_of_nothing_and_bad_wishes(samples):
    image = np.zeros((3, 3, 3), np.uint8)
    stats = statistics(Arrays((image, np.full((3, 3), 255, np.uint8))))
    assert all(stats.class_weights(kind) == [1, 1, 1] for kind in WEIGHTS)
    with pytest.raises(ValueError, match=r"no class weights 'mean'; choose one of median, inverse_log, effective"):
        stats.class_weights("mean")
    with pytest.raises(ValueError, match="beta is 1"):
        stats.class_weights("effective", 1)
    with pytest.raises(ValueError, match="take no class weights"):
        statistics(ShapesInstances(train_size=2)).class_weights()
    with pytest.raises(ValueError, match="no split 'training'"):
        statistics(Shapes(), "training")
    with pytest.raises(ValueError, match="Arrays has no samples in val"):
        statistics(Arrays(), "val")


@pytest.fixture
def boxes():
    size = (64, 96)
    first = some_objects(
        (0, False, 4, 4, 20, 10), (0, False, 10, 8, 20, 20), (2, True, 40, 40, 10, 10), (1, False, 0, 90, 64, 6),
        size=size,
    )  # fmt: skip
    image = np.full((*size, 3), 7, np.uint8)
    second, empty = some_objects((1, False, 0, 0, 40, 33), size=(100, 50)), some_objects(size=(50, 50))
    return [(image, first), (np.zeros((100, 50, 3), np.uint8), second), (np.zeros((50, 50, 3), np.uint8), empty)]


def test_object_counts_equal_dense_masks(boxes):
    stats = statistics(ObjectArrays(*boxes, short_side=128, long_side=200))
    covered = 0
    places = np.zeros((3, GRID, GRID), int)
    for image, objects in boxes:
        size = image.shape[:2]
        dense = np.zeros((3, *size), bool)
        for one, label in zip(objects.segmentations, objects.labels, strict=True):
            dense[label, one.top : one.top + one.mask.shape[0], one.left : one.left + one.mask.shape[1]] |= one.mask
        covered += dense.any(0).sum()
        for label, y, x in np.argwhere(dense):
            places[label, y * GRID // size[0], x * GRID // size[1]] += 1
    assert np.array_equal(stats.places, places)
    assert stats.values[0] == covered and stats.total == 64 * 96 + 5000 + 2500
    assert stats.places_all.sum() == stats.total == stats.labelled
    assert stats.unlabelled_share == 1 - covered / stats.total
    assert stats.holding.tolist() == [1, 2, 1] and stats.crowds.tolist() == [0, 0, 1]
    assert stats.holding_pixels.tolist() == [6144, 11144, 6144]
    assert stats.places_held.sum((1, 2)).tolist() == [6144, 11144, 6144]
    assert stats.together.tolist() == [[1, 1, 1], [1, 2, 1], [1, 1, 1]]
    assert dict(stats.objects_in_image) == {3: 1, 1: 1, 0: 1}
    assert stats.images == 3 and stats.unlabelled_images == 1  # training would leave it out


def test_object_sizes(boxes):
    stats = statistics(ObjectArrays(*boxes, short_side=128, long_side=200))
    everything, first = stats.object_sizes(), stats.object_sizes(0)
    assert {name: everything[name] for name in ("count", "small", "medium", "large")} == {
        "count": 4, "small": 3, "medium": 1, "large": 0
    }  # fmt: skip
    assert first["count"] == 2 and first["side"][2] == pytest.approx((200**0.5 + 20) / 2)
    assert first["aspect"][2] == pytest.approx(1.5)
    factors = [min(128 / 64, 200 / 96), 2.0]  # by the short side; 128 / 50 = 2.56, but 200 / 100 = 2
    sides = np.sqrt([20 * 10, 20 * 20, 64 * 6]) * factors[0]
    sides = [*sides, np.sqrt(40 * 33) * factors[1]]
    assert everything["training_box"] == pytest.approx(np.quantile(sides, (0.05, 0.25, 0.5, 0.75, 0.95)))
    assert stats.object_sizes(2)["side"] is None
    assert stats.anchors(3) == [32, 64, 128]
    with pytest.raises(ValueError, match="no objects"):
        statistics(ObjectArrays(boxes[2])).anchors()


@pytest.mark.parametrize(
    ("area", "size"), [(1023, "small"), (1024, "medium"), (9216, "medium"), (9217, "large")], ids=str
)
def test_size_ranges_are_those_of_coco(area, size):
    one = some_objects((0, False, 0, 0, 9, 9), size=(10, 10))
    one.area[0] = area
    found = statistics(ObjectArrays((np.zeros((10, 10, 3), np.uint8), one))).object_sizes()
    assert found[size] == 1 and found["small"] + found["medium"] + found["large"] == 1


def test_the_training_size_of_large_scale_jitter_and_several_sides(boxes):
    wide = ObjectArrays(boxes[1], scale=(0.5, 1.5), crop=(200, 200))
    assert statistics(wide).objects[0, 4] == 2.0  # on average what makes 100x50 fit
    several = ObjectArrays(boxes[1], short_side=[60, 100, 70], long_side=1000)
    assert statistics(several).objects[0, 4] == 1.4


def test_a_generated_coco_miniature_covers_what_its_masks_cover(tmp_path):
    scenes = {split: split_scenes(split, 6, 0, (96, 120)) for split in ("train", "val")}
    write_coco(tmp_path / "coco", scenes)
    module = COCO(str(tmp_path / "coco"))
    stats, data = statistics(module), module.dataset("train")
    dense = np.zeros((6, len(module.classes), 96, 120), bool)
    count = crowds = 0
    for index in range(6):
        objects = data.objects(index)
        count, crowds = count + (~objects.iscrowd).sum(), crowds + objects.iscrowd.sum()
        from pycocotools import mask as coco

        for label, rle in zip(objects.labels, objects.rles((96, 120)), strict=True):
            dense[index, label] |= coco.decode(rle).astype(bool)
    assert stats.pixels.tolist() == dense.sum((0, 2, 3)).tolist()
    assert stats.values[0] == dense.any(1).sum()
    assert len(stats.objects) == count and stats.crowds.sum() == crowds
    assert np.array_equal(stats.together.diagonal(), dense.any((2, 3)).sum(0))


def test_the_dict_is_json_and_exact(samples, boxes):
    for module in (Arrays(*samples), ObjectArrays(*boxes)):
        stats = statistics(module)
        found = json.loads(json.dumps(stats.as_dict()))
        assert [one["pixels"] for one in found["classes"]] == stats.pixels.tolist()
        assert np.array_equal(found["places"], stats.places) and found["images"] == stats.images
    assert "objects" in found and "class_weights" not in found
    assert found["objects_in_image"] == [[0, 1], [1, 1], [3, 1]]


def test_the_picture(samples, boxes):
    for module in (ObjectArrays(*boxes), Arrays(samples[4])):
        target = io.BytesIO()
        statistics(module).draw(target)
        picture = Image.open(target)
        assert picture.format == "PNG" and picture.width == 1500 and picture.info["Software"] == "seglight data stats"
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_names_that_look_like_formulas_are_drawn_as_names(samples, boxes, monkeypatch):
    for module in (ObjectArrays(*boxes), Arrays(samples[4])):
        monkeypatch.setattr(type(module), "classes", ("from $x^$ y", *CLASSES[1:]))
        statistics(module).draw(io.BytesIO())


def test_a_faulty_file_stops_it_and_is_named(tmp_path, capsys):
    scenes = {split: split_scenes(split, 40, 0, (96, 120)) for split in ("train", "val")}
    write_folder(tmp_path / "mine", scenes)
    bad = sorted((tmp_path / "mine/train/images").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:200])
    assert main(["data", "stats", str(tmp_path / "mine")]) == 1
    assert bad.name in capsys.readouterr().err
    classes = tmp_path / "mine/classes.txt"
    classes.write_text("\n".join(["[/x]", "[red]", *classes.read_text().splitlines()[2:]]))
    assert main(["data", "stats", str(tmp_path / "mine"), "--split", "val"]) == 0
    text = capsys.readouterr().out
    assert "│ [/x] " in text and "│ [red] " in text, "no styles"


def test_the_command(tmp_path, capsys):
    words = ["data", "stats", "Shapes", "--data.train_size", "8", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    text = capsys.readouterr().out
    stats = statistics(Shapes(train_size=8))
    assert "8 images, all 192x160 pixels." in text and "background" in text
    pasted = [shlex.split(line) for line in text.splitlines() if "--model.class_weights" in line]
    assert len(pasted) == len(WEIGHTS) and text.count("  # ") >= len(WEIGHTS)
    for (option, value), kind in zip(pasted, WEIGHTS, strict=True):
        assert option == "--model.class_weights"
        assert yaml.safe_load(value) == pytest.approx(stats.class_weights(kind), rel=1e-3)
    saved = json.loads((tmp_path / "out/stats.json").read_text())
    assert saved == json.loads(json.dumps(stats.as_dict()))
    assert Image.open(tmp_path / "out/stats.png").width == 1500
    assert main(words) == 0  # its own files may be written again


def test_the_command_for_objects(capsys):
    assert main(["data", "stats", "ShapesInstances", "--data.train_size", "12", "--split", "train"]) == 0
    text = capsys.readouterr().out
    assert "objects and" in text and "class_weights" not in text and "--model.anchors" in text
    anchors = yaml.safe_load(shlex.split(text.split("--model.anchors", 1)[1].splitlines()[0])[0])
    assert len(anchors) == 5 and anchors == statistics(ShapesInstances(train_size=12)).anchors()


def test_files_of_others_are_not_overwritten(tmp_path, capsys):
    for name, content in (("stats.json", b'{"mine": 1}'), ("stats.png", b"no picture")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        assert main(["data", "stats", "Shapes", "--data.train_size", "1", "--out", str(folder)]) == 2
        assert f"{name} exists and was not written by" in capsys.readouterr().err
        assert (folder / name).read_bytes() == content and len(list(folder.iterdir())) == 1


def test_a_split_without_labels_says_so():
    from seglight.data_stats.text import lines

    bare = statistics(Arrays((np.zeros((4, 4, 3), np.uint8), np.full((4, 4), 255, np.uint8))), "test")
    text = "\n".join(lines(bare))
    assert "test has no labels: every pixel is 255" in text and "class_weights" not in text
    part = statistics(
        Arrays(*[(np.zeros((4, 4, 3), np.uint8), np.full((4, 4), v, np.uint8)) for v in (0, 255, 255, 1)])
    )
    assert "Unlabelled (255): 50.0 % of the pixels; 2 images wholly." in lines(part)
    assert "Classes that never occur (1): c." in lines(part)
    nothing = statistics(ObjectArrays((np.zeros((4, 4, 3), np.uint8), some_objects(size=(4, 4)))), "test")
    assert "test has no labels: no image has an object" in "\n".join(lines(nothing))


@pytest.mark.fidelity
def test_camvid_has_the_published_counts(real_data):
    """Pixels and images of each class of the SegNet tutorial's 367 labels, as others counted them.

    github.com/alexgkendall/caffe-segnet/issues/37, where label 11 (unlabelled) counts as a class for the median. The
    weights in the authors' own prototxt differ from what their formula gives (most for signsymbol, 9.6446).
    """
    stats = statistics(CamVid(str(real_data / "camvid")), progress=False)
    pixels = [10682767, 14750079, 623349, 20076880, 2845085, 6166762, 743859, 714595, 3719877, 405385, 184967]
    assert stats.pixels.tolist() == pixels and stats.values[255] == 2503995
    assert stats.holding.tolist() == [366, 365, 366, 367, 349, 319, 351, 173, 360, 317, 201]
    published = np.array([
        *(0.256527308, 0.185282667, 4.396287575, 0.136869322, 0.918473131, 0.387319864),
        *(3.533074291, 1.812685267, 0.724619798, 5.855012981, 8.136508447),
    ])  # fmt: skip
    share = np.append(stats.pixels / stats.holding_pixels, stats.values[255] / stats.total)
    to_eleven = np.median(share[:11]) / np.median(share)
    assert stats.class_weights("median") == pytest.approx(published * to_eleven, rel=1e-8)
