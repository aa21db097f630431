"""Any network of segmentation_models_pytorch with any of its encoders: baselines beside the papers' networks."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from seglight.models.backbones import split_activations
from seglight.models.base import PREPROCESSING
from seglight.models.semantic import SemanticModel


class SMPNetwork(nn.Module):
    """One smp network for images of any size: they are padded at the right and bottom, the scores cropped back.

    Args: as of `SMP`.

    Shapes: (B, 3, H, W) -> {"out": (B, K, H, W)}.

    Raises:
        ValueError: smp has no such architecture, encoder, weights or option.
    """

    def __init__(
        self,
        num_classes: int,
        arch: str = "Unet",
        encoder: str = "resnet34",
        encoder_weights: str | None = None,
        options: dict[str, Any] | None = None,
    ):
        super().__init__()
        import segmentation_models_pytorch as smp  # takes seconds: not before the configuration is known to be valid

        classes = {cls.__name__.lower(): cls for cls in smp.MODEL_ARCHITECTURES_MAPPING.values()}
        if arch.lower() not in classes:
            raise _unknown("arch", arch, [cls.__name__ for cls in classes.values()])
        timm_encoder = encoder.startswith("tu-")
        encoders = _timm_encoders() if timm_encoder else smp.encoders.get_encoder_names()
        if (encoder.partition(".")[0] if timm_encoder else encoder) not in encoders:
            raise _unknown("encoder", encoder, encoders)
        if encoder_weights and not timm_encoder:
            offered = smp.encoders.encoders[encoder]["pretrained_settings"]
            if encoder_weights not in offered:
                raise _unknown("encoder_weights", encoder_weights, list(offered))
        # smp hands options it does not know to the encoder, and its own encoders ignore them without a word.
        own = {"encoder_name", "encoder_weights", "in_channels", "classes", "aux_params"}
        known = [name for name in inspect.signature(classes[arch.lower()]).parameters if name not in {*own, "kwargs"}]
        for name in options or {}:
            if name in own or (name not in known and not timm_encoder):
                raise _unknown("options", name, known)
        self.model = smp.create_model(
            arch,
            encoder_name=encoder,
            encoder_weights=bool(encoder_weights) or None if timm_encoder else encoder_weights,
            classes=num_classes,
            **(options or {}),
        )
        split_activations(self.model)
        stride = self.model.encoder.output_stride
        # Beyond what smp checks itself: DPT halves its token grid once, PAN pools the last features down to an eighth.
        self.multiple = stride * 2 if arch.lower() == "dpt" else stride
        self.smallest = stride * 8 if arch.lower() == "pan" else stride

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score a normalised image; see the class."""
        height, width = image.shape[-2:]
        tall, wide = (max(side + -side % self.multiple, self.smallest) for side in (height, width))
        if (tall, wide) != (height, width):  # with the mean colour: zero once normalised
            image = nn.functional.pad(image, (0, wide - width, 0, tall - height))
        return {"out": self.model(image)[..., :height, :width]}


class SMP(SemanticModel):
    """A network of segmentation_models_pytorch; it is that library's design, not the paper's, where the two differ.

    Its PSPNet and its EfficientNet encoders have layers that nothing reads, for whose gradients several GPUs would
    wait: set `trainer.strategy` to "ddp_find_unused_parameters_true" for these.

    Args:
        num_classes: K.
        arch: class name in smp, such as "Unet", "FPN" or "DeepLabV3Plus", in any case.
        encoder: name in smp, such as "resnet34", or "tu-" and a timm name.
        encoder_weights: pretrained weights to download, by smp's name ("imagenet"); none starts from scratch.
        options: further arguments of the smp class, such as `{"decoder_channels": [64, 48, 32, 24, 16]}`; with a "tu-"
            encoder also those of timm. DPT needs `{"dynamic_img_size": true}`.
    """

    def __init__(
        self,
        num_classes: int,
        arch: str = "Unet",
        encoder: str = "resnet34",
        encoder_weights: str | None = None,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        network = SMPNetwork(num_classes, arch, encoder, encoder_weights, options)
        super().__init__(network=network, num_classes=num_classes, **kwargs)
        if encoder_weights:
            self._check_preprocessing(encoder, encoder_weights)

    def _check_preprocessing(self, encoder: str, weights: str) -> None:
        import segmentation_models_pytorch as smp

        wanted = smp.encoders.get_preprocessing_params(encoder, weights)
        unit = 255 / wanted["input_range"][1]
        apart = torch.tensor([wanted["mean"], wanted["std"]]) * unit - torch.tensor(PREPROCESSING[self.preprocessing])
        rgb = wanted["input_space"] == "RGB" and self.preprocessing in ("torch", "half")
        if not rgb or apart.abs().max() > 0.5:
            raise ValueError(
                f"The {weights} weights of {encoder} expect {wanted['input_space']} pixels with mean {wanted['mean']} "
                f'and std {wanted["std"]}, not preprocessing "{self.preprocessing}". Choose "torch" for the ImageNet '
                f'mean or "half" for 0.5, or other weights.'
            )


def _timm_encoders() -> list[str]:
    import timm

    return [f"tu-{name}" for name in timm.list_models()]


def _unknown(option: str, value: str, known: Iterable[str]) -> ValueError:
    """The error that names the nearest valid values, or all of a short list."""
    known = list(known)
    lower = {name.lower(): name for name in known}
    near = [lower[name] for name in difflib.get_close_matches(value.lower(), lower, n=5, cutoff=0.5)]
    if len(known) <= 12 or not near:
        near = [*near, *(name for name in known if name not in near)][:12]
    return ValueError(f"segmentation_models_pytorch has no {option} {value!r}; the nearest are {', '.join(near)}.")
