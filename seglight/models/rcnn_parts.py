"""torchvision's detection parts, adjusted where training with crowds, bfloat16 or a GPU's queue needs it.

Each class here changes one thing of its torchvision parent and nothing of its results otherwise. Waits of the host for
a GPU that they spare a training step of B images: B in matching anchors, 6 B - 2 in choosing the samples of both
stages and those with a mask, 6 in sharing out RoIs among the levels. 3 B + 8 are left, where torchvision's model has
12 B + 11 (counted by `tests/test_gpu_rehearsal.py`): of each image, selecting (2) and suppressing proposals; the
indices of the chosen samples (3), their counts (2), those of the levels (2) and one look for crowds. To both come the
constants that torchvision's box coders and suppression copy to the device, B + 4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torchvision.models.detection._utils as detection
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, box_iou, roi_align
from torchvision.ops.poolers import LevelMapper

if TYPE_CHECKING:
    from seglight.models.fpn import FeaturePyramid
    from seglight.types import InstanceTarget

NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "none": None,
    "batch": nn.BatchNorm2d,
    "group": functools.partial(nn.GroupNorm, 32),
}
IN_CROWD = 0.7
"""Share of a box inside a crowd from which on the box is no background (Detectron's release)."""


# ------------------------------------------------------------------------------------------------------- the trunk


class FrozenBatchNorm(FrozenBatchNorm2d):
    """In one pass instead of two, and in the precision of its input (the parent makes bfloat16 float32 again)."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift (B, C, H, W) by fixed statistics."""
        if not torch.is_grad_enabled():  # half the time, but for a backward pass it would keep its input
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every batch norm inside, whose affine parameters become buffers of the same names."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm(child.num_features, child.eps)
            for key in ("weight", "bias", "running_mean", "running_var"):
                setattr(frozen, key, getattr(child, key).detach())
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child)


def batch_images(images: Sequence[Tensor], multiple: int = 32) -> ImageList:
    """Images (C, H_i, W_i) on one canvas, zeros right and below, both sides whole multiples."""
    height, width = (-(-max(image.shape[i] for image in images) // multiple) * multiple for i in (1, 2))
    first = images[0]
    layout = torch.channels_last if first.stride(0) == 1 and first.shape[0] > 1 else torch.contiguous_format
    shape = (len(images), first.shape[0], height, width)
    canvas = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout).zero_()
    for place, image in zip(canvas, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]].copy_(image)
    return ImageList(canvas, [(image.shape[1], image.shape[2]) for image in images])


def add_norm(pyramid: FeaturePyramid, kind: str) -> None:
    """Put a norm after each convolution of a pyramid, which then has no bias, as in torchvision's second version."""
    if (norm := NORMS[kind]) is None:
        return
    for convs in (pyramid.lateral, pyramid.output):
        for i, conv in enumerate(convs):
            conv.bias = None
            convs[i] = nn.Sequential(conv, norm(conv.out_channels))


class StageHead(nn.Module):
    """The last stage of a trunk on RoIs: its maps for masks, their mean for boxes.

    Shapes: (N, C, 14, 14) -> (N, D).
    """

    def __init__(self, stage: nn.Module):
        super().__init__()
        self.stage = stage

    def maps(self, x: Tensor) -> Tensor:
        """(N, C, 14, 14) -> (N, D, 7, 7)."""
        return self.stage(x)

    def forward(self, x: Tensor) -> Tensor:
        """Pool the maps; see the class."""
        return self.stage(x).mean((2, 3))


# -------------------------------------------------------------------------------------------------------- precision


class Anchors(AnchorGenerator):
    """Always float32: bfloat16 has steps of 4 pixels at 1000."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """As the parent, whatever the features' type."""
        super().set_cell_anchors(torch.float32, device)


class ProposalHead(RPNHead):
    """Its outputs are float32, for the same reason."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness and deltas of each level."""
        objectness, deltas = super().forward(x)
        return [level.float() for level in objectness], [level.float() for level in deltas]


class BoxPredictor(FastRCNNPredictor):
    """Its outputs are float32, for the same reason."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and deltas of each RoI."""
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


# ---------------------------------------------------------------------------------------------- sampling and crowds


def torchvision_targets(targets: Sequence[InstanceTarget]) -> list[dict[str, Tensor]]:
    """Background is label 0 there, and crowds leave the objects: their boxes are kept as `crowds`."""
    crowded = torch.cat([target["iscrowd"] for target in targets]).tolist()  # the device is asked once for all images
    out = []
    for target in targets:
        flags, crowded = crowded[: len(target["iscrowd"])], crowded[len(target["iscrowd"]) :]
        boxes, labels, masks = target["boxes"], target["labels"] + 1, target["masks"]
        crowds = boxes[:0]
        if any(flags):
            few = target["iscrowd"]
            boxes, crowds, labels, masks = boxes[~few], boxes[few], labels[~few], masks[~few]
        out.append({"boxes": boxes, "labels": labels, "masks": masks, "crowds": crowds})
    return out


def share_inside(boxes: Tensor, crowds: Tensor) -> Tensor:
    """The largest share of each box (N, 4) that lies inside one of the crowds (M, 4), M > 0: (N,), 0..1."""
    low = torch.maximum(boxes[:, None, :2], crowds[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], crowds[None, :, 2:])
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    return ((high - low).clamp(min=0).prod(2) / area[:, None].clamp(min=1e-6)).amax(1)


class Matcher(detection.Matcher):
    """Finds the best anchors of each object without asking the device how many there are."""

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """As the parent."""
        best = match_quality_matrix == match_quality_matrix.amax(1, keepdim=True)
        matches.copy_(torch.where(best.any(0), all_matches, matches))


class Sampler(detection.BalancedPositiveNegativeSampler):
    """Asks the device once for all images how many samples there are; draws the same ones."""

    def __init__(self, batch_size_per_image: int, positive_fraction: float):
        super().__init__(batch_size_per_image, positive_fraction)
        self.chosen: list[tuple[int, int]] = []
        """How many positives and negatives of each image the last call chose."""

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Chosen positives and negatives of each image, as masks of 0 and 1."""
        self.chosen = []
        counts = torch.stack([torch.stack([(m >= 1).sum(), (m == 0).sum()]) for m in matched_idxs]).tolist()
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels, sizes in zip(matched_idxs, counts, strict=True):
            limit, drawn = int(self.batch_size_per_image * self.positive_fraction), []
            for which, size, masks in zip((labels >= 1, labels == 0), sizes, chosen, strict=True):
                order = torch.randperm(size, device=labels.device)[:limit]
                indices = torch.nonzero_static(which, size=size)[:, 0][order]
                masks.append(torch.zeros_like(labels, dtype=torch.uint8).index_fill_(0, indices, 1))
                drawn.append(len(order))
                limit = self.batch_size_per_image - len(order)
            self.chosen.append((drawn[0], drawn[1]))
        return chosen


class ProposalNetwork(RegionProposalNetwork):
    """Anchors that lie in a crowd are no background. A target's `crowds` are boxes (M, 4)."""

    def __init__(
        self, anchors: AnchorGenerator, head: nn.Module, before_nms: dict[str, int], after_nms: dict[str, int]
    ):
        super().__init__(anchors, head, 0.7, 0.3, 256, 0.5, before_nms, after_nms, 0.7)
        self.proposal_matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
        self.fg_bg_sampler = Sampler(256, 0.5)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels 1, 0 or -1 (not to be sampled) and the matched box of each anchor."""
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for i, target in enumerate(targets):
            if len(target["crowds"]):
                inside = (labels[i] == 0) & (share_inside(anchors[i], target["crowds"]) >= IN_CROWD)
                spared = labels[i].masked_fill(inside, -1)
                # An image that is one crowd and nothing else would leave the loss without a sample.
                labels[i] = torch.where((spared >= 0).any(), spared, labels[i])
        return labels, boxes


class Heads(RoIHeads):
    """Proposals that lie in a crowd are no background, and masks are learned where they are pasted.

    A target's `crowds` are boxes (M, 4). The parent cuts an object's mask out as if pixel i lay at i, while boxes, and
    whoever pastes a mask, have it from i to i + 1: its masks are drawn half a pixel to the left of, and above, theirs.
    """

    def __init__(self, rois_per_image: int, score: float, nms: float, detections: int, **parts: nn.Module):
        super().__init__(
            fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=rois_per_image, positive_fraction=0.25,
            bbox_reg_weights=None, score_thresh=score, nms_thresh=nms, detections_per_img=detections, **parts,
        )  # fmt: skip
        self.fg_bg_sampler = Sampler(rois_per_image, 0.25)
        self._samples: tuple[list[Tensor], list[Tensor], list[Tensor]] | None = None

    def has_mask(self) -> bool:
        """The parent's part ends with the boxes."""
        return False

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As the parent: detections, or losses in training."""
        found, losses = super().forward(features, proposals, image_shapes, targets)
        if self.mask_roi_pool is None:
            return found, losses
        if self._samples is None or targets is None:
            logits = self._mask_logits(features, [objects["boxes"] for objects in found], image_shapes)
            masks = maskrcnn_inference(logits, [objects["labels"] for objects in found])
            return [{**objects, "masks": mask} for objects, mask in zip(found, masks, strict=True)], losses
        boxes, labels, objects = [], [], []
        for sampled, of_image, matched, (count, _) in zip(*self._samples, self.fg_bg_sampler.chosen, strict=True):
            positive = torch.nonzero_static(of_image > 0, size=count)[:, 0]
            boxes.append(sampled[positive])
            labels.append(of_image[positive])
            objects.append(matched[positive])
        self._samples = None
        logits = self._mask_logits(features, boxes, image_shapes)
        wanted = torch.cat(
            [
                mask_targets(target["masks"], of_image, box, logits.shape[-1])
                for target, of_image, box in zip(targets, objects, boxes, strict=True)
            ]
        )
        own = logits[torch.arange(len(logits), device=logits.device), torch.cat(labels)].float()
        # Without an object the sum is 0, and every parameter takes part, as DDP wants it.
        loss = F.binary_cross_entropy_with_logits(own, wanted) if len(own) else logits.sum() * 0
        return found, {**losses, "loss_mask": loss}

    def _mask_logits(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """As the parent, of the proposals that are objects or lie outside of crowds."""
        proposals = list(proposals)
        for i, target in enumerate(targets):
            if len(target["crowds"]):
                kept = share_inside(proposals[i], target["crowds"]) < IN_CROWD
                kept |= (box_iou(proposals[i], target["boxes"]) >= 0.5).any(1)
                if not len(target["boxes"]):
                    kept |= ~kept.any()  # as for the anchors
                proposals[i] = proposals[i][kept]
        boxes, matched, labels, deltas = super().select_training_samples(proposals, targets)
        self._samples = boxes, labels, matched
        return boxes, matched, labels, deltas

    def subsample(self, labels: list[Tensor]) -> list[Tensor]:
        """Indices of the chosen samples of each image: as the parent, which asks the device for their number."""
        masks = [positive | negative for positive, negative in zip(*self.fg_bg_sampler(labels), strict=True)]
        counts = [sum(chosen) for chosen in self.fg_bg_sampler.chosen]
        return [torch.nonzero_static(mask, size=n)[:, 0] for mask, n in zip(masks, counts, strict=True)]


def mask_targets(masks: Tensor, objects: Tensor, boxes: Tensor, size: int) -> Tensor:
    """What the mask branch should say: the share of each cell of a box that its object covers.

    Args:
        masks: bool (N, H, W), of an image.
        objects: int64 (R,), the object of each box.
        boxes: float32 (R, 4).
        size: cells per side.

    Returns:
        float32 (R, size, size), 0..1.
    """
    rois = torch.cat([objects[:, None].to(boxes), boxes], 1)
    return roi_align(masks[:, None].to(boxes), rois, (size, size), 1.0, -1, aligned=True)[:, 0]


# ---------------------------------------------------------------------------------------------------------- pooling


class LevelPool(MultiScaleRoIAlign):
    """RoIAlign on the level that a RoI's size asks for: floor(4 + log2(sqrt(w h) / 224)), within the levels.

    The parent guesses the levels' strides from the first images that it sees, and errs with very small ones.

    Args:
        strides: of the levels, powers of 2; one level serves RoIs of any size.
        size: cells per side.
        samples: per cell and side.
        aligned: half a pixel to the left and up, as in later detectors; the first ones, and all published weights of
            torchvision, have it off.

    Shapes: {"0": (B, C, H_0, W_0), ...}, boxes [(N_i, 4)] -> (sum N_i, C, size, size).
    """

    def __init__(self, strides: Sequence[int], size: int, samples: int = 2, aligned: bool = False):
        super().__init__([str(i) for i in range(len(strides))], size, samples)
        self.aligned = aligned
        self.scales = [1 / stride for stride in strides]
        self.map_levels = LevelMapper(strides[0].bit_length() - 1, strides[-1].bit_length() - 1)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool each box from its level."""
        rois = torch.cat([F.pad(part, (1, 0), value=i) for i, part in enumerate(boxes)])
        if len(self.scales) == 1:
            return self.pool(x["0"], rois, 0)
        levels = self.map_levels(boxes)
        order = levels.argsort()
        sizes = (levels[:, None] == torch.arange(len(self.scales), device=levels.device)).sum(0).tolist()
        parts = rois[order].split(sizes)
        pooled = torch.cat([self.pool(x[str(i)], part, i) for i, part in enumerate(parts)])
        return torch.empty_like(pooled).index_copy(0, order, pooled)

    def pool(self, feature: Tensor, rois: Tensor, level: int) -> Tensor:
        """RoIs (N, 5) of one level."""
        return roi_align(feature, rois, self.output_size, self.scales[level], self.sampling_ratio, self.aligned)


class AllLevelsPool(LevelPool):
    """RoIAlign of every RoI on every level (PANet's adaptive feature pooling).

    Shapes: as the parent's, but a list: one (sum N_i, C, size, size) for each level.
    """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> list[Tensor]:
        """Pool each box from all levels."""
        rois = torch.cat([F.pad(part, (1, 0), value=i) for i, part in enumerate(boxes)])
        return [self.pool(x[str(i)], rois, i) for i in range(len(self.scales))]
