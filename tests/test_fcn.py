"""FCN against the Caffe release: names, shapes, counts, crop offsets, initialisation, weight files."""

from __future__ import annotations

import logging

import pytest
import torch
from layer_table import layer_table, stored
from torch import nn

import seglight
from seglight.models import fcn
from seglight.models.blocks import BilinearDeconv, CoordinateMap, bilinear_kernel, crop_offset
from seglight.models.fcn import FCN8s, FCN8sAtOnce, FCN16s, FCN32s, FCNNetwork

VARIANTS = ("32s", "16s", "8s", "8s-atonce")
MODELS = (FCN32s, FCN16s, FCN8s, FCN8sAtOnce)
CONVS = [
    "conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3", "conv4_1", "conv4_2", "conv4_3",
    "conv5_1", "conv5_2", "conv5_3", "fc6", "fc7",
]  # fmt: skip
# What the published conversions hold, beside CONVS: layers with weight and bias, then layers with a weight alone.
CAFFE = {
    "32s": (["score_fr"], ["upscore"]),
    "16s": (["score_fr", "score_pool4"], ["upscore2", "upscore16"]),
    "8s": (["score_fr", "score_pool4", "score_pool3"], ["upscore2", "upscore_pool4", "upscore8"]),
}
CAFFE["8s-atonce"] = CAFFE["8s"]


def tiny(variant="8s", num_classes=3, **options):
    """A thin network whose scores are no longer zero."""
    torch.manual_seed(0)
    network = FCNNetwork(num_classes, variant, width=4, **options)
    for name, parameter in network.named_parameters():
        if name.startswith("score"):
            nn.init.normal_(parameter)
    return network.eval()


def save(model, path):
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


# ------------------------------------------------------------------------------------------------- the network


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("variant", "num_classes", "total", "learned"),
    [
        ("32s", 21, 136_152_917, 134_346_581),
        ("16s", 21, 134_815_994, 134_357_354),
        ("8s", 21, 134_489_759, 134_362_751),
        ("8s-atonce", 21, 134_489_759, 134_362_751),
        ("8s", 60, 135_589_364, 134_552_564),
    ],
)
def test_parameter_counts(variant, num_classes, total, learned):
    with torch.device("meta"):
        parameters = list(FCNNetwork(num_classes, variant).parameters())
    assert sum(p.numel() for p in parameters) == total
    assert sum(p.numel() for p in parameters if p.requires_grad) == learned


@pytest.mark.fidelity
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_table(variant):
    with torch.device("meta"):
        assert layer_table(FCNNetwork(21, variant)) == stored(f"fcn{variant.removesuffix('-atonce')}")


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("variant", "offsets"),
    [
        ("32s", {"out": 19}),
        ("16s", {"pool4": 5, "out": 27}),
        ("8s", {"pool4": 5, "pool3": 9, "out": 31}),
        ("8s-atonce", {"pool4": 5, "pool3": 9, "out": 31}),
    ],
)
def test_crop_offsets_are_those_of_the_release(variant, offsets):
    with torch.device("meta"):
        assert FCNNetwork(2, variant, width=1).offsets == offsets


@pytest.mark.fidelity
def test_crop_offset_of_caffenet():
    path = [
        nn.Conv2d(3, 1, 11, 4, padding=100), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(1, 1, 5, padding=2),
        nn.MaxPool2d(3, 2), *(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3)), nn.MaxPool2d(3, 2),
        nn.Conv2d(1, 1, 6), nn.Conv2d(1, 1, 1), nn.ConvTranspose2d(1, 1, 63, 32),
    ]  # fmt: skip
    assert crop_offset(path) == 18


def test_crop_offset_refuses_maps_that_no_crop_aligns():
    with pytest.raises(ValueError, match=r"spans 2 pixels .* and 1 in the second"):
        crop_offset([nn.MaxPool2d(2, 2)])
    with pytest.raises(ValueError, match="1/2 pixels apart"):
        crop_offset([nn.Conv2d(1, 1, 2)])
    with pytest.raises(ValueError, match=r"spans 2 pixels .* 0 pixels apart"):
        crop_offset([nn.Conv2d(1, 1, 1, 2)])


def test_coordinate_map_is_where_an_impulse_comes_from():
    """The position of an output pixel is the centre of mass of the input pixels it sees."""
    convs = [nn.Conv2d(1, 1, 5, 3, padding=2), nn.Conv2d(1, 1, 4, 2, padding=1)]
    path = [*convs, nn.ConvTranspose2d(1, 1, 4, 2, padding=1)]
    for layer in path:
        nn.init.ones_(layer.weight)
    image = torch.zeros(1, 1, 61, 61, requires_grad=True)
    nn.Sequential(*path)(image)[..., 8:10, 8:10].sum().backward()  # the two phases of a deconvolution of stride 2
    mass = image.grad[0, 0].sum(1)
    scale, shift = CoordinateMap.along(path)
    assert float((mass * torch.arange(61)).sum() / mass.sum()) == pytest.approx(float(scale) * 8.5 + float(shift))


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("side", "conv", "pools", "score", "upsampled"),
    [
        (224, 422, [211, 106, 53, 27, 14], 8, (288, 304, 312)),
        (321, 519, [260, 130, 65, 33, 17], 11, (384, 400, 408)),
        (375, 573, [287, 144, 72, 36, 18], 12, (416, 432, 440)),
        (500, 698, [349, 175, 88, 44, 22], 16, (544, 560, 568)),
        (513, 711, [356, 178, 89, 45, 23], 17, (576, 592, 600)),
    ],
)
def test_sizes_inside(side, conv, pools, score, upsampled):
    names = ["conv1_1", "pool1", "pool2", "pool3", "pool4", "pool5", "score_fr"]
    lasts = {"32s": "upscore", "16s": "upscore16", "8s": "upscore8"}
    for (variant, last), expected in zip(lasts.items(), upsampled, strict=True):
        sizes = []
        with torch.device("meta"):
            network = FCNNetwork(2, variant, width=1)
            for name in [*names, last]:
                getattr(network, name).register_forward_hook(lambda m, i, out, to=sizes: to.append(out.shape[-1]))
            assert network(torch.empty(1, 3, 64, side))["out"].shape == (1, 2, 64, side)
        assert sizes == [conv, *pools, score, expected]


@pytest.mark.fidelity
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "size", [(224, 224), (321, 321), (375, 375), (500, 500), (513, 513), (375, 500), (333, 1), (1, 1), (97, 1031)]
)
def test_output_has_the_size_of_the_input(variant, size):
    with torch.device("meta"):
        assert FCNNetwork(21, variant)(torch.empty(2, 3, *size))["out"].shape == (2, 21, *size)


@pytest.mark.fidelity
@pytest.mark.parametrize(("size", "stride"), [(4, 2), (16, 8), (32, 16), (64, 32), (63, 32)])
def test_bilinear_deconvolution(size, stride):
    layer = BilinearDeconv(2, size, stride)
    inside = slice(size, -size)
    ones = layer(torch.ones(1, 2, 9, 9))
    assert (ones[..., inside, inside] == 1).all()

    image = torch.rand(1, 2, 9, 9)
    ours = layer(image)
    if size % 2 == 0:  # an odd kernel has its samples elsewhere, and torch no mode for that
        theirs = nn.functional.interpolate(image, scale_factor=stride, mode="bilinear", align_corners=False)
        shift = (size - stride) // 2
        ours = ours[..., shift : shift + theirs.shape[-2], shift : shift + theirs.shape[-1]]
        edge = slice(stride, -stride)
        torch.testing.assert_close(ours[..., edge, edge], theirs[..., edge, edge])
    assert (layer.weight[0, 1] == 0).all() and (layer.weight[1, 0] == 0).all()
    assert not layer.weight.requires_grad


@pytest.mark.fidelity
def test_bilinear_kernel_numbers():
    torch.testing.assert_close(bilinear_kernel(4)[0] * 16, torch.tensor([1.0, 3.0, 3.0, 1.0]))
    torch.testing.assert_close(bilinear_kernel(3)[1], torch.tensor([0.5, 1.0, 0.5]))


@pytest.mark.fidelity
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_start_at_zero_and_shield_the_trunk(variant):
    network = FCNNetwork(3, variant, width=4).eval()
    out = network(torch.randn(1, 3, 33, 20))["out"]
    assert (out == 0).all()
    nn.functional.cross_entropy(out, torch.randint(0, 3, (1, 33, 20))).backward()
    for name, parameter in network.named_parameters():
        if name.startswith("score"):
            assert parameter.grad.abs().sum() > 0, name
        elif parameter.requires_grad:
            assert not parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("learn", ["none", "intermediate", "all"])
def test_what_should_train_gets_a_gradient(variant, learn):
    network = tiny(variant, learn_upsampling=learn)
    nn.functional.cross_entropy(network(torch.randn(2, 3, 40, 24))["out"], torch.randint(0, 3, (2, 40, 24))).backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    last = {"upscore.weight", "upscore16.weight", "upscore8.weight"}
    fixed = {name for name, _ in network.named_parameters() if name.startswith("upscore")}
    fixed = {"none": fixed, "intermediate": fixed & last, "all": set()}[learn]
    assert trained == {name for name, _ in network.named_parameters()} - fixed


def _fused(network, image):
    """Inputs of the two skip scores beside the maps that they come from."""
    seen = {}
    for pool in ("pool4", "pool3"):
        getattr(network, pool).register_forward_hook(lambda m, i, o, key=pool: seen.update({key: o.clone()}))
        score = getattr(network, f"score_{pool}")
        score.register_forward_pre_hook(lambda m, i, key=pool: seen.update({f"score_{key}": i[0].clone()}))
    network(image)
    return seen


@pytest.mark.fidelity
@pytest.mark.parametrize(("variant", "scales"), [("8s", (1.0, 1.0)), ("8s-atonce", (0.01, 0.0001))])
def test_at_once_scales_the_skips_before_their_scores(variant, scales):
    seen = _fused(tiny(variant), torch.randn(1, 3, 32, 32))
    for pool, scale in zip(("pool4", "pool3"), scales, strict=True):
        torch.testing.assert_close(seen[f"score_{pool}"], seen[pool] * scale)


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("variant", "scored"), [("32s", ["fr"]), ("16s", ["fr", "pool4"]), ("8s", ["fr", "pool4", "pool3"])]
)
def test_every_score_lands_on_the_pixels_it_was_seen_at(variant, scored):
    """Each score replaced by the coordinate of its receptive field's centre: the output must be its own coordinate.

    Centres by hand: padding 100 puts conv1_1 at j - 99; a pool doubles the stride and adds half the old; fc6 sees 7.
    """
    centres = {"fr": (32, 12.5), "pool4": (16, -91.5), "pool3": (8, -95.5)}
    network = tiny(variant)
    for name in scored:
        scale, shift = centres[name]

        def ramp(module, inputs, output, scale=scale, shift=shift):
            row, column = (torch.arange(side) * scale + shift for side in output.shape[-2:])
            return torch.stack([row[:, None].expand(output.shape[-2:]), column.expand(output.shape[-2:])])[None]

        getattr(network, f"score_{name}").register_forward_hook(ramp)
    for layer in ("upscore", "upscore2", "upscore16", "upscore_pool4", "upscore8"):
        if hasattr(network, layer):
            old = getattr(network, layer)
            setattr(network, layer, BilinearDeconv(2, old.kernel_size[0], old.stride[0]))
    out = network(torch.zeros(1, 3, 200, 231))["out"][0] / len(scored)
    inside = (slice(64, 130), slice(64, 160))  # farther out, the coarsest score has no neighbour to interpolate with
    torch.testing.assert_close(out[0][inside], torch.arange(64.0, 130)[:, None].expand(-1, 96), rtol=0, atol=1e-3)
    torch.testing.assert_close(out[1][inside], torch.arange(64.0, 160).expand(66, -1), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_full_width_runs():
    with torch.inference_mode():
        assert FCNNetwork(21).eval()(torch.rand(1, 3, 224, 224))["out"].shape == (1, 21, 224, 224)


# -------------------------------------------------------------------------------------------------- weights


@pytest.mark.fidelity
def test_vgg16_weights_give_the_features_of_vgg16():
    """fc7 of the FCN equals torchvision's classifier, run window by window on the pool5 of its own layers."""
    from torchvision.models import VGG
    from torchvision.models.vgg import make_layers

    thin = [8, 8, "M", 16, 16, "M", 32, 32, 32, "M", 64, 64, 64, "M", 64, 64, 64, "M"]
    vgg = VGG(make_layers(thin), num_classes=10).eval()
    vgg.classifier[0], vgg.classifier[3] = nn.Linear(64 * 49, 512), nn.Linear(512, 512)
    network = FCNNetwork(3, "32s", width=8).eval()
    fcn.hand_on(network, fcn.vgg16_to_fcn(vgg.state_dict()), "vgg16", "FCN")
    scored = {}
    network.score_fr.register_forward_pre_hook(lambda m, i: scored.update(fc7=i[0]))
    image = torch.randn(1, 3, 70, 40)
    with torch.inference_mode():
        network(image)
        x = image
        for i, layer in enumerate(vgg.features):
            if isinstance(layer, nn.MaxPool2d):
                x = nn.functional.max_pool2d(x, 2, 2, ceil_mode=True)
            elif i == 0:
                x = nn.functional.conv2d(x, layer.weight, layer.bias, padding=100)
            else:
                x = layer(x)
        rows, columns = x.shape[-2] - 6, x.shape[-1] - 6
        windows = [x[:, :, r : r + 7, c : c + 7].flatten(1) for r in range(rows) for c in range(columns)]
        expected = vgg.classifier[:5](torch.cat(windows)).T.reshape(1, -1, rows, columns)
    torch.testing.assert_close(scored["fc7"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.fidelity
def test_vgg16_keys_and_shapes_fill_the_trunk_of_the_full_network():
    from torchvision.models import vgg16

    with torch.device("meta"):
        weights = fcn.vgg16_to_fcn(vgg16(init_weights=False).state_dict())
        own = FCNNetwork(21, "32s").state_dict()
    assert list(weights) == [f"{name}.{kind}" for name in CONVS for kind in ("weight", "bias")]
    assert {name: w.shape for name, w in weights.items()} == {name: own[name].shape for name in weights}


def test_other_vggs_are_refused():
    from torchvision.models import vgg16_bn, vgg19

    with torch.device("meta"):
        for build in (vgg16_bn, vgg19):
            with pytest.raises(ValueError, match=r"without batch norm.*features\.\d+"):
                fcn.vgg16_to_fcn(build(init_weights=False).state_dict())


def test_pretrained_takes_the_torchvision_file(monkeypatch):
    from torchvision.models import VGG16_Weights, vgg16

    with torch.device("meta"):
        shapes = {name: w.shape for name, w in vgg16(init_weights=False).state_dict().items()}
    weights = {name: torch.empty(1).expand(shape) for name, shape in shapes.items()}  # no memory behind them
    taken = {}
    monkeypatch.setattr(VGG16_Weights, "get_state_dict", lambda self, **_: weights)
    monkeypatch.setattr(fcn, "hand_on", lambda network, weights, source, name: taken.update(weights))
    monkeypatch.setattr(fcn, "FCNNetwork", lambda *args: nn.Identity())
    FCN32s(num_classes=21, pretrained=True)
    assert len(taken) == 30
    with pytest.raises(ValueError, match='preprocessing is "caffe"'):
        FCN32s(num_classes=21, pretrained=True, preprocessing="caffe")
    with pytest.raises(ValueError, match="width is 8"):
        FCN32s(num_classes=21, pretrained=True, width=8)
    with pytest.raises(ValueError, match="choose one"):
        FCN32s(num_classes=21, pretrained=True, init_from="x.ckpt")


@pytest.mark.fidelity
def test_staged_initialisation(tmp_path, caplog):
    coarse = FCN32s(num_classes=3, width=4)
    coarse.network.load_state_dict(tiny("32s").state_dict())
    path = save(coarse, tmp_path / "32s.ckpt")
    with caplog.at_level(logging.INFO):
        middle = FCN16s(num_classes=3, width=4, init_from=path)
    for name, weight in coarse.network.state_dict().items():
        if name != "upscore.weight":
            assert torch.equal(middle.network.state_dict()[name], weight), name
    assert (middle.network.score_pool4.weight == 0).all()
    message = caplog.messages[-1]
    assert "As initialised: score_pool4, upscore16, upscore2." in message
    assert "In the file, not in this network: upscore." in message
    assert "Taken: conv1_1, conv1_2," in message

    nn.init.normal_(middle.network.score_pool4.weight)
    nn.init.normal_(middle.network.upscore2.weight)
    fine = FCN8s(num_classes=3, width=4, init_from=save(middle, tmp_path / "16s.ckpt"))
    assert torch.equal(fine.network.score_pool4.weight, middle.network.score_pool4.weight)
    assert torch.equal(fine.network.upscore2.weight, middle.network.upscore2.weight)
    assert (fine.network.score_pool3.weight == 0).all()


def test_what_cannot_be_handed_on_is_refused(tmp_path):
    path = save(FCN32s(num_classes=3, width=4), tmp_path / "32s.ckpt")
    with pytest.raises(ValueError, match=r"score_fr.* is \(3,.* but \(5,"):
        FCN16s(num_classes=5, width=4, init_from=path)
    with pytest.raises(ValueError, match="equal num_classes and width"):
        FCN16s(num_classes=3, width=8, init_from=path)
    with pytest.raises(ValueError, match='with preprocessing "torch", this model has "caffe"'):
        FCN16s(num_classes=3, width=4, init_from=path, preprocessing="caffe")
    torch.save({"state_dict": {"network.down.0.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no layer in common"):
        FCN16s(num_classes=3, width=4, init_from=str(tmp_path / "other.ckpt"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        FCN16s(num_classes=3, width=4, init_from=str(tmp_path / "list.pth"))
    with pytest.raises(FileNotFoundError):
        FCN16s(num_classes=3, width=4, init_from=str(tmp_path / "none.ckpt"))


def caffe_file(variant, path, num_classes=3, width=4):
    """A stand-in with the keys of a published conversion, in the file format of its time."""
    with torch.device("meta"):
        shapes = FCNNetwork(num_classes, variant, width=width).state_dict()
    both, alone = CAFFE[variant]
    keys = [f"{name}.{kind}" for name in [*CONVS, *both] for kind in ("weight", "bias")]
    weights = {key: torch.randn(shapes[key].shape) for key in [*keys, *(f"{name}.weight" for name in alone)]}
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    return weights, str(path)


@pytest.mark.fidelity
@pytest.mark.parametrize("model", MODELS)
def test_converted_caffe_weights_load_strictly(model, tmp_path):
    weights, path = caffe_file(model.variant, tmp_path / "caffe.pth")
    network = FCNNetwork(3, model.variant, width=4)
    network.load_state_dict(weights, strict=True)
    loaded = model(num_classes=3, width=4, preprocessing="caffe", init_from=path)
    for name, weight in loaded.network.state_dict().items():
        assert torch.equal(weight, weights[name])
    with pytest.raises(ValueError, match=r"BGR.*Set model\.preprocessing to caffe"):
        model(num_classes=3, width=4, init_from=path)


def test_caffe_weights_of_another_variant_are_refused(tmp_path):
    _, path = caffe_file("16s", tmp_path / "16s.pth")
    with pytest.raises(ValueError, match="lacks score_pool3, upscore8, upscore_pool4 and has upscore16 in excess"):
        FCN8s(num_classes=3, width=4, preprocessing="caffe", init_from=path)
    weights, path = caffe_file("8s", tmp_path / "8s.pth")
    del weights["fc7.bias"]
    torch.save(weights, path)
    with pytest.raises(ValueError, match="lacks fc7"):
        FCN8s(num_classes=3, width=4, preprocessing="caffe", init_from=path)
    weights.update({"fc7.bias": torch.zeros(256), "fc8.bias": torch.zeros(3)})
    torch.save(weights, path)
    with pytest.raises(ValueError, match="lacks nothing and has fc8 in excess"):
        FCN8s(num_classes=3, width=4, preprocessing="caffe", init_from=path)


def test_vgg16_file_fills_the_trunk_under_any_preprocessing(tmp_path):
    """The Caffe VGG16, converted to torchvision's names, is what the released nets started from."""
    trunk = {name: w for name, w in tiny("32s").state_dict().items() if name.split(".")[0] in CONVS}
    indices = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    names = [f"features.{i}" for i in indices] + ["classifier.0", "classifier.3"]
    renamed = {key.replace(ours, theirs): w for ours, theirs in zip(CONVS, names, strict=True)
               for key, w in trunk.items() if key.startswith(ours + ".")}  # fmt: skip
    for name in ("classifier.0.weight", "classifier.3.weight"):
        renamed[name] = renamed[name].flatten(1)
    torch.save({**renamed, "classifier.6.weight": torch.zeros(10, 256)}, tmp_path / "vgg16.pth")
    model = FCN32s(num_classes=3, width=4, preprocessing="caffe", init_from=str(tmp_path / "vgg16.pth"))
    for name, weight in trunk.items():
        assert torch.equal(model.network.state_dict()[name], weight)
    assert (model.network.score_fr.weight == 0).all()


# ---------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("model", MODELS)
def test_a_training_step_moves_the_scores_only_and_the_fixed_kernels_never(model):
    from pytorch_lightning import Trainer

    torch.manual_seed(0)
    batch = {
        "image": torch.randint(0, 256, (2, 3, 40, 24), dtype=torch.uint8),
        "mask": torch.randint(0, 3, (2, 40, 24), dtype=torch.uint8),
        "image_id": ["a", "b"],
    }
    lightning = model(num_classes=3, width=4, lr=0.1, weight_decay=0.0)
    before = {name: p.clone() for name, p in lightning.network.state_dict().items()}
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(lightning, torch.utils.data.DataLoader([batch], batch_size=None))
    moved = {name for name, p in lightning.network.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("score")}


@pytest.mark.parametrize("model", MODELS)
def test_checkpoint_rebuilds_the_model_without_the_file_it_started_from(model, tmp_path):
    _, start = caffe_file(model.variant, tmp_path / "caffe.pth")
    trained = model(num_classes=3, width=4, preprocessing="caffe", init_from=start, learn_upsampling="all").eval()
    path = save(trained, tmp_path / "best.ckpt")
    (tmp_path / "caffe.pth").unlink()
    rebuilt = seglight.load(path)
    image = torch.randint(0, 256, (2, 3, 35, 50), dtype=torch.uint8)
    assert type(rebuilt) is model
    assert all(parameter.requires_grad for parameter in rebuilt.network.parameters())
    with torch.inference_mode():
        assert torch.equal(rebuilt(image), trained(image))
    assert rebuilt(image).shape == (2, 3, 35, 50)
