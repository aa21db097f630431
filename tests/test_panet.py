"""PANet: counts, the upward path, pooling from all levels, the fused mask branch, and what Mask R-CNN hands on."""

from __future__ import annotations

import pytest
import torch
from test_maskrcnn import floats, objects_of, perturb, pictures
from torch import nn
from torch.nn import functional as F
from torchvision.ops import roi_align

import seglight
from seglight.models.maskrcnn import MaskRCNN
from seglight.models.panet import (
    AdaptiveBoxHead,
    AdaptiveMaskHead,
    FusedMaskPredictor,
    PANet,
    PANetNetwork,
    UpwardPath,
    conv_block,
    from_maskrcnn,
)
from seglight.models.rcnn_weights import PREDICTORS

FEW = {"rois_per_image": 8, "train_proposals": 20, "test_proposals": 10, "test_detections": 6}


def small(num_classes=3, **options):
    torch.manual_seed(0)
    model = PANet(num_classes, **{"backbone": "resnet18", "trainable_layers": 5, **FEW, **options})
    perturb(model.network)
    return model


@pytest.fixture(scope="module")
def model():
    return small()


def count(network):
    return sum(p.numel() for p in network.parameters())


# ------------------------------------------------------------------------------------------------------- the paper


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("resnet50", 108_751_429),
        ("resnet101", 127_691_333),
        ("resnext101_32x8d", 171_835_973),
        ("resnext101_64x4d", 166_499_909),
    ],
)
def test_parameter_counts(backbone, expected):
    with torch.device("meta"):
        assert count(PANet(80, backbone=backbone).network) == expected


@pytest.mark.fidelity
def test_what_each_part_adds():
    with torch.device("meta"):
        assert count(UpwardPath()) == 3_540_480
        plain, ours = MaskRCNN(80).network.roi_heads, PANet(80).network.roi_heads
        convs = PANet(80, box_head="4conv1fc").network.roi_heads
    assert count(ours.box_head) - count(plain.box_head) == 38_538_240
    added = count(ours.mask_head) + count(ours.mask_predictor) - count(plain.mask_head) - count(plain.mask_predictor)
    assert added == 1_770_240 + 20_554_896
    assert count(convs.box_head) == 7 * (256 * 256 * 9 + 256) + 12544 * 1024 + 1024


@pytest.mark.fidelity
def test_the_path_upward():
    """N2 is P2; by hand, with odd sizes too."""
    torch.manual_seed(0)
    path = UpwardPath(4, 8)
    for parameter in path.parameters():
        nn.init.normal_(parameter, std=0.3)
    levels = [torch.randn(2, 8, *size) for size in ((21, 30), (11, 15), (6, 8), (3, 4))]
    out = path(levels)
    assert out[0] is levels[0]
    x = levels[0]
    for i, level in enumerate(levels[1:]):
        down, merge = path.down[i][0], path.merge[i][0]
        x = F.conv2d(x, down.weight, down.bias, stride=2, padding=1).relu() + level
        x = F.conv2d(x, merge.weight, merge.bias, padding=1).relu()
        torch.testing.assert_close(out[i + 1], x)
    assert [one.shape for one in out] == [one.shape for one in levels]


@pytest.mark.fidelity
def test_every_roi_is_pooled_from_every_level(model):
    generator = torch.Generator().manual_seed(0)
    features = {str(i): torch.rand(2, 3, 64 >> i, 48 >> i, generator=generator) for i in range(4)}
    boxes = [torch.tensor([[3.0, 5, 50, 90], [0, 0, 180, 240]]), torch.tensor([[20.0, 20, 30, 34]])]
    for pool, side in ((model.network.roi_heads.box_roi_pool, 7), (model.network.roi_heads.mask_roi_pool, 14)):
        found = pool(features, boxes, [(250, 190)] * 2)
        assert len(found) == 4
        for i, level in enumerate(found):
            torch.testing.assert_close(level, roi_align(features[str(i)], boxes, side, 1 / (4 << i), 2))


@pytest.mark.fidelity
@pytest.mark.parametrize("fusion", ["max", "sum"])
@pytest.mark.parametrize("kind", ["2fc", "4conv1fc", "mask"])
def test_levels_are_fused_after_their_own_first_layer(kind, fusion):
    """Element by element; equal levels under equal layers and max give the single-level head."""
    torch.manual_seed(0)
    head = AdaptiveMaskHead("none", fusion) if kind == "mask" else AdaptiveBoxHead(kind, "none", fusion)
    side = 14 if kind == "mask" else 7
    levels = [torch.randn(2, 256, side, side) for _ in range(4)]
    layers = head.first.layers
    assert len({layer[-2].weight.data_ptr() for layer in layers}) == 4
    with torch.inference_mode():
        each = torch.stack([layer(level) for layer, level in zip(layers, levels, strict=True)])
        assert (each >= 0).all()  # each has had its ReLU
        fused = each.amax(0) if fusion == "max" else each.sum(0)
        torch.testing.assert_close(head(levels), head.rest(fused))
        for layer in layers:
            layer.load_state_dict(layers[0].state_dict())
        single = head.rest(layers[0](levels[0]))
        assert torch.allclose(head([levels[0]] * 4), single, rtol=1e-5, atol=1e-6) == (fusion == "max")


@pytest.mark.fidelity
def test_the_fused_mask_branch():
    torch.manual_seed(0)
    predictor = FusedMaskPredictor(4)
    x = torch.randn(3, 256, 14, 14)
    with torch.inference_mode():
        full = predictor(x)
        each = predictor.mask_fcn_logits(predictor.conv5_mask(predictor.conv4(x)).relu())
        whole = predictor.fc(predictor.conv5_fc(predictor.conv4_fc(x)).reshape(3, -1)).reshape(3, 28, 28)
        assert full.shape == (3, 4, 28, 28) and (whole < 0).any() and (whole > 0).any()
        for k in range(4):  # one map for all classes; its ReLU only raises logits
            torch.testing.assert_close(full[:, k] - each[:, k], whole.relu(), rtol=1e-4, atol=1e-5)
        predictor.fc_relu = False
        torch.testing.assert_close(predictor(x) - each, whole[:, None].expand(3, 4, 28, 28), rtol=1e-4, atol=1e-5)
        for parameter in predictor.fc.parameters():
            parameter.zero_()
        torch.testing.assert_close(predictor(x), each)


@pytest.mark.fidelity
def test_levels_of_proposals_and_rois(model):
    network = model.network
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        features = network.backbone(image)
        pyramid = network.pyramid([features[tap] for tap in network.taps])
        upward = network.path(pyramid[:4])
        for choice, expected in (("N", [*upward, upward[3][..., ::2, ::2]]), ("P", pyramid)):
            network.proposal_levels = choice
            for_proposals, for_rois = network.levels(image)
            assert all(torch.equal(a, b) for a, b in zip(for_proposals, expected, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(for_rois, upward, strict=True))
    network.proposal_levels = "N"
    with torch.device("meta"):
        assert PANetNetwork(3, "resnet18", proposal_levels="P").proposal_levels == "P"


@pytest.mark.fidelity
def test_norms_of_the_release():
    """Group norm replaces biases, but for those of the upward path; the plain layers of the mask branch have none."""
    with torch.device("meta"):
        network = PANet(80, box_head="4conv1fc", head_norm="group").network
        fully = PANet(80, head_norm="group").network.roi_heads.box_head
    groups = {name for name, layer in network.named_modules() if isinstance(layer, nn.GroupNorm)}
    assert all(layer.num_groups == 32 for layer in network.modules() if isinstance(layer, nn.GroupNorm))
    assert len(groups) == 8 + 6 + (4 + 3) + (4 + 2 + 3)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d) and name.removesuffix("0") + "1" in groups:
            assert (layer.bias is not None) == name.startswith("path."), name
    assert sum(isinstance(layer, nn.GroupNorm) for layer in fully.modules()) == 5


# ------------------------------------------------------------------------------------------------------ warm start


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(1)
    made = MaskRCNN(3, backbone="resnet18", **FEW)
    perturb(made.network)
    return made


@pytest.mark.fidelity
def test_warm_start_from_our_mask_rcnn(plain, tmp_path):
    checkpoint = {"state_dict": plain.state_dict()}
    plain.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "plain.ckpt")
    model = PANet(3, backbone="resnet18", init_from=str(tmp_path / "plain.ckpt"), **FEW)
    started = model.network
    heads, source = started.roi_heads, plain.network.roi_heads
    for layer in heads.box_head.first.layers:
        assert torch.equal(layer[1].weight, source.box_head.fc6.weight)
    for layer in heads.mask_head.first.layers:
        assert torch.equal(layer[0].weight, source.mask_head[0][0].weight)
    assert torch.equal(started.pyramid.output[3].bias, plain.network.pyramid.output[3].bias)
    assert torch.equal(started.backbone.body.conv1.weight, plain.network.backbone.body.conv1.weight)
    assert torch.equal(started.rpn.head.bbox_pred.weight, plain.network.rpn.head.bbox_pred.weight)
    x, y = torch.randn(2, 256, 7, 7), torch.randn(2, 256, 14, 14)
    with torch.inference_mode():  # equal levels: the heads are those of Mask R-CNN
        torch.testing.assert_close(heads.box_head([x] * 4), source.box_head(x))
        for ours, other in zip(heads.box_predictor(heads.box_head([x] * 4)), source.box_predictor(source.box_head(x)),
                               strict=True):  # fmt: skip
            torch.testing.assert_close(ours, other)
        expected = source.mask_predictor(source.mask_head(y))
        torch.testing.assert_close(
            heads.mask_predictor(heads.mask_head([y] * 4)) - 1e-3, expected, atol=1e-4, rtol=1e-4
        )
    heads.mask_predictor(heads.mask_head([y] * 4)).sum().backward()
    assert heads.mask_predictor.fc.weight.grad.any()  # it will learn
    nn.init.constant_(started.rpn.head.cls_logits.bias, 7.0)
    model.start_from(checkpoint, "plain.ckpt", ("rpn.head.cls_logits",))
    assert (started.rpn.head.cls_logits.bias == 7).all()  # `init_without`


@pytest.mark.fidelity
def test_warm_start_from_torchvision(model):
    from torchvision.models.detection import MaskRCNN as Detector
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    trunk = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    weights = Detector(trunk, 4).state_dict()
    before = model.network.path.down[0][0].weight.clone()
    heads = model.network.roi_heads
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    model.start_from(dict(weights), "theirs.pth")
    assert torch.equal(heads.box_head.rest[0].weight, weights["roi_heads.box_head.fc7.weight"])
    assert torch.equal(heads.mask_predictor.conv4[0].weight, weights["roi_heads.mask_head.3.0.weight"])
    assert torch.equal(heads.mask_head.rest[1][0].weight, weights["roi_heads.mask_head.2.0.weight"])
    assert torch.equal(model.network.pyramid.lateral[0].weight, weights["backbone.fpn.inner_blocks.0.0.weight"])
    assert torch.equal(model.network.path.down[0][0].weight, before)
    assert (heads.mask_predictor.fc.bias == 1e-3).all()
    others = {key: torch.cat([value, value]) if key.startswith(tuple(PREDICTORS)) else value
              for key, value in weights.items()}  # fmt: skip
    heads.mask_predictor.fc_relu = False
    nn.init.constant_(heads.box_predictor.cls_score.bias, 7.0)
    model.start_from(others, "others.pth", tuple(PREDICTORS))
    assert (heads.box_predictor.cls_score.bias == 7).all() and not heads.mask_predictor.fc.bias.any()
    heads.mask_predictor.fc_relu = True
    message = r"theirs\.pth has roi_heads.box_head.first.layers.0.1, .* no place; set model"
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        PANet(3, backbone="resnet18", box_head="4conv1fc").start_from(dict(weights), "theirs.pth")
    model.load_state_dict(kept)


@pytest.mark.fidelity
def test_convolutions_are_handed_on_too():
    """Of a 4conv1fc head with norms: every tensor of PANet but those of the path and the fused branch."""
    norms = {"box_head": "4conv1fc", "head_norm": "batch", "rpn_convs": 2, "batch_norm": "train"}
    with torch.device("meta"):
        source, target = MaskRCNN(3, **norms).network, PANet(3, **norms).network
    theirs = source.state_dict()
    weights, own = from_maskrcnn(theirs), target.state_dict()
    for i in (0, 1, 2):
        for layer in ("0.weight", "1.bias"):
            taken = weights[f"roi_heads.box_head.rest.{i}.{layer}"]
            assert taken is theirs[f"roi_heads.box_head.{i + 1}.{layer}"]
    assert all(own[key].shape == value.shape for key, value in weights.items())
    left = {key.split(".")[2] if "mask" in key else key.split(".")[0] for key in own.keys() - weights.keys()}
    assert left == {"path", "conv4_fc", "conv5_fc"}
    assert from_maskrcnn(own).keys() == own.keys()
    assert not from_maskrcnn(source.state_dict(), fc_relu=False)["roi_heads.mask_predictor.fc.bias"].any()


# ----------------------------------------------------------------------------------------------------- the contract


def test_every_parameter_gets_a_gradient(model):
    images = pictures()
    model.train()
    model.zero_grad()
    losses, detections = model.network(floats(images), objects_of(images))
    sum(losses.values()).backward()
    assert set(losses) == {"objectness", "rpn_box_reg", "classifier", "box_reg", "mask"} and detections == []
    for key, parameter in model.network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.any(), f"{key} is in the network, but nothing depends on it"


def test_images_without_objects(model):
    images = pictures()
    losses, _ = model.train().network(floats(images), objects_of(images, per_image=0))
    sum(losses.values()).backward()
    assert torch.isfinite(sum(losses.values())) and losses["mask"] == losses["box_reg"] == losses["rpn_box_reg"] == 0


def test_two_sizes_and_from_a_checkpoint(model, tmp_path):
    model.eval()
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "it.ckpt")
    again = seglight.load(tmp_path / "it.ckpt")
    images = floats(pictures((65, 90), (40, 50)))
    with torch.inference_mode():
        losses, found = model.network(images, None)
        _, copied = again.network(images, None)
    assert losses == {}
    for one, other in zip(found, copied, strict=True):
        n = len(one["scores"])
        assert n and one["masks"].shape == (n, 28, 28) and all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match="fusion='max', but this model has fusion='sum'"), torch.device("meta"):
        PANet(3, backbone="resnet18", trainable_layers=5, fusion="sum", **FEW).on_load_checkpoint(checkpoint)


def test_bfloat16(model):
    images = pictures()
    with torch.no_grad():
        exact, _ = model.train().network(floats(images), objects_of(images))
        with torch.autocast("cpu", torch.bfloat16):
            rough, _ = model.network(floats(images), objects_of(images))
            _, found = model.eval().network(floats(images), None)
    for key, value in exact.items():
        assert rough[key].dtype == torch.float32
        assert abs(float(rough[key] - value)) < 0.15 * float(value) + 0.05, key
    assert all(one[key].dtype == torch.float32 for one in found for key in ("boxes", "scores", "masks"))


def test_options_reach_their_places():
    with torch.device("meta"):
        model = PANet(3, backbone="resnet18", batch_norm="train", rpn_convs=2, fusion="sum", fc_relu=False,
                      anchors=[8, 16, 32, 64, 128], rois_per_image=33, train_proposals=99, aligned=True,
                      test_proposals=50, test_score=0.3, test_nms=0.4, test_detections=7)  # fmt: skip
    network, heads = model.network.eval(), model.network.roi_heads
    assert heads.box_roi_pool.aligned and heads.mask_roi_pool.aligned
    assert (heads.box_head.first.fusion, heads.mask_head.first.fusion) == ("sum", "sum")
    assert not heads.mask_predictor.fc_relu
    assert len(network.rpn.head.conv) == 2
    assert network.rpn.anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.3, 0.4, 7)
    assert heads.fg_bg_sampler.batch_size_per_image == 33
    assert network.rpn.post_nms_top_n() == 50 and network.train().rpn.post_nms_top_n() == 99
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in network.backbone.modules())


def test_the_fully_connected_mask_layer_and_convolutions_start_as_said():
    torch.manual_seed(0)
    conv, _ = conv_block(256, 64, "none")
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02) and not conv.bias.any()
    predictor = FusedMaskPredictor(20)
    assert not predictor.fc.bias.any()
    for layer, fan in ((predictor.conv5_mask, 256 * 4), (predictor.mask_fcn_logits, 20)):  # as torchvision's
        assert layer.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05) and not layer.bias.any()


@pytest.mark.parametrize("backbone", ["seresnext101_32x4d", "senet154", "resnet269s", "resnext101_64x4d"])
def test_trunks_of_the_seven(backbone):
    with torch.device("meta"):
        network = PANetNetwork(80, backbone, trainable_layers=3)
    assert not any(p.requires_grad for p in network.backbone.body.layer1.parameters())
    assert all(p.requires_grad for p in network.backbone.body.layer2.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "mean"}, "fusion is 'mean'; choose"),
        ({"proposal_levels": "C"}, "proposal_levels is 'C'; choose"),
        ({"box_head": "fc"}, "box_head is 'fc'; choose"),
        ({"backbone": "vit_tiny_patch16_224"}, "none at 4, which this architecture needs"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        PANet(**{"num_classes": 3, "backbone": "resnet18", **options})
