"""Mask R-CNN, Faster R-CNN and C4: counts, torchvision's numbers in training and detection, its files, crowds."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

import seglight
from seglight import masks
from seglight.models.maskrcnn import C4Network, FasterRCNN, MaskRCNN, MaskRCNNC4, MaskRCNNNetwork, _detections
from seglight.models.panet import PANet
from seglight.models.rcnn_parts import mask_targets
from seglight.models.rcnn_weights import PREDICTORS, RAW_IDS, from_torchvision

RAW = len(RAW_IDS) + 10
# few boxes and small images: most of the time goes into a box head of 12544 x 1024
THEIRS = {"min_size": 64, "max_size": 90, "rpn_post_nms_top_n_test": 30, "rpn_post_nms_top_n_train": 60,
          "box_detections_per_img": 12, "box_batch_size_per_image": 24}  # fmt: skip
SIZE = {"test_short_side": 64, "test_long_side": 90}
OURS = {**SIZE, "test_proposals": 30, "train_proposals": 60, "test_detections": 12, "rois_per_image": 24}


@pytest.fixture(scope="module")
def theirs():
    """torchvision's Mask R-CNN on ResNet-18, with statistics that are not the initial ones and decided predictions."""
    from torchvision.models.detection import MaskRCNN as Detector
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    torch.manual_seed(0)
    trunk = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    return perturb(Detector(trunk, RAW + 1, **THEIRS)).eval()


def perturb(network):
    generator = torch.Generator().manual_seed(1)
    for layer in network.modules():
        if hasattr(layer, "running_var"):
            layer.running_mean.uniform_(-0.1, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
            layer.weight.data.uniform_(0.5, 1.0, generator=generator)
            layer.bias.data.uniform_(-0.1, 0.1, generator=generator)
    with torch.no_grad():
        network.rpn.head.cls_logits.weight.mul_(10)
        network.rpn.head.bbox_pred.weight.mul_(5)
        heads = network.roi_heads
        heads.box_predictor.cls_score.weight.mul_(60)
        heads.box_predictor.bbox_pred.weight.mul_(3)
        heads.box_predictor.cls_score.bias[0] = -1
        if heads.mask_predictor is not None:
            heads.mask_predictor.mask_fcn_logits.weight.mul_(20)
    return network


def pictures(*sizes, seed=2):
    generator = torch.Generator().manual_seed(seed)
    out = []
    for height, width in sizes or ((64, 90), (80, 60)):
        small = torch.rand(1, 3, height // 12, width // 12, generator=generator)
        image = nn.functional.interpolate(small, (height, width), mode="bilinear")[0]
        out.append((image * 255).round().to(torch.uint8))
    return out


def objects_of(images, crowd=(), seed=3, per_image=3):
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i, image in enumerate(images):
        height, width = image.shape[-2:]
        low = torch.rand(per_image, 2, generator=generator) * torch.tensor([width * 0.5, height * 0.5])
        side = 12 + torch.rand(per_image, 2, generator=generator) * torch.tensor([width * 0.4 - 12, height * 0.4 - 12])
        boxes = torch.cat([low, low + side], 1).round()
        masks = torch.zeros(per_image, height, width, dtype=torch.bool)
        yy, xx = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
            mask[:] = ((xx - (x1 + x2) / 2) / (x2 - x1) * 2) ** 2 + ((yy - (y1 + y2) / 2) / (y2 - y1) * 2) ** 2 <= 1
        out.append(
            {
                "boxes": boxes,
                "labels": torch.randint(0, 3, (per_image,), generator=generator),
                "masks": masks,
                "iscrowd": torch.tensor([(i, j) in crowd for j in range(per_image)], dtype=torch.bool),
                "area": masks.sum((1, 2)).float(),
            }
        )
    return out


def floats(images):
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    return [(image - mean[:, None, None]) / std[:, None, None] for image in images]


def tiny(num_classes=3, model=MaskRCNN, **options):
    torch.manual_seed(0)
    few = {"rois_per_image": 12, "train_proposals": 30, "test_proposals": 12, "test_detections": 8}
    return perturb_model(model(num_classes, **{"backbone": "resnet18", "trainable_layers": 5, **few, **options}))


def perturb_model(model):
    perturb(model.network)
    return model


def same(ours, theirs, tolerance=1e-4):
    assert len(ours["scores"]) == len(theirs["scores"]) > 0
    assert torch.equal(ours["labels"] + 1, theirs["labels"])
    torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=0, atol=tolerance)
    torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------- the paper


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 44_401_393),
        ({"num_classes": 80}, 44_347_573),
        ({"num_classes": 8}, 43_960_069),
        ({"batch_norm": "train"}, 44_454_513),
        ({"backbone": "resnet101"}, 63_341_297),
        ({"backbone": "resnext101_32x8d"}, 107_485_937),
        ({"backbone": "resnext101_64x4d"}, 102_149_873),
        ({"box_head": "4conv1fc", "head_norm": "batch", "rpn_convs": 2, "batch_norm": "train"}, 46_359_409),
        ({"model": FasterRCNN}, 41_755_286),
    ],
)
def test_parameter_counts(options, count):
    options = {"num_classes": 90, **options}
    model = options.pop("model", MaskRCNN)
    with torch.device("meta"):
        assert sum(p.numel() for p in model(**options).network.parameters()) == count


@pytest.mark.fidelity
def test_c4_counts():
    """Trunk, proposals on 1024 channels with 15 anchors, class and box layers on 2048, a 14 x 14 mask branch."""
    with torch.device("meta"):
        network = MaskRCNNC4(80).network
    rpn = 1024 * 1024 * 9 + 1024 + (1024 + 1) * 15 * 5
    heads = (2048 + 1) * 81 * 5 + 2048 * 256 * 4 + 256 + 257 * 81
    assert sum(p.numel() for p in network.parameters()) == 23_508_032 - 53_120 + rpn + heads
    names = set(network.state_dict())
    assert any(name.startswith("roi_heads.box_head.stage.2.conv3") for name in names)
    assert not any("layer4" in name or name.startswith("roi_heads.mask_head") for name in names)


@pytest.mark.fidelity
def test_rois_go_to_the_level_of_the_paper():
    """k = floor(4 + log2(sqrt(w h) / 224)), clamped to 2..5; told by levels that hold their number."""
    pool = MaskRCNNNetwork(1, "resnet18").roi_heads.box_roi_pool
    generator = torch.Generator().manual_seed(0)
    sides = 2 ** (2 + 8 * torch.rand(200, 2, generator=generator))
    sides[:6] = torch.tensor([[112, 112], [111.9, 112], [224, 224], [223, 224], [448, 448], [447, 448]])
    boxes = torch.cat([torch.zeros(200, 2), sides], 1)
    features = {str(i): torch.full((2, 1, 256 >> i, 256 >> i), i + 2.0) for i in range(4)}
    for size in (1024, 520):  # before padding: the parent would take the second one's strides for 2 to 16
        found = pool(features, [boxes[:50], boxes[50:]], [(size, size)] * 2)
        assert found.shape == (200, 1, 7, 7)
        for (w, h), cells in zip(sides.tolist(), found, strict=True):
            level = min(5, max(2, math.floor(4 + math.log2(math.sqrt(w * h) / 224) + 1e-6)))
            assert cells[0, :2, :2].numpy() == pytest.approx(level, abs=1e-4)


@pytest.mark.fidelity
@pytest.mark.parametrize("aligned", [False, True])
def test_pooling_equals_sampling_by_hand(aligned):
    """Four bilinear samples in each cell, averaged; `aligned` moves them by half a pixel of the level."""
    from scipy.ndimage import map_coordinates

    pool = MaskRCNNNetwork(1, "resnet18", aligned=aligned).roi_heads.mask_roi_pool
    generator = torch.Generator().manual_seed(0)
    features = {str(i): torch.rand(1, 1, 64 >> i, 64 >> i, generator=generator) for i in range(4)}
    boxes = torch.tensor([[30.3, 41.7, 90.2, 120.9], [10.0, 20.0, 200.0, 180.0], [20.5, 10.5, 240.5, 250.0]])
    found = pool(features, [boxes], [(256, 256)])
    for box, cells, level in zip(
        boxes.numpy() / np.array([[4], [8], [16]]), found[:, 0].numpy(), (0, 1, 2), strict=True
    ):
        at = (np.arange(28) + 0.5) / 28
        x, y = (box[i] + (box[i + 2] - box[i]) * at - 0.5 * aligned for i in (0, 1))
        grid = np.stack(np.meshgrid(y, x, indexing="ij"))
        samples = map_coordinates(features[str(level)][0, 0].numpy().astype(float), grid, order=1, mode="nearest")
        assert cells == pytest.approx(samples.reshape(14, 2, 14, 2).mean((1, 3)), abs=1e-5)


@pytest.mark.fidelity
def test_mask_targets_against_brute_force():
    """Logits that say nothing cost log 2; a bias shows the mean of the targets, sampled here by hand."""
    from scipy.ndimage import map_coordinates

    model = tiny().train()
    images = pictures()
    targets = objects_of(images)
    seen = {}
    heads = model.network.roi_heads
    heads.mask_roi_pool.register_forward_pre_hook(lambda layer, inputs: seen.update(boxes=inputs[1]))
    heads.mask_predictor.register_forward_hook(lambda layer, inputs, output: seen.update(logits=output))
    losses, _ = model.network(floats(images), targets)
    expected = []
    logits = iter(seen["logits"])
    for boxes, target in zip(seen["boxes"], targets, strict=True):
        assert len(boxes)
        for box in boxes.numpy():
            sizes = [np.prod(np.maximum(0, np.minimum(box[2:], o[2:]) - np.maximum(box[:2], o[:2])))
                     for o in target["boxes"].numpy()]  # fmt: skip
            unions = [np.prod(box[2:] - box[:2]) + np.prod(o[2:] - o[:2]) for o in target["boxes"].numpy()]
            overlaps = [size / (union - size) for size, union in zip(sizes, unions, strict=True)]
            best = int(np.argmax(overlaps))
            assert overlaps[best] >= 0.5
            counts = [math.ceil((box[i + 2] - box[i]) / 28) for i in (0, 1)]
            x, y = (box[i] + (box[i + 2] - box[i]) * (np.arange(28 * n) + 0.5) / (28 * n)
                    for i, n in zip((0, 1), counts, strict=True))  # fmt: skip
            grid = np.stack(np.meshgrid(y, x, indexing="ij")) - 0.5  # pixel i reaches from i to i + 1
            mask = map_coordinates(target["masks"][best].numpy().astype(float), grid, order=1, mode="nearest")
            mask = torch.tensor(mask.reshape(28, counts[1], 28, counts[0]).mean((1, 3)))
            logit = next(logits)[target["labels"][best] + 1].double()
            expected.append(nn.functional.binary_cross_entropy_with_logits(logit, mask))
    assert losses["mask"].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


@pytest.mark.fidelity
@pytest.mark.parametrize("jitter", [0.0, 0.05])
def test_a_perfect_mask_is_pasted_where_its_object_lies(jitter):
    """To a tenth of a pixel; cut out as torchvision does it, it comes 0.4 further to the left and up."""
    rng = np.random.default_rng(0)
    gaps = []
    y, x = np.mgrid[:160, :160] + 0.5
    for _ in range(40):
        (cx, cy), (rx, ry) = rng.uniform(60, 100, 2), rng.uniform(8, 40, 2)
        mask = torch.from_numpy(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1)
        box = np.array([cx - rx, cy - ry, cx + rx, cy + ry]) + rng.normal(0, jitter, 4) * np.array([rx, ry, rx, ry])
        box = torch.tensor(box, dtype=torch.float32)[None]
        grid = mask_targets(mask[None], torch.tensor([0]), box, 28)
        pasted = masks.paste(grid, box, (160, 160))[0]
        gaps.append([(axis[pasted.numpy()].mean() - axis[mask.numpy()].mean()) for axis in (x, y)])
    assert np.abs(np.mean(gaps, 0)).max() < 0.1


# -------------------------------------------------------------------------------------------- torchvision's numbers


def ours_of(theirs, num_classes=RAW, **options):
    model = MaskRCNN(num_classes, backbone="resnet18", **{**OURS, **options})
    model.start_from(copy.copy(theirs.state_dict()), "theirs.pth")
    return model.eval()


@pytest.mark.fidelity
def test_detections_equal_those_of_torchvision_through_the_whole_chain(theirs):
    """Normalisation, resizing, padding, both stages, suppression and the way back, from 8-bit images of other sizes."""
    images = pictures((120, 150), (140, 100), (50, 130))
    model = ours_of(theirs)
    with torch.inference_mode():
        expected = theirs([image / 255 for image in images])
        found = model.detect(images)
        theirs.transform.postprocess, keep = lambda result, *_: result, theirs.transform.postprocess
        grids = theirs([image / 255 for image in images])
        theirs.transform.postprocess = keep
    assert sum(len(one["scores"]) for one in found) > 15
    for one, other, grid in zip(found, expected, grids, strict=True):
        same(one, other)
        assert one["masks"].shape == (len(one["scores"]), 28, 28)
        assert grid["masks"].std() > 0.05
        torch.testing.assert_close(one["masks"], grid["masks"][:, 0], rtol=0, atol=1e-4)
        assert torch.equal(one["windows"], one["boxes"])
        assert (one["scores"].diff() <= 0).all()


@pytest.mark.fidelity
def test_training_losses_and_gradients_equal_those_of_torchvision(theirs, monkeypatch):
    """But for where pixels lie when it cuts masks out, of which its `aligned` is the remedy."""
    from torchvision.models.detection import roi_heads

    monkeypatch.setattr(roi_heads, "roi_align", functools.partial(roi_heads.roi_align, aligned=True))
    images = pictures()
    targets = objects_of(images)
    theirs = copy.deepcopy(theirs).train()
    theirs.transform._skip_resize = True
    model = ours_of(theirs).train()
    pairs = [{"boxes": t["boxes"], "labels": t["labels"] + 1, "masks": t["masks"].byte()} for t in targets]
    torch.manual_seed(5)
    expected = theirs([image / 255 for image in images], pairs)
    torch.manual_seed(5)
    losses, detections = model.network([theirs.transform.normalize(image / 255) for image in images], targets)
    assert detections == []
    assert {f"loss_{name}" for name in losses} == set(expected)
    for name, loss in losses.items():
        assert loss.dim() == 0
        torch.testing.assert_close(loss, expected[f"loss_{name}"], rtol=1e-4, atol=1e-6)
    sum(expected.values()).backward()
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    named = from_torchvision({**dict.fromkeys(theirs.state_dict(), torch.ones(91)), **gradients}, model.network,
                             "torch", "gradients")  # fmt: skip
    trained = [name for name, p in model.network.named_parameters() if p.grad is not None]
    assert len(trained) == len(gradients) > 40
    for name in trained:
        ours = model.network.get_parameter(name).grad
        assert (ours - named[name]).norm() < 1e-4 * named[name].norm(), name


@pytest.mark.fidelity
def test_names_are_those_of_torchvision():
    """360 entries with trainable batch norm, all of them and no others."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2

    with torch.device("meta"):
        plain = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        second = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict()
        ours = MaskRCNNNetwork(90, frozen_norm=False)
        later = MaskRCNNNetwork(90, frozen_norm=False, box_head="4conv1fc", head_norm="batch", rpn_convs=2)
    assert len(plain) == 360
    for source, network in ((plain, ours), (second, later)):
        named = from_torchvision(source, network, "torch", "theirs")
        assert {key: value.shape for key, value in named.items()} == {
            key: value.shape for key, value in network.state_dict().items()
        }


def old_names(weights):
    """As in the first published files."""
    renamed = {}
    for key, value in weights.items():
        key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for i in range(4):
            key = key.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
            for kind in ("inner", "layer"):
                key = key.replace(f"fpn.{kind}_blocks.{i}.0.", f"fpn.{kind}_blocks.{i}.")
        renamed[key] = value
    return renamed


@pytest.mark.fidelity
@pytest.mark.parametrize("batch_norm", ["frozen", "eval"])
def test_the_first_published_files(theirs, tmp_path, batch_norm):
    """Names of their time, and a batch norm without epsilon; here with variances that make it matter."""
    theirs = copy.deepcopy(theirs)
    for layer in theirs.modules():
        if hasattr(layer, "running_var"):
            layer.eps = 0.0
            layer.running_var[::3] = 2e-5
            layer.weight[::3] *= 4e-3
    counts = {"backbone.body.bn1.num_batches_tracked": torch.tensor(9)}  # which frozen layers do without
    torch.save({**old_names(theirs.state_dict()), **counts}, tmp_path / "coco.pth")
    assert "backbone.fpn.inner_blocks.0.weight" in torch.load(tmp_path / "coco.pth")
    model = MaskRCNN(RAW, backbone="resnet18", batch_norm=batch_norm, init_from=str(tmp_path / "coco.pth"), **OURS)
    model.eval()
    images = pictures()
    with torch.inference_mode():
        for one, other in zip(model.detect(images), theirs([image / 255 for image in images]), strict=True):
            same(one, other)
        for layer in theirs.modules():
            if hasattr(layer, "running_var"):
                layer.eps = 1e-5
        other = theirs([images[0] / 255])[0]
        assert len(other["scores"]) != len(one["scores"]) or (other["scores"] - one["scores"]).abs().max() > 1e-3


@pytest.mark.fidelity
def test_the_second_published_version(tmp_path):
    from torchvision.models.detection import MaskRCNN as Detector
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, RPNHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
    from torchvision.models.resnet import resnet18

    torch.manual_seed(0)
    trunk = _resnet_fpn_extractor(resnet18(), 5, norm_layer=nn.BatchNorm2d)
    box_head = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=nn.BatchNorm2d)
    mask_head = MaskRCNNHeads(256, [256] * 4, 1, norm_layer=nn.BatchNorm2d)
    detector = Detector(
        trunk, 91, rpn_head=RPNHead(256, 3, conv_depth=2), box_head=box_head, mask_head=mask_head, **THEIRS
    )
    perturb(detector).eval()
    torch.save({"model": detector.state_dict(), "epoch": 3}, tmp_path / "v2.pth")
    options = {"backbone": "resnet18", "init_from": str(tmp_path / "v2.pth"), **OURS}
    version = {"box_head": "4conv1fc", "head_norm": "batch", "rpn_convs": 2, "batch_norm": "train"}
    model = MaskRCNN(RAW, **options, **version).eval()
    images = pictures()
    with torch.inference_mode():
        for one, other in zip(model.detect(images), detector([image / 255 for image in images]), strict=True):
            same(one, other)
    with pytest.raises(ValueError, match=r'version 2 of torchvision.*box_head "4conv1fc", head_norm "batch"'):
        MaskRCNN(RAW, **options)


@pytest.mark.fidelity
def test_80_classes_are_gathered_from_the_raw_ids(theirs):
    """COCO's ids 1..90 without the ten that were never annotated, in order; boxes and masks with their classes."""
    from torchvision.models._meta import _COCO_CATEGORIES

    assert len(RAW_IDS) == 80 and "N/A" not in [_COCO_CATEGORIES[i] for i in RAW_IDS]
    assert _COCO_CATEGORIES[RAW_IDS[79]] == "toothbrush" and _COCO_CATEGORIES[RAW_IDS[11]] == "stop sign"
    ours, full = ours_of(theirs, 80).network.roi_heads, theirs.roi_heads
    box, all_box = ours.box_predictor, full.box_predictor
    mask, all_mask = (heads.mask_predictor.mask_fcn_logits for heads in (ours, full))
    for ours, full in enumerate((0, *RAW_IDS)):
        assert torch.equal(box.cls_score.weight[ours], all_box.cls_score.weight[full])
        assert torch.equal(box.cls_score.bias[ours], all_box.cls_score.bias[full])
        assert torch.equal(box.bbox_pred.weight.view(81, 4, -1)[ours], all_box.bbox_pred.weight.view(91, 4, -1)[full])
        assert torch.equal(mask.weight[ours], all_mask.weight[full])


def test_other_classes_leave_the_predictors_out(theirs):
    names = ["roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred",
             "roi_heads.mask_predictor.mask_fcn_logits"]  # fmt: skip
    model = tiny(7)
    with pytest.raises(ValueError, match=r"has 90 classes and this model 7\. .*init_without \[roi_heads.box_predictor"):
        model.start_from(dict(theirs.state_dict()), "theirs.pth")
    before = model.network.roi_heads.box_predictor.cls_score.weight.clone()
    model.start_from(dict(theirs.state_dict()), "theirs.pth", tuple(names))
    assert torch.equal(model.network.roi_heads.box_predictor.cls_score.weight, before)
    assert torch.equal(model.network.roi_heads.box_head.fc6.weight, theirs.roi_heads.box_head.fc6.weight)
    few = dict(theirs.state_dict())
    for name, each in PREDICTORS.items():
        few |= {f"{name}.{key}": few[f"{name}.{key}"][: 4 * each] for key in ("weight", "bias")}
    with pytest.raises(ValueError, match=r"few\.pth has 3 classes and this model 80"), torch.device("meta"):
        MaskRCNN(80, backbone="resnet18").start_from(few, "few.pth")


def test_a_mask_file_makes_a_box_detector_but_not_the_reverse(theirs):
    model = tiny(RAW, FasterRCNN)
    model.start_from(dict(theirs.state_dict()), "theirs.pth")
    assert torch.equal(model.network.roi_heads.box_head.fc7.weight, theirs.roi_heads.box_head.fc7.weight)
    boxes = {key: value for key, value in theirs.state_dict().items() if "mask" not in key}
    with pytest.raises(ValueError, match=r"not a state dict of MaskRCNN: it lacks roi_heads.mask_head.0.0"):
        tiny(RAW).start_from(boxes, "boxes.pth")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            {"conv1.weight": torch.ones(1)},
            {},
            "neither a seglight checkpoint nor a Faster or Mask R-CNN of torchvision",
        ),
        (None, {"preprocessing": "half"}, 'expects preprocessing "torch", not "half"'),
        (None, {"backbone": "resnet34"}, "it lacks backbone.body.layer1.2.bn1"),
        (None, {"rpn_convs": 2, "head_norm": "batch", "box_head": "4conv1fc"}, 'version 1 .* set model.box_head "2fc"'),
    ],
)
def test_files_that_do_not_fit(theirs, content, options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        MaskRCNN(RAW, **{"backbone": "resnet18", **options}).start_from(
            content or dict(theirs.state_dict()), "file.pth"
        )


@pytest.mark.fidelity
def test_samples_are_those_of_torchvision():
    from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
    from torchvision.models.detection._utils import Matcher as Theirs

    from seglight.models.rcnn_parts import Matcher, Sampler

    generator = torch.Generator().manual_seed(0)
    for share in (0.02, 0.5, 0.98):
        labels = [torch.randint(-1, 3, (400,), generator=generator), -torch.ones(30, dtype=torch.long)]
        labels.append((torch.rand(200, generator=generator) < share).float())
        torch.manual_seed(4)
        expected = BalancedPositiveNegativeSampler(64, 0.25)(labels)
        torch.manual_seed(4)
        for ours, other in zip(Sampler(64, 0.25)(labels), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))
            assert [a.sum() for a in ours][1] == 0
    overlap = (torch.rand(5, 300, generator=generator) * 20).round() / 20  # with ties
    overlap[4, 7:] *= 0.2
    overlap[:4, :7] = 0.1
    overlap[4, :7] = 0.25  # low, but its best, seven times
    ours, other = Matcher(0.7, 0.3, True)(overlap), Theirs(0.7, 0.3, True)(overlap)
    assert torch.equal(ours, other) and (ours == 4).any()


# ---------------------------------------------------------------------------------------------------------- crowds


@pytest.mark.fidelity
def test_crowds_are_neither_objects_nor_background():
    network = tiny().network.train()
    images = [torch.zeros(3, 128, 128)]
    masks = torch.zeros(2, 128, 128, dtype=torch.bool)
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0], [64.0, 0.0, 128.0, 128.0]]),
        "labels": torch.tensor([2, 1]),
        "masks": masks,
        "iscrowd": torch.tensor([False, True]),
        "area": torch.tensor([1024.0, 8192.0]),
    }
    from seglight.models.rcnn_parts import torchvision_targets

    (theirs,) = torchvision_targets([target])
    assert theirs["boxes"].tolist() == [[8, 8, 40, 40]] and theirs["labels"].tolist() == [3]
    assert theirs["masks"].shape == (1, 128, 128) and theirs["crowds"].tolist() == [[64, 0, 128, 128]]
    # in the crowd, to 0.75 in it, to half in it, beside it, and on the object
    boxes = torch.tensor(
        [[70.0, 10, 100, 40], [56, 0, 88, 32], [48, 0, 80, 32], [0, 64, 32, 96], [10, 8, 40, 40], [8, 8, 40, 40]]
    )
    labels, _ = network.rpn.assign_targets_to_anchors([boxes], [theirs])
    assert labels[0].tolist() == [-1, -1, 0, 0, 1, 1]
    network.roi_heads.fg_bg_sampler.batch_size_per_image = 100
    kept, _, labels, _ = network.roi_heads.select_training_samples([boxes], [theirs])
    assert kept[0].tolist() == [*boxes[2:].tolist(), [8, 8, 40, 40]]
    assert labels[0].tolist() == [0, 0, 3, 3, 3]
    theirs["crowds"] = torch.tensor([[0.0, 0, 128, 128]])  # an object within a crowd is still learned
    kept, _, labels, _ = network.roi_heads.select_training_samples([boxes], [theirs])
    assert labels[0].tolist() == [3, 3, 3]
    target["masks"] = masks.clone().index_fill_(0, torch.tensor(1), True)
    torch.manual_seed(0)
    first, _ = network(images, [target])
    target["masks"] = masks
    torch.manual_seed(0)
    again, _ = network(images, [target])
    assert first == again  # the crowd's own mask is not learned


@pytest.mark.parametrize("crowd", [False, True])
@pytest.mark.parametrize("name", ["MaskRCNN", "FasterRCNN", "MaskRCNNC4"])
def test_images_without_objects(name, crowd):
    """All background, or nothing but a crowd: finite losses, none of the mask or the boxes."""
    model = made(name).train()
    images = pictures((64, 96), (64, 64))
    targets = objects_of(images, crowd=[(i, 0) for i in range(2)], per_image=int(crowd))
    for target, image in zip(targets, images, strict=True):
        target["boxes"][:] = torch.tensor([-1000.0, -1000, *(3000 * torch.ones(2))])
        assert len(target["boxes"]) == crowd and image.shape[0] == 3
    losses, _ = model.network(floats(images), targets)
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total) and losses["objectness"] > 0 and losses["classifier"] > 0
    assert all(losses[name] == 0 for name in losses if name not in ("objectness", "classifier"))


# -------------------------------------------------------------------------------------------------- the contract

MODELS = {
    "MaskRCNN": lambda **o: tiny(**o),
    "FasterRCNN": lambda **o: tiny(model=FasterRCNN, **o),
    "MaskRCNNC4": lambda **o: tiny(model=MaskRCNNC4, **o),
    "v2": lambda **o: tiny(box_head="4conv1fc", head_norm="batch", rpn_convs=2, batch_norm="train", **o),
    "group": lambda **o: tiny(box_head="4conv1fc", head_norm="group", **o),
    "convnext": lambda **o: tiny(backbone="convnext_atto", **o),
}


@functools.cache
def made(name):
    return MODELS[name]()


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name):
    model = made(name).train()
    model.zero_grad()
    images = pictures()
    losses, _ = model.network(floats(images), objects_of(images))
    sum(losses.values()).backward()
    assert set(losses) == {"objectness", "rpn_box_reg", "classifier", "box_reg"} | (
        set() if name == "FasterRCNN" else {"mask"}
    )
    for key, parameter in model.network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.any(), f"{key} is in the network, but nothing depends on it"


@pytest.mark.parametrize("name", ["MaskRCNN", "FasterRCNN", "MaskRCNNC4", "v2"])
def test_two_sizes_and_from_a_checkpoint(name, tmp_path):
    model = made(name).eval()
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "it.ckpt")
    again = seglight.load(tmp_path / "it.ckpt", test_score=0.05)
    side = 14 if name == "MaskRCNNC4" else 28
    images = floats(pictures((65, 90), (40, 50)))
    with torch.inference_mode():
        losses, found = model.network(images, None)
        _, copied = again.network(images, None)
    assert losses == {}
    for one, other, image in zip(found, copied, images, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
        n = len(one["scores"])
        assert n and one["masks"].shape == (n, side, side) and one["boxes"].shape == one["windows"].shape == (n, 4)
        assert one["labels"].dtype == torch.int64 and one["labels"].min() >= 0 and one["labels"].max() < 3
        height, width = image.shape[-2:]
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert one["masks"].min() >= 0 and one["masks"].max() <= 1 and one["scores"].max() <= 1
    if name == "FasterRCNN":
        assert (found[0]["masks"] == 1).all()


@pytest.mark.parametrize("name", ["MaskRCNN", "MaskRCNNC4", "group"])
def test_bfloat16(name):
    """Boxes are float32 throughout: bfloat16 would round 150 pixels to 1, and anchors with them."""
    model = made(name)
    images = pictures()
    with torch.no_grad():
        exact = model.train().network(floats(images), objects_of(images))[0]
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.network(floats(images), objects_of(images))[0]
        for key, value in exact.items():
            assert rough[key].dtype == torch.float32
            assert abs(float(rough[key] - value)) < 0.15 * float(value) + 0.05, key
        with torch.autocast("cpu", torch.bfloat16):
            _, found = model.eval().network(floats(images), None)
            anchors = model.network.rpn.anchor_generator
    assert all(one[key].dtype == torch.float32 for one in found for key in ("boxes", "scores", "masks", "windows"))
    boxes = torch.cat([one["boxes"] for one in found])
    assert not torch.equal(boxes, boxes.bfloat16().float())
    assert anchors.cell_anchors[0].dtype == torch.float32


def test_frozen_batch_norm_is_that_of_torchvision():
    from torchvision.ops import FrozenBatchNorm2d

    from seglight.models.rcnn_parts import FrozenBatchNorm

    theirs, ours = perturb_norm(FrozenBatchNorm2d(5)), perturb_norm(FrozenBatchNorm(5))
    x = torch.randn(2, 5, 7, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours(x.bfloat16()).dtype == torch.bfloat16
    assert not list(ours.parameters())


def perturb_norm(layer):
    generator = torch.Generator().manual_seed(0)
    for buffer in layer.buffers():
        buffer.uniform_(0.5, 1.5, generator=generator)
    return layer


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("backbone", "trainable", "frozen"),
    [
        ("resnet18", 5, []),
        ("resnet18", 4, ["bn1", "conv1"]),
        ("resnet18", 3, ["bn1", "conv1", "layer1"]),
        ("resnet18", 1, ["bn1", "conv1", "layer1", "layer2", "layer3"]),
        ("resnet18", 0, ["bn1", "conv1", "layer1", "layer2", "layer3", "layer4"]),
        ("convnext_atto", 4, ["stem_0", "stem_1"]),
        ("convnext_atto", 3, ["stages_0", "stem_0", "stem_1"]),
        ("legacy_seresnext50_32x4d", 3, ["layer0", "layer1"]),
    ],
)
def test_first_stages_stay_as_they_are(backbone, trainable, frozen):
    with torch.device("meta"):
        network = MaskRCNNNetwork(3, backbone, frozen_norm=False, trainable_layers=trainable)
    assert sorted({name.split(".")[2] for name, p in network.named_parameters() if not p.requires_grad}) == frozen
    assert {name.split(".")[0] for name, p in network.named_parameters() if not p.requires_grad} <= {"backbone"}


@pytest.mark.parametrize("backbone", ["seresnext101_32x4d", "senet154", "resnet269s", "swin_tiny_patch4_window7_224"])
def test_trunks_of_the_ensembles(backbone):
    with torch.device("meta"):
        network = MaskRCNNNetwork(80, backbone)
    assert [conv.in_channels for conv in network.pyramid.lateral] == [
        network.backbone.channels[t] for t in network.taps
    ]


def test_test_time_options_reach_the_network():
    model = tiny(test_proposals=50, test_score=0.3, test_nms=0.4, test_detections=7, train_proposals=99,
                 rois_per_image=33, anchors=[8, 16, 32, 64, 128], aligned=True)  # fmt: skip
    network = model.network.eval()
    heads = network.roi_heads
    assert (network.rpn.post_nms_top_n(), network.rpn.pre_nms_top_n()) == (50, 1000)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.3, 0.4, 7)
    assert heads.fg_bg_sampler.batch_size_per_image == 33
    assert heads.box_roi_pool.aligned and heads.mask_roi_pool.aligned
    assert network.rpn.anchor_generator.cell_anchors[0].tolist() == [[-6, -3, 6, 3], [-4, -4, 4, 4], [-3, -6, 3, 6]]
    network.train()
    assert (network.rpn.post_nms_top_n(), network.rpn.pre_nms_top_n()) == (99, 2000)
    (found,) = model.eval().network(floats(pictures()[:1]), None)[1]
    assert len(found["scores"]) <= 7 and (found["scores"] > 0.3).all()
    with torch.device("meta"):
        c4 = MaskRCNNC4(3, backbone="resnet18", anchors=[16, 64], aligned=True).network.eval()
    assert c4.roi_heads.box_roi_pool.aligned and c4.roi_heads.mask_roi_pool.aligned
    assert c4.rpn.post_nms_top_n() == 300 and c4.roi_heads.fg_bg_sampler.batch_size_per_image == 64
    assert c4.rpn.head.cls_logits.out_channels == 6
    assert not {"test_score", "test_nms", "test_detections", "test_proposals"} & model.architecture()
    assert {"anchors", "aligned", "batch_norm", "box_head"} <= model.architecture()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (MaskRCNN, {"backbone": "vit_tiny_patch16_224"}, r"strides \[16, 16, 16\], none at 4, .* choose a backbone"),
        (MaskRCNN, {"backbone": "resnet5"}, "timm has no network 'resnet5'"),
        (MaskRCNN, {"anchors": [8, 16]}, r"anchors is \[8, 16\]; give 5 sizes"),
        (MaskRCNN, {"anchors": [8] * 6}, r"anchors is \[8, 8, 8, 8, 8, 8\]; give 5 sizes"),
        (MaskRCNN, {"trainable_layers": 6}, "trainable_layers is 6; .* make 0 to 5"),
        (MaskRCNN, {"backbone": "xception41"}, "no sequence to freeze a part of; set trainable_layers to 5"),
        (MaskRCNN, {"box_head": "3fc"}, 'box_head is \'3fc\'; choose "2fc" or "4conv1fc"'),
        (MaskRCNN, {"head_norm": "layer"}, "head_norm is 'layer'; choose none, batch or group"),
        (MaskRCNNC4, {"backbone": "convnext_atto"}, "last stage of a ResNet, which convnext_atto is not"),
        (MaskRCNNC4, {"anchors": []}, "anchors is empty"),
    ],
)
def test_what_it_refuses(model, options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        model(**{"num_classes": 3, "backbone": "resnet18", **options})


@pytest.mark.parametrize(
    ("model", "monitor"),
    [(MaskRCNN, "val/AP"), (FasterRCNN, "val/box_AP"), (MaskRCNNC4, "val/AP"), (PANet, "val/AP")],
)
def test_defaults_score_what_is_learned_and_keep_the_stem_and_the_first_stage(model, monitor):
    with torch.device("meta"):
        trunk = model(3, backbone="resnet18").network.backbone.body
    assert model.monitor == monitor
    assert not any(p.requires_grad for part in (trunk.conv1, trunk.layer1) for p in part.parameters())
    assert all(p.requires_grad for part in (trunk.layer2, trunk.layer3) for p in part.parameters())


@pytest.mark.parametrize("model", [MaskRCNN, FasterRCNN, MaskRCNNC4, PANet])
def test_pretrained_trunks_want_their_normalisation(model, monkeypatch):
    import timm

    create, asked = timm.create_model, []

    def record(name, pretrained=False, **options):
        asked.append(pretrained)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", record)
    with torch.device("meta"):
        model(3, backbone="resnet18", pretrained=True)
        assert any(asked)
        with pytest.raises(ValueError, match=r'preprocessing is "half".*resnet18 expect "torch"'):
            model(3, backbone="resnet18", pretrained=True, preprocessing="half")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_detections_keep_their_axes(count):
    found = {"boxes": torch.zeros(count, 4), "labels": torch.ones(count, dtype=torch.int64),
             "scores": torch.zeros(count), "masks": torch.zeros(count, 1, 28, 28)}  # fmt: skip
    ours = _detections(found)
    assert ours["masks"].shape == (count, 28, 28) and not ours["labels"].any()


def test_training_without_targets_is_refused():
    with pytest.raises(ValueError, match="MaskRCNNNetwork is in training mode and got no targets"):
        tiny().network.train()([torch.zeros(3, 32, 32)], None)


@pytest.mark.parametrize("batch_norm", ["frozen", "eval"])
def test_norms_of_the_heads_learn_whatever_the_trunk_does(batch_norm):
    model = tiny(batch_norm=batch_norm, head_norm="batch", box_head="4conv1fc", **OURS).train()
    heads = [
        layer for part in (model.network.pyramid, model.network.roi_heads) for layer in part.modules()
        if isinstance(layer, nn.BatchNorm2d)
    ]  # fmt: skip
    assert len(heads) == 8 + 4 + 4
    assert all(layer.training and layer.weight.requires_grad for layer in heads)
    trunk = [layer for layer in model.network.backbone.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(trunk) == (0 if batch_norm == "frozen" else 20) and not any(layer.training for layer in trunk)
    model([pictures()[0]])  # detects in evaluation mode, and comes back
    assert all(layer.training for layer in heads) and not any(layer.training for layer in trunk)


def test_the_last_stage_of_c4_is_part_of_the_trunk():
    model = MaskRCNNC4(3, backbone="resnet18", batch_norm="eval").train()
    norms = [layer for layer in model.network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 20 and not any(layer.training for layer in norms)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, True),
        ({"batch_norm": "train", "trainable_layers": 3}, True),
        ({"batch_norm": "train", "trainable_layers": 5}, False),
    ],
)
def test_a_frozen_trunk_of_random_weights_is_not_trained(options, refused):
    model = MaskRCNN(3, backbone="resnet18", **options)
    if refused:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"bn1 is frozen at its initial values\. Set model.pretrained"):
                model.on_fit_start()
            model.network = nn.SyncBatchNorm.convert_sync_batchnorm(model.network)  # as Lightning does it before
    else:
        model.on_fit_start()
    tiny().on_fit_start()  # other statistics than the initial ones


def test_padding():
    from seglight.models.rcnn_parts import batch_images

    images = [torch.rand(3, 33, 64), torch.rand(3, 20, 65)]
    batch = batch_images(images)
    assert batch.tensors.shape == (2, 3, 64, 96) and batch.image_sizes == [(33, 64), (20, 65)]
    assert torch.equal(batch.tensors[1, :, :20, :65], images[1]) and not batch.tensors[0, :, 33:].any()
    last = [image[None].contiguous(memory_format=torch.channels_last)[0] for image in images]
    assert batch_images(last).tensors.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch_images(last).tensors, batch.tensors)


def test_c4_takes_the_trunks_last_stage():
    network = C4Network(3, "resnet18")
    assert "layer4" not in dict(network.backbone.body.named_children())
    assert network.levels(torch.zeros(1, 3, 64, 96))[0][0].shape == (1, 256, 4, 6)
    assert network.roi_heads.box_head(torch.zeros(5, 256, 14, 14)).shape == (5, 512)
    assert copy.deepcopy(network).roi_heads.mask_head.__self__ is not network.roi_heads.box_head


def test_a_crowd_without_objects_beside_it_is_spared():
    """Only where nothing else is left are anchors in a crowd background; what lies outside is enough."""
    network = MaskRCNN(num_classes=2, backbone="resnet18").network
    anchors = torch.tensor([[10.0, 10, 20, 20], [60, 60, 70, 70]])
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    for crowd, expected in (([0.0, 0, 40, 40], [-1, 0]), ([0.0, 0, 99, 99], [0, 0])):
        labels, _ = network.rpn.assign_targets_to_anchors([anchors], [{**nothing, "crowds": torch.tensor([crowd])}])
        assert labels[0].tolist() == expected


def test_images_without_objects_give_every_parameter_a_gradient():
    """Of 0: DDP would wait for those of the mask head on the other ranks."""
    torch.manual_seed(0)
    network = MaskRCNN(
        num_classes=2, backbone="resnet18", batch_norm="train", trainable_layers=5, rois_per_image=8, train_proposals=8
    ).network.train()
    target = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 64, dtype=torch.bool),
        "iscrowd": torch.zeros(0, dtype=torch.bool),
        "area": torch.zeros(0),
    }
    losses, _ = network([torch.randn(3, 64, 64)], [target])
    assert losses["mask"] == 0
    torch.stack(list(losses.values())).sum().backward()
    missing = [name for name, parameter in network.roi_heads.named_parameters() if parameter.grad is None]
    assert not missing


@pytest.mark.parametrize(("model", "rois"), [(MaskRCNN, 512), (MaskRCNNC4, 64)])
def test_half_of_the_anchors_and_a_quarter_of_the_rois_are_objects(model, rois):
    with torch.device("meta"):
        network = model(num_classes=3, backbone="resnet18" if model is MaskRCNN else "resnet50").network
    labels = torch.arange(4000) % 2  # more than enough of both
    for sampler, positive, total in (
        (network.rpn.fg_bg_sampler, 128, 256),
        (network.roi_heads.fg_bg_sampler, rois // 4, rois),
    ):
        (chosen,), (others,) = sampler([labels])
        assert (int(chosen.sum()), int(others.sum())) == (positive, total - positive)
