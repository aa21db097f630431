"""Trunks of timm: counts, dilation rules, output strides, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from seglight.models.backbones import Backbone, split_activations


def dilations(backbone, layer):
    return [block.conv2.dilation[0] for block in getattr(backbone.body, f"layer{layer}")]


def meta(*args, **options):
    with torch.device("meta"):
        return Backbone(*args, **options)


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet50", 23_508_032),
        ("resnet101", 42_500_160),
        ("resnet152", 58_143_808),
        ("resnet50s", 23_631_808),
        ("resnet101s", 42_623_936),
        ("resnet152s", 58_267_584),
        ("resnet269s", 100_148_160),
        ("xception65", 37_867_312),
        ("xception71", 40_289_736),
    ],
)
def test_parameter_counts(name, count):
    assert sum(p.numel() for p in meta(name, 16).parameters()) == count


@pytest.mark.fidelity
def test_dilation_rules():
    uniform, lagged = meta("resnet50", 8, "uniform"), meta("resnet50", 8, "lagged-first")
    assert (dilations(uniform, 3), dilations(uniform, 4)) == ([2] * 6, [4] * 3)
    assert (dilations(lagged, 3), dilations(lagged, 4)) == ([1, 2, 2, 2, 2, 2], [2, 4, 4])
    grid = meta("resnet50", 8, "uniform", (1, 2, 4))
    assert (dilations(grid, 3), dilations(grid, 4)) == ([2] * 6, [4, 8, 16])
    grid = meta("resnet50", 16, "uniform", (1, 2, 4))
    assert (dilations(grid, 3), dilations(grid, 4)) == ([1] * 6, [2, 4, 8])
    assert [block.conv2.padding[0] for block in grid.body.layer4] == [2, 4, 8]
    basic = meta("resnet18", 8, "uniform")  # whose blocks have two 3x3 convolutions
    assert [(block.conv1.dilation[0], block.conv2.dilation[0]) for block in basic.body.layer4] == [(4, 4)] * 2


@pytest.mark.fidelity
def test_lagged_first_is_the_rule_of_torchvision():
    from torchvision.models import resnet50

    ours = Backbone("resnet50", 8).eval()
    theirs = resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    ours.body.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(1, 3, 65, 81)
    with torch.no_grad():
        features = nn.Sequential(*list(theirs.children())[:-2])(x)
        assert (ours(x)[-1] - features).abs().max() < 1e-4
        uniform = Backbone("resnet50", 8, "uniform").eval()
        uniform.load_state_dict(ours.state_dict())
        assert (uniform(x)[-1] - features).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "rule", "grid"), [("resnet18", "uniform", (1, 2)), ("xception41", "lagged-first", (1,))]
)
def test_one_set_of_weights_at_two_output_strides(name, rule, grid):
    """An undilated network evaluated densely agrees with its dilated self where their grids meet."""
    backbone, dense = Backbone(name, 16, rule, grid).eval(), Backbone(name, 8, rule, grid).eval()
    dense.load_state_dict(backbone.state_dict())
    x = torch.randn(1, 3, 97, 129)
    with torch.no_grad():
        before = backbone(x)
        backbone.set_output_stride(8)
        assert backbone.strides == dense.strides
        for ours, theirs in zip(backbone(x), dense(x), strict=True):
            assert torch.equal(ours, theirs)
        backbone.set_output_stride(16)
        for ours, theirs in zip(backbone(x), before, strict=True):
            assert torch.equal(ours, theirs)


def test_caffe_puts_the_stride_in_the_first_convolution():
    block = meta("resnet50", 8, "uniform", stride_in_1x1=True).body.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))


@pytest.mark.parametrize("name", ["resnet18d", "ecaresnet26t"])
def test_a_stride_with_other_layers_is_refused(name):
    """Where timm averages before a shortcut it leaves the average out at stride 1: weights would move."""
    backbone = Backbone(name, 16)
    with pytest.raises(ValueError, match=f"{name} has other layers at output stride 8 than at 16"):
        backbone.set_output_stride(8)
    assert backbone.output_stride == 16 and backbone.strides[-1] == 16


@pytest.mark.parametrize(
    ("name", "strides", "norm"),
    [
        ("resnet18", [2, 4, 8, 16, 32], "batch"),
        ("vit_tiny_patch16_224", [16, 16, 16], "layer"),
        ("swin_tiny_patch4_window7_224", [4, 8, 16, 32], "layer"),
        ("convnext_atto", [4, 8, 16, 32], "layer"),
    ],
)
def test_any_family_on_odd_sizes(name, strides, norm):
    backbone = Backbone(name, None).eval()
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 97, 129))
    assert backbone.strides == strides and backbone.norm == norm
    for feature, channels, stride in zip(features, backbone.channels, strides, strict=True):
        assert feature.shape[1] == channels
        assert abs(feature.shape[2] - 97 / stride) < 1 and abs(feature.shape[3] - 129 / stride) < 1


@pytest.mark.fidelity
@pytest.mark.parametrize("name", ["xception41", "xception71", "xception41p"])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_xceptions_are_dilated_as_timm_does(name, stride):
    """But for a projection, pretrained, that timm's own way drops where stride 1 makes it needless."""
    import timm

    ours = meta(name, stride)
    with torch.device("meta"):
        theirs = timm.create_model(name, features_only=True, feature_cls="getter", output_stride=stride)
    geometry = {
        n: (layer.stride, layer.padding, layer.dilation)
        for n, layer in theirs.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    mine = {
        n: (layer.stride, layer.padding, layer.dilation)
        for n, layer in ours.body.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    kept = {"model.blocks.4.shortcut.conv"} if (name, stride) == ("xception71", 8) else set()
    assert mine.keys() - geometry.keys() == kept
    assert {n: mine[n] for n in geometry} == geometry
    assert all(mine[n] == ((1, 1), (0, 0), (1, 1)) for n in kept)
    switched = meta(name, 16 if stride != 16 else 8)
    switched.set_output_stride(stride)
    for n, layer in switched.body.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert (layer.stride, layer.padding, layer.dilation) == mine[n], n


@pytest.mark.fidelity
def test_raw_taps_of_an_xception_are_those_of_timm_before_their_relu():
    torch.manual_seed(0)
    usual, raw = Backbone("xception41", 16).eval(), Backbone("xception41", 16, raw_taps=True).eval()
    raw.load_state_dict(usual.state_dict())
    x = torch.randn(1, 3, 65, 49)
    with torch.no_grad():
        *taps, last = raw(x)
        *expected, final = usual(x)
        for copied in (raw, copy.deepcopy(raw)):
            assert torch.equal(copied(x)[-1], final)
        exported = torch.export.export(raw, (x,)).module()(x)
    for ours, theirs, other in zip(taps, expected, exported, strict=False):
        assert ours.min() < 0 and torch.equal(ours.relu(), theirs)
        assert torch.allclose(ours, other, atol=1e-5)
    assert torch.equal(last, final)
    with pytest.raises(ValueError, match="raw_taps is of the aligned Xceptions, and resnet18 is not one"):
        Backbone("resnet18", 16, raw_taps=True)


@pytest.mark.parametrize("name", ["xception41", "mobilenetv2_050"])
def test_activations_survive_the_conversion_to_synchronised_batch_norm(name):
    """timm hides them inside its batch norms, which torch replaces as a whole; Lightning converts on several GPUs."""
    import timm

    torch.manual_seed(0)
    backbone = Backbone(name, 16).eval()
    plain = timm.create_model(name, features_only=True, output_stride=16).eval()
    assert [tuple(p.shape) for p in backbone.parameters()] == [tuple(p.shape) for p in plain.parameters()]
    for ours, theirs in ((backbone.parameters, plain.parameters), (backbone.buffers, plain.buffers)):
        for tensor, source in zip(ours(), theirs(), strict=True):
            tensor.data.copy_(source)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(backbone))
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in converted.modules())
    x = torch.randn(1, 3, 65, 49)
    with torch.no_grad():
        for ours, theirs, synchronised in zip(backbone(x), plain(x), converted(x), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
            assert torch.allclose(synchronised, theirs, atol=1e-5)


def test_batch_norms_without_their_activation_keep_weights_and_statistics():
    import timm

    torch.manual_seed(0)
    body = timm.create_model("mobilenetv2_050", features_only=True).eval()
    for layer in body.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                tensor.uniform_(0.5, 1.5)
    x = torch.randn(1, 3, 65, 49)
    with torch.no_grad():
        expected = body(x)
        split_activations(body)
        for ours, theirs in zip(body.eval()(x), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert any(type(layer) is nn.BatchNorm2d for layer in body.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet5", 8), "timm has no network 'resnet5'; the nearest are resnet50"),
        (("vit_tiny_patch16_224", 8), "cannot be dilated to output stride 8; set 16"),
        (("convnext_atto", 8, "uniform"), "of the ResNet family, and convnext_atto is not"),
        (("resnet50", 4), "output_stride is 4, but it can be 32, or 8 or 16"),
        (("resnet50", 8, "lagged-first", (1, 2, 4)), r'multi_grid \(1, 2, 4\) goes with dilation "uniform"'),
        (("resnet50.nobody_in1k",), "no weights 'nobody_in1k' for resnet50; it has a1_in1k"),
        (("resnet269s", 8, "uniform", (1,), False, True), "no ImageNet weights for resnet269s"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Backbone(*arguments)


def test_a_level_that_is_not_there():
    with pytest.raises(ValueError, match=r"strides \[16, 16, 16\], none at 4, .* choose a backbone"):
        meta("vit_tiny_patch16_224", None).level(4)
