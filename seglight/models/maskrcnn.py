"""Faster R-CNN (Ren et al. 2015) and Mask R-CNN (He et al., ICCV 2017), with a pyramid or C4, from torchvision parts.

Parameters of Mask R-CNN on ResNet-50 with 90 classes: 44,401,393, the frozen batch norm not counted; 44,454,513 with a
trainable one. ResNet-101: 63,341,297, ResNeXt-101 32x8d: 107,485,937, 64x4d: 102,149,873. 80 classes: 44,347,573.

What torchvision does otherwise than the paper, and so do these: the stride of a bottleneck is on its 3x3 convolution;
RoIAlign without the half pixel (`aligned` sets it); 2000 proposals after suppression in training (`train_proposals`);
smooth L1 turns linear at 1/9 in both stages. Two samples per cell and side are the paper's four per cell. Unlike
torchvision, whose targets lie half a pixel off, masks are cut out of the ground truth where they are pasted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from seglight.models.backbones import Backbone
from seglight.models.fpn import STRIDES, FeaturePyramid
from seglight.models.instance import InstanceModel
from seglight.models.weights import hand_on

if TYPE_CHECKING:
    from seglight.types import Detections, InstanceTarget

WIDTH = 256
"""Channels of the pyramid."""
RATIOS = (0.5, 1.0, 2.0)
BoxHead = Literal["2fc", "4conv1fc"]
HeadNorm = Literal["none", "batch", "group"]


class MaskRCNNNetwork(nn.Module):
    """Trunk, feature pyramid P2 to P6, region proposals, and a box and a mask head on RoIs of P2 to P5.

    Layers are named as in torchvision's detectors, but for the pyramid: `pyramid.lateral`, `pyramid.output`.

    Args: see `MaskRCNN`; `masks` off is Faster R-CNN, whose detections get masks that fill their boxes, and
        `frozen_norm` replaces the trunk's batch norms by constants.

    Shapes: images [(3, H_i, W_i)] -> in training losses `objectness`, `rpn_box_reg`, `classifier`, `box_reg`,
    `mask`; else `Detections` with masks of 28 x 28.

    Raises:
        ValueError: a backbone without a stride of 4, 8, 16 or 32, or an option out of its range.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool = False,
        frozen_norm: bool = True,
        trainable_layers: int = 3,
        box_head: BoxHead = "2fc",
        head_norm: HeadNorm = "none",
        rpn_convs: int = 1,
        anchors: Sequence[int] = (32, 64, 128, 256, 512),
        rois_per_image: int = 512,
        train_proposals: int = 2000,
        aligned: bool = False,
        masks: bool = True,
        test_proposals: int = 1000,
        test_score: float = 0.05,
        test_nms: float = 0.5,
        test_detections: int = 100,
    ):
        super().__init__()
        from seglight.models import rcnn_parts as parts

        if len(anchors) != len(STRIDES) + 1:
            raise ValueError(f"anchors is {list(anchors)}; give 5 sizes in pixels, one for each level P2 to P6.")
        if box_head not in ("2fc", "4conv1fc"):
            raise ValueError(f'box_head is {box_head!r}; choose "2fc" or "4conv1fc".')
        if head_norm not in parts.NORMS:
            raise ValueError(f"head_norm is {head_norm!r}; choose none, batch or group.")
        self.backbone = Backbone(backbone, None, pretrained=pretrained)
        self.taps = [self.backbone.level(stride) for stride in STRIDES]
        freeze_stages(self.backbone, trainable_layers)
        if frozen_norm:
            parts.freeze_batch_norm(self.backbone)
        self.pyramid = FeaturePyramid([self.backbone.channels[tap] for tap in self.taps], WIDTH, subsampled=True)
        parts.add_norm(self.pyramid, head_norm)
        self.rpn = parts.ProposalNetwork(
            parts.Anchors(tuple((size,) for size in anchors), (RATIOS,) * len(anchors)),
            parts.ProposalHead(WIDTH, len(RATIOS), rpn_convs),
            before_nms={"training": 2000, "testing": 1000},
            after_nms={"training": train_proposals, "testing": test_proposals},
        )
        self.roi_heads = parts.Heads(
            rois_per_image, test_score, test_nms, test_detections,
            **self._heads(num_classes, box_head, head_norm, aligned, masks),
        )  # fmt: skip

    def _heads(
        self, num_classes: int, box_head: BoxHead, head_norm: HeadNorm, aligned: bool, masks: bool
    ) -> dict[str, nn.Module]:
        from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
        from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

        from seglight.models import rcnn_parts as parts

        norm = parts.NORMS[head_norm]
        heads: dict[str, nn.Module] = {
            "box_roi_pool": parts.LevelPool(STRIDES, 7, aligned=aligned),
            "box_head": TwoMLPHead(WIDTH * 49, 1024)
            if box_head == "2fc"
            else FastRCNNConvFCHead((WIDTH, 7, 7), [256] * 4, [1024], norm_layer=norm),
            "box_predictor": parts.BoxPredictor(1024, num_classes + 1),
        }
        if masks:
            heads |= {
                "mask_roi_pool": parts.LevelPool(STRIDES, 14, aligned=aligned),
                "mask_head": MaskRCNNHeads(WIDTH, [256] * 4, 1, norm_layer=norm),
                "mask_predictor": MaskRCNNPredictor(256, 256, num_classes + 1),
            }
        return heads

    def levels(self, canvas: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Feature maps for proposals and those for RoIs, of normalised images (B, 3, H, W)."""
        features = self.backbone(canvas)
        levels = self.pyramid([features[tap] for tap in self.taps])
        return levels, levels[: len(STRIDES)]

    def forward(
        self, images: list[Tensor], targets: list[InstanceTarget] | None = None
    ) -> tuple[dict[str, Tensor], list[Detections]]:
        """Losses in training, detections otherwise; see the class."""
        from seglight.models.rcnn_parts import batch_images, torchvision_targets

        if self.training and targets is None:
            raise ValueError(f"{type(self).__name__} is in training mode and got no targets; call eval() to detect.")
        theirs = torchvision_targets(targets) if self.training and targets is not None else None
        canvas = batch_images(images)
        for_proposals, for_rois = self.levels(canvas.tensors)
        proposals, losses = self.rpn(canvas, dict(enumerate(for_proposals)), theirs)
        # RoIAlign wants float32 in rows, and would convert the levels once for each head.
        features = {str(i): level.float().contiguous() for i, level in enumerate(for_rois)}
        found, head_losses = self.roi_heads(features, proposals, canvas.image_sizes, theirs)
        losses = {name.removeprefix("loss_"): loss for name, loss in {**head_losses, **losses}.items()}
        return losses, [_detections(objects) for objects in found]


def _detections(found: dict[str, Tensor]) -> Detections:
    boxes = found["boxes"].float()
    masks = found["masks"][:, 0].float() if "masks" in found else boxes.new_ones((len(boxes), 28, 28))
    return {
        "boxes": boxes,
        "labels": found["labels"] - 1,
        "scores": found["scores"].float(),
        "masks": masks,
        "windows": boxes,
    }


def freeze_stages(trunk: Backbone, trainable_layers: int) -> None:
    """Keep the first stages of a trunk as they are.

    Args:
        trunk: with features at strides 4, 8, 16 and 32.
        trainable_layers: how many of the five parts train, from the last one on: the four stages, then the stem.

    Raises:
        ValueError: not 0..5, or a trunk whose stages are not a sequence.
    """
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f"trainable_layers is {trainable_layers}; the four stages and the stem make 0 to 5.")
    if trainable_layers == 5:
        return
    names = trunk.body.feature_info.module_name()
    last = names[trunk.level(STRIDES[max(0, 3 - trainable_layers)])].replace(".", "_")
    children = dict(trunk.body.named_children())
    if last not in children:
        raise ValueError(f"The stages of {trunk.name} are no sequence to freeze a part of; set trainable_layers to 5.")
    for name, child in children.items():
        if name == last and trainable_layers == 4:
            break
        child.requires_grad_(False)
        if name == last:
            break


class C4Network(MaskRCNNNetwork):
    """One feature map at stride 16 for proposals and RoIs; the trunk's last stage is the head of both branches.

    RoIs are 14 x 14 cells, 7 x 7 after that stage. Boxes come from its mean, masks of 14 x 14 from a deconvolution of
    it. The stage is named `roi_heads.box_head.stage`.

    Args: see `MaskRCNNC4` and `MaskRCNNNetwork`.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool = False,
        frozen_norm: bool = True,
        trainable_layers: int = 3,
        anchors: Sequence[int] = (32, 64, 128, 256, 512),
        rois_per_image: int = 64,
        train_proposals: int = 2000,
        aligned: bool = False,
        test_proposals: int = 300,
        test_score: float = 0.05,
        test_nms: float = 0.5,
        test_detections: int = 100,
    ):
        nn.Module.__init__(self)
        from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

        from seglight.models import rcnn_parts as parts

        if not anchors:
            raise ValueError("anchors is empty; give the sizes in pixels, such as [32, 64, 128, 256, 512].")
        self.backbone = Backbone(backbone, None, pretrained=pretrained)
        self.taps = [self.backbone.level(stride) for stride in STRIDES[:3]]
        if "layer4" not in dict(self.backbone.body.named_children()):
            raise ValueError(f"The head of C4 is the last stage of a ResNet, which {backbone} is not; use MaskRCNN.")
        freeze_stages(self.backbone, trainable_layers)
        if frozen_norm:
            parts.freeze_batch_norm(self.backbone)
        width, depth = self.backbone.channels[self.taps[-1]], self.backbone.channels[-1]
        self.rpn = parts.ProposalNetwork(
            parts.Anchors((tuple(anchors),), (RATIOS,)),
            parts.ProposalHead(width, len(anchors) * len(RATIOS)),
            before_nms={"training": 12000, "testing": 6000},  # Detectron's, for one level
            after_nms={"training": train_proposals, "testing": test_proposals},
        )
        head = parts.StageHead(self.backbone.body.pop("layer4"))
        self.roi_heads = parts.Heads(
            rois_per_image, test_score, test_nms, test_detections,
            box_roi_pool=parts.LevelPool((16,), 14, aligned=aligned),
            box_head=head,
            box_predictor=parts.BoxPredictor(depth, num_classes + 1),
            mask_roi_pool=parts.LevelPool((16,), 14, aligned=aligned),
            mask_head=head.maps,
            mask_predictor=MaskRCNNPredictor(depth, 256, num_classes + 1),
        )  # fmt: skip

    def levels(self, canvas: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The map at stride 16, twice."""
        feature = self.backbone(canvas)[self.taps[-1]]
        return [feature], [feature]


# ------------------------------------------------------------------------------------------------------- the models


class RCNN(InstanceModel):
    """What the R-CNN models share: whose files they read, and the refusal to train a frozen trunk of random weights."""

    free = InstanceModel.free | {"test_proposals", "test_score", "test_nms", "test_detections"}

    def start_from(self, content: dict[str, Any], path: str, without: tuple[str, ...] = ()) -> None:
        """Take a seglight checkpoint of this family or a detector of torchvision: Faster or Mask R-CNN, v1 or v2.

        torchvision's files for COCO know 91 classes, by the raw ids of COCO. With `num_classes` 90 they are taken as
        they are, with 80 the rows of the 80 classes; else leave out the predictors with `init_without`.
        """
        if "state_dict" in content:
            super().start_from(content, path, without)
            return
        from seglight.models.rcnn_weights import from_torchvision

        weights = from_torchvision(content, self.network, self.preprocessing, path, without)
        hand_on(self.network, weights, path, self._name, without, strict=True)

    def _batch_norms(self) -> list[nn.Module]:
        """Those of the trunk, which `batch_norm` is about; norms of the heads are new and have to learn."""
        trunk = [self.network.backbone, getattr(self.network.roi_heads.box_head, "stage", None)]  # C4's last stage
        layers = (layer for part in trunk if part is not None for layer in part.modules())
        return [layer for layer in layers if isinstance(layer, nn.modules.batchnorm._BatchNorm)]

    def on_fit_start(self) -> None:
        """Refuse to train on top of random weights that stay as they are."""
        super().on_fit_start()
        from torchvision.ops import FrozenBatchNorm2d

        for name, layer in self.network.backbone.named_modules():
            fixed = isinstance(layer, FrozenBatchNorm2d)
            fixed |= isinstance(layer, nn.modules.batchnorm._BatchNorm) and not layer.weight.requires_grad
            if fixed and not layer.running_mean.any() and torch.all(layer.running_var == 1):
                raise ValueError(
                    f"The trunk's {name} is frozen at its initial values. Set model.pretrained or model.init_from; to "
                    f'learn from nothing, set model.batch_norm to "train" and model.trainable_layers to 5.'
                )


class FasterRCNN(RCNN):
    """Faster R-CNN on a feature pyramid; its masks fill the boxes. Box AP 37.0 on val2017 with torchvision's weights.

    Options and recipe as of `MaskRCNN`. Its score is that of the boxes: AP without "box" is of the filled boxes.
    """

    masks = False
    monitor = "val/box_AP"
    show: tuple[str, ...] = ("val/box_AP50",)

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
        network = MaskRCNNNetwork(
            num_classes, backbone, pretrained, batch_norm == "frozen", trainable_layers, box_head, head_norm, rpn_convs,
            anchors, rois_per_image, train_proposals, aligned, self.masks,
            test_proposals, test_score, test_nms, test_detections,
        )  # fmt: skip
        super().__init__(network=network, num_classes=num_classes, batch_norm=batch_norm, **kwargs)
        network.backbone.check_preprocessing(self.preprocessing)


class MaskRCNN(FasterRCNN):
    """Mask R-CNN on a feature pyramid. Mask AP on test-dev 35.7 with ResNet-101, 37.1 with ResNeXt-101 64x4d.

    The paper's recipe: SGD with lr 0.02, momentum 0.9, weight decay 1e-4, divided by 10 after 120k of 160k steps of 16
    images whose shorter side is 800 pixels and whose longer side at most 1333; ImageNet weights, frozen batch norm and
    first stages. With ResNeXt: 8 images, lr 0.01. torchvision's weights (mask AP 34.6 on val2017) had 1.2 times as
    long. Its second version (41.8) is `box_head="4conv1fc", head_norm="batch", rpn_convs=2, batch_norm="train"`:
    46,359,409 parameters with 90 classes.

    Objects marked as crowds are not learned; boxes that lie to 0.7 inside one are no background either, in both stages
    (Detectron does this in the second). torchvision takes crowds for background.

    Args:
        num_classes: K, without the background.
        backbone: timm name of a network with features at strides 4, 8, 16 and 32.
        pretrained: start from timm's ImageNet weights of the backbone.
        batch_norm: of the trunk, as of `BaseModel`; "frozen" makes constants of it. Norms of the heads always train.
        trainable_layers: how many parts of the trunk train, of its four stages and its stem, from the last one on.
        box_head: two fully connected layers, or four 3x3 convolutions and one fully connected layer.
        head_norm: normalisation after the convolutions of the pyramid and the heads.
        rpn_convs: 3x3 convolutions of the proposal network.
        anchors: sizes in pixels on P2 to P6. From 8 pixels on for small objects: [8, 16, 32, 64, 128].
        rois_per_image: RoIs of a training image, a quarter of them objects where there are as many.
        train_proposals: proposals of an image in training.
        aligned: RoIAlign shifted by half a pixel, as in later detectors. torchvision's weights want it off.
        test_proposals: test-time: proposals of an image.
        test_score: test-time: detections need a higher score.
        test_nms: test-time: IoU from which on the weaker of two detections of a class goes.
        test_detections: test-time: detections of an image, the best.
    """

    masks = True
    monitor, show = RCNN.monitor, RCNN.show


class MaskRCNNC4(RCNN):
    """Mask R-CNN on one feature map, stride 16, with the trunk's last stage as head. With ResNet-101 33.1 on test-dev.

    Recipe and options as of `MaskRCNN`, but for 64 RoIs of a training image and 300 proposals at test time; masks have
    14 x 14 cells. `anchors` are all on the one map. The trunk must be a ResNet of timm.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool = False,
        batch_norm: Literal["train", "eval", "frozen"] = "frozen",
        trainable_layers: int = 3,
        anchors: Sequence[int] = (32, 64, 128, 256, 512),
        rois_per_image: int = 64,
        train_proposals: int = 2000,
        aligned: bool = False,
        test_proposals: int = 300,
        test_score: float = 0.05,
        test_nms: float = 0.5,
        test_detections: int = 100,
        **kwargs: Any,
    ):
        network = C4Network(
            num_classes, backbone, pretrained, batch_norm == "frozen", trainable_layers, anchors, rois_per_image,
            train_proposals, aligned, test_proposals, test_score, test_nms, test_detections,
        )  # fmt: skip
        super().__init__(network=network, num_classes=num_classes, batch_norm=batch_norm, **kwargs)
        network.backbone.check_preprocessing(self.preprocessing)
