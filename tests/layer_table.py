"""The layers of a network as text, one a line: name, kind, weight shape or kernel, stride, padding."""

from __future__ import annotations

from pathlib import Path

from torch import nn


def layer_table(network: nn.Module) -> str:
    lines = []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.ConvTranspose2d | nn.Conv2d):
            kind = "deconv" if isinstance(layer, nn.ConvTranspose2d) else "conv"
            shape = "x".join(map(str, layer.weight.shape)) + (" +bias" if layer.bias is not None else "")
            lines.append(f"{name} {kind} {shape} stride {layer.stride[0]} padding {layer.padding[0]}")
        elif isinstance(layer, nn.MaxPool2d):
            mode = "ceil" if layer.ceil_mode else "floor"
            lines.append(f"{name} max {layer.kernel_size} stride {layer.stride} padding {layer.padding} {mode}")
        elif isinstance(layer, nn.Dropout):
            lines.append(f"{name} dropout {layer.p}")
    return "\n".join(lines) + "\n"


def stored(name: str) -> str:
    return (Path(__file__).parent / "layers" / f"{name}.txt").read_text()
