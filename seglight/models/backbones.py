"""Feature extractors of timm: one class gives features, channels, strides and the normalisation family of a name.

How a strided network is dilated decides what it computes, yet leaves no trace in the shapes of its weights:

    rule           stage of dilation 2 (6 blocks)   stage of dilation 4 (3 blocks)   used by
    uniform        2 2 2 2 2 2                      4 4 4                            PSPNet, DeepLab v2
    lagged-first   1 2 2 2 2 2                      2 4 4                            EncNet, torchvision, timm
    multi-grid     2 2 2 2 2 2                      4 * (1, 2, 4)                    DeepLab v3 and v3+

So the rule is an argument of every network that has a trunk, and its model stores and checks it with the checkpoint.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections import OrderedDict
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

DilationRule = Literal["uniform", "lagged-first"]
_NORMS = {"BatchNorm": "batch", "LayerNorm": "layer", "GroupNorm": "group", "RmsNorm": "rms"}


class Backbone(nn.Module):
    """A timm network without its classifier: a list of feature maps, finest first, the last being the deepest.

    The timm network lies under `body` and keeps its names, so files of timm (and torchvision's ResNets) fit it.
    Only a batch norm that timm has merged with its activation is named `norm` beside `act`.

    Args:
        name: in timm, such as "resnet50" (7x7 stem), "resnet101s" (deep stem 64-64-128), "xception65" or a ViT.
        output_stride: 8, 16 or 32: later strides become dilations. Plain ViTs have one stride and take none.
        dilation: "lagged-first" is timm's rule for all its networks; "uniform" exists for the ResNet family.
        multi_grid: factors of the last stage's dilation, block by block (ResNet family, "uniform").
        stride_in_1x1: strides sit in the first 1x1 convolution of a bottleneck, as in Caffe's ResNets, not in its 3x3.
        pretrained: load timm's ImageNet weights.
        raw_taps: features inside the strided blocks of an aligned Xception are taken before their ReLU, as in the
            release of DeepLab v3+; timm takes them after it.

    Shapes: (B, 3, H, W) -> list of (B, channels[i], ~H / strides[i], ~W / strides[i]). Networks of patches get the
    image padded right and below to whole patches.

    Raises:
        ValueError: no such network, or it cannot have this stride or rule.
    """

    def __init__(
        self,
        name: str,
        output_stride: int | None = 32,
        dilation: DilationRule = "lagged-first",
        multi_grid: Sequence[int] = (1, 1, 1),
        stride_in_1x1: bool = False,
        pretrained: bool = False,
        raw_taps: bool = False,
    ):
        super().__init__()
        self.name, self.dilation, self.multi_grid, self.stride_in_1x1 = name, dilation, tuple(multi_grid), stride_in_1x1
        self.raw_taps, self.pretrained = raw_taps, pretrained
        self._geometry: dict[int, dict[str, dict[str, Any]]] = {}  # by output stride and layer
        self._check_name(pretrained)
        with torch.device("meta"):
            self._nominal = _timm().create_model(self.name, features_only=True).feature_info.reduction()
        self.body = self._build(output_stride, pretrained)
        self.output_stride = output_stride or self._nominal[-1]
        self.patch = 1
        if embed := getattr(getattr(self.body, "model", self.body), "patch_embed", None):
            self.patch = int(getattr(embed, "patch_size", (1,))[0])

    @property
    def channels(self) -> list[int]:
        """Of each feature map."""
        return list(self.body.feature_info.channels())

    @property
    def strides(self) -> list[int]:
        """Of each feature map, at the present output stride."""
        return [min(stride, self.output_stride) for stride in self._nominal]

    @property
    def norm(self) -> str:
        """The normalisation family: "batch", "layer", "group", "rms" or "none"; of a mixture, the most frequent."""
        kinds = [kind for layer in self.body.modules() for key, kind in _NORMS.items() if key in type(layer).__name__]
        return max(set(kinds), key=kinds.count) if kinds else "none"

    @property
    def preprocessing(self) -> Literal["torch", "half"]:
        """The family that timm's weights expect."""
        return "half" if _timm().get_pretrained_cfg(self.name).mean == (0.5, 0.5, 0.5) else "torch"

    def check_preprocessing(self, family: str) -> None:
        """Refuse a normalisation that the pretrained weights, if this trunk has some, were not made with.

        Raises:
            ValueError: says which family to set.
        """
        if self.pretrained and family != self.preprocessing:
            raise ValueError(
                f'preprocessing is "{family}", but the ImageNet weights of {self.name} expect "{self.preprocessing}"; '
                f"set model.preprocessing to that, or pretrained to false."
            )

    def level(self, stride: int) -> int:
        """Index of the deepest feature map of a stride before any dilation (4, 8, 16, 32: C2, C3, C4, C5 of a ResNet).

        Raises:
            ValueError: the network has no such level.
        """
        nominal = self._nominal
        if stride not in nominal:
            raise ValueError(
                f"{self.name} has features at strides {nominal}, none at {stride}, which this architecture needs; "
                f"choose a backbone with features at strides 4, 8, 16 and 32, such as resnet50."
            )
        return len(nominal) - 1 - nominal[::-1].index(stride)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features of a normalised image; see the class."""
        if self.patch > 1:
            height, width = image.shape[-2:]
            image = nn.functional.pad(image, (0, -width % self.patch, 0, -height % self.patch))
        features = self.body(image)
        if getattr(self.body, "output_fmt", "NCHW") == "NHWC":
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return features

    def set_output_stride(self, output_stride: int) -> None:
        """Turn strides into dilations or back, with the same weights (DeepLab trains at 16 and evaluates at 8)."""
        if output_stride == self.output_stride:
            return
        self._geometry.setdefault(self.output_stride, _geometry(self.body))
        if output_stride not in self._geometry:
            with torch.device("meta"):
                other = self._build(output_stride)
            kinds = {name: type(layer) for name, layer in other.named_modules()}
            if kinds != {name: type(layer) for name, layer in self.body.named_modules()}:
                raise ValueError(
                    f"{self.name} has other layers at output stride {output_stride} than at {self.output_stride}, from "
                    f"where its weights are; set output_stride and test_output_stride to one value."
                )
            self._geometry[output_stride] = _geometry(other)
        for name, layer in self.body.named_modules():
            for attribute, value in self._geometry[output_stride][name].items():
                setattr(layer, attribute, value)
        self.output_stride = output_stride

    # ---------------------------------------------------------------------- build

    def _check_name(self, pretrained: bool) -> None:
        architecture, _, tag = self.name.partition(".")
        if not _timm().is_model(architecture):
            near = difflib.get_close_matches(architecture, _timm().list_models(), n=5, cutoff=0.5)
            raise ValueError(f"timm has no network {self.name!r}; the nearest are {', '.join(near) or 'none'}.")
        tags = [full.partition(".")[2] for full in _timm().list_pretrained(f"{architecture}.*")]
        if pretrained and not tags:
            raise ValueError(f"timm has no ImageNet weights for {architecture}; set pretrained to false.")
        if tag and tag not in tags:
            raise ValueError(f"timm has no weights {tag!r} for {architecture}; it has {', '.join(tags)}.")

    def _build(self, output_stride: int | None, pretrained: bool = False) -> nn.Module:
        if output_stride is not None and output_stride != self._nominal[-1] and output_stride not in (8, 16):
            raise ValueError(
                f"{self.name} has strides {self._nominal}; output_stride is {output_stride}, but it can be "
                f"{self._nominal[-1]}, or 8 or 16 where the network can be dilated."
            )
        options: dict[str, object] = dict(self._flexible())
        xception = "feature_cls" in options
        if output_stride not in (None, self._nominal[-1]) and not xception:
            options["output_stride"] = output_stride
        try:
            body = _timm().create_model(self.name, features_only=True, pretrained=pretrained, **options)
        except (TypeError, AssertionError) as error:
            if "output_stride" not in options:
                raise
            raise ValueError(
                f"{self.name} cannot be dilated to output stride {output_stride}; set {self._nominal[-1]}."
            ) from error
        self._apply_rule(body, output_stride or self._nominal[-1])
        split_activations(body)
        if xception:
            _dilate_xception(body.model, output_stride or self._nominal[-1])
        if self.raw_taps:
            self._tap_before_relu(body)
        return body

    def _flexible(self) -> dict[str, object]:
        """What lets a network of patches take images of any size, and aligned Xceptions do without timm's hooks."""
        module = _timm().models.model_entrypoint(self.name.partition(".")[0]).__module__.rpartition(".")[2]
        if module in ("vision_transformer", "eva", "deit", "beit"):
            return {"dynamic_img_size": True}
        if module == "xception_aligned":
            return {"feature_cls": "getter"}  # keeps timm's names, which the hooks' wrapper changes
        return {"strict_img_size": False} if module in ("swin_transformer", "swin_transformer_v2") else {}

    def _apply_rule(self, body: nn.Module, output_stride: int) -> None:
        """Set dilations block by block in the stages that lost their stride; timm leaves them lagged-first."""
        plain = self.dilation == "lagged-first" and set(self.multi_grid) == {1} and not self.stride_in_1x1
        stages = [getattr(body, f"layer{i}", None) for i in (1, 2, 3, 4)]
        if plain:
            return
        if None in stages:
            raise ValueError(
                f'dilation "{self.dilation}", multi_grid {self.multi_grid} and stride_in_1x1={self.stride_in_1x1} are '
                f'of the ResNet family, and {self.name} is not; use "lagged-first" and the defaults.'
            )
        if self.dilation != "uniform" and set(self.multi_grid) != {1}:
            raise ValueError(f'multi_grid {self.multi_grid} goes with dilation "uniform", not "{self.dilation}".')
        for stage, nominal in zip(stages, (4, 8, 16, 32), strict=True):
            grid = self.multi_grid if nominal == 32 else (1,)
            for i, block in enumerate(stage):
                if self.dilation == "uniform":
                    dilate(block, max(1, nominal // output_stride) * grid[i % len(grid)])
                if self.stride_in_1x1 and hasattr(block, "conv3"):
                    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride

    def _tap_before_relu(self, body: nn.Module) -> None:
        """Give the strided blocks' third convolution the ReLU before it, so that the feature tapped there lacks it."""
        network = getattr(body, "model", None)
        if not hasattr(network, "feature_ends"):
            raise ValueError(f"raw_taps is of the aligned Xceptions, and {self.name} is not one; leave it out.")
        for i in network.feature_ends[:-1]:
            stack = network.blocks[i].stack
            if hasattr(stack, "act3"):  # the pre-activation Xceptions have their ReLU inside conv3 already
                stack.act3 = nn.Identity()
                stack.conv3.register_forward_pre_hook(_rectify)


def _geometry(body: nn.Module) -> dict[str, dict[str, Any]]:
    """Stride, padding and dilation of each layer, where it has them."""
    return {
        name: {key: getattr(layer, key) for key in ("stride", "padding", "dilation") if hasattr(layer, key)}
        for name, layer in body.named_modules()
    }


def dilate(block: nn.Module, rate: int) -> None:
    """Set the rate of the 3x3 convolutions of a residual block of timm's ResNets."""
    for conv in (block.conv1, block.conv2):
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (rate, rate)


def split_activations(body: nn.Module) -> None:
    """Take activations out of timm's batch norms: torch's conversion to SyncBatchNorm would silently drop them."""
    from timm.layers import BatchNormAct2d

    for parent in list(body.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BatchNormAct2d) and not isinstance(child.act, nn.Identity):
                norm = nn.BatchNorm2d(child.num_features, child.eps, child.momentum)
                for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                    setattr(norm, key, getattr(child, key))
                setattr(parent, name, nn.Sequential(OrderedDict(norm=norm, drop=child.drop, act=child.act)))


def _dilate_xception(network: nn.Module, output_stride: int) -> None:
    """As timm's own `output_stride`, which drops a projection shortcut that stride 1 makes needless (Xception-71)."""
    reached, rate = 2, 1
    for block in network.blocks:
        convs = [layer for layer in block.modules() if isinstance(layer, nn.Conv2d)]
        strided = any(conv.stride == (2, 2) for conv in convs)
        dense = strided and reached >= output_stride
        for conv in convs:
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (rate, rate)
            if dense:
                conv.stride = (1, 1)
        if dense:
            rate *= 2
        elif strided:
            reached *= 2


def _rectify(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (nn.functional.relu(inputs[0]),)


@functools.cache
def _timm() -> ModuleType:
    """timm with ResNet-269, PSPNet's largest trunk, of which it has the parts but not the depths.

    Imported here and not above, because it takes seconds that a typing error in a configuration should not cost.
    """
    import timm
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models.resnet import Bottleneck, ResNet

    def resnet269s(pretrained: bool = False, **options: Any) -> nn.Module:
        config = {"block": Bottleneck, "layers": (3, 30, 48, 8), "stem_width": 64, "stem_type": "deep", **options}
        return build_model_with_cfg(ResNet, "resnet269s", pretrained, **config)

    module = sys.modules[__name__]
    config = timm.get_pretrained_cfg("resnet101s").to_dict() | {"url": "", "hf_hub_id": None}
    module.default_cfgs = generate_default_cfgs({"resnet269s": config})  # where timm looks for it
    register_model(resnet269s)
    return timm
