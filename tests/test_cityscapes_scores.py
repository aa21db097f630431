"""Cityscapes' pixel-level scores against the benchmark's own scripts, file by file."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seglight.cityscapes_scores import CATEGORIES, CLASSES, MEAN_PIXELS, CityscapesPixels, CityscapesPixelScores
from seglight.cli import main
from seglight.data import Cityscapes
from seglight.data import cityscapes as dataset
from seglight.data.formats import write_cityscapes
from seglight.data.scenes import split_scenes
from seglight.metrics import ConfusionMatrix

SIZE = (60, 84)
THINGS = [24, 25, 26, 27, 28, 29, 30, 31, 32, 33]


def scene(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """labelIds, instanceIds and a prediction: objects, groups without numbers, caravans and trailers, void, and a
    prediction that is wrong within its category, of an ignored class, on void and on objects."""
    labels = np.full(SIZE, rng.choice([7, 11, 21]), np.uint8)
    labels[:, 40:] = rng.choice([8, 12, 17, 22, 23])
    labels[: rng.integers(1, 20), : rng.integers(1, 60)] = rng.choice([0, 3, 6, 16])
    instances = labels.astype(np.int32)
    for number in range(rng.integers(0, 9)):
        label = int(rng.choice(THINGS))
        y, x = rng.integers(0, 50), rng.integers(0, 70)
        part = np.s_[y : y + rng.integers(1, 30), x : x + rng.integers(1, 40)]
        labels[part] = label
        instances[part] = label if rng.random() < 0.25 else 1000 * label + number  # 24000 is an object like others
    prediction = labels.copy()
    for old, new in ((7, 8), (24, 25), (26, 31), (28, 30), (11, 14), (0, 26), (3, 24), (33, 0), (21, 29)):
        swap = (labels == old) & (rng.random(SIZE) < rng.random())
        prediction[swap] = new
    noise = rng.random(SIZE) < 0.2
    prediction[noise] = rng.integers(0, 34, noise.sum())
    return {"labels": labels, "instances": instances, "prediction": prediction}


def official(images: list[dict], folder: Path, monkeypatch) -> dict:
    """What cityscapesScripts say, through files."""
    script = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    if not hasattr(np, "in1d"):  # gone from numpy 2.4; the scripts still call it
        monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    truths, predictions = [], []
    for i, one in enumerate(images):
        stem = f"{folder}/city_{i:06d}_000000"
        Image.fromarray(one["labels"]).save(f"{stem}_gtFine_labelIds.png")
        Image.fromarray(one["instances"].astype(np.uint16)).save(f"{stem}_gtFine_instanceIds.png")
        Image.fromarray(one["prediction"]).save(f"{stem}_pred.png")
        truths.append(f"{stem}_gtFine_labelIds.png")
        predictions.append(f"{stem}_pred.png")
    script.args.quiet, script.args.JSONOutput, script.args.evalInstLevelScore = True, False, True
    return script.evaluateImgLists(predictions, truths, script.args)


def ours(images: list[dict]) -> CityscapesPixelScores:
    numbers = {f"i{i:03}": one["instances"] for i, one in enumerate(images)}
    metric = CityscapesPixels(numbers.__getitem__)
    for name, one in zip(numbers, images, strict=True):
        metric.add(name, one["prediction"], one["labels"])
    return metric.compute()


def assert_equal(scores: CityscapesPixelScores, expected: dict) -> None:
    options = {"rtol": 0, "atol": 1e-9, "equal_nan": True}
    for mine, theirs, names in (
        (scores.iou, "classScores", CLASSES),
        (scores.iiou, "classInstScores", CLASSES),
        (scores.category_iou, "categoryScores", CATEGORIES),
        (scores.category_iiou, "categoryInstScores", CATEGORIES),
    ):
        np.testing.assert_allclose(mine, [expected[theirs][name] for name in names], **options)
    averages = [
        "averageScoreClasses",
        "averageScoreCategories",
        "averageScoreInstClasses",
        "averageScoreInstCategories",
    ]
    np.testing.assert_allclose(list(scores.means.values()), [expected[name] for name in averages], **options)


@pytest.mark.fidelity
@pytest.mark.parametrize("seed", range(8))
def test_equals_the_official_scripts(seed, tmp_path, monkeypatch):
    rng = np.random.default_rng(seed)
    images = [scene(rng) for _ in range(1 + seed)]
    scores = ours(images)
    assert_equal(scores, official(images, tmp_path, monkeypatch))
    assert 0 < scores.means["IoU"] < 1


def one_car() -> dict[str, np.ndarray]:
    """Road with one car of 400 pixels, a group of cars and void."""
    labels = np.full(SIZE, 7, np.uint8)
    instances = labels.astype(np.int32)
    for part, label, number in (
        (np.s_[:20, :20], 26, 26000),
        (np.s_[30:40, :20], 26, 26),
        (np.s_[50:, :], 4, 4),
    ):
        labels[part], instances[part] = label, number
    return {"labels": labels, "instances": instances, "prediction": labels.copy()}


CASES = {
    "perfect": lambda one: None,
    "free on void": lambda one: one["prediction"].__setitem__(np.s_[50:, :], 26),
    "void predicted": lambda one: one["prediction"].__setitem__(np.s_[:10, :20], 0),
    "wrong class, right category": lambda one: one["prediction"].__setitem__(np.s_[:20, :20], 28),
    "caravan predicted": lambda one: one["prediction"].__setitem__(np.s_[:20, :20], 29),
    "trailer predicted on road": lambda one: one["prediction"].__setitem__(np.s_[20:30, 40:], 30),
    "absent class predicted": lambda one: one["prediction"].__setitem__(np.s_[20:30, 40:], 33),
    "group missed": lambda one: one["prediction"].__setitem__(np.s_[30:40, :20], 7),
    "caravans in truth": lambda one: (
        one["labels"].__setitem__(np.s_[:20, :20], 29),
        one["instances"].__setitem__(np.s_[:20, :20], 29001),
    ),
    "nothing but void": lambda one: (one["labels"].fill(0), one["instances"].fill(0)),
    "a number of exactly 1000": lambda one: one["instances"].__setitem__(np.s_[20:25, 50:], 1000),
}


@pytest.mark.fidelity
@pytest.mark.parametrize("case", CASES)
def test_adversarial_cases(case, tmp_path, monkeypatch):
    one = one_car()
    CASES[case](one)
    assert_equal(ours([one]), official([one], tmp_path, monkeypatch))


def test_rules_by_hand():
    car, road, vehicle = list(CLASSES).index("car"), 0, list(CATEGORIES).index("vehicle")
    one = one_car()
    assert ours([one]).iou[[car, road]].tolist() == [1, 1] and ours([one]).iiou[car] == 1
    one["prediction"][:10, :20] = 28  # half of the car is taken for a bus
    scores = ours([one])
    assert scores.iou[car] == 400 / 600 and scores.iiou[car] == 0.5, "the group has no number, so only the car counts"
    assert scores.category_iou[vehicle] == 1 and scores.category_iiou[vehicle] == 1
    one["prediction"][20:22, 40:60] = 26  # 40 pixels of road taken for a car: not weighted
    weight = MEAN_PIXELS["car"] / 400
    assert ours([one]).iiou[car] == pytest.approx(200 * weight / (400 * weight + 40))


def test_a_licence_plate_is_ignored():
    """labelId -1 has no place in a byte: the scripts refuse it, here it is void."""
    one = one_car()
    plain = ours([one])
    one["labels"][50:55], one["instances"][50:55] = 255, 65535
    assert ours([one]).means == plain.means


def test_class_iou_is_our_miou():
    rng = np.random.default_rng(0)
    matrix, metric = ConfusionMatrix(19), CityscapesPixels()
    for i in range(3):
        mask = rng.integers(0, 16, SIZE).astype(np.uint8)
        labels = np.where(rng.random(SIZE) < 0.5, mask, rng.integers(0, 17, SIZE)).astype(np.uint8)
        mask[:5] = 255
        labels = torch.from_numpy(labels)
        matrix.update(labels, torch.from_numpy(mask))
        metric.update(f"a{i}", labels, torch.from_numpy(mask).long())
    scores, plain = metric.compute(), matrix.compute()
    np.testing.assert_array_equal(scores.iou, plain.iou)
    assert scores.means["IoU"] == plain.miou and np.isnan(scores.means["iIoU"])
    assert "no iIoU" in scores.definition


def test_classes_are_those_of_the_dataset():
    assert {name: number for name, (number, _) in dataset.CLASSES.items()} == CLASSES
    labels = pytest.importorskip("cityscapesscripts.helpers.labels")
    known = {one.name: one.id for one in labels.labels if not one.ignoreInEval}
    assert known == CLASSES
    for name, ids in CATEGORIES.items():
        assert tuple(one.id for one in labels.category2labels[name] if not one.ignoreInEval) == ids
    script = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    assert {name: script.args.avgClassSize[name] for name in MEAN_PIXELS} == MEAN_PIXELS
    assert set(script.args.avgClassSize) - set(MEAN_PIXELS) == {"caravan", "trailer"}, "ignored in evaluation"


def test_order_of_images_does_not_matter():
    rng = np.random.default_rng(3)
    images = {f"i{i:02}": scene(rng) for i in range(40)}
    results = []
    for order in (list(images), list(reversed(images))):
        metric = CityscapesPixels(lambda name: images[name]["instances"])
        for name in order:
            metric.add(name, images[name]["prediction"], images[name]["labels"])
        results.append(metric.compute())
    for part in ("iou", "iiou", "category_iou", "category_iiou"):
        assert getattr(results[0], part).tobytes() == getattr(results[1], part).tobytes()


def test_bad_input():
    one = one_car()
    metric = CityscapesPixels(lambda name: one["instances"][1:])
    with pytest.raises(ValueError, match="There is no image"):
        metric.compute()
    with pytest.raises(ValueError, match=r"Image a: .*shapes \[\(60, 84\), \(60, 84\), \(59, 84\)\]"):
        metric.add("a", one["prediction"], one["labels"])
    metric = CityscapesPixels()
    metric.add("a", one["prediction"], one["labels"])
    with pytest.raises(ValueError, match="Image a was counted twice"):
        metric.add("a", one["prediction"], one["labels"])


# ------------------------------------------------------------------ through the command


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """A miniature and a run folder with a model of it, trained for two steps."""
    folder = tmp_path_factory.mktemp("city")
    splits = {name: split_scenes(name, 3, 0, (48, 64)) for name in ("train", "val")}
    write_cityscapes(folder / "data", splits)
    import tiny  # noqa: F401  makes the short name Tiny known

    words = ["--data.crop", "32", "--data.workers", "0", "--trainer.accelerator", "cpu", "--trainer.max_steps", "2"]
    data = ["--data", "Cityscapes", "--data.root", str(folder / "data"), "--data.batch_size", "2"]
    assert main(["fit", "--model", "Tiny", *data, *words, "--out", str(folder / "run")]) == 0
    return folder


def test_scores_are_printed_logged_and_written(city, capsys):
    words = ["--ckpt_path", str(city / "run/checkpoints/best.ckpt"), "--trainer.accelerator", "cpu"]
    for verb, stage in (("test", "test"), ("validate", "val")):
        assert main([verb, *words, "--out", str(city / verb)]) == 0
        record = json.loads((city / verb / f"scores_{stage}.json").read_text())
        assert record[f"{stage}/cityscapes_IoU"] == record[f"{stage}/mIoU"]
        assert "iIoU weighs" in record["cityscapes_definition"]
        rows = list(csv.DictReader((city / verb / f"cityscapes_{stage}.csv").open()))
        assert [row["name"] for row in rows] == [*CLASSES, *CATEGORIES]
        printed = " ".join(capsys.readouterr().out.split())
        assert "mean of categories" in printed and "Cityscapes' pixel-level scores" in printed
    module = Cityscapes(root=str(city / "data"))
    data = module.split("val")
    metric = CityscapesPixels(module.numbers("val"))
    import seglight

    model = seglight.load(city / "run/checkpoints/best.ckpt")
    for index, name in enumerate(data.ids):
        image, mask = data.read(index)
        with torch.inference_mode():
            labels = model.labels([torch.from_numpy(image).permute(2, 0, 1)])[0][0]
        metric.update(name, labels, mask)
    means = metric.compute().means
    assert {name: record[f"val/cityscapes_{name}"] for name in means} == pytest.approx(means, abs=1e-12)
    assert means["iIoU"] >= 0 and sum(row["objects"] not in ("", "0") for row in rows) > 2


def test_fitting_computes_none(city):
    records = (city / "run/metrics.jsonl").read_text()
    assert "val/mIoU" in records and "cityscapes_" not in records


def test_without_instance_ids_the_rest_is_scored(city, tmp_path, capsys):
    shutil.copytree(city / "data", tmp_path / "data")
    for file in (tmp_path / "data/gtFine").rglob("*_instanceIds.png"):
        file.unlink()
    words = ["--ckpt_path", str(city / "run/checkpoints/best.ckpt"), "--trainer.accelerator", "cpu"]
    assert main(["test", *words, "--data.root", str(tmp_path / "data"), "--out", str(tmp_path / "t")]) == 0
    assert "no iIoU, because" in " ".join(capsys.readouterr().out.split())
    assert main(["test", *words, "--out", str(tmp_path / "with")]) == 0
    with_ids = json.loads((tmp_path / "with/scores_test.json").read_text())
    without = json.loads((tmp_path / "t/scores_test.json").read_text())
    assert without["test/cityscapes_category_IoU"] == with_ids["test/cityscapes_category_IoU"]
    assert np.isnan(without["test/cityscapes_iIoU"])


def test_benchmarks_say_how_they_count(tmp_path, capsys):
    """59 or 60 classes is what papers on PASCAL-Context disagree about, so it stands beside the number."""
    import pytorch_lightning as pl
    from tiny import Tiny

    from seglight.data import VOC, PascalContext
    from seglight.data.formats import write_context, write_voc

    scenes = {name: list(split_scenes(name, 2, 0, (48, 64))) for name in ("train", "val")}
    write_context(tmp_path / "context", scenes)
    write_voc(tmp_path / "voc", scenes)
    root = str(tmp_path / "context")
    for data, words in (
        (VOC(str(tmp_path / "voc"), workers=0), "VOC devkit: num_classes 21, background: yes"),
        (PascalContext(root, workers=0), "num_classes 60, background: yes, order: alphabetical"),
        (PascalContext(root, background=False, order="fcn", workers=0), "num_classes 59, background: no, order: fcn"),
    ):
        model = Tiny(data.num_classes, classes=list(data.classes), palette=list(data.palette))
        options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        pl.Trainer(use_distributed_sampler=False, **options).test(model, data, verbose=False)
        assert words in model.scores.definition and "one confusion matrix" in model.scores.definition
        assert model.official is None


RUN = """import sys
import tiny, test_instance_model
from seglight.cli import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", ["pixel", "instance"])
def test_two_ranks_give_the_numbers_of_one(level, city, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    words = ["test", "--ckpt_path", str(city / "run/checkpoints/best.ckpt"), "--trainer.accelerator", "cpu"]
    if level == "instance":
        from test_instance_model import FinderModel
        from test_submit import untrained

        from seglight.data import CityscapesInstances as Data

        model = FinderModel(8, classes=list(Data.classes), palette=list(Data.palette), test_short_side=None)
        words[2] = str(untrained(model, tmp_path / "best.ckpt"))
        words += ["--data", "CityscapesInstances", "--data.root", str(city / "data")]
    for name, ranks in (("one", []), ("two", ["--trainer.devices", "2", "--trainer.strategy", "ddp"])):
        done = subprocess.run(
            [sys.executable, "run.py", *words, *ranks, "--out", name],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / name / "scores_test.json").read_text() for name in ("one", "two"))
    assert first == second and {"pixel": "cityscapes_iIoU", "instance": "cityscapes_AP50"}[level] in first
    assert (tmp_path / "one/cityscapes_test.csv").read_text() == (tmp_path / "two/cityscapes_test.csv").read_text()
