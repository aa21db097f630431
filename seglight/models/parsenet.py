"""ParseNet (Liu, Rabinovich, Berg, 2015, arXiv 1506.04579): global context beside local features, both L2-normalised.

A feature map is L2-normalised at every location and rescaled by a learned factor per channel; its mean over the image
gets the same treatment and is repeated at every location; both are concatenated and classified. The norms make layers
comparable whose magnitudes differ by orders, so that any set of layers can be fused.

Two trunks (`seglight.models.vgg`): reduced VGG16 at stride 8 for VOC, and that of FCN-32s for PASCAL-Context.

    parameters, K = 21             fc7 with context    conv4_3 + conv5_3 + fc7 with context
    reduced VGG16                  20,528,981          20,551,509   (K = 60: 20,671,356)

Published: VOC 2012 test 69.8 (trained on SBD), PASCAL-Context val 40.4. Recipe: SGD, momentum 0.9, weight decay 5e-4,
poly schedule with power 0.9, which this paper introduced; one pass at test time, no CRF.

Not known from the paper, hence options with a default: which layers are fused on VOC (here fc7 alone), and the learning
rate of a normalised loss (experiments/voc: 1e-3). Ours: layers of different stride meet on the grid of the finest one,
each placed by the exact coordinates of its pixels; beyond the outermost feature the border is repeated. The scores get
to the image in the same way, where the release has a fixed deconvolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seglight.models.blocks import CoordinateMap, global_mean
from seglight.models.semantic import SemanticModel
from seglight.models.vgg import VGG16Trunk, start_trunk
from seglight.models.weights import check_start

Trunk = Literal["vgg16_reduced", "vgg16_fcn32s"]
IMAGE = CoordinateMap(Fraction(1), Fraction(0))


class L2NormScale(nn.Module):
    """Divide each location's feature vector by its L2 norm, then multiply each channel by a learned scale.

    y_c = scale_c * x_c / sqrt(sum_c x_c^2 + 1e-10), as ParseNet sets Caffe's Normalize layer: not across space, one
    scale per channel, learned.

    Args:
        channels: C.
        scale: initial value, 10 in the paper.

    Shapes: (B, C, h, w) -> the same, float32 at least.
    """

    def __init__(self, channels: int, scale: float = 10.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), float(scale)))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x * (x.square().sum(1, keepdim=True) + 1e-10).rsqrt() * self.scale[:, None, None]


class ParseNetNetwork(nn.Module):
    """A VGG16 with normalised local features of some layers, normalised global context of some, and one classifier.

    Args:
        num_classes: K.
        trunk: "vgg16_reduced" (stride 8) or "vgg16_fcn32s".
        context_layers: layers that give their local features and their mean over the image.
        skip_layers: layers that give their local features only. fc7 must be in one of the two.
        norm_scale: initial scale of the normalised features.
        fusion: "early" concatenates all features at every location; "late" classifies each on its own grid and adds the
            scores, the context once per image. The results are equal and so are the weights; "late" is much cheaper.
        width: channels of VGG's first stage; 64 is the paper's network.

    Shapes: (B, 3, H, W) -> {"out": (B, K, H, W)}, for any H and W.

    Raises:
        ValueError: a layer that the trunk does not have, one named twice, or no fc7.
    """

    def __init__(
        self,
        num_classes: int,
        trunk: Trunk = "vgg16_reduced",
        context_layers: Sequence[str] = ("fc7",),
        skip_layers: Sequence[str] = (),
        norm_scale: float = 10.0,
        fusion: Literal["late", "early"] = "late",
        width: int = 64,
    ):
        super().__init__()
        self.backbone = VGG16Trunk("reduced" if trunk == "vgg16_reduced" else "fcn", width=width)
        layers = [*context_layers, *skip_layers]
        known = self.backbone.layers
        for name in layers:
            if name not in known:
                raise ValueError(f"{trunk} has no layer {name!r}; choose among {', '.join(known)}.")
        if len(set(layers)) < len(layers):
            raise ValueError(
                f"context_layers {list(context_layers)} and skip_layers {list(skip_layers)} name a layer twice; "
                f"context layers give their local features as well."
            )
        if "fc7" not in layers:
            raise ValueError(f"Layers {layers} leave out fc7, the end of the trunk; add it to one of the two lists.")
        self.fusion = fusion
        self.local = tuple(sorted(layers, key=known.index))
        self.context = tuple(sorted(context_layers, key=known.index))
        channels = {name: self.backbone.channels(name) for name in layers}
        self.local_norm = nn.ModuleDict({name: L2NormScale(channels[name], norm_scale) for name in self.local})
        self.context_norm = nn.ModuleDict({name: L2NormScale(channels[name], norm_scale) for name in self.context})
        self.parts = [channels[name] for name in (*self.local, *self.context)]
        self.score = nn.Conv2d(sum(self.parts), num_classes, 1)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.zeros_(self.score.bias)
        self.grids = {name: self.backbone.grid(name) for name in self.local}
        self.finest = min(self.local, key=lambda name: self.grids[name].scale)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score a normalised image; see the class."""
        features = self.backbone(image, self.local)
        size = tuple(features[self.finest].shape[-2:])
        local = [norm(features[name]) for name, norm in self.local_norm.items()]
        context = [norm(global_mean(features[name])) for name, norm in self.context_norm.items()]
        if self.fusion == "late":
            parts = zip((*local, *context), self.score.weight.split(self.parts, 1), strict=True)
            scored = [nn.functional.conv2d(part, weight) for part, weight in parts]
            local, context = scored[: len(local)], scored[len(local) :]
        local = [
            resample(part, self.grids[name], self.grids[self.finest], size)
            for name, part in zip(self.local, local, strict=True)
        ]
        context = [part.expand(-1, -1, *size) for part in context]  # "unpooling"
        if self.fusion == "late":
            score = sum([*local, *context]) + self.score.bias[:, None, None]
        else:
            score = self.score(torch.cat([*local, *context], 1))
        return {"out": resample(score, self.grids[self.finest], IMAGE, tuple(image.shape[-2:]))}


def resample(x: Tensor, source: CoordinateMap, target: CoordinateMap, size: tuple[int, int]) -> Tensor:
    """Interpolate a map bilinearly at the pixels of another grid over the same image; outside, repeat its border.

    Linear in x with weights that sum to one, so it may change places with a 1x1 convolution.

    Args:
        x: (B, C, h, w), whose pixels lie where `source` says.
        source: grid of x.
        target: grid of the result.
        size: of the result.
    """
    if source == target and tuple(x.shape[-2:]) == size:
        return x
    spans = [(source.scale * (old - 1), target.scale * (new - 1)) for old, new in zip(x.shape[-2:], size, strict=True)]
    if source.shift == target.shift and all(old == new for old, new in spans):  # the corners meet
        return nn.functional.interpolate(x, size, mode="bilinear", align_corners=True)
    scale, shift = float(target.scale / source.scale), float((target.shift - source.shift) / source.scale)
    for axis, length in zip((-2, -1), size, strict=True):
        last = x.shape[axis] - 1
        position = (torch.arange(length, device=x.device) * scale + shift).clamp(0, last)
        low = position.long()
        weight = (position - low).to(x.dtype)
        weight = weight[:, None] if axis == -2 else weight
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, (low + 1).clamp_max(last)), weight)
    return x


class ParseNet(SemanticModel):
    """ParseNet; the defaults are the VOC network. For PASCAL-Context: `vgg16_fcn32s`, skip layers conv4_3 and conv5_3.

    Args:
        num_classes: K.
        trunk: "vgg16_reduced" or "vgg16_fcn32s".
        context_layers: layers of local features and global context.
        skip_layers: layers of local features only.
        norm_scale: initial scale of the L2-normalised features.
        fusion: "late" or "early": equal results, late is cheaper.
        width: channels of VGG's first stage; 64 is the paper's network, less is for trials.
        pretrained: start from torchvision's ImageNet weights of VGG16, decimated for the reduced trunk (needs width 64
            and "torch" preprocessing).
        init_from: start from a file instead: a seglight checkpoint of a ParseNet, a state dict of torchvision's VGG16,
            or one converted from Caffe (VGG16, FCN-32s or the authors' reduced VGG16; needs "caffe" preprocessing).
    """

    free = SemanticModel.free | {"fusion", "norm_scale"}

    def __init__(
        self,
        num_classes: int,
        trunk: Trunk = "vgg16_reduced",
        context_layers: Sequence[str] = ("fc7",),
        skip_layers: Sequence[str] = (),
        norm_scale: float = 10.0,
        fusion: Literal["late", "early"] = "late",
        width: int = 64,
        pretrained: bool = False,
        init_from: str | None = None,
        **kwargs: Any,
    ):
        check_start(pretrained, init_from, width)
        network = ParseNetNetwork(num_classes, trunk, context_layers, skip_layers, norm_scale, fusion, width)
        super().__init__(network=network, num_classes=num_classes, init_from=init_from, **kwargs)
        if pretrained:
            start_trunk(network, self._name, self.preprocessing)

    def start_from(self, content: dict[str, Any], path: str, without: tuple[str, ...] = ()) -> None:
        """Take a seglight checkpoint or a VGG16; see `init_from`."""
        if "state_dict" in content:
            super().start_from(content, path, without)
        else:
            start_trunk(self.network, self._name, self.preprocessing, content, path, without)
