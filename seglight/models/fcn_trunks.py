"""FCN-32s on the other trunks of the paper: CaffeNet (its "AlexNet") and GoogLeNet (Long, Shelhamer, Darrell; 2015).

    network (21 classes)    learned       with the fixed deconvolution   crop   published, VOC 2011 seg11valid
    FCN32sAlexNet           56,954,261    58,704,590 (63 x 63)           18     39.8 (release 48.0)
    FCN32sGoogLeNet          5,995,077     7,801,413 (64 x 64)           98     42.5 (never released)

Layers have the names of the Caffe models, so weights converted from there load as they are; the "/" in GoogLeNet's
names is a "." here. Both trunks of the paper normalise responses and have no weights in torchvision: `trunk:
torchvision` is the variant that has some. The paper has no skips on these two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seglight.models.blocks import BilinearDeconv, CoordinateMap, HeConv2d, crop_offset
from seglight.models.fcn import FCN, crop_like, zero_score
from seglight.models.weights import check_start, hand_on

# Channels of the convolutions and whether each is in two groups, as GPUs of 2012 needed it.
CAFFENET = {"conv1": (96, 1), "conv2": (256, 2), "conv3": (384, 1), "conv4": (384, 2), "conv5": (256, 2)}
ALEXNET = {"conv1": (64, 1), "conv2": (192, 1), "conv3": (384, 1), "conv4": (256, 1), "conv5": (256, 1)}

INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32), "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64), "4b": (160, 112, 224, 24, 64, 64), "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64), "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128), "5b": (384, 192, 384, 48, 128, 128),
}  # fmt: skip
"""Channels of an inception block: 1x1; 3x3 reduction, 3x3; 5x5 reduction, 5x5; projection of the pooling."""


class CaffeNetFCNNetwork(nn.Module):
    """CaffeNet made convolutional and scored at stride 32; fc6 and fc7 stay 6x6 and 1x1 convolutions of 4096.

    CaffeNet is AlexNet with pooling before the normalisation. Padding 100 as in the VGG16 networks.

    Args:
        num_classes: K.
        trunk: "caffenet" (grouped convolutions, local response normalisation) or "torchvision" (its `alexnet`: neither,
            and 64-192-384-256-256 channels; 57,089,877 learned parameters).
        learn_upsampling: train the deconvolution.
        width: 64 is the paper's network; every layer has width / 64 of its channels.

    Shapes: (B, 3, H, W) -> {"out": (B, K, H, W)}, for any H and W.
    """

    def __init__(
        self,
        num_classes: int,
        trunk: Literal["caffenet", "torchvision"] = "caffenet",
        learn_upsampling: bool = False,
        width: int = 64,
    ):
        super().__init__()
        normalised = _is_paper(trunk, "caffenet")
        self.trunk = trunk
        shapes = {"conv1": (11, 4, 100), "conv2": (5, 1, 2)}
        channels, layers = 3, []
        for name, (wide, groups) in (CAFFENET if normalised else ALEXNET).items():
            side, stride, padding = shapes.get(name, (3, 1, 1))
            wide = _even(wide, width)
            layers.append((name, HeConv2d(channels, wide, side, stride, padding, groups=groups)))
            layers.append((f"relu{name[-1]}", nn.ReLU(inplace=True)))
            if name in ("conv1", "conv2", "conv5"):
                layers.append((f"pool{name[-1]}", nn.MaxPool2d(3, 2, ceil_mode=True)))
            if name in ("conv1", "conv2") and normalised:
                layers.append((f"norm{name[-1]}", _norm()))
            channels = wide
        hidden = 64 * width
        layers += [("fc6", HeConv2d(channels, hidden, 6)), ("relu6", nn.ReLU(inplace=True)), ("drop6", nn.Dropout(0.5))]
        layers += [("fc7", HeConv2d(hidden, hidden, 1)), ("relu7", nn.ReLU(inplace=True)), ("drop7", nn.Dropout(0.5))]
        layers.append(("score_fr", zero_score(hidden, num_classes)))
        layers.append(("upscore", BilinearDeconv(num_classes, 63, 32, learn_upsampling)))
        for name, layer in layers:
            self.add_module(name, layer)
        self.offset = crop_offset(self.children())

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score a normalised image; see the class."""
        x = image
        for layer in self.children():
            x = layer(x)
        return {"out": crop_like(x, self.offset, image)}


class Inception(nn.Module):
    """Four branches side by side: 1x1; 1x1 and 3x3; 1x1 and 5x5; 3x3 max pooling and 1x1. A ReLU after each layer.

    Shapes: (B, channels, H, W) -> (B, widths[0] + widths[2] + widths[4] + widths[5], H, W).
    """

    def __init__(self, channels: int, widths: tuple[int, ...]):
        super().__init__()
        one, reduce3, three, reduce5, five, projected = widths
        self.add_module("1x1", HeConv2d(channels, one, 1))
        self.add_module("3x3_reduce", HeConv2d(channels, reduce3, 1))
        self.add_module("3x3", HeConv2d(reduce3, three, 3, padding=1))
        self.add_module("5x5_reduce", HeConv2d(channels, reduce5, 1))
        self.add_module("5x5", HeConv2d(reduce5, five, 5, padding=2))
        self.pool = nn.MaxPool2d(3, 1, padding=1)
        self.pool_proj = HeConv2d(channels, projected, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run the branches and concatenate them; see the class."""
        branches = (["1x1"], ["3x3_reduce", "3x3"], ["5x5_reduce", "5x5"], ["pool", "pool_proj"])
        outs = []
        for branch in branches:
            out = x
            for name in branch:
                out = getattr(self, name)(out)
                if name != "pool":
                    out = nn.functional.relu(out, inplace=True)
            outs.append(out)
        return torch.cat(outs, 1)


class GoogLeNetFCNNetwork(nn.Module):
    """GoogLeNet up to its last inception block, scored at stride 32, interpolated to the input's size.

    All kernels but that of the deconvolution are odd, so its 64 x 64 lies half a pixel off whole pixels; the crop takes
    the pixel before. With 63 x 63 it fits exactly (7,745,406 parameters).

    Args:
        num_classes: K.
        trunk: "bvlc" (Caffe's model: local response normalisation, no batch norm) or "torchvision" (no normalisation,
            its batch norm being folded into the convolutions, and a last pooling of 2x2 instead of 3x3).
        upscore_size: side of the deconvolution's kernel, 64 or 63.
        learn_upsampling: train the deconvolution.
        width: 64 is the paper's network; every layer has width / 64 of its channels.

    Shapes: (B, 3, H, W) -> {"out": (B, K, H, W)}, for any H and W.
    """

    def __init__(
        self,
        num_classes: int,
        trunk: Literal["bvlc", "torchvision"] = "bvlc",
        upscore_size: Literal[63, 64] = 64,
        learn_upsampling: bool = False,
        width: int = 64,
    ):
        super().__init__()
        normalised = _is_paper(trunk, "bvlc")
        self.trunk = trunk
        if upscore_size not in (63, 64):
            raise ValueError(f"upscore_size is {upscore_size}; a factor of 32 is interpolated with 63 or 64.")
        channels = _even(192, width)

        def pool(side: int = 3) -> nn.MaxPool2d:
            return nn.MaxPool2d(side, 2, ceil_mode=True)

        self.conv1 = nn.ModuleDict({"7x7_s2": HeConv2d(3, _even(64, width), 7, 2, 100)})
        self.pool1 = pool()
        self.norm1 = _norm() if normalised else nn.Identity()
        reduced = _even(64, width)
        self.conv2 = nn.ModuleDict(
            {"3x3_reduce": HeConv2d(reduced, reduced, 1), "3x3": HeConv2d(reduced, channels, 3, padding=1)}
        )
        self.norm2 = _norm() if normalised else nn.Identity()
        self.pool2 = pool()
        blocks = []
        for name, widths in INCEPTIONS.items():
            if name == "4a":
                self.pool3 = pool()
                blocks.append("pool3")
            if name == "5a":
                self.pool4 = pool(3 if normalised else 2)
                blocks.append("pool4")
            widths = tuple(_even(wide, width) for wide in widths)
            blocks.append(f"inception_{name}")
            self.add_module(blocks[-1], Inception(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.blocks = tuple(blocks)
        self.score_fr = zero_score(channels, num_classes)
        self.upscore = BilinearDeconv(num_classes, upscore_size, 32, learn_upsampling)
        # Inception blocks and 3x3 convolutions leave coordinates as they are.
        path = [self.conv1["7x7_s2"], self.pool1, self.pool2, self.pool3, self.pool4, self.upscore]
        self.offset = math.floor(-CoordinateMap.along(path).shift)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score a normalised image; see the class."""
        x = nn.functional.relu(self.conv1["7x7_s2"](image), inplace=True)
        x = self.norm1(self.pool1(x))
        for conv in self.conv2.values():
            x = nn.functional.relu(conv(x), inplace=True)
        x = self.pool2(self.norm2(x))
        for name in self.blocks:
            x = getattr(self, name)(x)
        return {"out": crop_like(self.upscore(self.score_fr(x)), self.offset, image)}


def _is_paper(trunk: str, paper: str) -> bool:
    if trunk not in (paper, "torchvision"):
        raise ValueError(f'trunk is "{trunk}"; choose "{paper}" (the paper\'s) or "torchvision" (which has weights).')
    return trunk == paper


def _even(channels: int, width: int) -> int:
    """Channels at a width, a multiple of 2 for the groups."""
    return max(2, channels * width // 128 * 2)


def _norm() -> nn.LocalResponseNorm:
    return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)


# ------------------------------------------------------------------------------------------------------- weights


def alexnet_to_fcn(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of torchvision's `alexnet`; fc6 and fc7 become convolutions, its last layer is dropped.

    Raises:
        ValueError: it is not one of an AlexNet.
    """
    names = {f"features.{i}": conv for i, conv in zip((0, 3, 6, 8, 10), ALEXNET, strict=True)}
    names |= {"classifier.1": "fc6", "classifier.4": "fc7"}
    missing = [old for old in names if f"{old}.weight" not in state_dict]
    if missing:
        raise ValueError(f"Not the weights of torchvision's alexnet: {', '.join(missing)} missing.")
    weights = {f"{new}.{kind}": state_dict[f"{old}.{kind}"] for old, new in names.items() for kind in _KINDS}
    return _as_convolutions(weights)


def googlenet_to_fcn(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the weights of torchvision's `googlenet` into those of `GoogLeNetFCNNetwork(trunk="torchvision")`.

    Its batch norm (in evaluation, eps 0.001) is folded into the convolutions. Its "5x5" branch has 3x3 kernels; they
    lie in the middle of 5x5 ones, so that all layers have the shapes of the paper's. It expects pixels scaled to -1..1:
    the change from "torch" preprocessing is folded into the first layer. Auxiliary classifiers and `fc` are dropped.

    Raises:
        ValueError: it is not one of a GoogLeNet.
    """
    names = {"conv1": "conv1.7x7_s2", "conv2": "conv2.3x3_reduce", "conv3": "conv2.3x3"}
    for block in INCEPTIONS:
        branches = ("branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1")
        layers = ("1x1", "3x3_reduce", "3x3", "5x5_reduce", "5x5", "pool_proj")
        names |= {f"inception{block}.{a}": f"inception_{block}.{b}" for a, b in zip(branches, layers, strict=True)}
    missing = [old for old in names if f"{old}.conv.weight" not in state_dict or f"{old}.bn.bias" not in state_dict]
    if missing:
        raise ValueError(f"Not the weights of torchvision's googlenet: {', '.join(missing)} missing.")
    weights = {}
    for old, new in names.items():
        weight = state_dict[f"{old}.conv.weight"]
        norm = {kind: state_dict[f"{old}.bn.{kind}"] for kind in (*_KINDS, "running_mean", "running_var")}
        scale = norm["weight"] / (norm["running_var"] + 1e-3).sqrt()
        weight, bias = weight * scale[:, None, None, None], norm["bias"] - norm["running_mean"] * scale
        if new.endswith("5x5"):
            weight = nn.functional.pad(weight, (1, 1, 1, 1))
        if old == "conv1":
            std, mean = weight.new_tensor((0.229, 0.224, 0.225)), weight.new_tensor((0.485, 0.456, 0.406))
            bias = bias + (weight * ((mean - 0.5) / 0.5)[:, None, None]).sum((1, 2, 3))
            weight = weight * (std / 0.5)[:, None, None]
        weights[f"{new}.weight"], weights[f"{new}.bias"] = weight, bias
    return weights


def caffe_classifier(content: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The trunk of a converted ImageNet classifier of Caffe's model zoo, or None for what is none."""
    weights = {key.replace("/", "."): value for key, value in content.items()}
    heads = ("fc8.", "loss1.", "loss2.", "loss3.")
    trunk = {key: value for key, value in weights.items() if not key.startswith(heads)}
    return _as_convolutions(trunk) if len(trunk) < len(weights) else None


def _as_convolutions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Linear layers fc6 and fc7 as convolutions; fc6 is one on a flattened (C, 6, 6) map."""
    for name, side in (("fc6.weight", 6), ("fc7.weight", 1)):
        if name in weights:
            outputs = weights[name.replace("weight", "bias")].numel()
            weights[name] = weights[name].reshape(outputs, -1, side, side)
    return weights


_KINDS = ("weight", "bias")


# -------------------------------------------------------------------------------------------------------- models


class _OtherTrunk(FCN):
    """Files of the two trunks: those of torchvision fit `trunk: torchvision` alone, those of Caffe the paper's."""

    def __init__(self, network: nn.Module, num_classes: int, pretrained: bool = False, **kwargs: Any):
        if pretrained and network.trunk != "torchvision":
            raise ValueError(
                f'trunk is "{network.trunk}", for which torchvision has no weights; set trunk to torchvision, or give '
                "a converted Caffe file as init_from."
            )
        super().__init__(network=network, num_classes=num_classes, pretrained=pretrained, **kwargs)

    def start_from(self, content: dict[str, Any], path: str, without: tuple[str, ...] = ()) -> None:
        """As `FCN`; takes converted ImageNet classifiers of Caffe too."""
        if "state_dict" not in content and (self.marker in content) != (self.network.trunk == "torchvision"):
            origin = "torchvision" if self.marker in content else "Caffe"
            raise ValueError(f'{path} has layers of {origin}, but trunk is "{self.network.trunk}"; set the other one.')
        super().start_from(content, path, without)

    def start_from_caffe(self, content: dict[str, Tensor], path: str, without: tuple[str, ...] = ()) -> None:
        """Take an FCN or an ImageNet classifier, converted from Caffe."""
        trunk = caffe_classifier(content)
        if trunk is None:
            super().start_from_caffe({key.replace("/", "."): value for key, value in content.items()}, path, without)
        else:
            hand_on(self.network, trunk, path, self._name, (*without, "score_fr", "upscore"), strict=True)


class FCN32sAlexNet(_OtherTrunk):
    """FCN-32s on CaffeNet (or torchvision's AlexNet).

    The release: normalised loss, batches of 20 single whole images, lr 1e-4, momentum 0.9, weight decay 5e-4.

    Args:
        num_classes: K.
        trunk: "caffenet" is the paper's; "torchvision" another AlexNet, without groups and normalisation, that has
            weights.
        pretrained: start from torchvision's ImageNet weights (needs its trunk, width 64, "torch" preprocessing).
        init_from: start from a file instead (`FCN`), which may be Caffe's `bvlc_reference_caffenet` too.
        learn_upsampling: train the deconvolution; the release does not.
        width: 64 is the paper's network; every layer has width / 64 of its channels.
    """

    imagenet = "AlexNet"
    converted = staticmethod(alexnet_to_fcn)

    def __init__(
        self,
        num_classes: int,
        trunk: Literal["caffenet", "torchvision"] = "caffenet",
        pretrained: bool = False,
        init_from: str | None = None,
        learn_upsampling: bool = False,
        width: int = 64,
        **kwargs: Any,
    ):
        check_start(pretrained, init_from, width)
        network = CaffeNetFCNNetwork(num_classes, trunk, learn_upsampling, width)
        super().__init__(network=network, num_classes=num_classes, pretrained=pretrained, init_from=init_from, **kwargs)

    @property
    def _name(self) -> str:
        return "FCN-32s on AlexNet"


class FCN32sGoogLeNet(_OtherTrunk):
    """FCN-32s on GoogLeNet. The paper: batches of 20 images, lr 5e-5, momentum 0.9, weight decay 5e-4, 175 epochs.

    Args:
        num_classes: K.
        trunk: "bvlc" is the paper's; "torchvision" is without response normalisation and has weights.
        pretrained: start from torchvision's ImageNet weights (needs its trunk, width 64, "torch" preprocessing).
        init_from: start from a file instead (`FCN`), which may be Caffe's `bvlc_googlenet` too.
        upscore_size: side of the deconvolution's kernel: 64, or 63 for an alignment exact to the pixel.
        learn_upsampling: train the deconvolution.
        width: 64 is the paper's network; every layer has width / 64 of its channels.
    """

    imagenet = "GoogLeNet"
    marker = "conv1.conv.weight"
    converted = staticmethod(googlenet_to_fcn)

    def __init__(
        self,
        num_classes: int,
        trunk: Literal["bvlc", "torchvision"] = "bvlc",
        pretrained: bool = False,
        init_from: str | None = None,
        upscore_size: Literal[63, 64] = 64,
        learn_upsampling: bool = False,
        width: int = 64,
        **kwargs: Any,
    ):
        check_start(pretrained, init_from, width)
        network = GoogLeNetFCNNetwork(num_classes, trunk, upscore_size, learn_upsampling, width)
        super().__init__(network=network, num_classes=num_classes, pretrained=pretrained, init_from=init_from, **kwargs)

    @property
    def _name(self) -> str:
        return "FCN-32s on GoogLeNet"
