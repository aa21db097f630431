"""VGG16 as a trunk: the reduced form of DeepLab and ParseNet (output stride 8), and the form of FCN-32s (stride 32).

    form      pools            conv5_x     fc6                      fc7         grid of fc7
    reduced   3x3, padding 1   dilation 2  3x3 dilated, 1024 wide   1x1, 1024   8 i
    fcn       2x2              dilation 1  7x7, 4096 wide           1x1, 4096   32 i + 12.5 (padding 100)

In the reduced form pool4 and pool5 have stride 1. Pooling is in ceil mode, as in Caffe. With its padded pools every map
lies on whole multiples of its stride: sizes 8 k + 1 are corner-aligned (321 -> 161 -> 81 -> 41).

Layers have the names of the Caffe releases. Where fc6 and fc7 come in several rates (ASPP) they are fc6_1, fc6_2, ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from seglight.models.blocks import CoordinateMap, HeConv2d
from seglight.models.weights import hand_on

Form = Literal["reduced", "fcn"]

VGG16 = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""Width (times 64) and number of convolutions of each stage."""


class VGG16Trunk(nn.Module):
    """VGG16 up to fc7; its forward gives whichever layers are asked for.

    Args:
        form: "reduced" or "fcn"; see the module.
        rates: dilations of fc6 in the reduced form; each has an fc6 and an fc7 of its own on the same pool5.
        width: channels of the first stage, 64 in the paper. Everything scales with it.
        dropout: after fc6 and after fc7.
    """

    def __init__(self, form: Form = "reduced", rates: Sequence[int] = (12,), width: int = 64, dropout: float = 0.5):
        super().__init__()
        reduced = form == "reduced"
        self.form = form
        path: list[str] = []
        channels = 3
        for stage, (factor, convs) in enumerate(VGG16, start=1):
            dilation = 2 if reduced and stage == 5 else 1
            for i in range(1, convs + 1):
                path.append(f"conv{stage}_{i}")
                padding = 100 if not reduced and path == ["conv1_1"] else dilation
                self.add_module(path[-1], HeConv2d(channels, factor * width, 3, padding=padding, dilation=dilation))
                channels = factor * width
            path.append(f"pool{stage}")
            stride = 1 if reduced and stage > 3 else 2
            pool = nn.MaxPool2d(3, stride, 1, ceil_mode=True) if reduced else nn.MaxPool2d(2, 2, ceil_mode=True)
            self.add_module(path[-1], pool)
        self.path = tuple(path)
        wide = (16 if reduced else 64) * width
        suffixes = [f"_{i}" for i in range(1, len(rates) + 1)] if reduced and len(rates) > 1 else [""]
        for suffix, rate in zip(suffixes, rates, strict=False):
            fc6 = HeConv2d(channels, wide, 3, padding=rate, dilation=rate) if reduced else HeConv2d(channels, wide, 7)
            self.add_module(f"fc6{suffix}", fc6)
            self.add_module(f"drop6{suffix}", nn.Dropout(dropout))
            self.add_module(f"fc7{suffix}", HeConv2d(wide, wide, 1))
            self.add_module(f"drop7{suffix}", nn.Dropout(dropout))
        self.branches = tuple((f"fc6{suffix}", f"fc7{suffix}") for suffix in suffixes)

    @property
    def layers(self) -> list[str]:
        """Names that `forward` can give, first layer first."""
        return [*self.path, *(name for branch in self.branches for name in branch)]

    def channels(self, layer: str) -> int:
        """Width of a layer's output; a pool has that of the convolution before it."""
        while not hasattr(getattr(self, layer), "out_channels"):
            layer = self.path[self.path.index(layer) - 1]
        return int(getattr(self, layer).out_channels)

    def grid(self, layer: str) -> CoordinateMap:
        """Where in the image the pixels of a layer's output lie."""
        names = list(self.path)
        for fc6, fc7 in self.branches:
            if layer in (fc6, fc7):
                names += [fc6, fc7]
        return CoordinateMap.along(getattr(self, name) for name in names[: names.index(layer) + 1])

    def forward(self, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """The named layers' outputs, rectified, by name; fc6 and fc7 after dropout.

        Shapes: (B, 3, H, W) -> (B, channels(layer), h, w) each.
        """
        found: dict[str, Tensor] = {}
        x = image
        for name in self.path:
            x = getattr(self, name)(x)
            if name.startswith("conv"):
                x = nn.functional.relu(x, inplace=True)
            if name in layers:
                found[name] = x
        for branch in self.branches:
            y = x
            for name in branch:
                drop = getattr(self, name.replace("fc", "drop"))
                y = drop(nn.functional.relu(getattr(self, name)(y), inplace=True))
                if name in layers:
                    found[name] = y
        return found


# ---------------------------------------------------------------------------------------------------- weights


def vgg16_to_fcn(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of torchvision's `vgg16` to the FCN layers; its last, 1000-way layer is dropped.

    fc6 and fc7 become convolutions with the same numbers: fc6 is a linear layer on a flattened (512, 7, 7) map.

    Args:
        state_dict: of a `torchvision.models.vgg16` (without batch norm), at any width.

    Raises:
        ValueError: it is not one of a VGG16.
    """
    convs = [f"conv{stage}_{i}" for stage, (_, count) in enumerate(VGG16, start=1) for i in range(1, count + 1)]
    indices = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    names = {f"features.{i}": conv for i, conv in zip(indices, convs, strict=True)}
    names |= {"classifier.0": "fc6", "classifier.3": "fc7"}
    missing = [old for old in names if f"{old}.weight" not in state_dict]
    if missing:
        raise ValueError(f"Not the weights of torchvision's vgg16 (without batch norm): {', '.join(missing)} missing.")
    weights = {}
    for old, new in names.items():
        weight = state_dict[f"{old}.weight"]
        if new in ("fc6", "fc7"):
            side = 7 if new == "fc6" else 1
            weight = weight.reshape(weight.shape[0], -1, side, side)
        weights[f"{new}.weight"], weights[f"{new}.bias"] = weight, state_dict[f"{old}.bias"]
    return weights


def decimate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reduced form's weights from the full one's (names of Caffe, fc6 7x7): the method of DeepLab and ParseNet.

    fc6 keeps every fourth output channel and of its 7x7 taps the rows and columns 0, 3, 6; fc7 every fourth channel in
    and out.
    """
    reduced = dict(weights)
    reduced["fc6.weight"] = weights["fc6.weight"][::4, :, ::3, ::3]
    reduced["fc7.weight"] = weights["fc7.weight"][::4, ::4]
    for name in ("fc6.bias", "fc7.bias"):
        reduced[name] = weights[name][::4]
    return reduced


def trunk_weights(content: Mapping[str, Tensor], trunk: VGG16Trunk, preprocessing: str, path: str) -> dict[str, Tensor]:
    """A file's tensors under the names of `trunk`; what the trunk has no place for keeps its name.

    Args:
        content: a state dict of torchvision's `vgg16`, or one converted from Caffe: VGG16, an FCN-32s or the reduced
            VGG16 that ParseNet's authors distribute. A full fc6 is decimated for a reduced trunk.
        trunk: what the weights are for. Several rates all start from the same fc6 and fc7.
        preprocessing: of the model. Files converted from Caffe need "caffe".
        path: of the file, for messages.

    Raises:
        ValueError: the file is none of these, not complete, or of the other preprocessing.
    """
    if "features.0.weight" in content:
        weights = vgg16_to_fcn(content)
    else:
        weights = dict(content)
        own = [f"{name}.{kind}" for name in (*trunk.path, "fc6", "fc7") if "pool" not in name for kind in _KINDS]
        missing = sorted({name.rpartition(".")[0] for name in own if name not in weights})
        if missing:
            raise ValueError(
                f"{path} is neither a VGG16 of torchvision nor one of Caffe: it lacks {', '.join(missing)}."
            )
        if preprocessing != "caffe":
            raise ValueError(
                f"{path} has the layer names of Caffe: its weights expect BGR pixels 0..255 minus a mean, but "
                f'preprocessing is "{preprocessing}". Set model.preprocessing to caffe.'
            )
    full = weights["fc6.weight"].shape[-1] == 7
    if trunk.form == "fcn" and not full:
        raise ValueError(
            f"{path} holds a reduced VGG16, whose fc6 is 3x3; this trunk has the full one. Change model.trunk."
        )
    if trunk.form == "reduced" and full:
        weights = decimate(weights)
    return {
        **{name: weight for name, weight in weights.items() if not name.startswith(("fc6.", "fc7."))},
        **{f"{own}.{kind}": weights[f"{own[:3]}.{kind}"] for own in sum(trunk.branches, ()) for kind in _KINDS},
    }


_KINDS = ("weight", "bias")


def start_trunk(
    network: nn.Module,
    name: str,
    preprocessing: str,
    content: Mapping[str, Any] | None = None,
    path: str = "torchvision's VGG16 (ImageNet)",
    without: tuple[str, ...] = (),
) -> None:
    """Fill `network.backbone`, a `VGG16Trunk`, from a state dict (see `trunk_weights`), by default torchvision's."""
    if content is None:
        if preprocessing != "torch":
            raise ValueError(
                f'preprocessing is "{preprocessing}", but torchvision\'s weights expect "torch"; set that.'
            )
        from torchvision.models import VGG16_Weights

        content = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    weights = trunk_weights(content, network.backbone, preprocessing, path)
    hand_on(network, {f"backbone.{key}": weight for key, weight in weights.items()}, path, name, without)
