"""DeepLab v3: atrous convolution in parallel or in cascade (Chen, Papandreou, Schroff, Adam, 2017).

A ResNet whose last stages keep the resolution, dilated block by block ("multi-grid"), and either

* atrous spatial pyramid pooling (`DeepLabV3`, the published best): a 1x1 and three 3x3 convolutions of different rates
  beside the mean of the whole map, 256 channels each, concatenated and projected to 256 channels, or
* copies of the last stage, block5 to block7, each of twice the rate of the one before (`DeepLabV3Cascade`),

under one 1x1 classifier. Logits are resized to the label, never the label to the logits. No CRF.

The paper trains at output stride 16, which is fast, and evaluates the same weights at 8, which is accurate: going to
eval mode halves the stride and doubles every rate, going back to train mode undoes it.

Parameters for 21 classes: 39,048,533 (ResNet-50) and 58,040,661 (ResNet-101) in parallel; 42,543,189 for the cascade on
ResNet-101 that ends with block4, 95,301,717 with block7.

Recipe (experiments/voc/deeplabv3.yaml): crop 513, batch 16, SGD 0.007 with the poly schedule for 30,000 steps at output
stride 16 with batch norm of decay 0.9997; then another 30,000 on the official trainval at stride 8 from 0.001 with
frozen batch norm. Published on VOC val, ResNet-101: 77.21 at stride 16, 78.51 at 8, 79.45 with six scales, 79.77 with
mirrored images too; the best cascade 79.35.

Where the sources leave a choice or we depart from them:

* The stem is the 7x7 one of the paper's count; the TensorFlow release has three 3x3 (`backbone: resnet101s`).
* The release strides in the last unit of a stage, torchvision's and timm's weights in the first; a first unit that
  lost its stride has the full rate of its stage here.
* Branches are concatenated as 1x1, atrous, pooled (torchvision's and smp's order); the release puts the pooled first.
* The release pads images for evaluation to one size, 513; here to the next multiple of the stride plus one.
* The mean of the image is taken over whatever comes in. With `test_window` that is a window as large as in training.
* The first unit of each copied block has a projection shortcut, as block4's has; the copies are drawn anew.
* The paper's batch norm decay is a matter of long schedules, so it is an option and the default is torch's 0.9.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from seglight.models.atrous import ASPP, AtrousNetwork, DeepLab, OutputStride, check_pretrained, classifier
from seglight.models.backbones import Backbone, DilationRule, dilate


class DeepLabV3Network(AtrousNetwork):
    """A dilated trunk, ASPP and a 1x1 classifier.

    Args: as of `DeepLabV3`.

    Shapes: (B, 3, H, W) -> {"out": (B, K, h, w)}, h about H / output stride: exactly (H - 1) / stride + 1 where the
    division has no rest.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101",
        output_stride: int = 16,
        test_output_stride: int = 8,
        dilation: DilationRule = "uniform",
        multi_grid: Sequence[int] = (1, 2, 4),
        rates: Sequence[int] = (6, 12, 18),
        channels: int = 256,
        dropout: float = 0.1,
        image_pooling: bool = True,
        pretrained: bool = False,
    ):
        trunk = Backbone(backbone, output_stride, dilation, multi_grid, pretrained=pretrained)
        super().__init__(trunk, output_stride, test_output_stride)
        self.aspp = ASPP(trunk.channels[-1], rates, channels, False, image_pooling, dropout)
        self.classifier = classifier(channels, num_classes)
        self.check_strides()

    def set_output_stride(self, output_stride: int) -> None:
        """Trade strides for rates, in the trunk and in ASPP."""
        super().set_output_stride(output_stride)
        self.aspp.set_output_stride(output_stride)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score a normalised image; see the class."""
        self.follow_mode()
        return {"out": self.classifier(self.aspp(self.backbone(image)[-1]))}


class DeepLabV3CascadeNetwork(AtrousNetwork):
    """A dilated trunk whose last stage, block4, is followed by copies of it, and a 1x1 classifier.

    At output stride 16 the rates of block4 to block7 are 2, 4, 8 and 16, times the multi-grid.

    Args: as of `DeepLabV3Cascade`.

    Shapes: (B, 3, H, W) -> {"out": (B, K, h, w)}, h about H / output stride.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101",
        output_stride: int = 16,
        test_output_stride: int = 8,
        last_block: int = 7,
        shortcut: Literal["projection", "identity"] = "projection",
        multi_grid: Sequence[int] = (1, 2, 1),
        pretrained: bool = False,
    ):
        if not 4 <= last_block <= 7:
            raise ValueError(f"last_block is {last_block}; choose 4 (the trunk alone), 5, 6 or 7.")
        if shortcut not in ("projection", "identity"):
            raise ValueError(f'shortcut is {shortcut!r}; choose "projection" or "identity".')
        trunk = Backbone(backbone, output_stride, "uniform", multi_grid, pretrained=pretrained)
        if last_block > 4 and len(trunk.body.layer4) < 2:
            raise ValueError(
                f"The last stage of {backbone} is a single unit, which changes the number of channels, so no copy can "
                "follow it. Choose a deeper ResNet, such as resnet18, or last_block 4."
            )
        super().__init__(trunk, output_stride, test_output_stride)
        self.multi_grid = tuple(multi_grid)
        self.cascade = nn.ModuleDict(
            {
                f"block{number}": _copy_stage(trunk.body.layer4, trunk.channels[-1], shortcut)
                for number in range(5, last_block + 1)
            }
        )
        self.classifier = classifier(trunk.channels[-1], num_classes)
        self.check_strides()

    def set_output_stride(self, output_stride: int) -> None:
        """Trade strides for rates, in the trunk and in the copies."""
        super().set_output_stride(output_stride)
        rate = 32 // output_stride
        for block in self.cascade.values():
            rate *= 2
            for i, unit in enumerate(block):
                dilate(unit, rate * self.multi_grid[i % len(self.multi_grid)])

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score a normalised image; see the class."""
        self.follow_mode()
        x = self.backbone(image)[-1]
        for block in self.cascade.values():
            x = block(x)
        return {"out": self.classifier(x)}


def _copy_stage(stage: nn.Sequential, channels: int, shortcut: str) -> nn.Sequential:
    """A stage of the same units that takes what the stage gives, with weights of its own (He normal, as timm draws)."""
    copies = nn.Sequential(*(copy.deepcopy(stage[max(i, 1)]) for i in range(len(stage))))
    if shortcut == "projection":
        copies[0].downsample = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
    for layer in copies.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
    return copies


class DeepLabV3(DeepLab):
    """DeepLab v3 with parallel atrous convolutions (ASPP); see the module for the paper and its recipe.

    Args:
        num_classes: K.
        backbone: any network of timm that can be dilated. Those that are no ResNets take `dilation: lagged-first`.
        output_stride: in training: 16, or 8 for the last stage of the paper's recipe.
        test_output_stride: test-time: 8, or 16 for speed.
        dilation: rule of the trunk, "uniform" in the paper.
        multi_grid: factors of the rates in the trunk's last stage, block by block; [1, 1, 1] with "lagged-first".
        rates: of ASPP at output stride 16; doubled at 8.
        channels: of ASPP; 256 in the paper.
        dropout: before the classifier.
        image_pooling: with ASPP's branch for the whole image.
        pretrained: start the trunk from timm's ImageNet weights.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101",
        output_stride: OutputStride = 16,
        test_output_stride: OutputStride = 8,
        dilation: DilationRule = "uniform",
        multi_grid: Sequence[int] = (1, 2, 4),
        rates: Sequence[int] = (6, 12, 18),
        channels: int = 256,
        dropout: float = 0.1,
        image_pooling: bool = True,
        pretrained: bool = False,
        **kwargs: Any,
    ):
        check_pretrained(backbone, pretrained, kwargs.get("preprocessing", "torch"))
        network = DeepLabV3Network(
            num_classes, backbone, output_stride, test_output_stride, dilation, multi_grid, rates, channels, dropout,
            image_pooling, pretrained,
        )  # fmt: skip
        super().__init__(network=network, num_classes=num_classes, **kwargs)


class DeepLabV3Cascade(DeepLab):
    """DeepLab v3 with atrous convolutions in cascade: copies of the trunk's last stage at growing rates.

    Args:
        num_classes: K.
        backbone: a ResNet of timm.
        output_stride: in training.
        test_output_stride: test-time.
        last_block: 4 (no copy) to 7; the paper's best is 7.
        shortcut: of the first unit of each copy: "projection" as in the stage it copies, or "identity".
        multi_grid: factors of the rates in block4 and its copies.
        pretrained: start the trunk from timm's ImageNet weights.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101",
        output_stride: OutputStride = 16,
        test_output_stride: OutputStride = 8,
        last_block: int = 7,
        shortcut: Literal["projection", "identity"] = "projection",
        multi_grid: Sequence[int] = (1, 2, 1),
        pretrained: bool = False,
        **kwargs: Any,
    ):
        check_pretrained(backbone, pretrained, kwargs.get("preprocessing", "torch"))
        network = DeepLabV3CascadeNetwork(
            num_classes, backbone, output_stride, test_output_stride, last_block, shortcut, multi_grid, pretrained
        )
        super().__init__(network=network, num_classes=num_classes, **kwargs)
