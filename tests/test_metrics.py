"""The table and its scores, against torchmetrics, a plain count in numpy and hand-made cases."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from seglight import metrics
from seglight.metrics import ConfusionMatrix, Scores, count, scores


def brute(labels: torch.Tensor, mask: torch.Tensor, classes: int) -> np.ndarray:
    table = np.zeros((classes, classes), dtype=np.int64)
    labels, mask = labels.numpy().ravel().astype(np.int64), mask.numpy().ravel().astype(np.int64)
    np.add.at(table, (mask[mask != 255], labels[mask != 255]), 1)
    return table


def brute_miou(table: np.ndarray) -> float:
    ious = []
    for k in range(len(table)):
        union = table[k].sum() + table[:, k].sum() - table[k, k]
        if union:
            ious.append(table[k, k] / union)
    return sum(ious) / len(ious) if ious else math.nan


def run(labels: torch.Tensor, mask: torch.Tensor, classes: int) -> Scores:
    metric = ConfusionMatrix(classes)
    metric.update(labels, mask)
    return metric.compute()


def random_pair(classes: int, seed: int, shape=(3, 17, 23), void: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels, mask = torch.randint(0, classes, (2, *shape), generator=g)
    return labels, mask.masked_fill(torch.rand(shape, generator=g) < void, 255)


def cases():
    for classes in (1, 2, 5, 21, 150, 255):
        yield f"random {classes}", *random_pair(classes, classes), classes
    labels, mask = random_pair(6, 0)
    yield "absent everywhere", labels % 4, torch.where(mask == 255, 255, mask % 4), 6
    yield "predicted only", labels, torch.where(mask == 255, 255, mask % 4), 6
    yield "never predicted", labels % 4, mask, 6
    yield "one class", torch.zeros_like(mask), torch.zeros_like(mask), 6
    yield "all wrong", torch.ones_like(mask), torch.zeros_like(mask), 6
    yield "no void", labels, labels.flip(-1), 6
    yield "last label is 254", torch.full_like(mask, 254), torch.where(mask == 255, 255, 254), 255


CASES = list(cases())


@pytest.mark.fidelity
@pytest.mark.parametrize(("labels", "mask", "classes"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_equals_torchmetrics_and_a_plain_count(labels, mask, classes, dtype):
    result = run(labels.to(dtype), mask.to(dtype), classes)
    table = brute(labels, mask, classes)
    assert result.table.dtype == np.int64
    np.testing.assert_array_equal(result.table, table)
    assert result.miou == pytest.approx(brute_miou(table), abs=1e-12)
    if classes > 1:  # torchmetrics has no multiclass problem of one class
        theirs = MulticlassJaccardIndex(classes, average="macro", ignore_index=255)
        theirs.update(labels, mask)
        assert result.miou == pytest.approx(float(theirs.compute()), abs=1e-6)
    valid = mask != 255
    assert result.pixacc == pytest.approx(float((labels == mask)[valid].double().mean()), abs=1e-12)


def test_scores_by_hand():
    # classes: 0 has 3 right of 4; 1 is predicted only; 2 has support and is never found; 3 is absent everywhere
    s = scores(torch.tensor([[3, 1, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]), ["a", "b", "c", "d"])
    np.testing.assert_allclose(s.iou, [3 / 6, 0, 0, np.nan])
    np.testing.assert_allclose(s.accuracy, [3 / 4, np.nan, 0, np.nan])
    assert s.support.tolist() == [4, 0, 2, 0]
    assert s.miou == pytest.approx(0.5 / 3)
    assert s.pixacc == pytest.approx(3 / 6)
    assert s.macc == pytest.approx(0.75 / 2)
    assert s.fwiou == pytest.approx(4 / 6 * 0.5)
    assert s.as_dict("val") == pytest.approx(
        {
            "val/mIoU": s.miou,
            "val/pixAcc": s.pixacc,
            "val/mAcc": s.macc,
            "val/fwIoU": s.fwiou,
            "val_class/a": 0.5,
            "val_class/b": 0.0,
            "val_class/c": 0.0,
        }
    )
    assert s.definition == (
        "mIoU over 3 of 4 classes: one confusion matrix over the whole set, at label resolution, void excluded; "
        "classes absent from truth and prediction left out: d"
    )


def test_the_table_reads_rows_as_truth():
    s = run(torch.tensor([[1, 1, 0]]), torch.tensor([[0, 0, 0]]), 2)
    assert s.table.tolist() == [[1, 2], [0, 0]]


def test_an_absent_class_is_never_zero_nor_one():
    labels, mask = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 255]])
    two, nine = run(labels, mask, 2), run(labels, mask, 9)
    assert nine.miou == two.miou == pytest.approx(0.5)
    assert (nine.macc, nine.fwiou, nine.pixacc) == (two.macc, two.fwiou, two.pixacc)
    assert len(nine.as_dict("val")) == 4 + 2


def test_nothing_but_void_gives_nan():
    s = run(torch.zeros(2, 4, 4, dtype=torch.uint8), torch.full((2, 4, 4), 255, dtype=torch.uint8), 3)
    logged = s.as_dict("val")
    assert set(logged) == {"val/mIoU", "val/pixAcc", "val/mAcc", "val/fwIoU"}
    assert all(math.isnan(value) for value in logged.values())
    assert s.definition.startswith("mIoU over 0 of 3 classes")


def test_predictions_on_void_are_free():
    labels, mask = random_pair(4, 3)
    other = torch.where(mask == 255, 3 - labels, labels)
    assert not torch.equal(labels, other)
    np.testing.assert_array_equal(run(labels, mask, 4).table, run(other, mask, 4).table)


def test_independent_of_batches_order_and_shape():
    labels, mask = random_pair(7, 5, shape=(9, 31, 19))
    whole = run(labels, mask, 7).table
    metric = ConfusionMatrix(7)
    for i in torch.randperm(9).tolist():
        metric.update(labels[i].byte(), mask[i].byte())
    np.testing.assert_array_equal(metric.compute().table, whole)
    np.testing.assert_array_equal(run(labels.mT, mask.mT, 7).table, whole)  # not contiguous


def test_pieces_change_nothing(monkeypatch):
    labels, mask = random_pair(7, 6)
    whole = count(labels, mask)
    monkeypatch.setattr(metrics, "PIECE", 100)
    assert torch.equal(count(labels, mask), whole)


@pytest.mark.parametrize("shape", [(3, 37, 23), (5, 7)])
def test_the_way_of_accelerators_counts_the_same(shape):
    labels, mask = random_pair(7, 7, shape=shape)
    labels.view(-1)[:2] = torch.tensor([-5, 999])
    assert torch.equal(metrics._scatter(metrics._cell(labels, mask)).view(258, 258), count(labels, mask))
    assert metrics._scatter(metrics._cell(labels, mask)).dtype == torch.int64


@pytest.mark.parametrize("value", [21, 254, -1, 256, 2**40])
def test_an_illegal_ground_truth_is_named(value):
    metric = ConfusionMatrix(21)
    mask = torch.zeros(1, 4, 4, dtype=torch.int64)
    mask[0, 1, 1:3] = value
    metric.update(torch.zeros_like(mask), mask)
    name = "below 0" if value < 0 else "above 255" if value > 255 else f"value {value}"
    with pytest.raises(ValueError, match=rf"ground truth holds .*{name} \(2 pixels\).*0\.\.20 and 255"):
        metric.compute()


@pytest.mark.parametrize("value", [21, 255, -1, 300])
def test_an_illegal_prediction_is_named(value):
    metric = ConfusionMatrix(21)
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    labels[0, 0, 0] = value
    metric.update(labels, torch.zeros_like(labels))
    with pytest.raises(ValueError, match=r"predictions hold .*\(1 pixels\).*0\.\.20"):
        metric.compute()


def test_254_is_legal_with_255_classes_only():
    mask = torch.full((1, 2, 2), 254, dtype=torch.uint8)
    assert run(mask, mask, 255).pixacc == 1
    with pytest.raises(ValueError, match="value 254"):
        run(mask.clamp_max(253), mask, 254)


@pytest.mark.parametrize("classes", [0, 256])
def test_the_number_of_classes_fits_a_byte(classes):
    with pytest.raises(ValueError, match=f"num_classes is {classes}.*1 to 255"):
        ConfusionMatrix(classes)


def test_wrong_input_is_refused():
    metric = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=r"must be .* and equal"):
        metric.update(torch.zeros(1, 2, 2, dtype=torch.uint8), torch.zeros(1, 2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="must be integers"):
        metric.update(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="2 class names were given for 3"):
        ConfusionMatrix(3, ["a", "b"])


def test_the_state_resets_saves_and_keeps_its_type():
    labels, mask = random_pair(4, 8)
    metric = ConfusionMatrix(4, ["a", "b", "c", "d"])
    metric.update(labels, mask)
    metric.half()  # a whole model in half precision must not round the counts
    assert metric.counts.dtype == torch.int64
    assert metric.state_dict() == {}  # checkpoints do not grow by it
    counts = metric.counts.clone()
    metric.persistent(True)
    copy = ConfusionMatrix(4)
    copy.persistent(True)
    copy.load_state_dict(metric.state_dict())
    assert torch.equal(copy.counts, counts)
    assert metric.compute().classes == ("a", "b", "c", "d")
    metric.reset()
    assert metric.counts.sum() == 0


def test_update_leaves_its_input_alone():
    labels, mask = random_pair(4, 8)
    for dtype in (torch.uint8, torch.int32, torch.int64):
        a, b = labels.to(dtype), mask.to(dtype)
        before = a.clone(), b.clone()
        run(a, b, 4)
        assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_ranks_are_summed():
    labels, mask = random_pair(5, 9, shape=(7, 11, 13))
    parts = [count(labels[i::2], mask[i::2]) for i in range(2)]
    metric = ConfusionMatrix(5, dist_sync_fn=lambda state, group=None: parts, distributed_available_fn=lambda: True)
    metric.update(labels[::2], mask[::2])
    np.testing.assert_array_equal(metric.compute().table, brute(labels, mask, 5))


def _rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}/meet", rank=rank, world_size=2)
    labels, mask = random_pair(5, 9, shape=(7, 11, 13))
    metric = ConfusionMatrix(5)
    for i in range(rank, 7, 2):
        metric.update(labels[i], mask[i])
    np.save(Path(store, f"{rank}.npy"), metric.compute().table)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="gloo meets in a file here, which Windows spells differently")
def test_two_processes_give_the_table_of_one(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    table = brute(*random_pair(5, 9, shape=(7, 11, 13)), 5)
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"{rank}.npy"), table)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_without_waiting_for_it():
    labels, mask = random_pair(21, 4, shape=(4, 64, 64))
    metric = ConfusionMatrix(21).cuda()
    there = labels.byte().cuda(), mask.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(*there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_array_equal(metric.compute().table, brute(labels, mask, 21))


def printed(table) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()


def test_the_table_for_people():
    s = scores(np.array([[3, 1, 0], [1, 3, 0], [0, 0, 0]]), ["road", "sky", "bus"])
    lines = printed(s.as_table()).splitlines()
    rows = [line for line in lines if any(f"│ {name} " in line for name in ("road", "sky", "bus"))]
    assert [row.split()[1] for row in rows] == ["road", "sky", "bus"]
    assert "60.0" in rows[0] and "75.0" in rows[0] and "50.0" in rows[0]
    assert "–" in rows[2]
    assert "left out: bus" in " ".join(lines)


def test_names_in_square_brackets_are_shown():
    text = printed(scores(np.diag([3, 2, 0]), ["[red]", "[/x]", "[bold] bus"]).as_table())
    assert "│ [red] " in text and "│ [/x] " in text and "│ [bold] bus " in text
    assert "left out: [bold] bus" in " ".join(text.split())


def test_many_classes_are_listed_worst_first():
    table = np.diag(np.arange(40)) * 10
    table[5, 6] += 100
    names = [f"class{i:02}" for i in range(40)]
    rows = [line.split()[1] for line in printed(scores(table, names).as_table()).splitlines() if "│ class" in line]
    assert len(rows) == 40
    assert rows[0] == "class05" and rows[-1] == "class00"  # worst, and absent


def test_the_share_of_pixels_is_that_of_the_ground_truth():
    text = printed(scores(np.array([[6, 4], [0, 30]]), ["road", "sky"]).as_table())
    shares = {line.split()[1]: line.split()[-2] for line in text.splitlines() if "│ road" in line or "│ sky" in line}
    assert shares == {"road": "25.0", "sky": "75.0"}
