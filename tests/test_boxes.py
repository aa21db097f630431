"""Boxes of objects and the crops around them, on scenes small enough to count."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import Blocks

from seglight.data.base import SemanticDataModule
from seglight.data.boxes import BoxTransform, extend, load_proposals, objects, overlap, save_proposals
from seglight.data.dataset import SemanticDataset
from seglight.data.transforms import rng_for, train_batch

MASK = np.zeros((100, 120), np.uint8)
MASK[10:30, 20:60] = 2
MASK[70:95, 90:118] = 2
MASK[40:60, 30:45] = 1
MASK[39, 30:45] = 255
MASK[80:85, 10:14] = 1  # a splinter
BOXES = [[30, 40, 45, 60], [20, 10, 60, 30], [90, 70, 118, 95]]
NAMES = ("background", "cat", "dog")


class Scene(SemanticDataset):
    """The row and the column of every pixel, as red and green; blue is the label."""

    ids = ("a", "b", "c")

    def __init__(self, mask=MASK):
        self.mask = mask

    def read(self, index):
        row, column = np.indices(self.mask.shape)
        return np.stack([row + 1, column + 1, self.mask % 255 * 100 + 1], -1).astype(np.uint8), self.mask.copy()


class Scenes(SemanticDataModule):
    classes, palette = NAMES, ((0, 0, 0),) * 3

    def dataset(self, split):
        return Scene()


def crop(transform, seed=0, mask=MASK, name="a"):
    return transform.of(NAMES).sample(Scene(mask), Scene.ids.index(name), rng_for(seed, 0, 0))


def test_objects_are_the_connected_parts_of_a_class():
    boxes, labels = objects(MASK, 0)
    assert boxes.tolist() == BOXES and labels.tolist() == [1, 2, 2]
    boxes, labels = objects(MASK)
    assert boxes[0].tolist() == [0, 0, 120, 100] and labels.tolist() == [0, 1, 2, 2]
    diagonal = np.kron(np.eye(2), np.ones((8, 8))).astype(np.uint8)
    assert objects(diagonal, 0)[0].tolist() == [[0, 0, 16, 16]]
    for empty in (np.zeros((9, 9), np.uint8), np.full((9, 9), 255, np.uint8)):
        boxes, labels = objects(empty, 0)
        assert boxes.shape == (0, 4) and labels.shape == (0,)


def test_boxes_grow_about_their_centre_and_overlap():
    assert extend([[10, 20, 30, 30]], 1.5).tolist() == [[5, 17.5, 35, 32.5]]
    assert extend(np.zeros((0, 4))).shape == (0, 4)
    np.testing.assert_allclose(
        overlap([[0, 0, 4, 2], [9, 9, 10, 10]], [[2, 0, 6, 2], [0, 0, 2, 1]]), [[1 / 3, 1 / 4], [0, 0]]
    )


@pytest.mark.fidelity
@pytest.mark.parametrize("seed", range(8))
def test_stage_one_shows_one_object_with_a_fifth_of_context_and_calls_other_classes_background(seed):
    image, mask = crop(BoxTransform("objects", crop=224, scale=(1, 1), flip=0), seed)
    label = int(np.setdiff1d(mask, [0, 255])[0])
    assert set(np.unique(mask)) <= {0, label, 255}
    # Which box it is of, from the coordinates that the picture shows.
    inside = (image > 0).all(-1)
    y, x = (image[..., axis][inside].astype(float) - 1 for axis in (0, 1))
    middle = np.array([np.median(x), np.median(y)])
    number = int(np.argmin([np.abs(middle - [(x1 + x2) / 2, (y1 + y2) / 2]).sum() for x1, y1, x2, y2 in BOXES]))
    assert label == (1, 2, 2)[number]
    x1, y1, x2, y2 = extend([BOXES[number]])[0]
    assert x.min() >= max(x1, 0) - 1 and x.max() + 1 <= min(x2, 120) + 1
    assert y.min() >= max(y1, 0) - 1 and y.max() + 1 <= min(y2, 100) + 1
    assert (mask[~inside] == 255).all()
    # Blue is the label of the source where it is not blended: image and labels show the same pixels.
    sharp = inside & np.isin(image[..., 2], (1, 101, 201)) & (mask != 255)
    assert sharp.mean() > 0.5
    assert (np.where(image[..., 2] == label * 100 + 1, label, 0)[sharp] == mask[sharp]).mean() > 0.999


@pytest.mark.fidelity
def test_the_crop_is_224_of_250_wherever_it_falls():
    """Of an object far from the border: 1.2 * 224 / 250 of its sides is seen, at places spread over all offsets."""
    mask = np.zeros((200, 250), np.uint8)
    mask[80:120, 100:160] = 1
    transform = BoxTransform("objects", crop=224, scale=(1, 1), flip=0).of(NAMES)
    starts = []
    for seed in range(200):
        geometry = transform.draw_box(rng_for(seed, 0, 0), mask.shape, np.array([100, 80, 160, 120]))
        top, left, height, width = geometry.source
        assert abs(width - 60 * 1.2 * 224 / 250) <= 0.5 and abs(height - 40 * 1.2 * 224 / 250) <= 0.5
        assert geometry.target == (0, 0, 224, 224) and geometry.size == (224, 224)
        starts.append((left, top))
    (left, top), (last_left, last_top) = np.min(starts, 0), np.max(starts, 0)
    assert (left, top) == (94, 76) and (last_left, last_top) == (101, 81)  # 1.2 / 2 of 60x40 about (130, 100)


@pytest.mark.fidelity
def test_outside_of_the_image_is_black_and_void():
    mask = np.full((40, 40), 1, np.uint8)
    image, labels = crop(BoxTransform("objects", crop=100, scale=(1, 1)), mask=mask)
    outside = (image == 0).all(-1)
    assert 0.05 < outside.mean() < 0.5
    assert (labels[outside] == 255).all() and (labels[~outside] == 1).mean() > 0.98


@pytest.mark.fidelity
def test_stage_two_keeps_all_labels_of_boxes_that_overlap_an_object_by_half():
    transform = BoxTransform("proposals", crop=60, scale=(1, 1)).of(NAMES)
    seen, boxes = set(), []
    for seed in range(300):
        box, label = transform._box("a", MASK, rng_for(seed, 0, 0))
        assert label is None
        share = overlap(box, BOXES)[0]
        assert share.max() >= 0.5
        assert (box >= 0).all() and (box <= [120, 100, 120, 100]).all()
        seen.add(int(share.argmax()))
        boxes.append(share.max())
    assert seen == {0, 1, 2} and min(boxes) < 0.6 and np.mean(boxes) < 0.9
    both = MASK.copy()
    both[40:60, 45:60] = 2  # beside the object of class 1
    assert any({1, 2} <= set(np.unique(crop(transform, seed, both)[1])) for seed in range(5))


@pytest.mark.fidelity
def test_proposals_of_a_file_are_drawn_where_they_overlap_by_half(tmp_path):
    good, bad = [22, 10, 60, 31], [0, 0, 30, 12]
    asked = []

    def provider(image):
        asked.append(image.shape)
        return [bad, good, bad]

    save_proposals(Scene(), provider, tmp_path / "train.npz")
    assert asked == [(100, 120, 3)] * 3
    proposals = load_proposals(tmp_path / "train.npz")
    transform = BoxTransform("proposals", proposals, crop=50).of(NAMES)
    for seed in range(20):
        assert transform._box("b", MASK, rng_for(seed, 0, 0))[0].tolist() == good
    nothing = BoxTransform("proposals", {"a": np.array([bad], float)}, crop=50).of(NAMES)
    assert overlap(nothing._box("a", MASK, rng_for(0, 0, 0))[0], BOXES).max() >= 0.5
    with pytest.raises(ValueError, match="no boxes of c"):
        nothing._box("c", MASK, rng_for(0, 0, 0))


def test_an_image_without_an_object_is_one_box():
    for around in ("objects", "proposals"):
        image, mask = crop(BoxTransform(around, crop=64, flip=0, scale=(1, 1)), mask=np.zeros((100, 120), np.uint8))
        assert (mask == 0).mean() > 0.7 and ((mask == 255) == (image == 0).all(-1)).all()


@pytest.mark.parametrize("around", ["objects", "proposals"])
def test_a_crop_depends_on_seed_pass_and_index_alone(around):
    options = {"crop": 48, "rotate": 10, "elastic": 2, "jitter": 0.2, "crop_around": around}
    data = Scenes(batch_size=3, workers=0, seed=5, **options)
    batch = next(iter(data.train_dataloader()))
    transform, order = data.transform.of(NAMES), [Scene.ids.index(name) for name in batch["image_id"]]
    for slot, index in enumerate(order):
        alone = train_batch(Scene(), [(0, index)], transform, 5)
        assert (alone["image"][0] == batch["image"][slot]).all() and (alone["mask"][0] == batch["mask"][slot]).all()
    assert not (train_batch(Scene(), [(1, order[0])], transform, 5)["image"][0] == batch["image"][0]).all()
    first = next(iter(data.train_batches(2)))
    assert (first["image"] == batch["image"]).all() and len(list(data.train_batches(2))) == 2


def test_however_far_zoomed_in_some_of_the_image_stays():
    transform = BoxTransform("proposals", crop=32, scale=(20, 20)).of(NAMES)
    for seed in range(100):
        geometry = transform.draw_box(rng_for(seed, 0, 0), (9, 40), np.array([0, 0, 40, 9]))
        (top, left, height, width), (to_top, to_left, to_height, to_width) = geometry.source, geometry.target
        assert 0 <= top < top + height <= 9 and 0 <= left < left + width <= 40
        assert 0 <= to_top < to_top + to_height <= 32 and 0 <= to_left < to_left + to_width <= 32


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"goes with data\.crop_around .proposals., which is 'objects'"):
        BoxTransform("objects", {}, crop=9)
    with pytest.raises(ValueError, match="which is None"):
        np.savez(tmp_path / "p.npz", a=np.zeros((0, 4)))
        Scenes(proposals=str(tmp_path / "p.npz"))
    with pytest.raises(ValueError, match="'boxes'; choose"):
        BoxTransform("boxes", crop=9)
    with pytest.raises(ValueError, match=r"set data\.crop \(224"):
        Scenes(crop=None, batch_size=1, crop_around="objects")
    with pytest.raises(ValueError, match='no class has that name; use "proposals"'):
        Blocks(crop_around="objects").train_dataloader()
    assert next(iter(Blocks(crop_around="proposals").train_dataloader()))["image"].shape == (2, 3, 16, 16)
    with pytest.raises(FileNotFoundError, match="save_proposals"):
        Scenes(crop_around="proposals", proposals="nowhere.npz")
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(ValueError, match=r"not an \.npz"):
        load_proposals(tmp_path / "text.npz")
    np.savez(tmp_path / "shape.npz", a=np.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"boxes of a have the shape \(2, 5\)"):
        load_proposals(tmp_path / "shape.npz")
