"""On a real GPU: `pytest -m gpu`. What `test_gpu_rehearsal` and `test_gpu_defaults` say without one, said by one.

SEGLIGHT_TEST_DEVICE=cpu runs the same code elsewhere, to see that it runs at all. Speed: `seglight bench`, with
`--device cuda` for the CRF.
"""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace

import pytest
import torch
from test_architectures import NO_GRADIENT, TINY, batch, build
from tiny import Blocks, Tiny

from seglight.benchmarks import detectors
from seglight.cli import main

DEVICE = torch.device(os.environ.get("SEGLIGHT_TEST_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]


@contextlib.contextmanager
def never_waiting():
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def moved(data):
    return {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in data.items()}


def loss_of(model, data):
    return model.loss(model.network(model.normalize(data["image"])), data)["loss"]


@pytest.mark.parametrize("name", TINY)
def test_a_step_in_bf16_is_that_of_the_cpu_and_never_waits(name):
    model, data = build(name).eval(), batch(name)  # no dropout
    expected = loss_of(model, data)
    model.to(DEVICE)
    model.channels_last = True
    model.network.to(memory_format=torch.channels_last)
    data = moved(data)
    trained = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, fused=True)

    def step():
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = loss_of(model, data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    first = step()
    with never_waiting():
        step()
    assert first.item() == pytest.approx(expected.item(), rel=0.05)
    fixed = NO_GRADIENT.get(name[:3], ())
    for key, parameter in model.network.named_parameters():
        if parameter.requires_grad and not key.startswith(fixed):
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", TINY)
def test_labels_are_those_of_the_cpu(name):
    model, data = build(name).eval(), batch(name)
    with torch.inference_mode():
        here, _ = model.labels(list(data["image"]))
        there, _ = model.to(DEVICE).labels(list(data["image"].to(DEVICE)))
    same = [(one == other.cpu()).float().mean() for one, other in zip(here, there, strict=True)]
    assert min(same) > 0.999


def test_a_step_of_mask_rcnn_waits_as_often_as_its_parts_say(recwarn):
    """3 B + 8, and the constants, B + 4, that torchvision copies."""
    options = Namespace(size=(64, 96), objects=3, trunk="resnet18", images=2)
    theirs = detectors._torchvision("resnet18", options.size)
    from seglight.models import MaskRCNN

    model = MaskRCNN(detectors.CLASSES, backbone="resnet18")
    model.start_from(theirs.state_dict(), "torchvision's weights")
    model.train().to(DEVICE)
    images, targets = detectors._samples(options)
    images, targets = [image.to(DEVICE) for image in images], [moved(target) for target in targets]

    def step():
        losses, _ = model.network([model.normalize(image[None])[0] for image in images], targets)
        sum(losses.values()).backward()

    step()
    if DEVICE.type == "cuda":
        recwarn.clear()
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in recwarn if "synchroniz" in str(w.message)]
        assert len(waits) <= 4 * 2 + 12


def test_the_command_line_chooses_what_a_gpu_wants(tmp_path, monkeypatch):
    """bf16, channels_last, fused; a resumed run keeps them; clipping is no obstacle; scores are those of the CPU."""
    monkeypatch.chdir(tmp_path)
    words = ["--model", f"{Tiny.__module__}.Tiny", "--data", f"{Blocks.__module__}.Blocks", "--val_every", "2"]
    here = [*words, "--trainer.accelerator", "gpu" if DEVICE.type == "cuda" else "cpu", "--trainer.devices", "1"]
    assert main(["fit", *here, "--out", "run", "--trainer.max_steps", "4"]) == 0
    assert main(["fit", *here, "--out", "run", "--trainer.max_steps", "8", "--resume"]) == 0
    assert main(["fit", *here, "--out", "clip", "--trainer.max_steps", "4", "--trainer.gradient_clip_val", "1.0"]) == 0
    stored = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert stored["global_step"] == 8
    on_gpu = DEVICE.type == "cuda"
    assert bool(stored["optimizer_states"][0]["param_groups"][0]["fused"]) == on_gpu
    assert ("bf16-mixed" in (tmp_path / "run/config.yaml").read_text()) == on_gpu
