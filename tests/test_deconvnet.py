"""DeconvNet against the release: names, shapes, counts, switches, weight files, statistics, regions, ensemble."""

from __future__ import annotations

import logging
import types

import cv2
import numpy as np
import pytest
import torch
from layer_table import layer_table, stored
from pytorch_lightning import Trainer
from test_boxes import BOXES, MASK, NAMES, Scene, Scenes
from torch import nn
from torch.nn import functional as F

import seglight
from seglight.models import deconvnet, proposals
from seglight.models.deconvnet import (
    DeconvNet,
    DeconvNetNetwork,
    norm_name,
    precise_batch_norm,
    vgg16_bn_to_deconvnet,
)
from seglight.models.fcn import FCN8s
from seglight.models.instance import InstanceModel
from seglight.models.semantic import SemanticModel

STAGES = ((1, 2), (2, 2), (3, 3), (4, 3), (5, 3))
CONVS = [f"conv{stage}_{i}" for stage, count in STAGES for i in range(1, count + 1)]
DECONVS = [f"deconv{stage}_{i}" for stage, count in STAGES[::-1] for i in range(1, count + 1)]
LAYERS = [*CONVS, "fc6", "fc7", "fc6-deconv", *DECONVS]
# Of the release's script that makes batch norm testable.
NORMS = [
    "bn1_1", "bn1_2", "bn2_1", "bn2_2", "bn3_1", "bn3_2", "bn3_3", "bn4_1", "bn4_2", "bn4_3", "bn5_1", "bn5_2", "bn5_3",
    "bnfc6", "bnfc7", "fc6-deconv-bn", "debn5_1", "debn5_2", "debn5_3", "debn4_1", "debn4_2", "debn4_3", "debn3_1",
    "debn3_2", "debn3_3", "debn2_1", "debn2_2", "debn1_1", "debn1_2",
]  # fmt: skip
OPTIONS = {"num_classes": 3, "width": 2, "classes": list(NAMES)}


def tiny(num_classes=3, width=2):
    """A thin network in which nothing is 0, 1 or constant."""
    torch.manual_seed(0)
    network = DeconvNetNetwork(num_classes, width)
    for layer in network.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5)
        if isinstance(layer, nn.BatchNorm2d):
            for of in (layer.running_mean, layer.bias):
                nn.init.normal_(of, std=0.1)
            for of in (layer.running_var, layer.weight):
                nn.init.uniform_(of, 0.5, 1.5)
    nn.init.normal_(getattr(network, "seg-score-voc").weight)
    return network.eval()


def model(**options):
    """A model with that network, in eval mode."""
    made = DeconvNet(**{**OPTIONS, **options})
    made.network.load_state_dict(tiny().state_dict())
    return made.eval()


def save(of, path):
    checkpoint = {"state_dict": of.state_dict()}
    of.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


def picture(height=230, width=260, seed=0):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- the network


@pytest.mark.fidelity
def test_parameter_counts():
    with torch.device("meta"):
        counts = {name: p.numel() for name, p in DeconvNet(num_classes=21).network.named_parameters()}
    first, score = NORMS.index("fc6-deconv-bn"), sum(n for name, n in counts.items() if name.startswith("seg-score"))
    decoder = (*LAYERS[first:], *NORMS[first:])
    decoder = sum(n for name, n in counts.items() if name.rpartition(".")[0] in decoder)
    assert sum(counts.values()) == 251_805_653
    assert (sum(counts.values()) - decoder - score, decoder, score) == (134_285_376, 117_518_912, 1_365)


@pytest.mark.fidelity
def test_layer_table():
    with torch.device("meta"):
        assert layer_table(DeconvNetNetwork(21)) == stored("deconvnet")


@pytest.mark.fidelity
def test_layers_have_the_names_of_the_release_in_its_order():
    network = tiny()
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    assert [n for n, layer in network.named_children() if isinstance(layer, kinds)] == [*LAYERS, "seg-score-voc"]
    assert [n for n, layer in network.named_children() if isinstance(layer, nn.BatchNorm2d)] == NORMS
    assert [norm_name(name) for name in LAYERS] == NORMS


@pytest.mark.fidelity
def test_sizes_inside():
    sizes = []
    with torch.device("meta"):
        network = DeconvNetNetwork(2, 1)
        for name in network.path:
            getattr(network, name).register_forward_hook(
                lambda m, i, out: sizes.append((out[0] if isinstance(out, tuple) else out).shape[-1])
            )
        assert network(torch.empty(2, 3, 224, 224))["out"].shape == (2, 2, 224, 224)
    down = [224, 224, 112, 112, 112, 56, 56, 56, 56, 28, 28, 28, 28, 14, 14, 14, 14, 7]
    up = [14, 14, 14, 14, 28, 28, 28, 28, 56, 56, 56, 56, 112, 112, 112, 224, 224, 224]
    assert sizes == [*down, 1, 1, 7, *up]


def literal(network, image):
    """The forward pass in other words: pools by argmax over windows, unpooling by a loop, deconvolution by flipping."""
    weights = {name: value.double() for name, value in network.state_dict().items()}

    def unit(x, name, padding, flipped):
        weight = weights[f"{name}.weight"]
        if flipped:
            weight, padding = weight.transpose(0, 1).flip(-1, -2), weight.shape[-1] - 1 - padding
        x = F.conv2d(x, weight, weights[f"{name}.bias"], padding=padding)
        norm = NORMS[LAYERS.index(name)]
        of = {
            kind: weights[f"{norm}.{kind}"][:, None, None] for kind in ("weight", "bias", "running_mean", "running_var")
        }
        return ((x - of["running_mean"]) / (of["running_var"] + 1e-5).sqrt() * of["weight"] + of["bias"]).clamp_min(0)

    x, stack = image.double(), []
    for stage, count in STAGES:
        for i in range(1, count + 1):
            x = unit(x, f"conv{stage}_{i}", 1, False)
        height, width = x.shape[-2:]
        windows = F.pad(x, (0, width % 2, 0, height % 2), value=-1).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        best = windows.argmax(-1)
        stack.append((best, height, width))
        x = windows.gather(-1, best[..., None])[..., 0]
    x = unit(unit(unit(x, "fc6", 0, False), "fc7", 0, False), "fc6-deconv", 0, True)
    for stage, count in STAGES[::-1]:
        best, height, width = stack.pop()
        wide = x.new_zeros(*x.shape[:2], x.shape[2] * 2, x.shape[3] * 2)
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            wide[..., dy::2, dx::2] = x * (best == 2 * dy + dx)
        x = wide[..., :height, :width]
        for i in range(1, count + 1):
            x = unit(x, f"deconv{stage}_{i}", 1, True)
    return F.conv2d(x, weights["seg-score-voc.weight"], weights["seg-score-voc.bias"])


@pytest.mark.fidelity
@pytest.mark.parametrize("size", [(224, 224), (193, 259)])
def test_forward_equals_the_definition(size):
    network, image = tiny(), torch.randn(2, 3, *size)
    with torch.inference_mode():
        ours, theirs = network(image)["out"], literal(network, image)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)


@pytest.mark.fidelity
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_unpooling_puts_maxima_back_and_zeros_elsewhere(size):
    network, x = tiny(), torch.rand(2, 3, *size) + 0.1
    pooled, indices = network.pool1(x)
    back = network.unpool1(pooled, indices, output_size=size)
    assert back.shape == x.shape
    for top in range(0, size[0], 2):
        for left in range(0, size[1], 2):
            window = (..., slice(top, top + 2), slice(left, left + 2))
            largest = x[window].amax((-1, -2), keepdim=True)
            assert torch.equal(back[window], torch.where(x[window] == largest, x[window], 0.0))


@pytest.mark.parametrize("size", [(224, 224), (193, 193), (250, 333), (500, 375)])
def test_output_has_the_size_of_the_input(size):
    with torch.device("meta"):
        assert DeconvNetNetwork(21, 1)(torch.empty(2, 3, *size))["out"].shape == (2, 21, *size)


def test_images_that_it_cannot_take_are_refused():
    with pytest.raises(ValueError, match=r"192x300 pixels: sides start at 193.*data\.crop to 224"):
        tiny()(torch.zeros(2, 3, 192, 300))
    with pytest.raises(ValueError, match=r"batch_size to 2"):
        tiny().train()(torch.zeros(1, 3, 224, 224))
    tiny().train()(torch.rand(1, 3, 224, 260))  # two columns after fc6


@pytest.mark.fidelity
def test_initialisation():
    torch.manual_seed(0)
    network = DeconvNetNetwork(5, 8)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all() and (layer.bias == 0.001).all(), name
        elif hasattr(layer, "weight"):
            decoder = "deconv" in name or name == "seg-score-voc"
            expected = 0.01 if decoder else (2 / layer.weight[0].numel()) ** 0.5
            spread = 5 * expected / (2 * layer.weight.numel()) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, abs=spread), name
            assert (layer.bias == 0).all()


def test_runs_in_half_precision_and_exports():
    network, image = tiny(), torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        full = network(image)["out"]
        with torch.autocast("cpu", torch.bfloat16):
            half = network(image)["out"]
    assert (half.argmax(1) == full.argmax(1)).float().mean() > 0.8  # switches may flip between near-equal values
    exported = torch.export.export(network, (image,)).module()
    torch.testing.assert_close(exported(image)["out"], network(image)["out"])


@pytest.mark.slow
def test_full_width_runs():
    with torch.inference_mode():
        assert DeconvNetNetwork(21).eval()(torch.rand(1, 3, 224, 224))["out"].shape == (1, 21, 224, 224)


# -------------------------------------------------------------------------------------------------- weights


def thin_vgg(batch_norm):
    from torchvision.models import VGG
    from torchvision.models.vgg import make_layers

    torch.manual_seed(1)
    thin = [2, 2, "M", 4, 4, "M", 8, 8, 8, "M", 16, 16, 16, "M", 16, 16, 16, "M"]
    vgg = VGG(make_layers(thin, batch_norm=batch_norm), num_classes=10)
    vgg.classifier[0], vgg.classifier[3] = nn.Linear(16 * 49, 128), nn.Linear(128, 128)
    vgg.classifier[6] = nn.Linear(128, 10)
    vgg.train()(torch.randn(8, 3, 224, 224))  # running statistics of its own
    return vgg.eval()


@pytest.mark.fidelity
@pytest.mark.parametrize("batch_norm", [True, False])
def test_vgg16_fills_the_encoder(batch_norm, tmp_path, caplog):
    """fc6 before its batch norm equals torchvision's first linear layer, where the file has the other norms."""
    vgg = thin_vgg(batch_norm)
    torch.save(vgg.state_dict(), tmp_path / "vgg.pth")
    with caplog.at_level(logging.INFO):
        started = DeconvNet(**OPTIONS, init_from=str(tmp_path / "vgg.pth")).eval()
    if not batch_norm:  # as if there were none
        for layer in started.network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = 1e-30  # nothing to float32, and torch 2.11 takes no 0
                nn.init.zeros_(layer.bias)
    seen = {}
    started.network.fc6.register_forward_hook(lambda m, i, out: seen.update(fc6=out.flatten(1)))
    image = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        started.network(image)
        torch.testing.assert_close(seen["fc6"], vgg.classifier[0](vgg.features(image).flatten(1)), rtol=1e-4, atol=1e-4)
    assert torch.equal(started.network.fc7.weight.flatten(1), vgg.classifier[3].weight)
    taken, fresh = caplog.messages[-1].split("As initialised:")
    assert "fc7" in taken and ("bn5_3" in taken) == batch_norm
    assert "bnfc6" in fresh and "deconv1_1" in fresh and "seg-score-voc" in fresh


def test_pretrained_takes_the_torchvision_file(monkeypatch):
    from torchvision.models import VGG16_BN_Weights, vgg16_bn

    with torch.device("meta"):
        shapes = {name: w.shape for name, w in vgg16_bn(init_weights=False).state_dict().items()}
        own = {name: w.shape for name, w in DeconvNetNetwork(21).state_dict().items()}
    weights = {name: torch.empty(()).expand(shape) for name, shape in shapes.items()}  # no memory behind them
    taken = {}
    monkeypatch.setattr(VGG16_BN_Weights, "get_state_dict", lambda self, **_: weights)
    monkeypatch.setattr(deconvnet, "hand_on", lambda network, weights, source, name: taken.update(weights))
    monkeypatch.setattr(deconvnet, "DeconvNetNetwork", lambda *args: nn.Identity())
    DeconvNet(num_classes=21, pretrained=True)
    assert len(taken) == 13 * 6 + 4
    assert all(own[name] == weight.shape for name, weight in taken.items())
    with pytest.raises(ValueError, match='preprocessing is "caffe"'):
        DeconvNet(num_classes=21, pretrained=True, preprocessing="caffe")
    with pytest.raises(ValueError, match="width is 8"):
        DeconvNet(num_classes=21, pretrained=True, width=8)
    with pytest.raises(ValueError, match="choose one"):
        DeconvNet(num_classes=21, pretrained=True, init_from="x.ckpt")


def test_other_vggs_are_refused():
    from torchvision.models import vgg16, vgg19_bn

    with torch.device("meta"):
        for build in (vgg16, vgg19_bn):
            with pytest.raises(ValueError, match=r"torchvision's vgg16_bn: features\.\d+\.\w+"):
                vgg16_bn_to_deconvnet(build(init_weights=False).state_dict())


@pytest.mark.fidelity
def test_a_converted_release_loads_with_statistics_folded_into_scale_and_shift(tmp_path):
    trained = tiny()
    folded = {
        name: w for name, w in trained.state_dict().items() if "running" not in name and "num_batches" not in name
    }
    for norm in NORMS:
        layer = getattr(trained, norm)
        gain = layer.weight / (layer.running_var + layer.eps).sqrt()
        folded |= {f"{norm}.weight": gain.detach(), f"{norm}.bias": (layer.bias - layer.running_mean * gain).detach()}
    torch.save(folded, tmp_path / "caffe.pth")
    started = DeconvNet(**OPTIONS, init_from=str(tmp_path / "caffe.pth"), preprocessing="caffe").eval()
    image = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(started.network(image)["out"], trained(image)["out"], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"BGR.*Set model\.preprocessing to caffe"):
        DeconvNet(**OPTIONS, init_from=str(tmp_path / "caffe.pth"))
    del folded["deconv3_2.bias"]
    torch.save(folded, tmp_path / "caffe.pth")
    with pytest.raises(ValueError, match="lacks deconv3_2"):
        DeconvNet(**OPTIONS, init_from=str(tmp_path / "caffe.pth"), preprocessing="caffe")


@pytest.mark.fidelity
def test_stage_two_starts_from_stage_one(tmp_path):
    first = model()
    second = DeconvNet(**OPTIONS, init_from=save(first, tmp_path / "stage1.ckpt"))
    for name, weight in first.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], weight), name


def test_checkpoint_rebuilds_the_model(tmp_path):
    trained = model(test_boxes="image", preprocessing="caffe")
    rebuilt = seglight.load(save(trained, tmp_path / "best.ckpt"))
    image = picture()[None]
    with torch.inference_mode():
        assert torch.equal(rebuilt(image), trained(image))
        assert not torch.equal(seglight.load(tmp_path / "best.ckpt", test_boxes="grid")(image), trained(image))
    with pytest.raises(ValueError, match="width=2, but this model has width=1"):
        seglight.load(tmp_path / "best.ckpt", width=1)


# ------------------------------------------------------------------------------------------------- training


def quiet(**options):
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                   enable_model_summary=False, num_sanity_val_steps=0, **options)  # fmt: skip


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    trained = DeconvNet(num_classes=3, width=4)
    batch = {"image": torch.stack([picture(224, 224, seed) for seed in range(4)]), "mask": torch.ones(4, 224, 224)}
    batch["mask"][:, :100] = 2
    trained.loss(trained.network(trained.normalize(batch["image"])), batch)["loss"].backward()
    for name, parameter in trained.network.named_parameters():
        assert parameter.grad is not None, name
        if name.removesuffix(".bias") not in LAYERS:  # batch norm takes away what a bias before it adds
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.fidelity
def test_precise_statistics_are_the_means_over_batches():
    trained = model().train()
    batches = [{"image": torch.stack([picture(224, 224, 10 * k + i) for i in range(2)])} for k in range(3)]
    seen = {norm: [] for norm in NORMS}
    hooks = [
        getattr(trained.network, norm).register_forward_pre_hook(lambda m, i, to=seen[norm]: to.append(i[0].double()))
        for norm in NORMS
    ]
    before = {name: p.clone() for name, p in trained.network.named_parameters()}
    precise_batch_norm(trained, iter(batches))
    for hook in hooks:
        hook.remove()
    for norm in NORMS:
        layer = getattr(trained.network, norm)
        assert len(seen[norm]) == 3 and layer.momentum == 0.1 and layer.training
        mean = torch.stack([x.mean((0, 2, 3)) for x in seen[norm]]).mean(0)
        var = torch.stack([x.var((0, 2, 3)) for x in seen[norm]]).mean(0)  # unbiased
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in trained.network.named_parameters())
    with pytest.raises(ValueError, match="no batch"):
        precise_batch_norm(trained, [])


class Shown(Scenes):
    """Two crops a batch, of 224 pixels, and one small validation image."""

    def __init__(self, **options):
        super().__init__(crop=224, batch_size=2, workers=0, **options)


def test_fit_with_precise_statistics_differs_in_the_statistics_only():
    results = []
    for precise in (0, 2):
        torch.manual_seed(0)
        trained = DeconvNet(**OPTIONS, test_boxes="image", precise_bn=precise, momentum=0.0)
        data = Shown(crop_around="objects")
        quiet(max_steps=3, val_check_interval=2).fit(trained, data)
        results.append(trained)
        if precise:  # after the last validation, at step 2, one more step was trained
            assert int(trained.network.bn1_1.num_batches_tracked) == 2 + 1
    plain, precise = results
    for (name, ours), (_, theirs) in zip(
        plain.network.named_parameters(), precise.network.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert not torch.equal(plain.network.bn5_3.running_var, precise.network.bn5_3.running_var)
    with pytest.raises(ValueError, match="from a datamodule of seglight"):
        quiet(max_steps=1, val_check_interval=1).fit(precise, data.train_dataloader(), data.val_dataloader())
    with pytest.raises(ValueError, match='that batch_norm "eval" keeps'):
        DeconvNet(**OPTIONS, precise_bn=2, batch_norm="eval")


# ------------------------------------------------------------------------------------------------- regions


@pytest.mark.fidelity
def test_regions_are_fused_by_the_largest_score_in_any_order():
    network, image = tiny(), torch.randn(3, 210, 250)
    black = torch.tensor([-2.0, 1.0, 0.5])[:, None, None]
    boxes = [(-30, 20, 130, 140), (60, 50, 251, 216), (100, -10, 210, 100), (0, 0, 60, 60)]

    def net(x):
        return network(x)["out"]

    with torch.inference_mode():
        ours = proposals.fuse(net, image, boxes, 224, black)
        pad = 60
        wide = black.expand(3, 210 + 2 * pad, 250 + 2 * pad).clone()
        wide[:, pad:-pad, pad:-pad] = image
        canvas = torch.zeros(3, 210 + 2 * pad, 250 + 2 * pad)
        for x1, y1, x2, y2 in boxes:
            part = (slice(None), slice(y1 + pad, y2 + pad), slice(x1 + pad, x2 + pad))
            scores = net(F.interpolate(wide[part][None], (224, 224), mode="bilinear"))
            scores = F.interpolate(scores, (y2 - y1, x2 - x1), mode="bilinear")[0]
            canvas[part] = torch.maximum(canvas[part], scores)
        torch.testing.assert_close(ours, canvas[:, pad:-pad, pad:-pad], rtol=0, atol=1e-4)
        shuffled = proposals.fuse(net, image, [boxes[i] for i in (2, 0, 3, 1)], 224, black)
    torch.testing.assert_close(ours, shuffled, rtol=0, atol=1e-5)
    assert (ours >= 0).all() and (ours[:, 150:, :50] == 0).all() and ours.max() > 0.1
    free = proposals.fuse(net, image, boxes, 224, black, floor=False)
    assert free.min() < -0.1 and (free[:, 150:, :50] == 0).all()
    torch.testing.assert_close(free.clamp_min(0), ours, rtol=0, atol=1e-5)


def test_windows_of_the_image_get_no_context():
    for name, provider in (("grid", proposals.grid), ("image", proposals.whole)):
        regions = DeconvNet(**OPTIONS, test_boxes=name)._regions(picture().float())
        assert regions == [tuple(box) for box in provider(picture()).tolist() if min(box[2] - box[0], 230) >= 112]


def test_many_regions_go_through_in_batches(monkeypatch):
    boxes = [(x, 10, x + 90, 150) for x in range(0, 100, 8)]
    sizes = []

    def net(x):
        sizes.append(len(x))
        return x

    image = torch.randn(3, 160, 200)
    whole = proposals.fuse(net, image, boxes, 64, torch.zeros(3, 1, 1))
    assert sizes == [10, 3]
    monkeypatch.setattr(proposals, "BATCH", 1)
    assert torch.equal(whole, proposals.fuse(net, image, boxes, 64, torch.zeros(3, 1, 1)))


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (48, 48)])
def test_the_grid_is_the_image_and_three_sizes_of_windows(size):
    boxes = proposals.grid(torch.empty(3, *size))
    height, width = size
    assert boxes[0].tolist() == [0, 0, width, height] and len(boxes) <= 50
    sides = [round(share * min(size)) for share in (1, 2 / 3, 1 / 2)]
    for side in sides:
        cover = np.zeros(size, int)
        for x1, y1, x2, y2 in boxes[1:]:
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            cover[y1:y2, x1:x2] += (x2 - x1, y2 - y1) == (side, side)
        assert cover.min() >= 1
    assert {int(x2 - x1) for x1, _, x2, _ in boxes[1:]} == set(sides)


@pytest.mark.fidelity
def test_which_boxes_are_segmented():
    boxes = [[10, 10, 110, 90], [0, 0, 40, 200], [300, 0, 500, 200], [150, 0, 250, 100], [-200, 0, -30, 100]]
    # With a fifth of context: 120x96, 48 wide, outside, 120x120, outside.
    assert proposals.choose(boxes, (200, 260), 1.2, 96, 50) == [(0, 2, 120, 98), (140, -10, 260, 110)]
    assert proposals.choose(boxes, (200, 260), 1.2, 112, 50) == [(140, -10, 260, 110)]
    assert proposals.choose(boxes, (200, 260), 1.0, 30, 2) == [(10, 10, 110, 90), (0, 0, 40, 200)]
    for none in (boxes[2:3], []):
        assert proposals.choose(none, (200, 260), 1.2, 112, 50) == [(0, 0, 260, 200)]


@pytest.mark.parametrize("preprocessing", ["torch", "caffe", "half"])
def test_scores_of_an_image_are_those_of_its_regions(preprocessing):
    """From pixels: what a provider sees is the picture itself, and what lies outside is black."""
    trained, image = model(preprocessing=preprocessing, test_box_side=1), picture()
    given = []

    def provider(seen):
        given.append(seen)
        return [[200, 100, 300, 250]]

    trained.boxes = provider
    with torch.inference_mode():
        ours = trained(image[None])[0]
        assert torch.equal(given[0], image)
        x1, y1, x2, y2 = 190, 85, 310, 265  # with context
        crop = torch.zeros(1, 3, y2 - y1, x2 - x1)
        crop[..., : 230 - y1, : 260 - x1] = image[:, y1:, x1:]
        scores = trained.network(F.interpolate(trained.normalize(crop), (224, 224), mode="bilinear"))["out"]
        scores = F.interpolate(scores, (y2 - y1, x2 - x1), mode="bilinear")[..., : 230 - y1, : 260 - x1]
    # A switch between nearly equal values may flip, and with it a handful of pixels.
    assert ((ours[:, y1:, x1:] - scores[0].clamp_min(0)).abs() < 1e-4).float().mean() > 0.99
    assert (ours[:, :y1] == 0).all() and (ours[:, :, :x1] == 0).all() and ours.max() > 0.1


def test_truth_boxes_are_those_of_the_labels(monkeypatch):
    trained = model(test_boxes="truth", test_box_side=1)
    asked = []
    monkeypatch.setattr(proposals, "fuse", lambda net, image, boxes, *_: asked.append(boxes) or image)
    image, mask = (torch.from_numpy(array) for array in Scene().read(0))
    image = image.permute(2, 0, 1)
    flat = torch.full_like(mask, 255)
    batch = {"image": [image, image], "mask": [mask, flat], "image_id": ["a", "b"]}
    quiet().test(trained, torch.utils.data.DataLoader([batch], batch_size=None), verbose=False)
    assert asked[0] == proposals.choose(BOXES, MASK.shape, 1.2, 1, 50) and len(asked[0]) == 3
    assert asked[1] == [(0, 0, 120, 100)]
    assert trained.scores.table.sum() == MASK.size - (MASK == 255).sum()
    with pytest.raises(ValueError, match="which needs labels"):
        trained(image[None])
    with pytest.raises(ValueError, match='"truth" fits the image as it is'):
        DeconvNet(**OPTIONS, test_boxes="truth", test_flip=True)


def test_validation_and_prediction_go_through():
    trained = model(test_boxes="truth", test_box_side=20)
    scores = quiet().validate(trained, Shown(), verbose=False)[0]
    assert "val/loss" in scores
    trained = model(test_boxes="grid", test_box_limit=3)
    assert trained.predict(picture(60, 70).permute(1, 2, 0).numpy()).labels.shape == (60, 70)


def test_wrong_test_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match='"grid", "image", "truth", "selective_search" or the path'):
        DeconvNet(**OPTIONS, test_boxes="edge_boxes")
    with pytest.raises(ValueError, match="test_box_limit is 0"):
        DeconvNet(**OPTIONS, test_box_limit=0)
    with pytest.raises(ValueError, match="ensemble is 'sum'"):
        DeconvNet(**OPTIONS, ensemble="sum")
    with pytest.raises(ValueError, match="DeconvNet, which finds no boxes"):
        DeconvNet(**OPTIONS, test_boxes=save(model(), tmp_path / "other.ckpt"))


def test_selective_search_without_its_package_says_which(monkeypatch):
    monkeypatch.delattr(cv2, "ximgproc", raising=False)
    with pytest.raises(ValueError, match=r"pip install opencv-contrib-python-headless"):
        DeconvNet(**OPTIONS, test_boxes="selective_search")


def test_selective_search_is_given_bgr_and_gives_corners(monkeypatch):
    called = {}

    class Search:
        def setBaseImage(self, image):
            called["image"] = image

        def switchToSelectiveSearchFast(self):
            called["fast"] = True

        def process(self):
            return np.array([[3, 4, 10, 20], [0, 0, 5, 6]], np.int32)

    segmentation = types.SimpleNamespace(createSelectiveSearchSegmentation=Search)
    monkeypatch.setattr(cv2, "ximgproc", types.SimpleNamespace(segmentation=segmentation), raising=False)
    provider, image = DeconvNet(**OPTIONS, test_boxes="selective_search").boxes, picture(30, 40)
    assert provider(image).tolist() == [[3, 4, 13, 24], [0, 0, 5, 6]]
    assert called["fast"] and np.array_equal(called["image"], image.permute(1, 2, 0).numpy()[..., ::-1])


@pytest.mark.skipif(not hasattr(cv2, "ximgproc"), reason="OpenCV without its contributed modules")
def test_selective_search_finds_an_object():
    image = torch.full((3, 120, 160), 30, dtype=torch.uint8)
    image[0, 40:80, 50:110] = 220
    boxes = proposals.selective_search()(image)
    assert min(np.abs(boxes - [50, 40, 110, 80]).max(1)) <= 3


class Finder(InstanceModel):
    """Finds the same box everywhere."""

    def __init__(self, num_classes: int, box: list[int] | None = None, **kwargs):
        super().__init__(network=nn.Identity(), num_classes=num_classes, **kwargs)
        self.box = box

    def forward(self, images, targets=None):
        return [{"boxes": torch.tensor([self.box], dtype=torch.float32)} for _ in images]


def test_a_detector_of_ours_provides_boxes(tmp_path):
    path = save(Finder(2, [10, 20, 110, 120]), tmp_path / "finder.ckpt")
    trained = DeconvNet(**OPTIONS, test_boxes=path)
    assert trained._regions(picture().float()) == [(0, 10, 120, 130)]
    assert not any("box" in name for name in trained.state_dict())


# ------------------------------------------------------------------------------------------------ ensemble


@pytest.mark.fidelity
def test_edeconvnet_is_a_product_or_a_mean(tmp_path):
    torch.manual_seed(0)
    fcn = FCN8s(num_classes=3, width=2, preprocessing="caffe").eval()
    for name, parameter in fcn.network.named_parameters():
        if name.startswith("score"):
            nn.init.normal_(parameter)
    path, image = save(fcn, tmp_path / "fcn8s.ckpt"), picture()[None]
    alone = model(test_boxes="image")
    product, mean = (model(test_boxes="image", ensemble_with=path, ensemble=how) for how in ("product", "mean"))
    with torch.inference_mode():
        ours, theirs = alone(image), fcn(image)
        assert theirs.min() < 0 < theirs.max()
        torch.testing.assert_close(product(image), ours * theirs.clamp_min(0), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mean(image).exp(), (ours.softmax(1) + theirs.softmax(1)) / 2, rtol=1e-3, atol=1e-4)
        negative = model(test_boxes="image", test_floor=False, ensemble_with=path)
        torch.testing.assert_close(negative(image), product(image), rtol=1e-3, atol=1e-3)
    assert product.state_dict().keys() == alone.state_dict().keys()
    assert not any("partner" in name for name, _ in product.named_parameters())
    rebuilt = seglight.load(save(product, tmp_path / "e.ckpt"), ensemble_with=None)
    with torch.inference_mode():
        assert torch.equal(rebuilt(image), ours)
    with pytest.raises(ValueError, match=r"a FCN8s of 3 classes; ensemble_with needs a semantic model of 4"):
        DeconvNet(num_classes=4, width=2, ensemble_with=path)
    with pytest.raises(ValueError, match="a Finder of 3 classes"):
        DeconvNet(**OPTIONS, ensemble_with=save(Finder(3, [0, 0, 1, 1]), tmp_path / "finder.ckpt"))


def test_precise_statistics_leave_the_modes_to_the_model():
    class Net(nn.Sequential):
        def forward(self, x):
            return {"out": super().forward(x)}

    model = SemanticModel(Net(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)), num_classes=2, batch_norm="eval").train()
    precise_batch_norm(model, [{"image": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}])
    assert model.network.training and not model.network[1].training


def test_small_regions_are_skipped_by_default():
    """Of a side below 112 pixels with their context, as in the release."""
    model = DeconvNet(num_classes=2, width=2)
    model.boxes = lambda image: [[0, 0, 300, 300], [100, 100, 193, 193], [100, 100, 194, 194]]  # 111.6, 112.8 with it
    assert len(model._regions(torch.zeros(3, 400, 400))) == 2


@pytest.mark.parametrize(
    ("fn", "sanity", "taken"), [("fit", False, True), ("fit", True, False), ("validate", False, False)]
)
def test_precise_statistics_are_for_validations_of_a_fit(fn, sanity, taken):
    model = DeconvNet(num_classes=2, width=2, precise_bn=3)
    state = types.SimpleNamespace(fn=fn)
    model._trainer = types.SimpleNamespace(state=state, sanity_checking=sanity, datamodule=None)
    if taken:  # it asks for the datamodule, of which there is none
        with pytest.raises(ValueError, match="precise_bn"):
            model.on_validation_start()
    else:
        model.on_validation_start()


def test_running_statistics_of_a_converted_file_are_taken(tmp_path):
    options = {"num_classes": 3, "width": 2, "preprocessing": "caffe"}
    content = DeconvNet(**options).network.state_dict()
    for name in content:
        if name.endswith(("running_mean", "running_var")):
            content[name] = torch.rand_like(content[name]) + 2
    torch.save(content, tmp_path / "caffe.pth")
    ours = DeconvNet(**options, init_from=str(tmp_path / "caffe.pth")).network.state_dict()
    assert all(torch.equal(ours[name], content[name]) for name in content)
