"""`SemanticModel`: what all semantic segmentation models share: loss, whole-set scores, inference."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from seglight import crf, inference, official
from seglight.losses import cross_entropy
from seglight.metrics import ConfusionMatrix, Scores
from seglight.models.base import BaseModel
from seglight.types import IGNORE_INDEX

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from seglight.official import OfficialResult, OfficialScores
    from seglight.predict import SemanticPrediction
    from seglight.types import SemanticBatch, SemanticEvalBatch


def trained_outputs(
    loss_weights: dict[str, float] | None, default: dict[str, float], further: Iterable[str] = ()
) -> dict[str, float]:
    """The outputs that take part in the loss, and their weights: a head without any need not be built.

    Args:
        loss_weights: what the user asks for; none means `default`.
        default: the paper's weights.
        further: outputs beyond those in `default` that the network can have.

    Raises:
        ValueError: `loss_weights` names an output that the network cannot have, or leaves out `out`.
    """
    weights = {name: weight for name, weight in (loss_weights or default).items() if weight}
    known = [*default, *further]
    if "out" not in weights or not set(weights) <= set(known):
        raise ValueError(
            f"loss_weights is {loss_weights}; it gives a weight to out, and to any of {', '.join(known[1:])}. An "
            f"output without a weight is left out of the network."
        )
    return weights


class SemanticModel(BaseModel):
    """One label per pixel. Works as it is with any network that returns `{"out": (B, K, h, w)}` at any stride.

    Further keys of the network's output are auxiliary logits; each named in `loss_weights` adds to the loss.

    Args:
        network: maps a normalised image to a dict of logits.
        num_classes: K.
        align_corners: how logits are resized to labels, and images to test scales (True for the corner-aligned sizes
            8k + 1).
        loss_weights: weight of each output in the loss; outputs not named here are not trained on.
        class_weights: K weights of the cross entropy, or none.
        loss_reduction: "mean" over labelled pixels; "sum" is the unnormalised loss of the FCN release.
        test_scales: test-time: average the class probabilities over these image scales.
        test_flip: test-time: average with the mirrored image.
        test_window: test-time: slide a square window of this many pixels, stride two thirds of it.
        test_long_side: test-time: scale 1 makes the longer side this many pixels; none keeps the image's own size.
        test_aggregate: test-time: what is averaged over looks: probabilities ("softmax"), "logits" or their
            exponentials ("exp").
        test_crf: test-time: refine the probabilities at image size with the fully connected CRF: the name of a preset
            of `seglight.crf` or its numbers. In test, predict and a validation of its own; not while fitting, where it
            would take longer than the network.
    """

    task = "semantic"
    monitor = "val/mIoU"
    show = ("val/pixAcc",)

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        align_corners: bool = False,
        loss_weights: dict[str, float] | None = None,
        class_weights: list[float] | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        test_scales: list[float] | None = None,
        test_flip: bool = False,
        test_window: int | None = None,
        test_long_side: int | None = None,
        test_aggregate: inference.Aggregate = "softmax",
        test_crf: dict[str, Any] | str | None = None,
        **kwargs: Any,
    ):
        super().__init__(network=network, num_classes=num_classes, **kwargs)
        if class_weights is not None and len(class_weights) != num_classes:
            raise ValueError(f"{len(class_weights)} class_weights for {num_classes} classes; give one per class.")
        if not all(scale > 0 for scale in test_scales or ()):
            raise ValueError(f"test_scales is {test_scales}; give factors above 0, such as [0.75, 1.0, 1.25], or none.")
        for name, side in (("test_window", test_window), ("test_long_side", test_long_side)):
            if side is not None and side < 1:
                raise ValueError(f"{name} is {side}; give a number of pixels from 1, or none.")
        self.align_corners = align_corners
        self.loss_weights = loss_weights or {"out": 1.0}
        self.loss_reduction: Literal["mean", "sum"] = loss_reduction
        self.test_scales, self.test_flip, self.test_window = test_scales or [1.0], test_flip, test_window
        self.test_long_side, self.test_aggregate = test_long_side, test_aggregate
        self.test_crf = None if test_crf is None else crf.parameters(test_crf)
        weights = torch.tensor(class_weights) if class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)
        self.confusion = ConfusionMatrix(num_classes, self.classes)
        self.scores: Scores | None = None
        """Of the last validation or test."""
        self.official: OfficialResult | None = None
        """Further scores of the dataset's benchmark, of the last `test` or `validate`; see `seglight.official`."""
        self._official: OfficialScores | None = None
        self._val_loss: list[Tensor] = []

    # ------------------------------------------------------------------ training

    def training_step(self, batch: SemanticBatch, batch_idx: int) -> Tensor:
        """One loss; its parts go to the running mean."""
        losses = self.loss(self.network(self.normalize(batch["image"])), batch)
        self.track(losses)
        return losses["loss"]

    def loss(self, outputs: dict[str, Tensor], batch: SemanticBatch) -> dict[str, Tensor]:
        """The weighted sum as `loss`, and each part under its output's name when there are several."""
        missing = set(self.loss_weights) - set(outputs)
        if missing:
            raise ValueError(
                f"loss_weights names {sorted(missing)}, but the network returns {sorted(outputs)}; name those."
            )
        mask = batch["mask"].long()
        parts = {name: self.loss_of(name, outputs[name], mask) for name in self.loss_weights}
        total = torch.stack([self.loss_weights[name] * part for name, part in parts.items()]).sum()
        return {"loss": total, **({f"loss_{name}": part for name, part in parts.items()} if len(parts) > 1 else {})}

    def loss_of(self, name: str, logits: Tensor, mask: Tensor) -> Tensor:
        """The loss of one output, unweighted. Models with outputs that are no maps override it.

        Args:
            name: of the output.
            logits: (B, K, h, w).
            mask: int64 (B, H, W).
        """
        return cross_entropy(
            logits,
            self.target(logits, mask),
            self.class_weights,
            reduction=self.loss_reduction,
            align_corners=self.align_corners,
        )

    def target(self, logits: Tensor, mask: Tensor) -> Tensor:
        """What an output is compared with: the label itself. Models that shrink labels to the logits override it.

        Args:
            logits: (B, K, h, w).
            mask: int64 (B, H, W).

        Returns:
            int64, (B, H, W) here.
        """
        return mask

    # ----------------------------------------------------------------- inference

    def logits(self, image: Tensor) -> Tensor:
        """Class scores of normalised images (B, C, H, W), at any stride; models with a way of their own override it."""
        return self.network(image)["out"]

    def protocol(self, image: Tensor) -> Tensor:
        """`logits` under the test-time options: log-probabilities once anything is averaged.

        Images are resized as logits are: with `align_corners` the corners of an image at all scales coincide.
        """
        net, options = self.logits, {"aggregate": self.test_aggregate, "align_corners": self.align_corners}
        if self.test_window:
            window = self.test_window
            net = partial(inference.sliding, net, window=window, stride=-(-2 * window // 3), **options)
        if self.test_flip or self.test_long_side or list(self.test_scales) != [1.0]:
            options |= {"long_side": self.test_long_side, "align_image": self.align_corners}
            return inference.multiscale(net, image, self.test_scales, self.test_flip, **options)
        return net(image)

    def forward(self, image: Tensor) -> Tensor:
        """Class scores at image size.

        Args:
            image: (B, 3, H, W), RGB 0..255, uint8 or float.

        Returns:
            (B, K, H, W).
        """
        logits = self.protocol(self.normalize(image))
        if logits.shape[-2:] == image.shape[-2:]:
            return logits
        return nn.functional.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=self.align_corners)

    def labels(self, images: list[Tensor], refine: bool = True) -> tuple[list[Tensor], list[Tensor]]:
        """Label maps of images of any sizes; neighbours of equal size share a forward pass.

        Args:
            images: tensors (3, H_i, W_i), RGB 0..255.
            refine: use the CRF, if `test_crf` asks for one.

        Returns:
            label maps (H_i, W_i) on the device, and the network's class scores (K, h_i, w_i) for them, before any CRF.
        """
        labels: list[Tensor] = []
        logits: list[Tensor] = []
        start = 0
        while start < len(images):
            stop = start + 1
            while stop < len(images) and images[stop].shape == images[start].shape:
                stop += 1
            group = torch.stack(images[start:stop]) if stop > start + 1 else images[start][None]
            scores = self.protocol(self.normalize(group))
            if refine and self.test_crf is not None:
                labels += [self._refined(image, score) for image, score in zip(group, scores, strict=True)]
            else:
                labels += inference.labels(scores, group.shape[-2:], self.align_corners)
            logits += scores
            start = stop
        return labels, logits

    def _refined(self, image: Tensor, scores: Tensor) -> Tensor:
        """The label map uint8 (H, W) that the CRF makes of an image and its class scores (K, h, w)."""
        scores = nn.functional.interpolate(
            scores[None].float(), image.shape[-2:], mode="bilinear", align_corners=self.align_corners
        )
        pixels = image.float().round().clamp(0, 255).to(torch.uint8)  # images may be float, with values as of uint8
        return crf.mean_field(pixels, scores[0], self.test_crf).argmax(0).to(torch.uint8)

    @torch.inference_mode()
    def predict(self, source: str | Path | np.ndarray | Image.Image) -> SemanticPrediction:
        """Segment one picture: a file, a PIL image or a uint8 RGB array (H, W, 3)."""
        from seglight.predict import SemanticPrediction, as_array

        image = as_array(source)
        with inference.evaluating(self):
            labels, _ = self.labels([torch.from_numpy(image).permute(2, 0, 1).to(self.device)])
        return SemanticPrediction(image, labels[0].to(torch.uint8).cpu().numpy(), self.classes, self.palette)

    # ---------------------------------------------------------------- evaluation

    def _evaluate(self, batch: SemanticEvalBatch) -> dict[str, list[Tensor]]:
        labels, logits = self.labels(batch["image"], refine=self.trainer.state.fn != "fit")
        for label, mask in zip(labels, batch["mask"], strict=True):
            self.confusion.update(label, mask)
        if self._official is not None:
            for name, label, mask in zip(batch["image_id"], labels, batch["mask"], strict=True):
                self._official.update(name, label, mask)
        return {"labels": labels, "logits": logits}

    def _log_scores(self, stage: str) -> None:
        self.scores = self.confusion.compute()
        self.scores.protocol = official.protocol_of(self.trainer)
        self.confusion.reset()
        self.official, self._official = self._official and self._official.compute(), None
        if self.trainer.sanity_checking:
            return
        # Every rank holds the sum over ranks already; averaging equal numbers again could change their last bit.
        further = {} if self.official is None else self.official.as_dict(stage)
        self.log_dict({**self.scores.as_dict(stage), **further}, sync_dist=False)
        self.log("step", float(self.trainer.global_step), sync_dist=False)

    def on_validation_epoch_start(self) -> None:
        """Further scores of the dataset, in a validation of its own."""
        self._official = official.of_trainer(self.trainer, "val")

    def on_test_epoch_start(self) -> None:
        """Further scores of the dataset."""
        self._official = official.of_trainer(self.trainer, "test")

    def validation_step(self, batch: SemanticEvalBatch, batch_idx: int) -> dict[str, list[Tensor]]:
        """Label maps under `labels`; they are counted in the confusion matrix."""
        result = self._evaluate(batch)
        for scores, mask in zip(result.pop("logits"), batch["mask"], strict=True):
            loss = cross_entropy(scores[None], mask[None].long(), align_corners=self.align_corners)
            labelled = (mask != IGNORE_INDEX).any()  # without a label there is no loss to average
            self._val_loss.append(torch.stack([loss, labelled]).double())
        return result

    def on_validation_epoch_end(self) -> None:
        """Scores of the whole set, over all ranks."""
        mine = torch.stack(self._val_loss).sum(0) if self._val_loss else torch.zeros(2, device=self.device)
        self._val_loss.clear()
        total = self.trainer.strategy.reduce(mine.to(self.device, torch.float32), reduce_op="sum")
        if not self.trainer.sanity_checking:
            self.log("val/loss", total[0] / total[1], sync_dist=False)
        self._log_scores("val")

    def test_step(self, batch: SemanticEvalBatch, batch_idx: int) -> dict[str, list[Tensor]]:
        """As `validation_step`, without the loss."""
        result = self._evaluate(batch)
        result.pop("logits")
        return result

    def on_test_epoch_end(self) -> None:
        """Scores of the whole set, over all ranks."""
        self._log_scores("test")

    def predict_step(self, batch: SemanticEvalBatch, batch_idx: int) -> list[Tensor]:
        """Label maps of the batch's images, in order."""
        return self.labels(batch["image"])[0]
