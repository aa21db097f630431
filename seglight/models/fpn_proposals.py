"""Mask proposals of a feature pyramid (Lin et al., CVPR 2017, section 6): objects of no class, found window by window.

Every location of the levels P2 to P6 looks through square windows at what may be an object of about that size in its
middle. Objects are sorted by the longer side of their masks into ten scales, half an octave apart:

    level, stride              P2, 4    P3, 8    P4, 16    P5, 32    P6, 64
    scale, 5 x 5 windows       32       64       128       256       512
    scale, 7 x 7 windows       45       91       181       362       724

and a window is 1.25 times as wide as its scale, so that a mask has some room to leave the middle: 40 pixels for the
finest, which are ten cells of the level. The head sees the 5 or 7 cells in the middle of the window, which have seen
the rest. Parameters, with 14 x 14 masks, on ResNet-50: 26,330,373 with 5 x 5 windows only, 27,903,237 with 7 x 7 only,
29,643,210 with both; 30,246,498 with both and 28 x 28 masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seglight.models.backbones import Backbone
from seglight.models.blocks import HeConv2d
from seglight.models.fpn import STRIDES, FeaturePyramid
from seglight.models.instance import InstanceModel
from seglight.models.windows import POSITIVES, SMALLEST, Places, WindowGrid, extent
from seglight.models.windows import STRIDES as LEVELS

if TYPE_CHECKING:
    from seglight.types import Detections, InstanceTarget

Windows = Literal["5x5", "7x7", "dual"]
KERNELS: dict[str, tuple[int, ...]] = {"5x5": (5,), "7x7": (7,), "dual": (5, 7)}
MASK_WEIGHT = 10.0
WIDTH = 128
HIDDEN = 512


class WindowHead(nn.Module):
    """A k x k convolution to 512 channels, a ReLU, and of these one score and one mask, each a 1x1 convolution.

    Args:
        kernel: k, cells of a level.
        mask_size: m, side of the mask in its own cells.
    """

    def __init__(self, kernel: int, mask_size: int):
        super().__init__()
        self.kernel, self.mask_size = kernel, mask_size
        self.hidden = HeConv2d(WIDTH, HIDDEN, kernel, padding=kernel // 2)
        self.score = nn.Conv2d(HIDDEN, 1, 1)
        self.mask = nn.Conv2d(HIDDEN, mask_size**2, 1)
        for conv in (self.score, self.mask):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def score_map(self, level: Tensor) -> Tensor:
        """Logits of every location: (B, 128, h, w) -> (B, h * w)."""
        return self.score(F.relu(self.hidden(level))).flatten(1)

    def embed(self, patches: Tensor) -> Tensor:
        """Hidden units of some locations, as the convolution has them: (..., k * k, 128) -> (..., 512)."""
        weight = self.hidden.weight.permute(0, 2, 3, 1).flatten(1)
        return F.relu(F.linear(patches.flatten(-2), weight, self.hidden.bias))

    def scores(self, hidden: Tensor) -> Tensor:
        """Logits of some locations: (..., 512) -> (...)."""
        return F.linear(hidden, self.score.weight.flatten(1), self.score.bias)[..., 0]

    def masks(self, hidden: Tensor) -> Tensor:
        """Mask logits of some locations: (..., 512) -> (..., m, m)."""
        logits = F.linear(hidden, self.mask.weight.flatten(1), self.mask.bias)
        return logits.unflatten(-1, (self.mask_size, self.mask_size))


class FPNMaskProposalNetwork(nn.Module):
    """A pyramid of 128 channels from P2 to P6 and one head per window size, shared by the levels.

    Training looks at 128 windows of each image only, so the heads' cost does not grow with the image; inference scores
    every window and draws the masks of the best.

    Args:
        backbone: timm name of a network with features at strides 4, 8, 16 and 32.
        windows: "5x5", "7x7", or "dual" for both.
        mask_size: m, cells of a mask's side.
        canonical: the finest scale in pixels; the others follow by octaves, the 7 x 7 windows' half an octave above.
        proposals: windows that become detections.
        threshold: probability from which on a cell belongs to the object, for its box.
        pretrained: ImageNet weights of the backbone.

    Shapes: see `seglight.models.instance.InstanceModel`. Labels are 0; boxes are those of the masks, in whole cells.

    Raises:
        ValueError: an option is out of range, or the backbone lacks a stride.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        windows: Windows = "dual",
        mask_size: int = 14,
        canonical: float = 32,
        proposals: int = 1000,
        threshold: float = 0.5,
        pretrained: bool = False,
    ):
        super().__init__()
        if windows not in KERNELS:
            raise ValueError(f"windows is {windows!r}; choose one of {', '.join(KERNELS)}.")
        if canonical < SMALLEST:
            raise ValueError(
                f"canonical is {canonical}; below {SMALLEST} pixels some objects would lie between the locations of "
                f"stride 4. Enlarge the images instead, in the data and with model.test_short_side."
            )
        for name, value in (("mask_size", mask_size), ("proposals", proposals)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        self.mask_size, self.proposals, self.threshold = mask_size, proposals, threshold
        self.grid = WindowGrid(KERNELS[windows], canonical, mask_size)
        self.backbone = Backbone(backbone, None, pretrained=pretrained)
        self.taps = [self.backbone.level(stride) for stride in STRIDES]
        self.pyramid = FeaturePyramid([self.backbone.channels[tap] for tap in self.taps], WIDTH, subsampled=True)
        self.heads = nn.ModuleList(WindowHead(kernel, mask_size) for kernel in KERNELS[windows])

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[InstanceTarget] | None = None
    ) -> tuple[dict[str, Tensor], list[Detections]]:
        """Losses, detections; see the class."""
        from seglight.models.rcnn_parts import batch_images

        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        features = self.backbone(batch_images(images, STRIDES[-1]).tensors)
        levels = self.pyramid([features[tap] for tap in self.taps])
        places = self.grid.places([tuple(level.shape[-2:]) for level in levels], levels[0].device)
        losses = {} if targets is None else self.losses(levels, places, targets)
        return losses, [] if self.training else self.detect(levels, places, sizes)

    def losses(self, levels: Sequence[Tensor], places: Places, targets: Sequence[InstanceTarget]) -> dict[str, Tensor]:
        """`score`: binary cross entropy over the sample; `mask`: ten times that over the cells of positives."""
        owners = [self.grid.assign(places, target) for target in targets]
        chosen, counts = (torch.stack(part) for part in zip(*map(self.grid.sample, owners), strict=True))
        first = min(POSITIVES, len(owners[0]))
        seen = self.grid.windows(places, chosen[:, :first])
        wanted = torch.stack(
            [
                self.grid.mask_targets(target["masks"], owner[picked[:first]].clamp(min=0), window)
                for target, owner, picked, window in zip(targets, owners, chosen, seen, strict=True)
            ]
        )
        hidden = self._hidden(levels, places, chosen)
        scores = self._of_head(places, chosen, [head.scores(x) for head, x in zip(self.heads, hidden, strict=True)])
        masks = self._of_head(
            places, chosen[:, :first], [head.masks(x[:, :first]) for head, x in zip(self.heads, hidden, strict=True)]
        )
        is_object = torch.zeros_like(scores)
        is_object[:, :first] = 1
        score = F.binary_cross_entropy_with_logits(scores, is_object, reduction="none")
        mask = F.binary_cross_entropy_with_logits(masks, wanted, reduction="none").mean((-2, -1))
        return {
            "score": _mean(score, counts),
            "mask": MASK_WEIGHT * _mean(mask, counts[:, :first]),
        }

    # ------------------------------------------------------------------- windows

    def _hidden(self, levels: Sequence[Tensor], places: Places, chosen: Tensor) -> list[Tensor]:
        """Hidden units of each head at locations of any head: int64 (B, S) -> (B, S, 512) each."""
        margin, place = self.grid.margin, chosen % len(places.stride)
        flat = torch.cat([F.pad(level, [margin] * 4).flatten(2) for level in levels], 2).transpose(1, 2)
        image = torch.arange(len(flat), device=flat.device)[:, None, None]
        hidden = []
        for head in self.heads:
            reach = torch.arange(-(head.kernel // 2), head.kernel // 2 + 1, device=flat.device)
            dy, dx = torch.cartesian_prod(reach, reach).unbind(1)
            cells = places.cell[place][..., None] + dy * places.row[place][..., None] + dx
            hidden.append(head.embed(flat[image, cells]))
        return hidden

    def _of_head(self, places: Places, chosen: Tensor, values: list[Tensor]) -> Tensor:
        """Of the values by all heads, (B, S, ...) each, those by the locations' own, in float32."""
        head = chosen // len(places.stride)
        result = values[0].float()
        for i, value in enumerate(values[1:], start=1):
            own = (head == i).view(*head.shape, *[1] * (value.ndim - head.ndim))
            result = torch.where(own, value.float(), result)
        return result

    # ----------------------------------------------------------------- inference

    def score_maps(self, levels: Sequence[Tensor]) -> Tensor:
        """Logits of all locations: float32 (B, heads * T)."""
        return torch.cat([head.score_map(level) for head in self.heads for level in levels], 1).float()

    def detect(self, levels: Sequence[Tensor], places: Places, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """The best windows of each image over all levels and heads; no suppression of those that overlap."""
        from torchvision.ops import clip_boxes_to_image

        found: list[Detections] = []
        for i, (size, logits) in enumerate(zip(sizes, self.score_maps(levels), strict=True)):
            usable = len(self.heads) * sum(-(-size[0] // stride) * -(-size[1] // stride) for stride in LEVELS)
            inside = self.grid.inside(places, size).repeat(len(self.heads))
            scores, chosen = torch.where(inside, logits, -torch.inf).topk(min(self.proposals, usable))
            chosen = chosen[None]
            hidden = self._hidden([level[i : i + 1] for level in levels], places, chosen)
            values = [head.masks(x) for head, x in zip(self.heads, hidden, strict=True)]
            masks = self._of_head(places, chosen, values)[0].sigmoid()
            windows = self.grid.windows(places, chosen[0])
            cells = extent(masks >= self.threshold)[0] / self.mask_size
            corner, side = windows[:, :2].repeat(1, 2), (windows[:, 2:] - windows[:, :2]).repeat(1, 2)
            found.append(
                {
                    "boxes": clip_boxes_to_image(corner + cells * side, size),
                    "labels": torch.zeros_like(chosen[0]),
                    "scores": scores.sigmoid(),
                    "masks": masks,
                    "windows": windows,
                }
            )
        return found


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Over those that count; 0 without any."""
    return (values * counts).sum() / counts.sum().clamp(min=1)


class FPNMaskProposal(InstanceModel):
    """Mask proposals of a feature pyramid: objects without classes. AR@1000 on COCO: 48.1.

    That is with ResNet-50, 28 x 28 masks and twice the schedule, on the first 5000 images of val2014; 45.7 with
    14 x 14 masks, 43.4 and 43.5 with 5 x 5 and 7 x 7 windows alone. The paper's recipe: SGD on 16 images a step, lr
    0.03, divided by 10 after 60k of 80k steps, weight decay 1e-4, shorter side 800 without jitter; 128 windows of each
    image, one in four positive; binary cross entropies, that of the masks ten times. Labels of the data are ignored,
    and all detections have label 0.

    Objects much below `canonical`, 32 pixels in the images that the network gets, share the finest windows, whose
    masks are then coarse: for small ones enlarge the images, in the data and with `test_short_side`, or set
    `canonical` to 16 and `mask_size` to 28. Nuclei of 8 to 60 pixels, their true masks seen through the windows and
    back in the image, have an AR of 0.71 with the defaults, 0.87 at twice the size, and 0.999 with both options.

    Left to choose by the paper: windows are centred in the cells; of several objects a location takes the nearest;
    locations on crowds are not sampled; negatives fill the sample where positives lack; weights start from He's and,
    for score and mask, N(0, 0.01). A proposal's box is that of its mask in whole cells. The paper suppresses no
    proposals; `test_scales` and `test_flip`, which are ours, suppress between looks, and may leave fewer than 1000.

    Args:
        num_classes: of the data, 1 by default; the network has no classes.
        backbone: timm name of a network with features at strides 4, 8, 16 and 32.
        pretrained: start from timm's ImageNet weights of the backbone.
        windows: "5x5", "7x7", or "dual" for both.
        mask_size: cells of a mask's side: 14, or the better 28.
        canonical: longer side in pixels of the objects that the finest windows are for; 16 or more.
        test_proposals: test-time: windows that become detections.
    """

    agnostic = True
    limits = (1, 100, 1000)
    monitor = "val/AR1000"
    show = ("val/AR100", "val/ARs")
    free = InstanceModel.free | {"num_classes"}

    def __init__(
        self,
        num_classes: int | None = None,
        backbone: str = "resnet50",
        pretrained: bool = False,
        windows: Windows = "dual",
        mask_size: int = 14,
        canonical: float = 32,
        test_proposals: int = 1000,
        **kwargs: Any,
    ):
        network = FPNMaskProposalNetwork(backbone, windows, mask_size, canonical, test_proposals, pretrained=pretrained)
        super().__init__(network=network, num_classes=num_classes or 1, **kwargs)
        network.threshold = self.test_threshold
        network.backbone.check_preprocessing(self.preprocessing)
