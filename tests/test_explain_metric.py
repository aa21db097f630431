"""Other definitions of mIoU: each against the library that has it, or counted literally; and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny  # noqa: F401  makes the short names Tiny and Blocks known
import torch
from PIL import Image

from seglight.cli import main
from seglight.explain_metric import Tally, as_table, definitions, resized
from seglight.metrics import ConfusionMatrix

K, SIZE = 6, (24, 30)


def images(seed: int, count: int = 7, void: bool = True) -> list[tuple[np.ndarray, np.ndarray]]:
    """Predictions and labels of 6 classes: 3 is predicted, in no truth; 5 is nowhere; 4 in one image, half missed."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        truth = np.kron(rng.integers(0, 3, (4, 5)), np.ones((6, 6), int))
        if i == 1:
            truth[:9, :9] = 4
        prediction = np.where(rng.random(SIZE) < 0.7, truth, rng.integers(0, 3, SIZE))
        prediction[:, 5:][prediction[:, 5:] == 4] = 0
        prediction[rng.random(SIZE) < 0.02] = 3
        if void:
            truth[:, 12:14] = 255
        out.append((prediction.astype(np.uint8), truth.astype(np.uint8)))
    return out


def values(pairs, batch: int = 3, **kwargs) -> dict[str, float]:
    tally = Tally(K)
    for i, (prediction, truth) in enumerate(pairs):
        tally.add(f"i{i}", prediction, truth)
    names = ["background", *"abcde"]
    return {one.key: one.value for one in definitions(tally, names, batch, **kwargs)}


def literal_iou(prediction: np.ndarray, truth: np.ndarray, k: int) -> float:
    union = ((prediction == k) | (truth == k)).sum()
    return ((prediction == k) & (truth == k)).sum() / union if union else np.nan


def labelled(pairs) -> tuple[np.ndarray, np.ndarray]:
    """All labelled pixels of all images in two long rows."""
    prediction, truth = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    return prediction[truth != 255], truth[truth != 255]


def close(a: float, b: float) -> None:
    assert float(a) == pytest.approx(float(b), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_literally(seed):
    pairs = images(seed)
    found = values(pairs)
    prediction, truth = labelled(pairs)
    iou = np.array([literal_iou(prediction, truth, k) for k in range(K)])
    assert np.isnan(iou[5]) and iou[3] == 0 < iou[4]
    close(found["dataset"], np.mean(iou[:5]))
    close(found["in truth"], np.mean(iou[[0, 1, 2, 4]]))
    close(found["absent 0"], np.mean([*iou[:5], 0]))
    close(found["absent 1"], np.mean([*iou[:5], 1]))
    close(found["without background"], np.mean(iou[1:5]))
    keep = truth != 0
    close(found["label 0 ignored"], np.nanmean([literal_iou(prediction[keep], truth[keep], k) for k in range(K)]))
    flat = [np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1)]
    close(found["void counted"], np.nanmean([literal_iou(*flat, k) for k in range(K)]))
    one = [[literal_iou(*labelled([pair]), k) for k in range(K)] for pair in pairs]
    close(found["per image"], np.nanmean(one))
    close(found["per case"], np.nanmean([np.nanmean(column) for column in np.array(one).T[:5]]))
    close(found["imagewise"], np.mean(np.nan_to_num(one, nan=1)))
    groups = [pairs[:3], pairs[3:6], pairs[6:]]
    close(found["per batch"], np.mean([np.nanmean([literal_iou(*labelled(g), k) for k in range(K)]) for g in groups]))
    hit = prediction == truth
    close(found["micro"], hit.sum() / (2 * len(truth) - hit.sum()))
    close(found["pixAcc"], hit.mean())
    close(found["mAcc"], np.mean([hit[truth == k].mean() for k in (0, 1, 2, 4)]))
    close(found["fwIoU"], sum((truth == k).mean() * iou[k] for k in (0, 1, 2, 4)))
    close(found["Dice"], np.nanmean(2 * iou / (1 + iou)))


def test_torchmetrics():
    from torchmetrics.classification import MulticlassJaccardIndex
    from torchmetrics.segmentation import MeanIoU

    pairs = images(0)
    found = values(pairs)

    def jaccard(average):
        metric = MulticlassJaccardIndex(K, average=average, ignore_index=255)
        for prediction, truth in pairs:
            metric.update(torch.from_numpy(prediction).long(), torch.from_numpy(truth).long())
        return metric.compute()

    close(found["dataset"], jaccard("macro"))
    close(found["micro"], jaccard("micro"))
    close(found["absent 0"], jaccard("none").mean())
    whole = images(0, void=False)  # it knows no void
    metric = MeanIoU(K, input_format="index")
    for prediction, truth in whole:
        metric.update(torch.from_numpy(prediction)[None].long(), torch.from_numpy(truth)[None].long())
    close(values(whole)["per image"], metric.compute())


def test_smp():
    from segmentation_models_pytorch import metrics

    pairs = images(1)
    found = values(pairs)
    stacked = [torch.from_numpy(np.stack([pair[i] for pair in pairs])).long() for i in (0, 1)]
    stats = metrics.get_stats(*stacked, mode="multiclass", num_classes=K, ignore_index=255)
    close(found["absent 1"], metrics.iou_score(*stats, reduction="macro", zero_division=1.0))
    close(found["absent 0"], metrics.iou_score(*stats, reduction="macro", zero_division=0.0))
    close(found["micro"], metrics.iou_score(*stats, reduction="micro"))
    close(found["imagewise"], metrics.iou_score(*stats, reduction="macro-imagewise", zero_division=1.0))


@pytest.mark.fidelity
def test_the_first_is_the_devkits_rule():
    """VOCevalseg: a joint histogram of the pixels whose label is below 255; 100 * T(j, j) / (row + column - T(j, j)),
    and the plain mean. Its mean is undefined when a class is absent from both, and equal to ours otherwise."""

    def devkit(pairs):
        table = np.zeros((K, K))
        for prediction, truth in pairs:
            inside = truth < 255
            joint = 1 + truth[inside].astype(float) + prediction[inside] * K  # column by column, as MATLAB stores it
            table += np.array([(joint == i).sum() for i in range(1, K * K + 1)]).reshape(K, K).T
        with np.errstate(invalid="ignore"):
            return np.array([100 * table[j, j] / (table[j].sum() + table[:, j].sum() - table[j, j]) for j in range(K)])

    for absent in (True, False):
        pairs = images(2)
        if not absent:
            pairs[0][1][:3, :3] = pairs[1][0][:3, :3] = 5
        accuracies, matrix = devkit(pairs), ConfusionMatrix(K)
        for prediction, truth in pairs:
            matrix.update(torch.from_numpy(prediction), torch.from_numpy(truth))
        scores = matrix.compute()
        np.testing.assert_allclose(100 * scores.iou, accuracies, rtol=0, atol=1e-9, equal_nan=True)
        assert np.isnan(np.mean(accuracies)) == absent
        assert 100 * scores.miou == pytest.approx(np.nanmean(accuracies), abs=1e-9)
        assert 100 * values(pairs)["dataset"] == pytest.approx(np.nanmean(accuracies), abs=1e-9)


def test_resized_labels():
    pairs = images(0)
    square = Tally(K)
    for i, (prediction, truth) in enumerate(pairs):
        small = resized(truth, 12)
        assert small.shape == (12, 12) and set(np.unique(small)) <= set(np.unique(truth))
        square.add(f"i{i}", resized(prediction, 12), small)
    found = values(pairs, square=square, side=12)
    again = values([(resized(p, 12), resized(t, 12)) for p, t in pairs])
    assert found["resized"] == again["dataset"] != found["dataset"] and "resized" not in again


def test_batches_of_one_and_of_all():
    pairs = images(0)
    assert values(pairs, batch=100)["per batch"] == values(pairs)["dataset"]
    one = np.mean([values([pair])["dataset"] for pair in pairs])
    assert values(pairs, batch=1)["per batch"] == pytest.approx(one, abs=1e-12)


def test_bad_input():
    tally = Tally(K)
    with pytest.raises(ValueError, match="no image"):
        definitions(tally, ["background", *"abcde"])
    prediction, truth = images(0)[0]
    with pytest.raises(ValueError, match=r"Image a: the prediction has the shape \(23, 30\)"):
        tally.add("a", prediction[1:], truth)
    with pytest.raises(ValueError, match=r"Image a: the prediction holds the value 255, but with 6 classes"):
        tally.add("a", truth, truth)
    wrong = truth.copy()
    wrong[0, 0] = 6
    with pytest.raises(ValueError, match=r"Image a: the ground truth holds the value 6"):
        tally.add("a", prediction, wrong)
    assert not tally.rows and not tally.table.any()


def test_the_table_names_everyone():
    tally = Tally(K)
    for i, pair in enumerate(images(0)):
        tally.add(str(i), *pair)
    found = definitions(tally, ["sky", *"abcde"])
    assert "without background" not in {one.key for one in found}
    assert as_table(found).row_count == len(found)
    assert all(one.who and one.text for one in found) and len({one.text for one in found}) == len(found)


# ------------------------------------------------------------------ through the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    words = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--out", str(folder / "run")]
    assert main(["fit", "--model", "Tiny", "--data", "Blocks", *words]) == 0
    return folder


def explain(*words) -> int:
    return main(["explain-metric", *map(str, words), "--device", "cpu"])


def test_a_checkpoint_gives_the_scores_of_seglight_test(run, tmp_path, capsys):
    best = run / "run/checkpoints/best.ckpt"
    assert explain(best, "--batch", 2, "--side", 16, "--out", tmp_path / "a.json") == 0
    assert "Detectron2" in capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["data"], found["split"], found["images"], found["batch"]) == ("Blocks", "test", 5, 2)
    numbers = {one["key"]: one["value"] for one in found["definitions"]}
    assert main(["test", "--ckpt_path", str(best), "--trainer.accelerator", "cpu", "--out", str(tmp_path / "t")]) == 0
    scores = json.loads((tmp_path / "t/scores_test.json").read_text())
    for name in ("pixAcc", "mAcc", "fwIoU"):
        assert numbers[name] == scores[f"test/{name}"]
    assert numbers["dataset"] == scores["test/mIoU"] < numbers["in truth"]
    assert (
        main(["predict", "--ckpt_path", str(best), "--trainer.accelerator", "cpu", "--out", str(tmp_path / "p")]) == 0
    )
    saved = tmp_path / "p/predictions"
    assert explain(saved, "--data", "Blocks", "--batch", 2, "--side", 16, "--out", tmp_path / "b.json") == 0
    assert json.loads((tmp_path / "b.json").read_text()) == found
    assert explain(best, "--split", "val", "--model.test_scales", "[0.3]", "--data.val_size", "3") == 0
    assert "Blocks val: 3 images, 4 classes" in capsys.readouterr().out
    assert explain(best, "--out", tmp_path / "b.json") == 1
    assert "Nothing is overwritten" in capsys.readouterr().err


def test_wrong_usage(run, tmp_path, capsys):
    best = run / "run/checkpoints/best.ckpt"

    def refused(*words, status):
        assert explain(*words) == status
        return capsys.readouterr().err

    assert "--data VOC" in refused(tmp_path, status=2)
    assert "is a folder of predictions" in refused(tmp_path, "--data", "Blocks", "--model.test_flip", "true", status=2)
    assert "5 of 5 predictions are not in" in refused(tmp_path, "--data", "Blocks", status=1)
    assert "there is no option --bacth. Did you mean --batch?" in refused(best, "--bacth", "3", status=2)
    assert "--batch is 0" in refused(best, "--batch", "0", status=2)
    assert "trained on 4 classes (dark, middle, bright" in refused(best, "--data", "Shapes", status=2)
    assert "about mIoU" in refused(best, "--data", "ShapesInstances", status=2)
    assert "no checkpoint" in refused(tmp_path / "none.ckpt", status=1).lower()
    assert "has no value" in refused(best, "--data.val_size", status=2)
    for i in range(200, 205):
        Image.fromarray(np.full((5, 5), 1, np.uint8)).save(tmp_path / f"scene{i}.png")
    assert "Image scene200: the prediction has the shape (5, 5)" in refused(tmp_path, "--data", "Blocks", status=2)
