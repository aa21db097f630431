"""DeconvNet (Noh, Hong and Han, ICCV 2015): VGG16 and its mirror image, which unpools with the switches of the pools.

    encoder   VGG16: 13 convolutions 3x3, five pools 2x2, fc6 7x7 and fc7 1x1 as convolutions     224 -> 7 -> 1
    decoder   fc6-deconv 7x7, then unpool5 .. unpool1, each followed by 3x3 deconvolutions        1 -> 7 -> 224
    score     seg-score-voc 1x1

Every layer but the score is followed by batch normalisation and ReLU. An unpooling puts each value where its pool found
the maximum and 0 elsewhere. Layers have the names of the Caffe release. With 21 classes there are 251,805,653
parameters: 134,285,376 in the encoder, 117,518,912 in the decoder, 1,365 in the score.

Recipe: both stages train on 224x224 crops of boxes (`data.crop_around`), "objects" with one class for 20k steps, then
"proposals" with all classes for 40k; batch 8 x 8, lr 0.01, times 0.1 every 9k (10k) steps, momentum 0.9, weight decay
5e-4, biases with twice the rate and no decay. Then batch normalisation gets statistics of the training data
(`precise_bn`). In a test up to 50 regions are segmented one by one and fused, and FCN-8s may join in (EDeconvNet).

Where this differs from the release: batch norm has torch's epsilon 1e-5, not 1e-9, and its shift is a bias to the
optimiser (the release decays it, at the plain rate); `pretrained` takes torchvision's VGG16 *with* batch normalisation,
which the authors did not have (give VGG16's file as `init_from` to start as they did); edge boxes need a model file of
their own, so regions come from a grid, selective search or a detector; a pass over the data shows one object of each
image, where the authors listed every object.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from seglight.checkpoints import load
from seglight.data.base import SemanticDataModule
from seglight.data.boxes import CONTEXT, objects
from seglight.models import proposals
from seglight.models.blocks import HeConv2d
from seglight.models.semantic import SemanticModel
from seglight.models.vgg import VGG16, vgg16_to_fcn
from seglight.models.weights import check_start, hand_on
from seglight.types import SemanticBatch, SemanticEvalBatch

SIDE = 224
"""Pixels of the square that a region is resized to."""

SMALLEST = 193
"""Smallest side of an image: five pools that round up leave the 7 pixels that fc6 needs."""


class DeconvNetNetwork(nn.Module):
    """Figure 2 of the paper. Fully convolutional: besides 224 it takes any sides from 193 on.

    Pools round up, as in Caffe, and unpooling restores the size before, so sides need no common divisor.

    Args: as of `DeconvNet`.

    Shapes: (B, 3, H, W) -> {"out": (B, K, H, W)}, H and W at least 193.

    Raises:
        ValueError: a smaller image, or a single one of 224 pixels in training, which has no statistics after fc6.
    """

    def __init__(self, num_classes: int, width: int = 64):
        super().__init__()
        names: list[str] = []

        def add(name: str, layer: nn.Module, norm: str | None = None) -> None:
            names.append(name)
            self.add_module(name, layer)
            if norm:
                self.add_module(norm, _norm(layer.out_channels))

        channels = 3
        for stage, (factor, convs) in enumerate(VGG16, start=1):
            for i in range(1, convs + 1):
                add(f"conv{stage}_{i}", HeConv2d(channels, factor * width, 3, padding=1), f"bn{stage}_{i}")
                channels = factor * width
            add(f"pool{stage}", nn.MaxPool2d(2, 2, ceil_mode=True, return_indices=True))
        add("fc6", HeConv2d(channels, 64 * width, 7), "bnfc6")
        add("fc7", HeConv2d(64 * width, 64 * width, 1), "bnfc7")
        add("fc6-deconv", _Deconv(64 * width, channels, 7), "fc6-deconv-bn")
        for stage, (factor, convs) in reversed(list(enumerate(VGG16, start=1))):
            add(f"unpool{stage}", Unpool())
            for i in range(1, convs + 1):
                shallower = VGG16[max(stage - 2, 0)][0]  # the last layer of a stage has the channels of the next unpool
                out = width * (factor if i < convs else shallower)
                add(f"deconv{stage}_{i}", _Deconv(channels, out, 3, padding=1), f"debn{stage}_{i}")
                channels = out
        self.path = tuple(names)
        add("seg-score-voc", _Score(channels, num_classes, 1))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score a normalised image; see the class."""
        self._check(image)
        x = image
        switches: list[tuple[Tensor, torch.Size]] = []
        for name in self.path:
            layer = getattr(self, name)
            if name.startswith("pool"):
                size = x.shape[-2:]
                x, indices = layer(x)
                switches.append((indices, size))
            elif name.startswith("unpool"):
                indices, size = switches.pop()
                x = layer(x, indices, size)
            else:
                x = nn.functional.relu(getattr(self, norm_name(name))(layer(x)), inplace=True)
        return {"out": getattr(self, "seg-score-voc")(x)}

    def _check(self, image: Tensor) -> None:
        height, width = image.shape[-2:]
        if min(height, width) < SMALLEST:
            raise ValueError(
                f"DeconvNet cannot take an image of {height}x{width} pixels: sides start at {SMALLEST}, and it is made "
                f"for {SIDE}. Set data.crop to {SIDE}; the model itself resizes what it is tested on."
            )
        if len(image) == 1 and max(height, width) <= SIDE and self.bnfc6.training:
            raise ValueError(
                "One image has one value per channel after fc6, of which batch normalisation can take no statistics; "
                'set data.batch_size to 2 or more, or model.batch_norm to "eval".'
            )


class Unpool(nn.Module):
    """Put each value where its 2x2 pool found it, and 0 elsewhere.

    Shapes: values (B, C, h, w), indices int64 (B, C, h, w) as of `nn.MaxPool2d`, size (H, W) -> (B, C, H, W).
    """

    def forward(self, x: Tensor, indices: Tensor, output_size: tuple[int, int]) -> Tensor:
        """Unpool, in the memory format of `x`; see the class."""
        if x.is_contiguous(memory_format=torch.channels_last):  # torch's own would copy values and switches, and back
            return _UnpoolChannelsLast.apply(x, indices, output_size)
        return nn.functional.max_unpool2d(x, indices, 2, 2, output_size=output_size)


class _UnpoolChannelsLast(torch.autograd.Function):
    """Unpooling of a channels_last map, to a channels_last map; so is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(indices)
        values = x.new_zeros(len(x), size[0] * size[1], x.shape[1]).transpose(1, 2)
        return values.scatter_(2, indices.flatten(2), x.flatten(2)).unflatten(2, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        values = torch.empty_like(indices, dtype=grad.dtype).flatten(2)
        torch.gather(grad.flatten(2), 2, indices.flatten(2), out=values)
        return values.view_as(indices), None, None


class _Deconv(nn.ConvTranspose2d):
    """A transposed convolution of stride 1 that starts as the release's: weights N(0, 0.01^2), biases 0."""

    def reset_parameters(self) -> None:
        _gaussian(self)


class _Score(nn.Conv2d):
    def reset_parameters(self) -> None:
        _gaussian(self)


def _gaussian(layer: nn.Module) -> None:
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.constant_(norm.bias, 0.001)
    return norm


def norm_name(layer: str) -> str:
    """The batch normalisation of a layer, as the release names it: bn1_1, bnfc6, fc6-deconv-bn, debn5_1."""
    if layer == "fc6-deconv":
        return "fc6-deconv-bn"
    return layer.replace("conv", "bn") if "conv" in layer else f"bn{layer}"


def vgg16_bn_to_deconvnet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of torchvision's `vgg16_bn` to the encoder's layers; fc6 and fc7 come without batch norm.

    Args:
        state_dict: of a `torchvision.models.vgg16_bn`, at any width.

    Raises:
        ValueError: it is not one.
    """
    convs = [f"conv{stage}_{i}" for stage, (_, count) in enumerate(VGG16, start=1) for i in range(1, count + 1)]
    indices = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)
    names = {f"features.{i}": conv for i, conv in zip(indices, convs, strict=True)}
    names |= {f"features.{i + 1}": norm_name(conv) for i, conv in zip(indices, convs, strict=True)}
    names |= {"classifier.0": "fc6", "classifier.3": "fc7"}
    kinds = {
        old: ("weight", "bias", "running_mean", "running_var")[: 4 if "bn" in new else 2] for old, new in names.items()
    }
    missing = [f"{old}.{kind}" for old in names for kind in kinds[old] if f"{old}.{kind}" not in state_dict]
    if missing:
        raise ValueError(f"Not the weights of torchvision's vgg16_bn: {', '.join(missing)} missing.")
    weights = {f"{new}.{kind}": state_dict[f"{old}.{kind}"] for old, new in names.items() for kind in kinds[old]}
    for name, side in (("fc6.weight", 7), ("fc7.weight", 1)):
        weights[name] = weights[name].reshape(len(weights[name]), -1, side, side)
    return weights


def precise_batch_norm(model: SemanticModel, batches: Iterable[SemanticBatch]) -> None:
    """Replace the running statistics by means of the batches' means and variances, with the weights as they are.

    The release's step "make bn layer testable", over 500 batches of 28. Training does not use these statistics.

    Args:
        model: any with batch normalisation.
        batches: of training data, `datamodule.train_batches(500)` for instance; their labels are not looked at.

    Raises:
        ValueError: no batch.
    """
    images = (model.normalize(batch["image"].to(model.device)) for batch in batches)
    first = next(images, None)
    if first is None:
        raise ValueError("There is no batch to take statistics of; give at least one.")
    update_bn(chain([first], images), model.network)
    model.train(model.training)  # which layers are in which mode is for the model to say


class DeconvNet(SemanticModel):
    """DeconvNet with its two ways of looking: crops in training, regions of the image in validation and test.

    Each region is resized to 224x224, scored, resized back, and of overlapping regions each pixel keeps the largest
    score of each class. Training takes the crops as they are; use 224.

    Args:
        num_classes: K.
        pretrained: start the encoder from torchvision's ImageNet weights of VGG16 with batch normalisation (needs
            width 64 and "torch" preprocessing).
        init_from: start from a file instead. A seglight checkpoint of a DeconvNet (stage 2 from stage 1); a plain state
            dict with torchvision's names of VGG16, with batch normalisation or without (as the authors did), which
            fills the encoder; or one converted from the Caffe release, with its layer names, which needs "caffe"
            preprocessing and may lack running statistics (the release folds them into scale and shift).
        width: channels of the first stage; 64 is the paper's network, less is for trials.
        precise_bn: before each validation of a fit, recompute the statistics of batch normalisation over this many
            training batches (`precise_batch_norm`); 0 keeps the running ones. Training itself does not change. Several
            GPUs need `trainer.sync_batchnorm`, as everywhere.
        test_boxes: test-time: regions to segment. "grid" is the image and windows of it in three sizes; "image" is the
            image alone, fast and coarse; "truth" are the boxes of the labels' objects, an oracle; "selective_search"
            needs OpenCV's contributed modules; a path ending in .ckpt is an instance model of ours that detects them.
            Any other provider: set the attribute `boxes`. Boxes of objects get the training's context (1.2).
        test_box_limit: test-time: the most regions of an image.
        test_box_side: test-time: regions with a shorter side of fewer pixels, context included, are skipped. The
            release's 112 is meant for images of 500 pixels. If no region is left, the image is one.
        test_floor: test-time: scores below 0 count as 0, so that a pixel without a positive score is of class 0 (the
            release, whose class 0 is background). Turn it off for classes without background.
        ensemble_with: test-time: checkpoint of an FCN-8s (or any semantic model of ours) to combine with (EDeconvNet).
        ensemble: test-time: "product" of the scores, negative ones as 0 (the release); or "mean" of the class
            probabilities (the paper).
    """

    free = SemanticModel.free | {
        "precise_bn", "test_boxes", "test_box_limit", "test_box_side", "test_floor", "ensemble_with", "ensemble"
    }  # fmt: skip

    def __init__(
        self,
        num_classes: int,
        pretrained: bool = False,
        init_from: str | None = None,
        width: int = 64,
        precise_bn: int = 0,
        test_boxes: str = "grid",
        test_box_limit: int = 50,
        test_box_side: int = 112,
        test_floor: bool = True,
        ensemble_with: str | None = None,
        ensemble: Literal["product", "mean"] = "product",
        **kwargs: Any,
    ):
        check_start(pretrained, init_from, width)
        if test_box_limit < 1 or precise_bn < 0:
            raise ValueError(f"test_box_limit is {test_box_limit}, precise_bn {precise_bn}; they start at 1 and at 0.")
        if ensemble not in ("product", "mean"):
            raise ValueError(f'ensemble is {ensemble!r}; choose "product" or "mean".')
        network = DeconvNetNetwork(num_classes, width)
        super().__init__(network=network, num_classes=num_classes, init_from=init_from, **kwargs)
        if precise_bn and self.batch_norm != "train":
            raise ValueError(f'precise_bn changes the statistics that batch_norm "{self.batch_norm}" keeps; drop one.')
        looks = self.test_flip or self.test_window or self.test_long_side or list(self.test_scales) != [1.0]
        if test_boxes == "truth" and looks:
            raise ValueError(
                'test_boxes "truth" fits the image as it is; drop test_flip, test_window, test_long_side, test_scales.'
            )
        self.precise_bn, self.test_boxes = precise_bn, test_boxes
        self.test_box_limit, self.test_box_side, self.test_floor = test_box_limit, test_box_side, test_floor
        self.ensemble = ensemble
        self.boxes: proposals.Provider | None = self._provider(test_boxes)
        """From an image uint8 (3, H, W) to boxes (N, 4), best first."""
        # In a tuple, so that its weights stay out of this model's checkpoint.
        self._partner: tuple[SemanticModel, ...] = (self._load_partner(ensemble_with),) if ensemble_with else ()
        if pretrained:
            self._start_from_imagenet()

    # -------------------------------------------------------------------- weights

    def _start_from_imagenet(self) -> None:
        if self.preprocessing != "torch":
            raise ValueError(
                f'preprocessing is "{self.preprocessing}", but the weights of torchvision expect "torch"; set that.'
            )
        from torchvision.models import VGG16_BN_Weights

        weights = VGG16_BN_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        hand_on(self.network, vgg16_bn_to_deconvnet(weights), "torchvision's VGG16_BN (ImageNet)", self._name)

    def start_from(self, content: dict[str, Any], path: str, without: tuple[str, ...] = ()) -> None:
        """Take a seglight checkpoint, a VGG16 of torchvision's names or a converted release; see `init_from`."""
        if "features.0.weight" in content:
            convert = vgg16_bn_to_deconvnet if "features.1.weight" in content else vgg16_to_fcn
            hand_on(self.network, convert(content), path, self._name, without)
        elif "state_dict" not in content:
            if self.preprocessing != "caffe":
                raise ValueError(
                    f"{path} is a plain state dict, converted from Caffe: its weights expect BGR pixels 0..255 minus a "
                    f'mean, but preprocessing is "{self.preprocessing}". Set model.preprocessing to caffe.'
                )
            statistics = dict(self.network.named_buffers())  # 0 and 1, which leave folded scale and shift alone
            hand_on(self.network, {**statistics, **content}, path, self._name, without, strict=True)
        else:
            super().start_from(content, path, without)

    def _load_partner(self, path: str) -> SemanticModel:
        partner = load(path)
        if not isinstance(partner, SemanticModel) or partner.num_classes != self.num_classes:
            raise ValueError(
                f"{path} holds a {type(partner).__name__} of {partner.num_classes} classes; ensemble_with needs a "
                f"semantic model of {self.num_classes}."
            )
        return partner

    # ------------------------------------------------------------------- training

    def on_validation_start(self) -> None:
        """Precise statistics before a validation of a fit."""
        if self.precise_bn and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            data = self.trainer.datamodule
            if not isinstance(data, SemanticDataModule):
                raise ValueError(
                    "precise_bn takes its batches from a datamodule of seglight, and this fit has none. Set it to 0 "
                    "and call seglight.models.deconvnet.precise_batch_norm."
                )
            precise_batch_norm(self, data.train_batches(self.precise_bn))

    # ------------------------------------------------------------------ inference

    def _provider(self, name: str) -> proposals.Provider | None:
        if name in ("grid", "image"):
            return proposals.grid if name == "grid" else proposals.whole
        if name == "selective_search":
            return proposals.selective_search()
        if name.endswith(".ckpt"):
            return proposals.detector(name)
        if name != "truth":
            raise ValueError(
                f'test_boxes is {name!r}; choose "grid", "image", "truth", "selective_search" or the path of a .ckpt.'
            )
        return None

    def logits(self, image: Tensor) -> Tensor:
        """Scores at image size: regions one by one, fused, and combined with those of the ensemble's other model."""
        pixels = self._pixels(image)
        outside = self.normalize(torch.zeros_like(pixels[:1, :, :1, :1]))[0]
        scores = torch.stack(
            [
                proposals.fuse(self._scores, one, self._regions(picture), SIDE, outside, self.test_floor)
                for one, picture in zip(image, pixels, strict=True)
            ]
        )
        for partner in self._partner:
            other = partner.to(scores.device)(pixels)
            if self.ensemble == "product":
                scores = scores.clamp_min(0) * other.clamp_min(0)
            else:
                mean = (scores.softmax(1) + other.softmax(1)) / 2
                scores = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        return scores

    def _scores(self, regions: Tensor) -> Tensor:
        return self.network(regions)["out"]

    def _regions(self, picture: Tensor) -> list[tuple[int, ...]]:
        """Boxes of an image (3, H, W), RGB 0..255."""
        if self.boxes is None:
            raise ValueError(
                'test_boxes is "truth", which needs labels: it works in validate and test. Choose another, as "grid".'
            )
        context = 1.0 if self.boxes in (proposals.grid, proposals.whole) else CONTEXT
        boxes = self.boxes(picture.round().clamp(0, 255).to(torch.uint8))
        return proposals.choose(boxes, picture.shape[-2:], context, self.test_box_side, self.test_box_limit)

    def _pixels(self, image: Tensor) -> Tensor:
        """RGB 0..255 of a normalised image: what `normalize` was given."""
        return (image.flip(1) if self.preprocessing == "caffe" else image) * self.std + self.mean

    def _evaluate(self, batch: SemanticEvalBatch) -> dict[str, list[Tensor]]:
        """As of any model; with boxes of the labels' objects one image at a time."""
        if self.test_boxes != "truth":
            return super()._evaluate(batch)
        background = self.classes.index("background") if "background" in self.classes else None
        results: dict[str, list[Tensor]] = {}
        before = self.boxes
        for i, mask in enumerate(batch["mask"]):
            boxes, _ = objects(mask.to(torch.uint8).cpu().numpy(), background)
            self.boxes = lambda image, boxes=boxes: boxes
            for key, value in super()._evaluate({key: value[i : i + 1] for key, value in batch.items()}).items():
                results.setdefault(key, []).extend(value)
        self.boxes = before
        return results
