"""Mask proposals: counts, which window stands for which object, losses, and dense scores against single windows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seglight
from seglight.models import FPNMaskProposal
from seglight.models.fpn_proposals import FPNMaskProposalNetwork
from seglight.models.windows import EXCLUDED, NOTHING, POSITIVES, SAMPLES, STRIDES, WindowGrid, extent


def small(**options):
    torch.manual_seed(0)
    return FPNMaskProposal(backbone="resnet18", **options)


def target_of(masks, crowd=()):
    """A target of masks; `crowd` has the indices of crowds."""
    iscrowd = torch.zeros(len(masks), dtype=torch.bool)
    iscrowd[list(crowd)] = True
    boxes, _ = extent(masks)
    return {
        "boxes": boxes,
        "labels": torch.zeros(len(masks), dtype=torch.int64),
        "masks": masks,
        "iscrowd": iscrowd,
        "area": masks.sum((1, 2)).float(),
    }


def rectangles(size, *boxes):
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    return masks


def ellipse(size, x, y, a, b):
    rows, columns = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    return ((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 <= 1


def shapes_of(height, width):
    """Sizes of P2 to P6 of an image padded to multiples of 32."""
    height, width = -(-height // 32) * 32, -(-width // 32) * 32
    return [(-(-height // stride), -(-width // stride)) for stride in STRIDES]


def every_window(height, width, kernels=(5, 7)):
    """Kernel, stride and centre of all windows by plain loops, in the order of their numbers."""
    for kernel in kernels:
        for stride, (rows, columns) in zip(STRIDES, shapes_of(height, width), strict=True):
            for row in range(rows):
                for column in range(columns):
                    yield kernel, stride, ((column + 0.5) * stride, (row + 0.5) * stride)


# ------------------------------------------------------------------------------------------------------ the network


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 29_643_210),
        ({"windows": "5x5"}, 26_330_373),
        ({"windows": "7x7"}, 27_903_237),
        ({"mask_size": 28}, 30_246_498),
        ({"backbone": "resnet101"}, 48_635_338),
    ],
)
def test_parameter_count(options, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in FPNMaskProposal(**options).network.parameters()) == count


@pytest.mark.fidelity
def test_windows_cover_ten_cells_and_half_an_octave_more():
    grid = WindowGrid((5, 7), 32, 14)
    places = grid.places(shapes_of(256, 256))
    windows = grid.windows(places, torch.arange(2 * len(places.stride)))
    sides = (windows[:, 2:] - windows[:, :2]).unflatten(0, (2, -1))
    assert [round(scale) for scale in grid.scales] == [32, 64, 128, 256, 512, 45, 91, 181, 362, 724]
    for stride, side in zip(STRIDES, (40, 80, 160, 320, 640), strict=True):
        at = places.stride == stride
        assert at.sum() == (256 // stride) ** 2
        assert (sides[0, at] == side).all()
        torch.testing.assert_close(sides[1, at], torch.full((int(at.sum()), 2), side * math.sqrt(2)))
    assert windows[0].tolist() == [-18, -18, 22, 22]  # around the middle of the first cell of four pixels


@pytest.mark.parametrize(("kernels", "size"), [((5, 7), (70, 150)), ((5,), (33, 31)), ((7,), (64, 96))])
def test_numbers_of_windows(kernels, size):
    grid = WindowGrid(kernels, 32, 14)
    places = grid.places(shapes_of(*size))
    windows = grid.windows(places, torch.arange(len(kernels) * len(places.stride)))
    expected = [
        [x - half, y - half, x + half, y + half]
        for kernel, stride, (x, y) in every_window(*size, kernels)
        for half in [5 * stride * (math.sqrt(2) if kernel == 7 else 1)]
    ]
    torch.testing.assert_close(windows, torch.tensor(expected))


def by_windows(head, kernel, level, row, column):
    """Score and mask of one window, from the cells it sees alone."""
    reach = kernel // 2
    patch = F.pad(level, [reach] * 4)[..., row : row + kernel, column : column + kernel]
    hidden = F.conv2d(patch, head.hidden.weight, head.hidden.bias).relu()
    return head.score(hidden).flatten(), head.mask(hidden).view(head.mask_size, head.mask_size)


@pytest.mark.fidelity
@pytest.mark.parametrize("windows", ["5x5", "dual"])
def test_dense_scores_and_masks_equal_windows_one_by_one(windows):
    network = small(windows=windows, test_proposals=90).network.eval()
    for head in network.heads:
        nn.init.normal_(head.score.weight, std=0.1)
        nn.init.normal_(head.mask.weight, std=0.1)
        nn.init.normal_(head.hidden.bias)
    kernels = network.grid.kernels
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 128, *shape, generator=generator) for shape in shapes_of(32, 40)]
    size = (32, 40)
    places = network.grid.places([level.shape[-2:] for level in levels])
    with torch.inference_mode():
        maps = network.score_maps(levels)
        found = network.detect(levels, places, [size, size])
    number, expected = 0, [[], []]
    for kernel, head in zip(kernels, network.heads, strict=True):
        for level in levels:
            for row in range(level.shape[-2]):
                for column in range(level.shape[-1]):
                    for image in (0, 1):
                        with torch.inference_mode():
                            score, mask = by_windows(head, kernel, level[image : image + 1], row, column)
                        torch.testing.assert_close(maps[image, number], score[0], rtol=1e-4, atol=1e-4)
                        expected[image].append((float(score), number, mask.sigmoid()))
                    number += 1
    assert maps.shape == (2, number)
    cells = list(every_window(*size, kernels))
    for image, detections in enumerate(found):
        best = sorted(expected[image], key=lambda one: -one[0])
        best = [one for one in best if max(cells[one[1]][2][0] - 40, cells[one[1]][2][1] - 32) < cells[one[1]][1] / 2]
        assert len(detections["scores"]) == min(90, len(best))
        logits = torch.tensor([score for score, _, _ in best[:90]])
        torch.testing.assert_close(detections["scores"], logits.sigmoid(), rtol=1e-4, atol=1e-5)
        for i in (0, 1, 50, 89):
            torch.testing.assert_close(detections["masks"][i], best[i][2], rtol=1e-3, atol=1e-4)
            kernel, stride, (x, y) = cells[best[i][1]]
            half = 5 * stride * (math.sqrt(2) if kernel == 7 else 1)
            torch.testing.assert_close(detections["windows"][i], torch.tensor([x - half, y - half, x + half, y + half]))


# ---------------------------------------------------------------------------------------------------------- targets


def places_of(owner, size, index, kernels=(5, 7)):
    """Kernel, stride and centre of the windows that stand for an object."""
    return [
        window for window, value in zip(every_window(*size, kernels), owner.tolist(), strict=True) if value == index
    ]


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("side", "kernel", "stride"),
    [
        (128, 5, 16),
        (181, 7, 16),
        (32, 5, 4),
        (45, 7, 4),
        (90, 7, 8),
        (256, 5, 32),
        (8, 5, 4),
        (150, 5, 16),
        (155, 7, 16),
    ],
)
def test_scale_of_a_centred_object(side, kernel, stride):
    """The longer side decides, to the nearest scale in octaves: between 128 and 181 the border is at 152."""
    size = (256, 256)
    low = 128 - side // 2
    masks = rectangles(size, (low, 124, low + side, 132))
    grid = WindowGrid((5, 7), 32, 14)
    owner = grid.assign(grid.places(shapes_of(*size)), target_of(masks))
    mine = places_of(owner, size, 0)
    assert {(k, s) for k, s, _ in mine} == {(kernel, stride)}
    cx = low + side / 2
    assert all(abs(x - cx) <= stride and abs(y - 128) <= stride for _, _, (x, y) in mine)
    assert len(mine) == 4  # the centre lies between cells, and the next but one is a cell and a half away


@pytest.mark.parametrize(("kernels", "canonical"), [((5, 7), 32), ((5,), 32), ((7,), 32), ((5, 7), 16), ((5, 7), 80)])
def test_assignment_equals_loops(kernels, canonical):
    generator = torch.Generator().manual_seed(canonical)
    size = (150, 200)
    masks = [ellipse(size, *(float(v) for v in torch.rand(4, generator=generator) * torch.tensor([200, 150, 60, 60])))
             for _ in range(25)]  # fmt: skip
    masks += [torch.zeros(size, dtype=torch.bool), *rectangles(size, (190, 140, 200, 150), (0, 0, 200, 150))]
    masks += list(rectangles(size, (50, 50, 70, 70), (50, 50, 70, 70), (52, 50, 72, 70)))  # twins and a neighbour
    masks = torch.stack(masks)
    crowd = [3, 7]
    grid = WindowGrid(kernels, canonical, 14)
    owner = grid.assign(grid.places(shapes_of(*size)), target_of(masks, crowd)).tolist()
    scales = [(k, s, canonical * s / 4 * (2**0.5 if k == 7 else 1)) for k in kernels for s in STRIDES]
    objects = []
    for index, mask in enumerate(masks):
        if index in crowd or not mask.any():
            continue
        ys, xs = mask.nonzero().unbind(1)
        x1, y1, x2, y2 = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        longer = float(max(x2 - x1, y2 - y1))
        nearest = min(scales, key=lambda scale: abs(math.log(scale[2] / longer)))
        objects.append((index, nearest[:2], (float(x1 + x2) / 2, float(y1 + y2) / 2)))
    union = masks[crowd].any(0)
    expected = []
    for kernel, stride, (x, y) in every_window(*size, kernels):
        beyond = x - stride / 2 >= size[1] or y - stride / 2 >= size[0]
        if beyond or union[min(int(y), size[0] - 1), min(int(x), size[1] - 1)]:
            expected.append(EXCLUDED)
        else:
            reach = stride * canonical / 32
            near = [
                ((x - cx) ** 2 + (y - cy) ** 2, index)
                for index, scale, (cx, cy) in objects
                if scale == (kernel, stride) and abs(x - cx) <= reach and abs(y - cy) <= reach
            ]
            expected.append(min(near)[1] if near else NOTHING)
    assert owner == expected
    assert len(set(owner)) > 12


def test_every_object_has_a_window_even_at_the_finest_scales():
    """With `canonical` 16 a window may be half a cell away only, which the nearest always is."""
    generator = torch.Generator().manual_seed(0)
    size = (100, 140)
    grid = WindowGrid((5, 7), 16, 14)
    places = grid.places(shapes_of(*size))
    for _ in range(60):
        x1, y1 = (int(torch.randint(0, side - 1, (), generator=generator)) for side in size[::-1])
        x2, y2 = (
            int(torch.randint(low + 1, side + 1, (), generator=generator)) for low, side in ((x1, 140), (y1, 100))
        )
        owner = grid.assign(places, target_of(rectangles(size, (x1, y1, x2, y2))))
        assert (owner == 0).any(), (x1, y1, x2, y2)


def test_mask_targets_on_whole_cells():
    """A window of 28 pixels, two to a cell; beyond the image there is nothing."""
    grid = WindowGrid((5,), 32, 14)
    masks = rectangles((40, 40), (10, 12, 20, 30), (0, 0, 40, 40))
    seen = grid.mask_targets(masks, torch.tensor([0, 1]), torch.tensor([[4.0, 4, 32, 32], [-14, -7, 14, 21]]))
    expected = torch.zeros(2, 14, 14)
    expected[0, 4:13, 3:8] = 1
    expected[1, 4:, 7:] = 1
    expected[1, 3, 7:] = 1  # half of it lies in the image
    assert seen.dtype == torch.float32
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("mask_size", [14, 28])
def test_mask_targets_are_the_majority_of_each_cell(mask_size):
    grid = WindowGrid((5, 7), 32, mask_size)
    size = (160, 200)
    masks = torch.stack(
        [ellipse(size, 100, 80, 30, 50), ellipse(size, 20, 150, 40, 20), ~ellipse(size, 90, 90, 33, 21)]
    )
    generator = torch.Generator().manual_seed(0)
    places = grid.places(shapes_of(*size))
    chosen = torch.randint(0, 2 * len(places.stride), (60,), generator=generator)
    objects = torch.randint(0, 3, (60,), generator=generator)
    windows = grid.windows(places, chosen)
    seen = grid.mask_targets(masks, objects, windows)
    fine = 16  # samples along the side of a cell
    mixed = 0
    for one, (index, (x1, y1, x2, y2)) in enumerate(zip(objects.tolist(), windows.tolist(), strict=True)):
        at = (torch.arange(mask_size * fine) + 0.5) / (mask_size * fine)
        x, y = (x1 + at * (x2 - x1)).floor().long(), (y1 + at * (y2 - y1)).floor().long()
        value = masks[index][y.clamp(0, size[0] - 1)][:, x.clamp(0, size[1] - 1)].float()
        value *= ((x >= 0) & (x < size[1])) * ((y >= 0) & (y < size[0]))[:, None]
        share = F.avg_pool2d(value[None], fine)[0]
        clear = (share - 0.5).abs() > 0.2  # bilinear reading blurs by a pixel, up to half a cell of the finest
        assert torch.equal(seen[one][clear], (share[clear] > 0.5).float())
        mixed += 0 < share.mean() < 1
    assert mixed > 20


def test_extent():
    masks = rectangles((9, 11), (2, 3, 5, 4), (0, 0, 11, 9), (10, 8, 11, 9), (3, 3, 3, 3))
    boxes, filled = extent(masks)
    assert boxes.tolist() == [[2, 3, 5, 4], [0, 0, 11, 9], [10, 8, 11, 9], [0, 0, 11, 9]]
    assert filled.tolist() == [True, True, True, False]


# --------------------------------------------------------------------------------------------------------- sampling


def drawn(owner, seed=0):
    torch.manual_seed(seed)
    chosen, counts = WindowGrid((5, 7), 32, 14).sample(owner)
    first = min(POSITIVES, len(owner))
    return chosen[:first][counts[:first]], chosen[first:][counts[first:]]


@pytest.mark.fidelity
@pytest.mark.parametrize("positives", [0, 1, 20, 32, 33, 400])
def test_sample_is_one_to_three(positives):
    generator = torch.Generator().manual_seed(0)
    owner = torch.full((3000,), NOTHING)
    owner[2000:] = EXCLUDED
    owner[torch.randperm(2000, generator=generator)[:positives]] = torch.arange(positives)
    owner = owner[torch.randperm(3000, generator=generator)]
    chosen, others = drawn(owner)
    assert len(chosen) == min(positives, 32)
    assert len(others) == 128 - len(chosen)
    assert (owner[chosen] >= 0).all()
    assert (owner[others] == NOTHING).all()
    assert len(set(chosen.tolist() + others.tolist())) == SAMPLES


def test_sample_is_the_seeds_and_reaches_all():
    owner = torch.full((500,), NOTHING)
    owner[:100] = 0
    assert all(torch.equal(a, b) for a, b in zip(drawn(owner, 3), drawn(owner, 3), strict=True))
    rounds = [drawn(owner, seed) for seed in range(40)]
    assert set(torch.cat([chosen for chosen, _ in rounds]).tolist()) == set(range(100))
    assert set(torch.cat([others for _, others in rounds]).tolist()) == set(range(100, 500))


def test_sample_of_few_windows():
    owner = torch.tensor([NOTHING, 0, EXCLUDED, NOTHING])
    chosen, others = drawn(owner)
    assert chosen.tolist() == [1]
    assert sorted(others.tolist()) == [0, 3]


# ------------------------------------------------------------------------------------------------------- the losses


@pytest.mark.fidelity
def test_losses_equal_loops_and_masks_count_ten_times(monkeypatch):
    """Scores of all sampled windows, masks of the positives; the mean over the whole batch, masks ten times."""
    network = small().network.train()
    for head in network.heads:
        nn.init.normal_(head.score.weight, std=0.05)
        nn.init.normal_(head.mask.weight, std=0.05)
    size = (96, 96)
    masks = torch.stack([ellipse(size, 40, 50, 16, 10), ellipse(size, 60, 30, 20, 23)])
    targets = [target_of(masks), target_of(masks[:0]), target_of(masks[:1])]
    levels = [torch.randn(3, 128, *shape) for shape in shapes_of(*size)]
    places = network.grid.places([level.shape[-2:] for level in levels])
    kept = []
    sample = WindowGrid.sample
    monkeypatch.setattr(
        WindowGrid, "sample", lambda self, owner: kept.append((owner, *sample(self, owner))) or kept[-1][1:]
    )
    losses = network.losses(levels, places, targets)
    with torch.no_grad():
        maps = network.score_maps(levels)
        scores, grids = [], []
        for image, (owner, chosen, counts) in enumerate(kept):
            for window in chosen[counts].tolist():
                positive = int(owner[window]) >= 0
                logit = maps[image, window]
                scores.append(float(F.softplus(-logit if positive else logit)))
                if positive:
                    head = network.heads[window // len(places.stride)]
                    place = window % len(places.stride)
                    level = STRIDES.index(int(places.stride[place]))
                    column, row = (places.centre[place] / places.stride[place] - 0.5).long().tolist()
                    _, mask = by_windows(head, head.kernel, levels[level][image : image + 1], row, column)
                    at = network.grid.windows(places, torch.tensor([window]))
                    wanted = network.grid.mask_targets(masks, owner[window : window + 1], at)[0]
                    grids.append(float(F.binary_cross_entropy_with_logits(mask, wanted)))
    assert len(scores) == 3 * 128
    assert len(grids) > 8
    assert losses["score"].item() == pytest.approx(sum(scores) / len(scores), rel=1e-4)
    assert losses["mask"].item() == pytest.approx(10 * sum(grids) / len(grids), rel=1e-4)


def test_images_without_objects_and_crowds_alone():
    network = small().network.train()
    size = (64, 80)
    image = torch.randn(3, *size)
    crowd = target_of(rectangles(size, (0, 0, 40, 64)), crowd=[0])
    for target in (target_of(rectangles(size)), crowd, target_of(rectangles(size, (5, 5, 5, 5)))):
        losses, detections = network([image, image], [target, target])
        assert detections == []
        assert losses["mask"].item() == 0
        assert losses["score"].item() > 0
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad.isfinite().all() for p in network.parameters())
    owner = network.grid.assign(network.grid.places(shapes_of(*size)), crowd)
    for value, (_, stride, (x, y)) in zip(owner.tolist(), every_window(*size), strict=True):
        on_crowd, beyond = min(x, 79) < 40, x - stride / 2 >= 80 or y - stride / 2 >= 64
        assert value == (EXCLUDED if on_crowd or beyond else NOTHING)


def test_all_parameters_get_gradients():
    network = small().network.train()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)  # timm starts residual branches at zero, which shields their convolutions
    size = (128, 128)
    masks = torch.stack([ellipse(size, 40, 50, 16, 10), ellipse(size, 60, 60, 45, 23)])
    losses, _ = network([torch.randn(3, *size)] * 2, [target_of(masks)] * 2)
    torch.stack(list(losses.values())).sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum()]


# ------------------------------------------------------------------------------------------------------ the detections


@pytest.mark.parametrize("size", [(33, 47), (64, 64), (7, 100)])
def test_sizes_that_are_no_multiples_of_32(size):
    network = small(mask_size=7).network.eval()
    with torch.inference_mode():
        losses, (alone,) = network([torch.randn(3, *size, generator=torch.Generator().manual_seed(1))], None)
    count = 2 * sum(-(-size[0] // stride) * -(-size[1] // stride) for stride in STRIDES)
    assert losses == {}
    assert len(alone["scores"]) == min(1000, count)
    assert alone["masks"].shape == (len(alone["scores"]), 7, 7)
    assert (alone["scores"].diff() <= 0).all()
    assert (alone["scores"] > 0).all()  # none of the padding
    assert (alone["labels"] == 0).all()
    assert alone["labels"].dtype == torch.int64
    assert (alone["boxes"] >= 0).all()
    assert (alone["boxes"][:, 0::2] <= size[1]).all()
    assert (alone["boxes"][:, 1::2] <= size[0]).all()
    centre = (alone["windows"][:, :2] + alone["windows"][:, 2:]) / 2
    assert (centre[:, 0] < size[1] + 32).all()
    for name in ("boxes", "scores", "masks", "windows"):
        assert alone[name].dtype == torch.float32


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_boxes_are_those_of_the_masks(threshold):
    model = small(test_threshold=threshold)
    network = model.network.eval()
    for head in network.heads:
        nn.init.normal_(head.mask.weight, std=0.1)
        nn.init.constant_(head.mask.bias, -2.0)  # some cells belong to the object, in some windows none
    size = (64, 64)
    with torch.inference_mode():
        _, (found,) = network([torch.randn(3, *size)], None)
    for box, mask, (x1, y1, x2, _) in zip(found["boxes"], found["masks"], found["windows"].tolist(), strict=True):
        rows, columns = (mask >= threshold).nonzero().unbind(1)
        cell = (x2 - x1) / 14
        low_x, high_x, low_y, high_y = 0, 14, 0, 14
        if len(rows):
            low_x, high_x, low_y, high_y = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
        expected = torch.tensor([x1 + low_x * cell, y1 + low_y * cell, x1 + high_x * cell, y1 + high_y * cell])
        torch.testing.assert_close(box, expected.clamp(0, 64), rtol=1e-4, atol=1e-3)
    assert found["boxes"].unique(dim=0).shape[0] > 100
    assert 0.01 < (found["masks"] >= threshold).float().mean() < 0.5


def scene():
    """An image of four plain shapes on noise, and its target."""
    size = (80, 80)
    boxes = rectangles(size, (4, 44, 40, 76), (48, 52, 78, 78))
    masks = torch.stack([ellipse(size, 20, 20, 16, 12), ellipse(size, 58, 24, 20, 22), *boxes])
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(60, 100, (3, *size), generator=generator).float()
    for mask, colour in zip(masks, ((220, 60, 60), (60, 220, 60), (60, 60, 220), (220, 220, 60)), strict=True):
        image[:, mask] = torch.tensor(colour)[:, None].float()
    return image.to(torch.uint8), target_of(masks)


def recall(found, masks):
    """Average recall over the thresholds 0.5 to 0.95: the best overlap that each object has with any proposal."""
    from seglight.masks import paste

    pasted = paste(found["masks"], found["windows"], tuple(masks.shape[-2:])).flatten(1).float()
    truth = masks.flatten(1).float()
    both = truth @ pasted.T
    overlap = (both / (truth.sum(1)[:, None] + pasted.sum(1) - both)).amax(1)
    return torch.stack([overlap >= 0.5 + 0.05 * step for step in range(10)]).float().mean().item()


def test_learns_an_image():
    model = small(batch_norm="eval")
    image, target = scene()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)
    pixels = model.normalize(image[None])[0]
    totals = []
    for _ in range(20):
        losses, _ = model.network([pixels], [target])
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    model.eval()
    with torch.inference_mode():
        _, (found,) = model.network([pixels], None)
    assert totals[-1] < totals[0] / 4
    assert recall({name: value[:60] for name, value in found.items()}, target["masks"]) > 0.5


# --------------------------------------------------------------------------------------------------------- the model


def test_agnostic_and_its_limits():
    assert FPNMaskProposal.agnostic
    assert FPNMaskProposal.limits == (1, 100, 1000)
    model = small(num_classes=3, test_proposals=50, test_threshold=0.3, canonical=16, mask_size=7)
    assert model.network.proposals == 50
    assert model.network.threshold == 0.3
    assert model.network.grid.canonical == 16
    assert model.network.grid.mask_size == model.network.mask_size == 7
    assert model.num_classes == 3
    assert small().num_classes == 1


def test_what_is_found_has_no_class():
    model = small(num_classes=2, classes=["cat", "dog"], mask_size=7, test_short_side=32, test_proposals=20)
    nn.init.constant_(model.network.heads[0].score.bias, 3.0)
    found = model.predict(torch.zeros(32, 32, 3, dtype=torch.uint8).numpy())
    assert found.classes == ["object"]
    assert found.names == ["object"] * 20


def test_a_training_step_and_the_checkpoint_rebuilds(tmp_path):
    from pytorch_lightning import Trainer

    image, target = scene()
    batch = {"image": [image, image[:, :70]], "image_id": ["a", "b"]}
    batch["target"] = [target, target_of(target["masks"][:, :70])]
    model = small(num_classes=4, windows="5x5", mask_size=28, test_short_side=96, lr=0.01)
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader([batch], batch_size=None))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    rebuilt = seglight.load(tmp_path / "last.ckpt")
    model.eval()
    with torch.inference_mode():
        (ours,), (theirs,) = model.detect([image[:, :60]]), rebuilt.detect([image[:, :60]])
    assert ours["masks"].shape[1:] == (28, 28)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    small(num_classes=7, windows="5x5", mask_size=28, test_proposals=10).on_load_checkpoint(content)  # what may differ
    with pytest.raises(ValueError, match="windows='5x5', but this model has windows='dual'"):
        small(mask_size=28).on_load_checkpoint(content)
    with pytest.raises(ValueError, match="canonical=32, but this model has canonical=16"):
        small(windows="5x5", mask_size=28, canonical=16).on_load_checkpoint(content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": "9x9"}, "windows is '9x9'; choose one of 5x5, 7x7, dual"),
        ({"canonical": 8}, "canonical is 8; below 16 pixels .* Enlarge the images instead"),
        ({"mask_size": 0}, "mask_size is 0; it must be at least 1"),
        ({"test_proposals": 0}, "proposals is 0; it must be at least 1"),
        ({"backbone": "vit_tiny_patch16_224"}, r"strides \[16, 16, 16\], none at 4"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        FPNMaskProposal(**{"backbone": "resnet18", **options})


def test_network_alone():
    with torch.device("meta"):
        network = FPNMaskProposalNetwork("resnet18", canonical=64)
    assert network.grid.scales[0] == 64
