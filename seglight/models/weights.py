"""Weights from elsewhere into a network: what matched is logged, and silence is refused."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

log = logging.getLogger(__name__)


def hand_on(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    name: str,
    without: tuple[str, ...] = (),
    strict: bool = False,
) -> None:
    """Copy every tensor the network has under the same name, and say what was taken and what was not.

    Args:
        network: gets the weights.
        weights: tensors by layer name.
        source: where they come from, for messages.
        name: of the network, for messages.
        without: prefixes of layer names that stay as initialised, whatever the file holds.
        strict: the names must be the network's, all of them and no others.

    Raises:
        ValueError: nothing matches, or not everything although strict, or a tensor has another shape.
    """
    own = network.state_dict()
    for prefix in without:
        if not any(key.startswith(prefix) for key in own):
            near = difflib.get_close_matches(prefix, {key.rpartition(".")[0] for key in own}, n=3, cutoff=0)
            raise ValueError(f"{name} has no layer {prefix!r} to leave as initialised; did you mean {', '.join(near)}?")
    weights = {key: value for key, value in weights.items() if not key.startswith(without)}
    missing, unused = own.keys() - weights.keys(), weights.keys() - own.keys()
    lacking = {key for key in missing if not key.startswith(without)}
    if strict and (lacking or unused):
        raise ValueError(
            f"{source} is not a state dict of {name}: it lacks {_layers(lacking)} and has {_layers(unused)} in excess. "
            f"Choose the model that it was made from."
        )
    if len(missing) == len(own):
        raise ValueError(f"{source} has no layer in common with {name}; give a file of a network of that family.")
    for key in (key for key in own if key in weights):
        ours, theirs = tuple(own[key].shape), tuple(weights[key].shape)
        if ours != theirs:
            raise ValueError(
                f"{key} is {theirs} in {source} but {ours} in this {name}. Weights are handed on between networks of "
                f"equal num_classes and width only: set both as they were, or leave that layer as initialised with "
                f"model.init_without ({key.rpartition('.')[0]})."
            )
    network.load_state_dict(weights, strict=False)
    log.info(
        f"{name} starts from {source}. Taken: {_layers(own.keys() & weights.keys())}. "
        f"As initialised: {_layers(missing)}. In the file, not in this network: {_layers(unused)}."
    )


def check_start(pretrained: bool, init_from: str | None, width: int = 64) -> None:
    """Refuse what contradicts itself before a large network is built for it.

    Raises:
        ValueError: two files to start from, or ImageNet weights for a network of another width.
    """
    if pretrained and init_from:
        raise ValueError(f"Both pretrained and init_from={init_from!r} are set; choose one to start from.")
    if pretrained and width != 64:
        raise ValueError(f"width is {width}, but the ImageNet weights are of width 64; drop pretrained or width.")


def _layers(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[0] or name for name in names})) or "nothing"
