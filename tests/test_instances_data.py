"""Images with objects: geometry, augmentation, and one contract for all datasets that have them."""

import numpy as np
import pytest
import torch
from PIL import Image

from seglight.data import COCO, CityscapesInstances, COCOFormat, ShapesInstances, VOCInstances
from seglight.data.dataset import InstanceDataset
from seglight.data.findings import DataError
from seglight.data.formats import write_cityscapes, write_coco, write_voc
from seglight.data.instance_maps import objects_of
from seglight.data.instance_transforms import InstanceTransform, Sample, boxes_of, paste
from seglight.data.objects import Bitmap, Objects
from seglight.data.samplers import TrainSampler
from seglight.data.scenes import THINGS, WIRE, split_scenes
from seglight.data.transforms import Geometry, rng_for

mask_tools = pytest.importorskip("pycocotools.mask")
SIZE = (64, 72)
LARGE = {"crop": 56, "scale": (0.3, 2.0), "copy_paste": 0.7, "jitter": 0.3}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, write in (("voc", write_voc), ("coco", write_coco), ("cityscapes", write_cityscapes)):
        write(folder / name, {"train": split_scenes("train", 13, 0, SIZE), "val": split_scenes("val", 5, 0, SIZE)})
    return folder


def build(name, roots, **options):
    options = {"batch_size": 2, "workers": 0, "short_side": [48, 64, 80], "long_side": 90, "seed": 3, **options}
    coco = roots / "coco"
    return {
        "voc": lambda: VOCInstances(str(roots / "voc"), **options),
        "coco": lambda: COCO(str(coco), **options),
        "format": lambda: COCOFormat(
            str(coco / "train2017"), str(coco / "annotations/instances_train2017.json"), **options
        ),
        "cityscapes": lambda: CityscapesInstances(str(roots / "cityscapes"), **options),
        "shapes": lambda: ShapesInstances(13, 5, 5, SIZE, **options),
    }[name]()


NAMES = ("voc", "coco", "format", "cityscapes", "shapes")


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ---------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, LARGE, {"crop": (40, 48)}], ids=["resize", "large", "crop"])
def test_training_batches(roots, name, options):
    module = build(name, roots, **options)
    objects, crowds = 0, 0
    for batch in module.train_batches(10):
        assert set(batch) == {"image", "target", "image_id"} and len(batch["image"]) == len(batch["target"]) == 2
        for image, target, sample in zip(batch["image"], batch["target"], batch["image_id"], strict=True):
            height, width = image.shape[1:]
            count = len(target["labels"])
            kinds = {key: (value.dtype, tuple(value.shape)) for key, value in target.items()}
            assert isinstance(sample, str) and image.dtype == torch.uint8 and image.shape[0] == 3
            assert kinds == {
                "boxes": (torch.float32, (count, 4)),
                "labels": (torch.int64, (count,)),
                "masks": (torch.bool, (count, height, width)),
                "iscrowd": (torch.bool, (count,)),
                "area": (torch.float32, (count,)),
            }
            boxes, masks = target["boxes"].numpy(), target["masks"].numpy()
            assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all() and (boxes <= [width, height] * 2).all()
            assert ((target["labels"] >= 0) & (target["labels"] < module.num_classes)).all()
            assert masks.any((1, 2)).all() and np.array_equal(masks.sum((1, 2)), target["area"])
            tight = boxes_of(masks)
            beyond = np.concatenate([boxes[:, :2] - tight[:, :2], tight[:, 2:] - boxes[:, 2:]])
            assert beyond.max(initial=0) <= 1, "masks lie in their boxes"
            if options.get("crop") == (40, 48):
                assert np.array_equal(tight, boxes), "all images are larger, so all boxes are computed anew"
            if options is LARGE:
                assert (height, width) == (56, 56)
            elif options:
                assert height <= 40 and width <= 48
            else:
                assert min(height, width) in (48, 64, 80) and max(height, width) <= 90
            objects, crowds = objects + count, crowds + int(target["iscrowd"].sum())
    assert objects > 20, "there is something to learn from"


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_batches(roots, name):
    module = build(name, roots, val_batch_size=2)
    data = module.dataset("val")
    data.check(module.num_classes)
    seen = []
    for batch in module.val_dataloader():
        for image, target, sample in zip(batch["image"], batch["target"], batch["image_id"], strict=True):
            index = list(data.ids).index(sample)
            seen.append(sample)
            assert image.dtype == torch.uint8 and np.array_equal(image.permute(1, 2, 0), data.image(index))
            assert tuple(image.shape[1:]) == data.size(index) == SIZE
            count = len(target["labels"])
            kinds = {key: (v.dtype, tuple(v.shape)) for key, v in target.items() if key != "rles"}
            assert kinds == {
                "boxes": (torch.float32, (count, 4)),
                "labels": (torch.int64, (count,)),
                "iscrowd": (torch.bool, (count,)),
                "area": (torch.float64, (count,)),
            }
            assert len(target["rles"]) == count and all(tuple(rle["size"]) == SIZE for rle in target["rles"])
            if count:
                masks = mask_tools.decode(target["rles"]).transpose(2, 0, 1).astype(bool)
                assert np.array_equal(masks.sum((1, 2)), target["area"]), "generated outlines are exact"
                assert np.array_equal(boxes_of(masks), target["boxes"])
                whole = Geometry(SIZE, (0, 0, *SIZE), (0, 0, *SIZE))
                assert np.array_equal(data.objects(index).masks(whole), masks)
    assert seen == list(data.ids) and len(set(seen)) == len(seen), "nothing dropped, nothing doubled"
    assert module.num_classes == len(module.classes) == len(module.palette) == len(set(module.classes))


@pytest.mark.parametrize("name", ["coco", "shapes"])
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers(roots, name, workers):
    here, there = (build(name, roots, workers=count, **LARGE) for count in (0, workers))
    assert all(map(equal, list(here.train_batches(6)), list(there.train_batches(6))))
    assert all(map(equal, list(here.val_dataloader()), list(there.val_dataloader())))


@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_depend_on_ranks_nor_on_resuming(roots, name):
    module = build(name, roots, **LARGE)
    make, data = module.train_builder(), module.split("train")

    def samples(batch_size, **options):
        keys = list(TrainSampler(len(data), batch_size, 6, seed=3, **options))
        return keys, make(keys)

    keys, whole = samples(2)
    for rank in (0, 1):
        ours, part = samples(1, rank=rank, world=2)
        assert ours == keys[rank::2] and all(equal(part[key], whole[key][rank::2]) for key in whole)
    resumed, rest = samples(2, skip=4)
    assert resumed == keys[8:] and all(equal(rest[key], whole[key][8:]) for key in whole)
    assert equal(whole["image"], [image for batch in module.train_batches(6) for image in batch["image"]])
    assert not equal(make([(0, 1)]), make([(1, 1)])), "another pass looks different"
    assert not equal(make([(0, 1)]), build(name, roots, **{**LARGE, "seed": 4}).train_builder()([(0, 1)]))


# ---------------------------------------------------------------- datasets


def test_voc_objects_are_those_of_the_scenes(roots):
    module = build("voc", roots)
    data = module.dataset("val")
    assert module.classes[0] == "aeroplane" and module.num_classes == 20 and len(data) == 5
    for index, scene in enumerate(split_scenes("val", 5, 0, SIZE)):
        objects = data.objects(index)
        inside = [mask & (scene.mask != 255) for mask in scene.object_masks()]
        if wires := (scene.mask == WIRE).any():
            inside.append(scene.mask == WIRE)
        inside = np.array([mask for mask in inside if mask.any()]).reshape(-1, *SIZE)
        assert np.array_equal(objects.masks(Geometry(SIZE, (0, 0, *SIZE), (0, 0, *SIZE))), inside)
        labels = [one.label - 1 for one in scene.objects] + [WIRE - 1] * bool(wires)
        assert objects.labels.tolist() == labels[: len(inside)] and not objects.iscrowd.any()


def test_upright_images_share_no_training_batch_with_others(tmp_path):
    scenes = split_scenes("train", 10, 0, SIZE), split_scenes("train", 8, 1, SIZE[::-1])
    mixed = [one for pair in zip(scenes[0], [*scenes[1], None, None], strict=True) for one in pair if one]
    root = write_voc(tmp_path / "voc", {"train": mixed, "val": split_scenes("val", 2, 0, SIZE)})
    options = {"batch_size": 2, "workers": 0, "short_side": 48, "long_side": 90, "flip": 0}
    module = VOCInstances(str(root), **options)
    data = module.split("train")
    sizes = [data.image(index).shape[:2] for index in range(len(data))]
    assert [data.size(index) for index in range(len(data))] == sizes and set(sizes) == {SIZE, SIZE[::-1]}
    assert data.upright().tolist() == [height > width for height, width in sizes]

    def kinds(module):
        return [{image.shape[1] > image.shape[2] for image in batch["image"]} for batch in module.train_batches(9)]

    assert all(len(one) == 1 for one in kinds(module))
    assert any(len(one) == 2 for one in kinds(VOCInstances(str(root), **options, group_aspect=False)))


def test_voc_masks_that_do_not_fit(roots, tmp_path):
    root = write_voc(tmp_path / "voc", {part: split_scenes(part, 2, 0, SIZE) for part in ("train", "val")})
    data = VOCInstances(str(root)).dataset("val")
    path = data.labels.mask_paths[0]
    labels = Image.open(path)
    values = np.array(labels)
    before = data.objects(0)
    void = values.copy()
    one = data.numbers.values(0) == 1
    void[one & (np.cumsum(one).reshape(one.shape) > 3)] = 255
    mostly = Image.fromarray(void)
    mostly.putpalette(labels.getpalette())
    mostly.save(path)
    assert data.objects(0).labels.tolist() == before.labels.tolist(), "void says nothing about the class"
    values[values != 255] = 0
    empty = Image.fromarray(values)
    empty.putpalette(labels.getpalette())
    empty.save(path)
    with pytest.raises(DataError, match=r"SegmentationObject.*object 1 lies on background of SegmentationClass"):
        data.check(20)
    data.numbers.mask_paths[0].unlink()
    with pytest.raises(DataError, match=r"missing\..*\n.*SegmentationObject"):
        data.check(20)


def test_cityscapes_objects_and_groups(roots):
    module = build("cityscapes", roots)
    names = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
    assert module.classes == names
    crowds = 0
    for split, count in (("train", 13), ("val", 5)):
        data = module.dataset(split)
        data.check(8)
        scenes = {
            f"{i:06d}": scene
            for i, scene in enumerate([*split_scenes("train", 13, 0, SIZE), *split_scenes("val", 5, 0, SIZE)])
        }
        assert len(data) == count
        for index, name in enumerate(data.ids):
            scene, objects = scenes[name.split("_")[1]], data.objects(index)
            visible = [mask & (scene.mask != 255) for mask in scene.object_masks()]
            single = [m.sum() for m, one in zip(visible, scene.objects, strict=True) if not one.crowd and m.any()]
            assert sorted(single) == sorted(objects.area[~objects.iscrowd])
            groups = {one.label for m, one in zip(visible, scene.objects, strict=True) if one.crowd and m.any()}
            assert objects.iscrowd.sum() == len(groups), "the crowds of one class are one region"
            crowds += len(groups)
    assert crowds, "the test sees a crowd"


def test_cityscapes_values_that_are_none(roots, tmp_path):
    root = write_cityscapes(tmp_path / "c", {part: split_scenes(part, 1, 0, SIZE) for part in ("train", "val")})
    data = CityscapesInstances(str(root)).dataset("val")
    path = data.parts[0].mask_paths[0]
    values = np.array(Image.open(path)).astype(np.uint16)
    values[0], values[1, :9], values[2, :9] = 26007, 0xFFFF, 26
    Image.fromarray(values).save(path)
    data.check(8)
    objects = data.objects(0)
    car = objects[(objects.labels == 2) & (objects.boxes[:, 1] <= 2)]
    assert car.area.tolist() == [9, 72] and car.iscrowd.tolist() == [True, False]
    values[3] = 40123
    Image.fromarray(values).save(path)
    with pytest.raises(DataError, match="values 40 in the masks"):
        data.check(8)


def test_shapes_as_their_generator_draws_them():
    data = ShapesInstances(13, 5, 5).dataset("train")
    for index, scene in enumerate(split_scenes("train", 13)):
        objects = data.objects(index)
        whole = Geometry((160, 192), (0, 0, 160, 192), (0, 0, 160, 192))
        assert np.array_equal(objects.masks(whole), scene.object_masks())
        assert objects.labels.tolist() == [THINGS.index(one.label) for one in scene.objects]
        assert objects.iscrowd.tolist() == [one.crowd for one in scene.objects]
    assert data.size(0) == (160, 192) and "wire" not in ShapesInstances.classes


def test_objects_of_a_map():
    numbers = np.zeros((6, 7), np.uint16)
    numbers[1:3, 2:5], numbers[4, 0], numbers[4, 6], numbers[0] = 300, 5, 5, 9
    found = objects_of(numbers, {300: (2, False), 5: (0, True), 77: (1, False)})
    assert found.boxes.tolist() == [[0, 4, 7, 5], [2, 1, 5, 3]] and found.area.tolist() == [2, 6]
    assert found.labels.tolist() == [0, 2] and found.iscrowd.tolist() == [True, False]
    assert len(objects_of(numbers, {})) == 0


# ---------------------------------------------------------------- geometry


def blob(rng, height, width):
    """A polygon with many corners, and the bitmap and the RLE of the same pixels."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, 40))
    radius = rng.uniform(0.5, 1, 40) * min(height, width) / 3
    points = np.stack([width / 2 + radius * np.cos(angle), height / 2 + radius * np.sin(angle)], 1)
    dense = mask_tools.decode(mask_tools.merge(mask_tools.frPyObjects([points.ravel().tolist()], height, width)))
    rle = mask_tools.encode(np.asfortranarray(dense))
    return points, dense.astype(bool), [[points.ravel()], Bitmap(3, 4, dense[3:, 4:].astype(bool)), rle]


def many(outlines):
    count = len(outlines)
    return Objects(
        np.zeros((count, 4), np.float32), np.zeros(count, int), np.zeros(count, bool), np.zeros(count), outlines
    )


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_masks_go_where_the_pixels_go(flip, scale):
    rng = np.random.default_rng(1)
    points, dense, outlines = blob(rng, 60, 80)
    target = (round(30 * scale), round(40 * scale))
    geometry = Geometry((90, 100), (14, 22, 30, 40), (5, 7, *target), flip)
    masks = many(outlines).masks(geometry)
    nearest = geometry.masks(dense[None])[0]
    ties = 4 if scale == 1.7 else 0  # 30 to 51 pixels: some centres lie on a border, and OpenCV counts in integers
    assert (masks[1] != nearest).sum() <= ties and np.array_equal(masks[1], masks[2])
    share = (masks[0] & nearest).sum() / (masks[0] | nearest).sum()
    assert share > (0.995 if scale == 1 else 0.9), "the polygon is filled at the new size"
    outside = np.ones((90, 100), bool)
    outside[5 : 5 + target[0], 7 : 7 + target[1]] = False
    assert not masks[:, outside].any()
    box = geometry.boxes(np.concatenate([points.min(0), points.max(0)])[None])[0]
    assert np.abs(boxes_of(masks)[0] - box).max() <= 1


def test_polygons_outside_of_the_crop_and_turned_outputs():
    outline = [np.array([1.0, 1, 9, 1, 9, 9, 1, 9])]
    objects = many([outline])
    assert not objects.masks(Geometry((20, 20), (30, 30, 20, 20), (0, 0, 20, 20))).any()
    with pytest.raises(ValueError, match="turned"):
        objects.masks(Geometry((20, 20), (0, 0, 20, 20), (0, 0, 20, 20), angle=3.0))


def test_objects_can_be_chosen():
    _, _, outlines = blob(np.random.default_rng(0), 20, 20)
    objects = many(outlines)
    objects.labels[:] = 0, 1, 2
    assert objects[np.array([False, True, True])].labels.tolist() == [1, 2]
    assert objects[np.array([2])].segmentations[0] is outlines[2] and len(objects[np.zeros(3, bool)]) == 0
    rles = objects.rles((20, 20))
    assert len({rle["counts"] for rle in rles}) == 1, "a polygon, its bitmap and its RLE are the same pixels"


@pytest.mark.fidelity
def test_resize_as_torchvision_does():
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    draw = InstanceTransform(short_side=800, long_side=1333).draw
    reference = GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3, size_divisible=1)
    for size in ((480, 640), (640, 480), (333, 500), (200, 900), (1200, 1600)):
        geometry = draw(rng_for(0, 0, 0), size)
        images, _ = reference([torch.zeros(3, *size)])
        assert np.abs(np.subtract(geometry.size, images.image_sizes[0])).max() <= 1, "it cuts where we round"
        assert geometry.source == (0, 0, *size) and geometry.target == (0, 0, *geometry.size)


def test_sizes_are_drawn_from_the_whole_range():
    rng = np.random.default_rng(0)
    sides = InstanceTransform([10, 20, 30], 60, flip=0.25)
    drawn = [sides.draw(rng, (100, 150)) for _ in range(400)]
    counts = [sum(min(one.size) == side for one in drawn) for side in (10, 20, 30)]
    assert min(counts) > 90 and sum(counts) == 400 and 60 < sum(one.flip for one in drawn) < 140
    assert InstanceTransform(100, 120).draw(rng, (100, 400)).size == (30, 120), "the longer side limits"
    large = InstanceTransform(crop=(64, 96), scale=(0.1, 2.0))
    factors = []
    for _ in range(400):
        one = large.draw(rng, (50, 100))
        assert one.size == (64, 96) and one.target[:2] == (0, 0)
        factors.append(one.target[3] / one.source[3] / 0.96)
        assert one.source[0] + one.source[2] <= 50 and one.source[1] + one.source[3] <= 100
    assert min(factors) < 0.15 and max(factors) > 1.9 and abs(np.mean(factors) - 1.05) < 0.1


def test_shrunk_images_are_averaged():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    geometry = InstanceTransform(16, 16).draw(rng_for(0, 0, 0), (128, 128))
    image = geometry.image(noise)
    expected = noise.reshape(16, 8, 16, 8, 3).mean((1, 3))
    assert np.abs((image[:, ::-1] if geometry.flip else image) - expected).max() <= 1


def test_wrong_options():
    for options, words in (
        ({"short_side": []}, "short_side is"),
        ({"short_side": 800, "long_side": 700}, "at least short_side, 800"),
        ({"flip": 2}, "flip is 2"),
        ({"copy_paste": 0.5}, "crop is null"),
        ({"scale": (0.1, 2)}, "crop is null"),
        ({"copy_paste": 0.5, "crop": 64}, "scale is null"),
        ({"scale": (2, 1), "crop": 64}, "0 < low <= high"),
        ({"jitter": 1}, "jitter is 1"),
        ({"crop": 0}, "crop is"),
    ):
        with pytest.raises(ValueError, match=words):
            InstanceTransform(**options)


# ---------------------------------------------------------------- copy-paste and cropping


def squares(*boxes, crowd=(), colour=0, size=(20, 20)):
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    iscrowd = np.isin(np.arange(len(boxes)), crowd)
    image = np.full((*size, 3), colour, np.uint8)
    return Sample(image, np.array(boxes, np.float32).reshape(-1, 4), np.arange(len(boxes)), masks, iscrowd)


def test_pasted_objects_hide_what_is_below():
    below = squares((0, 0, 10, 10), (12, 12, 15, 15), (0, 15, 5, 20), colour=10)
    above = squares((5, 0, 10, 10), (11, 11, 16, 16), colour=200)
    seen = set()
    for seed in range(40):
        result = paste(below, above, np.random.default_rng(seed))
        count = len(result.labels)
        assert np.array_equal(result.image[..., 0] == 200, result.masks[result.labels.size - _pasted(result) :].any(0))
        if _pasted(result) == 2:
            assert result.labels.tolist() == [0, 2, 0, 1], "the hidden one is gone"
            assert result.boxes.tolist() == [[0, 0, 5, 10], [0, 15, 5, 20], [5, 0, 10, 10], [11, 11, 16, 16]]
            assert result.masks.sum((1, 2)).tolist() == [50, 25, 50, 25]
        seen.add((count, _pasted(result)))
    assert {pasted for _, pasted in seen} == {0, 1, 2}
    assert below.image.max() == 10 and below.masks.sum() == 134, "the inputs stay as they were"


def _pasted(result):
    return {0: 0, 25: 1, 50: 1, 75: 2}[int((result.image[..., 0] == 200).sum())]


def test_crowds_are_not_pasted():
    below, above = squares((0, 0, 10, 10)), squares((5, 0, 10, 10), crowd=[0], colour=9)
    assert all(paste(below, above, np.random.default_rng(seed)) is below for seed in range(10))


class One(InstanceDataset):
    """One image with a triangle, whose box a crop makes smaller than clipping would, and a broken box."""

    ids = ("a",)

    def image(self, index):
        return np.zeros((40, 40, 3), np.uint8)

    def objects(self, index):
        triangle = [np.array([0.0, 0, 40, 0, 0, 40])]
        boxes = np.array([[0, 0, 40, 40], [5, 5, 5, 9], [1, 1, 3, 3]], np.float32)
        dot = [np.array([1.1, 1.1, 1.2, 1.1, 1.2, 1.2])]
        return Objects(boxes, np.arange(3), np.zeros(3, bool), np.ones(3), [triangle, triangle, dot])


def test_boxes_follow_the_cut_masks_and_degenerate_ones_go():
    whole = InstanceTransform(40, 40, flip=0).sample(One(), 0, rng_for(0, 0, 0))
    assert whole.labels.tolist() == [0], "no width, no pixel"
    transform = InstanceTransform(40, 40, crop=20, flip=0)
    smaller = 0
    for epoch in range(30):
        sample = transform.sample(One(), 0, rng_for(0, epoch, 0))
        assert sample.image.shape == (20, 20, 3) and np.array_equal(sample.boxes, boxes_of(sample.masks))
        smaller += sum((box[2:] < 20).any() for box in sample.boxes)
        assert 2 not in sample.labels
    assert smaller > 5
