"""Several views of one image, by scales, mirroring or different networks, into one list of objects.

The steps of COCO's challenge entries: non-maximum suppression over all views together, then every object that is left
is averaged with those it stands for. Box voting is of Gidaris & Komodakis (ICCV 2015, section 5), mask voting of Dai,
He & Sun (CVPR 2016): means over all boxes of the class that overlap the kept one, weighted by their scores. Masks are
averaged as probabilities on a grid, never as dense images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from seglight.types import Detections

Score = Literal["max", "mean"]
FIELDS = ("boxes", "labels", "scores", "windows")
TOGETHER = 8192
"""Masks that are resampled at a time, to bound the memory."""


def flip(detections: Detections, width: float) -> Detections:
    """The same objects in the mirrored image.

    Args:
        detections: of an image.
        width: of that image, in pixels.
    """
    return {
        **detections,
        "boxes": _mirror(detections["boxes"], width),
        "windows": _mirror(detections["windows"], width),
        "masks": detections["masks"].flip(-1),
    }


def _mirror(boxes: Tensor, width: float) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], -1)


def scale(detections: Detections, x: float, y: float) -> Detections:
    """The same objects in an image of other size: coordinates times `x` and `y`. Grids need no change."""
    factors = torch.tensor([x, y, x, y], device=detections["boxes"].device)
    return {**detections, "boxes": detections["boxes"] * factors, "windows": detections["windows"] * factors}


def merge(
    views: Sequence[Detections],
    nms: float = 0.5,
    vote: float = 0.5,
    score: Score = "max",
    limit: int = 100,
) -> Detections:
    """One list of objects from several views of an image; the order of the views does not matter.

    A kept box and its window become the means of the boxes and of the windows that vote, its mask that of their masks,
    each read at the cells of the new window, bilinearly, and zero beyond its own window.

    Args:
        views: each in pixels of the same image, on one device; grids may differ in size and cover any windows.
        nms: boxes of one class that overlap a better one by more (intersection over union) are suppressed.
        vote: those that overlap the kept one by this much, suppressed or not, take part in its mean.
        score: "max" keeps the score of the best view. "mean" is over the views of the best score of each, 0 for a view
            that has not seen the object: what only few views see falls behind.
        limit: objects that are kept, the best ones.

    Returns:
        at most `limit` objects, best first; masks with the cells of the finest view.

    Raises:
        ValueError: no views, or an option is out of range.
    """
    check(nms, vote, score)
    if not views:
        raise ValueError("There are no views to merge; give the detections of at least one.")
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1.")
    with torch.autocast(views[0]["boxes"].device.type, enabled=False):  # a mean in bf16 would move boxes by pixels
        return _merge(views, nms, vote, score, limit)


def _merge(views: Sequence[Detections], nms: float, vote: float, score: Score, limit: int) -> Detections:
    from torchvision.ops import batched_nms, box_iou

    found = {name: torch.cat([view[name] for view in views]) for name in FIELDS}
    of_view = torch.cat([torch.full_like(view["labels"], i) for i, view in enumerate(views)])
    order = _best_first(found)
    found = {name: value[order] for name, value in found.items()}
    boxes, labels, scores, windows = found["boxes"], found["labels"], found["scores"], found["windows"]
    of_view = of_view[order]
    kept = batched_nms(boxes, scores, labels, nms).sort().values  # best first, ties as above
    if score == "max":
        kept = kept[:limit]
    member = (box_iou(boxes[kept], boxes) >= vote) & (labels[kept, None] == labels)
    member[torch.arange(len(kept), device=kept.device), kept] = True  # also a box without area, which overlaps nothing
    if score == "mean":
        seen = torch.where(member, scores, 0.0)
        best = seen.new_zeros(len(kept), len(views))
        best.scatter_reduce_(1, of_view.expand(len(kept), -1), seen, "amax")
        final = best.sort(1).values.mean(1)  # sorted: a sum depends on its order
        rank = final.argsort(descending=True, stable=True)
        kept, member, final = kept[rank], member[rank], final[rank]
    else:
        final = scores[kept]
    kept, member, final = kept[:limit], member[:limit], final[:limit]
    weight = member * scores.clamp(min=1e-6)
    weight = weight / weight.sum(1, keepdim=True)
    targets = weight @ windows
    return {
        "boxes": weight @ boxes,
        "labels": labels[kept],
        "scores": final,
        "masks": _vote_masks([view["masks"] for view in views], windows, order, weight, targets),
        "windows": targets,
    }


def check(nms: float, vote: float, score: str) -> None:
    """Refuse options of `merge` that are out of range.

    Raises:
        ValueError: says which.
    """
    for name, value in (("nms", nms), ("vote", vote)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value}; an intersection over union above 0 and at most 1, usually 0.5.")
    if score not in ("max", "mean"):
        raise ValueError(f'score is {score!r}; choose "max" or "mean".')


def _best_first(found: dict[str, Tensor]) -> Tensor:
    """An order that does not depend on that of the views: by score, ties by class and coordinates."""
    keys = [-found["scores"], found["labels"], *found["boxes"].unbind(1), *found["windows"].unbind(1)]
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order


def _vote_masks(grids: list[Tensor], windows: Tensor, order: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Weighted means of the masks at the cells of other windows.

    Args:
        grids: (N_i, m_i, m_i) of each view.
        windows: (N, 4), sorted.
        order: (N,), from sorted to the order of `grids`.
        weight: (K, N), of each sorted mask in each mean; zeros take no time.
        targets: (K, 4), windows of the means.
    """
    size = max(grid.shape[-1] for grid in grids)
    means = weight.new_zeros(len(targets), size, size)
    sides = torch.cat([torch.full((len(grid),), grid.shape[-1], device=order.device) for grid in grids])
    for side in sorted({grid.shape[-1] for grid in grids}):  # grids of one size together, whatever the order of views
        stack = torch.cat([grid for grid in grids if grid.shape[-1] == side])
        place = ((sides == side).cumsum(0) - 1)[order]  # in the stack
        pairs = (weight * (sides == side)[order]).nonzero()
        for mean, one in (part.unbind(1) for part in pairs.split(TOGETHER)):
            read = _read(stack[place[one]].to(weight.dtype), windows[one], targets[mean], size)
            means.index_add_(0, mean, read * weight[mean, one][:, None, None])
    return means


def _read(masks: Tensor, windows: Tensor, targets: Tensor, size: int) -> Tensor:
    """Masks (P, m, m) over `windows` as grids (P, size, size) over `targets`."""
    centres = (torch.arange(size, device=masks.device) + 0.5) / size
    corner, side = targets[:, :2, None], (targets[:, 2:] - targets[:, :2])[..., None]
    own, length = windows[:, :2, None], (windows[:, 2:] - windows[:, :2]).clamp(min=1e-6)[..., None]
    x, y = (((corner + centres * side - own) / length) * 2 - 1).unbind(1)  # -1 and 1 are the borders of the window
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], -1)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
