"""PSPNet against the paper and the authors' PyTorch release: counts, layers, pooling grids, sizes, test protocol."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layer_table import layer_table, stored
from torch import nn

import seglight
from seglight.losses import cross_entropy
from seglight.models.blocks import global_mean
from seglight.models.pspnet import PSPNet, PSPNetNetwork, PyramidPooling


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    return PSPNet(**{"num_classes": 3, "backbone": "resnet18", "width": 16, **options})


def lively(network):
    """timm starts the last batch norm of a block at zero, which would hide what lies before it."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.running_mean, 0, 0.1)
            nn.init.normal_(layer.bias, 0, 0.1)
    return network


def batch_of(height=33, width=41):
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator),
        "mask": torch.randint(0, 3, (2, height, width), dtype=torch.uint8, generator=generator),
        "image_id": ["a", "b"],
    }


# ------------------------------------------------------------------------------------------------- the network


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("backbone", "num_classes", "bare", "with_aux"),
    [
        ("resnet50s", 21, 46_716_373, 49_081_578),
        ("resnet101s", 21, 65_708_501, 68_073_706),
        ("resnet101s", 19, 65_707_475, 68_072_166),
        ("resnet152s", 21, 81_352_149, 83_717_354),
        ("resnet269s", 21, 123_232_725, 125_597_930),
        ("resnet50", 21, 46_592_597, 48_957_802),
        ("resnet101", 21, 65_584_725, 67_949_930),
    ],
)
def test_parameter_counts(backbone, num_classes, bare, with_aux):
    with torch.device("meta"):
        network = PSPNetNetwork(num_classes, backbone)
    assert sum(p.numel() for p in network.parameters()) == with_aux
    assert sum(p.numel() for name, p in network.named_parameters() if not name.startswith("aux.")) == bare


@pytest.mark.fidelity
def test_the_default_is_the_papers_headline_network():
    with torch.device("meta"):
        model = PSPNet(num_classes=21)
        assert sum(p.numel() for p in model.network.parameters()) == 68_073_706
        assert layer_table(model.network) == stored("pspnet")
        for crop, side in ((473, 60), (713, 90)):
            outputs = model.network(torch.empty(2, 3, crop, crop))
            assert {name: tuple(scores.shape) for name, scores in outputs.items()} == {
                "out": (2, 21, side, side),
                "aux": (2, 21, side, side),
            }
    assert model.loss_weights == {"out": 1.0, "aux": 0.4} and model.align_corners
    assert model.network.backbone.strides == [2, 4, 8, 8, 8]


@pytest.mark.fidelity
def test_dilation_is_uniform_and_the_rule_of_a_checkpoint_is_checked():
    model = tiny()
    dilations = [
        [block.conv2.dilation[0] for block in getattr(model.network.backbone.body, f"layer{i}")] for i in (3, 4)
    ]
    assert dilations == [[2, 2], [4, 4]]
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="dilation='uniform', but this model has dilation='lagged-first'"):
        tiny(dilation="lagged-first").on_load_checkpoint(checkpoint)
    tiny(loss_weights={"out": 1.0}).on_load_checkpoint(checkpoint)


@pytest.mark.fidelity
def test_bins_are_means_of_the_windows_that_the_caffe_release_pools():
    """Kernel and stride 60, 30, 20, 10 on the 60x60 map of a crop of 473; widened with corners on corners."""
    torch.manual_seed(0)
    pyramid = lively(PyramidPooling(8)).eval()
    x = torch.randn(2, 8, 60, 60)
    across = torch.linspace(-1, 1, 60)
    points = torch.stack(torch.meshgrid(across, across, indexing="xy"), -1).expand(2, -1, -1, -1)
    expected = [x]
    with torch.no_grad():
        for side, (_, conv, norm, _) in zip((60, 30, 20, 10), pyramid.grids, strict=True):
            cells = F.avg_pool2d(x, side, side)
            cells = torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], cells)
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            cells = (
                (cells - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
            ).relu()
            expected.append(F.grid_sample(cells, points, align_corners=True, padding_mode="border"))
        torch.testing.assert_close(pyramid(x), torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
    assert pyramid.out_channels == 16 and [m.shape[1] for m in expected] == [8, 2, 2, 2, 2]


def test_the_mean_of_an_image_has_a_gradient_in_its_memory_format():
    x = torch.randn(2, 3, 4, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.to(memory_format=layout).requires_grad_()
        mean = global_mean(given)
        torch.testing.assert_close(mean, x.mean((2, 3), keepdim=True))
        (grad,) = torch.autograd.grad(mean.sum(), given)
        assert grad.stride() == given.stride()


@pytest.mark.fidelity
def test_forward_equals_a_resnet_of_torchvision_with_the_releases_changes():
    from torchvision.models.resnet import Bottleneck, ResNet

    torch.manual_seed(0)
    network = lively(PSPNetNetwork(4, "resnet26", width=16)).eval()
    trunk = ResNet(Bottleneck, [2, 2, 2, 2]).eval()
    weights = {k.removeprefix("body."): v for k, v in network.backbone.state_dict().items()}
    assert set(trunk.load_state_dict(weights, strict=False).missing_keys) == {"fc.weight", "fc.bias"}
    for layer, dilation in ((trunk.layer3, 2), (trunk.layer4, 4)):
        for name, conv in layer.named_modules():
            if name.endswith("conv2"):
                conv.stride, conv.padding, conv.dilation = (1, 1), (dilation, dilation), (dilation, dilation)
            elif name.endswith("downsample.0"):
                conv.stride = (1, 1)

    def layers(prefix, x, *kinds):
        state = {k.removeprefix(f"{prefix}."): v for k, v in network.state_dict().items() if k.startswith(f"{prefix}.")}
        for i, kind in enumerate(kinds):
            w = {k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{i}.")}
            if kind == "conv":
                x = F.conv2d(x, w["weight"], w.get("bias"), padding=w["weight"].shape[-1] // 2)
            elif kind == "norm":
                x = F.batch_norm(x, w["running_mean"], w["running_var"], w["weight"], w["bias"]).relu()
        return x

    image = torch.randn(2, 3, 65, 81)
    with torch.no_grad():
        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(image))))
        third = trunk.layer3(trunk.layer2(trunk.layer1(x)))
        x = trunk.layer4(third)
        assert x.shape == (2, 2048, 9, 11)
        pooled = [layers(f"pyramid.grids.{i}", F.adaptive_avg_pool2d(x, b), "-", "conv", "norm")
                  for i, b in enumerate((1, 2, 3, 6))]  # fmt: skip
        wide = [F.interpolate(cells, (9, 11), mode="bilinear", align_corners=True) for cells in pooled]
        expected = {
            "out": layers("head", torch.cat([x, *wide], 1), "conv", "norm", "-", "-", "conv"),
            "aux": layers("aux", third, "conv", "norm", "-", "-", "conv"),
        }
        outputs = network(image)
    assert list(outputs) == ["out", "aux"]
    for name, scores in outputs.items():
        assert (scores - expected[name]).abs().max() < 1e-4 * expected[name].abs().max()


@pytest.mark.fidelity
@pytest.mark.parametrize("size", [(64, 80), (60, 81), (33, 34), (2, 9)])
def test_sizes_other_than_8k_plus_1_are_padded_and_cut(size):
    network = lively(tiny().network).eval()
    image = torch.randn(2, 3, *size)
    legal = [-(-(side - 1) // 8) * 8 + 1 for side in size]
    canvas = torch.zeros(2, 3, *legal)
    canvas[..., : size[0], : size[1]] = image
    with torch.no_grad():
        outputs, padded = network(image), network(canvas)
    for name, scores in outputs.items():
        assert padded[name].shape[-2:] == tuple((side - 1) // 8 + 1 for side in legal)
        wide = F.interpolate(padded[name], legal, mode="bilinear", align_corners=True)
        torch.testing.assert_close(scores, wide[..., : size[0], : size[1]])
        # Every eighth pixel is a score itself, wherever the image ends: nothing is stretched.
        torch.testing.assert_close(scores[..., ::8, ::8], padded[name][..., : -(-size[0] // 8), : -(-size[1] // 8)])


def test_scores_have_the_size_of_the_image():
    model = tiny().eval()
    for size in ((33, 41), (40, 57)):
        with torch.no_grad():
            assert model(torch.zeros(2, 3, *size, dtype=torch.uint8)).shape == (2, 3, *size)


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": "convnext_atto", "dilation": "lagged-first", "align_corners": False},
        {"backbone": "vit_tiny_patch16_224", "dilation": "lagged-first", "output_stride": 16, "align_corners": False},
        {"backbone": "resnet18", "output_stride": 16},
        {"backbone": "resnet26", "stride_in_1x1": True},
        {"bins": [1, 4]},
        {"bins": []},
    ],
)
def test_other_trunks_and_grids(options):
    model = tiny(**options)
    with torch.no_grad():
        outputs = model.network(torch.randn(2, 3, 49, 65))
        cells = model.network(torch.randn(2, 3, 48, 64))["out"].shape[-2:]
    assert set(outputs) == {"out", "aux"} and outputs["out"].shape[:2] == (2, 3)
    assert (cells == (48, 64)) is model.align_corners  # where corners need not meet, nothing is padded
    if options.get("stride_in_1x1"):
        assert model.network.backbone.body.layer2[0].conv1.stride == (2, 2)


# --------------------------------------------------------------------------------------------------- the model


@pytest.mark.fidelity
def test_the_loss_is_that_of_the_paper():
    model = tiny().eval()
    batch = batch_of()
    batch["mask"][:, :5] = 255
    with torch.no_grad():
        outputs = model.network(model.normalize(batch["image"]))
        losses = model.loss(outputs, batch)
        wide = {
            name: F.interpolate(scores, (33, 41), mode="bilinear", align_corners=True)
            for name, scores in outputs.items()
        }
    target = batch["mask"].long()
    main, aux = (F.cross_entropy(wide[name], target, ignore_index=255) for name in ("out", "aux"))
    torch.testing.assert_close(losses["loss"], main + 0.4 * aux)
    torch.testing.assert_close(losses["loss_aux"], aux)
    assert cross_entropy(outputs["out"], target) != main  # the corners matter


@pytest.mark.parametrize("weights", [{"out": 1.0}, {"out": 1.0, "aux": 0.0}, {"out": 0.5, "aux": 1.0}])
def test_an_auxiliary_head_without_weight_is_not_built(weights):
    model = tiny(loss_weights=weights, output_stride=32)
    has = bool(weights.get("aux"))
    assert any(name.startswith("aux") for name, _ in model.network.named_parameters()) is has
    outputs = model.network(torch.randn(2, 3, 33, 33))
    assert set(outputs) == ({"out", "aux"} if has else {"out"})
    assert set(model.loss_weights) == set(outputs)


def test_every_parameter_is_trained():
    from pytorch_lightning import Trainer

    model = tiny(lr=0.1, weight_decay=0.0)
    lively(model.network)
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader([batch_of()], batch_size=None))
    assert not [name for name, p in model.network.named_parameters() if torch.equal(p, before[name])]


def test_new_layers_learn_ten_times_faster():
    model = tiny(lr=0.01, head_lr=10)
    rates = {id(p): group["lr"] for group in model.parameter_groups() for p in group["params"]}
    for name, parameter in model.network.named_parameters():
        assert rates[id(parameter)] == (0.01 if name.startswith("backbone.") else 0.1), name


def test_one_image_cannot_train_the_grid_of_one_cell():
    network = tiny().network
    with pytest.raises(ValueError, match=r"grid of one cell cannot be trained on one image.*data\.batch_size"):
        network(torch.randn(1, 3, 33, 33))
    assert network.eval()(torch.randn(1, 3, 33, 33))["out"].shape == (1, 3, 5, 5)
    tiny(bins=[2, 3]).network(torch.randn(1, 3, 33, 33))
    frozen = tiny(batch_norm="eval")
    frozen.train()
    frozen.network(torch.randn(1, 3, 33, 33))


def test_checkpoint_rebuilds_the_model(tmp_path):
    model = tiny(bins=[1, 3])
    lively(model.network)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "best.ckpt")
    rebuilt = seglight.load(tmp_path / "best.ckpt", test_flip=True)
    image = batch_of()["image"]
    with torch.no_grad():
        assert torch.equal(rebuilt.network(image.float())["out"], model.eval().network(image.float())["out"])
    assert rebuilt.test_flip
    with pytest.raises(ValueError, match="bins"):
        tiny().on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_it_trains_under_autocast(precision):
    model = tiny()
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        outputs = model.network(model.normalize(batch_of(32, 40)["image"]))
        loss = model.loss(outputs, batch_of(32, 40))["loss"]
    loss.backward()
    assert outputs["out"].dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.network.parameters())


def test_export():
    network = tiny().network.eval()
    image = torch.randn(2, 3, 33, 40)
    with torch.no_grad():
        exported = torch.export.export(network, (image,)).module()(image)
        torch.testing.assert_close(exported["out"], network(image)["out"])


def test_pretrained_weights_are_asked_for_and_want_their_normalisation(monkeypatch):
    import timm

    create, asked = timm.create_model, []

    def record(name, pretrained=False, **options):
        asked.append((name, pretrained))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", record)
    tiny(pretrained=True)
    assert ("resnet18", True) in asked
    with pytest.raises(ValueError, match=r'preprocessing is "half".*resnet18 expect "torch"; set model\.preprocessing'):
        tiny(pretrained=True, preprocessing="half")
    tiny(preprocessing="half")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_weights": {"out": 1.0, "aus": 0.4}}, "to out, and to any of aux"),
        ({"loss_weights": {"aux": 0.4}}, "it gives a weight to out"),
        ({"bins": [1, 0]}, r"bins is \(1, 0\); a grid has at least one cell"),
        ({"backbone": "resnet18x"}, "nearest are resnet18"),
        ({"backbone": "convnext_atto"}, 'use "lagged-first"'),
        ({"backbone": "vit_tiny_patch16_224", "dilation": "lagged-first"}, "set 16"),
        ({"backbone": "resnet269s", "pretrained": True}, "no ImageNet weights for resnet269s"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


# ------------------------------------------------------------------------------------------- the test protocol


class _Strided(nn.Module):
    """Scores that depend on the place in the window, at stride 8."""

    def __init__(self, num_classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, num_classes, 9, stride=8, padding=4)
        self.seen = []

    def forward(self, image):
        self.seen.append(tuple(image.shape[-2:]))
        return {"out": self.conv(image) * 3}


def literal_release(net, image, crop, base, scales, flip):
    """The release's test of one image (H, W, 3), normalised, window by window with OpenCV: probabilities (K, H, W)."""
    high, wide = image.shape[:2]
    total = 0
    for scale in scales:
        size = (round(high * scale), round(wide * scale))
        if base:
            longer = round(base * scale)
            size = (longer, round(longer / high * wide)) if high > wide else (round(longer / wide * high), longer)
        scaled = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        pads = [max(crop - side, 0) for side in size]
        before = [pad // 2 for pad in pads]
        scaled = np.pad(scaled, [(b, p - b) for b, p in zip(before, pads, strict=True)] + [(0, 0)])
        step = int(np.ceil(crop * 2 / 3))
        rows, columns = (int(np.ceil((side - crop) / step)) + 1 for side in scaled.shape[:2])
        votes, count = np.zeros((*scaled.shape[:2], 3)), np.zeros(scaled.shape[:2])
        for r in range(rows):
            for c in range(columns):
                bottom, right = min(r * step + crop, scaled.shape[0]), min(c * step + crop, scaled.shape[1])
                here = (slice(bottom - crop, bottom), slice(right - crop, right))
                window = torch.from_numpy(scaled[here].copy()).permute(2, 0, 1)[None]
                looks = []
                for mirrored in (False, True)[: 1 + flip]:
                    out = net(window.flip(-1) if mirrored else window)["out"]
                    p = F.interpolate(out, (crop, crop), mode="bilinear", align_corners=True).softmax(1)[0]
                    looks.append(p.flip(-1) if mirrored else p)
                votes[here] += torch.stack(looks).mean(0).permute(1, 2, 0).numpy()
                count[here] += 1
        votes = (votes / count[..., None])[before[0] : before[0] + size[0], before[1] : before[1] + size[1]]
        total = total + cv2.resize(votes, (wide, high), interpolation=cv2.INTER_LINEAR)
    return (total / len(scales)).transpose(2, 0, 1)


@pytest.mark.fidelity
@pytest.mark.parametrize("size", [(37, 52), (70, 45), (20, 25)])
@pytest.mark.parametrize(
    ("base", "scales", "flip"),
    [(64, [0.5, 1.0, 1.75], True), (64, [1.0], False), (None, [1.0], True), (None, [0.75, 1.5], False)],
)
def test_the_release_tests_like_this(size, base, scales, flip):
    model = tiny(test_window=33, test_long_side=base, test_scales=scales, test_flip=flip).eval()
    model.network = _Strided()
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        normalised = model.normalize(image)
        ours = model.protocol(normalised).exp()[0]
        assert set(model.network.seen) == {(33, 33)}
        theirs = literal_release(model.network, normalised[0].permute(1, 2, 0).numpy(), 33, base, scales, flip)
        assert ours.shape == (3, *size)
        assert np.abs(ours.numpy() - theirs).max() < 1e-5
        labels = model.labels([image[0]])[0][0]
    best = np.sort(theirs, 0)
    clear = best[-1] - best[-2] > 1e-4
    assert (labels.numpy() == theirs.argmax(0))[clear].all() and clear.mean() > 0.9


def test_windows_and_scales_average_what_they_are_told():
    image = torch.randint(0, 256, (1, 3, 40, 51), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def seen(scales, aggregate):
        model = tiny(test_window=33, test_scales=scales, test_aggregate=aggregate).eval()
        model.network = _Strided()
        with torch.no_grad():
            return model(image)

    scores = [seen([1.0], aggregate).softmax(1) for aggregate in ("softmax", "logits", "exp")]
    assert min((a - b).abs().max() for a, b in itertools.combinations(scores, 2)) > 1e-3
    mean = (seen([0.5], "logits") + seen([1.0], "logits")) / 2
    torch.testing.assert_close(seen([0.5, 1.0], "logits"), mean)


def test_without_windows_the_whole_image_is_seen_at_every_scale():
    model = tiny(test_long_side=48, test_scales=[0.5, 1.0]).eval()
    model.network = _Strided()
    with torch.no_grad():
        model(torch.zeros(1, 3, 25, 32, dtype=torch.uint8))
    assert model.network.seen == [(19, 24), (38, 48)]


def test_dropout_takes_whole_channels():
    network = PSPNetNetwork(3, "resnet18", width=32, dropout=0.5)
    for head, channels in ((network.head, 32), (network.aux, 16)):
        (layer,) = [layer for layer in head if "Dropout" in type(layer).__name__]
        out = layer.train()(torch.ones(4, channels, 5, 5))
        assert (out == out[..., :1, :1]).all() and 0 < (out == 0).float().mean() < 1
