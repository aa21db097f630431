"""Building blocks that several networks share: He-initialised and bilinear layers, and the map behind crop offsets."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn


class HeConv2d(nn.Conv2d):
    """A convolution for a ReLU network from scratch: weights N(0, 2 / (k * k * C_in)), biases 0 (He et al. 2015)."""

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def bilinear_kernel(size: int) -> Tensor:
    """Kernel of a deconvolution that interpolates bilinearly, float32 (size, size).

    The tent has half width ``f = (size + 1) // 2`` and its peak in the middle of the kernel (FCN, section 3.3). With a
    stride of ``f`` and no padding it maps a constant to the same constant, away from the border of the input.
    """
    half_width = (size + 1) // 2
    centre = half_width - 1 if size % 2 else half_width - 0.5
    tent = 1 - (torch.arange(size, dtype=torch.float64) - centre).abs() / half_width
    return torch.outer(tent, tent).float()


class BilinearDeconv(nn.ConvTranspose2d):
    """Transposed convolution without bias or padding that starts as bilinear upsampling of each channel by itself.

    Args:
        channels: C, in and out. The weight is the full (C, C, size, size) of the reference, zero off the diagonal.
        size: kernel side in output pixels.
        stride: upsampling factor.
        learn: train the weight. Otherwise it stays out of the optimiser, yet remains a parameter: it is counted and
            stored like the reference's.

    Shapes: (B, C, h, w) -> (B, C, (h - 1) * stride + size, (w - 1) * stride + size).
    """

    def __init__(self, channels: int, size: int, stride: int, learn: bool = False):
        super().__init__(channels, channels, size, stride, bias=False)
        self.weight.requires_grad_(learn)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weight to bilinear interpolation."""
        nn.init.zeros_(self.weight)
        channels = torch.arange(self.in_channels)
        self.weight[channels, channels] = bilinear_kernel(self.kernel_size[0]).to(self.weight)


def global_mean(x: Tensor) -> Tensor:
    """Mean over rows and columns, (B, C, H, W) -> (B, C, 1, 1); its gradient has the memory format of `x`.

    That of `x.mean((2, 3))` is contiguous, whatever `x` is: on a channels_last map, each sum with it would then walk
    through memory in two orders, and so would everything before it.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).mean((1, 2), keepdim=True).permute(0, 3, 1, 2)
    return x.mean((2, 3), keepdim=True)


class CoordinateMap(NamedTuple):
    """Where a pixel of a feature map lies in the map it was computed from: ``position = scale * index + shift``.

    The position is that of the centre of the pixel's receptive field, padding included, in exact fractions.
    """

    scale: Fraction
    shift: Fraction

    @classmethod
    def along(cls, layers: Iterable[nn.Module]) -> CoordinateMap:
        """Compose the maps of a path of convolutions, poolings and deconvolutions, first layer first.

        Layers without a kernel (activations, dropout) leave coordinates alone. Kernels must be square.
        """
        scale, shift = Fraction(1), Fraction(0)
        for layer in layers:
            if not hasattr(layer, "kernel_size"):
                continue
            kernel, stride, padding = (_side(layer, name) for name in ("kernel_size", "stride", "padding"))
            dilation = _side(layer, "dilation") if hasattr(layer, "dilation") else 1
            offset = Fraction(dilation * (kernel - 1), 2) - padding
            if isinstance(layer, nn.ConvTranspose2d):  # the inverse: input i lies at stride * i + offset of the output
                scale, shift = scale / stride, shift - scale * offset / stride
            else:
                scale, shift = scale * stride, shift + scale * offset
        return cls(scale, shift)


def crop_offset(path: Iterable[nn.Module], onto: Iterable[nn.Module] = ()) -> int:
    """Rows (and columns) to cut from the top and left of one map so that it lies on another.

    Args:
        path: layers from a common ancestor to the map that gets cropped.
        onto: layers from the same ancestor to the map it is laid on; none means the ancestor itself.

    Raises:
        ValueError: if the two maps have different strides or lie apart by a fraction of a pixel.
    """
    cropped, target = CoordinateMap.along(path), CoordinateMap.along(onto)
    offset = (target.shift - cropped.shift) / cropped.scale
    if cropped.scale != target.scale or offset.denominator != 1:
        raise ValueError(
            f"No crop aligns these two maps: a pixel spans {cropped.scale} pixels of the ancestor in the first and "
            f"{target.scale} in the second, and they lie {offset} pixels apart. The strides must be equal and the "
            "distance whole; change a kernel size, stride or padding of the path."
        )
    return int(offset)


def _side(layer: nn.Module, name: str) -> int:
    value = getattr(layer, name)
    return value[0] if isinstance(value, tuple) else value
