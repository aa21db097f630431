"""PSPNet: a dilated ResNet whose features are pooled to four grids, from the whole image down to a sixth of its sides
(Zhao, Shi, Qi, Wang, Jia; CVPR 2017).

Topology: ResNet-101 with a stem of three 3x3 convolutions (64-64-128) at output stride 8, dilated uniformly (2 in the
third stage, 4 in the fourth); adaptive average pooling to 1, 2, 3 and 6, each followed by a 1x1 convolution to 512
channels and widened again; all of it beside the features through a 3x3 convolution to 512, dropout, scores. In training
an auxiliary head on the third stage, of loss weight 0.4. 68,073,706 parameters with 21 classes and the auxiliary head.

Recipe of the paper (experiments/voc/pspnet.yaml): SGD 0.9, weight decay 1e-4, poly 0.9 from 0.01, ten times that
outside the trunk, batch 16 with synchronised batch norm, crops of 473, scale 0.5 to 2, rotation of 10 degrees.

Faithful to the authors' PyTorch release (semseg). Where it differs from their Caffe release: strides sit in the 3x3
convolution of a block (`stride_in_1x1` moves them), dropout drops whole channels, the classifier's bias has no learning
rate of its own, and the pooled features are concatenated from coarse to fine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seglight import inference
from seglight.models.backbones import Backbone, DilationRule
from seglight.models.blocks import global_mean
from seglight.models.semantic import SemanticModel, trained_outputs


class PyramidPooling(nn.Module):
    """Features beside their means over grids of 1x1, 2x2, 3x3 and 6x6 cells.

    Args:
        channels: C of the features. Each grid gets C // len(bins) of them.
        bins: sides of the grids; none leaves the features as they are.
        align_corners: of widening the grids to the size of the features.

    Shapes: (B, C, h, w) -> (B, out_channels, h, w), for any h and w.

    Raises:
        ValueError: in training, one image and a grid of one cell: batch norm has nothing to normalise over.
    """

    def __init__(self, channels: int, bins: Sequence[int] = (1, 2, 3, 6), align_corners: bool = True):
        super().__init__()
        width = channels // max(1, len(bins))
        self.grids = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), *_conv(channels, width, 1)) for side in bins
        )
        self.out_channels = channels + len(bins) * width
        self.align_corners = align_corners

    def forward(self, x: Tensor) -> Tensor:
        """Pool and concatenate; see the class."""
        maps = [x]
        for pool, conv, norm, relu in self.grids:
            cells = conv(global_mean(x) if pool.output_size == 1 else pool(x))
            if norm.training and cells.shape.numel() == cells.shape[1] and isinstance(norm, nn.BatchNorm2d):
                raise ValueError(
                    "The grid of one cell cannot be trained on one image: batch norm has no variance there. Set "
                    'data.batch_size to 2 or more, model.batch_norm to "eval", or leave 1 out of model.bins.'
                )
            maps.append(_resize(relu(norm(cells)), x.shape[-2:], self.align_corners))
        return torch.cat(maps, 1)


class PSPNetNetwork(nn.Module):
    """A trunk, its pyramid of means, and the scores; see the module for the paper's choice of each.

    New layers start as torch initialises them, as in the release.

    Args:
        num_classes: K.
        backbone: name in timm; the paper's are resnet50s, resnet101s, resnet152s and resnet269s.
        pretrained: ImageNet weights of the trunk.
        output_stride: 8, or what a trunk that cannot be dilated has.
        dilation: rule, see `seglight.models.backbones`. "uniform" exists for the ResNet family.
        stride_in_1x1: strides of the trunk as in Caffe's ResNets.
        bins: sides of the pooling grids.
        width: channels before the scores; the auxiliary head has half of them.
        dropout: probability of dropping a channel before the scores.
        aux: an auxiliary head on the last stage but one.
        align_corners: corners of the features lie on corners of the image. The image is then padded right and below to
            8k + 1 pixels a side, where this is exact. False suits trunks made of patches (ConvNeXt, Swin, ViT).

    Shapes: (B, 3, H, W) -> {"out": (B, K, h, w), "aux": (B, K, h, w)}, h = (H - 1) / 8 + 1 if H and W are of the form
    8k + 1, else the scores have the size of the image: what was padded is cut off again.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101s",
        pretrained: bool = False,
        output_stride: int = 8,
        dilation: DilationRule = "uniform",
        stride_in_1x1: bool = False,
        bins: Sequence[int] = (1, 2, 3, 6),
        width: int = 512,
        dropout: float = 0.1,
        aux: bool = True,
        align_corners: bool = True,
    ):
        super().__init__()
        self.backbone = Backbone(backbone, output_stride, dilation, stride_in_1x1=stride_in_1x1, pretrained=pretrained)
        *_, middle, deep = self.backbone.channels
        self.pyramid = PyramidPooling(deep, bins, align_corners)
        self.head = _scores(self.pyramid.out_channels, width, num_classes, dropout)
        self.aux = _scores(middle, width // 2, num_classes, dropout) if aux else None
        self.align_corners = align_corners

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score a normalised image; see the class."""
        height, width = image.shape[-2:]
        stride = self.backbone.output_stride
        down, right = (-(side - 1) % stride if self.align_corners else 0 for side in (height, width))
        if down or right:  # with the mean colour: zero once normalised
            image = nn.functional.pad(image, (0, right, 0, down))
        features = self.backbone(image)
        outputs = {"out": self.head(self.pyramid(features[-1]))}
        if self.aux is not None:
            outputs["aux"] = self.aux(features[-2])
        if down or right:
            outputs = {
                name: _resize(scores.float(), image.shape[-2:], True)[..., :height, :width]
                for name, scores in outputs.items()
            }
        return outputs


def _conv(before: int, after: int, kernel: int) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]


def _scores(channels: int, width: int, num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(*_conv(channels, width, 3), nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1))


def _resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return nn.functional.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


class PSPNet(SemanticModel):
    """PSPNet on any trunk of timm; the defaults are the paper's headline network, ResNet-101 with an auxiliary head.

    Training crops and images may have any size; those of 8k + 1 pixels (473, 713) need no padding.

    With `test_window` a test follows the authors' release: each window is looked at as it is and, with `test_flip`,
    mirrored; probabilities are averaged over windows, widened to the image, averaged over scales. An image smaller than
    a window lies in its middle. Images are resized half-pixel (there by OpenCV), to sizes rounded as in Python. Theirs
    on VOC: `test_window` 473, `test_long_side` 512 (Cityscapes: 713 and 2048), `test_flip`, `test_scales` 0.5, 0.75, 1,
    1.25, 1.5, 1.75. Without windows, which they do not do, images are resized corner-aligned, as all else.

    Args:
        num_classes: K.
        backbone: name in timm; the paper's are resnet50s, resnet101s, resnet152s and resnet269s (without weights).
        pretrained: start the trunk from timm's ImageNet weights.
        output_stride: 8, or what a trunk that cannot be dilated has.
        dilation: rule, see `seglight.models.backbones`; trunks outside the ResNet family need "lagged-first".
        stride_in_1x1: strides of the trunk as in Caffe's ResNets.
        bins: sides of the pooling grids; none makes a plain dilated FCN.
        width: channels before the scores; 512 is the paper's, less is for trials.
        align_corners: corners of features, scores and labels coincide. False suits trunks made of patches.
        loss_weights: of `out` and `aux`; none means 1 and the paper's 0.4. Without a weight the auxiliary head is not
            built.
    """

    free = SemanticModel.free | {"loss_weights"}

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101s",
        pretrained: bool = False,
        output_stride: int = 8,
        dilation: DilationRule = "uniform",
        stride_in_1x1: bool = False,
        bins: tuple[int, ...] = (1, 2, 3, 6),
        width: int = 512,
        align_corners: bool = True,
        loss_weights: dict[str, float] | None = None,
        **kwargs: Any,
    ):
        weights = trained_outputs(loss_weights, {"out": 1.0, "aux": 0.4})
        if any(side < 1 for side in bins):
            raise ValueError(f"bins is {tuple(bins)}; a grid has at least one cell a side, the paper's are 1, 2, 3, 6.")
        network = PSPNetNetwork(
            num_classes, backbone, pretrained, output_stride, dilation, stride_in_1x1, bins, width,
            aux="aux" in weights, align_corners=align_corners,
        )  # fmt: skip
        super().__init__(
            network=network, num_classes=num_classes, align_corners=align_corners, loss_weights=weights, **kwargs
        )
        network.backbone.check_preprocessing(self.preprocessing)

    def protocol(self, image: Tensor) -> Tensor:
        """Log-probabilities under the test-time options; see the class."""
        if not self.test_window:
            return super().protocol(image)
        windows = partial(
            inference.sliding,
            self.logits,
            window=self.test_window,
            stride=-(-2 * self.test_window // 3),
            aggregate=self.test_aggregate,
            align_corners=self.align_corners,
            flip=self.test_flip,
            centred=True,
        )
        if not self.test_long_side and list(self.test_scales) == [1.0]:
            return windows(image)
        options = {"aggregate": self.test_aggregate, "long_side": self.test_long_side, "resize": "votes"}
        return inference.multiscale(windows, image, self.test_scales, **options)
