"""EncNet: one vector encodes what the whole image shows, and weighs the channels of every pixel by it (Zhang, Dana,
Shi, Zhang, Wang, Tyagi, Agrawal; CVPR 2018).

Topology: ResNet-101 with a stem of three 3x3 convolutions (64-64-128) at output stride 8, dilated lagged-first; a 3x3
convolution to 512; laterals of 512 from the second and third stage, fused by a 3x3 convolution; the context encoding
module: residuals of all pixels to 32 learned codewords, softly assigned and summed, their mean over the codewords, a
sigmoid weight for each channel; dropout, scores. Losses: cross entropy, 0.2 times the presence of each class in the
image told from the encoding (SE loss), 0.2 times an auxiliary head on the third stage. 62,907,345 parameters with the
59 classes of PASCAL-Context.

Recipe of the release (experiments/voc/encnet.yaml): SGD 0.9, weight decay 1e-4, poly 0.9 from 0.001, ten times that
outside the trunk, batch 16 with synchronised batch norm, crops of 480, 80 passes over the data.

Faithful to the authors' release. The paper differs, each as an option: no laterals (`lateral`); features times their
weights without the features themselves added (`residual`); a second, light encoding on the third stage with an SE loss
instead of the auxiliary head (`se_stage3` in `loss_weights`). That one's width, 512, is our choice.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seglight import inference
from seglight.models.backbones import Backbone, DilationRule
from seglight.models.semantic import SemanticModel, trained_outputs


class Encoding(nn.Module):
    """Sums of residuals to learned codewords: a description of a set of pixels, whatever their order.

    With residuals r_ik = x_i - d_k and weights a_ik = softmax over k of s_k * |r_ik|^2, it returns the sums over i of
    a_ik * r_ik. The residuals themselves, N * K * D numbers, are never stored; the computation is in float32, because
    the squared distances of 512 channels leave half precision no digits to differ in.

    Args:
        channels: D.
        codewords: K.

    Shapes: (B, D, H, W) -> (B, K, D), N = H * W.
    """

    def __init__(self, channels: int, codewords: int = 32):
        super().__init__()
        bound = (channels * codewords) ** -0.5
        self.codewords = nn.Parameter(torch.empty(codewords, channels).uniform_(-bound, bound))
        self.smoothing = nn.Parameter(torch.empty(codewords).uniform_(-1, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Encode features; see the class."""
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._encode(x.float())
        return self._encode(x)

    def _encode(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        words, smoothing = self.codewords, self.smoothing[:, None]
        distances = x.square().sum(1, keepdim=True) - 2 * (words @ x) + words.square().sum(1)[:, None]  # (B, K, N)
        weights = (smoothing * distances).softmax(1)
        return weights @ x.transpose(1, 2) - weights.sum(2)[..., None] * words


class ContextEncoding(nn.Module):
    """One vector for an image: features encoded by codewords, normalised, averaged over the codewords.

    Args:
        before: channels of the features.
        channels: D, of the vector.
        codewords: K.

    Shapes: (B, before, H, W) -> (B, D).
    """

    def __init__(self, before: int, channels: int, codewords: int = 32):
        super().__init__()
        self.project = _conv(before, channels, 1)
        self.encoding = Encoding(channels, codewords)
        self.norm = nn.BatchNorm1d(codewords)

    def forward(self, x: Tensor) -> Tensor:
        """Encode features; see the class."""
        return self.norm(self.encoding(self.project(x))).relu().mean(1)


class EncNetNetwork(nn.Module):
    """A trunk, its context encoding, and the scores; see the module for the release's choice of each.

    New layers start as torch initialises them, as in the release.

    Args:
        num_classes: K.
        backbone: name in timm; the release's are resnet50s and resnet101s.
        pretrained: ImageNet weights of the trunk.
        output_stride: 8, or what a trunk that cannot be dilated has; laterals need the last three stages at one size.
        dilation: rule, see `seglight.models.backbones`.
        lateral: fuse the second and third stage, as the release does for PASCAL data.
        residual: add the weighted features to themselves; False is the paper's text.
        codewords: of the encoding.
        width: channels between trunk and scores.
        dropout: probability, before the scores.
        se: tell the classes in the image from the encoding.
        se_stage3: tell them from a second encoding on the last stage but one (paper).
        aux: an auxiliary head there (release).

    Shapes: (B, 3, H, W) -> {"out": (B, K, h, w), "se": (B, K), "se_stage3": (B, K), "aux": (B, K, h, w)}, h = ceil(H /
    8), for any H and W; keys of heads that exist.

    Raises:
        ValueError: laterals from stages of different sizes.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101s",
        pretrained: bool = False,
        output_stride: int = 8,
        dilation: DilationRule = "lagged-first",
        lateral: bool = True,
        residual: bool = True,
        codewords: int = 32,
        width: int = 512,
        dropout: float = 0.1,
        se: bool = True,
        se_stage3: bool = False,
        aux: bool = True,
    ):
        super().__init__()
        self.backbone = Backbone(backbone, output_stride, dilation, pretrained=pretrained)
        *_, early, middle, deep = self.backbone.channels
        self.lateral, self.residual = lateral, residual
        self.reduce = _conv(deep, width, 3)
        if lateral:
            if len(set(self.backbone.strides[-3:])) > 1:
                raise ValueError(
                    f"Laterals join the last three stages of {backbone}, which have strides "
                    f"{self.backbone.strides[-3:]}; set output_stride to 8, or lateral to false."
                )
            self.lateral2 = _conv(early, width, 1)
            self.lateral3 = _conv(middle, width, 1)
            self.fuse = _conv(3 * width, width, 3)
        self.context = ContextEncoding(width, width, codewords)
        self.attention = nn.Linear(width, width)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(width, num_classes, 1))
        self.se = nn.Linear(width, num_classes) if se else None
        self.se_stage3 = None
        if se_stage3:
            self.se_stage3 = nn.Sequential(ContextEncoding(middle, width, codewords), nn.Linear(width, num_classes))
        self.aux = None
        if aux:
            narrow = middle // 4
            self.aux = nn.Sequential(_conv(middle, narrow, 3), nn.Dropout(dropout), nn.Conv2d(narrow, num_classes, 1))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score a normalised image; see the class."""
        *_, early, middle, deep = self.backbone(image)
        x = self.reduce(deep)
        if self.lateral:
            x = self.fuse(torch.cat([x, self.lateral2(early), self.lateral3(middle)], 1))
        code = self.context(x)
        weighted = x * self.attention(code).sigmoid()[..., None, None]
        outputs = {"out": self.head((x + weighted if self.residual else weighted).relu())}
        if self.se is not None:
            outputs["se"] = self.se(code)
        for name, head in (("se_stage3", self.se_stage3), ("aux", self.aux)):
            if head is not None:
                outputs[name] = head(middle)
        return outputs


def _conv(before: int, after: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True))


def presence(mask: Tensor, num_classes: int) -> Tensor:
    """Which classes occur in each label map.

    Args:
        mask: integers (B, H, W); what is not 0..K-1, such as 255 and -1, is no class.
        num_classes: K.

    Returns:
        float32 (B, K), 0 or 1.
    """
    mask = mask.flatten(1).long()
    labels = torch.where((mask >= 0) & (mask < num_classes), mask, num_classes)
    return torch.zeros(len(mask), num_classes + 1, device=mask.device).scatter_(1, labels, 1.0)[:, :num_classes]


class EncNet(SemanticModel):
    """EncNet on any trunk of timm; the defaults are the network released for PASCAL-Context (with 59 classes).

    Images may have any size. Corners of scores and labels coincide (`align_corners`), although the release's crops of
    480 are not of the form 8k + 1 where this is exact.

    With `test_window` a test follows the authors' release: windows whose last one reaches over the border, where the
    image goes on in black; the logits of a window and, with `test_flip`, of its mirror image are added; their
    exponentials are averaged over windows, widened to the image, averaged over scales. Theirs: `test_window` 480,
    `test_long_side` 520, `test_flip`, `test_scales` 0.5, 0.75, 1, 1.25, 1.5, 1.75.

    Args:
        num_classes: K.
        backbone: name in timm; the release's are resnet50s and resnet101s.
        pretrained: start the trunk from timm's ImageNet weights.
        output_stride: 8, or what a trunk that cannot be dilated has; then without laterals.
        dilation: rule, see `seglight.models.backbones`.
        lateral: fuse the second and third stage: the release for PASCAL data; the paper, and the release for others,
            do not.
        residual: add the weighted features to themselves; False is the paper's text.
        codewords: of the encoding.
        width: channels between trunk and scores; 512 is the paper's, less is for trials.
        align_corners: how logits are resized.
        loss_weights: of `out`, `se`, `aux` and `se_stage3`; none means 1, 0.2 and 0.2 for the first three, the release.
            The paper's network has `{out: 1, se: 0.2, se_stage3: 0.2}`. A head without a weight is not built.
        test_aggregate: test-time: "exp" is the release's, "softmax" what others do.
    """

    free = SemanticModel.free | {"loss_weights", "test_aggregate"}

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101s",
        pretrained: bool = False,
        output_stride: int = 8,
        dilation: DilationRule = "lagged-first",
        lateral: bool = True,
        residual: bool = True,
        codewords: int = 32,
        width: int = 512,
        align_corners: bool = True,
        loss_weights: dict[str, float] | None = None,
        test_aggregate: inference.Aggregate = "exp",
        **kwargs: Any,
    ):
        weights = trained_outputs(loss_weights, {"out": 1.0, "se": 0.2, "aux": 0.2}, further=["se_stage3"])
        if codewords < 1:
            raise ValueError(f"codewords is {codewords}; an encoding has at least one, the paper's 32.")
        network = EncNetNetwork(
            num_classes, backbone, pretrained, output_stride, dilation, lateral, residual, codewords, width,
            se="se" in weights, se_stage3="se_stage3" in weights, aux="aux" in weights,
        )  # fmt: skip
        super().__init__(
            network=network, num_classes=num_classes, align_corners=align_corners, loss_weights=weights,
            test_aggregate=test_aggregate, **kwargs,
        )  # fmt: skip
        network.backbone.check_preprocessing(self.preprocessing)

    def loss_of(self, name: str, logits: Tensor, mask: Tensor) -> Tensor:
        """Cross entropy of a map; of an `se` output (B, K), binary cross entropy against the classes in the label."""
        if not name.startswith("se"):
            return super().loss_of(name, logits, mask)
        present = presence(mask, self.num_classes)
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), present, self.class_weights)

    def protocol(self, image: Tensor) -> Tensor:
        """Scores under the test-time options; see the class."""
        if not self.test_window:
            return super().protocol(image)
        windows = partial(
            inference.sliding,
            self.logits,
            window=self.test_window,
            stride=2 * self.test_window // 3,
            aggregate=self.test_aggregate,
            align_corners=self.align_corners,
            flip=self.test_flip,
            last="pad",
            fill=self.normalize(image.new_zeros(1, 3, 1, 1))[0],
        )
        if not self.test_long_side and list(self.test_scales) == [1.0]:
            return windows(image)
        return inference.multiscale(
            windows,
            image,
            self.test_scales,
            aggregate=self.test_aggregate,
            align_corners=self.align_corners,
            long_side=self.test_long_side,
            resize="votes",
            align_image=self.align_corners,
            size_of=_release_size if self.test_long_side else None,
        )


def _release_size(size: tuple[int, int], scale: float, long_side: int) -> tuple[int, int]:
    """The release's size of an image at a scale: the longer side is rounded up, the other one with halves up."""
    longer = math.ceil(long_side * scale)
    height, width = (max(1, int(side * longer / max(size) + 0.5)) for side in size)
    return height, width
