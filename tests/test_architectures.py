"""What every architecture does, at a size that a CPU can run: learn, evaluate, be stored, run in bf16, be exported."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import seglight
from seglight import models

RESNET = {"backbone": "resnet18"}
TINY = {
    "FCN32s": {"width": 4},
    "FCN16s": {"width": 4},
    "FCN8s": {"width": 4},
    "FCN8sAtOnce": {"width": 4},
    "FCN32sAlexNet": {"width": 8},
    "FCN32sGoogLeNet": {"width": 8},
    "ParseNet": {"width": 4, "skip_layers": ["conv4_3", "conv5_3"]},
    "DeconvNet": {"width": 4},
    "UNet": {"width": 4, "in_channels": 3, "test_tile": 204},
    "SemanticFPN": {**RESNET, "pyramid_width": 32, "head_width": 32},
    "PSPNet": {**RESNET, "width": 16},
    "DeepLabV2": {**RESNET},
    "DeepLabV2VGG": {"width": 4},
    "DeepLabV3": {**RESNET, "channels": 16},
    "DeepLabV3Cascade": {**RESNET},
    "DeepLabV3Plus": {"backbone": "xception41", "channels": 16},
    "EncNet": {**RESNET, "width": 16, "codewords": 4},
    "Dilation": {"width": 4},
    "SMP": {"encoder": "resnet18"},
}
CROP = {"UNet": 188, "DeconvNet": 224}
"""Training crop, where 65 will not do."""
NO_GRADIENT = {
    "FCN": ("upscore",),  # bilinear and fixed by default
}
NO_EXPORT = {
    # torch.export cannot trace these yet; the test says when that changes
}


def build(name, **options):
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=3, **{**TINY[name], **options})
    for key, parameter in model.network.named_parameters():
        if not parameter.any() and "score" in key:  # zero by design, until training has begun
            nn.init.normal_(parameter, std=0.01)
    for layer in model.network.modules():
        if isinstance(layer, nn.BatchNorm2d) and not layer.weight.any():  # the last of each block in timm's ResNets
            nn.init.ones_(layer.weight)
    return model


def batch(name, size=None):
    size = size or CROP.get(name, 65)
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(0, 3, (2, size, size), generator=generator, dtype=torch.uint8)
    mask[:, :2] = 255
    image = torch.randint(0, 256, (2, 3, size, size), generator=generator, dtype=torch.uint8)
    return {"image": image, "mask": mask, "image_id": ["a", "b"]}


def loss(model, data):
    return model.loss(model.network(model.normalize(data["image"])), data)["loss"]


def test_no_architecture_is_left_out():
    """Instance models have the same tests beside their own: test_maskrcnn, test_panet, test_fpn_proposals."""
    contracts = {"BaseModel", "SemanticModel", "TorchvisionSegmentation"}
    semantic = {name for name in models.__all__ if getattr(getattr(models, name), "task", "semantic") == "semantic"}
    assert set(TINY) == semantic - contracts


@pytest.mark.fidelity
@pytest.mark.parametrize("name", TINY)
def test_every_parameter_gets_a_gradient(name):
    model = build(name).train()
    value = loss(model, batch(name))
    assert torch.isfinite(value)
    value.backward()
    for key, parameter in model.network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
            assert parameter.grad.any(), f"{key} is in the network, but nothing depends on it"


@pytest.mark.parametrize("name", TINY)
def test_a_batch_without_labels_costs_nothing(name):
    model, data = build(name).train(), batch(name)
    data["mask"][:] = 255
    if name == "EncNet":  # its presence loss has something to say of an empty label: no class is there
        model = build(name, loss_weights={"out": 1.0}).train()
    assert loss(model, data) == 0


@pytest.mark.fidelity
@pytest.mark.parametrize("name", TINY)
def test_evaluation_at_two_sizes_and_from_a_checkpoint(name, tmp_path):
    model = build(name)
    loss(model.train(), batch(name))  # running statistics that are not the initial ones
    model.eval()
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "it.ckpt")
    again = seglight.load(tmp_path / "it.ckpt")
    assert not again.training
    for height, width in ((65, 65), (50, 83)):
        image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
        with torch.inference_mode():
            scores = model(image)
            assert scores.shape == (1, 3, height, width) and torch.isfinite(scores).all()
            assert torch.equal(scores, again(image))
            labels, _ = model.labels([image[0], image[0]])
        assert [label.shape for label in labels] == [(height, width)] * 2
        assert torch.equal(labels[0], labels[1])


@pytest.mark.parametrize("name", TINY)
def test_autocast(name):
    """bfloat16 as on a GPU; the loss stays near that of float32."""
    model, data = build(name).train(), batch(name)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = 0.0
    with torch.no_grad():
        exact = loss(model, data)
        with torch.autocast("cpu", torch.bfloat16):
            rough = loss(model, data)
    assert rough.dtype == torch.float32
    assert abs(float(rough - exact)) < 0.05 * float(exact) + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_export(name):
    network = build(name).network.eval()
    channels = 3
    image = torch.randn(1, channels, CROP.get(name, 65), CROP.get(name, 65))
    if name in NO_EXPORT:
        with pytest.raises(NO_EXPORT[name]):
            torch.export.export(network, (image,))
        return
    with torch.no_grad():
        exported = torch.export.export(network, (image,)).module()
        ours, theirs = network(image), exported(image)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.allclose(ours[key], theirs[key], atol=1e-5), key


def saved(model, path):
    content = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(content)
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("name", TINY)
def test_starting_from_a_checkpoint_of_its_own_takes_all_weights(name, tmp_path, caplog):
    first = build(name)
    path = saved(first, tmp_path / "first.ckpt")
    second = getattr(models, name)(num_classes=3, init_from=path, **TINY[name])
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    theirs = first.network.state_dict()
    assert all(torch.equal(weight, theirs[key]) for key, weight in second.network.state_dict().items())
    *_, (key, parameter) = second.network.named_parameters()
    nn.init.constant_(parameter, 7.0)
    second.start_from(torch.load(path, weights_only=True), path, (key.rpartition(".")[0],))
    assert (parameter == 7).all()  # `init_without`


def test_starting_from_another_dilation_is_said(tmp_path, caplog):
    path = saved(models.PSPNet(num_classes=3, dilation="lagged-first", **TINY["PSPNet"]), tmp_path / "first.ckpt")
    models.PSPNet(num_classes=3, init_from=path, **TINY["PSPNet"])
    (message,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "with dilation='lagged-first', this model has dilation='uniform'" in message
