"""DeepLab v3+ against the paper, the TensorFlow release and smp: counts, taps, decoder, strides, weight decay."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from layer_table import layer_table, stored
from test_deeplabv3 import alike, batch_of, copy_aspp, count, lively, meta, near, rates, save, settled
from torch import nn

import seglight
from seglight.models.atrous import ASPP, SeparableConvBNReLU
from seglight.models.deeplabv3plus import DeepLabV3Plus, DeepLabV3PlusNetwork

RESNET = {"backbone": "resnet18", "multi_grid": (1, 2), "channels": 8, "low_level_channels": 4}
XCEPTION = {"backbone": "xception41", "multi_grid": None, "channels": 8, "low_level_channels": 4}


@functools.cache
def _built(**options):
    torch.manual_seed(0)
    return settled(DeepLabV3PlusNetwork(3, **options))


def tiny(**options):
    return copy.deepcopy(_built(**{**RESNET, **options}))


def model(**options):
    torch.manual_seed(0)
    return DeepLabV3Plus(num_classes=3, **{**RESNET, **options})


# --------------------------------------------------------------------------------------------------- the network


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("backbone", "separable", "total"),
    [
        ("resnet50", True, 26_696_133),
        ("resnet50", False, 40_352_181),
        ("resnet101", True, 45_688_261),
        ("xception65", False, 54_711_461),
        ("xception71", True, 43_477_837),
        ("xception71", False, 57_133_885),
        ("xception41", True, 28_108_661),
    ],
)
def test_parameter_counts(backbone, separable, total):
    assert count(meta(DeepLabV3PlusNetwork, 21, backbone, separable=separable, test_output_stride=16)) == total


@pytest.mark.fidelity
def test_parameter_counts_and_layer_tables_of_the_headline_networks():
    network = meta(DeepLabV3Plus, num_classes=21).network
    assert count(network) == 41_055_413
    assert layer_table(network) == stored("deeplabv3plus")
    network = meta(DeepLabV3Plus, num_classes=21, backbone="resnet101", separable=False, preprocessing="torch").network
    assert count(network) == 59_344_309
    assert layer_table(network) == stored("deeplabv3plus_resnet101")
    assert count(meta(DeepLabV3PlusNetwork, 19)) == 41_054_899
    without = meta(DeepLabV3PlusNetwork, 19, "xception71", image_pooling=False)  # the one for Cityscapes
    assert count(without) == 43_477_323 - (2048 * 256 + 2 * 256 + 256 * 256)


@pytest.mark.fidelity
def test_rates_by_output_stride():
    """Of the Xception's blocks as of ASPP; the low-level features keep their stride."""
    network = meta(DeepLabV3PlusNetwork, 21)
    seen = {}
    network.aspp.register_forward_pre_hook(lambda layer, inputs: seen.update(high=tuple(inputs[0].shape)))
    network.reduce.register_forward_pre_hook(lambda layer, inputs: seen.update(low=tuple(inputs[0].shape)))
    network.decoder.register_forward_pre_hook(lambda layer, inputs: seen.update(joined=tuple(inputs[0].shape)))
    network.eval()
    for stride, side, aspp, entry3, middle, exit1, exit2 in (
        (32, 17, [3, 6, 9], (2, 1), (1, 1), (2, 1), (1, 1)),
        (16, 33, [6, 12, 18], (2, 1), (1, 1), (1, 1), (1, 2)),
        (8, 65, [12, 24, 36], (1, 1), (1, 2), (1, 2), (1, 4)),
    ):
        network.test_output_stride = stride
        assert network(torch.empty(1, 3, 513, 513, device="meta"))["out"].shape == (1, 21, 129, 129)
        assert seen == {"high": (1, 2048, side, side), "low": (1, 256, 129, 129), "joined": (1, 304, 129, 129)}
        assert rates(network) == aspp
        blocks = network.backbone.body.model.blocks
        strided = [(blocks[i].stack.conv3.conv_dw.stride[0], blocks[i].stack.conv3.conv_dw.dilation[0])
                   for i in (2, 10, 19, 20)]  # fmt: skip
        assert strided == [entry3, middle, exit1, exit2]


@pytest.mark.fidelity
@pytest.mark.parametrize(("size", "out"), [((513, 513), (129, 129)), ((769, 513), (193, 129)), ((100, 75), (25, 19))])
def test_sizes(size, out):
    network = tiny().to("meta")
    image = torch.empty(2, 3, *size, device="meta")
    assert network(image)["out"].shape == (2, 3, *out)
    assert network.eval()(image)["out"].shape == (2, 3, *out)


@pytest.mark.fidelity
@pytest.mark.parametrize(("backbone", "block"), [("xception41", 1), ("xception65", 1), ("xception71", 2)])
def test_low_level_features_are_the_second_separable_convolution_before_its_relu(backbone, block):
    """Of entry block 2, or 3 in Xception-71, whose second block keeps the resolution."""
    network = meta(DeepLabV3PlusNetwork, 3, backbone, channels=8)
    seen = {}
    stack = network.backbone.body.model.blocks[block].stack
    assert isinstance(stack.act3, nn.Identity)  # and no ReLU, which would work on the same tensor, in place
    stack.conv2.bn_pw.register_forward_hook(lambda layer, inputs, out: seen.update(tap=out))
    network.reduce.register_forward_pre_hook(lambda layer, inputs: seen.update(low=inputs[0]))
    network(torch.empty(2, 3, 65, 65, device="meta"))
    assert seen["low"] is seen["tap"] and seen["low"].shape == (2, 256, 17, 17)


@pytest.mark.fidelity
def test_low_level_features_of_a_resnet_are_the_output_of_its_first_stage():
    network = tiny().eval()
    seen = {}
    network.backbone.body.layer1.register_forward_hook(lambda layer, inputs, out: seen.update(stage=out))
    network.reduce.register_forward_pre_hook(lambda layer, inputs: seen.update(low=inputs[0]))
    network(torch.randn(1, 3, 65, 65))
    assert torch.equal(seen["low"], seen["stage"]) and seen["low"].shape == (1, 64, 17, 17)


@pytest.mark.fidelity
def test_separable_convolution_is_timms_with_activations():
    """That of the Xception's last block: depthwise, batch norm, ReLU, pointwise, batch norm, ReLU."""
    from timm.models.xception_aligned import SeparableConv2d

    torch.manual_seed(0)
    theirs = lively(SeparableConv2d(12, 10, dilation=3)).eval()
    ours = SeparableConvBNReLU(12, 10, rate=3).eval()
    for i, name in enumerate(["conv_dw", "bn_dw", "act_dw", "conv_pw", "bn_pw"]):
        ours[i].load_state_dict(getattr(theirs, name).state_dict())
    x = torch.randn(2, 12, 17, 13)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() < 1e-5


@pytest.mark.fidelity
def test_encoder_and_join_equal_smp():
    """smp has another decoder after the join; up to there, with plain convolutions, it is the same network."""
    import segmentation_models_pytorch as smp

    theirs = smp.DeepLabV3Plus(
        "resnet18", encoder_weights=None, encoder_output_stride=16, decoder_channels=8,
        decoder_atrous_rates=(6, 12, 18), decoder_aspp_separable=False, classes=3,
    )  # fmt: skip
    lively(theirs).eval()
    ours = tiny(separable=False, multi_grid=(1,), low_level_channels=48, test_output_stride=16).eval()
    ours.backbone.body.load_state_dict(theirs.encoder.state_dict())
    copy_aspp(ours.aspp, theirs.decoder.aspp[0])
    for layer, source in zip(ours.reduce, theirs.decoder.block1, strict=True):
        layer.load_state_dict(source.state_dict())
    seen = []
    ours.decoder.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours(x)
        features = theirs.encoder(x)
        high = theirs.decoder.up(theirs.decoder.aspp[0](features[-1]))
        expected = torch.cat([high, theirs.decoder.block1(features[2])], 1)
    assert expected.shape == (1, 56, 16, 24)
    assert (seen[0] - expected).abs().max() < 1e-4


@pytest.mark.fidelity
@pytest.mark.parametrize("separable", [True, False])
def test_decoder_is_two_convolutions_and_a_classifier(separable):
    """Against a literal version made of functions."""
    network = tiny(separable=separable).eval()
    seen = []
    network.decoder.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    f = nn.functional

    def literal(x, conv, norm, padding):
        x = f.conv2d(x, conv.weight, padding=padding, groups=conv.groups)
        shape = (1, -1, 1, 1)
        x = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + 1e-5).sqrt()
        return (x * norm.weight.view(shape) + norm.bias.view(shape)).clamp_min(0)

    with torch.no_grad():
        out = network(torch.randn(1, 3, 65, 49))["out"]
        x = seen[0]
        assert x.shape == (1, 12, 17, 13)
        for layer in network.decoder:
            x = literal(x, layer[0], layer[1], 1)
            if separable:
                x = literal(x, layer[3], layer[4], 0)
        x = f.conv2d(x, network.classifier.weight, network.classifier.bias)
    assert (out - x).abs().max() < 1e-4


@pytest.mark.fidelity
def test_separable_aspp_sees_the_same_at_both_strides():
    aspp = lively(ASPP(12, channels=8, separable=True, image_pooling=False)).eval()
    x = torch.randn(1, 12, 49, 33)
    with torch.no_grad():
        aspp.set_output_stride(8)
        dense = aspp(x)
        aspp.set_output_stride(16)
        assert (dense[..., ::2, ::2] - aspp(x[..., ::2, ::2])).abs().max() < 1e-4
    assert [branch[3].dilation for branch in aspp.atrous] == [(1, 1)] * 3


@pytest.mark.fidelity
def test_trunk_options_follow_the_trunk():
    resnet, xception = meta(DeepLabV3PlusNetwork, 3, "resnet50"), meta(DeepLabV3PlusNetwork, 3, "xception41")
    assert (resnet.backbone.dilation, resnet.backbone.multi_grid) == ("uniform", (1, 2, 4))
    assert [unit.conv2.dilation[0] for unit in resnet.backbone.body.layer4] == [2, 4, 8]
    assert (xception.backbone.dilation, xception.backbone.multi_grid) == ("lagged-first", (1, 1, 1))
    lagged = meta(DeepLabV3PlusNetwork, 3, "resnet50", dilation="lagged-first")
    assert [unit.conv2.dilation[0] for unit in lagged.backbone.body.layer4] == [1, 2, 2]


# --------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("options", [RESNET, {**RESNET, "separable": False}, XCEPTION])
def test_every_parameter_gets_a_gradient(options):
    lightning = model(**options)
    settled(lightning.network)
    batch = batch_of((65, 49))
    lightning.loss(lightning.network(lightning.normalize(batch["image"])), batch)["loss"].backward()
    silent = [name for name, p in lightning.network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_pixels_are_normalised_as_the_xceptions_want_them():
    with torch.device("meta"):
        assert DeepLabV3Plus(num_classes=3).preprocessing == "half"
    black = model().normalize(torch.zeros(1, 3, 1, 1))
    torch.testing.assert_close(black, -torch.ones(1, 3, 1, 1))


@pytest.mark.fidelity
def test_depthwise_weights_have_no_weight_decay():
    lightning = model(**XCEPTION, weight_decay=4e-5, lr=0.1, head_lr=2)
    groups = {(group["lr"], group["weight_decay"]): group["params"] for group in lightning.parameter_groups()}
    assert set(groups) == {(0.1, 4e-5), (0.1, 0.0), (0.2, 4e-5), (0.2, 0.0)}
    free = {id(p) for (_, decay), params in groups.items() for p in params if decay == 0}
    depthwise = {id(p) for name, p in lightning.network.named_parameters() if p.ndim == 4 and p.shape[1] == 1}
    assert free == depthwise and len(free) == 3 * 13 + 3 + 2
    every = [id(p) for params in groups.values() for p in params]
    assert sorted(every) == sorted(id(p) for p in lightning.network.parameters())
    decayed = model(**XCEPTION, decay_depthwise=True).parameter_groups()
    assert {group["weight_decay"] for group in decayed} == {1e-4}


@pytest.mark.parametrize("options", [RESNET, XCEPTION])
def test_checkpoint_rebuilds_the_model_and_its_test_stride_may_change(options, tmp_path):
    trained = model(**options)
    settled(trained.network)
    path = save(trained.eval(), tmp_path / "best.ckpt")
    image = torch.randint(0, 256, (2, 3, 49, 60), dtype=torch.uint8)
    with torch.inference_mode():
        expected = trained(image)
        assert expected.shape == (2, 3, 49, 60)
        rebuilt = seglight.load(path)
        assert torch.equal(rebuilt(image), expected)
        fast = seglight.load(path, test_output_stride=16, decay_depthwise=True)
        assert not torch.allclose(fast(image), expected)
    with pytest.raises(ValueError, match="trained with separable=True"):
        seglight.load(path, separable=False)
    with pytest.raises(ValueError, match="trained with preprocessing='half'"):
        seglight.load(path, preprocessing="torch")


def test_one_image_in_a_training_batch():
    one = torch.zeros(1, 3, 33, 33)
    with pytest.raises(ValueError, match="batch of one image"):
        tiny()(one)
    assert tiny(image_pooling=False)(one)["out"].shape == (1, 3, 9, 9)


@pytest.mark.parametrize("options", [RESNET, XCEPTION])
def test_autocast_deepcopy_channels_last_and_export(options):
    network = tiny(**options).eval()
    image = torch.randn(2, 3, 49, 65)
    with torch.no_grad():
        expected = network(image)["out"]
        clone = copy.deepcopy(network).to(memory_format=torch.channels_last)
        formats = []
        for layer in clone.modules():
            if isinstance(layer, nn.Conv2d) and layer.in_channels > 3:
                layer.register_forward_pre_hook(
                    lambda layer, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
                )
        out = clone(image.to(memory_format=torch.channels_last))["out"]
        assert near(out, expected) and all(formats)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = network(image)["out"]
        assert half.dtype == torch.bfloat16 and alike(half, expected) > 0.9
        exported = torch.export.export(network, (image,)).module()
        assert near(exported(image)["out"], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "xception65", "pretrained": True, "preprocessing": "torch"}, 'xception65 expect .* "half"'),
        ({"pretrained": True}, 'weights of resnet18 expect preprocessing "torch", but it is "half"'),
        ({"backbone": "vit_tiny_patch16_224"}, "uniform.* of the ResNet family, and vit_tiny_patch16_224 is not"),
        ({"backbone": "xception41", "dilation": "uniform"}, "of the ResNet family, and xception41 is not"),
        ({"output_stride": 4}, "output_stride is 4"),
        ({"backbone": "xception64"}, "no network 'xception64'; the nearest are .*xception65"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_encoder_features_are_widened_corner_aligned():
    network = DeepLabV3PlusNetwork(2, "resnet18", channels=4, low_level_channels=4).eval()
    seen = {}
    network.aspp.register_forward_hook(lambda _, args, out: seen.update(high=out))
    network.decoder.register_forward_pre_hook(lambda _, args: seen.update(joined=args[0]))
    with torch.no_grad():
        network(torch.randn(1, 3, 65, 81, generator=torch.Generator().manual_seed(0)))
    high, joined = seen["high"], seen["joined"][:, :4]
    assert high.shape[-2:] == (9, 11) and joined.shape[-2:] == (17, 21)
    torch.testing.assert_close(joined[..., ::2, ::2], high)  # the pixels of the small map are pixels of the large one


def test_grouped_convolutions_are_not_depthwise():
    """A ResNeXt's 32 groups keep their weight decay."""
    model = DeepLabV3Plus(2, backbone="resnext50_32x4d", channels=8, preprocessing="torch", weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in model.parameter_groups() for p in group["params"]}
    convs = [layer for layer in model.network.modules() if isinstance(layer, torch.nn.Conv2d)]
    grouped = [decay[id(conv.weight)] for conv in convs if 1 < conv.groups < conv.in_channels]
    single = [decay[id(conv.weight)] for conv in convs if 1 < conv.groups == conv.in_channels]
    assert grouped and set(grouped) == {0.1} and single and set(single) == {0.0}
