"""DeepLab v3+: an encoder with atrous separable convolutions and a small decoder (Chen et al., ECCV 2018).

DeepLab v3's features, upsampled to stride 4, are joined with features of the trunk at that stride, reduced to 48
channels, so that they do not outweigh the 256 of the encoder; two 3x3 convolutions and a 1x1 classifier follow. With
the aligned Xception all 3x3 convolutions of the head are separable, with batch norm and ReLU after both halves.

Parameters for 21 classes: 41,055,413 (Xception-65), 43,477,837 (71), 28,108,661 (41); 26,696,133 and 45,688,261
(ResNet-50, -101) with a separable head, 40,352,181 and 59,344,309 with a plain one.

Recipe (experiments/voc/deeplabv3plus.yaml): as v3, weight decay 4e-5, none on depthwise convolutions. Published on VOC
val, Xception-65 after COCO: 82.20 (stride 16, one scale), 83.58 (stride 8, scales and mirror); VOC test 87.8, and 89.0
with the private JFT-300M. Cityscapes val 78.79 with Xception-65, 79.14 with Xception-71 and no image pooling.

Where the sources leave a choice or differ:

* The paper has a ReLU after every depthwise convolution of the Xception, the release only in its last block. timm
  follows the release, whose ImageNet weights it offers, and so do we.
* The features at stride 4 are the second separable convolution of entry block 2 (Xception-41, -65) or 3 (-71) before
  the ReLU that follows, as in the release; timm's own tap lies after that ReLU.
* Of a ResNet they are the output of conv2_x, after ReLU, as in the paper. The release takes the last convolution of the
  second unit, before the shortcut is added.
* ResNets get the uniform rule and multi-grid (1, 2, 4) of v3; the Xceptions have neither.
* Plain convolutions of the head start Xavier uniform, depthwise, pointwise and classifier truncated normal (0.33, 0.06,
  0.01), as in the release.
* Images are padded for evaluation, and batch norm decays, as in `deeplabv3`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seglight.models.atrous import (
    ASPP,
    AtrousNetwork,
    ConvBNReLU,
    DeepLab,
    OutputStride,
    SeparableConvBNReLU,
    check_pretrained,
    classifier,
)
from seglight.models.backbones import Backbone, DilationRule
from seglight.models.base import Preprocessing


class DeepLabV3PlusNetwork(AtrousNetwork):
    """A dilated trunk, ASPP, and a decoder at stride 4.

    Args: as of `DeepLabV3Plus`.

    Shapes: (B, 3, H, W) -> {"out": (B, K, h, w)}, h about H / 4: exactly (H - 1) / 4 + 1 for H of 16k + 1.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "xception65",
        output_stride: int = 16,
        test_output_stride: int = 8,
        separable: bool = True,
        dilation: DilationRule | None = None,
        multi_grid: Sequence[int] | None = None,
        rates: Sequence[int] = (6, 12, 18),
        channels: int = 256,
        low_level_channels: int = 48,
        dropout: float = 0.1,
        image_pooling: bool = True,
        pretrained: bool = False,
    ):
        xception = backbone.startswith("xception")
        dilation = dilation or ("lagged-first" if xception else "uniform")
        multi_grid = multi_grid or ((1, 2, 4) if dilation == "uniform" else (1, 1, 1))
        trunk = Backbone(backbone, output_stride, dilation, multi_grid, pretrained=pretrained, raw_taps=xception)
        super().__init__(trunk, output_stride, test_output_stride)
        self.low_level = trunk.level(4)
        conv = SeparableConvBNReLU if separable else ConvBNReLU
        self.aspp = ASPP(trunk.channels[-1], rates, channels, separable, image_pooling, dropout)
        self.reduce = ConvBNReLU(trunk.channels[self.low_level], low_level_channels)
        self.decoder = nn.Sequential(conv(channels + low_level_channels, channels, 3), conv(channels, channels, 3))
        self.classifier = classifier(channels, num_classes)
        self.check_strides()

    def set_output_stride(self, output_stride: int) -> None:
        """Trade strides for rates, in the trunk and in ASPP."""
        super().set_output_stride(output_stride)
        self.aspp.set_output_stride(output_stride)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score a normalised image; see the class."""
        self.follow_mode()
        features = self.backbone(image)
        low = self.reduce(features[self.low_level])
        high = nn.functional.interpolate(self.aspp(features[-1]), low.shape[-2:], mode="bilinear", align_corners=True)
        return {"out": self.classifier(self.decoder(torch.cat([high, low], 1)))}


class DeepLabV3Plus(DeepLab):
    """DeepLab v3+; see the module for the paper and its recipe.

    Args:
        num_classes: K.
        backbone: a network of timm with features at stride 4 that can be dilated: "xception41", "xception65",
            "xception71", or a ResNet (with `preprocessing: torch`; the paper's ablations have `separable: false`).
        output_stride: in training: 16, or 8.
        test_output_stride: test-time: 8, or 16 for speed.
        separable: separable 3x3 convolutions in ASPP and decoder, or plain ones.
        dilation: rule of the trunk; none means "lagged-first" for the Xceptions, which have no other, else "uniform".
        multi_grid: factors of the rates in the trunk's last stage; none means [1, 2, 4] with "uniform", else no grid.
        rates: of ASPP at output stride 16; doubled at 8.
        channels: of ASPP and decoder; 256 in the paper.
        low_level_channels: what the features of stride 4 are reduced to; 48 in the paper.
        dropout: after ASPP.
        image_pooling: with ASPP's branch for the whole image; the paper leaves it out with Xception-71 on Cityscapes.
        decay_depthwise: give depthwise convolutions weight decay too; the release does not.
        preprocessing: "half" is that of the Xceptions.
        pretrained: start the trunk from timm's ImageNet weights.
    """

    free = DeepLab.free | {"decay_depthwise"}

    def __init__(
        self,
        num_classes: int,
        backbone: str = "xception65",
        output_stride: OutputStride = 16,
        test_output_stride: OutputStride = 8,
        separable: bool = True,
        dilation: DilationRule | None = None,
        multi_grid: Sequence[int] | None = None,
        rates: Sequence[int] = (6, 12, 18),
        channels: int = 256,
        low_level_channels: int = 48,
        dropout: float = 0.1,
        image_pooling: bool = True,
        decay_depthwise: bool = False,
        preprocessing: Preprocessing = "half",
        pretrained: bool = False,
        **kwargs: Any,
    ):
        check_pretrained(backbone, pretrained, preprocessing)
        network = DeepLabV3PlusNetwork(
            num_classes, backbone, output_stride, test_output_stride, separable, dilation, multi_grid, rates, channels,
            low_level_channels, dropout, image_pooling, pretrained,
        )  # fmt: skip
        super().__init__(network=network, num_classes=num_classes, preprocessing=preprocessing, **kwargs)
        self.decay_depthwise = decay_depthwise

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As for every model, with the depthwise weights in groups without weight decay."""
        groups = super().parameter_groups()
        if self.decay_depthwise:
            return groups
        depthwise = {
            layer.weight
            for layer in self.network.modules()
            if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
        }
        split = []
        for group in groups:
            for chosen, decay in ((False, group["weight_decay"]), (True, 0.0)):
                params = [parameter for parameter in group["params"] if (parameter in depthwise) == chosen]
                if params:
                    split.append({**group, "params": params, "weight_decay": decay})
        return split
