"""Files of torchvision's detectors, and Mask R-CNN's weights into PANet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

RAW_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
"""The 80 categories of COCO that have objects, in the order that makes them 0..79. torchvision's labels are these."""
PREDICTORS = {  # by the outputs of each class
    "roi_heads.box_predictor.cls_score": 1,
    "roi_heads.box_predictor.bbox_pred": 4,
    "roi_heads.mask_predictor.mask_fcn_logits": 1,
}
_V2 = "rpn.head.conv.1.0.weight"
_OLD = (  # names of the first published files, without the sequences that came later
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
)


def from_torchvision(
    content: Mapping[str, Any], network: nn.Module, preprocessing: str, path: str, without: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Weights of torchvision's Faster or Mask R-CNN under the names of a `MaskRCNNNetwork`.

    The first published files were trained with a batch norm without epsilon; its effect goes into the scales, so the
    result is the same with any epsilon. They are told by their layer names; later files had 1e-5, as here.

    Args:
        content: state dict, or what torchvision's training script saves, with the state dict under `model`.
        network: tells the number of classes, and which parts to leave aside.
        preprocessing: of the model.
        path: of the file, for messages.
        without: prefixes of layers that stay as initialised.

    Raises:
        ValueError: not such a file, of a version that the network is not, or of other classes.
    """
    source = content.get("model", content)
    if not isinstance(source, Mapping) or "rpn.head.cls_logits.weight" not in source:
        raise ValueError(
            f"{path} is neither a seglight checkpoint nor a Faster or Mask R-CNN of torchvision; give one of these."
        )
    if preprocessing != "torch":
        raise ValueError(f'{path} is of torchvision and expects preprocessing "torch", not "{preprocessing}".')
    own = network.state_dict()
    if (_V2 in source) != (_V2 in own):
        v2 = 'box_head "4conv1fc", head_norm "batch", rpn_convs 2 and batch_norm "train"'
        v1 = 'box_head "2fc", head_norm "none" and rpn_convs 1'
        raise ValueError(
            f"{path} is of version {2 if _V2 in source else 1} of torchvision's detectors, this network is not; set "
            f"model.{v2 if _V2 in source else v1}."
        )
    old = "rpn.head.conv.weight" in source
    weights = {_name(key, _V2 in source): value for key, value in source.items()}
    if not any(key.startswith("roi_heads.mask_head.") for key in own):
        weights = {key: value for key, value in weights.items() if not key.startswith("roi_heads.mask_")}
    if old:
        _fold_epsilon(weights, network)
    # Counts of batches, which frozen layers lack, change nothing at a constant momentum.
    weights = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked") or key in own}
    for key in own:
        if key.endswith("num_batches_tracked"):
            weights.setdefault(key, torch.zeros_like(own[key]))
    return _predictors(weights, own["roi_heads.box_predictor.cls_score.bias"].numel(), path, without)


def _name(key: str, normed: bool) -> str:
    for pattern, later in _OLD:
        key = re.sub(pattern, later, key)
    key = re.sub(r"mask_fcn(\d)\.", lambda match: f"{int(match[1]) - 1}.0.", key)
    key = re.sub(r"^backbone\.fpn\.inner_blocks", "pyramid.lateral", key)
    key = re.sub(r"^backbone\.fpn\.layer_blocks", "pyramid.output", key)
    return key if normed else re.sub(r"^(pyramid\.\w+\.\d)\.0\.", r"\1.", key)


def _fold_epsilon(weights: dict[str, Tensor], network: nn.Module) -> None:
    layers = dict(network.named_modules())
    for key in [key for key in weights if key.endswith(".running_var")]:
        name = key.removesuffix(".running_var")
        if name in layers:
            variance = weights[key].double()
            factor = ((variance + layers[name].eps) / variance).sqrt()
            weights[f"{name}.weight"] = (weights[f"{name}.weight"].double() * factor).float()


def _predictors(weights: dict[str, Tensor], outputs: int, path: str, without: tuple[str, ...]) -> dict[str, Tensor]:
    """Leave, or reduce from COCO's raw ids to its 80 classes, the rows of the classes; background is the first."""
    theirs = weights["roi_heads.box_predictor.cls_score.bias"].numel()
    rows = torch.tensor([0, *RAW_IDS])
    present = [name for name in PREDICTORS if f"{name}.weight" in weights]
    for name in present:
        if theirs == outputs or f"{name}.".startswith(without):
            continue
        if (theirs, outputs) != (91, 81):
            raise ValueError(
                f"{path} has {theirs - 1} classes and this model {outputs - 1}. Of COCO's files it can be 90 (raw ids) "
                f"or 80 (contiguous); else leave out the predictors with model.init_without [{', '.join(present)}]."
            )
        each = PREDICTORS[name]
        index = (rows[:, None] * each + torch.arange(each)).flatten()
        for parameter in ("weight", "bias"):
            weights[f"{name}.{parameter}"] = weights[f"{name}.{parameter}"][index]
    return weights
