"""Merging views: by hand, against plain loops, whatever the order; masks against full images; models that vote."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import seglight
from seglight.ensemble import flip, merge, scale
from seglight.masks import paste
from seglight.models import FPNMaskProposal, InstanceModel, MaskEnsemble, SemanticModel

FIELDS = ("boxes", "labels", "scores", "masks", "windows")


def view(boxes, scores, labels=None, masks=None, windows=None, side=4):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": boxes,
        "labels": torch.tensor(labels if labels is not None else [0] * len(boxes), dtype=torch.int64),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "masks": torch.ones(len(boxes), side, side) if masks is None else masks,
        "windows": boxes.clone() if windows is None else torch.tensor(windows, dtype=torch.float32),
    }


def crowded(seed, count=12, side=5, classes=2, ties=False):
    """Detections around four places, so that many overlap; with `ties` some scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.tensor([[20.0, 20], [25, 22], [60, 50], [70, 20]])[torch.arange(count) % 4]
    corner = middle - 8 + torch.rand(count, 2, generator=generator) * 6
    boxes = torch.cat([corner, corner + 14 + torch.rand(count, 2, generator=generator) * 6], 1)
    scores = torch.rand(count, generator=generator)
    room = torch.rand(count, 4, generator=generator) * torch.tensor([-3, -3, 3, 3])
    return {
        "boxes": boxes,
        "labels": torch.randint(0, classes, (count,), generator=generator),
        "scores": (scores * 10).ceil() / 10 if ties else scores,
        "masks": torch.rand(count, side, side, generator=generator),
        "windows": boxes + room,
    }


def read(mask, window, x, y):
    """A grid over a window at a point: bilinear between the centres of cells, zero beyond."""
    side = len(mask)
    u = (x - window[0]) / (window[2] - window[0]) * side - 0.5
    v = (y - window[1]) / (window[3] - window[1]) * side - 0.5
    total = 0.0
    for i, j in itertools.product(range(side), range(side)):
        total += max(0.0, 1 - abs(i - v)) * max(0.0, 1 - abs(j - u)) * float(mask[i, j])
    return total


def overlap(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def merged_by_loops(views, nms, vote, score, side, limit):
    every = [
        (float(v["scores"][n]), int(v["labels"][n]), v["boxes"][n].tolist(), v["windows"][n].tolist(), v["masks"][n], i)
        for i, v in enumerate(views)
        for n in range(len(v["scores"]))
    ]
    every.sort(key=lambda one: (-one[0], *one[1:4]))
    kept = []
    for one in every:
        if all(other[1] != one[1] or overlap(other[2], one[2]) <= nms for other in kept):
            kept.append(one)
    results = []
    for one in kept:
        voters = [other for other in every if other[1] == one[1] and overlap(other[2], one[2]) >= vote]
        total = sum(other[0] for other in voters)
        best = [max([v[0] for v in voters if v[5] == i], default=0.0) for i in range(len(views))]
        final = one[0] if score == "max" else sum(best) / len(views)

        def mean(place, one=one, voters=voters, total=total):
            return [sum(v[0] * v[place][c] for v in voters) / total for c in range(4)]

        results.append((final, one[1], mean(2), mean(3), voters))
    results.sort(key=lambda one: -one[0])
    results = results[:limit]
    masks = torch.zeros(len(results), side, side)
    for n, (_, _, _, window, voters) in enumerate(results):
        total = sum(v[0] for v in voters)
        for i, j in itertools.product(range(side), range(side)):
            x = window[0] + (j + 0.5) / side * (window[2] - window[0])
            y = window[1] + (i + 0.5) / side * (window[3] - window[1])
            masks[n, i, j] = sum(v[0] * read(v[4], v[3], x, y) for v in voters) / total
    return {
        "boxes": torch.tensor([one[2] for one in results]),
        "labels": torch.tensor([one[1] for one in results]),
        "scores": torch.tensor([one[0] for one in results]),
        "masks": masks,
        "windows": torch.tensor([one[3] for one in results]),
    }


def same(ours, theirs, **tolerance):
    for name in FIELDS:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance)


# ----------------------------------------------------------------------------------------------------------- merging


@pytest.mark.fidelity
def test_two_views_by_hand():
    one = view([[0, 0, 10, 10], [100, 0, 110, 10]], [0.8, 0.5], [1, 1])
    two = view([[2, 0, 12, 10], [0, 0, 10, 10], [0, 30, 10, 40]], [0.4, 0.6, 0.2], [1, 0, 1])
    found = merge([one, two])
    assert found["labels"].tolist() == [1, 0, 1, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([0.8, 0.6, 0.5, 0.2]))
    third = 2 / 3  # (0.8 * 0 + 0.4 * 2) / 1.2; the overlap is 8 / 12
    expected = [[third, 0, 10 + third, 10], [0, 0, 10, 10], [100, 0, 110, 10], [0, 30, 10, 40]]
    torch.testing.assert_close(found["boxes"], torch.tensor(expected))
    torch.testing.assert_close(found["windows"], torch.tensor(expected))
    assert all(found[name].dtype == one[name].dtype for name in FIELDS)
    mean = merge([one, two], score="mean")
    torch.testing.assert_close(mean["scores"], torch.tensor([0.6, 0.3, 0.25, 0.1]))
    assert len(merge([one, two], limit=2)["scores"]) == 2


@pytest.mark.fidelity
def test_masks_vote_by_their_scores():
    left, right = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    left[..., :2], right[..., 2:] = 1, 1
    box = [[0, 0, 8, 8]]
    found = merge([view(box, [0.9], masks=left), view(box, [0.3], masks=right)])
    expected = torch.tensor([0.75, 0.75, 0.25, 0.25]).expand(1, 4, 4)
    torch.testing.assert_close(found["masks"], expected)


@pytest.mark.fidelity
@pytest.mark.parametrize("score", ["max", "mean"])
@pytest.mark.parametrize("options", [{}, {"nms": 0.3, "vote": 0.7}, {"vote": 0.2}, {"limit": 4}])
def test_merging_equals_loops(options, score):
    views = [crowded(0), crowded(1, 9, side=7), crowded(2, 0), crowded(3, 5)]
    full = {"nms": 0.5, "vote": 0.5, "limit": 100, **options}
    expected = merged_by_loops(views, score=score, side=7, **full)
    found = merge(views, score=score, **options)
    assert 4 <= len(found["scores"]) < 20
    same(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", ["max", "mean"])
def test_order_of_the_views_does_not_matter(score):
    views = [crowded(0, ties=True), crowded(1, side=7, ties=True), crowded(2, 0), crowded(3, ties=True)]
    found = merge(views, score=score, limit=9)
    for order in itertools.permutations(views):
        other = merge(order, score=score, limit=9)
        assert all(torch.equal(found[name], other[name]) for name in FIELDS)


@pytest.mark.parametrize("score", ["max", "mean"])
def test_one_view_stays_as_it_is(score):
    """Of a network whose own suppression was at the same overlap, and no two objects overlap by the vote's."""
    one = crowded(0, 4, side=9)
    one["labels"] = torch.arange(4)
    order = one["scores"].argsort(descending=True, stable=True)
    one = {name: value[order] for name, value in one.items()}
    same(merge([one], score=score), one, rtol=1e-4, atol=1e-5)
    same(merge([one, one, one], score=score), one, rtol=1e-4, atol=1e-5)


def test_an_object_that_few_views_see_falls_behind():
    seen, odd = [0, 0, 10, 10], [50, 50, 60, 60]
    views = [view([seen, odd], [0.6, 0.9]), view([seen], [0.7]), view([seen], [0.5])]
    assert merge(views)["scores"].tolist() == pytest.approx([0.9, 0.7])
    found = merge(views, score="mean", limit=1)
    assert found["scores"].tolist() == pytest.approx([0.6])
    assert found["boxes"].tolist() == [seen]


@pytest.mark.fidelity
def test_voted_masks_equal_the_mean_of_full_images():
    """The mean of probabilities painted into the whole image, each at the pixels' centres, then the threshold."""
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    views, total, weights = [], torch.zeros(120, 160), 0.0
    y, x = torch.meshgrid(torch.arange(120) + 0.5, torch.arange(160) + 0.5, indexing="ij")
    shifts = [((0, 0), 0.9, 9.0), ((6, -3), 0.6, 11.0), ((-4, 5), 0.8, 7.0)]
    for (dx, dy), score, radius in shifts:
        window = torch.tensor([30.0 + dx, 20 + dy, 120 + dx, 100 + dy])
        mask = torch.sigmoid(radius - ((rows - 13) ** 2 + (columns - 14) ** 2).sqrt())
        views.append(view([window.tolist()], [score], masks=mask[None]))
        grid = torch.stack([(x - window[0]) / 90 * 2 - 1, (y - window[1]) / 80 * 2 - 1], -1)
        total += score * F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
        weights += score
    found = merge(views)
    ours, theirs = paste(found["masks"], found["windows"], (120, 160))[0], total / weights >= 0.5
    assert len(found["masks"]) == 1
    assert theirs.sum() > 1500
    assert (ours ^ theirs).sum() <= 0.01 * theirs.sum()
    alone = [paste(one["masks"], one["windows"], (120, 160))[0] for one in views]
    assert min(int((one ^ theirs).sum()) for one in alone) > 0.05 * theirs.sum()


def test_nothing_and_objects_without_area():
    empty = crowded(0, 0)
    found = merge([empty, empty])
    assert [tuple(found[name].shape) for name in FIELDS] == [(0, 4), (0,), (0,), (0, 5, 5), (0, 4)]
    flat = view([[5, 5, 5, 9], [0, 0, 4, 4]], [0.7, 0.0], side=3)
    for options in ({}, {"score": "mean"}):
        found = merge([flat, empty], **options)
        assert found["masks"].shape == (2, 5, 5)
        assert all(found[name].isfinite().all() for name in FIELDS)
        torch.testing.assert_close(found["boxes"], flat["boxes"])


def test_half_precision_around_it_changes_nothing():
    views = [scale(crowded(0), 7, 9), scale(crowded(1), 7, 9)]
    found = merge(views)
    with torch.autocast("cpu", torch.bfloat16):
        same(merge(views), found, rtol=0, atol=0)


def test_size_of_the_grids():
    views = [crowded(0, side=5), crowded(1, side=9)]
    assert merge(views)["masks"].shape[1:] == (9, 9)


def test_many_masks_in_parts(monkeypatch):
    views = [crowded(0), crowded(1)]
    found = merge(views)
    monkeypatch.setattr("seglight.ensemble.TOGETHER", 2)
    same(merge(views), found)


@pytest.mark.parametrize(
    ("views", "options", "message"),
    [
        ([], {}, "no views to merge"),
        ([crowded(0)], {"nms": 0}, "nms is 0; an intersection over union above 0"),
        ([crowded(0)], {"vote": 50}, "vote is 50; an intersection over union .* at most 1"),
        ([crowded(0)], {"score": "sum"}, "score is 'sum'; choose"),
        ([crowded(0)], {"limit": 0}, "limit is 0; it must be at least 1"),
    ],
)
def test_what_merging_refuses(views, options, message):
    with pytest.raises(ValueError, match=message):
        merge(views, **options)


# ------------------------------------------------------------------------------------------------- flips and scales


def test_flip_and_scale():
    masks = torch.arange(4.0).view(1, 2, 2)
    one = view([[10, 5, 30, 25]], [0.5], masks=masks, windows=[[-2, 0, 40, 30]])
    mirrored = flip(one, 100)
    assert mirrored["boxes"].tolist() == [[70, 5, 90, 25]]
    assert mirrored["windows"].tolist() == [[60, 0, 102, 30]]
    assert mirrored["masks"].tolist() == [[[1, 0], [3, 2]]]
    same(flip(mirrored, 100), one)
    larger = scale(one, 2, 0.5)
    assert larger["boxes"].tolist() == [[20, 2.5, 60, 12.5]]
    assert larger["windows"].tolist() == [[-4, 0, 80, 15]]
    assert one["boxes"].tolist() == [[10, 5, 30, 25]]


def test_a_flipped_detection_paints_the_flipped_image():
    one = crowded(0)
    size = (80, 93)
    painted = paste(one["masks"], one["windows"], size)
    mirrored = flip(one, size[1])
    assert painted.any()
    assert torch.equal(paste(mirrored["masks"], mirrored["windows"], size), painted.flip(-1))


# ---------------------------------------------------------------------------------------------------- the ensemble


class TwoObjects(nn.Module):
    """Finds the same two objects in every image, at shares of its size."""

    def __init__(self, shift: float):
        super().__init__()
        self.first = 0.9 - 5 * shift
        self.boxes = nn.Parameter(torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.5, 0.4, 0.9, 0.9]]) + shift)

    def forward(self, images, targets=None):
        found = []
        for image in images:
            height, width = image.shape[-2:]
            boxes = self.boxes * torch.tensor([width, height] * 2)
            found.append({**view([], []), "boxes": boxes, "windows": boxes, "masks": torch.full((2, 4, 4), 0.8),
                          "scores": torch.tensor([self.first, 0.6]), "labels": torch.tensor([0, 1])})  # fmt: skip
        return {}, found


class Pair(InstanceModel):
    """Two objects."""

    def __init__(self, num_classes: int = 2, shift: float = 0.0, **kwargs):
        super().__init__(network=TwoObjects(shift), num_classes=num_classes, **kwargs)


class Classless(Pair):
    agnostic = True


class Plain(SemanticModel):
    def __init__(self, num_classes: int = 2, **kwargs):
        super().__init__(network=nn.Conv2d(3, 2, 1), num_classes=num_classes, **kwargs)


def saved(model, path):
    content = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(content)
    torch.save(content, path)
    return str(path)


@pytest.fixture
def pair(tmp_path):
    names = {"classes": ["cat", "dog"], "palette": [(1, 2, 3), (4, 5, 6)], "test_short_side": 40}
    return [saved(Pair(shift=shift, **names), tmp_path / f"{shift}.ckpt") for shift in (0.0, 0.02)]


def picture(height=50, width=70):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_members_vote(pair):
    model = MaskEnsemble(pair, test_score="mean")
    assert (model.classes, model.num_classes, model.limits, model.agnostic) == (["cat", "dog"], 2, (1, 10, 100), False)
    assert model.palette == [(1, 2, 3), (4, 5, 6)]
    images = [picture(), picture(40, 40)]
    with torch.inference_mode():
        found = model.detect(images)
        views = zip(*(seglight.load(path).detect(images) for path in pair), strict=True)
    for ours, of_image in zip(found, views, strict=True):
        same(ours, merge(list(of_image), score="mean"))
    assert found[0]["scores"].tolist() == pytest.approx([0.85, 0.6])
    moved = torch.tensor([[0.02 * 0.8 / 1.7], [0.01]]) * torch.tensor([70.0, 50, 70, 50])
    torch.testing.assert_close(found[0]["boxes"], torch.tensor([[7.0, 5, 35, 30], [35, 20, 63, 45]]) + moved)
    assert model.predict(picture().permute(1, 2, 0).numpy()).boxes.shape == (2, 4)


def test_what_suppresses_and_what_votes(pair):
    """The members' boxes of an object overlap by 0.9: one suppresses the other, but at 0.99 it does not vote."""
    model = MaskEnsemble(pair, test_nms=0.5, test_vote=0.99)
    with torch.inference_mode():
        (found,) = model.detect([picture()])
        views = [seglight.load(path).detect([picture()])[0] for path in pair]
    assert len(found["scores"]) == 2
    same(found, merge(views, nms=0.5, vote=0.99))
    torch.testing.assert_close(found["boxes"][0], views[0]["boxes"][0])


def test_one_member_alone_gives_its_own_answer(pair):
    with torch.inference_mode():
        (ours,) = MaskEnsemble(pair[:1]).detect([picture()])
        (theirs,) = seglight.load(pair[0]).detect([picture()])
    same(ours, theirs)


def test_options_of_the_members(pair):
    model = MaskEnsemble(pair, test_options={"test_flip": True, "test_short_side": 32}, test_threshold=0.3)
    assert [(member.test_flip, member.test_short_side) for member in model.network] == [(True, 32)] * 2
    assert model.test_threshold == 0.3
    assert all(not layer.training for layer in model.train().modules())


def test_it_is_tested_like_any_model_and_not_trained(pair):
    from pytorch_lightning import Trainer

    from seglight.masks import encode

    model = MaskEnsemble(pair, classes=["cat", "dog"], num_classes=2)
    boxes = torch.tensor([[7.7, 5.5, 35.7, 30.5], [35.7, 20.5, 63.7, 45.5]])
    target = {
        "boxes": boxes,
        "labels": torch.tensor([0, 1]),
        "rles": encode(torch.full((2, 4, 4), 0.8), boxes, (50, 70)),
        "iscrowd": torch.zeros(2, dtype=torch.bool),
        "area": torch.tensor([700.0, 700.0], dtype=torch.float64),
    }
    batch = {"image": [picture()], "image_id": ["1"], "target": [target]}
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    (scores,) = trainer.test(model, loader, verbose=False)
    assert scores["test/AP50"] == pytest.approx(1)
    assert 0.8 < scores["test/AP"] <= 1
    with pytest.raises(ValueError, match="nothing to train: train its members"):
        trainer.fit(model, loader)


def test_the_command_needs_no_checkpoint_of_the_ensembles_own(pair, tmp_path, monkeypatch):
    from jsonargparse import Namespace

    from seglight.cli import evaluation, experiment

    monkeypatch.chdir(tmp_path)
    file = tmp_path / "both.yaml"
    for model in ("model: MaskEnsemble", "model:\n  class_path: seglight.models.MaskEnsemble"):
        file.write_text(f"{model}\ndata: ShapesInstances\n")
        assert evaluation.complete(["test", "-c", str(file)]) == ["test", "-c", str(file)]
    by_name = ["test", "--model", "MaskEnsemble", "--model.checkpoints", str(pair), "--data", "ShapesInstances"]
    assert evaluation.complete(by_name) == by_name
    assert str(experiment._run_of(Namespace(ckpt_path=None, config=[file]))) == f"runs/{tmp_path.name}/both"
    file.write_text("model: FCN8s\ndata: Shapes\n")
    for argv in (["test", "-c", str(file)], ["test", "--model", "FCN8s"]):
        with pytest.raises(evaluation.UsageError, match="needs a trained model"):
            evaluation.complete(argv)


def test_predict_merges_several_checkpoints(pair, tmp_path, capsys):
    from seglight.predict import main

    Image.fromarray(picture().permute(1, 2, 0).numpy()).save(tmp_path / "one.png")
    options = ["--source", str(tmp_path / "one.png"), "--min_score", "0"]
    words = ["--model.test_score", "mean", "--model.test_short_side=32"]  # the ensemble's own, and the members'
    assert main(["--ckpt_path", *pair, *options, "--out", str(tmp_path / "both"), *words]) == 0
    model = MaskEnsemble(pair, test_score="mean", test_options={"test_short_side": 32})
    expected = model.predict(tmp_path / "one.png", min_score=0.0).to_coco("one")
    assert json.loads((tmp_path / "both" / "one.json").read_text()) == expected
    alone = seglight.load(pair[0]).predict(tmp_path / "one.png", min_score=0.0).to_coco("one")
    assert [entry["score"] for entry in alone] != [entry["score"] for entry in expected]
    plain = saved(Plain(), tmp_path / "plain.ckpt")
    for others in ([pair[0], plain], [plain, pair[0]]):
        assert main(["--ckpt_path", *others, *options, "--out", str(tmp_path / "none")]) == 2
        assert "which is no instance model" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_an_ensemble_refuses(pair, tmp_path):
    with pytest.raises(ValueError, match="name at least one in model"):
        MaskEnsemble([])
    with pytest.raises(ValueError, match="test_options names lr; only options called test_"):
        MaskEnsemble(pair, test_options={"lr": 1.0})
    with pytest.raises(ValueError, match="vote is 0"):
        MaskEnsemble(pair, test_vote=0)
    with pytest.raises(FileNotFoundError, match=r"No checkpoint .*other\.ckpt"):
        MaskEnsemble([*pair, str(tmp_path / "other.ckpt")])
    plain = saved(Plain(), tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"plain\.ckpt holds a Plain, which is no instance model"):
        MaskEnsemble([pair[0], plain])
    swapped = saved(Pair(classes=["dog", "cat"]), tmp_path / "swapped.ckpt")
    message = r"swapped\.ckpt knows the 2 classes dog, cat, but .*0\.0\.ckpt has the 2 classes cat, dog"
    with pytest.raises(ValueError, match=message):
        MaskEnsemble([pair[0], swapped])
    with pytest.raises(ValueError, match="but the data has the 3 classes cat, dog, cow"):
        MaskEnsemble(pair, classes=["cat", "dog", "cow"], num_classes=3)
    classless = saved(Classless(), tmp_path / "classless.ckpt")
    with pytest.raises(ValueError, match=r"a Classless, .* a Pair: of these, one knows classes and the other does not"):
        MaskEnsemble([pair[0], classless])


def test_members_without_classes_need_not_agree_on_them(tmp_path):
    torch.manual_seed(0)
    paths = []
    for name, classes in (("a", ["cat", "dog"]), ("b", ["cow"])):
        model = FPNMaskProposal(len(classes), "resnet18", classes=classes, mask_size=7, test_short_side=32)
        paths.append(saved(model, tmp_path / f"{name}.ckpt"))
    model = MaskEnsemble(paths, classes=["a", "b", "c"], num_classes=3)  # of the data
    assert model.agnostic and model.num_classes == 3
    assert model.limits == (1, 100, 1000)
    assert (model.monitor, model.show) == (FPNMaskProposal.monitor, FPNMaskProposal.show)
    with torch.inference_mode():
        (found,) = model.detect([picture(32, 32)])
    assert 1 <= len(found["scores"]) <= 172  # of 2 * 86 windows of each


def test_an_ensemble_of_proposals_keeps_a_thousand(tmp_path, monkeypatch):
    model = FPNMaskProposal(backbone="resnet18", windows="5x5", mask_size=4)
    content = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(content)
    torch.save(content, tmp_path / "it.ckpt")
    ensemble = MaskEnsemble([str(tmp_path / "it.ckpt")])
    left = torch.arange(1200) * 10.0  # apart: nothing is suppressed
    boxes = torch.stack([left, left * 0, left + 8, left * 0 + 8], 1)
    found = {
        "boxes": boxes,
        "windows": boxes,
        "labels": torch.zeros(1200, dtype=torch.int64),
        "scores": torch.linspace(0, 1, 1200),
        "masks": torch.ones(1200, 4, 4),
    }
    (member,) = ensemble.network
    monkeypatch.setattr(member, "detect", lambda images: [found for _ in images])
    (merged,) = ensemble.detect([torch.zeros(3, 8, 8)])
    assert len(merged["scores"]) == ensemble.limits[-1] == 1000
