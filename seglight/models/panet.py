"""PANet (Liu et al., CVPR 2018): Mask R-CNN with a second, upward path, RoIs from all levels and a fuller mask branch.

On ResNet-50 with 80 classes 108,751,429 parameters, the frozen batch norm not counted; ResNet-101: 127,691,333,
ResNeXt-101 32x8d: 171,835,973, 64x4d: 166,499,909.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seglight.models.fpn import STRIDES
from seglight.models.maskrcnn import RCNN, WIDTH, BoxHead, HeadNorm, MaskRCNNNetwork
from seglight.models.weights import hand_on

Fusion = Literal["max", "sum"]
GROUPS = 32


def conv_block(channels: int, width: int, norm: HeadNorm, stride: int = 1, bias: bool | None = None) -> nn.Sequential:
    """A 3x3 convolution (He), the norm if there is one, a ReLU. Without `bias`, the norm takes its place."""
    bias = norm == "none" if bias is None else bias
    conv = nn.Conv2d(channels, width, 3, stride, 1, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, *_norm(width, norm), nn.ReLU(inplace=True))


def _norm(width: int, kind: HeadNorm) -> list[nn.Module]:
    if kind == "none":
        return []
    return [nn.BatchNorm2d(width) if kind == "batch" else nn.GroupNorm(GROUPS, width)]


class UpwardPath(nn.Module):
    """N2 = P2; N(i+1) is a convolution of P(i+1) plus a strided convolution of N(i), each with a ReLU.

    Args:
        levels: number of levels.
        width: channels of each.
        norm: after each convolution, whose bias stays, as in the release.

    Shapes: list of (B, width, H_i, W_i) -> as many of the same sizes. Sizes must halve, rounding up.
    """

    def __init__(self, levels: int = 4, width: int = WIDTH, norm: HeadNorm = "none"):
        super().__init__()
        self.down = nn.ModuleList(conv_block(width, width, norm, 2, bias=True) for _ in range(levels - 1))
        self.merge = nn.ModuleList(conv_block(width, width, norm, bias=True) for _ in range(levels - 1))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Build the levels; see the class."""
        out = [levels[0]]
        for down, merge, level in zip(self.down, self.merge, levels[1:], strict=True):
            out.append(merge(down(out[-1]) + level))
        return out


class Fused(nn.Module):
    """A layer for each level, and one result: the largest of each element, or the sum (adaptive feature pooling).

    Shapes: list of tensors, one for each layer, that the layers make equally large -> one tensor.
    """

    def __init__(self, layers: Sequence[nn.Module], fusion: Fusion):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.fusion = fusion

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Apply and fuse."""
        total = self.layers[0](levels[0])
        for layer, level in zip(self.layers[1:], levels[1:], strict=True):
            total = torch.maximum(total, layer(level)) if self.fusion == "max" else total + layer(level)
        return total


class AdaptiveBoxHead(nn.Module):
    """RoIs of all levels (N, C, 7, 7) -> (N, 1024).

    "2fc": a fully connected layer for each level, fused, and a second one. "4conv1fc": a convolution for each level,
    fused, three more and a fully connected layer. Group norm follows the first kind's layers too, as in the release.
    """

    def __init__(self, kind: BoxHead, norm: HeadNorm, fusion: Fusion, levels: int = 4):
        super().__init__()
        if kind == "2fc":
            grouped = "group" if norm == "group" else "none"
            self.first = Fused([self._fc(WIDTH * 49, grouped, flat=True) for _ in range(levels)], fusion)
            self.rest = self._fc(1024, grouped)
        else:
            self.first = Fused([conv_block(WIDTH, WIDTH, norm) for _ in range(levels)], fusion)
            convs = [conv_block(WIDTH, WIDTH, norm) for _ in range(3)]
            self.rest = nn.Sequential(*convs, self._fc(WIDTH * 49, "none", flat=True))

    def _fc(self, width: int, norm: HeadNorm, flat: bool = False) -> nn.Sequential:
        layer = nn.Linear(width, 1024)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        parts = [nn.Flatten()] if flat else []
        return nn.Sequential(*parts, layer, *_norm(1024, norm), nn.ReLU(inplace=True))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Features of each RoI."""
        return self.rest(self.first(levels))


class AdaptiveMaskHead(nn.Module):
    """RoIs of all levels (N, C, 14, 14) -> (N, C, 14, 14): a convolution for each level, fused, and two more."""

    def __init__(self, norm: HeadNorm, fusion: Fusion, levels: int = 4):
        super().__init__()
        self.first = Fused([conv_block(WIDTH, WIDTH, norm) for _ in range(levels)], fusion)
        self.rest = nn.Sequential(*(conv_block(WIDTH, WIDTH, norm) for _ in range(2)))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Features of each RoI."""
        return self.rest(self.first(levels))


class FusedMaskPredictor(nn.Module):
    """Fully connected fusion: masks of each class from convolutions, plus one for all classes that sees the whole RoI.

    Args:
        outputs: classes with the background.
        norm: after the convolutions.
        fc_relu: a ReLU after the fully connected layer, as in the release: it can only raise logits. The paper names
            none.

    Shapes: (N, 256, 14, 14) -> (N, outputs, 28, 28).
    """

    def __init__(self, outputs: int, norm: HeadNorm = "none", fc_relu: bool = True):
        super().__init__()
        self.conv4 = conv_block(WIDTH, WIDTH, norm)
        self.conv5_mask = nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2)
        self.mask_fcn_logits = nn.Conv2d(WIDTH, outputs, 1)
        for layer in (self.conv5_mask, self.mask_fcn_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.conv4_fc = conv_block(WIDTH, WIDTH, norm)
        self.conv5_fc = conv_block(WIDTH, WIDTH // 2, norm)
        self.fc = nn.Linear(WIDTH // 2 * 14 * 14, 28 * 28)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        self.fc_relu = fc_relu

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each RoI."""
        each = self.mask_fcn_logits(self.conv5_mask(self.conv4(x)).relu())
        whole = self.fc(self.conv5_fc(self.conv4_fc(x)).flatten(1))
        if self.fc_relu:
            whole = whole.relu()
        return each + whole.view(-1, 1, 28, 28)


class PANetNetwork(MaskRCNNNetwork):
    """As `MaskRCNNNetwork`, with the path upward and the heads of PANet.

    Args: see `PANet`. Shapes, errors: as `MaskRCNNNetwork`.
    """

    def __init__(
        self,
        num_classes: int,
        *args: Any,
        head_norm: HeadNorm = "none",
        fusion: Fusion = "max",
        fc_relu: bool = True,
        proposal_levels: Literal["N", "P"] = "N",
        **options: Any,
    ):
        if fusion not in ("max", "sum"):
            raise ValueError(f'fusion is {fusion!r}; choose "max" or "sum".')
        if proposal_levels not in ("N", "P"):
            raise ValueError(f'proposal_levels is {proposal_levels!r}; choose "N" or "P".')
        self._choices = (fusion, fc_relu)
        super().__init__(num_classes, *args, head_norm=head_norm, **options)
        self.proposal_levels = proposal_levels
        self.path = UpwardPath(len(STRIDES), WIDTH, head_norm)

    def _heads(
        self, num_classes: int, box_head: BoxHead, head_norm: HeadNorm, aligned: bool, masks: bool
    ) -> dict[str, nn.Module]:
        from seglight.models import rcnn_parts as parts

        fusion, fc_relu = self._choices
        return {
            "box_roi_pool": parts.AllLevelsPool(STRIDES, 7, aligned=aligned),
            "box_head": AdaptiveBoxHead(box_head, head_norm, fusion),
            "box_predictor": parts.BoxPredictor(1024, num_classes + 1),
            "mask_roi_pool": parts.AllLevelsPool(STRIDES, 14, aligned=aligned),
            "mask_head": AdaptiveMaskHead(head_norm, fusion),
            "mask_predictor": FusedMaskPredictor(num_classes + 1, head_norm, fc_relu),
        }

    def levels(self, canvas: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """N2 to N6 or P2 to P6 for proposals, N2 to N5 for RoIs."""
        lateral, _ = super().levels(canvas)
        upward = self.path(lateral[: len(STRIDES)])
        return [*upward, upward[-1][..., ::2, ::2]] if self.proposal_levels == "N" else lateral, upward


def from_maskrcnn(weights: Mapping[str, Tensor], fc_relu: bool = True) -> dict[str, Tensor]:
    """Mask R-CNN's weights for PANet: the first layer of a head goes to every level, the rest to its place.

    The fully connected branch adds next to nothing at first: its last layer becomes 0, and before a ReLU its bias
    0.001, because at 0 a ReLU would never let it learn. The upward path stays as initialised. Weights of a PANet pass
    as they are.

    Args:
        weights: by name, of a `MaskRCNNNetwork` with the same kind of box head and norm.
        fc_relu: of the PANet.
    """
    if any(key.startswith(("path.", "roi_heads.box_head.first.")) for key in weights):
        return dict(weights)
    moves = {  # prefix: where it goes, "*" being each level
        "roi_heads.box_head.fc6.": "roi_heads.box_head.first.layers.*.1.",
        "roi_heads.box_head.fc7.": "roi_heads.box_head.rest.0.",
        "roi_heads.box_head.0.": "roi_heads.box_head.first.layers.*.",
        "roi_heads.box_head.1.": "roi_heads.box_head.rest.0.",
        "roi_heads.box_head.2.": "roi_heads.box_head.rest.1.",
        "roi_heads.box_head.3.": "roi_heads.box_head.rest.2.",
        "roi_heads.box_head.5.": "roi_heads.box_head.rest.3.1.",
        "roi_heads.mask_head.0.": "roi_heads.mask_head.first.layers.*.",
        "roi_heads.mask_head.1.": "roi_heads.mask_head.rest.0.",
        "roi_heads.mask_head.2.": "roi_heads.mask_head.rest.1.",
        "roi_heads.mask_head.3.": "roi_heads.mask_predictor.conv4.",
    }
    out = {}
    for key, value in weights.items():
        prefix = next((prefix for prefix in moves if key.startswith(prefix)), "")
        target = moves.get(prefix, "") + key.removeprefix(prefix)
        for level in range(len(STRIDES)) if "*" in target else (0,):
            out[target.replace("*", str(level))] = value
    if any(key.startswith("roi_heads.mask_predictor.conv4.") for key in out):
        out["roi_heads.mask_predictor.fc.weight"] = torch.zeros(28 * 28, WIDTH // 2 * 14 * 14)
        out["roi_heads.mask_predictor.fc.bias"] = torch.full((28 * 28,), 1e-3 if fc_relu else 0.0)
    return out


class PANet(RCNN):
    """PANet. Mask AP on COCO test-dev 36.6 with ResNet-50, 40.0 with ResNeXt-101 64x4d and several scales in training.

    The paper's recipe: that of `MaskRCNN`, with synchronised batch norm after all layers, all of which train
    (`batch_norm` "train", `head_norm` "batch", `trainable_layers` 5), and images of 800 to 1000 pixels, or sides drawn
    from 400 to 1400 with at most 1400 for the longer one. The authors' PyTorch release, whose ResNet-50 reaches 38.3 on
    val2017: frozen batch norm, `head_norm` "group", `box_head` "4conv1fc", shorter sides 1200, 1200, 1000, 800, 600 and
    400, 180k steps divided by 10 after 120k and 160k, tests at 1000 with at most 1400. Their ensemble of seven: three
    `resnext101_64x4d`, two `seresnext101_32x4d`, a `resnet269s` (no ImageNet weights in timm) and a `senet154`.

    Left out: deformable convolutions. Otherwise than the release: without a norm the upward path has ReLUs, as in the
    paper; what torchvision's parts do otherwise, `maskrcnn` lists.

    Args:
        num_classes, backbone, pretrained, batch_norm, trainable_layers, anchors, rois_per_image, train_proposals,
            aligned, test_proposals, test_score, test_nms, test_detections: as of `MaskRCNN`.
        box_head: "2fc", whose first layer exists for each level, or "4conv1fc".
        head_norm: after the convolutions of the pyramid, the path and the heads; "group" is the release's.
        rpn_convs: 3x3 convolutions of the proposal network.
        fusion: of the levels' features: "max", or "sum".
        fc_relu: a ReLU after the fully connected mask layer, as in the release.
        proposal_levels: proposals from the levels of the upward path ("N") or of the pyramid ("P").
        init_from: also a Mask R-CNN, ours or torchvision's, with an equal kind of box head: see `from_maskrcnn`.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool = False,
        batch_norm: Literal["train", "eval", "frozen"] = "frozen",
        trainable_layers: int = 3,
        box_head: BoxHead = "2fc",
        head_norm: HeadNorm = "none",
        rpn_convs: int = 1,
        fusion: Fusion = "max",
        fc_relu: bool = True,
        proposal_levels: Literal["N", "P"] = "N",
        anchors: Sequence[int] = (32, 64, 128, 256, 512),
        rois_per_image: int = 512,
        train_proposals: int = 2000,
        aligned: bool = False,
        test_proposals: int = 1000,
        test_score: float = 0.05,
        test_nms: float = 0.5,
        test_detections: int = 100,
        **kwargs: Any,
    ):
        network = PANetNetwork(
            num_classes, backbone, pretrained, batch_norm == "frozen", trainable_layers, box_head,
            head_norm=head_norm, rpn_convs=rpn_convs, fusion=fusion, fc_relu=fc_relu, proposal_levels=proposal_levels,
            anchors=anchors, rois_per_image=rois_per_image, train_proposals=train_proposals, aligned=aligned,
            test_proposals=test_proposals, test_score=test_score, test_nms=test_nms, test_detections=test_detections,
        )  # fmt: skip
        super().__init__(network=network, num_classes=num_classes, batch_norm=batch_norm, **kwargs)
        network.backbone.check_preprocessing(self.preprocessing)

    def start_from(self, content: dict[str, Any], path: str, without: tuple[str, ...] = ()) -> None:
        """Take a seglight checkpoint of a PANet or a Mask R-CNN, or a Mask R-CNN of torchvision (v1)."""
        if "state_dict" in content:
            weights = {key.removeprefix("network."): value for key, value in content["state_dict"].items()
                       if key.startswith("network.")}  # fmt: skip
            weights = {f"network.{key}": value for key, value in self._placed(weights, path).items()}
            super().start_from({**content, "state_dict": weights}, path, without)
            return
        from seglight.models.rcnn_weights import from_torchvision

        weights = from_torchvision(content, self.network, self.preprocessing, path, without)
        hand_on(self.network, self._placed(weights, path), path, self._name, without)

    def _placed(self, weights: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
        placed = from_maskrcnn(weights, self.network.roi_heads.mask_predictor.fc_relu)
        lost = {key.rpartition(".")[0] for key in placed.keys() - self.network.state_dict().keys()
                if not key.endswith("num_batches_tracked")}  # fmt: skip
        if lost:
            raise ValueError(
                f"{path} has {', '.join(sorted(lost))}, for which this PANet has no place; set model.backbone, "
                f"box_head, head_norm and rpn_convs as in the network of that file."
            )
        return placed
