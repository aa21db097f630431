"""The generated scenes: reproducible, consistent, and difficult in the ways they claim."""

import hashlib
import subprocess
import sys

import cv2
import numpy as np
import pytest

from seglight.data.scenes import (
    CLASSES,
    FIRST_INDEX,
    MOON,
    PALETTE,
    SUN,
    THINGS,
    VOID,
    WIRE,
    scene,
    split_scenes,
)
from seglight.data.shapes import Shapes


@pytest.fixture(scope="module")
def scenes():
    return [scene(0, index) for index in range(200)]


def digest(one):
    return hashlib.sha256(b"".join(a.tobytes() for a in (one.image, one.mask, one.instances))).hexdigest()[:16]


# ---------------------------------------------------------------- reproducible


def test_pixels_are_the_same_everywhere():
    assert digest(scene(0, 0)) == "75ef5732b27fc824"
    assert digest(scene(7, 5, (97, 131))) == "dad0d3482088831d"
    assert digest(scene(1, 1 << 24)) == "6c2f73e62f0e1c1f"


def test_a_scene_does_not_depend_on_what_was_drawn_before():
    alone = digest(scene(3, 8))
    np.random.seed(5)
    scene(3, 7, (60, 200))
    assert digest(scene(3, 8)) == alone
    assert digest(scene(3, 9)) != alone
    assert digest(scene(4, 8)) != alone
    masks = {scene(3, index, (64, 64)).mask.tobytes() for index in range(32)}
    assert len(masks) >= 30  # 2 of them are empty


def test_splits_share_no_scene_and_stay_when_another_grows():
    small, large = Shapes(train_size=3, val_size=4, test_size=4), Shapes(train_size=30, val_size=4, test_size=4)
    read = {split: [large.dataset(split).read(i)[0].tobytes() for i in range(4)] for split in ("train", "val", "test")}
    assert len({image for images in read.values() for image in images}) == 12
    assert small.dataset("val").read(3)[0].tobytes() == read["val"][3]
    starts = sorted(FIRST_INDEX.values())
    assert min(np.diff(starts)) == 1 << 24
    assert all(start % 16 == 0 for start in starts)  # which scenes are empty is the same in every split
    for split in FIRST_INDEX:
        assert [one.image.tobytes() for one in split_scenes(split, 2)] == read[split][:2]
    with pytest.raises(ValueError, match="train_size"):
        Shapes(train_size=(1 << 24) + 1)


@pytest.mark.parametrize("size", [(48, 48), (61, 200), (300, 90)])
def test_any_size(size):
    for index in range(6):
        one = scene(2, index, size)
        assert one.image.shape == (*size, 3)
        assert one.mask.shape == one.instances.shape == size
        assert (one.image.dtype, one.mask.dtype, one.instances.dtype) == (np.uint8, np.uint8, np.int32)
        assert one.image.flags.c_contiguous


@pytest.mark.parametrize("arguments", [(-1, 0), (0, -1), (0, 0, (47, 100))])
def test_impossible_requests(arguments):
    with pytest.raises(ValueError, match=r"must be 0 or more|at least 48"):
        scene(*arguments)


def test_a_crop_of_nothing_is_not_the_whole_scene():
    assert Shapes(image_size=(64, 80)).transform.crop == (64, 80)
    with pytest.raises(ValueError, match=r"crop is \(0, 0\)"):
        Shapes(crop=0)


# ---------------------------------------------------------------- consistent


def test_masks_and_objects_agree(scenes):
    for one in scenes:
        assert set(np.unique(one.mask).tolist()) <= {*range(len(CLASSES)), VOID}
        assert one.instances.max(initial=0) == len(one.objects)
        inside = one.instances > 0
        labels = np.array([0] + [thing.label for thing in one.objects])[one.instances]
        known = one.mask != VOID
        assert (one.mask == labels)[inside & known].all()
        assert not np.isin(one.mask[~inside], THINGS).any()
        for thing, mask in zip(one.objects, one.object_masks(), strict=True):
            ys, xs = np.nonzero(mask)
            assert thing.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert thing.area == mask.sum()
            assert thing.label in THINGS
            assert 0.39 < thing.visible <= 1


def test_borders_are_ignored(scenes):
    share = np.mean([(one.mask == VOID).mean() for one in scenes])
    assert 0.03 < share < 0.1
    for one in scenes:
        mask = one.mask.astype(int)
        for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask[1:, 1:], mask[:-1, :-1])):
            assert not ((a != b) & (a != VOID) & (b != VOID)).any(), "two classes touch without a border"
        painted = (np.isin(mask, range(1, len(CLASSES))) | (one.instances > 0)).astype(np.uint8)
        # 2 pixels, and 1 more where the border of something else covers the edge of a wire
        near = cv2.dilate(painted, np.ones((7, 7), np.uint8))
        assert not ((mask == VOID) & (near == 0)).any(), "a wide border"


def test_instance_targets():
    data = Shapes(train_size=12).dataset("train")
    for index in range(12):
        image, target = data.read_instances(index)
        count = len(target["labels"])
        assert (target["boxes"].shape, target["masks"].shape) == ((count, 4), (count, *image.shape[:2]))
        dtypes = {"boxes": "float32", "labels": "int64", "masks": "bool", "iscrowd": "bool", "area": "float32"}
        assert {name: str(values.dtype) for name, values in target.items()} == dtypes
        assert (target["area"] == target["masks"].sum((1, 2))).all()
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        semantic = data.read(index)[1]
        for label, mask in zip(target["labels"], target["masks"], strict=True):
            name = CLASSES[semantic[mask & (semantic != VOID)][0]]
            assert Shapes.thing_classes[label] == name
    assert count == 0  # scene 11 is one of the empty ones


# ---------------------------------------------------------------- difficult


def test_every_class_is_frequent_and_some_scenes_are_empty(scenes):
    present = np.mean([[(one.mask == label).any() for label in range(8)] for one in scenes], axis=0)
    assert (present > 0.25).all()
    pixels = np.sum([np.bincount(one.mask.ravel(), minlength=256)[:8] for one in scenes], axis=0)
    assert (pixels / pixels.sum() > 0.005).all()
    assert pixels[0] / pixels.sum() < 0.9
    empty = [index for index, one in enumerate(scenes) if not one.mask.any()]
    assert set(range(11, 200, 16)) <= set(empty)
    assert sum(any(thing.crowd for thing in one.objects) for one in scenes) > 10


def test_sizes_span_a_factor_of_ten(scenes):
    sides = [max(o.box[2] - o.box[0], o.box[3] - o.box[1]) for one in scenes for o in one.objects if o.visible == 1]
    assert min(sides) <= 8
    assert max(sides) >= 80
    assert 0.2 < np.mean(np.array(sides) < 20) < 0.7


def test_objects_hide_each_other(scenes):
    hidden = [any(thing.visible < 0.95 for thing in one.objects) for one in scenes]
    assert np.mean(hidden) > 0.4


def test_wires_are_thin(scenes):
    pixels = left = 0
    for one in scenes:
        wire = (one.mask == WIRE).astype(np.uint8)
        pixels += wire.sum()
        left += cv2.morphologyEx(wire, cv2.MORPH_OPEN, np.ones((4, 4), np.uint8)).sum()
    assert pixels > 20_000
    assert left < 0.01 * pixels  # where two of them cross


@pytest.mark.parametrize(("stride", "most"), [(8, 0.86), (32, 0.45)])
def test_coarse_predictions_cannot_be_good(scenes, stride, most):
    """The ground truth itself, seen at the resolution of a network's last layer and interpolated."""
    table = np.zeros((8, 8), int)
    for one in scenes[:100]:
        size, known = one.mask.shape[::-1], one.mask != VOID
        small = size[0] // stride, size[1] // stride
        planes = [(one.mask == label).astype(np.float32) for label in range(8)]
        coarse = [cv2.resize(cv2.resize(p, small, interpolation=cv2.INTER_AREA), size) for p in planes]
        table += np.bincount(one.mask[known] * 8 + np.argmax(coarse, 0)[known], minlength=64).reshape(8, 8)
    hits = np.diag(table)
    scores = hits / (table.sum(0) + table.sum(1) - hits)
    assert scores.mean() < most
    assert scores[WIRE] < 0.1


def test_colour_does_not_tell_the_class(scenes):
    """The nearest object in colour and contrast is hardly more often of the same class than any other."""
    colours, labels = [], []
    for one in scenes:
        for thing, mask in zip(one.objects, one.object_masks(), strict=True):
            pixels = one.image[mask]
            colours.append([*pixels.mean(0), *pixels.std(0)])
            labels.append(thing.label)
    colours, labels = np.array(colours), np.array(labels)
    half = len(labels) // 2
    distance = ((colours[:half, None] - colours[None, half:]) ** 2).sum(-1)
    hits = (labels[half:][distance.argmin(1)] == labels[:half]).mean()
    chance = sum((labels == label).mean() ** 2 for label in THINGS)
    assert hits < chance + 0.08


def test_only_the_skyline_tells_sun_from_moon():
    nearest = []
    for index in range(200):
        day, night = (scene(5, index, (96, 112), night=night) for night in (False, True))
        assert (day.night, night.night) == (False, True)
        differs = (day.image != night.image).any(-1)
        assert differs.mean() > 0.05, "the time of day is hardly visible"
        assert not differs[:32].any()
        assert np.array_equal(np.where(day.mask == SUN, MOON, day.mask), night.mask)
        assert np.array_equal(day.instances, night.instances)
        discs = day.mask == SUN
        if discs.any():
            away = cv2.distanceTransform((~differs).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            nearest.append(away[discs].min())
    assert len(nearest) > 120
    assert min(nearest) > 96 / 8 - 2, "a disc close to the skyline"


def test_forcing_the_time_of_day_agrees_with_the_seed():
    scenes = [scene(0, index, (64, 64)) for index in range(100)]
    assert 35 < sum(one.night for one in scenes) < 65
    for index, one in enumerate(scenes[:10]):
        assert digest(scene(0, index, (64, 64), night=one.night)) == digest(one)
        assert not (one.mask == (SUN if one.night else MOON)).any()


# ---------------------------------------------------------------- the datamodule


def test_batches_of_whole_scenes_and_of_crops():
    data = Shapes(train_size=6, val_size=3, image_size=(64, 80), batch_size=2, workers=0)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 64, 80)
    assert batch["mask"].shape == (2, 64, 80)
    whole = list(data.val_dataloader())
    assert [batch["image_id"] for batch in whole] == [["val_000000"], ["val_000001"], ["val_000002"]]
    assert whole[0]["mask"][0].shape == (64, 80)
    crops = Shapes(train_size=6, image_size=(64, 80), crop=32, batch_size=2, workers=0)
    assert next(iter(crops.train_dataloader()))["image"].shape == (2, 3, 32, 32)


def test_classes_and_palette():
    assert Shapes().num_classes == len(CLASSES) == len(PALETTE) == len(set(PALETTE)) == 8
    assert Shapes.thing_classes == ("square", "triangle", "star", "ring", "sun", "moon")


def test_fingerprint_names_the_scenes():
    prints = [Shapes(train_size=2, scene_seed=seed).dataset("train").fingerprint() for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert prints[0]["samples"] == 2


@pytest.mark.parametrize(
    "options", [{"train_size": 0}, {"val_size": -1}, {"image_size": (32, 100)}, {"scene_seed": -3}]
)
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=f"data.{next(iter(options))}"):
        Shapes(**options)


def test_an_index_beyond_the_split_is_an_error():
    with pytest.raises(IndexError, match="holds 2"):
        Shapes(train_size=2).dataset("train").read(2)


def test_the_generator_needs_no_torch():
    code = "import sys, seglight.data.scenes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_simple_scenes_change_colours_and_nothing_else():
    for index in range(12):
        hard, easy = scene(0, index), scene(0, index, simple=True)
        assert np.array_equal(hard.mask, easy.mask) and np.array_equal(hard.instances, easy.instances)
        assert not np.array_equal(hard.image, easy.image)
