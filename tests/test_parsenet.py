"""ParseNet and the VGG16 trunks: counts, grids, the normalisation, early against late fusion, weight files."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from layer_table import layer_table, stored
from torch import nn
from torch.nn import functional as F

import seglight
from seglight.models import vgg
from seglight.models.blocks import CoordinateMap
from seglight.models.parsenet import IMAGE, L2NormScale, ParseNet, ParseNetNetwork, resample
from seglight.models.vgg import VGG16Trunk

SKIPS = ("conv4_3", "conv5_3")
TRUNKS = ("vgg16_reduced", "vgg16_fcn32s")
INDICES = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
CONVS = [f"conv{s}_{i}" for s, n in enumerate((2, 2, 3, 3, 3), start=1) for i in range(1, n + 1)]


def meta(*args, **options):
    with torch.device("meta"):
        return ParseNetNetwork(*args, **options)


def tiny(trunk="vgg16_reduced", **options):
    torch.manual_seed(0)
    network = ParseNetNetwork(3, trunk, width=4, **options)
    for parameter in network.parameters():
        if parameter.ndim == 1:  # biases and scales, which all start equal
            nn.init.normal_(parameter, mean=parameter[0].item())
    return network.eval()


def thin_vgg(width=8):
    """torchvision's VGG16 at another width, as its file."""
    from torchvision.models import VGG
    from torchvision.models.vgg import make_layers

    torch.manual_seed(1)
    stages = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
    model = VGG(make_layers([c for f, n in stages for c in (*[width * f] * n, "M")]), num_classes=10)
    model.classifier[0] = nn.Linear(8 * width * 49, 64 * width)
    model.classifier[3] = nn.Linear(64 * width, 64 * width)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.1)
    return model.state_dict()


# ------------------------------------------------------------------------------------------------------ trunk


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("num_classes", "skips", "count"), [(21, (), 20_528_981), (21, SKIPS, 20_551_509), (60, SKIPS, 20_671_356)]
)
def test_parameter_counts(num_classes, skips, count):
    network = meta(num_classes, skip_layers=skips)
    assert sum(p.numel() for p in network.parameters()) == count
    assert sum(p.numel() for p in network.backbone.parameters()) == 20_483_904
    with torch.device("meta"):
        model = ParseNet(num_classes=21)
    assert sum(p.numel() for p in model.network.parameters()) == 20_528_981


@pytest.mark.fidelity
def test_layer_tables():
    assert layer_table(meta(21)) == stored("parsenet")
    assert layer_table(meta(60, "vgg16_fcn32s", skip_layers=SKIPS)) == stored("parsenet_fcn32s")


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("side", "sizes"),
    [(321, [161, 81, 41, 41, 41, 41]), (500, [251, 126, 64, 64, 64, 64]), (37, [19, 10, 6, 6, 6, 6])],
)
def test_sizes_inside_the_reduced_trunk(side, sizes):
    with torch.device("meta"):
        trunk = VGG16Trunk(width=1)
        features = trunk(torch.empty(1, 3, 40, side), trunk.layers)
    assert [features[name].shape[-1] for name in ("pool1", "pool2", "pool3", "pool4", "pool5", "fc7")] == sizes
    assert {name: f.shape[1] for name, f in features.items()} == {n: trunk.channels(n) for n in trunk.layers}


@pytest.mark.fidelity
def test_reduced_trunk_is_vgg16_with_holes_and_decimated_classifiers():
    """Against a literal forward pass on torchvision's tensors, the decimation spelled out."""
    file = thin_vgg()
    trunk = VGG16Trunk(width=8, rates=(6, 12)).eval()
    weights = vgg.trunk_weights(file, trunk, "torch", "vgg16")
    trunk.load_state_dict({k: v for k, v in weights.items() if k in trunk.state_dict()}, strict=True)
    image = torch.randn(1, 3, 50, 41)
    x = image
    for name, i in zip(CONVS, INDICES, strict=True):
        hole = 2 if name.startswith("conv5") else 1
        weight, bias = file[f"features.{i}.weight"], file[f"features.{i}.bias"]
        x = F.relu(F.conv2d(x, weight, bias, padding=hole, dilation=hole))
        if name in ("conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3"):
            stride = 1 if name[4] in "45" else 2
            x = F.max_pool2d(x, 3, stride, 1, ceil_mode=True)
    kept = list(range(0, 512, 4))
    dense = file["classifier.0.weight"].reshape(512, 64, 7, 7)
    fc6 = torch.stack([dense[k][:, [0, 3, 6]][:, :, [0, 3, 6]] for k in kept])
    fc7 = torch.tensor([[float(file["classifier.3.weight"][k, j]) for j in kept] for k in kept])[..., None, None]
    with torch.inference_mode():
        ours = trunk(image, ["fc7_1", "fc7_2"])
        for name, rate in (("fc7_1", 6), ("fc7_2", 12)):
            y = F.relu(F.conv2d(x, fc6, file["classifier.0.bias"][kept], padding=rate, dilation=rate))
            y = F.relu(F.conv2d(y, fc7, file["classifier.3.bias"][kept]))
            assert y.abs().max() > 0.01
            torch.testing.assert_close(ours[name], y, rtol=1e-4, atol=1e-5)


@pytest.mark.fidelity
def test_grids_of_the_trunks():
    """By hand: padded 3x3 pools keep 0 in place; padding 100 puts conv1_1 at j - 99; fc6 sees 7 pixels."""
    with torch.device("meta"):
        reduced, fcn = VGG16Trunk(width=1, rates=(6, 12)), VGG16Trunk("fcn", width=1)
    half = Fraction(1, 2)
    assert {reduced.grid(name) for name in ("pool3", "conv4_3", "conv5_3", "fc6_2", "fc7_1")} == {(8, 0)}
    assert [reduced.grid(name) for name in ("conv1_1", "pool1", "conv3_3")] == [(1, 0), (2, 0), (4, 0)]
    grids = {name: fcn.grid(name) for name in ("conv1_1", "conv4_3", "conv5_3", "fc7")}
    expected = {"conv1_1": (1, -99), "conv4_3": (8, -95 - half), "conv5_3": (16, -91 - half), "fc7": (32, 12 + half)}
    assert grids == expected


def test_coordinate_map_of_a_dilated_kernel():
    """The position of an output pixel is the centre of mass of the input pixels it sees."""
    path = [nn.Conv2d(1, 1, 3, 2, padding=1), nn.Conv2d(1, 1, 4, padding=2, dilation=3)]
    for layer in path:
        nn.init.ones_(layer.weight)
    image = torch.zeros(1, 1, 61, 61, requires_grad=True)
    nn.Sequential(*path)(image)[..., 8, 8].sum().backward()
    mass = image.grad[0, 0].sum(1)
    scale, shift = CoordinateMap.along(path)
    assert float((mass * torch.arange(61)).sum() / mass.sum()) == pytest.approx(float(scale * 8 + shift))


# ---------------------------------------------------------------------------------------------------- context


@pytest.mark.fidelity
def test_l2_norm_is_the_scale_everywhere():
    layer = L2NormScale(6)
    x = torch.randn(2, 6, 5, 4) * torch.logspace(-2, 4, 20).view(5, 4)
    y = layer(x)
    torch.testing.assert_close(y.norm(dim=1), torch.full((2, 5, 4), 10.0))
    nn.init.normal_(layer.scale)
    for b, h, w in ((0, 0, 0), (1, 4, 3), (0, 2, 1)):
        vector = x[b, :, h, w]
        torch.testing.assert_close(layer(x)[b, :, h, w], layer.scale * vector / vector.square().sum().sqrt())


def test_l2_norm_of_nothing_and_of_half_precision():
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    layer = L2NormScale(3)
    layer(x).sum().backward()
    assert (layer(x) == 0).all() and x.grad.isfinite().all()
    large = torch.full((1, 3, 2, 2), 1000.0, dtype=torch.float16)  # whose square is not a float16
    torch.testing.assert_close(layer(large), torch.full((1, 3, 2, 2), 10 / 3**0.5))


@pytest.mark.fidelity
@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize(
    ("context", "skips"), [(("fc7",), ()), (("fc7",), SKIPS), (("fc7", "conv5_3"), ("pool2",)), ((), ("fc7",))]
)
def test_early_fusion_equals_late_fusion(trunk, context, skips):
    early, late = (tiny(trunk, context_layers=context, skip_layers=skips, fusion=f) for f in ("early", "late"))
    late.load_state_dict(early.state_dict())
    image = torch.randn(2, 3, 70, 45)
    with torch.inference_mode():
        a, b = early(image)["out"], late(image)["out"]
    assert a.shape == b.shape == (2, 3, 70, 45) and a.std() > 0.01
    assert (a - b).abs().max() < 1e-4


@pytest.mark.fidelity
@pytest.mark.parametrize("fusion", ["early", "late"])
def test_layers_meet_on_the_grid_of_the_finest_one(fusion, monkeypatch):
    sizes = []

    def watch(x, source, target, size):
        sizes.append(size)
        return resample(x, source, target, size)

    monkeypatch.setattr("seglight.models.parsenet.resample", watch)
    network = tiny("vgg16_fcn32s", skip_layers=SKIPS, fusion=fusion)
    with torch.inference_mode():
        finest = tuple(network.backbone(torch.zeros(1, 3, 70, 45), ["conv4_3"])["conv4_3"].shape[-2:])
        network(torch.zeros(1, 3, 70, 45))
    assert sizes == [finest] * 3 + [(70, 45)]


@pytest.mark.fidelity
def test_the_head_starts_with_one_scale_and_without_bias():
    model = ParseNet(num_classes=3, width=1, skip_layers=["conv4_3"], norm_scale=20.0)
    norms = [layer for layer in model.network.modules() if isinstance(layer, L2NormScale)]
    assert len(norms) == 3 and all((layer.scale == 20).all() for layer in norms)
    assert not model.network.score.bias.any()
    assert model.network.fusion == "late" and ParseNet(num_classes=3, width=1, fusion="early").network.fusion == "early"


def test_the_order_in_which_layers_are_named_changes_nothing():
    orders = (("fc7", "conv5_3"), ("conv5_3", "fc7")), (("conv4_3", "pool2"), ("pool2", "conv4_3"))
    one, other = (tiny(context_layers=context, skip_layers=skips) for context, skips in zip(*orders, strict=True))
    other.load_state_dict(one.state_dict())
    image = torch.randn(1, 3, 41, 41)
    with torch.inference_mode():
        assert torch.equal(one(image)["out"], other(image)["out"])


@pytest.mark.fidelity
def test_fusion_written_out():
    """The reduced network on a size whose corners meet, every step spelled out on its features."""
    network = tiny(skip_layers=SKIPS)
    image = torch.randn(2, 3, 41, 57)
    with torch.inference_mode():
        features = network.backbone(image, network.local)
        maps = [
            F.normalize(features[n], eps=1e-5) * network.local_norm[n].scale[:, None, None] for n in (*SKIPS, "fc7")
        ]
        pooled = F.normalize(features["fc7"].flatten(2).mean(2)) * network.context_norm["fc7"].scale
        maps.append(pooled[:, :, None, None].repeat(1, 1, *maps[0].shape[-2:]))
        score = F.conv2d(torch.cat(maps, 1), network.score.weight, network.score.bias)
        expected = F.interpolate(score, (41, 57), mode="bilinear", align_corners=True)
        assert (network(image)["out"] - expected).abs().max() < 1e-4


@pytest.mark.fidelity
@pytest.mark.parametrize("fusion", ["early", "late"])
def test_context_knows_what_but_not_where(fusion, monkeypatch):
    network = tiny(fusion=fusion)
    network.score.weight.data[:, : network.parts[0]] = 0  # the context alone
    fc7 = torch.rand(1, 64, 6, 6)
    shuffled = fc7.flatten(2)[..., torch.randperm(36)].view_as(fc7)
    outs = []
    for feature in (fc7, shuffled, fc7 * torch.linspace(0, 1, 64)[:, None, None]):
        monkeypatch.setattr(network.backbone, "forward", lambda image, layers, given=feature: {"fc7": given})
        outs.append(network(torch.zeros(1, 3, 41, 41))["out"])
    first, moved, other = outs
    torch.testing.assert_close(first, first[..., :1, :1].expand_as(first))
    torch.testing.assert_close(first, moved)
    assert (first - other).abs().max() > 1e-3


@pytest.mark.fidelity
@pytest.mark.parametrize("form", ["reduced", "fcn"])
def test_every_layer_lands_on_the_pixels_it_was_seen_at(form):
    """A map that holds the coordinates of its pixels, brought to the image over the finest grid, still holds them."""
    with torch.device("meta"):
        trunk = VGG16Trunk(form, width=1)
        features = trunk(torch.empty(1, 3, 120, 161), ["conv4_3", "conv5_3", "fc7"])
    finest = trunk.grid("conv4_3")
    for name, feature in features.items():
        scale, shift = map(float, trunk.grid(name))
        rows, columns = (torch.arange(n) * scale + shift for n in feature.shape[-2:])
        ramp = torch.stack([rows[:, None].expand(feature.shape[-2:]), columns.expand(feature.shape[-2:])])[None]
        out = resample(ramp, trunk.grid(name), finest, tuple(features["conv4_3"].shape[-2:]))
        out = resample(out, finest, IMAGE, (120, 161))[0]
        inside = slice(32, 97)  # farther out, the coarsest map has no neighbour to interpolate with
        torch.testing.assert_close(out[0, inside, inside], torch.arange(32.0, 97)[:, None].expand(-1, 65))
        torch.testing.assert_close(out[1, inside, inside], torch.arange(32.0, 97).expand(65, -1))


@pytest.mark.parametrize(
    ("source", "target", "size"),
    [
        ((8, 0), (1, 0), (41, 49)),
        ((8, 0), (1, 0), (38, 52)),
        ((32, 12.5), (8, -95.5), (20, 17)),
        ((4, 1), (4, 1), (3, 5)),
    ],
)
def test_resample_against_numpy(source, target, size):
    source, target = (CoordinateMap(Fraction(a), Fraction(b)) for a, b in (source, target))
    x = torch.randn(2, 3, 6, 7)
    ours = resample(x, source, target, size)
    expected = x.numpy()
    for axis, length in ((2, size[0]), (3, size[1])):
        known = np.arange(expected.shape[axis]) * float(source.scale) + float(source.shift)
        wanted = np.arange(length) * float(target.scale) + float(target.shift)
        expected = np.apply_along_axis(lambda line, k=known, w=wanted: np.interp(w, k, line), axis, expected)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.fidelity
@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("size", [(321, 321), (375, 500), (512, 512), (33, 1), (1, 1)])
def test_output_has_the_size_of_the_input(trunk, size):
    with torch.device("meta"):
        out = meta(21, trunk, skip_layers=SKIPS)(torch.empty(1, 3, *size))
    assert list(out) == ["out"] and out["out"].shape == (1, 21, *size)


# ------------------------------------------------------------------------------------------------------ model


def batch(side=41):
    return {
        "image": torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8),
        "mask": torch.randint(0, 3, (2, side, side), dtype=torch.uint8),
        "image_id": ["a", "b"],
    }


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("fusion", ["early", "late"])
def test_every_parameter_gets_a_gradient(trunk, fusion):
    torch.manual_seed(0)
    model = ParseNet(num_classes=3, trunk=trunk, skip_layers=SKIPS, fusion=fusion, width=4)
    one = batch()
    model.loss(model.network(model.normalize(one["image"])), one)["loss"].backward()
    assert [name for name, p in model.network.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_dropout_follows_fc6_and_fc7():
    trunk = VGG16Trunk(width=4).train()
    seen = trunk(torch.randn(1, 3, 65, 65), ["conv5_3", "fc6", "fc7"])
    again = trunk(torch.randn(1, 3, 65, 65), ["fc6"])
    assert all((seen[name] == 0).float().mean() > 0.6 for name in ("fc6", "fc7"))  # ReLU alone: half
    assert trunk.drop6.p == 0.5 and list(again) == ["fc6"]


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_checkpoint_rebuilds_the_model(trunk, tmp_path):
    torch.manual_seed(0)
    model = ParseNet(num_classes=3, trunk=trunk, skip_layers=["conv5_3"], width=4).eval()
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    path = str(tmp_path / "best.ckpt")
    torch.save(checkpoint, path)
    image = torch.randint(0, 256, (2, 3, 35, 50), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(seglight.load(path)(image), model(image))
        early = seglight.load(path, fusion="early")(image)  # other arithmetic, same network
        assert (early - model(image)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="skip_layers"):
        seglight.load(path, skip_layers=["conv4_3"])
    again = ParseNet(num_classes=3, trunk=trunk, skip_layers=["conv5_3"], width=4, init_from=path)
    assert torch.equal(again.network.score.weight, model.network.score.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_layers": ["conv4_4"]}, r"vgg16_reduced has no layer 'conv4_4'; choose among conv1_1, .*fc7"),
        ({"skip_layers": ["fc7"]}, "name a layer twice"),
        ({"context_layers": ["conv5_3"]}, "leave out fc7"),
        ({"pretrained": True}, "width is 4"),
        ({"pretrained": True, "init_from": "x.ckpt"}, "choose one"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ParseNet(num_classes=3, width=4, **options)


# ---------------------------------------------------------------------------------------------------- weights


def caffe_file(path, form="reduced", width=4, extra=None):
    torch.manual_seed(2)
    weights = {name: torch.randn_like(w) for name, w in VGG16Trunk(form, width=width).state_dict().items()}
    torch.save({**weights, **(extra or {})}, path)
    return weights


def trunk_of(model):
    return {name.removeprefix("backbone."): w for name, w in model.network.state_dict().items() if "backbone" in name}


def test_weights_of_torchvision_fill_both_trunks(tmp_path):
    file = thin_vgg()
    torch.save(file, tmp_path / "vgg16.pth")
    for preprocessing in ("torch", "caffe"):
        model = ParseNet(num_classes=3, width=8, init_from=str(tmp_path / "vgg16.pth"), preprocessing=preprocessing)
        reduced = trunk_of(model)
        assert torch.equal(reduced["conv3_2.weight"], file["features.12.weight"])
        taps = file["classifier.0.weight"].view(512, 64, 7, 7)
        assert torch.equal(reduced["fc6.weight"][5, 7], taps[20, 7][[0, 3, 6]][:, [0, 3, 6]])
        assert torch.equal(reduced["fc7.bias"], file["classifier.3.bias"][::4])
    nn.init.constant_(model.network.backbone.fc7.bias, 7.0)
    model.start_from(file, "vgg16.pth", ("backbone.fc7",))
    assert (model.network.backbone.fc7.bias == 7).all()  # `init_without`
    full = trunk_of(ParseNet(num_classes=3, width=8, trunk="vgg16_fcn32s", init_from=str(tmp_path / "vgg16.pth")))
    assert torch.equal(full["fc6.weight"], taps)


def test_weights_converted_from_caffe(tmp_path, caplog):
    path = str(tmp_path / "caffe.pth")
    options = {"num_classes": 3, "width": 4, "preprocessing": "caffe", "init_from": path}
    weights = caffe_file(path)
    for name, weight in trunk_of(ParseNet(**options)).items():
        assert torch.equal(weight, weights[name])
    with pytest.raises(ValueError, match="reduced VGG16, whose fc6 is 3x3"):
        ParseNet(**options, trunk="vgg16_fcn32s")
    with pytest.raises(ValueError, match=r"BGR.*Set model\.preprocessing to caffe"):
        ParseNet(**{**options, "preprocessing": "torch"})
    full = caffe_file(path, "fcn", extra={"score_fr.weight": torch.zeros(3, 256, 1, 1)})
    caplog.set_level("INFO")
    assert torch.equal(trunk_of(ParseNet(**options, trunk="vgg16_fcn32s"))["fc7.weight"], full["fc7.weight"])
    assert "not in this network: backbone.score_fr" in caplog.text
    assert "As initialised: context_norm.fc7, local_norm.fc7, score." in caplog.text
    assert torch.equal(trunk_of(ParseNet(**options))["fc6.weight"], full["fc6.weight"][::4, :, ::3, ::3])
    del full["fc6.bias"]
    torch.save(full, path)
    with pytest.raises(ValueError, match="lacks fc6"):
        ParseNet(**options)
    torch.save({"something.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="neither a VGG16 of torchvision nor one of Caffe"):
        ParseNet(**options)


def test_pretrained_takes_the_torchvision_file(monkeypatch):
    from torchvision.models import VGG16_Weights, vgg16

    with torch.device("meta"):
        shapes = {name: w.shape for name, w in vgg16(init_weights=False).state_dict().items()}
    weights = {name: torch.empty(1).expand(shape) for name, shape in shapes.items()}  # no memory behind them
    taken = {}
    monkeypatch.setattr(VGG16_Weights, "get_state_dict", lambda self, **_: weights)
    monkeypatch.setattr(vgg, "hand_on", lambda network, weights, *_: taken.update(weights))
    with torch.device("meta"):
        model = ParseNet(num_classes=21, pretrained=True)
    own = {name: w.shape for name, w in model.network.state_dict().items() if name.startswith("backbone.")}
    assert {name: w.shape for name, w in taken.items()} == own
    with pytest.raises(ValueError, match='preprocessing is "caffe"'), torch.device("meta"):
        ParseNet(num_classes=21, pretrained=True, preprocessing="caffe")


def test_scores_start_normal_with_001_and_biases_at_0():
    torch.manual_seed(0)
    score = ParseNetNetwork(21, width=16).score
    assert score.weight.std().item() == pytest.approx(0.01, rel=0.05) and not score.bias.any()
    assert score.weight.abs().max() > 0.03  # not uniform
