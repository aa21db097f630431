"""DeepLab v2: counts, layers, the port's files against a literal forward pass, MSC with its losses, padding, recipe."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from layer_table import layer_table, stored
from PIL import Image
from torch import nn
from torch.nn import functional as F

import seglight
from seglight.models import deeplabv2, vgg
from seglight.models.deeplabv2 import (
    RATES,
    DeepLabV2,
    DeepLabV2Network,
    DeepLabV2VGG,
    DeepLabV2VGGNetwork,
    port_to_network,
)

MSC = ["out", "msc_100", "msc_75", "msc_50"]


def count(network):
    return sum(p.numel() for p in network.parameters())


def meta(network, *args, **options):
    with torch.device("meta"):
        return network(*args, **options)


@functools.cache
def full():
    """The headline model, without memory."""
    return meta(DeepLabV2, num_classes=21).network


def tiny(model=DeepLabV2VGG, **options):
    """A thin VGG with ASPP and three scales, or a small ResNet, whose scores are not small."""
    torch.manual_seed(0)
    own = {"width": 4, "scales": [1.0, 0.75, 0.5]} if model is DeepLabV2VGG else {"backbone": "resnet18"}
    made = model(num_classes=3, **{**own, **options})
    heads = made.network.fc8 if model is DeepLabV2VGG else made.network.aspp
    for head in heads:
        nn.init.normal_(head.weight, std=0.1)
        nn.init.normal_(head.bias)
    for layer in made.network.modules():
        if isinstance(layer, nn.BatchNorm2d):  # timm starts the last of each block at zero
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return made.eval()


def batch(side=65, size=2):
    torch.manual_seed(3)
    mask = torch.randint(0, 3, (size, side, side), dtype=torch.uint8)
    mask[:, :3] = 255
    image = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8)
    return {"image": image, "mask": mask, "image_id": [str(i) for i in range(size)]}


# ---------------------------------------------------------------------------------------------------- networks


@pytest.mark.fidelity
@pytest.mark.parametrize(("num_classes", "total"), [(21, 44_048_532), (60, 46_924_080), (19, 43_901_068)])
def test_parameter_counts_on_resnet(num_classes, total):
    network = full() if num_classes == 21 else meta(DeepLabV2Network, num_classes)
    assert count(network) == total


@pytest.mark.fidelity
@pytest.mark.parametrize(("head", "total"), [("largefov", 20_505_429), ("aspp-s", 37_877_652), ("aspp-l", 37_877_652)])
def test_parameter_counts_on_vgg(head, total):
    assert count(meta(DeepLabV2VGGNetwork, 21, head)) == total
    assert count(meta(DeepLabV2VGG, num_classes=21).network) == 37_877_652


@pytest.mark.fidelity
def test_layer_tables():
    assert layer_table(full()) == stored("deeplabv2")
    assert layer_table(meta(DeepLabV2VGGNetwork, 21)) == stored("deeplabv2_vgg")
    assert layer_table(meta(DeepLabV2VGGNetwork, 21, "largefov")) == stored("deeplabv2_largefov")
    small = meta(DeepLabV2VGGNetwork, 21, "aspp-s").backbone
    assert [getattr(small, f"fc6_{i}").dilation[0] for i in (1, 2, 3, 4)] == [2, 4, 8, 12]


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("side", "align_corners", "sides"),
    [
        (321, True, (41, 31, 21)),  # 241 and 161 pixels
        (513, True, (65, 49, 33)),
        (321, False, (41, 31, 21)),  # 240 and 160 pixels: ceil mode
        (97, False, (13, 10, 7)),
    ],
)
def test_sizes_of_the_scores(side, align_corners, sides):
    for network in (
        meta(DeepLabV2Network, 2, "resnet18", align_corners=align_corners),
        meta(DeepLabV2VGGNetwork, 2, scales=(1, 0.75, 0.5), align_corners=align_corners, width=1),
    ):
        out = network(torch.empty(1, 3, side, side, device="meta"))
        assert list(out) == MSC
        assert [out[name].shape for name in MSC] == [(1, 2, s, s) for s in (sides[0], *sides)]
    assert list(meta(DeepLabV2VGGNetwork, 2)(torch.empty(1, 3, 9, 9, device="meta"))) == ["out"]


@pytest.mark.fidelity
def test_scores_start_as_in_the_release():
    model = DeepLabV2(num_classes=5, backbone="resnet18")
    for conv in model.network.aspp:
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05) and (conv.bias == 0).all()
    with torch.device("meta"), pytest.raises(ValueError, match="head is 'aspp'; choose among largefov, aspp-s, aspp-l"):
        DeepLabV2VGG(num_classes=5, head="aspp")


@pytest.mark.fidelity
def test_aspp_on_vgg_is_the_sum_of_four_largefovs():
    aspp = tiny(scales=[1.0]).network
    image = torch.randn(1, 3, 65, 49)
    total = 0
    for i, rate in enumerate(RATES["aspp-l"], start=1):
        branch = DeepLabV2VGGNetwork(3, "largefov", width=4).eval()
        renamed = {f"fc{n}_{i}.{kind}": f"fc{n}.{kind}" for n in (6, 7) for kind in ("weight", "bias")}
        own = {renamed.get(key, key): w for key, w in aspp.backbone.state_dict().items()}
        branch.backbone.load_state_dict({key: own[key] for key in branch.backbone.state_dict()})
        branch.backbone.fc6.dilation = branch.backbone.fc6.padding = (rate, rate)
        branch.fc8[0].load_state_dict(aspp.fc8[i - 1].state_dict())
        total = total + branch(image)["out"]
    assert (aspp(image)["out"] - total).abs().max() < 1e-4


# ----------------------------------------------------------------------------------------------------- weights


def port_file(blocks, num_classes, prefix="base.", head="aspp", device="cpu"):
    """Random tensors under the names of the port (deeplabv2_resnet101_msc-vocaug-20000.pth has 3, 4, 23, 3 blocks)."""
    torch.manual_seed(4)
    weights = {}

    def conv(name, inside, out, side):
        fan = inside * side * side
        weights[f"{prefix}{name}.conv.weight"] = torch.randn(out, inside, side, side, device=device) * (2 / fan) ** 0.5
        for kind in ("weight", "bias", "running_mean", "running_var"):
            value = torch.rand(out, device=device) * 0.2 + (0.9 if kind in ("weight", "running_var") else -0.1)
            weights[f"{prefix}{name}.bn.{kind}"] = value
        weights[f"{prefix}{name}.bn.num_batches_tracked"] = torch.tensor(0, device=device)

    conv("layer1.conv1", 3, 64, 7)
    inside = 64
    for layer, (number, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), start=2):
        for block in range(1, number + 1):
            name = f"layer{layer}.block{block}"
            conv(f"{name}.reduce", inside, width, 1)
            conv(f"{name}.conv3x3", width, width, 3)
            conv(f"{name}.increase", width, 4 * width, 1)
            if block == 1:
                conv(f"{name}.shortcut", inside, 4 * width, 1)
            inside = 4 * width
    sides = {"aspp": 3, "fc": 1}
    for name in [f"aspp.c{i}" for i in range(4)] if head == "aspp" else ["fc"]:
        weights[f"{prefix}{name}.weight"] = torch.randn(num_classes, inside, *[sides[head]] * 2, device=device) * 0.01
        weights[f"{prefix}{name}.bias"] = torch.randn(num_classes, device=device)
    return weights


def port_forward(weights, image, blocks):
    """The port's evaluation, written out on its file: blocks, dilations, ASPP, scales, maximum."""

    def conv(x, name, stride=1, dilation=1, relu=True):
        weight = weights[f"base.{name}.conv.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        x = F.conv2d(x, weight, stride=stride, padding=padding, dilation=dilation)
        mean, var, scale, shift = (
            weights[f"base.{name}.bn.{kind}"].view(-1, 1, 1)
            for kind in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (var + 1e-5).sqrt() * scale + shift
        return x.relu() if relu else x

    def base(x):
        x = F.max_pool2d(conv(x, "layer1.conv1", stride=2), 3, 2, 1, ceil_mode=True)
        for layer, stride, dilation, number in zip((2, 3, 4, 5), (1, 2, 1, 1), (1, 1, 2, 4), blocks, strict=True):
            for block in range(1, number + 1):
                name, step = f"layer{layer}.block{block}", stride if block == 1 else 1
                y = conv(conv(x, f"{name}.reduce", step), f"{name}.conv3x3", dilation=dilation)
                y = conv(y, f"{name}.increase", relu=False)
                x = (y + (conv(x, f"{name}.shortcut", step, relu=False) if block == 1 else x)).relu()
        heads = [(weights[f"base.aspp.c{i}.weight"], weights[f"base.aspp.c{i}.bias"]) for i in range(4)]
        return sum(
            F.conv2d(x, w, b, padding=rate, dilation=rate) for (w, b), rate in zip(heads, (6, 12, 18, 24), strict=True)
        )

    first = base(image)
    scores = [first]
    for scale in (0.5, 0.75):
        small = base(F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False))
        scores.append(F.interpolate(small, first.shape[-2:], mode="bilinear", align_corners=False))
    return torch.stack(scores).max(0).values


@pytest.mark.fidelity
def test_a_file_of_the_port_gives_the_ports_scores(tmp_path, caplog):
    """On two blocks a stage; the names and rules are those of ResNet-101."""
    caplog.set_level("INFO")
    path = str(tmp_path / "deeplabv2.pth")
    weights = port_file((2, 2, 2, 2), 3)
    torch.save(weights, path)
    model = DeepLabV2(
        num_classes=3, backbone="resnet26", preprocessing="caffe", align_corners=False, init_from=path
    ).eval()
    assert "As initialised: nothing. In the file, not in this network: nothing." in caplog.text
    image = torch.randint(0, 256, (1, 3, 101, 74), dtype=torch.uint8)
    bgr = image.flip(1) - torch.tensor([104.00699, 116.66877, 122.67892]).view(3, 1, 1)
    with torch.inference_mode():
        expected = port_forward(weights, bgr, (2, 2, 2, 2))
        out = model.network(model.normalize(image))["out"]
        assert expected.std() > 0.1 and out.shape == expected.shape
        assert (out - expected).abs().max() < 1e-4 * expected.abs().max()
        full = F.interpolate(expected, (101, 74), mode="bilinear", align_corners=False)
        assert (model(image) - full).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.fidelity
def test_names_and_shapes_of_the_released_file_are_those_of_the_network():
    file = port_file((3, 4, 23, 3), 21, device="meta")
    assert len(file) == 1 * 6 + (3 + 4 + 23 + 3) * 18 + 4 * 6 + 8
    for drop in ("", "num_batches_tracked"):  # files converted from Caffe may lack it
        kept = {key: w for key, w in file.items() if not drop or not key.endswith(drop)}
        shapes = {name: w.shape for name, w in port_to_network(kept).items()}
        assert shapes == {name: w.shape for name, w in full().state_dict().items()}


def test_the_coco_file_leaves_the_aspp_as_initialised(tmp_path, caplog):
    caplog.set_level("INFO")
    path = str(tmp_path / "deeplabv1_resnet101-coco.pth")
    weights = port_file((2, 2, 2, 2), 91, prefix="", head="fc")
    torch.save(weights, path)
    options = {"num_classes": 3, "backbone": "resnet26", "preprocessing": "caffe", "init_from": path}
    model = DeepLabV2(**options, rates=[3, 6, 9, 12])  # the file has no rates to differ from
    body = model.network.backbone.body
    assert torch.equal(body.layer4[1].conv2.weight, weights["layer5.block2.conv3x3.conv.weight"])
    assert torch.equal(body.layer2[0].downsample[1].running_var, weights["layer3.block1.shortcut.bn.running_var"])
    assert model.network.aspp[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert "leaving out its own classifier" in caplog.text


def test_files_of_the_port_that_do_not_fit_are_refused(tmp_path):
    path = str(tmp_path / "port.pth")
    weights = port_file((2, 2, 2, 2), 3)
    torch.save(weights, path)
    options = {"num_classes": 3, "backbone": "resnet26", "preprocessing": "caffe", "init_from": path}
    for change, message in [
        ({"preprocessing": "torch"}, r"BGR.*Set model\.preprocessing to caffe"),
        ({"dilation": "lagged-first"}, r"uniform dilation.*would compute something else.*Set model\.dilation"),
        ({"stride_in_1x1": False}, "strides in the 1x1"),
        ({"rates": [3, 6, 9, 12]}, r"ASPP rates \[6, 12, 18, 24\]"),
        ({"num_classes": 4}, r"aspp\.\d\.\w+ is \(3,.* but \(4,.*init_without"),
        ({"backbone": "resnet18"}, "is not a state dict of DeepLabV2|in this DeepLabV2"),
    ]:
        with pytest.raises(ValueError, match=message):
            meta(DeepLabV2, **{**options, **change})
    model = DeepLabV2(**{**options, "num_classes": 4}, init_without=["aspp"])
    assert torch.equal(model.network.backbone.body.conv1.weight, weights["base.layer1.conv1.conv.weight"])
    lost = {key: w for key, w in weights.items() if "layer4.block2.increase.conv" not in key}
    torch.save(lost, path)
    with pytest.raises(ValueError, match=r"lacks backbone\.body\.layer3\.1\.conv3 and has nothing in excess"):
        meta(DeepLabV2, **options)
    torch.save({**weights, "base.decoder.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"base\.decoder\.weight is no layer of the port"):
        meta(DeepLabV2, **options)


def test_pretrained_and_caffe_strides_exclude_each_other(monkeypatch):
    with pytest.raises(ValueError, match=r"set model\.stride_in_1x1 to false"):
        DeepLabV2(num_classes=3, pretrained=True)
    with pytest.raises(ValueError, match="choose one"):
        DeepLabV2(num_classes=3, pretrained=True, init_from="x.pth")
    asked = []
    backbone = deeplabv2.Backbone

    def build(name, *args, pretrained, **options):
        asked.append(pretrained)
        return backbone(name, *args, **options)

    monkeypatch.setattr(deeplabv2, "Backbone", build)
    model = meta(DeepLabV2, num_classes=3, backbone="resnet26", pretrained=True, stride_in_1x1=False)
    assert asked == [True] and model.network.backbone.body.layer2[0].conv2.stride == (2, 2)
    with pytest.raises(ValueError, match=r'preprocessing is "caffe", but timm.*expect "torch"'):
        meta(DeepLabV2, num_classes=3, pretrained=True, stride_in_1x1=False, preprocessing="caffe")


def test_every_branch_on_vgg_starts_from_the_same_classifier(tmp_path):
    torch.manual_seed(0)
    source = vgg.VGG16Trunk("fcn", width=4).state_dict()
    torch.save(source, tmp_path / "vgg16.pth")
    model = DeepLabV2VGG(num_classes=3, width=4, preprocessing="caffe", init_from=str(tmp_path / "vgg16.pth"))
    for i in (1, 2, 3, 4):
        branch = getattr(model.network.backbone, f"fc6_{i}")
        assert torch.equal(branch.weight, source["fc6.weight"][::4, :, ::3, ::3])
        assert torch.equal(getattr(model.network.backbone, f"fc7_{i}").bias, source["fc7.bias"][::4])
    with pytest.raises(ValueError, match="width is 4"):
        DeepLabV2VGG(num_classes=3, width=4, pretrained=True)
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            deeplabv2, "start_trunk", lambda network, name, preprocessing: taken.append((name, preprocessing))
        )
        meta(DeepLabV2VGG, num_classes=3, pretrained=True)
    assert taken == [("DeepLabV2VGG", "torch")]


# --------------------------------------------------------------------------------------------------------- MSC


@pytest.mark.fidelity
@pytest.mark.parametrize("align_corners", [True, False])
def test_msc_takes_the_maximum_over_scales_of_one_network(align_corners):
    model = tiny(align_corners=align_corners)
    single = tiny(align_corners=align_corners, scales=[1.0])
    single.network.load_state_dict(model.network.state_dict())
    image = torch.randn(2, 3, 65, 97)
    sizes = ((65, 97), (49, 73), (33, 49)) if align_corners else ((65, 97), (48, 72), (32, 48))
    with torch.inference_mode():
        out = model.network(image)
        resized = []
        for name, scale, size in zip(MSC[1:], (1.0, 0.75, 0.5), sizes, strict=True):
            if align_corners:
                seen = F.interpolate(image, size, mode="bilinear", align_corners=True)
            else:
                seen = F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
            assert seen.shape[-2:] == size
            scores = single.network(seen)["out"]
            torch.testing.assert_close(out[name], scores, rtol=1e-4, atol=1e-5)
            resized.append(F.interpolate(scores, (9, 13), mode="bilinear", align_corners=align_corners))
        torch.testing.assert_close(out["out"], torch.stack(resized).amax(0), rtol=1e-4, atol=1e-5)
        winners = torch.stack(resized).argmax(0).unique()
    assert len(winners) == 3  # or the maximum would prove nothing


@pytest.mark.fidelity
def test_four_losses_on_shrunk_labels():
    model = tiny()
    one = batch(65)
    outputs = model.network(model.normalize(one["image"]))
    losses = model.loss(outputs, one)
    total = 0
    for name, step in (("out", 8), ("msc_100", 8), ("msc_50", 16)):
        part = F.cross_entropy(outputs[name], one["mask"][:, ::step, ::step].long(), ignore_index=255)
        torch.testing.assert_close(losses[f"loss_{name}"], part)
        total = total + part
    positions = [min(range(65), key=lambda p, i=i: abs(p - i * 64 / 6)) for i in range(7)]
    label = torch.stack([one["mask"][:, p][:, positions] for p in positions], 1).long()
    part = F.cross_entropy(outputs["msc_75"], label, ignore_index=255)
    torch.testing.assert_close(losses["loss_msc_75"], part)
    torch.testing.assert_close(losses["loss"], total + part)
    assert model.loss_weights == dict.fromkeys(MSC, 1.0)
    assert tiny(scales=[1.0]).loss_weights == {"out": 1.0}


@pytest.mark.fidelity
@pytest.mark.parametrize(("large", "small"), [(321, 41), (321, 31), (321, 21), (320, 40), (97, 13), (5, 1), (1, 1)])
def test_labels_shrink_to_the_nearest_pixel(large, small):
    mask = torch.arange(large * large).view(1, large, large)
    logits = torch.empty(1, 3, small, small)
    aligned = tiny().target(logits, mask)[0]
    half = tiny(align_corners=False).target(logits, mask)[0]
    port = Image.fromarray(mask[0].float().numpy()).resize((small, small), resample=Image.NEAREST)  # as the port does
    assert torch.equal(half, torch.from_numpy(np.array(port)).long())
    for i in range(small):
        row = int(aligned[i, 0]) // large
        assert abs(row - i * (large - 1) / max(small - 1, 1)) <= 0.5
    if (large - 1) % 8 == 0 and small == (large - 1) // 8 + 1:
        assert torch.equal(aligned, mask[0, ::8, ::8])


# ------------------------------------------------------------------------------------------------------- model


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("size", "test_size", "padded"),
    [((37, 50), 97, (97, 97)), ((37, 50), None, (65, 65)), ((100, 129), 97, (129, 129)), ((97, 65), None, (97, 65))],
)
def test_images_are_padded_with_the_mean_and_scores_cropped(size, test_size, padded):
    model = tiny(test_size=test_size)
    image = torch.randint(0, 256, (1, 3, *size)).float()
    canvas = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1).expand(1, 3, *padded).clone()
    canvas[..., : size[0], : size[1]] = image
    with torch.inference_mode():
        scores = model.network(model.normalize(canvas))["out"]
        expected = F.interpolate(scores, padded, mode="bilinear", align_corners=True)[..., : size[0], : size[1]]
        assert (model(image) - expected).abs().max() < 1e-4


def test_half_pixel_networks_see_the_image_as_it_is():
    model = tiny(align_corners=False)
    image = torch.randint(0, 256, (1, 3, 37, 50), dtype=torch.uint8)
    with torch.inference_mode():
        scores = model.network(model.normalize(image))["out"]
        assert torch.equal(model.logits(model.normalize(image)), scores)
        assert torch.equal(model.labels([image[0]])[0][0], model(image)[0].argmax(0))
    single = tiny(scales=[1.0])
    assert single.logits(torch.zeros(1, 3, 41, 49)).shape[-2:] == (6, 7)  # 8 k + 1 is exact without MSC


def test_test_sizes_that_are_not_exact_are_refused():
    with pytest.raises(ValueError, match=r"test_size is 512, .* 32 k \+ 1; the nearest are 481 and 513"):
        tiny(test_size=512)
    with pytest.raises(ValueError, match=r"test_size is 512, .* 8 k \+ 1; the nearest are 505 and 513"):
        tiny(scales=[1.0], test_size=512)
    assert tiny(align_corners=False, test_size=512).test_size == 512
    for scales in ([0.5, 1.0], [], [1.0, 1.0], [1.0, 1.5]):
        with pytest.raises(ValueError, match="must begin with 1"):
            tiny(scales=scales)


def fit(model, one):
    from pytorch_lightning import Trainer

    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader([one], batch_size=None))


@pytest.mark.fidelity
def test_a_step_of_the_recipe_trains_all_but_batch_norm():
    model = tiny(DeepLabV2, batch_norm="frozen", lr=0.01, weight_decay=0.0)
    before = {name: w.clone() for name, w in model.network.state_dict().items()}
    fit(model.train(), batch(65))
    moved = {name for name, w in model.network.state_dict().items() if not torch.equal(w, before[name])}
    fixed = {name for name in before if "bn" in name or "downsample.1" in name}
    assert moved == set(before) - fixed and fixed


@pytest.mark.fidelity
@pytest.mark.parametrize(("model", "head"), [(DeepLabV2, "aspp"), (DeepLabV2VGG, "fc8")])
def test_learning_rates_of_the_recipe(model, head):
    made = tiny(model, batch_norm="frozen", lr=0.01, weight_decay=5e-4, head_lr=10.0, bias_lr=2.0, decay_bias=False)
    names = {id(p): name for name, p in made.network.named_parameters()}
    groups = {}
    for group in made.parameter_groups():
        for parameter in group["params"]:
            name = names[id(parameter)]
            groups[name.partition(".")[0], name.rpartition(".")[2]] = (group["lr"], group["weight_decay"])
    biases = {("backbone", "bias"): (0.02, 0.0)} if model is DeepLabV2VGG else {}  # the ResNet has none left to train
    assert groups == {
        ("backbone", "weight"): (0.01, 5e-4),
        (head, "weight"): (pytest.approx(0.1), 5e-4),
        (head, "bias"): (pytest.approx(0.2), 0.0),
        **biases,
    }


@pytest.mark.parametrize("options", [{}, {"head": "largefov", "scales": [1.0]}])
def test_every_parameter_on_vgg_gets_a_gradient(options):
    model = tiny(**options).train()
    one = batch(65)
    model.loss(model.network(model.normalize(one["image"])), one)["loss"].backward()
    assert [name for name, p in model.network.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_training_pads_crops_with_ignored_pixels(monkeypatch):
    """A crop of 60 is that of 65 whose last rows and columns are mean colour and unlabelled."""
    model = tiny()
    small = batch(60)
    seen = {}
    monkeypatch.setattr(model, "track", seen.update)
    model.training_step(small, 0)
    padded = {
        "image": F.pad(model.normalize(small["image"]), (0, 5, 0, 5)),
        "mask": F.pad(small["mask"], (0, 5, 0, 5), value=255),
    }
    expected = model.loss(model.network(padded["image"]), padded)
    assert {name: value.item() for name, value in seen.items()} == {k: v.item() for k, v in expected.items()}
    assert model.pad(torch.zeros(1, 3, 65, 97)).shape[-2:] == (65, 97)


@pytest.mark.parametrize("model", [DeepLabV2, DeepLabV2VGG])
def test_a_checkpoint_rebuilds_the_model(model, tmp_path):
    trained = tiny(model, align_corners=False)
    checkpoint = {"state_dict": trained.state_dict()}
    trained.on_save_checkpoint(checkpoint)
    path = str(tmp_path / "best.ckpt")
    torch.save(checkpoint, path)
    rebuilt = seglight.load(path)
    image = torch.randint(0, 256, (2, 3, 41, 57), dtype=torch.uint8)
    with torch.inference_mode():
        assert type(rebuilt) is model and torch.equal(rebuilt(image), trained(image))
    assert seglight.load(path, test_size=100, loss_weights={"out": 1.0}).test_size == 100
    for change in [{"rates": [1, 2, 3, 4]}] if model is DeepLabV2 else [{"scales": [1.0]}, {"align_corners": True}]:
        with pytest.raises(ValueError, match=next(iter(change))):
            seglight.load(path, **change)
    again = tiny(model, init_from=path, scales=[1.0])
    assert all(torch.equal(w, trained.network.state_dict()[name]) for name, w in again.network.state_dict().items()
               if "backbone" in name)  # fmt: skip
