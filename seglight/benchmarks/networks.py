"""Our networks against peers on the same trunk and input: `python -m seglight.benchmarks.networks`.

The peers' networks differ from the papers' in their heads, so time is compared per floating point operation. Marks: at
most 1.05 of the peer's, forward and forward with backward, and at most 1.1 of its memory at the peak of a training step
(per byte of activations it is the networks that differ, so the ratio of the operations stands beside it). Memory is
what the process grew by, each contestant in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seglight.benchmarks.timing import Row, paired, show

CLASSES = 21


def _ours(model: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from seglight import models

        return getattr(models, model)(num_classes=CLASSES, **options).network

    return build


def _smp(arch: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        return smp.create_model(arch, "resnet50", None, classes=CLASSES, **options)

    return build


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import segmentation

        options = {"weights": None, "weights_backbone": None, "num_classes": CLASSES, "aux_loss": False}
        return getattr(segmentation, name)(**options)

    return build


V3 = {"backbone": "resnet50", "output_stride": 8, "test_output_stride": 8}
PAIRS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    # ours: the peer's name, ours, the peer's
    "DeepLab v3 R50": ("torchvision", _ours("DeepLabV3", **V3), _torchvision("deeplabv3_resnet50")),
    "DeepLab v3+ R50": (
        "smp",
        _ours("DeepLabV3Plus", backbone="resnet50", preprocessing="torch", test_output_stride=16),
        _smp("DeepLabV3Plus", decoder_atrous_rates=(6, 12, 18)),
    ),
    "Semantic FPN R50": ("smp", _ours("SemanticFPN"), _smp("FPN")),
    "PSPNet R50": (
        "torchvision FCN",
        _ours("PSPNet", backbone="resnet50", loss_weights={"out": 1.0}),
        _torchvision("fcn_resnet50"),
    ),
    "FCN-32s": ("torchvision VGG16", _ours("FCN32s"), lambda: _vgg16()),
}


def _vgg16() -> nn.Module:
    from torchvision.models import vgg16

    return vgg16().features


def main(argv: list[str] | None = None) -> int:
    """Print a table per pair."""
    parser = argparse.ArgumentParser(prog="seglight bench networks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PAIRS)}; all without")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", type=int, default=256, help="of the square input in pixels (smp: a multiple of 16)")
    parser.add_argument("--memory-of", nargs=2, metavar=("NAME", "WHO"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.memory_of:
        name, who = options.memory_of
        print(json.dumps(_growth(PAIRS[name][1 if who == "seglight" else 2](), options.side)))
        return 0
    for name in options.names or PAIRS:
        peer, ours, theirs = PAIRS[name]
        _compare(name, {"seglight": ours(), peer: theirs()}, peer, options)
    return 0


def _compare(name: str, networks: dict[str, nn.Module], peer: str, options: argparse.Namespace) -> None:
    image = torch.randn(2, 3, options.side, options.side)
    work = {who: _operations(network, image) for who, network in networks.items()}
    for what, call in (("forward", _forward), ("forward and backward", _backward)):
        contestants = {who: (lambda n=network, c=call: c(n, image)) for who, network in networks.items()}
        size = f"2 x 3 x {options.side} x {options.side}"
        rows = paired(contestants, peer, options.rounds, {w: f"{f:.1f} GFLOPs" for w, f in work.items()},
                      f"{name}, {what}, {size}")  # fmt: skip
        ratio = next(row.ratio for row in rows if row.name == "seglight") * work[peer] / work["seglight"]
        print(f"time per operation: {ratio:.3f} of {peer}'s; mark <= 1.05, {'met' if ratio <= 1.05 else 'MISSED'}\n")
    grown = {who: _memory(name, who, options.side) for who in networks}
    ratio = grown["seglight"] / grown[peer]
    rows = [Row(who, mib, mib / grown[peer], f"{work[who]:.1f} GFLOPs") for who, mib in grown.items()]
    show(rows, peer, 1, f"{name}, MiB at the peak of a training step")
    print(f"memory: {ratio:.3f} of {peer}'s; mark <= 1.1, {'met' if ratio <= 1.1 else 'MISSED'}\n")


def _out(result: object) -> Tensor:
    return result["out"] if isinstance(result, dict) else result


def _forward(network: nn.Module, image: Tensor) -> None:
    network.eval()
    with torch.inference_mode():
        _out(network(image))


def _backward(network: nn.Module, image: Tensor) -> None:
    network.train()
    network.zero_grad(set_to_none=True)
    _out(network(image)).mean().backward()


def _operations(network: nn.Module, image: Tensor) -> float:
    """1e9 floating point operations of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(image)
    return counter.get_total_flops() / 1e9


def _growth(network: nn.Module, side: int) -> float:
    """MiB that a process grows by in its second training step, at the peak."""
    torch.set_num_threads(1)
    before = _peak()
    image = torch.randn(2, 3, side, side)
    for _ in range(2):
        _backward(network, image)
    return _peak() - before


def _peak() -> float:
    """MiB of memory that this process had at most, on Linux: `ru_maxrss` begins with the peak of the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _memory(name: str, who: str, side: int) -> float:
    who = "seglight" if who == "seglight" else "peer"
    command = [sys.executable, "-m", "seglight.benchmarks.networks", "--memory-of", name, who, "--side", str(side)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


if __name__ == "__main__":
    raise SystemExit(main())
