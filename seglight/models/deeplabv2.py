"""DeepLab v2 (Chen, Papandreou, Kokkinos, Murphy, Yuille; PAMI 2018, arXiv 1606.00915): atrous convolution and ASPP.

    network                                       parameters, K = 21
    ResNet-101, summed ASPP, three scales         44,048,532   (K = 60: 46,924,080; K = 19: 43,901,068)
    VGG16, ASPP-S (2, 4, 8, 12), -L (6, 12, 18, 24)    37,877,652
    VGG16, LargeFOV (12)                          20,505,429

ASPP here is the sum of the scores of four dilated 3x3 convolutions: no image pooling, 1x1 branch or batch norm, which
came with v3. The ResNet's is one convolution a branch; VGG's branches are fc6 (3x3, 1024), fc7 and a score each.

MSC: the ResNet looks at the image at scales 1, 0.75 and 0.5 with the same weights; the scores are resized to those of
scale 1 and fused by their element-wise maximum, at test time too. The loss is the sum of four cross entropies, of each
scale and of the maximum, at the scores' resolution: labels are shrunk to it, scores are not enlarged. Training pads
crops with ignored pixels to the next 32 k + 1; 321 needs none.

Sizes 8 k + 1 are corner-aligned at output stride 8, and with MSC sizes 32 k + 1 are so at every scale. With
`align_corners` false everything is half-pixel, and nothing is padded: the way of the PyTorch port whose files
`init_from` reads (76.65 mIoU on VOC val without the CRF, 77.93 with it).

Recipe: crop 321, SGD, momentum 0.9, weight decay 5e-4, poly 0.9, 20000 steps; ResNet: 10 crops, lr 2.5e-4, batch norm
frozen (`batch_norm: frozen`), started from COCO; VGG: 20 crops, lr 1e-3. New layers learn ten times as fast, their
biases twenty times. Published: VOC 2012 test 79.7 and val 77.69 (ResNet, COCO, CRF; val without CRF 76.35),
PASCAL-Context 45.7, Cityscapes test 70.4.

ResNet as in Caffe: strides in the first 1x1 convolution of a block, max pooling in ceil mode. timm's ImageNet weights
were trained with strides in the 3x3, so `pretrained` needs `stride_in_1x1: false`, a deviation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seglight.models.backbones import Backbone, DilationRule
from seglight.models.base import BaseModel
from seglight.models.semantic import SemanticModel
from seglight.models.vgg import VGG16Trunk, start_trunk
from seglight.models.weights import check_start, hand_on
from seglight.types import IGNORE_INDEX, SemanticBatch

Head = Literal["largefov", "aspp-s", "aspp-l"]
RATES: dict[str, tuple[int, ...]] = {"largefov": (12,), "aspp-s": (2, 4, 8, 12), "aspp-l": (6, 12, 18, 24)}


class _MultiScale(nn.Module):
    """Runs `score` at several scales of the image and takes the maximum."""

    def __init__(self, scales: Sequence[float], align_corners: bool):
        super().__init__()
        if (
            not scales
            or scales[0] != 1
            or len(set(scales)) < len(scales)
            or not all(0 < scale <= 1 for scale in scales)
        ):
            raise ValueError(f"scales is {list(scales)}; it must begin with 1, to which others may add, such as 0.75.")
        self.scales, self.align_corners = tuple(scales), align_corners

    def score(self, image: Tensor) -> Tensor:
        """Class scores (B, K, h, w) of one scale, h = ~H / 8."""
        raise TypeError(f"{type(self).__name__} must define score(image).")

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Scores of each scale as `msc_100`, `msc_75`, ..., and their maximum, at the size of the first, as `out`."""
        scores = [self.score(self._scaled(image, scale)) for scale in self.scales]
        if len(scores) == 1:
            return {"out": scores[0]}
        first, *others = scores
        out = first
        for other in others:
            out = torch.maximum(out, _resize(other, first.shape[-2:], self.align_corners))
        return {"out": out, **{_key(scale): score for scale, score in zip(self.scales, scores, strict=True)}}

    def _scaled(self, image: Tensor, scale: float) -> Tensor:
        if scale == 1:
            return image
        if not self.align_corners:
            return nn.functional.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
        size = [round((side - 1) * scale) + 1 for side in image.shape[-2:]]
        return _resize(image, size, align_corners=True)


def _key(scale: float) -> str:
    return f"msc_{100 * scale:g}"


def _resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return nn.functional.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


def _scores(convs: nn.ModuleList) -> nn.ModuleList:
    for conv in convs:
        nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(conv.bias)
    return convs


class DeepLabV2Network(_MultiScale):
    """A dilated ResNet, summed ASPP on its last features, several scales.

    Args: as of `DeepLabV2`.

    Shapes: (B, 3, H, W) -> {"out": (B, K, h, w), "msc_100": the same, "msc_75": (B, K, ~3/4 h, ~3/4 w), ...}, output
    stride 8. For any H and W.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101",
        rates: Sequence[int] = RATES["aspp-l"],
        scales: Sequence[float] = (1.0, 0.75, 0.5),
        align_corners: bool = True,
        dilation: DilationRule = "uniform",
        stride_in_1x1: bool = True,
        pretrained: bool = False,
    ):
        super().__init__(scales, align_corners)
        self.backbone = Backbone(backbone, 8, dilation, stride_in_1x1=stride_in_1x1, pretrained=pretrained)
        for layer in self.backbone.modules():
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True
        channels = self.backbone.channels[-1]
        self.aspp = _scores(nn.ModuleList(nn.Conv2d(channels, num_classes, 3, padding=r, dilation=r) for r in rates))

    def score(self, image: Tensor) -> Tensor:
        """See the base."""
        x = self.backbone(image)[-1]
        return sum(branch(x) for branch in self.aspp)


class DeepLabV2VGGNetwork(_MultiScale):
    """A reduced VGG16 whose fc6 and fc7 come in one or several rates, each with a score; the scores are summed.

    Args: as of `DeepLabV2VGG`.

    Shapes: (B, 3, H, W) -> {"out": (B, K, ~H / 8, ~W / 8)}, and as `DeepLabV2Network` with several scales.
    """

    def __init__(
        self,
        num_classes: int,
        head: Head = "aspp-l",
        scales: Sequence[float] = (1.0,),
        align_corners: bool = True,
        width: int = 64,
    ):
        super().__init__(scales, align_corners)
        self.backbone = VGG16Trunk("reduced", RATES[head], width)
        self.fc8 = _scores(nn.ModuleList(nn.Conv2d(16 * width, num_classes, 1) for _ in RATES[head]))

    def score(self, image: Tensor) -> Tensor:
        """See the base."""
        last = [fc7 for _, fc7 in self.backbone.branches]
        features = self.backbone(image, last)
        return sum(fc8(features[name]) for name, fc8 in zip(last, self.fc8, strict=True))


class _DeepLabV2(SemanticModel):
    """What the models on both trunks share: shrunk labels, padding, the four losses."""

    free = BaseModel.free | {"loss_weights", "test_size"}

    def __init__(
        self,
        network: _MultiScale,
        num_classes: int,
        align_corners: bool,
        loss_weights: dict[str, float] | None,
        test_size: int | None,
        **kwargs: Any,
    ):
        grid = 1 if not align_corners else 8 if network.scales == (1,) else 32
        if test_size is not None and (test_size - 1) % grid:
            near = (test_size - 1) // grid * grid + 1
            raise ValueError(
                f"test_size is {test_size}, but this DeepLab v2 has exact sizes of {grid} k + 1; the nearest are "
                f"{near} and {near + grid}."
            )
        if loss_weights is None:
            names = ["out"] if len(network.scales) == 1 else ["out", *map(_key, network.scales)]
            loss_weights = dict.fromkeys(names, 1.0)
        super().__init__(network, num_classes, align_corners=align_corners, loss_weights=loss_weights, **kwargs)
        self.grid, self.test_size = grid, test_size

    def pad(self, x: Tensor, at_least: int = 1, value: float = 0) -> Tensor:
        """Pad (..., H, W) at the right and bottom to the grid of exact sizes; 0 is the mean colour."""
        tall, wide = (max(side + (1 - side) % self.grid, at_least) for side in x.shape[-2:])
        if (tall, wide) == tuple(x.shape[-2:]):
            return x
        return nn.functional.pad(x, (0, wide - x.shape[-1], 0, tall - x.shape[-2]), value=value)

    def training_step(self, batch: SemanticBatch, batch_idx: int) -> Tensor:
        """One loss, on crops padded to an exact size with ignored pixels."""
        mask = self.pad(batch["mask"], value=IGNORE_INDEX)
        losses = self.loss(self.network(self.pad(self.normalize(batch["image"]))), {**batch, "mask": mask})
        self.track(losses)
        return losses["loss"]

    def target(self, logits: Tensor, mask: Tensor) -> Tensor:
        """The label shrunk to the logits by picking the nearest pixel, (B, h, w)."""
        rows, columns = (
            _nearest(small, large, self.align_corners, mask.device)
            for small, large in zip(logits.shape[-2:], mask.shape[-2:], strict=True)
        )
        return mask[:, rows[:, None], columns]

    def logits(self, image: Tensor) -> Tensor:
        """Scores of images padded to an exact size, or to `test_size`; at image size if that padded anything."""
        padded = self.pad(image, self.test_size or 1)
        out = self.network(padded)["out"]
        if padded.shape == image.shape:
            return out
        height, width = image.shape[-2:]
        return _resize(out, padded.shape[-2:], self.align_corners)[..., :height, :width]


def _nearest(small: int, large: int, align_corners: bool, device: torch.device) -> Tensor:
    """Which of `large` pixels lie nearest to the centres of `small` ones, in exact integers."""
    i = torch.arange(small, device=device)
    if not align_corners:
        return (2 * i + 1) * large // (2 * small)
    return (2 * i * (large - 1) + small - 1) // (2 * max(small - 1, 1))


class DeepLabV2(_DeepLabV2):
    """DeepLab v2 on ResNet-101 with MSC: the paper's headline network.

    Args:
        num_classes: K.
        backbone: timm network; the paper's is resnet101.
        rates: dilations of the ASPP; the paper's are 6, 12, 18, 24.
        scales: of the image, 1 first; [1.0] is without MSC.
        dilation: rule of the trunk; the paper's is "uniform".
        stride_in_1x1: as in Caffe's ResNets; false for timm's weights.
        align_corners: corner-aligned (Caffe) or half-pixel (the PyTorch port) resizing, the image's included.
        loss_weights: of `out` and each scale (`msc_100`, `msc_75`, `msc_50`); all 1 by default.
        test_size: test-time: pad to at least this side; the paper's protocol on VOC is 513. By default to the next
            exact size.
        pretrained: start from timm's ImageNet weights; needs `stride_in_1x1` false and "torch" preprocessing.
        init_from: start from a file instead: a seglight checkpoint of this family, or a state dict of the PyTorch port
            github.com/kazuto1011/deeplab-pytorch, converted from Caffe: a whole network
            (deeplabv2_resnet101_msc-vocaug-20000.pth) or its COCO start (deeplabv1_resnet101-coco.pth), which leaves
            the ASPP as initialised. They need "caffe" preprocessing.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101",
        rates: Sequence[int] = RATES["aspp-l"],
        scales: Sequence[float] = (1.0, 0.75, 0.5),
        dilation: DilationRule = "uniform",
        stride_in_1x1: bool = True,
        align_corners: bool = True,
        loss_weights: dict[str, float] | None = None,
        test_size: int | None = None,
        pretrained: bool = False,
        init_from: str | None = None,
        **kwargs: Any,
    ):
        check_start(pretrained, init_from)
        if pretrained and stride_in_1x1:
            raise ValueError(
                "pretrained takes timm's ImageNet weights, which were trained with strides in the 3x3 convolutions; "
                "set model.stride_in_1x1 to false with them."
            )
        network = DeepLabV2Network(
            num_classes, backbone, rates, scales, align_corners, dilation, stride_in_1x1, pretrained
        )
        super().__init__(network, num_classes, align_corners, loss_weights, test_size, init_from=init_from, **kwargs)
        if pretrained and self.preprocessing != network.backbone.preprocessing:
            raise ValueError(
                f'preprocessing is "{self.preprocessing}", but timm\'s weights of {backbone} expect '
                f'"{network.backbone.preprocessing}"; set that.'
            )

    def start_from(self, content: dict[str, Any], path: str, without: tuple[str, ...] = ()) -> None:
        """Take a seglight checkpoint or a file of the port; see `init_from`."""
        if not any(key.removeprefix("base.") == "layer1.conv1.conv.weight" for key in content):
            super().start_from(content, path, without)
            return
        weights, source = port_to_network(content), path
        whole = any(key.startswith("aspp.") for key in weights)
        if self.preprocessing != "caffe":
            raise ValueError(
                f"{path} was converted from Caffe: its weights expect BGR pixels 0..255 minus a mean, but "
                f'preprocessing is "{self.preprocessing}". Set model.preprocessing to caffe.'
            )
        trunk, rates = self.network.backbone, tuple(conv.dilation[0] for conv in self.network.aspp)
        if trunk.dilation != "uniform" or not trunk.stride_in_1x1 or (whole and rates != RATES["aspp-l"]):
            raise ValueError(
                f"{path} is of a network with uniform dilation, strides in the 1x1 convolutions and ASPP rates "
                f"{list(RATES['aspp-l'])}; weights of equal shapes would compute something else in this one. Set "
                f"model.dilation, model.stride_in_1x1 and model.rates to that."
            )
        if not whole:  # made for starting from
            weights = {key: weight for key, weight in weights.items() if not key.startswith("fc.")}
            without, source = tuple({*without, "aspp"}), f"{path}, leaving out its own classifier"
        hand_on(self.network, weights, source, self._name, without, strict=True)


def port_to_network(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of the PyTorch port to the layers of `DeepLabV2Network`.

    Counts of batches, which files converted from Caffe may lack and frozen statistics do not use, are taken as 0.

    Args:
        content: keys such as `base.layer2.block1.reduce.conv.weight`, with or without `base.`; its layer1 is the stem.

    Raises:
        ValueError: a key that the port does not have.
    """
    parts = {"reduce": "1", "conv3x3": "2", "increase": "3"}
    weights: dict[str, Tensor] = {}
    for key, weight in content.items():
        if re.fullmatch(r"fc\.(weight|bias)", key):
            name = key
        elif match := re.fullmatch(r"(?:base\.)?layer1\.conv1\.(conv|bn)\.(\w+)", key):
            name = f"backbone.body.{match[1]}1.{match[2]}"
        elif match := re.fullmatch(
            r"(?:base\.)?layer([2-5])\.block(\d+)\.(reduce|conv3x3|increase|shortcut)\.(conv|bn)\.(\w+)", key
        ):
            layer, block, part, kind, tensor = match.groups()
            inner = f"downsample.{0 if kind == 'conv' else 1}" if part == "shortcut" else f"{kind}{parts[part]}"
            name = f"backbone.body.layer{int(layer) - 1}.{int(block) - 1}.{inner}.{tensor}"
        elif match := re.fullmatch(r"(?:base\.)?aspp\.c(\d)\.(weight|bias)", key):
            name = f"aspp.{match[1]}.{match[2]}"
        else:
            raise ValueError(f"{key} is no layer of the port's DeepLab v2 on a ResNet; give one of its released files.")
        weights[name] = weight
        if name.endswith("running_mean"):
            weights.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    return weights


class DeepLabV2VGG(_DeepLabV2):
    """DeepLab v2 on the reduced VGG16, without MSC by default, as in the paper.

    Args:
        num_classes: K.
        head: "largefov", "aspp-s" or "aspp-l".
        scales: of the image, 1 first.
        width: channels of the first stage; 64 is the paper's network, less is for trials.
        align_corners: of all resizing.
        loss_weights: of each output; all 1 by default.
        test_size: test-time: pad to at least this side (VOC: 513).
        pretrained: start from torchvision's ImageNet weights of VGG16, decimated; every branch starts from the same fc6
            and fc7 (needs width 64 and "torch" preprocessing).
        init_from: start from a file instead: a seglight checkpoint of this family, a state dict of torchvision's VGG16
            or one converted from Caffe (needs "caffe" preprocessing).
    """

    def __init__(
        self,
        num_classes: int,
        head: Head = "aspp-l",
        scales: Sequence[float] = (1.0,),
        width: int = 64,
        align_corners: bool = True,
        loss_weights: dict[str, float] | None = None,
        test_size: int | None = None,
        pretrained: bool = False,
        init_from: str | None = None,
        **kwargs: Any,
    ):
        check_start(pretrained, init_from, width)
        if head not in RATES:
            raise ValueError(f"head is {head!r}; choose among {', '.join(RATES)}.")
        network = DeepLabV2VGGNetwork(num_classes, head, scales, align_corners, width)
        super().__init__(network, num_classes, align_corners, loss_weights, test_size, init_from=init_from, **kwargs)
        if pretrained:
            start_trunk(network, self._name, self.preprocessing)

    def start_from(self, content: dict[str, Any], path: str, without: tuple[str, ...] = ()) -> None:
        """Take a seglight checkpoint or a VGG16; see `init_from`."""
        if "state_dict" in content:
            super().start_from(content, path, without)
        else:
            start_trunk(self.network, self._name, self.preprocessing, content, path, without)
