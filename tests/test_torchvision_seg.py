"""torchvision's segmentation networks: its published files load unchanged, and nothing else does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import seglight
from seglight.models.torchvision_seg import ARCHITECTURES, TorchvisionSegmentation

COUNTS = {
    "fcn_resnet50": 35_322_218,
    "fcn_resnet101": 54_314_346,
    "deeplabv3_resnet50": 42_004_074,
    "deeplabv3_resnet101": 60_996_202,
    "deeplabv3_mobilenet_v3_large": 11_029_328,
    "lraspp_mobilenet_v3_large": 3_221_538,
}


def resnet_file(arch, classes=21, aux=True):
    """A stand-in with the keys and shapes of a published file, spelt out; each tensor is one number, repeated."""
    shapes = {}

    def conv(name, *shape):
        shapes[f"{name}.weight"] = shape

    def norm(name, channels):
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{key}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("backbone.conv1", 64, 3, 7, 7)
    norm("backbone.bn1", 64)
    channels = 64
    for stage, units in enumerate((3, 4, 6 if arch.endswith("50") else 23, 3), start=1):
        width = 32 * 2**stage
        for unit in range(units):
            name = f"backbone.layer{stage}.{unit}"
            for i, shape in enumerate(((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)), 1):
                conv(f"{name}.conv{i}", *shape)
                norm(f"{name}.bn{i}", shape[0])
            if unit == 0:
                conv(f"{name}.downsample.0", 4 * width, channels, 1, 1)
                norm(f"{name}.downsample.1", 4 * width)
            channels = 4 * width
    heads = [("aux_classifier", 1024)] if aux else []
    if arch.startswith("fcn"):
        heads.append(("classifier", 2048))
    else:
        for i, side in enumerate((1, 3, 3, 3)):
            conv(f"classifier.0.convs.{i}.0", 256, 2048, side, side)
            norm(f"classifier.0.convs.{i}.1", 256)
        conv("classifier.0.convs.4.1", 256, 2048, 1, 1)
        norm("classifier.0.convs.4.2", 256)
        conv("classifier.0.project.0", 256, 1280, 1, 1)
        norm("classifier.0.project.1", 256)
        conv("classifier.1", 256, 256, 3, 3)
        norm("classifier.2", 256)
        shapes.update({"classifier.4.weight": (classes, 256, 1, 1), "classifier.4.bias": (classes,)})
    for head, width in heads:
        conv(f"{head}.0", width // 4, width, 3, 3)
        norm(f"{head}.1", width // 4)
        shapes.update({f"{head}.4.weight": (classes, width // 4, 1, 1), f"{head}.4.bias": (classes,)})
    return {name: torch.tensor(float(i % 97)).expand(shape) for i, (name, shape) in enumerate(shapes.items())}


def write(path, content):
    torch.save(content, path)
    return str(path)


def small(**options):
    torch.manual_seed(0)
    return TorchvisionSegmentation(num_classes=3, **{"arch": "lraspp_mobilenet_v3_large", **options})


def save(model, path):
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


@pytest.mark.fidelity
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_networks_are_those_of_torchvision(arch):
    with torch.device("meta"):
        model = TorchvisionSegmentation(num_classes=21, arch=arch)
        assert sum(p.numel() for p in model.network.parameters()) == COUNTS[arch]
        outputs = model.network.eval()(torch.empty(2, 3, 65, 50))
    assert {name: tuple(out.shape) for name, out in outputs.items()} == dict.fromkeys(
        model.loss_weights, (2, 21, 65, 50)
    )
    assert model.loss_weights == ({"out": 1.0} if arch.startswith("lraspp") else {"out": 1.0, "aux": 0.5})
    assert model.align_corners is False and model.preprocessing == "torch"


@pytest.mark.fidelity
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_published_weights_have_these_counts_and_vocs_classes(arch):
    from torchvision.models import get_model_weights

    from seglight.data.voc import VOC

    meta = get_model_weights(arch).COCO_WITH_VOC_LABELS_V1.meta
    assert meta["num_params"] == COUNTS[arch]
    assert [name.strip("_") for name in meta["categories"]] == list(VOC.classes)


@pytest.mark.fidelity
@pytest.mark.parametrize("arch", ["fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_resnet101"])
def test_a_published_file_loads_strictly_under_its_own_names(arch, tmp_path):
    content = resnet_file(arch)
    path = write(tmp_path / "published.pth", content)
    model = TorchvisionSegmentation(num_classes=21, arch=arch, init_from=path)
    loaded = model.network.state_dict()
    assert loaded.keys() == content.keys()
    assert all(torch.equal(loaded[name].float(), weight) for name, weight in content.items())


def test_what_of_a_published_file_may_stay_out(tmp_path, caplog):
    path = write(tmp_path / "published.pth", resnet_file("fcn_resnet50"))
    inference = TorchvisionSegmentation(num_classes=21, arch="fcn_resnet50", aux=False, init_from=path)
    assert inference.network.aux_classifier is None and inference.loss_weights == {"out": 1.0}
    caplog.set_level("INFO", "seglight.models.weights")
    other = TorchvisionSegmentation(
        num_classes=3, arch="fcn_resnet50", init_from=path, init_without=["classifier.4", "aux_classifier.4"]
    )
    assert other.network.classifier[4].weight.shape[0] == 3
    assert "As initialised: aux_classifier.4, classifier.4." in caplog.text
    with pytest.raises(ValueError, match=r"classifier\.4\.(weight|bias) is \(21,.* but \(3,.*model\.init_without"):
        TorchvisionSegmentation(num_classes=3, arch="fcn_resnet50", init_from=path)
    with pytest.raises(ValueError, match=r"lacks .*classifier\.0\.convs\.0\.0.* and has .* in excess"):
        TorchvisionSegmentation(num_classes=21, arch="deeplabv3_resnet50", init_from=path)
    with pytest.raises(ValueError, match='expect preprocessing "torch", not "half"'):
        TorchvisionSegmentation(num_classes=21, arch="fcn_resnet50", init_from=path, preprocessing="half")
    path = write(tmp_path / "without.pth", resnet_file("fcn_resnet50", aux=False))
    with pytest.raises(ValueError, match=r"lacks aux_classifier\.0, aux_classifier\.1, aux_classifier\.4"):
        TorchvisionSegmentation(num_classes=21, arch="fcn_resnet50", init_from=path)


def test_pretrained_takes_the_published_file(monkeypatch):
    from torchvision.models import get_model_weights

    enum = get_model_weights("fcn_resnet50")
    asked = []

    def download(self, *args, **kwargs):
        asked.append((self.url, kwargs["check_hash"]))
        return resnet_file("fcn_resnet50")

    monkeypatch.setattr(enum, "get_state_dict", download)
    model = TorchvisionSegmentation(num_classes=21, arch="fcn_resnet50", pretrained=True)
    assert asked == [("https://download.pytorch.org/models/fcn_resnet50_coco-1167a1af.pth", True)]
    assert torch.equal(model.network.classifier[4].bias, resnet_file("fcn_resnet50")["classifier.4.bias"])


def test_imagenet_asks_torchvision_for_the_trunk_alone(monkeypatch):
    import torchvision.models.segmentation as zoo

    asked = {}
    original = zoo.lraspp_mobilenet_v3_large

    def build(**options):
        asked.update(options)
        return original(**{**options, "weights_backbone": None})

    monkeypatch.setattr(zoo, "lraspp_mobilenet_v3_large", build)
    small(pretrained="imagenet")
    assert asked == {"weights": None, "weights_backbone": "IMAGENET1K_V1", "num_classes": 3}


def test_training_loss_has_the_auxiliary_head_at_one_half():
    model = small(arch="deeplabv3_mobilenet_v3_large")
    batch = {
        "image": torch.randint(0, 256, (2, 3, 33, 40), dtype=torch.uint8),
        "mask": torch.randint(0, 3, (2, 33, 40), dtype=torch.uint8),
        "image_id": ["a", "b"],
    }
    losses = model.loss(model.network(model.normalize(batch["image"])), batch)
    assert torch.isclose(losses["loss"], losses["loss_out"] + 0.5 * losses["loss_aux"])
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.network.parameters())


def test_checkpoint_rebuilds_the_model(tmp_path):
    trained = small().eval()
    image = torch.randint(0, 256, (1, 3, 37, 50), dtype=torch.uint8)
    with torch.inference_mode():
        expected = trained(image)
        rebuilt = seglight.load(save(trained, tmp_path / "best.ckpt"))
        assert type(rebuilt) is TorchvisionSegmentation and torch.equal(rebuilt(image), expected)
    again = small(init_from=str(tmp_path / "best.ckpt"))
    for ours, theirs in zip(again.network.parameters(), trained.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    names = ["classifier.low_classifier", "classifier.high_classifier"]
    kept = TorchvisionSegmentation(
        num_classes=4, arch="lraspp_mobilenet_v3_large", init_from=str(tmp_path / "best.ckpt"), init_without=names
    )
    assert kept.network.classifier.low_classifier.weight.shape[0] == 4
    assert isinstance(again.network, nn.Module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "deeplabv3_resnet18"}, "no segmentation network 'deeplabv3_resnet18'; the nearest are deeplabv3_res"),
        ({"pretrained": True}, "know VOC's 21 classes, but num_classes is 3.*imagenet"),
        ({"pretrained": "coco"}, "pretrained is 'coco'; choose true, false"),
        ({"pretrained": "imagenet", "preprocessing": "caffe"}, 'preprocessing is "caffe".*"torch"'),
        ({"pretrained": "imagenet", "init_from": "x.pth"}, "Both pretrained and init_from='x.pth'"),
        ({"arch": "fcn_resnet50", "loss_weights": {"out": 1.0}}, "auxiliary head untrained; set model.aux to false"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
