"""Labels, windows, scales and tiles, against torch's plain ways and results known by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seglight import inference
from seglight.inference import labels, multiscale, overlap_tile, sliding, window_starts


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


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_windows_that_agree_give_the_whole_image(batch):
    image = random(2, 3, 19, 26)
    out = sliding(pointwise, image, (8, 10), (5, 7), batch=batch)
    torch.testing.assert_close(out.softmax(1), pointwise(image).softmax(1))
    torch.testing.assert_close(sliding(pointwise, image, 8, 5, "logits", batch), pointwise(image))


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


@pytest.mark.parametrize("stride", [0, 9, (4, 9)])
def test_a_stride_that_misses_pixels_is_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        sliding(pointwise, random(1, 3, 20, 20), 8, stride)


def test_an_unknown_way_to_average_is_refused():
    with pytest.raises(ValueError, match='aggregate is \'max\'; choose "softmax" or "logits"'):
        sliding(pointwise, random(1, 3, 8, 8), 8, 8, "max")


def test_impossible_classes_stay_finite():
    def certain(image):
        return torch.tensor([0.0, 1e4])[None, :, None, None].expand(len(image), 2, *image.shape[-2:])

    out = multiscale(partial(sliding, certain, window=8, stride=8), random(1, 3, 16, 16), (0.7, 1.0))
    assert out.isfinite().all() and (out.argmax(1) == 1).all()


# -------------------------------------------------------------------------- multiscale


def test_one_scale_is_the_net_itself():
    image = random(2, 3, 9, 12)
    torch.testing.assert_close(multiscale(pointwise, image).softmax(1), pointwise(image).softmax(1))


@pytest.mark.parametrize("aggregate", ["softmax", "logits"])
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
        for mirror in (False, True):
            out = net(scaled.flip(-1)).flip(-1) if mirror else net(scaled)
            out = F.interpolate(out, (13, 18), mode="bilinear")
            votes = votes + (out.softmax(1) if aggregate == "softmax" else out) / 6
    out = multiscale(watched, image, (0.5, 1, 1.5), flip=True, aggregate=aggregate)
    torch.testing.assert_close(out.exp() if aggregate == "softmax" else out, votes)
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


def test_no_scale_is_refused():
    with pytest.raises(ValueError, match="scales is empty"):
        multiscale(pointwise, random(1, 3, 8, 8), ())


# ------------------------------------------------------------------------ overlap-tile


def valid_net(channels: int = 2) -> nn.Sequential:
    """Three valid convolutions: loses 4 pixels on each side, and is the same everywhere."""
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, 5, 3), nn.Tanh(), nn.Conv2d(5, 5, 5), nn.Tanh(), nn.Conv2d(5, 3, 3)
    return nn.Sequential(*layers).double().requires_grad_(False)


@pytest.mark.fidelity
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tile", [(4, 4), (7, 5), (16, 16), (40, 64), 3])
@pytest.mark.parametrize("size", [(16, 16), (23, 31), (5, 40)])
def test_tiles_equal_the_whole_image(size, tile, batch):
    net = valid_net()
    image = random(2, 2, *size).double()
    whole = net(F.pad(image, (4, 4, 4, 4), mode="reflect"))
    torch.testing.assert_close(overlap_tile(net, image, tile, 4, batch), whole, rtol=1e-12, atol=1e-12)


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
