"""torchvision's segmentation networks: further baselines, and the door to their published weights.

They are that library's designs. Its "FCN" is a dilated ResNet with a two-layer head, not Long's network. Its DeepLabV3
has stride 8 at all times, the lagged-first dilation rule, no multi-grid, one more 3x3 convolution before the
classifier, dropout 0.5 in ASPP and an auxiliary head, so its weights do not fit `DeepLabV3` of this package.

Parameters for 21 classes with the auxiliary head: fcn_resnet50 35,322,218, fcn_resnet101 54,314,346,
deeplabv3_resnet50 42,004,074, deeplabv3_resnet101 60,996,202, deeplabv3_mobilenet_v3_large 11,029,328; without one:
lraspp_mobilenet_v3_large 3,221,538.

The published weights were trained on COCO images of the 20 VOC classes: the classes are VOC's, in VOC's order. Their
published mIoU of 60.5, 63.7, 66.4, 67.4, 60.3 and 57.9 (in the order above) is of COCO val2017 with the shorter side
resized to 520, not of VOC val.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

from torch import Tensor, nn

from seglight.models.semantic import SemanticModel
from seglight.models.weights import hand_on

Architecture = Literal[
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
]
ARCHITECTURES: tuple[str, ...] = Architecture.__args__  # type: ignore[attr-defined]
CLASSES = 21
"""Of the published weights."""


def torchvision_network(num_classes: int, arch: str, aux: bool, imagenet: bool = False) -> nn.Module:
    """A network of torchvision, under torchvision's layer names.

    Args:
        num_classes: K.
        arch: name in torchvision.
        aux: with the auxiliary head; LR-ASPP has none.
        imagenet: load torchvision's ImageNet weights into the trunk.

    Returns:
        a network (B, 3, H, W) -> {"out": (B, K, H, W), "aux": (B, K, H, W)}, for any size.

    Raises:
        ValueError: torchvision has no such network.
    """
    if arch not in ARCHITECTURES:
        near = difflib.get_close_matches(arch, ARCHITECTURES, n=len(ARCHITECTURES), cutoff=0)
        raise ValueError(f"torchvision has no segmentation network {arch!r}; the nearest are {', '.join(near)}.")
    import torchvision.models.segmentation as zoo  # takes a second that a typing error should not cost

    options: dict[str, Any] = {} if arch.startswith("lraspp") else {"aux_loss": aux}
    trunk = "IMAGENET1K_V1" if imagenet else None
    return getattr(zoo, arch)(weights=None, weights_backbone=trunk, num_classes=num_classes, **options)


class TorchvisionSegmentation(SemanticModel):
    """A segmentation network of torchvision; see the module for what it is and what it is not.

    Args:
        num_classes: K.
        arch: name in torchvision.
        pretrained: true loads the published weights (COCO images, 21 VOC classes), "imagenet" those of the trunk alone.
        init_from: start from a file instead: one of torchvision's for this `arch`, or a seglight checkpoint. For other
            than 21 classes leave its classifiers out with `init_without: [classifier.4, aux_classifier.4]` (of LR-ASPP:
            `[classifier.low_classifier, classifier.high_classifier]`).
        aux: train the auxiliary head on the trunk's last but one stage. LR-ASPP has none.
        loss_weights: torchvision's: 1 and 0.5 for the auxiliary head.
    """

    def __init__(
        self,
        num_classes: int,
        arch: Architecture = "deeplabv3_resnet101",
        pretrained: bool | Literal["imagenet"] = False,
        init_from: str | None = None,
        aux: bool = True,
        loss_weights: dict[str, float] | None = None,
        **kwargs: Any,
    ):
        if pretrained and init_from:
            raise ValueError(f"Both pretrained and init_from={init_from!r} are set; choose one to start from.")
        if pretrained not in (True, False, "imagenet"):
            raise ValueError(f'pretrained is {pretrained!r}; choose true, false or "imagenet".')
        if pretrained is True and num_classes != CLASSES:
            raise ValueError(
                f"The published weights of {arch} know VOC's 21 classes, but num_classes is {num_classes}. Start from "
                f'the trunk alone with model.pretrained "imagenet", or download the file, name it in model.init_from '
                f"and leave out its classifiers with model.init_without."
            )
        preprocessing = kwargs.get("preprocessing", "torch")
        if pretrained and preprocessing != "torch":
            raise ValueError(
                f'preprocessing is "{preprocessing}", but torchvision\'s weights expect "torch"; set that.'
            )
        aux = aux and not arch.startswith("lraspp")
        network = torchvision_network(num_classes, arch, aux, imagenet=pretrained == "imagenet")
        loss_weights = loss_weights or {"out": 1.0, **({"aux": 0.5} if aux else {})}
        if aux and "aux" not in loss_weights:
            raise ValueError(
                f"loss_weights {loss_weights} leaves the auxiliary head untrained; set model.aux to false."
            )
        super().__init__(
            network=network, num_classes=num_classes, init_from=init_from, loss_weights=loss_weights, **kwargs
        )
        if pretrained is True:
            from torchvision.models import get_model_weights

            weights = get_model_weights(arch).COCO_WITH_VOC_LABELS_V1
            self._take(weights.get_state_dict(progress=True, check_hash=True), weights.url)

    def start_from(self, content: dict[str, Any], path: str, without: tuple[str, ...] = ()) -> None:
        """Take a state dict of torchvision, under its own names, or a seglight checkpoint."""
        if "state_dict" in content:
            super().start_from(content, path, without)
        elif self.preprocessing != "torch":
            raise ValueError(
                f'{path} is of torchvision, whose weights expect preprocessing "torch", not "{self.preprocessing}".'
            )
        else:
            self._take(content, path, without)

    def _take(self, weights: dict[str, Tensor], source: str, without: tuple[str, ...] = ()) -> None:
        """Every tensor must find its place, but for those of an auxiliary head that this model does without."""
        if getattr(self.network, "aux_classifier", None) is None:
            weights = {name: weight for name, weight in weights.items() if not name.startswith("aux_classifier.")}
        hand_on(self.network, weights, source, self._name, without, strict=True)

    @property
    def _name(self) -> str:
        return f"torchvision's {self.init_args['arch']}"
