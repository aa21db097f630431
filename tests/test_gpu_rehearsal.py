"""What can be said about training on a GPU without one: torch's fake tensors run every operator on shapes alone.

A fake "cuda" tensor refuses to meet one of the CPU, and to tell its values to Python: a step that passes neither mixes
devices nor waits for the device. The layouts of all tensors are tracked too, so operators that would copy a map from
one memory format into the other can be counted, forward and backward.
"""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from test_architectures import TINY, batch, build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seglight import models
from seglight.benchmarks import detectors
from seglight.models import SemanticModel

LRN = "torch's local_response_norm sums over channels in a contiguous tensor of five dimensions"
MIXES = {"FCN32sAlexNet": LRN, "FCN32sGoogLeNet": LRN}
"""Networks in which an operator of torch itself changes the layout of feature maps."""
VIEWS = {f"aten::{name}" for name in ("slice", "view", "detach", "expand", "select", "permute", "transpose")}


def fake(tensor: Tensor, device: str) -> Tensor:
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return copy.contiguous(memory_format=torch.channels_last) if copy.ndim == 4 and copy.is_floating_point() else copy


def rehearse(model: SemanticModel, device: str) -> None:
    """Replace all weights by fake ones on a device, as `BaseModel.setup` lays them out on a GPU."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter, device), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer, device)
    model.channels_last = True
    model.confusion.counts = fake(model.confusion.counts, device)


def step(model, data, device):
    data = {name: fake(value, device) if torch.is_tensor(value) else value for name, value in data.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=device == "cpu"):  # there is none for a fake GPU
        return model.loss(model.network(model.normalize(data["image"])), data)["loss"]


class Copies(TorchDispatchMode):
    """Collects transfers between devices, and operators that meet or make feature maps of both memory formats.

    Images and logits, of three channels here, do not count: images come as they are, and the loss wants its channels
    apart.
    """

    def __init__(self):
        super().__init__()
        self.transfers, self.mixed = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if torch.is_tensor(t)]
        name = function.name().split(".")[0]
        if len({t.device.type for t in tensors}) > 1:
            self.transfers.append(name)
        formats = {self.format_of(t) for t in tensors if t.is_floating_point() and t.ndim == 4}
        if len(formats - {None}) > 1 and name not in VIEWS:
            self.mixed.append(f"{name} {[tuple(t.shape) for t in tensors]}")
        return out

    @staticmethod
    def format_of(t: Tensor) -> str | None:
        if t.shape[1] <= 3 or t.shape[2] * t.shape[3] == 1 or t.stride(1) == 0 or t.stride(3) == 0:
            return None
        return "last" if t.stride(1) == 1 else "first"


@pytest.mark.parametrize("name", TINY)
def test_a_training_step_never_waits_for_the_device(name):
    model, data = build(name).train(), batch(name)
    with FakeTensorMode(), Copies() as seen:
        rehearse(model, "cuda")
        loss = step(model, data, "cuda")
    assert loss.device.type == "cuda" and loss.dtype == torch.float32
    assert not seen.transfers


@pytest.mark.parametrize("name", TINY)
def test_a_training_step_keeps_maps_in_channels_last(name):
    model, data = build(name).train(), batch(name)
    with FakeTensorMode():
        rehearse(model, "cpu")
        with Copies() as seen:
            step(model, data, "cpu").backward()  # a fake GPU has no backward pass
    assert bool(seen.mixed) == (name in MIXES), "\n".join(seen.mixed)


@pytest.mark.parametrize("name", TINY)
def test_evaluation_never_waits_for_the_device(name):
    """Label maps, the confusion matrix, and the loss of a validation."""
    model, data = build(name).eval(), batch(name)
    with torch.inference_mode(), FakeTensorMode(), Copies() as seen:
        rehearse(model, "cuda")
        images, masks = fake(data["image"], "cuda"), fake(data["mask"], "cuda")
        labels, _ = model.labels(list(images))
        for label, mask in zip(labels, masks, strict=True):
            model.confusion.update(label, mask)
    assert labels[0].device.type == "cuda" and labels[0].shape == images.shape[-2:]
    assert not seen.transfers


def test_the_rehearsal_notices_a_wait_a_transfer_and_a_mix():
    with FakeTensorMode(), Copies() as seen:
        x = torch.empty(2, 8, 4, 4, device="cuda")
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(RuntimeError):
            x + torch.empty(2, 8, 4, 4)
        x + torch.empty(2, 8, 4, 4).to("cuda")
        x + x.contiguous(memory_format=torch.channels_last)
    assert seen.transfers == ["aten::_to_copy"]
    assert [name.split()[0] for name in seen.mixed] == ["aten::clone", "aten::add"]


# --------------------------------------------------------------------------------------------------------- detectors


class Waits(TorchDispatchMode):
    """Counts the operators for whose result the host would wait for a GPU: those whose size depends on values.

    Reading a tensor into Python passes no operator on the CPU; `asking` counts that.
    """

    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "nms", "repeat_interleave")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        fills = name.startswith("index_put") and args[2].numel() == 1  # one value for all: masked_fill, within torch
        self.count += name in self.OPERATORS or (by_mask and not fills)
        return function(*args, **(kwargs or {}))

    def asking(self, method):
        def counted(*args, **kwargs):
            self.count += 1
            return method(*args, **kwargs)

        return counted


def test_a_step_of_mask_rcnn_waits_for_the_device_as_often_as_its_parts_say(monkeypatch):
    from torchvision.models.detection import _utils as sampling
    from torchvision.ops import boxes

    # What torchvision does with the proposals of an image on a GPU, and on the CPU with few of them.
    monkeypatch.setattr(boxes, "_batched_nms_vanilla", boxes._batched_nms_coordinate_trick)
    # How often they wait does not depend on how many samples they draw.
    init = sampling.BalancedPositiveNegativeSampler.__init__
    fewer = lambda self, count, share: init(self, min(count, 32), share)  # noqa: E731
    monkeypatch.setattr(sampling.BalancedPositiveNegativeSampler, "__init__", fewer)
    options = Namespace(size=(64, 96), objects=3, trunk="resnet18", images=2)
    theirs = detectors._torchvision("resnet18", options.size)
    count = {}
    for name, make in {"torchvision": detectors._their_step, "seglight": detectors._our_step}.items():
        step = make(theirs, options)
        step()
        with monkeypatch.context() as patch, Waits() as waits:
            for method in ("tolist", "numpy"):
                patch.setattr(Tensor, method, waits.asking(getattr(Tensor, method)))
            step()
        count[name] = waits.count
    assert count == {"torchvision": 12 * 2 + 11, "seglight": 3 * 2 + 8}


@pytest.mark.parametrize("name", ["MaskRCNN", "FPNMaskProposal"])
def test_the_trunk_of_a_detector_works_in_channels_last(name):
    """RoIAlign, behind it, wants rows and gives rows."""
    network = getattr(models, name)(3, backbone="resnet18").network.eval().to(memory_format=torch.channels_last)
    sizes = ((64, 90), (80, 60))
    images = [torch.zeros(1, 3, *size).contiguous(memory_format=torch.channels_last)[0] for size in sizes]
    seen = []
    network.backbone.register_forward_pre_hook(lambda layer, inputs: seen.extend(inputs))
    network.backbone.register_forward_hook(lambda layer, inputs, output: seen.extend(output))
    with torch.no_grad():
        network(images)
    assert len(seen) > 4 and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
