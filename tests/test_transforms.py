"""Geometry against a slow reference; image, mask, boxes and instance masks must stay together."""

import re

import cv2
import numpy as np
import pytest
import torch

from seglight.data.base import SemanticDataModule
from seglight.data.dataset import SemanticDataset
from seglight.data.findings import DataError
from seglight.data.transforms import (
    PAD_COLOUR,
    Geometry,
    TrainTransform,
    _cubic,
    eval_batch,
    rng_for,
    train_batch,
)
from seglight.types import IGNORE_INDEX

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (61, 83, 3), dtype=np.uint8)
MASK = RNG.integers(0, 21, (61, 83), dtype=np.uint8)

PLAIN = [
    Geometry((40, 50), (3, 5, 40, 50), (0, 0, 40, 50)),
    Geometry((40, 50), (3, 5, 40, 50), (0, 0, 40, 50), flip=True),
    Geometry((40, 50), (7, 11, 21, 26), (0, 0, 40, 50)),
    Geometry((40, 50), (7, 11, 21, 26), (0, 0, 40, 50), flip=True),
    Geometry((90, 31), (0, 20, 61, 17), (11, 0, 70, 31), flip=True),
    Geometry((64, 64), (0, 0, 61, 83), (20, 9, 31, 42)),
    Geometry((64, 65), (0, 0, 61, 83), (30, 20, 1, 1)),
    Geometry((33, 29), (5, 6, 1, 1), (0, 0, 33, 29)),
]
BEND = np.random.default_rng(3).normal(0, 6, (2, 3, 3))
BENT = [
    Geometry((40, 50), (7, 11, 21, 26), (0, 0, 40, 50), angle=25),
    Geometry((40, 50), (7, 11, 21, 26), (0, 0, 40, 50), flip=True, elastic=BEND),
    Geometry((64, 64), (0, 0, 61, 83), (20, 9, 31, 42), flip=True, angle=-70, elastic=BEND),
]


def source_points(geometry):
    """x, y in the source of every output pixel centre, one pixel at a time and straight from the definition."""
    (h, w), (top, left, height, width) = geometry.size, geometry.source
    to_top, to_left, to_height, to_width = geometry.target
    angle, points = np.radians(geometry.angle), np.zeros((2, h, w))
    bend = (
        [np.zeros((h, w))] * 2 if geometry.elastic is None else [_cubic(h) @ g @ _cubic(w).T for g in geometry.elastic]
    )
    for row in range(h):
        for column in range(w):
            x, y = column + 0.5 - w / 2, row + 0.5 - h / 2
            x, y = np.cos(angle) * x - np.sin(angle) * y + w / 2, np.sin(angle) * x + np.cos(angle) * y + h / 2
            x, y = x + bend[0][row, column] - to_left, y + bend[1][row, column] - to_top
            x = to_width - x if geometry.flip else x
            points[:, row, column] = x * width / to_width + left, y * height / to_height + top
    return points


def inside_target(geometry):
    top, left, height, width = geometry.target
    inside = np.zeros(geometry.size, bool)
    inside[top : top + height, left : left + width] = True
    return inside


@pytest.mark.parametrize("geometry", PLAIN)
def test_stretching_is_what_the_definition_says(geometry):
    x, y = source_points(geometry)
    top, left, height, width = geometry.source
    inside = inside_target(geometry)
    column = np.clip(np.floor(x).astype(int), left, left + width - 1)
    row = np.clip(np.floor(y).astype(int), top, top + height - 1)
    tie = (np.abs(x - np.rint(x)) < 1e-6) | (
        np.abs(y - np.rint(y)) < 1e-6
    )  # on the edge of two pixels: either is right
    np.testing.assert_array_equal(geometry.mask(MASK)[inside & ~tie], MASK[row, column][inside & ~tie])
    assert (geometry.mask(MASK)[~inside] == IGNORE_INDEX).all()

    part = IMAGE[top : top + height, left : left + width].astype(float)
    u, v = np.clip(x - left - 0.5, 0, width - 1), np.clip(y - top - 0.5, 0, height - 1)
    c, r = np.floor(u).astype(int), np.floor(v).astype(int)
    c2, r2 = np.minimum(c + 1, width - 1), np.minimum(r + 1, height - 1)
    a, b = (u - c)[..., None], (v - r)[..., None]
    expected = (part[r, c] * (1 - a) + part[r, c2] * a) * (1 - b) + (part[r2, c] * (1 - a) + part[r2, c2] * a) * b
    assert np.abs(geometry.image(IMAGE)[inside] - expected[inside]).max() <= 1.0  # OpenCV counts in 1/2048 and rounds
    assert (geometry.image(IMAGE)[~inside] == PAD_COLOUR).all()


def test_stretching_equals_an_affine_warp_away_from_the_edge():
    """Against OpenCV's other implementation, which sees the pixels around the rectangle too."""
    geometry = Geometry((40, 50), (7, 11, 20, 25), (0, 0, 40, 50), flip=True)
    smooth = cv2.GaussianBlur(IMAGE, (0, 0), 3)
    scale = 0.5
    matrix = np.array([[-scale, 0, 11 + 25 - 0.5 * scale - 0.5], [0, scale, 7 + 0.5 * scale - 0.5]])
    warped = cv2.warpAffine(smooth, matrix, (50, 40), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    assert np.abs(geometry.image(smooth)[2:-2, 2:-2].astype(int) - warped[2:-2, 2:-2]).max() <= 2


@pytest.mark.parametrize("geometry", BENT)
def test_bending_is_what_the_definition_says(geometry):
    x, y = source_points(geometry)
    map_x, map_y = geometry._map
    np.testing.assert_allclose(map_x + 0.5, x, atol=1e-3)
    np.testing.assert_allclose(map_y + 0.5, y, atol=1e-3)
    clear = (np.abs(x - np.rint(x)) > 0.05) & (np.abs(y - np.rint(y)) > 0.05)
    inside = (x > 0) & (x < 83) & (y > 0) & (y < 61)
    expected = np.full(geometry.size, IGNORE_INDEX)
    expected[inside] = MASK[y[inside].astype(int), x[inside].astype(int)]
    np.testing.assert_array_equal(geometry.mask(MASK)[clear], expected[clear])
    far = (x < -1) | (x > 84) | (y < -1) | (y > 62)
    assert (geometry.image(IMAGE)[far] == PAD_COLOUR).all()
    assert far.any() or geometry.target[2:] == geometry.size


def test_turning_by_90_degrees_is_counter_clockwise():
    square = np.ascontiguousarray(IMAGE[:60, :60])
    turned = Geometry((60, 60), (0, 0, 60, 60), (0, 0, 60, 60), angle=90)
    np.testing.assert_array_equal(turned.image(square), np.rot90(square))
    np.testing.assert_array_equal(turned.mask(MASK[:60, :60].copy()), np.rot90(MASK[:60, :60]))


@pytest.mark.parametrize("geometry", PLAIN[:6] + BENT)
@pytest.mark.parametrize("axis", [0, 1])
def test_image_and_mask_stay_aligned(geometry, axis):
    """Both show the coordinate itself, so any shift of one against the other, by parts of a pixel, is visible."""
    ramp = np.broadcast_to(np.expand_dims(3 * np.arange(MASK.shape[axis]), 1 - axis), MASK.shape).astype(np.uint8)
    image, mask = geometry.image(np.repeat(ramp[..., None], 3, 2)), geometry.mask(ramp)
    kept = cv2.erode((mask != IGNORE_INDEX).astype(np.uint8), np.ones((3, 3)), borderValue=0) > 0
    difference = image[kept][:, 0].astype(float) - mask[kept]
    assert np.abs(difference).max() <= 2.5  # half a source pixel is 1.5
    assert abs(difference.mean()) < 0.35


@pytest.mark.parametrize("geometry", PLAIN + BENT)
def test_colours_and_labels_tell_the_same_story(geometry):
    """Regions of one colour: away from their borders every output pixel has the colour of its label."""
    labels = np.kron(np.random.default_rng(4).integers(0, 7, (6, 7)), np.ones((11, 12))).astype(np.uint8)[:61, :83]
    colours = np.arange(21, dtype=np.uint8).reshape(7, 3) * 9 + 30
    image, mask = geometry.image(np.ascontiguousarray(colours[labels])), geometry.mask(labels)
    flat = cv2.dilate(mask, np.ones((5, 5))) == cv2.erode(mask, np.ones((5, 5)))
    pure = cv2.dilate(labels, np.ones((3, 3))) == cv2.erode(labels, np.ones((3, 3)))  # nothing else to blend with
    flat &= (geometry.mask(pure.astype(np.uint8)) == 1) | (mask == IGNORE_INDEX)
    assert flat.mean() > 0.5
    shown = np.where((mask == IGNORE_INDEX)[..., None], PAD_COLOUR, colours[np.minimum(mask, 6)])
    assert np.abs(image[flat].astype(int) - shown[flat]).max(initial=0) <= 1


@pytest.mark.parametrize("geometry", PLAIN[:6] + BENT)
def test_boxes_and_instance_masks_move_with_the_image(geometry):
    boxes = np.array([[10, 8, 40, 30], [20, 20, 60, 55], [0, 0, 83, 61], [80, 58, 83, 61]], np.float32)
    masks = np.zeros((4, 61, 83), bool)
    for (x1, y1, x2, y2), mask in zip(boxes.astype(int), masks, strict=True):
        mask[y1:y2, x1:x2] = True
    moved, out = geometry.boxes(boxes), geometry.masks(masks)
    assert moved.dtype == np.float32 and out.dtype == bool and out.shape == (4, *geometry.size)
    for box, mask in zip(moved, out, strict=True):
        assert 0 <= box[0] <= box[2] <= geometry.size[1] and 0 <= box[1] <= box[3] <= geometry.size[0]
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        if not len(columns):
            assert min(box[2] - box[0], box[3] - box[1]) <= 1
            continue
        around = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert np.abs(box - around).max() <= 0.51 if geometry in PLAIN else np.abs(box - around).max() <= 1
    label = geometry.mask(masks[1].astype(np.uint8))
    np.testing.assert_array_equal(out[1], label == 1)
    assert geometry.boxes(np.zeros((0, 4))).shape == (0, 4) and geometry.masks(masks[:0]).shape == (0, *geometry.size)


def test_a_box_left_outside_gets_no_area():
    boxes = PLAIN[2].boxes(np.array([[0, 0, 5, 5], [70, 50, 80, 60]]))
    assert ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) == 0).all()


@pytest.mark.parametrize("geometry", PLAIN + BENT)
def test_results_are_written_into_the_batch(geometry):
    batch, labels = np.zeros((3, *geometry.size, 3), np.uint8), np.zeros((3, *geometry.size), np.uint8)
    geometry.image(IMAGE, batch[1])
    geometry.mask(MASK, labels[1])
    np.testing.assert_array_equal(batch[1], geometry.image(IMAGE))
    np.testing.assert_array_equal(labels[1], geometry.mask(MASK))
    assert not batch[[0, 2]].any() and not labels[[0, 2]].any()


@pytest.mark.parametrize("crop", [(16, 24), 64, 200, (1, 300), None])
def test_every_draw_is_inside_image_and_crop(crop):
    transform = TrainTransform(crop, scale=(0.25, 3))
    scales, flips, places = [], [], set()
    for index in range(300):
        rng = rng_for(0, 1, index)
        size = tuple(rng.integers(1, 150, 2).tolist())
        geometry = transform.draw(rng, size)
        for axis in (0, 1):
            start, extent, to, to_extent = (geometry.source[axis], geometry.source[axis + 2], geometry.target[axis],
                                            geometry.target[axis + 2])  # fmt: skip
            assert start >= 0 and extent >= 1 and start + extent <= size[axis]
            assert to >= 0 and to_extent >= 1 and to + to_extent <= geometry.size[axis]
            assert to_extent == geometry.size[axis] or extent == size[axis], "padded although there is more image"
            if min(extent, to_extent) > 40:
                scales.append(to_extent / extent)
        flips.append(geometry.flip)
        places.add(geometry.target[:2])
        assert geometry.mask(np.zeros(size, np.uint8)).shape == geometry.size
    assert 0.4 < np.mean(flips) < 0.6
    assert all(0.24 < scale < 3.1 for scale in scales)
    assert crop != 200 or len(places) > 100, "small images must not always lie in the corner"


def test_scales_are_uniform_and_axes_agree():
    transform = TrainTransform(64, scale=(0.5, 2))
    drawn = [transform.draw(rng_for(0, 0, i), (400, 500)) for i in range(1000)]
    vertical, horizontal = np.array([(g.target[2] / g.source[2], g.target[3] / g.source[3]) for g in drawn]).T
    assert abs(vertical.mean() - 1.25) < 0.05 and vertical.min() < 0.53 and vertical.max() > 1.9
    assert np.abs(vertical / horizontal - 1).max() < 0.02


def test_a_crop_larger_than_the_image_is_padded():
    image, mask = TrainTransform(128, scale=(1, 1), flip=0, jitter=0.4)(IMAGE, MASK, rng_for(0, 0, 0))
    assert image.shape == (128, 128, 3) and (mask != IGNORE_INDEX).sum() == MASK.size
    assert (image[mask == IGNORE_INDEX] == PAD_COLOUR).all(), "colour changes must not reach the padding"
    rows, columns = np.nonzero(mask != IGNORE_INDEX)
    np.testing.assert_array_equal(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], MASK)


def test_colour_changes_are_those_of_their_definition():
    transform = TrainTransform(64, jitter=0.5)
    geometry = Geometry((61, 83), (0, 0, 61, 83), (0, 0, 61, 83))
    seen = []
    for index in range(20):
        factors = 1 + 0.5 * (2 * rng_for(0, 0, index).random(3) - 1)
        matrix = transform.draw_colours(rng_for(0, 0, index))
        grey = IMAGE @ np.array([0.299, 0.587, 0.114])
        mixed = factors[2] * IMAGE + (1 - factors[2]) * grey[..., None]
        expected = factors[0] * (factors[1] * (mixed - 128) + 128)
        got = geometry.image(IMAGE, colours=matrix)
        assert np.abs(np.clip(expected, 0, 255) - got).max() < 1.01
        seen.append(got)
    assert len({image.tobytes() for image in seen}) == 20
    flat = np.repeat(IMAGE[..., :1], 3, 2)
    tinted = geometry.image(flat, colours=matrix)
    assert np.ptp(tinted.astype(int), axis=2).max() <= 1, "a grey image stays grey"
    assert TrainTransform(64).draw_colours(rng_for(0, 0, 0)) is None


def test_elastic_deformation_is_that_of_the_unet_paper():
    """3x3 displacements of the given standard deviation, met exactly at the grid points, bicubic in between."""
    transform = TrainTransform(101, scale=(1, 1), flip=0, elastic=10)
    grids = [transform.draw(rng_for(0, 0, i), (101, 101)) for i in range(200)]
    assert abs(np.std([g.elastic for g in grids]) - 10) < 0.5
    geometry = grids[0]
    shift_x = geometry._map[0] - np.arange(101)[None]
    shift_y = geometry._map[1] - np.arange(101)[:, None]
    np.testing.assert_allclose(shift_x[::50, ::50], geometry.elastic[0], atol=1e-3)
    np.testing.assert_allclose(shift_y[::50, ::50], geometry.elastic[1], atol=1e-3)
    np.testing.assert_allclose(_cubic(9).sum(1), 1, atol=1e-6)
    # Keys' cubic kernel with a = -0.75 (OpenCV and torch): a quarter of the way from the first to the second point
    t, a = 0.5, -0.75
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * (1 + t) ** 3 - 5 * a * (1 + t) ** 2 + 8 * a * (1 + t) - 4 * a
    np.testing.assert_allclose(_cubic(5)[1], [near + far, near, far], atol=1e-6)


class Noise(SemanticDataset):
    def __init__(self, count=6):
        self.ids = [f"n{i}" for i in range(count)]

    def read(self, index):
        rng = np.random.default_rng(index)
        height, width = 30 + 5 * index, 50 - 3 * index
        mask = rng.integers(0, 5, (height, width), dtype=np.uint8)
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), mask


EVERYTHING = {"rotate": 30, "elastic": 4, "jitter": 0.3}


@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_a_sample_depends_on_seed_pass_and_index_alone(options):
    data, transform = Noise(), TrainTransform(32, **options)
    keys = [(3, 1), (0, 5), (3, 2), (2, 1), (3, 1)]
    batch = train_batch(data, keys, transform, seed=7)
    assert batch["image"].shape == (5, 3, 32, 32) and batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["mask"].shape == (5, 32, 32) and batch["mask"].dtype == torch.uint8
    assert batch["image_id"] == ["n1", "n5", "n2", "n1", "n1"]
    assert torch.equal(batch["image"][0], batch["image"][4]) and torch.equal(batch["mask"][0], batch["mask"][4])
    for slot, key in enumerate(keys):
        alone = train_batch(data, [key], transform, seed=7)
        assert torch.equal(alone["image"][0], batch["image"][slot]) and torch.equal(
            alone["mask"][0], batch["mask"][slot]
        )
    others = [((3, 1), 8), ((4, 1), 7), ((2, 1), 7)]
    for key, seed in others:
        assert not torch.equal(train_batch(data, [key], transform, seed)["image"][0], batch["image"][0])


def test_neighbouring_streams_share_nothing():
    drawn = [
        rng_for(seed, epoch, index).random(4).tobytes()
        for seed in (0, 1, 2**40)
        for epoch in range(4)
        for index in range(50)
    ]
    assert len(set(drawn)) == len(drawn)
    values = np.array([rng_for(0, 0, index).random() for index in range(2000)])
    assert abs(values.mean() - 0.5) < 0.03 and abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.06
    rng_for(-1, 0, 0).random()


class Module(SemanticDataModule):
    classes, palette = tuple("abcde"), ((0, 0, 0),) * 5

    def dataset(self, split):
        return Noise()


def test_workers_do_not_change_batches():
    batches = []
    for workers in (0, 2):
        module = Module(batch_size=4, crop=24, workers=workers, **EVERYTHING)
        loader = module.train_dataloader()
        loader.sampler.set_epoch(1)
        batches.append(list(loader))
    assert len(batches[0]) == len(batches[1]) > 0
    for one, two in zip(*batches, strict=True):
        assert torch.equal(one["image"], two["image"]) and torch.equal(one["mask"], two["mask"])
        assert two["image"].is_contiguous(memory_format=torch.channels_last)


def test_evaluation_keeps_the_original_size():
    data = Noise()
    batch = eval_batch(data, [2, 0])
    assert batch["image_id"] == ["n2", "n0"]
    for index, image, mask in zip([2, 0], batch["image"], batch["mask"], strict=True):
        expected = data.read(index)
        np.testing.assert_array_equal(image.permute(1, 2, 0), expected[0])
        np.testing.assert_array_equal(mask, expected[1])


def test_whole_images_without_a_crop():
    transform = TrainTransform(None, scale=(1, 1), flip=0)
    batch = train_batch(Noise(), [(0, 3)], transform, 0)
    np.testing.assert_array_equal(batch["image"][0].permute(1, 2, 0), Noise().read(3)[0])
    np.testing.assert_array_equal(batch["mask"][0], Noise().read(3)[1])
    scaled = train_batch(Noise(), [(0, 3)], TrainTransform(None, scale=(2, 2)), 0)
    assert scaled["image"].shape == (1, 3, 90, 82) and scaled["mask"].shape == (1, 90, 82)
    with pytest.raises(ValueError, match="batch size of 1"):
        train_batch(Noise(), [(0, 3), (0, 4)], transform, 0)


@pytest.mark.parametrize("options, words", [
    ({"crop": 0}, "crop is"), ({"crop": (4, 5, 6)}, "crop is"), ({"scale": (2, 1)}, "low <= high"),
    ({"scale": (0, 1)}, "0 < low"), ({"flip": 1.5}, "flip is 1.5"), ({"rotate": -3}, "rotate is -3"),
    ({"elastic": -1}, "elastic"), ({"jitter": 1}, "jitter is 1"),
])  # fmt: skip
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TrainTransform(**options)


@pytest.mark.slow
def test_the_benchmark_runs(capsys):
    from seglight.benchmarks.data import main

    assert main(["--only", "voc", "--rounds", "1", "--images", "8"]) == 0
    printed = capsys.readouterr().out
    assert "images/s: seglight" in printed
    assert re.search(r"8 images of (8[5-9]|9\d) kB", printed), "files as large as VOC's"


@pytest.mark.parametrize("axis", [0, 1])
def test_sides_that_are_too_long_for_opencv(axis):
    mask = np.zeros((4, 40_000), np.uint8)
    mask[:, 100:150] = 7
    mask = np.ascontiguousarray(np.moveaxis(mask, axis, 0))
    image = np.repeat(mask[..., None], 3, 2)
    width, height = (40, 20)[:: 1 - 2 * axis]
    begin = (0, 90)[:: 1 - 2 * axis]
    geometry = Geometry((height, width), (*begin, height, width), (0, 0, height, width), angle=5.0, pad=(255,) * 3)
    short = np.ascontiguousarray(mask[:200, :200])
    assert np.array_equal(geometry.mask(mask), geometry.mask(short)) and 7 in geometry.mask(mask)
    assert np.abs(geometry.image(image).astype(int) - geometry.image(image[:200, :200]).astype(int)).max() <= 1
    whole = TrainTransform(None, (1, 1), rotate=5.0)
    with pytest.raises(DataError, match=r"40,000 pixels on a side, and OpenCV takes up to 32,766.*tiles"):
        whole(image, mask, rng_for(0, 0, 0))
