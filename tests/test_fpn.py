"""The feature pyramid and Semantic FPN: counts, sizes, and torchvision's and smp's numbers with the same weights."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from layer_table import layer_table, stored
from torch import nn

import seglight
from seglight.models.fpn import FeaturePyramid, SemanticFPN, SemanticFPNNetwork, SemanticHead

CHANNELS = (6, 10, 14, 18)


def features_of(*sizes, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, channels, *size, generator=generator) for channels, size in zip(CHANNELS, sizes, strict=True)
    ]


def small(num_classes=3, backbone="resnet18", **options):
    torch.manual_seed(0)
    return SemanticFPN(num_classes=num_classes, backbone=backbone, pyramid_width=16, head_width=32, **options)


# ------------------------------------------------------------------------------------------------- the pyramid


@pytest.mark.fidelity
@pytest.mark.parametrize(
    "sizes",
    [
        [(32, 48), (16, 24), (8, 12), (4, 6)],
        [(25, 33), (13, 17), (7, 9), (4, 5)],  # of an image of 97 x 129
        [(5, 3), (3, 2), (2, 1), (1, 1)],
    ],
)
@pytest.mark.parametrize("subsampled", [False, True])
def test_pyramid_equals_that_of_torchvision(sizes, subsampled):
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    torch.manual_seed(0)
    theirs = FeaturePyramidNetwork(CHANNELS, 8, LastLevelMaxPool() if subsampled else None)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = FeaturePyramid(CHANNELS, 8, subsampled)
    names = {"inner_blocks": "lateral", "layer_blocks": "output"}
    weights = {}
    for key, value in theirs.state_dict().items():
        kind, level, _, parameter = key.split(".")
        weights[f"{names[kind]}.{level}.{parameter}"] = value
    ours.load_state_dict(weights)
    features = features_of(*sizes)
    with torch.inference_mode():
        expected = theirs(OrderedDict((str(i), x) for i, x in enumerate(features))).values()
        levels = ours(features)
    assert len(levels) == len(expected) == 4 + subsampled
    for level, other in zip(levels, expected, strict=True):
        torch.testing.assert_close(level, other, rtol=1e-5, atol=1e-5)


@pytest.mark.fidelity
def test_pyramid_starts_as_that_of_torchvision():
    """Uniform within sqrt(3 / fan in), which is He's with a = 1; biases at 0."""
    pyramid = FeaturePyramid([64, 128], 256)
    for conv in (*pyramid.lateral, *pyramid.output):
        bound = (3 / (conv.in_channels * conv.kernel_size[0] ** 2)) ** 0.5
        assert bound * 0.99 < conv.weight.abs().max() <= bound
        assert conv.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
        assert (conv.bias == 0).all()
    assert not any(isinstance(layer, nn.ReLU | nn.BatchNorm2d) for layer in pyramid.modules())


@pytest.mark.fidelity
def test_pyramid_counts():
    """The four 3x3 convolutions are what smp's FPN lacks; d = 128 is the pyramid of the mask proposals."""
    with torch.device("meta"):
        pyramid = FeaturePyramid([256, 512, 1024, 2048], 256)
        narrow = FeaturePyramid([256, 512, 1024, 2048], 128)
    assert sum(p.numel() for p in pyramid.output.parameters()) == 2_360_320
    assert sum(p.numel() for p in pyramid.lateral.parameters()) == 3840 * 256 + 4 * 256
    assert 23_508_032 + sum(p.numel() for p in narrow.parameters()) == 24_590_400


# ------------------------------------------------------------------------------------------------- the network


@pytest.mark.fidelity
def test_parameter_count():
    with torch.device("meta"):
        assert sum(p.numel() for p in SemanticFPN(num_classes=21).network.parameters()) == 28_478_933


@pytest.mark.fidelity
def test_layer_table():
    with torch.device("meta"):
        network = SemanticFPNNetwork(21)
    network.backbone = nn.Identity()
    assert layer_table(network) == stored("fpn")


@pytest.mark.fidelity
@pytest.mark.parametrize("size", [(64, 96), (97, 129), (33, 65), (70, 101), (375, 500)])
def test_sizes(size):
    with torch.device("meta"):
        out = small(5).network(torch.empty(2, 3, *size))["out"]
    assert out.shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))


@pytest.mark.fidelity
@pytest.mark.parametrize("size", [(64, 96), (128, 32)])
def test_network_equals_that_of_smp_where_they_are_comparable(size):
    """smp lacks the pyramid's 3x3 convolutions (here: identities), has dropout and aligns corners."""
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    theirs = smp.FPN("resnet18", encoder_weights=None, classes=3, upsampling=1).eval()
    for parameter in theirs.decoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours = SemanticFPNNetwork(3, "resnet18", align_corners=True).eval()
    ours.backbone.body.load_state_dict(theirs.encoder.state_dict())
    decoder = theirs.decoder
    for i, lateral in enumerate((decoder.p2.skip_conv, decoder.p3.skip_conv, decoder.p4.skip_conv, decoder.p5)):
        ours.pyramid.lateral[i].load_state_dict(lateral.state_dict())
        nn.init.dirac_(ours.pyramid.output[i].weight)
    for steps, blocks in zip(ours.head.steps, reversed(decoder.seg_blocks), strict=True):
        for step, block in zip(steps, blocks.block, strict=True):
            step.load_state_dict(block.block.state_dict())
    ours.score.load_state_dict(theirs.segmentation_head[0].state_dict())
    image = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = theirs(image)
        out = ours(image)["out"]
    assert out.shape == expected.shape == (2, 3, size[0] // 4, size[1] // 4)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.fidelity
@pytest.mark.parametrize("align_corners", [False, True])
def test_head_doubles_level_by_level(align_corners):
    """By hand, with odd sizes too: every step ends at the size of the next finer level, and the levels are added."""
    torch.manual_seed(0)
    head = SemanticHead(4, 8, 32, align_corners)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    sizes = [(21, 30), (11, 15), (6, 8), (3, 4)]
    levels = [torch.randn(1, 8, *size) for size in sizes]
    assert [len(steps) for steps in head.steps] == [1, 1, 2, 3]
    total = 0
    for i, x in enumerate(levels):
        for step in range(max(1, i)):
            conv, norm = head.steps[i][step][:2]
            x = nn.functional.conv2d(x, conv.weight, padding=1).reshape(1, 32, -1)  # 32 groups of one channel
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            x = (x * norm.weight[:, None] + norm.bias[:, None]).relu().reshape(1, 32, *sizes[i - step])
            if i:
                x = nn.functional.interpolate(x, sizes[i - step - 1], mode="bilinear", align_corners=align_corners)
        total = total + x
    with torch.inference_mode():
        torch.testing.assert_close(head(levels), total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", ["convnext_atto", "swin_tiny_patch4_window7_224"])
def test_other_families_with_the_four_strides(backbone):
    with torch.device("meta"):
        network = small(backbone=backbone).network
    assert network.taps == [0, 1, 2, 3]
    assert [conv.in_channels for conv in network.pyramid.lateral] == network.backbone.channels


# --------------------------------------------------------------------------------------------------- the model


def batch_of(size=(64, 96)):
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=generator),
        "mask": torch.randint(0, 3, (2, *size), dtype=torch.uint8, generator=generator),
        "image_id": ["a", "b"],
    }


def test_a_training_step_moves_every_weight_and_the_checkpoint_rebuilds(tmp_path):
    from pytorch_lightning import Trainer

    model = small(lr=0.1, weight_decay=0.0)
    for layer in model.network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)  # timm starts residual branches at zero, which shields their convolutions
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader([batch_of()], batch_size=None))
    assert not [name for name, p in model.network.named_parameters() if torch.equal(p, before[name])]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    rebuilt = seglight.load(tmp_path / "last.ckpt")
    model.eval()
    image = torch.randint(0, 256, (1, 3, 70, 101), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(rebuilt(image), model(image))
    assert rebuilt(image).shape == (1, 3, 70, 101)
    with pytest.raises(ValueError, match="align_corners=False, but this model has align_corners=True"):
        small(align_corners=True).on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))


def test_align_corners_reaches_the_head():
    assert small(align_corners=True).network.head.align_corners
    assert not small().network.head.align_corners


def test_learning_rates_differ_for_the_backbone():
    groups = small(lr=0.1, head_lr=10.0).parameter_groups()
    assert [group["lr"] for group in groups] == [0.1, 1.0]
    assert sum(p.numel() for p in groups[0]["params"]) == 11_176_512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "vit_tiny_patch16_224"}, r"strides \[16, 16, 16\], none at 4, .* choose a backbone"),
        ({"backbone": "resnet5"}, "timm has no network 'resnet5'"),
        ({"head_width": 48}, "head_width is 48; .* multiple of 32"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        SemanticFPN(**{"num_classes": 3, "backbone": "resnet18", **options})


def test_pretrained_weights_need_their_preprocessing(monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    small(pretrained=True)
    with pytest.raises(ValueError, match='"half", but the ImageNet weights of resnet18 expect "torch"'):
        small(pretrained=True, preprocessing="half")
