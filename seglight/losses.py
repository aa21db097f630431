"""Losses of semantic segmentation. Shapes: B batch, K classes, h and w logits, H and W labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seglight.types import IGNORE_INDEX


def cross_entropy(
    logits: Tensor,
    mask: Tensor,
    weight: Tensor | Sequence[float] | None = None,
    pixel_weight: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    align_corners: bool = False,
) -> Tensor:
    """Cross-entropy of the pixels that are not ignored, at label resolution.

    Logits of another size are resized to the label, bilinearly; labels are never resampled. Everything is computed in
    float32 at least, under autocast too. A batch without any labelled pixel has loss 0 and gradient 0, not nan.

    Args:
        logits: float (B, K, h, w).
        mask: integers (B, H, W), 0..K-1 or 255 (ignore).
        weight: K class weights, as in `torch.nn.CrossEntropyLoss`. A tensor on the device of the logits saves a copy
            per call.
        pixel_weight: float (B, H, W), the w(x) of U-Net's loss (Ronneberger et al. 2015, eq. 1).
        reduction: "mean" divides by the sum of the weights of the labelled pixels (their number without weights);
            "sum" does not divide (the FCN and U-Net papers' unnormalised loss).
        align_corners: of the resizing.

    Raises:
        ValueError: shapes that do not fit, or a label that is no class. Labels are only checked on the CPU: on a GPU
            the check would wait for the device, and an illegal label stops the kernel with a device-side assert.
    """
    classes = logits.shape[1]
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction is {reduction!r}; choose "mean" or "sum".')
    if mask.ndim != 3 or mask.shape[0] != logits.shape[0]:
        raise ValueError(
            f"The logits have the shape {tuple(logits.shape)} and the mask {tuple(mask.shape)}; they must be "
            "(B, K, h, w) and (B, H, W) with the same B."
        )
    if pixel_weight is not None and pixel_weight.shape != mask.shape:
        raise ValueError(
            f"pixel_weight has the shape {tuple(pixel_weight.shape)} and the mask {tuple(mask.shape)}; "
            "they must be equal."
        )
    # The softmax wants its channels apart: where they are last, they are moved here, while the map is small.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), memory_format=torch.contiguous_format)
    if weight is not None:
        weight = torch.as_tensor(weight, dtype=logits.dtype, device=logits.device)
        if weight.shape != (classes,):
            raise ValueError(f"weight has the shape {tuple(weight.shape)}; {classes} classes need as many weights.")
    mask = mask.long()
    if logits.shape[-2:] != mask.shape[-2:]:
        logits = F.interpolate(logits, size=mask.shape[-2:], mode="bilinear", align_corners=align_corners)

    try:
        # Not summed by the kernel: on a GPU its sum takes the pixels in any order, so that no two runs have equal bits.
        loss = F.cross_entropy(logits, mask, weight, ignore_index=IGNORE_INDEX, reduction="none")
    except IndexError as error:  # torch checks labels on the CPU, so a check of our own would be time lost
        values = mask.unique()
        illegal = values[(values < 0) | ((values >= classes) & (values != IGNORE_INDEX))].tolist()
        raise ValueError(
            f"The mask holds {', '.join(map(str, illegal[:5]))}, but with {classes} classes only 0..{classes - 1} "
            f"and {IGNORE_INDEX} (ignore) are legal. Map other values to {IGNORE_INDEX} in the dataset, or check the "
            "number of classes."
        ) from error
    loss = (loss if pixel_weight is None else loss * pixel_weight).sum()
    if reduction == "sum":
        return loss

    share = mask != IGNORE_INDEX
    if weight is not None:
        share = share * weight[mask.clamp_max(classes - 1)]
    if pixel_weight is not None:
        share = share * pixel_weight
    total = share.sum()
    return loss / torch.where(total == 0, 1, total)
