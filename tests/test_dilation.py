"""Dilated VGG16 and the context module: counts, receptive fields, the identity, plain arithmetic, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layer_table import layer_table, stored
from torch import nn

import seglight
from seglight.models import fcn
from seglight.models.blocks import CoordinateMap
from seglight.models.dilation import Dilation, DilationNetwork, context_module
from seglight.models.fcn import vgg16_to_fcn

CLASSES = 3


def tiny(context="large", **options):
    """A thin network whose scores differ."""
    torch.manual_seed(0)
    network = DilationNetwork(CLASSES, context, width=4, **options).eval()
    nn.init.normal_(network.final.weight, std=0.1)
    return network


# ------------------------------------------------------------------------------------------------- the network


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("context", "widths"),
    [("none", None), ("basic", [21] * 8), ("large", [42, 42, 84, 168, 336, 672, 672, 21])],
)
def test_parameter_counts(context, widths):
    """The front end has the learned layers of FCN-32s; the module's widths are those of the release's VOC network."""
    expected, before = 134_346_581, 21
    for i, width in enumerate(widths or []):
        expected += before * width * (1 if i == 7 else 9) + width
        before = width
    assert expected == {"none": 134_346_581, "basic": 134_374_973, "large": 141_149_720}[context]
    with torch.device("meta"):
        assert sum(p.numel() for p in DilationNetwork(21, context).parameters()) == expected


@pytest.mark.fidelity
def test_layer_table():
    with torch.device("meta"):
        network = Dilation(num_classes=21).network
    assert layer_table(network) == stored("dilation") and network.buffer == 33


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("layers", "rates", "factors", "buffer"),
    [
        (8, [1, 1, 2, 4, 8, 16, 1, 1], [2, 2, 4, 8, 16, 32, 32, 1], 33),
        (7, [1, 1, 2, 4, 8, 1, 1], [2, 2, 4, 8, 16, 16, 1], 17),
        (10, [1, 1, 2, 4, 8, 16, 32, 64, 1, 1], [2, 2, 4, 8, 16, 32, 64, 128, 128, 1], 129),
    ],
)
def test_rates_and_widths_of_the_module(layers, rates, factors, buffer):
    with torch.device("meta"):
        network = DilationNetwork(5, "large", layers, width=1)
        convs = [layer for name, layer in network.named_children() if name.startswith("ctx_") and "relu" not in name]
        assert [conv.dilation[0] for conv in convs] == rates
        assert [conv.out_channels // 5 for conv in convs] == factors
        assert network.buffer == buffer
        padded = DilationNetwork(5, "basic", layers, "layers", width=1)
    assert padded.buffer == 0
    convs = [layer for name, layer in padded.named_children() if name.startswith("ctx_") and "relu" not in name]
    assert [conv.padding[0] for conv in convs] == [*rates[:-1], 0]
    assert {conv.out_channels for conv in convs} == {5}


@pytest.mark.fidelity
def test_receptive_fields_of_the_module():
    """The table of the paper: 3, 5, 9, 17, 33, 65, 67, 67."""
    module = context_module(1, large=False, noise=0.0)
    sides = []
    for count in range(1, 9):
        convs = [layer for layer in module.values() if isinstance(layer, nn.Conv2d)][:count]
        path = nn.Sequential(*convs)
        for conv in convs:
            nn.init.ones_(conv.weight)
        scores = torch.zeros(1, 1, 81, 81, requires_grad=True)
        out = path(scores)
        out[0, 0, out.shape[2] // 2, out.shape[3] // 2].backward()
        sides.append([int((scores.grad[0, 0].abs().sum(axis) > 0).sum()) for axis in (0, 1)])
    assert sides == [[side, side] for side in (3, 5, 9, 17, 33, 65, 67, 67)]


@pytest.mark.fidelity
@pytest.mark.parametrize("large", [False, True])
def test_the_module_starts_as_the_identity(large):
    module = context_module(4, large, pad=True, noise=0.0)
    scores = torch.rand(2, 4, 9, 12)  # not negative: the activations truncate
    out = nn.Sequential(*module.values())(scores)
    torch.testing.assert_close(out, scores)


@pytest.mark.fidelity
def test_initial_weights_are_those_of_the_formula():
    """C / c_out in the middle between channels of one class, noise of that order elsewhere (section 3, equation 5)."""
    torch.manual_seed(0)
    conv = context_module(4, large=True)["ctx_conv2_1"]
    assert conv.weight.shape == (16, 8, 3, 3) and (conv.bias == 0).all()
    own = torch.zeros(16, 8, 3, 3, dtype=torch.bool)
    for b in range(16):
        for a in range(8):
            own[b, a, 1, 1] = a * 4 // 8 == b * 4 // 16
    assert own.sum() == 16 * 2
    assert (conv.weight[own] == 4 / 16).all()
    rest = conv.weight[~own]
    assert rest.all()  # between classes the middle has noise too
    assert rest.std().item() == pytest.approx(0.01 * 4 / 16, rel=0.1) and abs(rest.mean().item()) < 3e-4


@pytest.mark.fidelity
def test_scores_lie_in_the_middle_of_their_cell():
    """Of the padded image: 186 pixels and half of a cell of 8."""
    path = [layer for name, layer in tiny("none").named_children() if not name.startswith("ctx_")]
    scale, shift = CoordinateMap.along(path)
    assert (scale, shift - 186) == (8, 3.5)


@pytest.mark.fidelity
@pytest.mark.parametrize("size", [(64, 96), (61, 83), (1, 1), (9, 200)])
@pytest.mark.parametrize("padding", ["buffer", "layers"])
def test_sizes(size, padding):
    seen = []
    with torch.device("meta"):
        network = DilationNetwork(5, context_padding=padding, width=4)
        network.final.register_forward_hook(lambda m, i, out: seen.append(out.shape[-2:]))
        network.ctx_final.register_forward_hook(lambda m, i, out: seen.append(out.shape[-2:]))
        out = network(torch.empty(2, 3, *size))["out"]
    assert out.shape == (2, 5, *size)
    assert seen == [(-(-size[0] // 8), -(-size[1] // 8))] * 2


@pytest.mark.fidelity
@pytest.mark.parametrize("width", [48, 51, 56])
def test_scores_land_on_the_pixels_they_were_seen_at(width):
    """Scores replaced by the coordinate of the middle of their cell: each pixel must get its own, at any size."""
    network = tiny("none")
    middle = torch.arange(7.0) * 8 + 3.5
    network.final.register_forward_hook(lambda m, i, out: middle[: out.shape[-1]].expand_as(out))
    columns = network(torch.zeros(1, 3, 8, width))["out"][0, 0, 0]
    torch.testing.assert_close(columns[4:44], torch.arange(4.0, 44))


def thin_vgg16():
    """torchvision's VGG16 at a sixteenth of its width, under its names."""
    from torchvision.models.vgg import make_layers

    torch.manual_seed(1)
    vgg = nn.Module()
    vgg.features = make_layers([4, 4, "M", 8, 8, "M", 16, 16, 16, "M", 32, 32, 32, "M", 32, 32, 32, "M"])
    linear = nn.Linear(32 * 49, 256), nn.Linear(256, 256), nn.Linear(256, 10)
    vgg.classifier = nn.Sequential(linear[0], nn.ReLU(), nn.Dropout(), linear[1], nn.ReLU(), nn.Dropout(), linear[2])
    for parameter in vgg.parameters():  # as torch draws them, nothing of the image would be left after 15 layers
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return vgg.eval()


def spread(weight, rate):
    """A dilated kernel as a plain one, with zeros between."""
    side = (weight.shape[-1] - 1) * rate + 1
    out = weight.new_zeros(*weight.shape[:2], side, side)
    out[..., ::rate, ::rate] = weight
    return out


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("context", "padding"), [("none", "buffer"), ("basic", "layers"), ("large", "buffer"), ("large", "layers")]
)
def test_network_equals_torchvisions_vgg_with_holes(context, padding):
    """The layers of torchvision's VGG16, unpadded, without the last two poolings; kernels spread by hand."""
    vgg = thin_vgg16()
    network = tiny(context, context_padding=padding, context_noise=0.5)
    network.load_state_dict({**network.state_dict(), **vgg16_to_fcn(vgg.state_dict())})
    image = torch.randn(1, 3, 40, 51)
    with torch.inference_mode():
        x = torch.from_numpy(np.pad(image, ((0, 0), (0, 0), (186, 186), (186, 186 + 5)), mode="reflect"))
        pools = 0
        for layer in vgg.features:
            if isinstance(layer, nn.MaxPool2d):
                pools += 1
                x = layer(x) if pools < 4 else x
            elif isinstance(layer, nn.Conv2d):
                x = F.conv2d(x, spread(layer.weight, 2 if pools == 4 else 1), layer.bias).relu()
        fc6, fc7 = vgg.classifier[0], vgg.classifier[3]
        x = F.conv2d(x, spread(fc6.weight.reshape(256, 32, 7, 7), 4), fc6.bias).relu()
        x = F.conv2d(x, fc7.weight[..., None, None], fc7.bias).relu()
        x = F.conv2d(x, network.final.weight, network.final.bias)
        if context != "none":
            x = F.pad(x, (33, 33, 33, 33)) if padding == "buffer" else x
            for name, rate in zip(("1_1", "1_2", "2_1", "3_1", "4_1", "5_1"), (1, 1, 2, 4, 8, 16), strict=True):
                conv = getattr(network, f"ctx_conv{name}")
                margin = rate if padding == "layers" else 0
                x = F.conv2d(x, spread(conv.weight, rate), conv.bias, padding=margin).relu()
            x = F.conv2d(x, network.ctx_fc1.weight, padding=int(padding == "layers")).relu()
            x = F.conv2d(x, network.ctx_final.weight)
        assert x.shape == (1, CLASSES, 5, 7)
        x = F.interpolate(x, (40, 56), mode="bilinear")[..., :51]
        out = network(image)["out"]
    assert (x.std((2, 3)) > 0.01 * x.abs().max()).all()  # it is the image that is compared
    torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())


def test_what_it_refuses():
    with pytest.raises(ValueError, match='context is "big"'):
        DilationNetwork(3, "big")
    with pytest.raises(ValueError, match='context_padding "same"'):
        DilationNetwork(3, context_padding="same")
    with pytest.raises(ValueError, match="context_layers is 4"):
        DilationNetwork(3, context_layers=4)
    with pytest.raises(ValueError, match="nothing would train"):
        DilationNetwork(3, "none", freeze_front=True)
    with pytest.raises(ValueError, match="width is 8"):
        Dilation(num_classes=3, pretrained=True, width=8)


# --------------------------------------------------------------------------------------------------- the model


def save(model, path):
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


def batch_of(size=(16, 24)):
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=generator),
        "mask": torch.randint(0, CLASSES, (2, *size), dtype=torch.uint8, generator=generator),
        "image_id": ["a", "b"],
    }


@pytest.mark.parametrize(
    "options", [{"context": "none"}, {"context": "basic"}, {"context": "large"}, {"freeze_front": True}]
)
def test_a_training_step_moves_what_trains(options, tmp_path):
    from pytorch_lightning import Trainer

    torch.manual_seed(0)
    model = Dilation(num_classes=CLASSES, width=4, lr=0.1, weight_decay=0.0, **options)
    nn.init.normal_(model.network.final.weight)
    nn.init.constant_(model.network.final.bias, 5.0)  # above the truncation
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader([batch_of()], batch_size=None))
    still = {name for name, p in model.network.named_parameters() if torch.equal(p, before[name])}
    frozen = {name for name in before if not name.startswith("ctx_")} if options.get("freeze_front") else set()
    assert still == frozen
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    rebuilt = seglight.load(tmp_path / "last.ckpt")
    model.eval()
    image = torch.randint(0, 256, (1, 3, 35, 50), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(rebuilt(image), model(image))
    assert rebuilt(image).shape == (1, CLASSES, 35, 50)


def test_a_frozen_front_end_has_no_dropout():
    network = tiny("basic", freeze_front=True).train()
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(network(image)["out"], network(image)["out"])
    network = tiny("basic").train()
    assert not torch.equal(network(image)["out"], network(image)["out"])


@pytest.mark.fidelity
def test_stages_hand_on_their_weights(tmp_path):
    front = Dilation(num_classes=CLASSES, width=4, context="none").eval()
    nn.init.normal_(front.network.final.weight)
    nn.init.constant_(front.network.final.bias, 100.0)
    path = save(front, tmp_path / "front.ckpt")
    options = {"width": 4, "freeze_front": True, "context_noise": 0.0, "context_padding": "layers", "init_from": path}
    model = Dilation(num_classes=CLASSES, **options).eval()
    image = batch_of()["image"]
    with torch.inference_mode():
        scores = front(image)
        assert scores.min() > 0
        torch.testing.assert_close(model(image), scores, rtol=1e-4, atol=1e-3)  # the module starts as the identity
    joint = Dilation(num_classes=CLASSES, width=4, init_from=save(model, tmp_path / "context.ckpt"))
    for name, weight in model.network.state_dict().items():
        assert torch.equal(joint.network.state_dict()[name], weight), name
    joint = seglight.load(tmp_path / "context.ckpt", freeze_front=False, context_noise=0.5)
    assert joint.network.conv1_1.weight.requires_grad
    with pytest.raises(ValueError, match="context='large', but this model has context='none'"):
        checkpoint = torch.load(tmp_path / "context.ckpt", weights_only=True)
        Dilation(num_classes=CLASSES, width=4, context="none").on_load_checkpoint(checkpoint)


@pytest.mark.fidelity
@pytest.mark.parametrize("kind", ["voc", "cityscapes"])
def test_released_weights_load_strictly(kind, tmp_path):
    """Stand-ins with the names of the two kinds of released networks."""
    context = "large" if kind == "voc" else "basic"
    torch.manual_seed(1)
    weights = {key: torch.randn_like(w) for key, w in tiny(context).state_dict().items()}
    if kind == "voc":
        released = {key.replace("ctx_", "ct_").replace("final", "fc-final", 1) if key.startswith("final") else
                    key.replace("ctx_", "ct_"): w for key, w in weights.items()}  # fmt: skip
        assert {"conv5_3.bias", "fc-final.weight", "ct_conv1_1.weight", "ct_fc1.bias", "ct_final.bias"} <= set(released)
    else:
        released = {**weights, "ctx_upsample.weight": torch.zeros(CLASSES, 1, 16, 16)}
    path = str(tmp_path / "released.pth")
    torch.save(released, path)
    options = {"num_classes": CLASSES, "context": context, "width": 4, "init_from": path}
    model = Dilation(**options, preprocessing="caffe")
    for name, weight in model.network.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    nn.init.constant_(model.network.final.bias, 7.0)
    model.start_from(released, path, ("final",))
    assert (model.network.final.bias == 7).all()  # `init_without`
    with pytest.raises(ValueError, match=r"BGR.*Set model\.preprocessing to caffe"):
        Dilation(**options)
    with pytest.raises(ValueError, match=r"has ctx_.* in excess"):
        Dilation(**{**options, "context": "none"}, preprocessing="caffe")


def test_vgg16_fills_the_front_end(tmp_path):
    vgg = thin_vgg16()
    torch.save(vgg.state_dict(), tmp_path / "vgg16.pth")
    model = Dilation(num_classes=CLASSES, width=4, init_from=str(tmp_path / "vgg16.pth"))
    assert torch.equal(model.network.conv5_3.weight, vgg.features[28].weight)
    assert torch.equal(model.network.fc6.weight.flatten(1), vgg.classifier[0].weight)
    assert model.network.final.weight.std().item() == pytest.approx(0.001, rel=0.2)
    assert not model.network.final.bias.any()


def test_pretrained_takes_the_torchvision_file(monkeypatch):
    from torchvision.models import VGG16_Weights

    taken = []
    monkeypatch.setattr(VGG16_Weights, "get_state_dict", lambda self, **_: thin_vgg16().state_dict())
    monkeypatch.setattr(fcn, "hand_on", lambda network, weights, source, name: taken.append(name))
    with torch.device("meta"):
        Dilation(num_classes=21, pretrained=True)
    assert taken == ["Dilation"]
