"""What DeepLab v3 and v3+ share: atrous pyramid pooling, a stride of its own for evaluation, the model's options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seglight.models.backbones import Backbone
from seglight.models.blocks import global_mean
from seglight.models.semantic import SemanticModel

OutputStride = Literal[8, 16, 32]


class ConvBNReLU(nn.Sequential):
    """Convolution without bias, batch norm and ReLU; same size out. Weights Xavier uniform, as TensorFlow slim has."""

    def __init__(self, in_channels: int, channels: int, kernel: int = 1, rate: int = 1):
        conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2 * rate, dilation=rate, bias=False)
        nn.init.xavier_uniform_(conv.weight)
        super().__init__(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class SeparableConvBNReLU(nn.Sequential):
    """A depthwise and a pointwise convolution, each with batch norm and ReLU.

    Weights are normal, cut off at two standard deviations of 0.33 (depthwise) and 0.06 (pointwise), as in the release.
    """

    def __init__(self, in_channels: int, channels: int, kernel: int = 3, rate: int = 1):
        padding = kernel // 2 * rate
        depthwise = nn.Conv2d(
            in_channels, in_channels, kernel, padding=padding, dilation=rate, groups=in_channels, bias=False
        )
        pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
        truncated_normal(depthwise.weight, 0.33)
        truncated_normal(pointwise.weight, 0.06)
        super().__init__(
            depthwise,
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            pointwise,
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling with features of the whole image.

    Args:
        in_channels: of the features.
        rates: of the 3x3 convolutions at output stride 16; in proportion at others.
        channels: of each branch and of the result.
        separable: atrous separable convolutions (DeepLab v3+).
        image_pooling: with the branch that averages over the image.
        dropout: share of the result that is dropped in training.

    Shapes: (B, in_channels, h, w) -> (B, channels, h, w).
    """

    def __init__(
        self,
        in_channels: int,
        rates: Sequence[int] = (6, 12, 18),
        channels: int = 256,
        separable: bool = False,
        image_pooling: bool = True,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.rates = tuple(rates)
        atrous = SeparableConvBNReLU if separable else ConvBNReLU
        self.point = ConvBNReLU(in_channels, channels)
        self.atrous = nn.ModuleList(atrous(in_channels, channels, 3, rate) for rate in rates)
        self.pool = ConvBNReLU(in_channels, channels) if image_pooling else None
        self.project = ConvBNReLU((1 + len(self.rates) + image_pooling) * channels, channels)
        self.dropout = nn.Dropout(dropout)

    def set_output_stride(self, output_stride: int) -> None:
        """Scale the rates, so that each covers the same part of the image at any stride."""
        for branch, rate in zip(self.atrous, self.rates, strict=True):
            rate = max(1, rate * 16 // output_stride)
            branch[0].dilation = branch[0].padding = (rate, rate)

    def forward(self, x: Tensor) -> Tensor:
        """Branches side by side; see the class."""
        branches = [self.point(x), *(branch(x) for branch in self.atrous)]
        if self.pool is not None:
            if self.pool[1].training and type(self.pool[1]) is nn.BatchNorm2d and len(x) == 1:
                raise ValueError(
                    "A batch of one image cannot be trained on: the image pooling of ASPP has one value per channel "
                    "and image, which batch norm cannot normalise. Set data.batch_size to 2 or more, or "
                    "model.batch_norm to eval, or model.image_pooling to false."
                )
            pooled = self.pool(global_mean(x))
            # As `expand`, but in the memory format of the others: concatenating mixed formats would copy them all.
            branches.append(torch.empty_like(branches[0]).copy_(pooled))
        return self.dropout(self.project(torch.cat(branches, 1)))


class AtrousNetwork(nn.Module):
    """A network on a dilated trunk, of one output stride in training and another in evaluation.

    Args:
        backbone: the trunk.
        output_stride: in train mode.
        test_output_stride: in eval mode.
    """

    def __init__(self, backbone: Backbone, output_stride: int, test_output_stride: int):
        super().__init__()
        self.backbone = backbone
        self.output_stride, self.test_output_stride = output_stride, test_output_stride

    @property
    def stride(self) -> int:
        """The output stride of the present mode."""
        return self.output_stride if self.training else self.test_output_stride

    def set_output_stride(self, output_stride: int) -> None:
        """Trade strides for rates, in the trunk and in all that sits on it.

        Raises:
            ValueError: the trunk cannot have this stride.
        """
        self.backbone.set_output_stride(output_stride)

    def check_strides(self) -> None:
        """Be at the training stride, and know that evaluation's is possible. For the end of a constructor."""
        for stride in (self.test_output_stride, self.output_stride):
            self.set_output_stride(stride)

    def follow_mode(self) -> None:
        """Take the output stride of train or eval mode.

        For the start of `forward` too: after a validation Lightning restores `training` without calling `train`.
        """
        if self.stride != self.backbone.output_stride:
            self.set_output_stride(self.stride)

    def train(self, mode: bool = True) -> AtrousNetwork:
        """As `nn.Module.train`, with the output stride of that mode."""
        super().train(mode)
        self.follow_mode()
        return self


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """The 1x1 convolution to logits: weights normal with standard deviation 0.01, cut off at two; biases 0."""
    layer = nn.Conv2d(channels, num_classes, 1)
    truncated_normal(layer.weight, 0.01)
    nn.init.zeros_(layer.bias)
    return layer


def truncated_normal(weight: Tensor, std: float) -> None:
    """TensorFlow's truncated normal: values beyond two standard deviations are drawn again."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class DeepLab(SemanticModel):
    """What the DeepLab v3 and v3+ models share.

    Args:
        network: an `AtrousNetwork`.
        num_classes: K.
        align_corners: how logits are resized to labels. With True, images for evaluation whose sides are not a multiple
            of the output stride plus one are padded to that with the mean colour, and the scores cropped; choose
            training crops of 16k + 1, such as 321, 513 or 769.
        batch_norm_decay: how much of its running mean and variance each batch norm keeps per step. The paper: 0.9997.
    """

    network: AtrousNetwork
    free = SemanticModel.free | {"test_output_stride"}

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        align_corners: bool = True,
        batch_norm_decay: float = 0.9,
        **kwargs: Any,
    ):
        if not 0 <= batch_norm_decay < 1:
            raise ValueError(f"batch_norm_decay is {batch_norm_decay}; it must lie between 0 and 1, as 0.9 or 0.9997.")
        super().__init__(network=network, num_classes=num_classes, align_corners=align_corners, **kwargs)
        for layer in self._batch_norms():
            layer.momentum = 1 - batch_norm_decay

    def logits(self, image: Tensor) -> Tensor:
        """Scores of normalised images; at image size where the image had to be padded."""
        height, width = image.shape[-2:]
        down, right = (-(side - 1) % self.network.stride for side in (height, width))
        if not self.align_corners or not (down or right):
            return super().logits(image)
        image = nn.functional.pad(image, (0, right, 0, down))
        logits = super().logits(image).float()
        logits = nn.functional.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=True)
        return logits[..., :height, :width]

    def start_from(self, content: dict[str, Any], path: str, without: tuple[str, ...] = ()) -> None:
        """Take a seglight checkpoint; torchvision's DeepLabV3 is another network, and refused."""
        if "classifier.0.convs.0.0.weight" in content:
            raise ValueError(
                f"{path} is of torchvision's DeepLabV3, which has another dilation rule, no multi-grid and one more "
                f"3x3 convolution than {self._name}: its weights would fit nowhere. Use model TorchvisionSegmentation, "
                f"which takes that file."
            )
        super().start_from(content, path, without)


def check_pretrained(backbone: str, pretrained: bool, preprocessing: str) -> None:
    """Refuse to give a trunk's ImageNet weights pixels of another normalisation family, before anything is loaded.

    Raises:
        ValueError: the families differ.
    """
    if not pretrained:
        return
    with torch.device("meta"):
        wanted = Backbone(backbone, None).preprocessing
    if preprocessing != wanted:
        raise ValueError(
            f'The ImageNet weights of {backbone} expect preprocessing "{wanted}", but it is "{preprocessing}"; '
            f"set model.preprocessing to {wanted}, or pretrained to false."
        )
