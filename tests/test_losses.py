"""Cross-entropy against torch's own and against a sum over pixels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from seglight.losses import cross_entropy


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 6, 7, generator=g) * 3
    mask = torch.randint(0, 5, (2, 6, 7), generator=g).masked_fill(torch.rand(2, 6, 7, generator=g) < 0.3, 255)
    return logits.requires_grad_(), mask


WEIGHT = [0.1, 2.0, 1.0, 0.0, 5.0]


def brute(logits, mask, weight=None, pixel_weight=None, mean=True):
    total = share = 0.0
    for b, y, x in (mask != 255).nonzero().tolist():
        scores = logits[b, :, y, x].tolist()
        label = int(mask[b, y, x])
        w = 1.0 if weight is None else weight[label]
        w *= 1.0 if pixel_weight is None else float(pixel_weight[b, y, x])
        top = max(scores)
        total += w * (top + math.log(sum(math.exp(s - top) for s in scores)) - scores[label])
        share += w
    return total / share if mean else total


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_equals_torch_and_the_definition(batch, weight, reduction):
    logits, mask = batch
    tensor = None if weight is None else torch.tensor(weight)
    ours = cross_entropy(logits, mask, weight, reduction=reduction)
    theirs = F.cross_entropy(logits, mask, tensor, ignore_index=255, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    assert ours.item() == pytest.approx(brute(logits, mask, weight, mean=reduction == "mean"), rel=1e-5)
    for a, b in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(cross_entropy(logits, mask, tensor, reduction=reduction), ours)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_pixel_weights(batch, weight, mean):
    logits, mask = batch
    pixels = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) * 10
    ours = cross_entropy(logits, mask, weight, pixels, reduction="mean" if mean else "sum")
    assert ours.item() == pytest.approx(brute(logits, mask, weight, pixels, mean), rel=1e-5)


def test_equal_pixel_weights_change_nothing(batch):
    logits, mask = batch
    constant = torch.full(mask.shape, 3.0)
    torch.testing.assert_close(cross_entropy(logits, mask, pixel_weight=constant), cross_entropy(logits, mask))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_nothing_labelled_is_zero_with_zero_gradient(batch, weight, pixels, reduction):
    logits, mask = batch
    mask = torch.full_like(mask, 255)
    loss = cross_entropy(logits, mask, weight, torch.ones(mask.shape) if pixels else None, reduction)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.shape == logits.shape and not gradient.any()


def test_an_unlabelled_image_leaves_the_others_alone(batch):
    logits, mask = batch
    more = cross_entropy(torch.cat([logits, logits * 7]), torch.cat([mask, torch.full_like(mask, 255)]))
    torch.testing.assert_close(more, cross_entropy(logits, mask))


def test_only_class_of_weight_zero_is_no_nan(batch):
    logits, mask = batch
    assert cross_entropy(logits, torch.full_like(mask, 3), WEIGHT).item() == 0


@pytest.mark.parametrize("align_corners", [False, True])
def test_logits_are_resized_to_the_label(batch, align_corners):
    logits, _ = batch
    mask = torch.randint(0, 5, (2, 23, 31), generator=torch.Generator().manual_seed(2))
    up = F.interpolate(logits, (23, 31), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(
        cross_entropy(logits, mask, align_corners=align_corners), F.cross_entropy(up, mask, ignore_index=255)
    )


def test_float32_under_autocast_and_from_half_precision(batch):
    logits, _ = batch
    mask = torch.zeros(2, 12, 14, dtype=torch.int64)
    half = logits.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(half, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(half.float(), mask))
    (gradient,) = torch.autograd.grad(loss, half)
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all()
    assert cross_entropy(logits.double(), mask).dtype == torch.float64


def test_byte_masks_are_fine(batch):
    logits, mask = batch
    torch.testing.assert_close(cross_entropy(logits, mask.byte()), cross_entropy(logits, mask))


@pytest.mark.parametrize("value", [5, 254, -1])
@pytest.mark.parametrize("pixels", [False, True])
def test_an_illegal_label_is_named(batch, value, pixels):
    logits, mask = batch
    mask[1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"mask holds {value}, but with 5 classes only 0\.\.4 and 255"):
        cross_entropy(logits, mask, pixel_weight=torch.ones(mask.shape) if pixels else None)


def test_shapes_that_do_not_fit_are_refused(batch):
    logits, mask = batch
    with pytest.raises(ValueError, match="same B"):
        cross_entropy(logits, mask[:1])
    with pytest.raises(ValueError, match="same B"):
        cross_entropy(logits, mask[:, None])
    with pytest.raises(ValueError, match="5 classes need as many"):
        cross_entropy(logits, mask, [1.0, 2.0])
    with pytest.raises(ValueError, match="pixel_weight has the shape"):
        cross_entropy(logits, mask, pixel_weight=torch.ones(2, 6, 6))
    with pytest.raises(ValueError, match="reduction is 'none'"):
        cross_entropy(logits, mask, reduction="none")


def test_no_kernel_sums_the_pixels():
    """On a GPU that sum is not reproducible; torch refuses it when told to be deterministic."""
    from torch.utils._python_dispatch import TorchDispatchMode

    reductions = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name() == "aten::nll_loss2d_forward":
                reductions.append(args[3])
            return function(*args, **(kwargs or {}))

    logits, mask = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    with Watch():
        for options in ({}, {"reduction": "sum"}, {"weight": [1.0, 2.0, 3.0]}, {"pixel_weight": torch.rand(2, 4, 4)}):
            cross_entropy(logits, mask, **options)
    assert reductions == [0] * 4


@pytest.mark.parametrize("factor", [1e-3, 1e-6, 1e3])
def test_the_mean_does_not_depend_on_the_unit_of_the_weights(factor):
    """Small class weights must not shrink the loss: the divisor is their sum, below 1 too."""
    g = torch.Generator().manual_seed(0)
    logits, mask = torch.randn(1, 3, 4, 4, generator=g), torch.randint(0, 3, (1, 4, 4), generator=g)
    weight = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(cross_entropy(logits, mask, weight * factor), F.cross_entropy(logits, mask, weight))
    pixels = torch.rand(1, 4, 4, generator=g)
    torch.testing.assert_close(
        cross_entropy(logits, mask, None, pixels * factor), cross_entropy(logits, mask, None, pixels)
    )
