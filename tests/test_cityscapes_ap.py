"""Cityscapes' instance scores against the benchmark's own scripts, and what they said on generated images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask

from seglight.cityscapes_ap import IDS, CityscapesAP, CityscapesObjectScores

SIZE = (64, 96)


def scene(seed: int, images: int = 5) -> list[dict]:
    """Instance images with groups, void, small objects and occlusion, and detections that are right, shifted, double,
    on groups, on void, of another class, empty, or with equal scores."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(images):
        ids = np.full(SIZE, rng.choice([7, 23, 21]), dtype=np.int32)
        ids[: rng.integers(1, 20), : rng.integers(1, 60)] = rng.choice([0, 3, 16, 29, 30])
        for i in range(rng.integers(0, 9)):
            label = int(rng.choice([24, 26, 26, 31, 33, 29]))
            value = label if rng.random() < 0.2 else label * 1000 + i
            y, x = rng.integers(0, 50), rng.integers(0, 80)
            h, w = rng.integers(3, 30), rng.integers(3, 40)
            ids[y : y + h, x : x + w] = value
        found = {"labels": [], "scores": [], "masks": []}
        for value in np.unique(ids):
            label = value if value < 1000 else value // 1000
            for _ in range(rng.integers(0, 4)):
                shape = np.roll(ids == value, rng.integers(-3, 4, 2), (0, 1))
                if rng.random() < 0.2:
                    shape[:, :48] = False
                names = list(IDS.values())
                label = label if label in names and rng.random() < 0.9 else rng.choice(names)
                found["labels"].append(names.index(label))
                found["scores"].append(float(rng.choice([0.2, 0.5, 0.9, rng.random()])))
                found["masks"].append(shape)
        out.append({"ids": ids, **found})
    return out


def rles(masks: list[np.ndarray]) -> list[dict]:
    return [mask.encode(np.asfortranarray(one.astype(np.uint8))) for one in masks]


def ours(images: list[dict]) -> CityscapesAP:
    metric = CityscapesAP()
    for i, one in enumerate(images):
        found = {"labels": one["labels"], "scores": one["scores"], "rles": rles(one["masks"])}
        metric.update(f"city_{i:06d}_000000", one["ids"], found)
    return metric


def official(images: list[dict], folder, monkeypatch) -> np.ndarray:
    """AP (8, 10) by cityscapesScripts, through files."""
    script = pytest.importorskip("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
    if not hasattr(np, "in1d"):  # gone from numpy 2.4; the scripts still call it
        monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    monkeypatch.setattr(script, "writeDict2JSON", lambda *_: None)  # fails with integers of numpy 2, and is not needed
    truths, predictions = [], []
    for i, one in enumerate(images):
        stem = f"city_{i:06d}_000000"
        truths.append(str(folder / f"{stem}_gtFine_instanceIds.png"))
        Image.fromarray(one["ids"].astype(np.uint16)).save(truths[-1])
        lines = []
        for j, (label, score, shape) in enumerate(zip(one["labels"], one["scores"], one["masks"], strict=True)):
            Image.fromarray(shape.astype(np.uint8) * 255).save(folder / f"{stem}_{j}.png")
            lines.append(f"{stem}_{j}.png {list(IDS.values())[label]} {score!r}\n")
        predictions.append(str(folder / f"{stem}.txt"))
        (folder / f"{stem}.txt").write_text("".join(lines))
    script.args.predictionPath = str(folder)
    script.args.gtInstancesFile = str(folder / "gtInstances.json")
    script.args.JSONOutput, script.args.quiet = False, True
    return np.array(script.evaluateImgLists(predictions, truths, script.args)["resultApMatrix"])[0]


@pytest.mark.fidelity
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5, 7, 8])
def test_equals_the_official_scripts(seed, tmp_path, monkeypatch):
    images = scene(seed)
    expected = official(images, tmp_path, monkeypatch)
    table = ours(images).compute().table
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-9, equal_nan=True)
    assert np.nanmax(table) > 0


FROZEN = {
    0: [0.34375, 0.7013888888888888, np.nan, 0.25416666666666665, 0.4333333333333333, np.nan],
    1: [0.22953318903318903, 0.4015674603174603, np.nan, 0.040385281385281385, 0.19821428571428573, 0.45],
    3: [0.2000347222222222, 0.36215277777777777, 0.3466666666666667, 0.13125, 0.13333333333333333, 0.1888888888888889],
    8: [0.12869603775853775, 0.21081349206349206, np.nan, 0.1794214466089466, 0.20666666666666664, 0.0],
}


@pytest.mark.fidelity
@pytest.mark.parametrize("seed", FROZEN)
def test_equals_what_the_official_scripts_said(seed):
    """cityscapesScripts 2.3.0 on the same images: AP, AP50, AP of person, car, train and bicycle."""
    scores = ours(scene(seed)).compute()
    four = scores.table.mean(1)[[0, 2, 5, 7]]
    np.testing.assert_allclose([scores.ap, scores.ap50, *four], FROZEN[seed], rtol=0, atol=1e-9, equal_nan=True)


def one_car(ids: np.ndarray, *shapes: np.ndarray, scores=(0.9, 0.8, 0.7)) -> float:
    metric = CityscapesAP()
    found = {"labels": [2] * len(shapes), "scores": scores[: len(shapes)], "rles": rles(list(shapes))}
    metric.update("a", ids, found)
    return metric.compute().ap


def test_rules_one_by_one():
    ids = np.full(SIZE, 7)
    ids[:10, :10] = 26001  # 100 pixels: counts
    ids[20:29, :11] = 26002  # 99 pixels: does not
    ids[40:60, :40] = 26  # a group
    ids[40:60, 50:] = 3  # void
    car, small, group, void = ids == 26001, ids == 26002, ids == 26, ids == 3
    wrong = np.zeros(SIZE, dtype=bool)
    wrong[:10, 60:80] = True
    assert one_car(ids, car) == 1
    assert one_car(ids, car, wrong, scores=(0.5, 0.9)) == 0.25  # 0.5 over half a step, 0 over the other
    assert one_car(ids, car, small, scores=(0.5, 0.9)) == 1
    assert one_car(ids, car, group, scores=(0.5, 0.9)) == 1
    assert one_car(ids, car, void, scores=(0.5, 0.9)) == 1
    assert one_car(ids, car, car, scores=(0.9, 0.5)) == 1  # the double comes after all were found
    assert one_car(ids, car, car, scores=(0.5, 0.9)) == 1  # whatever comes first in the list
    assert one_car(ids, np.zeros(SIZE, dtype=bool)) == 0
    assert one_car(ids, void) == 0  # the scripts fail here: nothing is left of the curve
    half = car.copy()
    half[:5] = False
    assert one_car(ids, half) == 0  # IoU 0.5 does not exceed 0.5


def test_order_of_images_does_not_matter():
    images = scene(1)
    scores = ours(images).compute()
    metric = ours(images)
    metric.images = dict(reversed(metric.images.items()))
    assert metric.compute().table.tobytes() == scores.table.tobytes()


def test_names_and_table():
    scores = ours(scene(0)).compute()
    names = scores.as_dict("test")
    assert names["test/cityscapes_AP"] == scores.ap and names["test/cityscapes_AP50"] == scores.ap50
    assert "test_cityscapes/car" in names and "test_cityscapes/bus" not in names
    assert scores.as_table().row_count == 9
    empty = CityscapesAP()
    empty.update("a", np.full(SIZE, 7), {"labels": [], "scores": [], "rles": []})
    assert np.isnan(empty.compute().ap)


def test_as_seglight_test_feeds_it():
    """Tensors of a model, and instance ids by the name of the image."""
    images = scene(8)
    numbers = {f"city_{i:06d}_000000": one["ids"] for i, one in enumerate(images)}
    fed = CityscapesObjectScores(numbers.__getitem__)
    for name, one in zip(numbers, images, strict=True):
        found = {"labels": torch.tensor(one["labels"]), "scores": torch.tensor(one["scores"], dtype=torch.float64)}
        fed.update(name, {**found, "rles": rles(one["masks"])}, truth=None)
    scores, expected = fed.compute(), ours(images).compute()
    np.testing.assert_allclose(scores.table, expected.table, equal_nan=True)
    assert scores.ap > 0
    assert scores.per_class()[1][2] == ["car", pytest.approx(scores.table[2].mean()), scores.table[2, 0]]


def test_bad_input():
    metric, ids = CityscapesAP(), np.full(SIZE, 7)
    nothing = {"labels": [], "scores": [], "rles": []}
    with pytest.raises(ValueError, match="no image"):
        metric.compute()
    metric.update("a", ids, nothing)
    with pytest.raises(ValueError, match="Image a was counted twice"):
        metric.update("a", ids, nothing)
    metric.reset()
    metric.update("a", ids, nothing)
    one = rles([ids == 7])
    with pytest.raises(ValueError, match="labels 8 to 8"):
        metric.update("b", ids, {"labels": [8], "scores": [0.5], "rles": one})
    with pytest.raises(ValueError, match="1 labels, 0 scores"):
        metric.update("b", ids, {"labels": [1], "scores": [], "rles": one})
    with pytest.raises(ValueError, match="finite scores"):
        metric.update("b", ids, {"labels": [1], "scores": [np.nan], "rles": one})
    with pytest.raises(ValueError, match="Image b is 64 x 96, but a mask is 5 x 6"):
        metric.update("b", ids, {"labels": [1], "scores": [0.5], "rles": rles([np.ones((5, 6))])})
    with pytest.raises(ValueError, match="must be integers"):
        metric.update("b", ids.astype(float), nothing)
