"""The smp baselines: any size in, scores of that size out; wrong names are refused with the nearest right ones."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from torch import nn

import seglight
from seglight.models import smp as smp_module
from seglight.models.smp import SMP, SMPNetwork

ARCHITECTURES = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN",
                 "UPerNet", "Segformer")  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("size", [(161, 203), (160, 224), (33, 1)])
def test_every_architecture_takes_any_size(arch, size):
    with torch.device("meta"):
        network = SMPNetwork(5, arch, "resnet18").eval()
        assert network(torch.empty(2, 3, *size))["out"].shape == (2, 5, *size)


def test_padding_changes_nothing_where_smp_needs_none_and_is_cut_off_again():
    torch.manual_seed(0)
    network = SMPNetwork(3, "FPN", "resnet18").eval()
    image = torch.randn(1, 3, 33, 70)
    padded = torch.zeros(1, 3, 64, 96)
    padded[..., :33, :70] = image
    with torch.inference_mode():
        assert torch.equal(network(padded)["out"], network.model(padded))
        assert torch.equal(network(image)["out"], network.model(padded)[..., :33, :70])


def test_options_reach_the_architecture():
    with torch.device("meta"):
        network = SMPNetwork(3, "unet", "resnet18", options={"encoder_depth": 3, "decoder_channels": [8, 8, 8]})
        assert network.multiple == 8
        assert network(torch.empty(1, 3, 33, 70))["out"].shape == (1, 3, 33, 70)


def test_timm_encoders_take_timm_options():
    network = SMPNetwork(2, "DPT", "tu-vit_tiny_patch16_224", options={"dynamic_img_size": True}).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 50, 70))["out"].shape == (1, 2, 50, 70)


def test_timm_encoders_name_their_weights_by_a_tag(monkeypatch, recwarn):
    """smp wants to know only whether there are any, and warns where it gets a name."""
    import timm

    create, asked = timm.create_model, set()

    def record(name, pretrained=False, **options):
        asked.add((name, pretrained))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", record)
    with torch.device("meta"):
        SMPNetwork(2, "Unet", "tu-resnet18.a1_in1k")
        assert asked == {("resnet18.a1_in1k", False)}
        SMPNetwork(2, "Unet", "tu-resnet18.a1_in1k", "imagenet")
    assert ("resnet18.a1_in1k", True) in asked
    assert not [warning for warning in recwarn if "encoder_weights" in str(warning.message)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "Unetplusplu"}, r"no arch 'Unetplusplu'; the nearest are UnetPlusPlus, Unet,"),
        ({"arch": "nonsense"}, r"no arch 'nonsense'; .*DeepLabV3Plus"),
        ({"encoder": "resnet35"}, r"no encoder 'resnet35'; the nearest are .*resnet34"),
        ({"encoder": "tu-resnet35"}, r"no encoder 'tu-resnet35'; the nearest are .*tu-resnet34"),
        ({"encoder_weights": "imagnet"}, r"no encoder_weights 'imagnet'; the nearest are imagenet"),
        ({"options": {"decoder_chanels": [1]}}, r"no options 'decoder_chanels'; the nearest are decoder_channels,"),
        ({"options": {"classes": 3}}, r"no options 'classes'"),
        ({"options": {"aux_params": {"classes": 2}}}, r"no options 'aux_params'"),
        ({"encoder": "tu-resnet18", "options": {"aux_params": {"classes": 2}}}, r"no options 'aux_params'"),
    ],
)
def test_wrong_names_are_refused_with_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        SMPNetwork(3, **arguments)


@pytest.mark.parametrize(
    ("mean", "std", "space", "top", "family", "accepted"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "RGB", 1, "torch", True),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "RGB", 1, "half", False),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "RGB", 1, "torch", False),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "RGB", 1, "half", True),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "BGR", 1, "torch", False),
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "RGB", 255, "torch", True),
    ],
)
def test_pretrained_weights_must_match_the_preprocessing(monkeypatch, mean, std, space, top, family, accepted):
    import segmentation_models_pytorch as smp

    wanted = {"input_space": space, "input_range": [0, top], "mean": list(mean), "std": list(std)}
    asked = []
    monkeypatch.setattr("seglight.models.smp.SMPNetwork", lambda *arguments: asked.append(arguments) or nn.Identity())
    monkeypatch.setattr(smp.encoders, "get_preprocessing_params", lambda encoder, weights: wanted)
    if accepted:
        SMP(num_classes=3, encoder="resnet18", encoder_weights="imagenet", preprocessing=family)
    else:
        with pytest.raises(ValueError, match="imagenet weights of resnet18 expect"):
            SMP(num_classes=3, encoder="resnet18", encoder_weights="imagenet", preprocessing=family)
    assert asked == [(3, "Unet", "resnet18", "imagenet", None)]


def test_a_training_step_moves_every_weight():
    from pytorch_lightning import Trainer

    torch.manual_seed(0)
    model = SMP(num_classes=3, encoder="resnet18", lr=0.1, options={"decoder_channels": [16, 16, 8, 8, 8]})
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    batch = {
        "image": torch.randint(0, 256, (2, 3, 65, 97), dtype=torch.uint8),
        "mask": torch.randint(0, 3, (2, 65, 97), dtype=torch.uint8),
        "image_id": ["a", "b"],
    }
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader([batch], batch_size=None))
    assert not [name for name, p in model.network.named_parameters() if torch.equal(p, before[name])]


def test_checkpoint_rebuilds_the_model_without_a_download(tmp_path):
    model = SMP(num_classes=3, arch="FPN", encoder="resnet18").eval()
    model.init_args["encoder_weights"] = "imagenet"  # as if it had been trained from them
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "best.ckpt")
    rebuilt = seglight.load(tmp_path / "best.ckpt")
    image = torch.randint(0, 256, (2, 3, 33, 50), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(rebuilt(image), model(image))
    with pytest.raises(ValueError, match="arch='FPN'"):
        SMP(num_classes=3, arch="Unet", encoder="resnet18").on_load_checkpoint(checkpoint)


def test_smp_is_imported_only_when_a_network_is_built(monkeypatch):
    """A fresh copy of the module loads where neither library can be imported."""
    for name in ("segmentation_models_pytorch", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("fresh", smp_module.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    with pytest.raises(ImportError):
        fresh.SMPNetwork(3)


@pytest.mark.parametrize("encoder", ["timm-efficientnet-b0", "tu-regnetx_002"])
def test_synchronised_batch_norm_keeps_the_activations(encoder):
    """timm's batch norms contain theirs, and torch's conversion, which several GPUs train with, drops it."""
    network = SMPNetwork(3, "Unet", encoder).eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(image)["out"]
        assert torch.equal(torch.nn.SyncBatchNorm.convert_sync_batchnorm(network).eval()(image)["out"], expected)
