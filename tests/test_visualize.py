"""Pictures: right pixels, right sizes, every class count."""

import numpy as np
import pytest
from PIL import Image

from seglight import visualize
from seglight.visualize import STRANGE, VOID, WRONG

PALETTE = ((0, 0, 0), (200, 10, 10), (10, 200, 10))


@pytest.fixture
def scene():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 10:40] = 1
    mask[20:25, 45:55] = 2
    mask[:3] = 255
    labels = mask.copy()
    labels[mask == 255] = 0
    labels[10:30, 38:40] = 2
    return image, mask, labels


def test_colorize():
    mask = np.array([[0, 1, 2], [255, 7, 1]], np.uint8)
    picture = visualize.colorize(mask, PALETTE)
    assert picture.dtype == np.uint8 and picture.shape == (2, 3, 3)
    expected = [PALETTE[0], PALETTE[1], PALETTE[2], VOID, STRANGE, PALETTE[1]]
    assert picture.reshape(-1, 3).tolist() == [list(colour) for colour in expected]
    assert np.array_equal(visualize.colorize(mask.astype(np.int64), PALETTE), picture)


def test_palette_png_keeps_labels_and_colours(tmp_path):
    labels = np.random.default_rng(0).integers(0, 3, (37, 53)).astype(np.uint8)
    labels[0, :5] = 255
    visualize.save_palette_png(tmp_path / "a.png", labels, PALETTE)
    picture = Image.open(tmp_path / "a.png")
    assert picture.mode == "P" and picture.size == (53, 37)
    assert np.array_equal(np.array(picture), labels)
    assert np.array_equal(np.array(picture.convert("RGB")), visualize.colorize(labels, PALETTE))


def test_overlay_tints_classes_and_leaves_background_and_void(scene):
    image, mask, _ = scene
    before = image.copy()
    picture = visualize.overlay(image, mask, PALETTE, alpha=0.5)
    assert picture.shape == image.shape and picture.dtype == np.uint8 and np.array_equal(image, before)
    inside = (slice(15, 25), slice(15, 35))
    expected = image[inside] * 0.5 + np.array(PALETTE[1]) * 0.5
    assert np.abs(picture[inside] - expected).max() <= 1
    assert np.array_equal(picture[33:], image[33:])  # class 0 is black, hence not painted
    assert np.array_equal(picture[0], image[0])  # void
    assert (picture[15, 39] == PALETTE[1]).all()  # the outline in full colour
    assert np.array_equal(visualize.overlay(image, mask, PALETTE, 0.0)[inside], image[inside])


def test_error_map_shows_only_labelled_mistakes(scene):
    image, mask, labels = scene
    picture = visualize.error_map(image, mask, labels)
    red = (picture[..., 0] > picture[..., 1].astype(int) + 60) & (picture[..., 0] > 150)
    assert np.array_equal(red, (mask != labels) & (mask != 255))
    assert (picture[:3] == VOID).all()
    right = picture[(mask == labels)]
    assert (right == right[:, :1]).all() and WRONG[0] > WRONG[1]


@pytest.mark.parametrize("size", [(40, 60), (500, 300), (7, 900)])
def test_triptych_is_one_rgb_picture(size, scene):
    rng = np.random.default_rng(1)
    image, mask = rng.integers(0, 256, (*size, 3), dtype=np.uint8), rng.integers(0, 3, size, dtype=np.uint8)
    picture = visualize.triptych(image, mask, mask, ["background", "a", "b"], PALETTE, panel=200, title="scene")
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    width = 200 * size[1] // max(size)
    assert 3 * width < picture.shape[1] <= 4 * 200 + 30
    void = np.full(size, 255, np.uint8)
    assert visualize.triptych(image, void, mask, ["background", "a", "b"], PALETTE, panel=200).shape[2] == 3


def test_legend_holds_every_colour_and_wraps():
    palette = visualize.default_palette(60)
    names = [f"class {k}" for k in range(60)]
    narrow, wide = visualize.legend(names, palette, 300), visualize.legend(names, palette, 1500)
    assert narrow.shape[1] == 300 and wide.shape[1] == 1500 and narrow.shape[0] > wide.shape[0]
    drawn = set(map(tuple, narrow.reshape(-1, 3).tolist()))
    assert set(palette) <= drawn


@pytest.mark.parametrize("count", [1, 2, 21, 150, 255])
def test_default_palette_is_distinct_and_stable(count):
    palette = visualize.default_palette(count)
    assert len(palette) == len(set(palette)) == count and VOID not in palette
    assert palette == visualize.default_palette(255)[:count]
    if 1 < count <= 21:
        seen = visualize._vision(np.array(palette))
        for i in range(count):
            others = [visualize._distance(seen[:, [i]], seen[:, [j]])[0] for j in range(count) if j != i]
            assert min(others) > 8, f"colours {i} and {np.argmin(others)} look alike to some eyes"


@pytest.mark.parametrize("count", [0, 256])
def test_default_palette_refuses(count):
    with pytest.raises(ValueError, match="1 to 255"):
        visualize.default_palette(count)


@pytest.mark.parametrize("count", [1, 2, 21, 60, 150])
def test_confusion_png(tmp_path, count):
    table = np.random.default_rng(0).integers(0, 1000, (count, count))
    table[count // 2] = 0
    visualize.confusion_png(tmp_path / "c.png", table, [f"class number {k}" for k in range(count)])
    picture = Image.open(tmp_path / "c.png")
    assert picture.mode == "RGB" and min(picture.size) > 250 and max(picture.size) < 3000


def test_confusion_rows_are_the_truth(tmp_path):
    """All of class 1 is called 0: the dark cell is in the second row, first column."""
    visualize.confusion_png(tmp_path / "c.png", np.array([[10, 0], [10, 0]]), ["a", "b"])
    picture = np.array(Image.open(tmp_path / "c.png")).astype(int)
    dark = (picture == visualize._blues(np.array(100.0))).all(-1)
    ys, xs = np.nonzero(dark[:, : picture.shape[1] - 80])  # without the colour scale
    assert np.ptp(ys) > 1.7 * np.ptp(xs)  # one column, both rows


def test_results_png(tmp_path):
    rows = [{"step": s, "train/loss": 1 / s, "train/lr": 0.1} for s in range(1, 100)]
    rows += [{"step": s, "val/mIoU": value, "val/pixAcc": 0.5, "val/loss": 1.0} for s, value in ((10, None), (20, 0.2))]
    visualize.results_png(tmp_path / "all.png", rows)
    visualize.results_png(tmp_path / "train.png", rows[:99])
    visualize.results_png(tmp_path / "none.png", [])
    sizes = {name: Image.open(tmp_path / f"{name}.png").size for name in ("all", "train", "none")}
    assert sizes["all"][0] > 1.5 * sizes["train"][0]


def test_pyplot_is_not_touched(tmp_path):
    import sys

    visualize.results_png(tmp_path / "r.png", [{"step": 1, "train/loss": 1.0}])
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_shrink_does_not_invent_labels():
    mask = np.random.default_rng(0).choice([0, 7, 255], (300, 200)).astype(np.uint8)
    small = visualize.shrink(mask, 100, labels=True)
    assert small.shape == (100, 67) and set(np.unique(small)) <= {0, 7, 255}
    assert visualize.shrink(mask, 500) is mask


def test_grid():
    pictures = [np.zeros((10, 20, 3), np.uint8), np.zeros((14, 8, 3), np.uint8), np.zeros((5, 5, 3), np.uint8)]
    sheet = visualize.grid(pictures, columns=2, gap=2)
    assert sheet.shape == (2 * 16 + 2, 2 * 22 + 2, 3)
    assert (sheet == 0).all(-1).sum() == 10 * 20 + 14 * 8 + 25


def test_letters_of_many_languages_can_be_written():
    missing = bytes(visualize.font_of(20).getmask("\uffff"))
    assert [letter for letter in "aäéßøłčдλ×²–" if bytes(visualize.font_of(20).getmask(letter)) == missing] == []


def test_the_error_of_a_large_picture_is_that_of_all_its_pixels(monkeypatch):
    """Thin things vanish when a picture is made smaller."""
    said = []
    monkeypatch.setattr(visualize, "side_by_side", lambda panels, *_: said.extend(panels))
    mask, labels = np.zeros((300, 1000), np.uint8), np.zeros((300, 1000), np.uint8)
    mask[:, ::7] = 1
    visualize.triptych(np.zeros((300, 1000, 3), np.uint8), mask, labels, ["a", "b", "c"], PALETTE, panel=100)
    assert f"error: {100 * (mask != labels).mean():.1f} % of the pixels" in said
