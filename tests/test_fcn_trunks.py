"""FCN-32s on CaffeNet and GoogLeNet: counts, crops, the trunks against plain arithmetic and torchvision, files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_table import layer_table, stored
from torch import nn

import seglight
from seglight.models import fcn_trunks
from seglight.models.blocks import BilinearDeconv
from seglight.models.fcn import FCN32s, FCNNetwork
from seglight.models.fcn_trunks import (
    INCEPTIONS,
    CaffeNetFCNNetwork,
    FCN32sAlexNet,
    FCN32sGoogLeNet,
    GoogLeNetFCNNetwork,
    alexnet_to_fcn,
    googlenet_to_fcn,
)

NETWORKS = {"caffenet": CaffeNetFCNNetwork, "googlenet": GoogLeNetFCNNetwork}
MODELS = {"caffenet": FCN32sAlexNet, "googlenet": FCN32sGoogLeNet}
PAPER = {"caffenet": "caffenet", "googlenet": "bvlc"}


def meta(name, *args, **options):
    with torch.device("meta"):
        return NETWORKS[name](*args, **options)


def tiny(name, **options):
    """A thin network whose scores are no longer zero."""
    torch.manual_seed(0)
    network = NETWORKS[name](3, width=4, **options).eval()
    nn.init.normal_(network.score_fr.weight)
    return network


# ------------------------------------------------------------------------------------------------- the networks


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("name", "options", "total", "learned"),
    [
        ("caffenet", {}, 58_704_590, 56_954_261),
        ("caffenet", {"trunk": "torchvision"}, 58_840_206, 57_089_877),
        ("googlenet", {}, 7_801_413, 5_995_077),
        ("googlenet", {"trunk": "torchvision"}, 7_801_413, 5_995_077),
        ("googlenet", {"upscore_size": 63}, 7_745_406, 5_995_077),
    ],
)
def test_parameter_counts(name, options, total, learned):
    parameters = list(meta(name, 21, **options).parameters())
    assert sum(p.numel() for p in parameters) == total
    assert sum(p.numel() for p in parameters if p.requires_grad) == learned
    assert all(p.requires_grad for p in meta(name, 21, learn_upsampling=True, **options).parameters())


@pytest.mark.fidelity
@pytest.mark.parametrize("name", NETWORKS)
def test_layer_table(name):
    network = meta(name, 21)
    norms = [k for k, layer in network.named_modules() if isinstance(layer, nn.LocalResponseNorm)]
    assert norms == ["norm1", "norm2"]
    assert layer_table(network) == stored(f"fcn32s_{name}")


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("name", "options", "offset", "centre"),
    [
        ("caffenet", {}, 18, 13),
        ("caffenet", {"trunk": "torchvision"}, 18, 13),
        ("googlenet", {"upscore_size": 63}, 98, -67),
        ("googlenet", {}, 98, -67),
        ("googlenet", {"trunk": "torchvision", "upscore_size": 63}, 106, -75),
    ],
)
def test_the_score_lands_on_the_pixels_it_was_seen_at(name, options, offset, centre):
    """The score replaced by the coordinate of its receptive field's centre: the output must be its own coordinate.

    Centres by hand, CaffeNet: 5 - 100, 4 for pool1, 8, 16, and 2.5 * 32 for fc6. GoogLeNet: 3 - 100, 2, 4, 8, 16.
    """
    network = tiny(name, **options)
    assert network.offset == offset

    def ramp(module, inputs, output):
        row, column = (torch.arange(side) * 32.0 + centre for side in output.shape[-2:])
        return torch.stack([row[:, None].expand(output.shape[-2:]), column.expand(output.shape[-2:])])[None]

    network.score_fr.register_forward_hook(ramp)
    network.upscore = BilinearDeconv(2, network.upscore.kernel_size[0], 32)
    out = network(torch.zeros(1, 3, 200, 231))["out"][0]
    inside = slice(64, 130)  # farther out, the score has no neighbour to interpolate with
    half = 0.5 if network.upscore.kernel_size[0] == 64 else 0.0
    expected = torch.arange(64.0, 130) - half
    torch.testing.assert_close(out[0][inside, inside], expected[:, None].expand(66, 66), rtol=0, atol=1e-3)
    torch.testing.assert_close(out[1][inside, inside], expected.expand(66, 66), rtol=0, atol=1e-3)


@pytest.mark.fidelity
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("trunk", ["paper", "torchvision"])
def test_output_has_the_size_of_the_input(name, trunk):
    network = meta(name, 2, trunk=PAPER[name] if trunk == "paper" else trunk, width=4)
    for size in [(1, 1), *((side, side + 7) for side in range(2, 67)), (224, 321), (375, 500), (513, 97)]:
        with torch.device("meta"):
            assert network(torch.empty(1, 3, *size))["out"].shape == (1, 2, *size), size


def response_norm(x, size=5, alpha=1e-4, beta=0.75):
    """Krizhevsky's formula, channel by channel; Caffe divides alpha by the size."""
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        near = x[:, max(0, c - size // 2) : c + size // 2 + 1]
        out[:, c] = x[:, c] / (1 + alpha / size * (near**2).sum(1)) ** beta
    return out


@pytest.mark.fidelity
def test_caffenet_is_its_prototxt():
    """The same arithmetic by hand: groups as two convolutions, normalisation after pooling, pooling rounded up."""
    network = tiny("caffenet")
    image = torch.randn(1, 3, 60, 43) * 100

    def conv(x, name, groups=1, **options):
        layer = getattr(network, name)
        parts = zip(x.chunk(groups, 1), layer.weight.chunk(groups), layer.bias.chunk(groups), strict=True)
        return torch.cat([F.conv2d(*part, **options) for part in parts], 1)

    def pool(x):
        rows, columns = (-(-(side - 3) // 2) * 2 + 3 for side in x.shape[-2:])
        x = F.pad(x, (0, columns - x.shape[-1], 0, rows - x.shape[-2]), value=-torch.inf)
        return x.unfold(2, 3, 2).unfold(3, 3, 2).amax((-2, -1))

    with torch.no_grad():
        for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"):
            nn.init.normal_(getattr(network, name).bias)
        x = response_norm(pool(conv(image, "conv1", stride=4, padding=100).relu()))
        x = response_norm(pool(conv(x, "conv2", 2, padding=2).relu()))
        x = conv(x, "conv3", padding=1).relu()
        x = conv(x, "conv4", 2, padding=1).relu()
        x = pool(conv(x, "conv5", 2, padding=1).relu())
        x = conv(conv(conv(x, "fc6").relu(), "fc7").relu(), "score_fr")
        x = F.conv_transpose2d(x, network.upscore.weight, stride=32)[..., 18:78, 18:61]
        torch.testing.assert_close(network(image)["out"], x, rtol=1e-4, atol=1e-4 * x.abs().max().item())


@pytest.mark.fidelity
def test_googlenet_of_the_paper_is_its_prototxt():
    network = tiny("googlenet")
    image = torch.randn(1, 3, 60, 43) * 100
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)

    def conv(x, name, **options):
        layer = network.get_submodule(name)
        return F.conv2d(x, layer.weight, layer.bias, **options).relu()

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.uniform_(module.bias)
        x = response_norm(pool(conv(image, "conv1.7x7_s2", stride=2, padding=100)))
        x = pool(response_norm(conv(conv(x, "conv2.3x3_reduce"), "conv2.3x3", padding=1)))
        for block in INCEPTIONS:
            x = pool(x) if block in ("4a", "5a") else x
            near, i = F.max_pool2d(x, 3, 1, padding=1), f"inception_{block}"
            three = conv(conv(x, f"{i}.3x3_reduce"), f"{i}.3x3", padding=1)
            five = conv(conv(x, f"{i}.5x5_reduce"), f"{i}.5x5", padding=2)
            x = torch.cat([conv(x, f"{i}.1x1"), three, five, conv(near, f"{i}.pool_proj")], 1)
        x = network.upscore(network.score_fr(x))[..., 98:158, 98:141]
        torch.testing.assert_close(network(image)["out"], x, rtol=1e-4, atol=1e-4 * x.abs().max().item())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("learn", [False, True])
def test_what_should_train_gets_a_gradient(name, learn):
    network = tiny(name, learn_upsampling=learn).train()
    F.cross_entropy(network(torch.randn(2, 3, 40, 72))["out"], torch.randint(0, 3, (2, 40, 72))).backward()
    without = {key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == (set() if learn else {"upscore.weight"})


@pytest.mark.fidelity
@pytest.mark.parametrize("name", NETWORKS)
def test_scores_start_at_zero(name):
    out = NETWORKS[name](3, width=4)(torch.randn(1, 3, 33, 20))["out"]
    assert (out == 0).all()


def test_other_values_are_refused():
    with pytest.raises(ValueError, match='trunk is "alexnet"; choose "caffenet"'):
        FCN32sAlexNet(num_classes=3, trunk="alexnet")
    with pytest.raises(ValueError, match='trunk is "caffe"; choose "bvlc"'):
        FCN32sGoogLeNet(num_classes=3, trunk="caffe")
    with pytest.raises(ValueError, match="upscore_size is 32"):
        FCN32sGoogLeNet(num_classes=3, upscore_size=32)


# ------------------------------------------------------------------------------------------- torchvision's weights


@pytest.mark.fidelity
def test_alexnet_weights_give_the_features_of_alexnet():
    """fc7 of the FCN equals torchvision's classifier on the 224 x 224 pixels that the score in the middle sees."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    theirs = alexnet(num_classes=10).eval()
    network = CaffeNetFCNNetwork(2, "torchvision").eval()
    own = network.state_dict()
    weights = alexnet_to_fcn(theirs.state_dict())
    assert {key: w.shape for key, w in weights.items()} == {
        key: w.shape for key, w in own.items() if not key.startswith(("score", "upscore"))
    }
    network.load_state_dict({**own, **weights})
    network.conv1.padding = (2, 2)  # torchvision's own
    seen = []
    network.score_fr.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    image = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        network(image)
        expected = theirs.classifier[:6](theirs.features(image).flatten(1))
    assert seen[0].shape == (1, 4096, 1, 1)
    torch.testing.assert_close(seen[0].flatten(1), expected, rtol=1e-4, atol=1e-4)


def random_googlenet():
    """torchvision's GoogLeNet as its pretrained file makes it, every number of its batch norm random."""
    from torchvision.models import GoogLeNet

    torch.manual_seed(0)
    model = GoogLeNet(num_classes=10, aux_logits=False, transform_input=True, init_weights=False).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return model


@pytest.mark.fidelity
def test_googlenet_weights_give_the_features_of_googlenet():
    theirs = random_googlenet()
    network = GoogLeNetFCNNetwork(2, "torchvision").eval()
    weights = googlenet_to_fcn(theirs.state_dict())
    own = network.state_dict()
    assert {key: w.shape for key, w in weights.items()} == {
        key: w.shape for key, w in own.items() if not key.startswith(("score", "upscore"))
    }
    network.load_state_dict({**own, **weights})
    # Zeros around the image mean another colour in -1..1 than in "torch" preprocessing, so compare without.
    network.conv1["7x7_s2"].padding = theirs.conv1.conv.padding = (0, 0)
    seen = {}
    network.score_fr.register_forward_pre_hook(lambda m, i: seen.update(ours=i[0]))
    theirs.avgpool.register_forward_pre_hook(lambda m, i: seen.update(theirs=i[0]))
    image = torch.randn(1, 3, 130, 101)
    with torch.inference_mode():
        network(image)
        theirs(image)
    assert seen["ours"].shape == (1, 1024, 4, 3)
    torch.testing.assert_close(seen["ours"], seen["theirs"], rtol=1e-4, atol=1e-4 * seen["theirs"].max().item())


def test_files_of_other_networks_are_refused():
    from torchvision.models import vgg16

    with torch.device("meta"):
        other = vgg16(init_weights=False).state_dict()
    with pytest.raises(ValueError, match=r"torchvision's alexnet: features\.3"):
        alexnet_to_fcn(other)
    with pytest.raises(ValueError, match=r"torchvision's googlenet: conv1"):
        googlenet_to_fcn(other)


@pytest.mark.parametrize("name", NETWORKS)
def test_pretrained_takes_the_torchvision_file(name, monkeypatch):
    import torchvision.models
    from torchvision.models import alexnet, googlenet

    with torch.device("meta"):
        build = {"caffenet": alexnet, "googlenet": lambda: googlenet(init_weights=False)}[name]
        shapes = {key: w.shape for key, w in build().state_dict().items()}
    weights = {key: torch.ones(()).expand(shape) for key, shape in shapes.items()}  # no memory behind them
    enum = {"caffenet": torchvision.models.AlexNet_Weights, "googlenet": torchvision.models.GoogLeNet_Weights}[name]
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **_: weights)
    model = MODELS[name](num_classes=3, trunk="torchvision", pretrained=True)
    first = {"caffenet": "conv1", "googlenet": "inception_5b.1x1"}[name]
    weight = model.network.get_submodule(first).weight
    assert (weight == weight[0, 0, 0, 0]).all() and weight[0, 0, 0, 0] > 0.5
    assert (model.network.score_fr.weight == 0).all()
    with pytest.raises(ValueError, match=f'trunk is "{PAPER[name]}", for which torchvision has no weights'):
        MODELS[name](num_classes=3, pretrained=True)
    with pytest.raises(ValueError, match="width is 8"):
        MODELS[name](num_classes=3, trunk="torchvision", pretrained=True, width=8)
    with pytest.raises(ValueError, match='preprocessing is "caffe"'):
        MODELS[name](num_classes=3, trunk="torchvision", pretrained=True, preprocessing="caffe")


# ------------------------------------------------------------------------------------------------- Caffe's weights


def caffe_file(name, path, classifier=False):
    """A stand-in for a converted file: of the segmentation network, or of the ImageNet classifier before it."""
    torch.manual_seed(1)
    weights = {key: torch.randn_like(w) for key, w in NETWORKS[name](3, width=4).state_dict().items()}
    if classifier:
        weights = {key: w for key, w in weights.items() if not key.startswith(("score_fr", "upscore"))}
        if name == "caffenet":
            weights["fc6.weight"], weights["fc7.weight"] = (weights[f"fc{i}.weight"].flatten(1) for i in (6, 7))
            weights |= {"fc8.weight": torch.zeros(10, 256), "fc8.bias": torch.zeros(10)}
        else:
            heads = ("loss1/conv.weight", "loss1/classifier.weight", "loss2/fc.bias", "loss3/classifier.weight")
            weights |= {key: torch.zeros(1) for key in heads}
    if name == "googlenet":  # as Caffe writes them
        weights = {
            f"{key.rpartition('.')[0].replace('.', '/')}.{key.rpartition('.')[2]}": w for key, w in weights.items()
        }
        assert {"conv1/7x7_s2.weight", "inception_3a/5x5_reduce.bias", "inception_5b/pool_proj.weight"} <= set(weights)
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    return weights, str(path)


@pytest.mark.fidelity
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("classifier", [False, True])
def test_converted_caffe_weights_fill_the_network(name, classifier, tmp_path):
    weights, path = caffe_file(name, tmp_path / "caffe.pth", classifier)
    model = MODELS[name](num_classes=3, width=4, preprocessing="caffe", init_from=path)
    weights = {key.replace("/", "."): w for key, w in weights.items()}
    for key, value in model.network.state_dict().items():
        if classifier and key.startswith("score"):
            assert (value == 0).all()
        elif not classifier or not key.startswith("upscore"):
            assert torch.equal(value.flatten(), weights[key].flatten()), key
    with pytest.raises(ValueError, match=r"BGR.*Set model\.preprocessing to caffe"):
        MODELS[name](num_classes=3, width=4, init_from=path)
    with pytest.raises(ValueError, match='has layers of Caffe, but trunk is "torchvision"'):
        MODELS[name](num_classes=3, width=4, trunk="torchvision", preprocessing="caffe", init_from=path)
    del weights["conv1.bias" if name == "caffenet" else "inception_4c.3x3.bias"]
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"lacks (conv1|inception_4c\.3x3) "):
        MODELS[name](num_classes=3, width=4, preprocessing="caffe", init_from=path)


def test_a_torchvision_file_fills_the_trunk_of_its_kind(tmp_path):
    theirs = random_googlenet()
    torch.save(theirs.state_dict(), tmp_path / "googlenet.pth")
    path = str(tmp_path / "googlenet.pth")
    model = FCN32sGoogLeNet(num_classes=3, trunk="torchvision", init_from=path)
    middle = model.network.get_submodule("inception_3a.5x5").weight[:, :, 1:4, 1:4]
    norm = theirs.inception3a.branch3[1].bn
    scale = norm.weight / (norm.running_var + 0.001).sqrt()
    torch.testing.assert_close(middle, theirs.inception3a.branch3[1].conv.weight * scale[:, None, None, None])
    with pytest.raises(ValueError, match='has layers of torchvision, but trunk is "bvlc"'):
        FCN32sGoogLeNet(num_classes=3, init_from=path)


def test_the_trunks_do_not_take_each_others_checkpoints(tmp_path):
    checkpoint = {"state_dict": {f"network.{k}": w for k, w in FCNNetwork(3, "32s", width=4).state_dict().items()}}
    torch.save(checkpoint, tmp_path / "vgg.ckpt")
    with pytest.raises(ValueError, match="fc6"):
        FCN32sAlexNet(num_classes=3, width=4, init_from=str(tmp_path / "vgg.ckpt"))


# ---------------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_and_the_checkpoint(name, tmp_path):
    from pytorch_lightning import Trainer

    torch.manual_seed(0)
    batch = {
        "image": torch.randint(0, 256, (2, 3, 40, 24), dtype=torch.uint8),
        "mask": torch.randint(0, 3, (2, 40, 24), dtype=torch.uint8),
        "image_id": ["a", "b"],
    }
    model = MODELS[name](num_classes=3, width=4, lr=0.1, weight_decay=0.0)
    before = {key: p.clone() for key, p in model.network.state_dict().items()}
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader([batch], batch_size=None))
    moved = {key for key, p in model.network.state_dict().items() if not torch.equal(p, before[key])}
    assert moved == {"score_fr.weight", "score_fr.bias"}  # zero scores shield the trunk at first
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    rebuilt = seglight.load(tmp_path / "last.ckpt")
    model.eval()
    with torch.inference_mode():
        assert type(rebuilt) is MODELS[name]
        assert torch.equal(rebuilt(batch["image"]), model(batch["image"]))
        assert rebuilt(torch.zeros(1, 3, 35, 50, dtype=torch.uint8)).shape == (1, 3, 35, 50)
    other = MODELS[name](num_classes=3, width=4, trunk="torchvision")
    with pytest.raises(ValueError, match=f"trunk='{PAPER[name]}', but this model has trunk='torchvision'"):
        other.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))


def test_the_vgg_models_do_not_take_these_files(tmp_path):
    _, path = caffe_file("caffenet", tmp_path / "caffe.pth")
    with pytest.raises(ValueError, match="not a state dict of FCN-32s"):
        FCN32s(num_classes=3, width=4, preprocessing="caffe", init_from=path)
    assert fcn_trunks.caffe_classifier({"conv1.weight": torch.zeros(1)}) is None
