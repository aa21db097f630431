"""The layers of a network as text, one a line: name, kind, weight shape or kernel, stride, padding, dilation."""

from __future__ import annotations

from pathlib import Path

from timm.layers import FrozenBatchNormAct2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d


def layer_table(network: nn.Module) -> str:
    lines = []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.ConvTranspose2d | nn.Conv2d):
            kind = "deconv" if isinstance(layer, nn.ConvTranspose2d) else "conv"
            shape = "x".join(map(str, layer.weight.shape)) + (" +bias" if layer.bias is not None else "")
            dilation = f" dilation {layer.dilation[0]}" if layer.dilation[0] > 1 else ""
            groups = f" groups {layer.groups}" if layer.groups > 1 else ""
            lines.append(f"{name} {kind} {shape} stride {layer.stride[0]} padding {layer.padding[0]}{dilation}{groups}")
        elif isinstance(layer, nn.MaxPool2d):
            mode = "ceil" if layer.ceil_mode else "floor"
            lines.append(f"{name} max {layer.kernel_size} stride {layer.stride} padding {layer.padding} {mode}")
        elif isinstance(layer, nn.Dropout | nn.Dropout2d):
            lines.append(f"{name} dropout {layer.p}")
        elif isinstance(layer, nn.Linear):
            lines.append(
                f"{name} linear {'x'.join(map(str, layer.weight.shape))}{'' if layer.bias is None else ' +bias'}"
            )
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm):
            lines.append(f"{name} {type(layer).__name__} {layer.weight.numel()} eps {layer.eps:g}")
        elif isinstance(layer, FrozenBatchNorm2d | FrozenBatchNormAct2d):
            lines.append(f"{name} frozen norm {layer.weight.numel()} eps {layer.eps:g}")
        elif isinstance(layer, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
            lines.append(f"{name} {layer}")
    return "\n".join(lines) + "\n"


def stored(name: str) -> str:
    return (Path(__file__).parent / "layers" / f"{name}.txt").read_text()
