"""EncNet against the paper and the authors' release: the encoding layer, counts, layers, losses, test protocol."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layer_table import layer_table, stored
from torch import nn

import seglight
from seglight.models.encnet import ContextEncoding, EncNet, EncNetNetwork, Encoding, _release_size, presence

PAPER = {"out": 1.0, "se": 0.2, "se_stage3": 0.2}


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    return EncNet(**{"num_classes": 3, "backbone": "resnet18", "width": 16, **options})


def lively(network):
    """timm starts the last batch norm of a block at zero, which would hide what lies before it."""
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.running_mean, 0, 0.1)
            nn.init.normal_(layer.bias, 0, 0.1)
    return network


def batch_of(height=32, width=40):
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator),
        "mask": torch.randint(0, 3, (2, height, width), dtype=torch.uint8, generator=generator),
        "image_id": ["a", "b"],
    }


# ---------------------------------------------------------------------------------------------- the encoding layer


def literal_encoding(x, words, smoothing):
    """The definition, one pixel and one codeword at a time."""
    images = []
    for image in x.flatten(2).unbind(0):
        sums = [torch.zeros_like(word) for word in words]
        for pixel in image.unbind(1):
            residuals = [pixel - word for word in words]
            powers = [s * (r * r).sum() for s, r in zip(smoothing, residuals, strict=True)]
            top = max(p.item() for p in powers)
            weights = [(p - top).exp() for p in powers]
            sums = [e + w / sum(weights) * r for e, w, r in zip(sums, weights, residuals, strict=True)]
        images.append(torch.stack(sums))
    return torch.stack(images)


@pytest.mark.fidelity
@pytest.mark.parametrize(("size", "channels", "codewords"), [((3, 5), 4, 3), ((1, 1), 6, 1), ((6, 7), 16, 32)])
def test_encoding_equals_its_definition_and_so_do_its_gradients(size, channels, codewords):
    torch.manual_seed(0)
    layer = Encoding(channels, codewords).double()
    nn.init.normal_(layer.codewords)
    x = torch.randn(2, channels, *size, dtype=torch.double)
    weight = torch.randn(2, codewords, channels, dtype=torch.double)
    results = []
    for encode in (layer, lambda features: literal_encoding(features, layer.codewords, layer.smoothing)):
        leaf = x.clone().requires_grad_()
        out = encode(leaf)
        results.append([out, *torch.autograd.grad((out * weight).sum(), [leaf, layer.codewords, layer.smoothing])])
    assert results[0][0].shape == (2, codewords, channels)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.fidelity
def test_encoding_of_a_real_map_in_single_precision():
    torch.manual_seed(0)
    layer = Encoding(512)
    x = torch.randn(2, 512, 20, 15).relu()
    with torch.no_grad():
        out = layer(x)
        r = x.double().flatten(2).transpose(1, 2)[:, :, None] - layer.codewords.double()  # (B, N, K, D)
        a = (layer.smoothing.double() * r.square().sum(-1)).softmax(-1)
        expected = (a[..., None] * r).sum(1)
        assert (out - expected).abs().max() < 1e-4 * expected.abs().max()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), out)  # computed in float32 all the same
            half = layer(x.bfloat16())
        assert half.dtype == torch.float32 and (half - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.fidelity
def test_encoding_does_not_know_the_order_of_pixels():
    torch.manual_seed(0)
    layer, x = Encoding(8, 5), torch.randn(2, 8, 6, 7)
    shuffled = x.flatten(2)[..., torch.randperm(42)].view(2, 8, 7, 6)
    torch.testing.assert_close(layer(shuffled), layer(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.fidelity
def test_encoding_starts_as_in_the_release():
    torch.manual_seed(0)
    layer = Encoding(512)
    bound = 1 / (512 * 32) ** 0.5
    assert layer.codewords.shape == (32, 512) and layer.smoothing.shape == (32,)
    assert -1 < layer.smoothing.min() < -0.8 and -0.2 < layer.smoothing.max() < 0
    assert 0.99 * bound < layer.codewords.abs().max() <= bound and layer.codewords.mean().abs() < 0.05 * bound


def test_encoding_never_stores_all_residuals():
    """N * K * D numbers; the largest tensor that it makes, forward or backward, is of N * max(K, D)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t))
            return out

    layer, x = Encoding(64, 32), torch.randn(2, 64, 16, 16, requires_grad=True)
    with Watch():
        layer(x).sum().backward()
    assert len(sizes) > 10 and max(sizes) == 2 * 256 * 64


@pytest.mark.fidelity
def test_context_encoding_normalises_codewords_and_averages_them():
    torch.manual_seed(0)
    context = lively(ContextEncoding(6, 4, 5))
    x = torch.randn(3, 6, 4, 4)
    features = context.project(x)
    codes = literal_encoding(features, context.encoding.codewords, context.encoding.smoothing)
    mean, var = codes.mean((0, 2), keepdim=True), codes.var((0, 2), keepdim=True, unbiased=False)
    codes = (codes - mean) / (var + 1e-5).sqrt() * context.norm.weight[:, None] + context.norm.bias[:, None]
    torch.testing.assert_close(context(x), codes.relu().mean(1), rtol=1e-4, atol=1e-5)
    assert context(x).shape == (3, 4)


# ------------------------------------------------------------------------------------------------- the network


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("backbone", "num_classes", "lateral", "bare", "with_aux"),
    [
        ("resnet101s", 59, True, 60_532_374, 62_907_345),
        ("resnet101s", 59, False, 52_664_982, 55_039_953),
        ("resnet50s", 59, True, 41_540_246, 43_915_217),
        ("resnet101s", 21, True, 60_493_386, 62_858_591),
    ],
)
def test_parameter_counts(backbone, num_classes, lateral, bare, with_aux):
    with torch.device("meta"):
        network = EncNetNetwork(num_classes, backbone, lateral=lateral)
    assert sum(p.numel() for p in network.parameters()) == with_aux
    assert sum(p.numel() for name, p in network.named_parameters() if not name.startswith("aux.")) == bare


@pytest.mark.fidelity
def test_the_default_is_the_released_network():
    with torch.device("meta"):
        model = EncNet(num_classes=59)
        assert sum(p.numel() for p in model.network.parameters()) == 62_907_345
        assert layer_table(model.network) == stored("encnet")
        shapes = {name: tuple(out.shape) for name, out in model.network(torch.empty(2, 3, 480, 480)).items()}
    assert shapes == {"out": (2, 59, 60, 60), "se": (2, 59), "aux": (2, 59, 60, 60)}
    assert model.loss_weights == {"out": 1.0, "se": 0.2, "aux": 0.2}
    assert model.align_corners and model.test_aggregate == "exp"


@pytest.mark.fidelity
def test_dilation_is_lagged_and_the_rule_of_a_checkpoint_is_checked():
    model = tiny(backbone="resnet34", lateral=False)
    body = model.network.backbone.body
    firsts, seconds = [[getattr(b, c).dilation[0] for b in (*body.layer3, *body.layer4)] for c in ("conv1", "conv2")]
    assert firsts == [1, 2, 2, 2, 2, 2, 2, 4, 4] and seconds == [2, 2, 2, 2, 2, 2, 4, 4, 4]
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    other = {"out": 1.0, "se": 0.5, "aux": 0.4}
    tiny(backbone="resnet34", lateral=False, loss_weights=other).on_load_checkpoint(checkpoint)
    for options in ({"dilation": "uniform"}, {"residual": False}, {"codewords": 8}):
        (name,) = options
        with pytest.raises(ValueError, match=f"trained with {name}="):
            tiny(backbone="resnet34", lateral=False, **options).on_load_checkpoint(checkpoint)


def layers(network, prefix, x):
    """The convolutions and batch norms below a name, one after the other, a ReLU after each norm."""
    state = network.state_dict()
    for name, layer in network.get_submodule(prefix).named_modules(prefix=prefix):
        if isinstance(layer, nn.Conv2d):
            x = F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=layer.kernel_size[0] // 2)
        elif isinstance(layer, nn.BatchNorm2d):
            stats = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
            x = F.batch_norm(x, *stats).relu()
    return x


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, ["out", "se", "aux"]),
        ({"lateral": False, "residual": False, "se_stage3": True, "aux": False}, ["out", "se", "se_stage3"]),
        ({"se": False}, ["out", "aux"]),
    ],
)
def test_forward_equals_the_definition(options, keys):
    torch.manual_seed(0)
    network = lively(EncNetNetwork(4, "resnet26", width=12, codewords=5, **options)).eval()
    image = torch.randn(2, 3, 40, 48)

    def code_of(name, x):
        context = network.get_submodule(name)
        features = layers(network, f"{name}.project", x)
        assert context.encoding.codewords.shape == (5, 12)
        codes = literal_encoding(features, context.encoding.codewords, context.encoding.smoothing)
        norm = context.norm
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return ((codes - norm.running_mean[:, None]) * scale[:, None] + norm.bias[:, None]).relu().mean(1)

    with torch.no_grad():
        outputs = network(image)
        _, _, c2, c3, c4 = network.backbone(image)
        assert [f.shape[1:] for f in (c2, c3, c4)] == [(512, 5, 6), (1024, 5, 6), (2048, 5, 6)]
        x = layers(network, "reduce", c4)
        if options.get("lateral", True):
            parts = [x, layers(network, "lateral2", c2), layers(network, "lateral3", c3)]
            x = layers(network, "fuse", torch.cat(parts, 1))
        code = code_of("context", x)
        gamma = 1 / (1 + (-(code @ network.attention.weight.T + network.attention.bias)).exp())
        weighed = x * gamma.view(2, 12, 1, 1)
        expected = {"out": layers(network, "head", x + weighed if options.get("residual", True) else weighed)}
        if "se" in keys:
            expected["se"] = code @ network.se.weight.T + network.se.bias
        if "se_stage3" in keys:
            expected["se_stage3"] = network.se_stage3[1](code_of("se_stage3.0", c3))
        if "aux" in keys:
            expected["aux"] = layers(network, "aux", c3)
    assert list(outputs) == keys and set(expected) == set(keys)
    for name, scores in outputs.items():
        assert scores.shape == ((2, 4) if name.startswith("se") else (2, 4, 5, 6))
        torch.testing.assert_close(scores, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": "convnext_atto", "lateral": False, "output_stride": 32, "align_corners": False},
        {"backbone": "vit_tiny_patch16_224", "output_stride": 16, "align_corners": False},
        {"dilation": "uniform"},
        {"output_stride": 32, "lateral": False},
    ],
)
def test_other_trunks(options):
    model = tiny(**options).eval()
    with torch.no_grad():
        for size in ((65, 70), (48, 64)):
            assert model(torch.zeros(1, 3, *size, dtype=torch.uint8)).shape == (1, 3, *size)


# --------------------------------------------------------------------------------------------------- the model


@pytest.mark.fidelity
def test_presence_counts_what_is_there_and_ignores_what_is_no_class():
    mask = torch.full((3, 4, 5), 255)
    mask[0, 0, 0], mask[0, 3, 4], mask[0, 1] = 0, 4, 2
    mask[1, 2, 2], mask[1, 0] = 3, -1
    expected = torch.tensor([[1.0, 0, 1, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    assert torch.equal(presence(mask, 5), expected)
    assert torch.equal(
        presence(mask.clamp_min(0).to(torch.uint8), 5), expected + torch.tensor([[0], [1], [0]]) * torch.eye(5)[0]
    )
    assert torch.equal(presence(mask, 3), expected[:, :3])


@pytest.mark.fidelity
def test_the_loss_is_that_of_the_release():
    model = tiny()
    batch = batch_of()
    batch["mask"][0] = 1
    batch["mask"][:, :4] = 255
    outputs = {
        "out": torch.randn(2, 3, 4, 5),
        "se": torch.randn(2, 3),
        "aux": torch.randn(2, 3, 4, 5),
    }
    losses = model.loss(outputs, batch)
    target = batch["mask"].long()
    maps = {}
    for name in ("out", "aux"):
        wide = F.interpolate(outputs[name], (32, 40), mode="bilinear", align_corners=True)
        maps[name] = F.cross_entropy(wide, target, ignore_index=255)
    p = outputs["se"].sigmoid()
    there = torch.tensor([[0.0, 1, 0], [1, 1, 1]])
    se = -(there * p.log() + (1 - there) * (1 - p).log()).sum() / 6
    torch.testing.assert_close(losses["loss_se"], se)
    torch.testing.assert_close(losses["loss"], maps["out"] + 0.2 * se + 0.2 * maps["aux"])
    assert set(losses) == {"loss", "loss_out", "loss_se", "loss_aux"}


@pytest.mark.parametrize("options", [{}, {"loss_weights": PAPER, "lateral": False}, {"loss_weights": {"out": 1.0}}])
def test_every_parameter_is_trained(options):
    from pytorch_lightning import Trainer

    model = tiny(lr=0.1, weight_decay=0.0, **options)
    lively(model.network)
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    heads = {name.partition(".")[0] for name in before} & {"se", "se_stage3", "aux"}
    assert heads == set(model.loss_weights) - {"out"}
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader([batch_of()], batch_size=None))
    assert not [name for name, p in model.network.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.fidelity
def test_every_loss_reaches_the_trunk():
    network = lively(EncNetNetwork(3, "resnet18", width=16, se_stage3=True))
    outputs = network(torch.randn(2, 3, 32, 40))
    assert list(outputs) == ["out", "se", "se_stage3", "aux"]
    for name, scores in outputs.items():
        (grad,) = torch.autograd.grad(scores.square().sum(), network.backbone.body.conv1.weight, retain_graph=True)
        assert grad.any(), name


def test_it_trains_under_autocast_and_on_one_image():
    model = tiny()
    lively(model.network)
    batch = {key: value[:1] for key, value in batch_of().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(model.network(model.normalize(batch["image"])), batch)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.network.parameters())


def test_checkpoint_rebuilds_the_model(tmp_path):
    model = tiny(loss_weights=PAPER, lateral=False)
    lively(model.network)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "best.ckpt")
    rebuilt = seglight.load(tmp_path / "best.ckpt", test_aggregate="softmax")
    image = batch_of()["image"]
    with torch.no_grad():
        assert torch.equal(rebuilt(image), model.eval()(image))
    assert rebuilt.loss_weights == PAPER and rebuilt.test_aggregate == "softmax"


def test_export():
    network = tiny().network.eval()
    image = torch.randn(2, 3, 33, 40)
    with torch.no_grad():
        exported = torch.export.export(network, (image,)).module()(image)
        torch.testing.assert_close(exported, network(image))


def test_pretrained_weights_want_their_normalisation(monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    tiny(pretrained=True)
    with pytest.raises(ValueError, match=r'preprocessing is "caffe".*resnet18 expect "torch"'):
        tiny(pretrained=True, preprocessing="caffe")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_weights": {"out": 1.0, "see": 0.2}}, "to out, and to any of se, aux, se_stage3"),
        ({"loss_weights": {"se": 0.2}}, "it gives a weight to out"),
        ({"codewords": 0}, "codewords is 0"),
        ({"output_stride": 16}, r"strides \[8, 16, 16\]; set output_stride to 8, or lateral to false"),
        ({"backbone": "convnext_atto", "dilation": "uniform"}, 'use "lagged-first"'),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


# ------------------------------------------------------------------------------------------- the test protocol


class _Strided(nn.Module):
    """Scores that depend on the place in the window, at stride 8."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 9, stride=8, padding=4)
        self.seen = []

    def forward(self, image):
        self.seen.append(tuple(image.shape[-2:]))
        return {"out": self.conv(image) * 3}


def literal_release(net, image, black, crop, base, scales, flip):
    """The release's test of one image (1, 3, H, W), normalised, window by window: sums of exponentials (K, H, W)."""
    high, wide = image.shape[-2:]
    total = torch.zeros(1, 3, high, wide)
    step = int(crop * 2 / 3)

    def grow(x, height, width):
        out = black.expand(1, 3, max(height, x.shape[2]), max(width, x.shape[3])).clone()
        out[..., : x.shape[2], : x.shape[3]] = x
        return out

    def look(window):
        out = F.interpolate(net(window)["out"], (crop, crop), mode="bilinear", align_corners=True)
        if flip:
            mirrored = net(window.flip(3))["out"]
            out = out + F.interpolate(mirrored, (crop, crop), mode="bilinear", align_corners=True).flip(3)
        return out.exp()

    for scale in scales:
        longer = int(np.ceil(base * scale))
        height, width = (
            (longer, int(wide * longer / high + 0.5)) if high > wide else (int(high * longer / wide + 0.5), longer)
        )
        scaled = F.interpolate(image, (height, width), mode="bilinear", align_corners=True)
        scaled = grow(scaled, crop, crop)
        rows, columns = (int(np.ceil((side - crop) / step)) + 1 for side in scaled.shape[2:])
        sums, count = torch.zeros(1, 3, *scaled.shape[2:]), torch.zeros(1, 1, *scaled.shape[2:])
        for y in range(0, rows * step, step):
            for x in range(0, columns * step, step):
                part = scaled[..., y : y + crop, x : x + crop]
                tall, broad = part.shape[2:]
                sums[..., y : y + crop, x : x + crop] += look(grow(part, crop, crop))[..., :tall, :broad]
                count[..., y : y + crop, x : x + crop] += 1
        votes = (sums / count)[..., :height, :width]
        total += F.interpolate(votes, (high, wide), mode="bilinear", align_corners=True)
    return total[0]


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("size", "base"), [((37, 52), 64), ((70, 45), 64), ((20, 25), 64), ((75, 100), 60), ((40, 60), 51)]
)  # the last two: a shorter side of 22.5 at scale 0.5, and longer ones of 25.5 and 89.25
@pytest.mark.parametrize(("scales", "flip"), [([0.5, 1.0, 1.75], True), ([1.0], False), ([0.75, 1.25], False)])
def test_the_release_tests_like_this(size, base, scales, flip):
    model = tiny(test_window=32, test_long_side=base, test_scales=scales, test_flip=flip).eval()
    model.network = _Strided()
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        normalised = model.normalize(image)
        black = (-torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])).view(1, 3, 1, 1)
        ours = model.protocol(normalised)[0].exp() * len(scales)
        assert set(model.network.seen) == {(32, 32)}
        theirs = literal_release(model.network, normalised, black, 32, base, scales, flip)
        assert ours.shape == (3, *size)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        labels = model.labels([image[0]])[0][0]
    assert (labels == theirs.argmax(0)).float().mean() > 0.99


def test_windows_at_several_scales_of_an_image_of_its_own_size():
    model = tiny(test_window=32, test_scales=[0.5, 1.0]).eval()
    model.network = _Strided()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 40, 51, dtype=torch.uint8)).shape == (1, 3, 40, 51)
    assert len(model.network.seen) == 1 + 4
    assert _release_size((1, 3000), 0.5, 520) == (1, 260)  # a side never vanishes


def test_exp_and_softmax_are_two_ways_to_average():
    image = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scores = []
    for aggregate in ("exp", "softmax"):
        model = tiny(test_scales=[0.5, 1.0], test_aggregate=aggregate).eval()
        model.network = _Strided()
        with torch.no_grad():
            scores.append(model(image).softmax(1))
    assert (scores[0] - scores[1]).abs().max() > 0.01
