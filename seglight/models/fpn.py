"""The feature pyramid (Lin et al., CVPR 2017) and Semantic FPN (Kirillov et al., Panoptic FPN, CVPR 2019).

`FeaturePyramid` is the one of all our models. Semantic FPN on ResNet-50 with 21 classes has 28,478,933 parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from seglight.models.backbones import Backbone
from seglight.models.blocks import HeConv2d
from seglight.models.semantic import SemanticModel

STRIDES = (4, 8, 16, 32)
GROUPS = 32


class FeaturePyramid(nn.Module):
    """Levels of equal depth: a 1x1 convolution of each feature map plus the doubled coarser level, then a 3x3 one.

    No activation and no normalisation. Weights start uniform (He, a = 1) and biases at 0, as in torchvision, whose
    `FeaturePyramidNetwork` computes the same; doubling repeats pixels, up to the finer map's size if that is odd.

    Args:
        channels: of the feature maps, finest first.
        width: channels of every level; 256 for detection, 128 for mask proposals.
        subsampled: a further level, every second pixel of the coarsest (P6).

    Shapes: list of (B, channels[i], H_i, W_i) -> list of (B, width, H_i, W_i), and with `subsampled` one more of half
    the last size, rounded up.
    """

    def __init__(self, channels: Sequence[int], width: int = 256, subsampled: bool = False):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(depth, width, 1) for depth in channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.subsampled = subsampled
        for conv in (*self.lateral, *self.output):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Build the levels of feature maps; see the class."""
        levels: list[Tensor] = []
        above: Tensor | None = None
        for i in reversed(range(len(self.lateral))):
            merged = self.lateral[i](features[i])
            if above is not None:
                merged = merged + F.interpolate(above, merged.shape[-2:], mode="nearest")
            above = merged
            levels.insert(0, self.output[i](merged))
        if self.subsampled:
            levels.append(levels[-1][..., ::2, ::2])
        return levels


class SemanticHead(nn.Module):
    """Brings every level of a pyramid to the finest one by steps of 2 and adds them up.

    A step is a 3x3 convolution, group normalisation (32 groups), a ReLU and bilinear interpolation to the size of the
    next finer level: as many steps as the level lies above the finest. The finest has one without interpolation.

    Args:
        levels: number of levels.
        channels: of each level.
        width: channels of the steps and of the result.
        align_corners: of the interpolation.

    Shapes: list of (B, channels, H_i, W_i), finest first -> (B, width, H_0, W_0).
    """

    def __init__(self, levels: int, channels: int = 256, width: int = 128, align_corners: bool = False):
        super().__init__()
        self.align_corners = align_corners
        self.steps = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(
                    HeConv2d(width if step else channels, width, 3, padding=1, bias=False),
                    nn.GroupNorm(GROUPS, width),
                    nn.ReLU(inplace=True),
                )
                for step in range(max(1, level))
            )
            for level in range(levels)
        )

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Merge the levels; see the class."""
        total = self.steps[0][0](levels[0])
        for level, steps in enumerate(self.steps[1:], start=1):
            x = levels[level]
            for step, block in enumerate(steps, start=1):
                size = levels[level - step].shape[-2:]
                x = F.interpolate(block(x), size, mode="bilinear", align_corners=self.align_corners)
            total = total + x
        return total


class SemanticFPNNetwork(nn.Module):
    """Features at strides 4 to 32, a pyramid, the levels merged at stride 4, a 1x1 score.

    Args: as of `SemanticFPN`.

    Shapes: (B, 3, H, W) -> {"out": (B, K, ~H / 4, ~W / 4)}, for any H and W.

    Raises:
        ValueError: the backbone lacks a stride, or the head's width does not fit its groups.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pyramid_width: int = 256,
        head_width: int = 128,
        align_corners: bool = False,
        pretrained: bool = False,
    ):
        super().__init__()
        if head_width % GROUPS:
            raise ValueError(f"head_width is {head_width}; the group norm of the head needs a multiple of {GROUPS}.")
        self.backbone = Backbone(backbone, None, pretrained=pretrained)
        self.taps = [self.backbone.level(stride) for stride in STRIDES]
        channels = [self.backbone.channels[tap] for tap in self.taps]
        self.pyramid = FeaturePyramid(channels, pyramid_width)
        self.head = SemanticHead(len(STRIDES), pyramid_width, head_width, align_corners)
        self.score = nn.Conv2d(head_width, num_classes, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score a normalised image; see the class."""
        features = self.backbone(image)
        return {"out": self.score(self.head(self.pyramid([features[tap] for tap in self.taps])))}


class SemanticFPN(SemanticModel):
    """Semantic FPN. On Cityscapes: 77.7 mIoU (val) with ResNet-101, 79.1 with ResNeXt-101.

    The paper's recipe, for Cityscapes: SGD with lr 0.01, divided by 10 after 40k and 55k of 65k steps of 32 crops of
    512 x 1024, scaled by 0.5 to 2, weight decay 1e-4. smp's FPN differs: no 3x3 convolutions in the pyramid, dropout,
    corner-aligned interpolation. Left to choose by the paper, and He initialisation here: the head's weights.

    Args:
        num_classes: K.
        backbone: timm name of a network with features at strides 4, 8, 16 and 32.
        pretrained: start from timm's ImageNet weights of the backbone.
        pyramid_width: channels of the pyramid.
        head_width: channels of the head, a multiple of 32; with 32, images need more than 32 pixels a side.
        align_corners: of all interpolation of scores and of the head.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool = False,
        pyramid_width: int = 256,
        head_width: int = 128,
        align_corners: bool = False,
        **kwargs: Any,
    ):
        network = SemanticFPNNetwork(num_classes, backbone, pyramid_width, head_width, align_corners, pretrained)
        super().__init__(network=network, num_classes=num_classes, align_corners=align_corners, **kwargs)
        network.backbone.check_preprocessing(self.preprocessing)
