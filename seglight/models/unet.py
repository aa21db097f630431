"""U-Net with valid convolutions (Ronneberger, Fischer and Brox, 2015): its sizes, network, border weights and model."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from seglight import inference
from seglight.losses import cross_entropy
from seglight.models.blocks import HeConv2d
from seglight.models.semantic import SemanticModel
from seglight.types import IGNORE_INDEX, SemanticBatch

MARGIN = 92
"""Pixels of context that the network needs on each side of its output."""

SMALLEST = 188


def output_size(size: int) -> int:
    """Side of the output for a legal input side.

    Legal sides are 16 k + 60 from 188 on: then all four poolings halve an even size.

    Raises:
        ValueError: the side is not legal; the nearest legal ones are named.
    """
    if size < SMALLEST or (size - 60) % 16:
        above = legal_input_size(size)
        below = f"{above - 16} or " if above > SMALLEST else ""
        raise ValueError(
            f"U-Net cannot take an input side of {size} pixels: its unpadded convolutions fit sides of 16 k + 60 from "
            f"{SMALLEST} on; the nearest is {below}{above}."
        )
    return size - 2 * MARGIN


def legal_input_size(at_least: int) -> int:
    """The smallest legal input side that is not below `at_least`."""
    return max(SMALLEST, 60 + 16 * -(-(at_least - 60) // 16))


def input_for_output(size: int) -> int:
    """The smallest legal input side whose output covers `size` pixels."""
    return legal_input_size(size + 2 * MARGIN)


class UNetNetwork(nn.Module):
    """Contracting and expanding path of unpadded 3x3 convolutions; figure 1 of the paper.

    Weights start as N(0, 2 / N) with N = k * k * C_in, biases at 0 (section 3). Dropout follows the two deepest stages.
    In each concatenation the centre-cropped encoder features come first.

    Args:
        in_channels: of the image.
        num_classes: K.
        relu_after_up: a ReLU after each up-convolution, as in the released network; the paper's figure shows none.
        wide_last_up: the last up-convolution keeps its channels instead of halving them, as in the released network
            (31,100,354 parameters instead of 31,030,658).
        width: channels of the first stage, 64 in the paper; each deeper stage doubles them.
        dropout: probability.

    Shapes: (B, in_channels, H, W) -> {"out": (B, K, H - 184, W - 184)}, H and W legal sides (`output_size`).
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        relu_after_up: bool = False,
        wide_last_up: bool = False,
        width: int = 64,
        dropout: float = 0.5,
    ):
        super().__init__()
        widths = [width * 2**stage for stage in range(5)]
        self.down = nn.ModuleList(
            _double_conv(before, after, dropout if stage >= 3 else 0.0)
            for stage, (before, after) in enumerate(zip([in_channels, *widths], widths, strict=False))
        )
        self.pool = nn.MaxPool2d(2)
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        for wide in reversed(widths[:-1]):
            raised = 2 * wide if wide_last_up and wide == width else wide
            self.up.append(_UpConv(2 * wide, raised, relu_after_up))
            self.merge.append(_double_conv(wide + raised, wide))
        self.score = HeConv2d(width, num_classes, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score a normalised image; see the class."""
        for side in image.shape[-2:]:
            output_size(side)
        skips: list[Tensor] = []
        x = image
        for stage in self.down:
            x = stage(self.pool(x) if skips else x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x, skip = up(x), skips.pop()
            top, left = ((have - want) // 2 for have, want in zip(skip.shape[-2:], x.shape[-2:], strict=True))
            # A crop, as in `centre_crop`; but the gradient of slicing is contiguous, in channels_last networks too.
            skip = nn.functional.pad(skip, (-left, -left, -top, -top))
            x = merge(torch.cat([skip, x], 1))
        return {"out": self.score(x)}


class _UpConv(nn.Sequential):
    """2x2 up-convolution of stride 2."""

    def __init__(self, before: int, after: int, relu: bool):
        conv = nn.ConvTranspose2d(before, after, 2, 2)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # stored (in, out, k, k): N as above
        nn.init.zeros_(conv.bias)
        super().__init__(conv, *([nn.ReLU(inplace=True)] if relu else []))


def _double_conv(before: int, after: int, dropout: float = 0.0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [HeConv2d(channels, after, 3), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else []))


def centre_crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut (..., H, W) to `size` around its centre; the margins must be even to be exact."""
    top, left = ((have - want) // 2 for have, want in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]


def border_weights(
    instances: np.ndarray,
    labels: np.ndarray | None = None,
    w0: float = 10.0,
    sigma: float = 5.0,
    inside: bool = False,
) -> np.ndarray:
    """Pixel weights of the U-Net loss: balanced classes, and a ridge where two objects nearly touch (equation 2).

    ``w = w_c + w0 * exp(-(d1 + d2)**2 / (2 * sigma**2))`` with d1 and d2 the Euclidean distances, in pixels, to the
    nearest and to the second nearest object; the second term is for background pixels only, which is the custom: the
    paper does not say. w_c is inverse to the pixel count of the class and averages 1 over the map.

    Args:
        instances: integer (H, W), 0 background, each object a positive number of its own.
        labels: integer (H, W), the classes to balance; 255 weighs 0. Without it: object against background.
        w0: height of the ridge.
        sigma: its width in pixels.
        inside: raise the ridge within the objects too, where d1 = 0.

    Returns:
        float32 (H, W).
    """
    from scipy import ndimage

    labels = instances > 0 if labels is None else labels
    valid = labels != IGNORE_INDEX
    counts = np.bincount(labels[valid].ravel(), minlength=1)
    share = valid.sum() / max(1, np.count_nonzero(counts)) / np.maximum(counts, 1)
    weights = np.where(valid, share[np.where(valid, labels, 0)], 0.0)

    # Beyond 6 sigma the ridge is below w0 * 2e-8, so each object needs distances in its own surroundings only.
    reach = int(np.ceil(6 * sigma))
    nearest = np.full((2, *instances.shape), np.inf, dtype=np.float32)
    for number, box in enumerate(ndimage.find_objects(instances), start=1):
        if box is None:
            continue
        near = tuple(slice(max(0, side.start - reach), side.stop + reach) for side in box)
        distance = ndimage.distance_transform_edt(instances[near] != number).astype(np.float32)
        first, second = nearest[(0, *near)], nearest[(1, *near)]
        np.minimum(second, np.maximum(first, distance), out=second)
        np.minimum(first, distance, out=first)
    ridge = w0 * np.exp(-(nearest.sum(0) ** 2) / (2 * sigma**2))
    return (weights + np.where(valid & (inside | (instances == 0)), ridge, 0.0)).astype(np.float32)


def separate(mask: np.ndarray, background: int = 0) -> np.ndarray:
    """Number the objects of a label map: connected pixels (by their sides) of one class.

    Args:
        mask: integer (H, W); `background` and 255 belong to no object.
        background: the class between the objects.

    Returns:
        int32 (H, W), 0 or the number of the object.
    """
    from scipy import ndimage

    instances = np.zeros(mask.shape, dtype=np.int32)
    for label in np.setdiff1d(mask, [background, IGNORE_INDEX]):
        parts, _ = ndimage.label(mask == label)
        instances += np.where(parts > 0, parts + instances.max(), 0)
    return instances


class UNet(SemanticModel):
    """U-Net with the paper's overlapping tiles and mirrored context: training crops and images may have any size.

    31,030,658 parameters with one channel in and two classes. The paper trains on one large tile per step with SGD of
    momentum 0.99 on elastically deformed images (`data.elastic`: 10 pixels on a 3x3 grid). Here the border weights are
    those of the deformed label, computed at each step, where the paper computes them once per training image; and the
    learning rate, which the paper does not give, comes from the experiment.

    Args:
        num_classes: K.
        in_channels: 1 reads images as grey, 3 as RGB with ImageNet's mean.
        context: where the 92 pixels around what is predicted come from in training. "mirror" reflects the crop at its
            border, so all its labels count: right for whole images. "crop" takes them from the crop, whose side must
            then be legal (`output_size`: 188, 204, ... 572) and of whose labels the centre counts: right for crops out
            of larger images, where a mirror shows what is not there.
        border_weight: weigh pixels by class balance and closeness of two objects (`border_weights`); the objects are
            the connected parts of each class within the crop. The loss is sum(w * cross entropy) / sum(w).
        border_w0: height of that weight between touching objects.
        border_sigma: its width in pixels.
        border_background: the class between the objects.
        border_inside: weigh that closeness within the objects too; the paper does not say.
        relu_after_up: a ReLU after each up-convolution, as in the released network.
        wide_last_up: the last up-convolution keeps its channels, as in the released network.
        width: channels of the first stage; 64 is the paper's network, less is for trials.
        test_tile: test-time: input side of the tiles; a larger one is faster and needs more memory, for equal scores.
        test_rotations: test-time: average the class probabilities over the image turned by this many equal parts of a
            full turn; 7 in the paper's result for electron microscopy.
    """

    free = SemanticModel.free | {
        "context", "border_weight", "border_w0", "border_sigma", "border_background", "border_inside", "test_tile",
        "test_rotations",
    }  # fmt: skip

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        context: Literal["mirror", "crop"] = "mirror",
        border_weight: bool = False,
        border_w0: float = 10.0,
        border_sigma: float = 5.0,
        border_background: int = 0,
        border_inside: bool = False,
        relu_after_up: bool = False,
        wide_last_up: bool = False,
        width: int = 64,
        test_tile: int = 572,
        test_rotations: int = 1,
        **kwargs: Any,
    ):
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels is {in_channels}; U-Net reads images as grey (1) or RGB (3).")
        if output_size(test_tile) < 16:
            raise ValueError(f"test_tile is {test_tile}; tiles step by a multiple of 16 pixels, so use at least 204.")
        if test_rotations < 1:
            raise ValueError(f"test_rotations is {test_rotations}; 1 is the image as it is, 7 the paper's average.")
        network = UNetNetwork(in_channels, num_classes, relu_after_up, wide_last_up, width)
        preprocessing = "grey" if in_channels == 1 else "torch"
        super().__init__(network=network, num_classes=num_classes, preprocessing=preprocessing, **kwargs)
        self.test_tile, self.test_rotations = test_tile, test_rotations
        self.context = context
        self.border_weight, self.border_w0, self.border_sigma = border_weight, border_w0, border_sigma
        self.border_background, self.border_inside = border_background, border_inside

    def training_step(self, batch: SemanticBatch, batch_idx: int) -> Tensor:
        """One loss; its parts go to the running mean."""
        image = self.normalize(batch["image"])
        if self.context == "mirror":  # one tile that covers the crop
            tile = tuple(output_size(input_for_output(side)) for side in image.shape[-2:])
            outputs = {"out": inference.overlap_tile(self._tile, image, tile, MARGIN)}
        else:
            outputs = self.network(image)
        losses = self.loss(outputs, batch)
        self.track(losses)
        return losses["loss"]

    def loss(self, outputs: dict[str, Tensor], batch: SemanticBatch) -> dict[str, Tensor]:
        """Cross entropy with the part of the label that was predicted: its centre."""
        scores, mask = outputs["out"], centre_crop(batch["mask"], outputs["out"].shape[-2:])
        if not self.border_weight:
            return super().loss(outputs, {**batch, "mask": mask})
        shape = (self.border_w0, self.border_sigma, self.border_inside)
        maps = [border_weights(separate(label, self.border_background), label, *shape) for label in mask.cpu().numpy()]
        weights = torch.from_numpy(np.stack(maps)).to(scores.device)
        return {"loss": cross_entropy(scores, mask, self.class_weights, weights, self.loss_reduction)}

    def logits(self, image: Tensor) -> Tensor:
        """Scores at image size by overlapping tiles with mirrored context (figure 2).

        Pooling makes the network repeat itself every 16 pixels only. Tiles that step by a multiple of 16, hence with 94
        pixels of context instead of 92, give the same scores as one tile over the whole image.
        """
        margin = MARGIN + 2
        sides = (min(self.test_tile, legal_input_size(side + 2 * margin)) for side in image.shape[-2:])
        high, wide = (side - 2 * margin for side in sides)
        return inference.overlap_tile(lambda x: centre_crop(self._tile(x), (high, wide)), image, (high, wide), margin)

    def protocol(self, image: Tensor) -> Tensor:
        """As all models, and averaged over rotations if asked."""
        if self.test_rotations == 1:
            return super().protocol(image)
        return inference.rotations(
            super().protocol, image, self.test_rotations, self.test_aggregate, self.align_corners
        )

    def _tile(self, image: Tensor) -> Tensor:
        return self.network(image)["out"]
