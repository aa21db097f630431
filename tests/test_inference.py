"""Labels, windows, scales and tiles, against torch's plain ways and results known by hand."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seglight import inference
from seglight.inference import (
    labels,
    mirror_pad,
    multiscale,
    overlap_tile,
    rotations,
    scaled_size,
    sliding,
    window_starts,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(logits, size, align_corners=False):
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners).argmax(1)


# ------------------------------------------------------------------------------ labels

SIZES = [
    # logits, label
    ((16, 20), (64, 160)),
    ((17, 23), (67, 181)),  # no whole factor
    ((40, 50), (33, 139)),  # rows shrink, columns grow
    ((40, 300), (20, 150)),  # both shrink
    ((33, 40), (33, 150)),  # rows stay
    ((9, 150), (37, 150)),  # columns stay
    ((1, 1), (5, 140)),
    ((2, 1), (300, 130)),
    ((70, 5), (71, 129)),  # many bands
    ((12, 14), (12, 14)),
    ((30, 140), (30, 140)),  # nothing to resize
    ((8, 9), (50, 60)),  # narrow: another kernel of torch
]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 21, 60])
@pytest.mark.parametrize(("small", "size"), SIZES)
def test_labels_equal_interpolate_and_argmax(small, size, classes, align_corners):
    noise = random(2, classes, *small)
    smooth = F.avg_pool2d(noise, 5, stride=1, padding=2) * 100
    for logits in (noise, smooth):
        ours = labels(logits, size, align_corners)
        assert ours.dtype == torch.uint8
        assert torch.equal(ours.long(), plain(logits, size, align_corners))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("classes", [3, 21])
@pytest.mark.parametrize("size", [(150, 333), (40, 80), (99, 88), (37, 200)])
def test_the_resized_values_are_those_of_torch_to_the_bit(size, classes, format, monkeypatch):
    # Labels rarely show a wrong last bit, so look at the values that compete.
    seen = []
    best = inference._best
    monkeypatch.setattr(inference, "_best", lambda stripe, rank: seen.append(stripe.clone()) or best(stripe, rank))
    logits = random(1, classes, 37, 41)
    labels(logits.contiguous(memory_format=format), size)
    values = torch.cat([s.flatten(1) for s in seen], dim=1).view(1, classes, *size)
    same_kernel = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)  # 2.11 rounds row weights otherwise
    tolerance = 0 if same_kernel else 2e-5
    expected = F.interpolate(logits, size=size, mode="bilinear")
    torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)


def test_the_first_of_equal_classes_wins():
    logits = torch.zeros(1, 5, 10, 10)
    assert not labels(logits, (40, 200)).any()
    logits[:, 0] = -1
    assert (labels(logits, (40, 200)) == 1).all()
    zeros = torch.where(random(1, 5, 10, 10) > 0, 0.0, -0.0)
    for size in ((10, 10), (40, 200)):
        assert not labels(zeros, size).any()


def test_differences_below_a_normal_float_count():
    logits = torch.tensor([0.0, 1e-45, 0.0])[None, :, None, None].expand(1, 3, 4, 4)
    assert (labels(logits, (4, 4)) == 1).all()


def test_many_classes_need_more_than_a_byte():
    logits = random(1, 300, 6, 7)
    logits[:, 299, 2] += 100
    for size in ((24, 140), (6, 7)):
        ours = labels(logits, size)
        assert ours.dtype == torch.int64
        assert torch.equal(ours, plain(logits, size))
    last = torch.zeros(1, 255, 5, 5)
    last[:, 254] = 1
    assert (labels(last, (20, 150)) == 254).all()


def test_labels_leave_logits_alone_and_need_no_gradient():
    logits = random(1, 4, 6, 130).requires_grad_()
    before = logits.detach().clone()
    for size in ((6, 130), (9, 150)):
        assert torch.equal(labels(logits * 1, size).long(), plain(before, size))
    stored = before.clone()
    labels(stored, (6, 130))
    assert torch.equal(stored, before)


def test_labels_do_not_depend_on_the_memory_format():
    logits = random(2, 21, 30, 40)
    last = logits.contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels(last, (97, 155)), labels(logits, (97, 155)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    logits = random(1, 21, 16, 18).to(dtype)
    wide = logits if dtype == torch.float64 else logits.float()
    assert torch.equal(labels(logits, (64, 150)).long(), plain(wide, (64, 150)))


@pytest.mark.parametrize("classes", [1, 5, 300])
def test_nan_gives_some_class(classes):
    logits = random(1, classes, 8, 8)
    logits[:, -1, 3] = float("nan")
    logits[:, :, 6] = float("nan")
    for size in ((8, 8), (3, 3), (32, 160)):
        found = labels(logits, size)
        assert found.min() >= 0 and found.max() < classes


def test_stripes_do_not_show(monkeypatch):
    logits = random(1, 6, 19, 21)
    whole = labels(logits, (90, 170))
    monkeypatch.setattr(inference, "STRIPE", 1)
    monkeypatch.setattr(inference, "BAND", 3)
    assert torch.equal(labels(logits, (90, 170)), whole)


# ----------------------------------------------------------------------------- sliding


def constant(image):
    """Three classes, whatever the image, at a stride of 4."""
    size = (image.shape[-2] // 4, image.shape[-1] // 4)
    return torch.tensor([0.0, 1.0, 3.0])[None, :, None, None].expand(len(image), 3, *size)


def pointwise(image):
    """Logits that depend on the pixel alone: every window must agree."""
    return torch.cat([image.sum(1, keepdim=True), image[:, :2]], dim=1)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 20, 23])
@pytest.mark.parametrize("stride", [1, 3, 5, 8])
def test_windows_cover_every_pixel_and_stay_inside(length, stride):
    window = min(8, length)
    starts = window_starts(length, window, min(stride, window))
    assert starts[0] == 0 and starts[-1] == length - window
    assert starts == sorted(set(starts))
    assert set().union(*(range(s, s + window) for s in starts)) == set(range(length))


@pytest.mark.parametrize("aggregate", ["softmax", "logits"])
@pytest.mark.parametrize("size", [(8, 8), (5, 30), (21, 13), (3, 3)])
def test_a_constant_net_stays_constant(size, aggregate):
    out = sliding(constant, random(2, 3, *size), 8, 5, aggregate)
    assert out.shape == (2, 3, *size)
    probability = torch.tensor([0.0, 1.0, 3.0]).softmax(0)[None, :, None, None].expand_as(out)
    torch.testing.assert_close(out.softmax(1), probability)


def test_windows_that_agree_give_the_whole_image():
    image = random(2, 3, 19, 26)
    out = sliding(pointwise, image, (8, 10), (5, 7))
    torch.testing.assert_close(out.softmax(1), pointwise(image).softmax(1))
    torch.testing.assert_close(sliding(pointwise, image, 8, 5, "logits"), pointwise(image))


@pytest.mark.parametrize("aggregate", ["softmax", "logits"])
def test_sliding_equals_an_average_by_hand(aggregate):
    net = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)  # the zeros at the border make windows disagree
    image = random(1, 3, 11, 14)
    votes = torch.zeros(1, 4, 11, 14)
    seen = torch.zeros(11, 14)
    for y in (0, 4, 5):
        for x in (0, 4, 8):
            out = net(image[..., y : y + 6, x : x + 6])
            votes[..., y : y + 6, x : x + 6] += out.softmax(1) if aggregate == "softmax" else out
            seen[y : y + 6, x : x + 6] += 1
    out = sliding(net, image, 6, 4, aggregate)
    expected = votes / seen
    torch.testing.assert_close(out.exp() if aggregate == "softmax" else out, expected)
    assert not torch.allclose(out, net(image), atol=1e-3)


def test_an_image_smaller_than_the_window_is_padded_with_zero():
    shapes = []

    def net(image):
        shapes.append(tuple(image.shape))
        assert not image[..., 5:, :].any() and not image[..., 7:].any()
        return pointwise(image)

    image = random(1, 3, 5, 7) + 1
    torch.testing.assert_close(sliding(net, image, (9, 12), 4).softmax(1), pointwise(image).softmax(1))
    assert shapes == [(1, 3, 9, 12)]


def watched(net, calls):
    def call(image):
        calls.append(image.clone())
        return net(image)

    return call


def test_padding_may_lie_on_all_sides_and_have_a_colour():
    image, calls = random(2, 3, 5, 7) + 1, []
    colour = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    out = sliding(watched(pointwise, calls), image, (8, 12), 4, "logits", centred=True, fill=colour)
    torch.testing.assert_close(out, pointwise(image))
    (seen,) = calls
    assert torch.equal(seen[..., 1:6, 2:9], image)
    seen[..., 1:6, 2:9] = colour
    assert torch.equal(seen, colour.expand_as(seen))


@pytest.mark.parametrize("size", [(9, 20), (8, 8), (14, 13), (3, 30)])
def test_the_last_window_may_reach_over_the_border(size):
    image, calls = random(1, 3, *size), []
    out = sliding(watched(pointwise, calls), image, 8, 5, "logits", last="pad", fill=-1.0)
    torch.testing.assert_close(out, pointwise(image))
    rows, columns = (len(range(0, max(side - 8, 0), 5)) + 1 for side in size)
    canvas = F.pad(image, (0, 8 + 5 * (columns - 1) - size[1], 0, 8 + 5 * (rows - 1) - size[0]), value=-1.0)
    windows = [canvas[..., 5 * r : 5 * r + 8, 5 * c : 5 * c + 8] for r in range(rows) for c in range(columns)]
    assert len(calls) == len(windows)
    assert all(torch.equal(seen, window) for seen, window in zip(calls, windows, strict=True))


@pytest.mark.parametrize("aggregate", ["softmax", "exp", "logits"])
def test_each_window_is_looked_at_in_a_mirror(aggregate):
    net = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    image = random(1, 3, 6, 11)
    votes, seen = torch.zeros(1, 4, 6, 11), torch.zeros(11)
    for x in (0, 4, 5):
        window = image[..., x : x + 6]
        there, back = net(window), net(window.flip(-1)).flip(-1)
        vote = {"logits": (there + back) / 2, "softmax": (there.softmax(1) + back.softmax(1)) / 2}
        votes[..., x : x + 6] += (there + back).exp() if aggregate == "exp" else vote[aggregate]
        seen[x : x + 6] += 1
    out = sliding(net, image, 6, 4, aggregate, flip=True)
    torch.testing.assert_close(out if aggregate == "logits" else out.exp(), votes / seen)
    if aggregate == "softmax":  # the mirror image of the whole would have its windows elsewhere
        assert not torch.allclose(
            multiscale(partial(sliding, net, window=6, stride=4), image, flip=True), out, atol=1e-3
        )


@pytest.mark.parametrize("stride", [0, 9, (4, 9)])
def test_a_stride_that_misses_pixels_is_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        sliding(pointwise, random(1, 3, 20, 20), 8, stride)


def test_an_unknown_last_window_is_refused():
    with pytest.raises(ValueError, match='last is \'cut\'; choose "shift" or "pad"'):
        sliding(pointwise, random(1, 3, 8, 8), 8, 8, last="cut")


def test_an_unknown_way_to_average_is_refused():
    with pytest.raises(ValueError, match='aggregate is \'max\'; choose "softmax", "logits" or "exp"'):
        sliding(pointwise, random(1, 3, 8, 8), 8, 8, "max")


def test_impossible_classes_stay_finite():
    def certain(image):
        return torch.tensor([0.0, 1e4])[None, :, None, None].expand(len(image), 2, *image.shape[-2:])

    for aggregate in ("softmax", "exp"):
        windows = partial(sliding, certain, window=8, stride=8, aggregate=aggregate, flip=True)
        out = multiscale(windows, random(1, 3, 16, 16), (0.7, 1.0), aggregate=aggregate)
        assert out.isfinite().all() and (out.argmax(1) == 1).all()


# -------------------------------------------------------------------------- multiscale


def test_one_scale_is_the_net_itself():
    image = random(2, 3, 9, 12)
    torch.testing.assert_close(multiscale(pointwise, image).softmax(1), pointwise(image).softmax(1))


@pytest.mark.parametrize("aggregate", ["softmax", "logits", "exp"])
def test_multiscale_equals_an_average_by_hand(aggregate):
    net = nn.Conv2d(3, 4, 3, padding=1, stride=2).requires_grad_(False)
    image = random(1, 3, 13, 18)
    sizes = []

    def watched(x):
        sizes.append(tuple(x.shape[-2:]))
        return net(x)

    votes = 0
    for size in ((6, 9), (13, 18), (20, 27)):
        scaled = F.interpolate(image, size, mode="bilinear")
        looks = [net(scaled), net(scaled.flip(-1)).flip(-1)]
        looks = [F.interpolate(look, (13, 18), mode="bilinear") for look in looks]
        if aggregate == "exp":
            votes = votes + (looks[0] + looks[1]).exp() / 3
        else:
            votes = votes + sum(look.softmax(1) if aggregate == "softmax" else look for look in looks) / 6
    out = multiscale(watched, image, (0.5, 1, 1.5), flip=True, aggregate=aggregate)
    torch.testing.assert_close(out if aggregate == "logits" else out.exp(), votes)
    assert sizes == [(6, 9), (6, 9), (13, 18), (13, 18), (20, 27), (20, 27)]


def test_flip_makes_the_result_mirror_with_the_image():
    net = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    image = random(1, 3, 10, 11)
    turned = multiscale(net, image.flip(-1), flip=True)
    torch.testing.assert_close(turned.flip(-1), multiscale(net, image, flip=True))
    assert not torch.allclose(net(image.flip(-1)).flip(-1), net(image), atol=1e-3)


def test_sliding_and_multiscale_nest():
    image = random(1, 3, 16, 24)
    net = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    windows = partial(sliding, net, window=8, stride=6)
    by_hand = (windows(image).exp() + windows(image.flip(-1)).flip(-1).exp()) / 2
    torch.testing.assert_close(multiscale(windows, image, flip=True).exp(), by_hand)


@pytest.mark.parametrize(
    ("size", "long_side", "expected"),
    [
        ((375, 500), 512, [(192, 256), (384, 512), (672, 896)]),
        ((500, 333), 520, [(260, 173), (520, 346), (910, 606)]),
        ((40, 40), 30, [(15, 15), (30, 30), (52, 52)]),
        ((13, 18), None, [(6, 9), (13, 18), (23, 32)]),
        ((1, 900), 60, [(1, 30), (1, 60), (1, 105)]),
    ],
)
def test_sizes_of_scales(size, long_side, expected):
    assert [inference.scaled_size(size, scale, long_side) for scale in (0.5, 1.0, 1.75)] == expected


def test_sizes_of_scales_whose_corners_coincide():
    """As TensorFlow's DeepLab has it, scale_dimension; a common longer side is a size, aligned or not."""
    sizes = [inference.scaled_size((375, 513), scale, align_corners=True) for scale in (0.5, 1.0, 1.75)]
    assert sizes == [(188, 257), (375, 513), (655, 897)]
    assert inference.scaled_size((1, 1), 0.1, align_corners=True) == (1, 1)
    assert inference.scaled_size((375, 500), 0.5, 512, align_corners=True) == (192, 256)


def test_scales_of_a_common_size_and_votes_resized_as_such():
    net = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    image, by_hand = random(1, 3, 12, 20), 0
    for size in ((6, 10), (15, 25)):
        scaled = F.interpolate(image, size, mode="bilinear", align_corners=True)
        by_hand = by_hand + F.interpolate(net(scaled).softmax(1), (12, 20), mode="bilinear") / 2
    out = multiscale(net, image, (0.5, 1.25), long_side=20, resize="votes", align_image=True)
    torch.testing.assert_close(out.exp(), by_hand)
    for other in ({"resize": "logits", "align_image": True}, {"resize": "votes"}):
        assert not torch.allclose(multiscale(net, image, (0.5, 1.25), long_side=20, **other), out, atol=1e-4)


def test_an_unknown_way_to_resize_is_refused():
    with pytest.raises(ValueError, match='resize is \'labels\'; choose "logits" or "votes"'):
        multiscale(pointwise, random(1, 3, 8, 8), resize="labels")


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (-1.0,), (float("nan"),)])
def test_scales_are_factors_above_0(scales):
    with pytest.raises(ValueError, match="at least one factor above 0"):
        multiscale(pointwise, random(1, 3, 8, 8), scales)


# ------------------------------------------------------------------------ overlap-tile


def valid_net(channels: int = 2) -> nn.Sequential:
    """Three valid convolutions: loses 4 pixels on each side, and is the same everywhere."""
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, 5, 3), nn.Tanh(), nn.Conv2d(5, 5, 5), nn.Tanh(), nn.Conv2d(5, 3, 3)
    return nn.Sequential(*layers).double().requires_grad_(False)


@pytest.mark.fidelity
@pytest.mark.parametrize("tile", [(4, 4), (7, 5), (16, 16), (40, 64), 3])
@pytest.mark.parametrize("size", [(16, 16), (23, 31), (5, 40)])
def test_tiles_equal_the_whole_image(size, tile):
    net = valid_net()
    image = random(2, 2, *size).double()
    whole = net(F.pad(image, (4, 4, 4, 4), mode="reflect"))
    torch.testing.assert_close(overlap_tile(net, image, tile, 4), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(3, 4), (1, 1), (2, 9), (1, 6), (4, 3)])
def test_a_margin_beyond_the_image_mirrors_again(size):
    net = valid_net()
    image = random(1, 2, *size).double()

    def reflected(n):  # walks to and fro between the borders
        path, at, step = [], 0, 1
        for _ in range(n + 8):
            path.append(at)
            if n > 1:
                if not 0 <= at + step < n:
                    step = -step
                at += step
        return path

    def around(n):  # positions -4 .. n + 3
        forth = reflected(n)
        return forth[4:0:-1] + forth[: n + 4]

    rows, columns = around(size[0]), around(size[1])
    assert len(rows) == size[0] + 8
    whole = net(image[:, :, rows][..., columns])
    torch.testing.assert_close(overlap_tile(net, image, 2, 4), whole, rtol=1e-12, atol=1e-12)


def test_mirror_by_hand():
    assert inference._mirror(-5, 8, 3, torch.device("cpu")).tolist() == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]


@pytest.mark.parametrize("size", [(9, 7), (2, 5), (1, 1)])
def test_mirror_pad_equals_that_of_numpy(size):
    image = random(2, 3, *size)
    expected = np.pad(image.numpy(), ((0, 0), (0, 0), (11, 3), (0, 20)), mode="reflect")
    assert np.array_equal(mirror_pad(image, (11, 3), (0, 20)).numpy(), expected)


def test_every_output_pixel_is_predicted_once_from_tiles_of_one_size():
    calls = []

    def net(tile):
        calls.append(tuple(tile.shape))
        return tile[..., 3:-3, 3:-3] * 0 + len(calls)

    out = overlap_tile(net, random(1, 1, 10, 7), (4, 5), 3)
    assert calls == [(1, 1, 10, 11)] * 6
    assert out[0, 0, :, 0].tolist() == [1] * 4 + [3] * 4 + [5] * 2
    assert out[0, 0, 0].tolist() == [1] * 5 + [2] * 2


def test_a_wrong_margin_is_explained():
    with pytest.raises(ValueError, match=r"made \(6, 6\) out of a tile of \(14, 14\), not \(4, 4\)"):
        overlap_tile(valid_net(), random(1, 2, 9, 9).double(), 4, 5)
    with pytest.raises(ValueError, match="margin -1"):
        overlap_tile(valid_net(), random(1, 2, 9, 9).double(), 4, -1)


# --------------------------------------------------------------------------- rotations


def turned_by_scipy(image, size, degrees):
    """The same turn by an independent hand: rows and columns of scipy, mirrored without repeating the border."""
    from scipy import ndimage

    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.array([[cos, sin], [-sin, cos]])  # (row, column) of the output to those of the image
    middle, target = ((np.array(shape) - 1) / 2 for shape in (image.shape[-2:], size))
    offset = middle - matrix @ target
    planes = [
        ndimage.affine_transform(plane, matrix, offset, size, order=1, mode="mirror")
        for plane in image.reshape(-1, *image.shape[-2:]).double().numpy()
    ]
    return torch.from_numpy(np.stack(planes)).reshape(*image.shape[:2], *size)


@pytest.mark.fidelity
@pytest.mark.parametrize("aggregate", ["softmax", "logits"])
def test_seven_rotations_equal_an_average_by_hand(aggregate):
    net = nn.Conv2d(3, 4, 3, padding=1, stride=2).requires_grad_(False).double()
    image = random(2, 3, 14, 23).double()
    total = 0
    for k in range(7):
        angle = 360 * k / 7
        a, b = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
        canvas = (math.ceil(a * 13 + b * 22 - 1e-6) + 1, math.ceil(a * 22 + b * 13 - 1e-6) + 1)
        # Turned the other way, scipy gives what the image shows after a counter-clockwise turn.
        out = F.interpolate(net(turned_by_scipy(image, canvas, -angle)), canvas, mode="bilinear")
        votes = out.softmax(1) if aggregate == "softmax" else out
        total = total + turned_by_scipy(votes, (14, 23), angle) / 7
    out = rotations(net, image, 7, aggregate)
    torch.testing.assert_close((out.exp() if aggregate == "softmax" else out).double(), total, rtol=1e-4, atol=1e-5)


def test_quarter_turns_are_exact_and_go_the_way_of_the_others():
    net = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    image = random(1, 3, 6, 9)
    expected = sum(net(image.rot90(k, (2, 3))).softmax(1).rot90(-k, (2, 3)) for k in range(4)) / 4
    torch.testing.assert_close(rotations(net, image, 4).exp(), expected)
    for quarters, size in ((1, (9, 6)), (2, (6, 9)), (3, (9, 6))):
        assert inference._canvas(6, 9, 90 * quarters) == size
        turned = inference._turned(image, size, 90 * quarters)
        torch.testing.assert_close(turned, image.rot90(quarters, (2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 7, 8])
@pytest.mark.parametrize("size", [(21, 30), (40, 25)])
def test_a_net_that_turns_with_the_image_is_left_alone(size, count):
    """Bilinear interpolation of a plane is exact both ways, but beside the border, where the mirror has a kink."""
    seen = []

    def net(image):
        seen.append(tuple(image.shape[-2:]))
        return image * 3 - 1

    y, x = torch.meshgrid(*(torch.arange(float(side)) for side in size), indexing="ij")
    image = torch.stack([x * 0.1 + y, 5 - y * 0.3])[None]
    out = rotations(net, image, count, "logits")
    assert len(seen) == count and seen[0] == size
    torch.testing.assert_close(out[..., 2:-2, 2:-2], net(image)[..., 2:-2, 2:-2], rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (40, 2)])
def test_thin_images_turn_too(size):
    image = random(1, 3, *size)
    out = rotations(lambda x: x, image, 7, "logits")
    assert out.shape == image.shape
    assert out.min() >= image.min() - 1e-5 and out.max() <= image.max() + 1e-5


def test_no_rotation_is_refused():
    with pytest.raises(ValueError, match="count is 0"):
        rotations(pointwise, random(1, 3, 8, 8), 0)


def test_many_looks_at_large_logits_stay_finite():
    """Exponentials are summed: a thousand of the largest must not overflow, or the classes would be equal."""

    def net(x):
        return torch.stack([torch.full_like(x[:, 0], 500), torch.zeros_like(x[:, 0])], 1)

    out = inference.sliding(net, torch.zeros(1, 3, 8, 8), 4, 1, aggregate="exp", flip=True)
    assert out.isfinite().all() and (out.argmax(1) == 0).all()


@pytest.mark.parametrize("aggregate", ["softmax", "logits", "exp"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_are_averaged_in_float32(dtype, aggregate):
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    image = torch.randn(1, 3, 12, 14, generator=torch.Generator().manual_seed(1))

    def half(x):
        return torch.einsum("kc,bchw->bkhw", weight, x[..., ::2, ::2]).to(dtype)

    for look in (
        lambda net: inference.sliding(net, image, 8, 6, aggregate),
        lambda net: inference.multiscale(net, image, (1.0, 1.5), aggregate=aggregate),
    ):
        out = look(half)
        assert out.dtype == torch.float32 and torch.equal(out, look(lambda x: half(x).float()))


def test_the_longer_side_is_rounded_first_as_in_the_release():
    assert scaled_size((100, 200), 0.75, 473) == (178, 355)  # 354.75 -> 355, half of which is 177.5 -> 178


@pytest.mark.parametrize(("classes", "dtype"), [(255, torch.uint8), (256, torch.int64), (257, torch.int64)])
def test_bytes_hold_255_classes(classes, dtype):
    logits = torch.zeros(1, classes, 2, 2)
    logits[:, -1] = 1
    out = inference.labels(logits, (2, 2))
    assert out.dtype == dtype and (out == classes - 1).all()
