"""DeepLab v3 against the paper, torchvision and smp: counts, rates by output stride, wiring, evaluation at stride 8."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from layer_table import layer_table, stored
from tiny import Blocks
from torch import nn

import seglight
from seglight.models.atrous import ASPP, ConvBNReLU, SeparableConvBNReLU
from seglight.models.backbones import Backbone
from seglight.models.deeplabv3 import (
    DeepLabV3,
    DeepLabV3Cascade,
    DeepLabV3CascadeNetwork,
    DeepLabV3Network,
    _copy_stage,
)
from seglight.models.deeplabv3plus import DeepLabV3Plus

SMALL = {"backbone": "resnet18", "multi_grid": (1, 2), "channels": 8}
CASCADE = {"backbone": "resnet18", "multi_grid": (1, 2), "last_block": 5}


def lively(module):
    """With batch norms that are not the identity (timm starts some at zero), so that no path is silent."""
    generator = torch.Generator().manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low in ((layer.weight, 0.5), (layer.bias, -0.5), (layer.running_mean, -0.2)):
                tensor.data = torch.rand(tensor.shape, generator=generator) + low
            layer.running_var.data = torch.rand(layer.running_var.shape, generator=generator) + 0.5
    return module


def settled(network):
    """Lively, with statistics that belong to the weights: no layer is dead, and logits differ from place to place."""
    mode = network.training
    lively(network)
    torch.manual_seed(2)
    nn.init.normal_(network.classifier.weight)
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(2, 3, 65, 65))
    for layer in norms:
        layer.momentum = 0.1
    return network.train(mode)


@functools.cache
def _built(cls, *args, **options):
    torch.manual_seed(0)
    return settled(cls(*args, **options))


def tiny(**options):
    return copy.deepcopy(_built(DeepLabV3Network, 3, **{**SMALL, **options}))


def tiny_cascade(**options):
    return copy.deepcopy(_built(DeepLabV3CascadeNetwork, 3, **{**CASCADE, **options}))


def meta(cls, *args, **options):
    with torch.device("meta"):
        return cls(*args, **options)


def save(model, path):
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


def near(a, b):
    """Equal to four digits of the largest value."""
    return (a - b).abs().max() < 1e-4 * b.abs().max()


def alike(a, b):
    """Correlation, for precisions whose rounding a random deep network amplifies."""
    return torch.corrcoef(torch.stack([a.float().flatten(), b.flatten()]))[0, 1]


def rates(network):
    return [branch[0].dilation[0] for branch in network.aspp.atrous]


def unit_rates(stage):
    return [unit.conv2.dilation[0] for unit in stage]


# --------------------------------------------------------------------------------------------------- the networks


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.fidelity
def test_parameter_counts_and_layer_table():
    network = meta(DeepLabV3, num_classes=21).network
    assert count(network) == 58_040_661
    assert layer_table(network) == stored("deeplabv3")
    assert count(meta(DeepLabV3Network, 19, "resnet50")) == 39_048_533 - 2 * 257
    assert count(meta(DeepLabV3Network, 21, "resnet50")) == 39_048_533


@pytest.mark.fidelity
def test_parameter_counts_and_layer_table_of_the_cascade():
    network = meta(DeepLabV3Cascade, num_classes=21).network
    assert layer_table(network) == stored("deeplabv3_cascade")
    identity = meta(DeepLabV3CascadeNetwork, 21, shortcut="identity")
    for cascade, totals in (
        (network, [95_301_717, 77_715_541, 60_129_365, 42_543_189]),
        (identity, [82_706_517, 69_318_741, 55_930_965, 42_543_189]),
    ):
        blocks = [count(block) for block in cascade.cascade.values()]
        assert [count(cascade) - sum(blocks[keep:]) for keep in (3, 2, 1, 0)] == totals
    assert [list(tiny_cascade(last_block=last).cascade) for last in (4, 6)] == [[], ["block5", "block6"]]


@pytest.mark.fidelity
def test_rates_by_output_stride():
    network = meta(DeepLabV3Network, 21, "resnet50")
    for output_stride, aspp, layer3, layer4 in (
        (32, [3, 6, 9], 1, [1, 2, 4]),
        (16, [6, 12, 18], 1, [2, 4, 8]),
        (8, [12, 24, 36], 2, [4, 8, 16]),
    ):
        direct = meta(DeepLabV3Network, 21, "resnet50", output_stride, 16)
        assert rates(direct) == aspp
        assert unit_rates(direct.backbone.body.layer3) == [layer3] * 6
        assert unit_rates(direct.backbone.body.layer4) == layer4
        network.test_output_stride = output_stride
        assert layer_table(network.eval()) == layer_table(direct)
        network.train()
        assert rates(network) == [6, 12, 18]


@pytest.mark.fidelity
def test_rates_of_the_cascade():
    network = meta(DeepLabV3CascadeNetwork, 21, "resnet50")
    blocks = [network.backbone.body.layer4, *network.cascade.values()]
    assert [unit_rates(block) for block in blocks] == [[2, 4, 2], [4, 8, 4], [8, 16, 8], [16, 32, 16]]
    network.eval()
    assert [unit_rates(block) for block in blocks] == [[4, 8, 4], [8, 16, 8], [16, 32, 16], [32, 64, 32]]
    assert layer_table(network) == layer_table(meta(DeepLabV3CascadeNetwork, 21, "resnet50", 8))


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("size", "train", "test"),
    [((513, 513), (33, 33), (65, 65)), ((769, 769), (49, 49), (97, 97)), ((500, 375), (32, 24), (63, 47))],
)
def test_sizes(size, train, test):
    for build in (tiny, tiny_cascade):
        network = build().to("meta")
        image = torch.empty(2, 3, *size, device="meta")
        assert network(image)["out"].shape == (2, 3, *train)
        assert network.eval()(image)["out"].shape == (2, 3, *test)


@pytest.mark.fidelity
def test_stride_8_computes_what_stride_16_does_and_positions_between():
    """Exactly so under the lagged-first rule, but for the mean over the image."""
    network = tiny(dilation="lagged-first", multi_grid=(1,), image_pooling=False).eval()
    image = torch.randn(1, 3, 129, 97)
    with torch.no_grad():
        dense = network(image)["out"]
        network.test_output_stride = 16
        coarse = network(image)["out"]
    assert dense.shape[-2:] == (17, 13) and coarse.shape[-2:] == (9, 7)
    assert (dense[..., ::2, ::2] - coarse).abs().max() < 1e-4
    assert coarse.std() > 1e-3


@pytest.mark.fidelity
@pytest.mark.parametrize("build", [lambda: tiny(image_pooling=False), tiny_cascade])
def test_what_sits_on_the_trunk_sees_the_same_at_both_strides(build):
    network = build().eval()
    head = getattr(network, "aspp", None) or nn.Sequential(*network.cascade.values())
    features = torch.randn(1, 512, 49, 33)
    with torch.no_grad():
        network.set_output_stride(8)
        dense = head(features)
        network.set_output_stride(16)
        assert (dense[..., ::2, ::2] - head(features[..., ::2, ::2])).abs().max() < 1e-4


@pytest.mark.parametrize("build", [tiny, tiny_cascade])
def test_the_mode_decides_the_stride_also_where_lightning_sets_the_flags_itself(build):
    network = build()
    image = torch.randn(2, 3, 65, 65)
    flags = {name: module.training for name, module in network.named_modules()}
    assert network(image)["out"].shape[-1] == 5
    with torch.no_grad():
        assert network.eval()(image)["out"].shape[-1] == 9
    for name, module in network.named_modules():
        module.training = flags[name]
    assert network(image)["out"].shape[-1] == 5
    assert network.backbone.output_stride == 16


@pytest.mark.fidelity
def test_copied_blocks_are_block4_with_weights_of_their_own():
    network = DeepLabV3CascadeNetwork(3, "resnet50", last_block=6)
    layer4 = network.backbone.body.layer4
    for block in network.cascade.values():
        assert [type(unit) for unit in block] == [type(unit) for unit in layer4]
        assert block[0].conv1.weight.shape == (512, 2048, 1, 1)  # block4 takes 1024 channels, its copies 2048
        assert block[0].downsample[0].weight.shape == (2048, 2048, 1, 1)
        assert block[0].conv1.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
        norms = [layer for layer in block.modules() if isinstance(layer, nn.BatchNorm2d)]
        assert len(norms) == 10 and all((norm.weight == 1).all() for norm in norms)
        for unit, original in zip(block[1:], layer4[1:], strict=True):
            assert not torch.equal(unit.conv2.weight, original.conv2.weight)
            assert unit.conv2.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.02)
            assert unit.downsample is None
    a, b = network.cascade["block5"], network.cascade["block6"]
    assert not torch.equal(a[1].conv2.weight, b[1].conv2.weight)


@pytest.mark.fidelity
def test_initialisation():
    torch.manual_seed(0)
    network = DeepLabV3Network(21, "resnet18", multi_grid=(1, 2))
    assert (network.classifier.bias == 0).all()
    weight = network.classifier.weight
    assert weight.abs().max() <= 0.02 and weight.std().item() == pytest.approx(0.0088, rel=0.05)
    conv = network.aspp.atrous[0][0].weight
    assert conv.abs().max() <= (6 / (9 * 512 + 9 * 256)) ** 0.5
    assert conv.std().item() == pytest.approx((2 / (9 * 512 + 9 * 256)) ** 0.5, rel=0.02)
    separable = SeparableConvBNReLU(256, 64)
    assert separable[0].weight.abs().max() <= 0.66 and separable[0].weight.std().item() == pytest.approx(0.29, rel=0.05)
    assert separable[3].weight.abs().max() <= 0.12 and separable[3].weight.std().item() == pytest.approx(
        0.0528, rel=0.05
    )


# ------------------------------------------------------------------------------------------- against other libraries


def copy_aspp(ours, theirs):
    """From torchvision's or smp's module tree, which have the same names."""
    pairs = list(zip([ours.point, *ours.atrous], theirs.convs, strict=False))
    pairs += [(ours.pool, list(theirs.convs[-1])[1:]), (ours.project, list(theirs.project)[:3])]
    for mine, other in pairs:
        for layer, source in zip(mine, other, strict=True):
            layer.load_state_dict(source.state_dict())


@pytest.mark.fidelity
@pytest.mark.parametrize("library", ["torchvision", "smp"])
def test_aspp_equals_other_implementations(library):
    torch.manual_seed(0)
    if library == "torchvision":
        from torchvision.models.segmentation.deeplabv3 import ASPP as Theirs

        theirs = Theirs(24, (12, 24, 36), 16)
    else:
        from segmentation_models_pytorch.decoders.deeplabv3.decoder import ASPP as Theirs

        theirs = Theirs(24, 16, (12, 24, 36), False, 0.5)
    lively(theirs.eval())
    ours = ASPP(24, channels=16).eval()
    copy_aspp(ours, theirs)
    x = torch.randn(2, 24, 41, 33)
    with torch.no_grad():
        expected = theirs(x)
        ours.set_output_stride(8)
        assert (ours(x) - expected).abs().max() < 1e-4
        ours.set_output_stride(16)
        assert (ours(x) - expected).abs().max() > 1e-2
    assert ours.dropout.p == 0.1


@pytest.mark.fidelity
def test_network_equals_torchvision_up_to_its_own_last_layers():
    """With torchvision's rule, no multi-grid, and evaluation at stride 8: trunk and ASPP together."""
    from torchvision.models.segmentation import deeplabv3_resnet50

    torch.manual_seed(0)
    theirs = lively(deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3)).eval()
    ours = DeepLabV3Network(3, "resnet50", dilation="lagged-first", multi_grid=(1, 1, 1)).eval()
    ours.backbone.body.load_state_dict(theirs.backbone.state_dict())
    copy_aspp(ours.aspp, theirs.classifier[0])
    x = torch.randn(1, 3, 65, 81)
    with torch.no_grad():
        expected = ours.classifier(theirs.classifier[0](theirs.backbone(x)["out"]))
        assert (ours(x)["out"] - expected).abs().max() < 1e-4
        assert expected.std() > 1e-3


@pytest.mark.fidelity
def test_network_equals_smp_up_to_its_own_last_layers():
    """smp has the uniform rule; its rates are set to the paper's at both strides."""
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    ours = tiny(multi_grid=(1,)).eval()
    x = torch.randn(1, 3, 64, 96)
    for stride, atrous in ((8, (12, 24, 36)), (16, (6, 12, 18))):
        theirs = smp.DeepLabV3(
            "resnet18", encoder_weights=None, encoder_output_stride=stride, decoder_channels=8,
            decoder_atrous_rates=atrous, classes=3,
        )  # fmt: skip
        lively(theirs).eval()
        ours.backbone.body.load_state_dict(theirs.encoder.state_dict())
        copy_aspp(ours.aspp, theirs.decoder.aspp)
        ours.test_output_stride = stride
        with torch.no_grad():
            expected = ours.classifier(theirs.decoder.aspp(theirs.encoder(x)[-1]))
            assert (ours(x)["out"] - expected).abs().max() < 1e-4


@pytest.mark.fidelity
def test_aspp_drops_its_result_and_never_has_a_rate_below_1():
    aspp = ASPP(6, rates=(1, 3), channels=4, dropout=1.0)
    nn.init.ones_(aspp.project[1].bias)
    x = torch.randn(2, 6, 5, 5)
    assert not aspp(x).any() and aspp.eval()(x).any()
    aspp.set_output_stride(32)
    assert [branch[0].dilation for branch in aspp.atrous] == [(1, 1), (1, 1)]


@pytest.mark.fidelity
def test_image_pooling_sees_the_mean_alone():
    """Shuffling positions changes nothing in the branch, and its output is one value per channel everywhere."""
    aspp = lively(ASPP(6, channels=4)).eval()
    seen = []
    aspp.project.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0][:, -4:]))
    x = torch.randn(2, 6, 9, 7)
    shuffled = x.flatten(2)[..., torch.randperm(63)].reshape(x.shape)
    with torch.no_grad():
        aspp(x)
        aspp(shuffled)
        expected = aspp.pool(x.mean((2, 3), keepdim=True))
    assert (seen[0] == seen[0][..., :1, :1]).all()
    assert torch.allclose(seen[0], seen[1], atol=1e-5)
    assert torch.allclose(seen[0][..., :1, :1], expected, atol=1e-6)
    assert ASPP(6, channels=4, image_pooling=False).project[0].in_channels == 16


# ------------------------------------------------------------------------------------------------------- the models


def model(cls=DeepLabV3, **options):
    torch.manual_seed(0)
    small = SMALL if cls is DeepLabV3 else CASCADE
    return cls(num_classes=3, **{**small, **options})


BOTH = (DeepLabV3, DeepLabV3Cascade)


def batch_of(size, count=2):
    return {
        "image": torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8),
        "mask": torch.randint(0, 3, (count, *size), dtype=torch.uint8),
        "image_id": [str(i) for i in range(count)],
    }


@pytest.mark.parametrize("cls", BOTH)
def test_every_parameter_gets_a_gradient(cls):
    lightning = model(cls)
    settled(lightning.network)
    batch = batch_of((65, 49))
    lightning.loss(lightning.network(lightning.normalize(batch["image"])), batch)["loss"].backward()
    silent = [name for name, p in lightning.network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.fidelity
def test_the_loss_is_taken_at_full_resolution_with_aligned_corners():
    lightning = model()
    batch = batch_of((65, 49))
    logits = torch.randn(2, 3, 5, 4)
    full = nn.functional.interpolate(logits, (65, 49), mode="bilinear", align_corners=True)
    expected = nn.functional.cross_entropy(full, batch["mask"].long())
    assert torch.isclose(lightning.loss({"out": logits}, batch)["loss"], expected)


def tensorflow_probabilities(net, image, scales):
    """tensorflow/models, deeplab: scale_dimension, resize_bilinear(align_corners=True), means of probabilities."""
    resize, total = functools.partial(nn.functional.interpolate, mode="bilinear", align_corners=True), 0
    for scale in scales:
        size = [int((side - 1.0) * scale + 1.0) for side in image.shape[-2:]]
        for flip in (False, True):
            look = resize(image.flip(-1) if flip else image, size)
            logits = net(look).flip(-1) if flip else net(look)
            total = total + resize(logits, image.shape[-2:]).softmax(1)
    return total / len(scales) / 2


def test_scales_and_flips_are_those_of_the_release():
    ours = model(test_scales=[0.5, 1.0, 1.75], test_flip=True).eval()
    settled(ours.network)
    image = torch.randint(0, 256, (1, 3, 34, 41), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = ours.normalize(image)
        theirs = tensorflow_probabilities(ours.logits, image, ours.test_scales)
        assert theirs.std() > 0.01
        torch.testing.assert_close(ours.protocol(image).softmax(1), theirs, rtol=0, atol=1e-5)


def test_training_and_validation_take_turns_at_their_strides():
    from pytorch_lightning import Trainer

    seen = []

    class Watching(DeepLabV3):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            seen.append(("train", self.network.backbone.output_stride, rates(self.network)[0]))
            return loss

        def validation_step(self, batch, batch_idx):
            result = super().validation_step(batch, batch_idx)
            seen.append(("val", self.network.backbone.output_stride, rates(self.network)[0]))
            return result

    lightning = Watching(num_classes=4, **SMALL)
    trainer = Trainer(
        max_steps=4, val_check_interval=2, check_val_every_n_epoch=None, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(lightning, datamodule=Blocks(crop=33))
    expected = {"train": (16, 6), "val": (8, 12)}
    assert [name for name, *_ in seen if name == "train"] == ["train"] * 4
    assert "val" in [name for name, *_ in seen[seen.index(("train", 16, 6)) : -1]]
    assert all((stride, rate) == expected[name] for name, stride, rate in seen)


@pytest.mark.parametrize("cls", BOTH)
def test_checkpoint_rebuilds_the_model_and_its_test_stride_may_change(cls, tmp_path):
    trained = model(cls, output_stride=16)
    settled(trained.network)
    path = save(trained.eval(), tmp_path / "best.ckpt")
    image = torch.randint(0, 256, (2, 3, 49, 65), dtype=torch.uint8)
    with torch.inference_mode():
        expected = trained(image)
        rebuilt = seglight.load(path)
        assert type(rebuilt) is cls and torch.equal(rebuilt(image), expected)
        fast = seglight.load(path, test_output_stride=16)
        assert fast.network.backbone.output_stride == 16
        assert not torch.allclose(fast(image), expected)
    with pytest.raises(ValueError, match=r"trained with multi_grid=.* but this model has multi_grid=\[1, 1\]"):
        seglight.load(path, multi_grid=(1, 1))
    with pytest.raises(ValueError, match="trained with output_stride=16"):
        seglight.load(path, output_stride=8)


def test_the_second_stage_starts_from_the_first_at_another_stride(tmp_path):
    path = save(model(), tmp_path / "first.ckpt")
    second = model(output_stride=8, batch_norm="frozen", init_from=path, lr=0.001)
    assert torch.equal(second.network.classifier.weight, model().network.classifier.weight)
    assert second.network.backbone.output_stride == 8 and rates(second.network) == [12, 24, 36]
    losses = second.loss(second.network(torch.randn(1, 3, 33, 33)), batch_of((33, 33), 1))  # frozen: one image will do
    assert losses["loss"] > 0


@pytest.mark.fidelity
@pytest.mark.parametrize("size", [(60, 47), (57, 50), (64, 41), (1, 9)])
@pytest.mark.parametrize("stride", [8, 16])
def test_images_of_other_sizes_are_padded_to_aligned_corners_and_cropped(size, stride):
    lightning = model(test_output_stride=stride).eval()
    settled(lightning.network)
    image = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    sides = [next(side for side in range(length, 100) if side % stride == 1) for length in size]
    padded = lightning.mean.expand(2, 3, *sides).clone()  # becomes zero
    padded[..., : size[0], : size[1]] = image
    with torch.inference_mode():
        logits = lightning.network(lightning.normalize(padded))["out"]
        full = nn.functional.interpolate(logits, sides, mode="bilinear", align_corners=True)
        assert (lightning(image) - full[..., : size[0], : size[1]]).abs().max() < 1e-4
        labels, _ = lightning.labels(list(image))
        assert torch.equal(torch.stack(labels).long(), lightning(image).argmax(1))


def test_aligned_images_are_not_padded():
    lightning = model().eval()
    assert lightning.logits(torch.zeros(1, 3, 65, 49)).shape == (1, 3, 9, 7)
    assert lightning.logits(torch.zeros(1, 3, 65, 50)).shape == (1, 3, 65, 50)
    assert model(align_corners=False).eval().logits(torch.zeros(1, 3, 65, 50)).shape == (1, 3, 9, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lightning.logits(torch.zeros(1, 3, 65, 50)).dtype == torch.float32


def test_test_time_options_meet_the_padding():
    lightning = model(test_scales=[0.75, 1.0], test_flip=True, test_window=33).eval()
    with torch.inference_mode():
        scores = lightning(torch.randint(0, 256, (1, 3, 50, 40), dtype=torch.uint8))
    assert scores.shape == (1, 3, 50, 40)
    assert torch.allclose(scores.exp().sum(1), torch.ones(1, 50, 40), atol=1e-4)


@pytest.mark.fidelity
def test_batch_norm_decay():
    lightning = model(batch_norm_decay=0.9997)
    momenta = {layer.momentum for layer in lightning.network.modules() if isinstance(layer, nn.BatchNorm2d)}
    assert list(momenta) == [pytest.approx(0.0003)]
    assert model().network.aspp.point[1].momentum == pytest.approx(0.1)
    assert {layer.eps for layer in lightning.network.modules() if isinstance(layer, nn.BatchNorm2d)} == {1e-5}


def test_one_image_in_a_training_batch():
    one = torch.zeros(1, 3, 33, 33)
    with pytest.raises(ValueError, match=r"batch of one image .* data\.batch_size .*model\.batch_norm to eval"):
        model().network(one)
    assert model(image_pooling=False).network(one)["out"].shape[0] == 1
    assert model(cls=DeepLabV3Cascade).network(one)["out"].shape[0] == 1
    kept = model(batch_norm="eval")
    assert kept.network.training and kept.network(one)["out"].shape[0] == 1
    assert model().eval().network(one)["out"].shape[0] == 1
    aspp = ASPP(6, channels=4)
    aspp.pool = nn.SyncBatchNorm.convert_sync_batchnorm(aspp.pool)
    with pytest.raises(ValueError, match="more than 1 value per channel"):  # torch, on one device
        aspp(torch.zeros(1, 6, 3, 3))


@pytest.mark.parametrize("build", [tiny, tiny_cascade])
def test_autocast_deepcopy_channels_last_and_export(build):
    network = build().eval()
    image = torch.randn(2, 3, 49, 65)
    with torch.no_grad():
        expected = network(image)["out"]
        assert torch.equal(copy.deepcopy(network)(image)["out"], expected)
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
        assert half.dtype == torch.bfloat16 and alike(half, expected) > 0.95
        exported = torch.export.export(network, (image,)).module()
        assert near(exported(image)["out"], expected)


@pytest.mark.parametrize("cls", [*BOTH, DeepLabV3Plus])
def test_pretrained_and_dropout_reach_the_network(cls, monkeypatch):
    import timm

    create, asked = timm.create_model, []

    def record(name, pretrained=False, **options):
        asked.append((name, pretrained))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", record)
    options = {"backbone": "resnet18", "pretrained": True, "preprocessing": "torch"}
    if cls is not DeepLabV3Cascade:
        options |= {"dropout": 0.3}
    with torch.device("meta"):
        network = cls(num_classes=3, **options).network
        assert ("resnet18", True) in asked
        assert cls is DeepLabV3Cascade or network.aspp.dropout.p == 0.3
        with pytest.raises(ValueError, match=r'resnet18 expect preprocessing "torch", but it is "half"'):
            cls(num_classes=3, **{**options, "preprocessing": "half"})


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (DeepLabV3, {"output_stride": 4}, "output_stride is 4, but it can be 32, or 8 or 16"),
        (DeepLabV3, {"test_output_stride": 4}, "output_stride is 4, but it can be 32, or 8 or 16"),
        (DeepLabV3, {"backbone": "resnet19"}, "no network 'resnet19'; the nearest are resnet18"),
        (DeepLabV3, {"backbone": "xception41"}, 'xception41 is not; use "lagged-first"'),
        (DeepLabV3, {"dilation": "lagged-first"}, r'multi_grid \(1, 2\) goes with dilation "uniform"'),
        (DeepLabV3, {"batch_norm_decay": 1.0}, "batch_norm_decay is 1.0; it must lie between 0 and 1"),
        (DeepLabV3, {"pretrained": True, "preprocessing": "caffe"}, 'expect preprocessing "torch", but it is "caffe"'),
        (DeepLabV3Cascade, {"last_block": 8}, "last_block is 8; choose 4"),
        (DeepLabV3Cascade, {"backbone": "resnet10t"}, "last stage of resnet10t is a single unit"),
        (DeepLabV3Cascade, {"shortcut": "none"}, 'shortcut is \'none\'; choose "projection" or "identity"'),
        (DeepLabV3Cascade, {"pretrained": True, "preprocessing": "half"}, 'expect preprocessing "torch"'),
    ],
)
def test_what_it_refuses(cls, options, message):
    with pytest.raises(ValueError, match=message):
        model(cls, **options)


def test_torchvisions_file_is_sent_to_its_own_model(tmp_path):
    torch.save({"classifier.0.convs.0.0.weight": torch.zeros(1)}, tmp_path / "deeplabv3_resnet50_coco.pth")
    with pytest.raises(ValueError, match=r"another dilation rule.*TorchvisionSegmentation"):
        model(init_from=str(tmp_path / "deeplabv3_resnet50_coco.pth"))
    torch.save({"something": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a seglight checkpoint"):
        model(init_from=str(tmp_path / "other.pth"))


def test_other_trunks_run_with_their_own_rule():
    network = DeepLabV3Network(3, "mobilenetv2_050", dilation="lagged-first", multi_grid=(1,), channels=8)
    assert network(torch.zeros(2, 3, 65, 65))["out"].shape[-1] == 5
    assert network.eval()(torch.zeros(2, 3, 65, 65))["out"].shape[-1] == 9
    assert isinstance(network.aspp.point, ConvBNReLU)


def test_copies_of_a_trained_stage_start_anew():
    stage = Backbone("resnet18").body.layer4
    for layer in stage.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                tensor.fill_(7)
    for layer in _copy_stage(stage, 512, "projection").modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all() and not layer.bias.any()
            assert not layer.running_mean.any() and (layer.running_var == 1).all()
