"""Fully convolutional networks on VGG16: FCN-32s, -16s, -8s, -8s at-once (Long, Shelhamer, Darrell; 2015 and 2017).

Layers have the names of the Caffe release, so weights converted from there load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from seglight.models.blocks import BilinearDeconv, crop_offset
from seglight.models.semantic import SemanticModel
from seglight.models.vgg import VGG16Trunk, vgg16_to_fcn
from seglight.models.weights import check_start, hand_on

Variant = Literal["32s", "16s", "8s", "8s-atonce"]

AT_ONCE_SCALES = (0.01, 0.0001)
"""What pool4 and pool3 are multiplied by in the at-once variant: it trains all scores together, so their inputs must
have comparable magnitudes from the start."""


class FCNNetwork(VGG16Trunk):
    """VGG16 made convolutional, with scores of one to three strides summed and interpolated to the input's size.

    Padding 100 on the first convolution gives every image, however small, a score; what this shifts is cropped off
    again. Scores start at zero: with the trunk pretrained the first gradient goes to the scores alone.

    Args:
        num_classes: K.
        variant: "32s" scores fc7; "16s" adds pool4; "8s" adds pool3; "8s-atonce" is 8s with scaled skips.
        learn_upsampling: which deconvolutions are trained: "none" (the release), "intermediate" (the 2015 paper: all
            but the last) or "all".
        width: channels of the first stage, 64 in the paper. Everything scales with it (fc6 and fc7 have 64 * width).

    Shapes: (B, 3, H, W) -> {"out": (B, K, H, W)}, for any H and W.
    """

    def __init__(
        self,
        num_classes: int,
        variant: Variant = "8s",
        learn_upsampling: Literal["none", "intermediate", "all"] = "none",
        width: int = 64,
    ):
        super().__init__("fcn", width=width)
        self.variant = variant
        self.score_fr = zero_score(64 * width, num_classes)

        def deconv(size: int, stride: int, last: bool = False) -> BilinearDeconv:
            learn = learn_upsampling == "all" or (learn_upsampling == "intermediate" and not last)
            return BilinearDeconv(num_classes, size, stride, learn)

        if variant == "32s":
            self.upscore = deconv(64, 32, last=True)
        else:
            self.upscore2 = deconv(4, 2)
            self.score_pool4 = zero_score(8 * width, num_classes)
        if variant == "16s":
            self.upscore16 = deconv(32, 16, last=True)
        elif variant != "32s":
            self.upscore_pool4 = deconv(4, 2)
            self.score_pool3 = zero_score(4 * width, num_classes)
            self.upscore8 = deconv(16, 8, last=True)
        self.offsets = self._offsets()

    def _offsets(self) -> dict[str, int]:
        """Where score_pool4, score_pool3 and the upsampled scores are cropped."""

        def until(pool: str) -> list[nn.Module]:
            return [getattr(self, name) for name in self.path[: self.path.index(pool) + 1]]

        path = [*until("pool5"), self.fc6, self.fc7, self.score_fr]
        if self.variant == "32s":
            return {"out": crop_offset([*path, self.upscore])}
        path.append(self.upscore2)
        offsets = {"pool4": crop_offset(until("pool4"), path)}
        if self.variant == "16s":
            return {**offsets, "out": crop_offset([*path, self.upscore16])}
        path.append(self.upscore_pool4)
        return {**offsets, "pool3": crop_offset(until("pool3"), path), "out": crop_offset([*path, self.upscore8])}

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score a normalised image; see the class."""
        found = super().forward(image, [*self.offsets, "fc7"])
        x = self.score_fr(found["fc7"])
        scales = AT_ONCE_SCALES if self.variant == "8s-atonce" else (1, 1)
        if "pool4" in found:
            x = self.upscore2(x)
            x = x + crop_like(self.score_pool4(found["pool4"] * scales[0]), self.offsets["pool4"], x)
        if "pool3" in found:
            x = self.upscore_pool4(x)
            x = x + crop_like(self.score_pool3(found["pool3"] * scales[1]), self.offsets["pool3"], x)
        last = {"32s": "upscore", "16s": "upscore16"}.get(self.variant, "upscore8")
        return {"out": crop_like(getattr(self, last)(x), self.offsets["out"], image)}


def zero_score(channels: int, num_classes: int) -> nn.Conv2d:
    """The 1x1 convolution that scores classes; it starts at zero."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def crop_like(x: Tensor, offset: int, like: Tensor) -> Tensor:
    """Cut (..., H, W) to the size of `like`, from row and column `offset` on."""
    height, width = like.shape[-2:]
    return x[..., offset : offset + height, offset : offset + width]


class FCN(SemanticModel):
    """What FCNs on all trunks share: where their weights start. From scratch they learn slowly: fine-tune them.

    Args:
        network: a fully convolutional network with the layer names of the Caffe release.
        num_classes: K.
        pretrained: start from torchvision's ImageNet weights of the trunk (needs "torch" preprocessing).
        init_from: start from a file instead. From a seglight checkpoint of any FCN (staged training: 32s, 16s, 8s) each
            layer of the same name is copied and the rest stays as initialised. A plain state dict with torchvision's
            names of the trunk fills the trunk; say its preprocessing. Any other is taken for one converted from Caffe:
            it must be of this network and needs "caffe" preprocessing.
    """

    imagenet: ClassVar[str] = "VGG16"
    """The trunk's name among torchvision's weights."""
    marker: ClassVar[str] = "features.0.weight"
    """A tensor that torchvision's files of the trunk have and converted Caffe files do not."""

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        pretrained: bool = False,
        init_from: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(network=network, num_classes=num_classes, init_from=init_from, **kwargs)
        if pretrained:
            self._start_from_imagenet()

    @staticmethod
    def converted(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of torchvision's trunk under the names of this network."""
        return vgg16_to_fcn(content)

    def _start_from_imagenet(self) -> None:
        if self.preprocessing != "torch":
            raise ValueError(
                f'preprocessing is "{self.preprocessing}", but the weights of torchvision expect "torch"; set that.'
            )
        import torchvision.models

        file = getattr(torchvision.models, f"{self.imagenet}_Weights").IMAGENET1K_V1
        weights = self.converted(file.get_state_dict(progress=True, check_hash=True))
        hand_on(self.network, weights, f"torchvision's {self.imagenet} (ImageNet)", self._name)

    def start_from(self, content: dict[str, Any], path: str, without: tuple[str, ...] = ()) -> None:
        """Take a seglight checkpoint, torchvision's trunk or a converted Caffe FCN; see `init_from`."""
        if self.marker in content:
            hand_on(self.network, self.converted(content), path, self._name, without)
        elif "state_dict" not in content:
            if self.preprocessing != "caffe":
                raise ValueError(
                    f"{path} is a plain state dict, converted from Caffe: its weights expect BGR pixels 0..255 minus a "
                    f'mean, but preprocessing is "{self.preprocessing}". Set model.preprocessing to caffe.'
                )
            self.start_from_caffe(content, path, without)
        else:
            super().start_from(content, path, without)

    def start_from_caffe(self, content: dict[str, Tensor], path: str, without: tuple[str, ...] = ()) -> None:
        """Take a state dict with the layers of this network, converted from Caffe."""
        hand_on(self.network, content, path, self._name, without, strict=True)


class FCNVGG16(FCN):
    """What the FCN variants on VGG16 share: they are trained coarse to fine, as in the paper.

    Args:
        num_classes: K.
        pretrained: start from torchvision's ImageNet weights of VGG16 (needs width 64 and "torch" preprocessing).
        init_from: start from a file instead; see `FCN`.
        learn_upsampling: deconvolutions to train: "none", "intermediate" (all but the last) or "all".
        width: channels of the first stage; 64 is the paper's network, less is for trials.
    """

    variant: ClassVar[Variant] = "8s"

    def __init__(
        self,
        num_classes: int,
        pretrained: bool = False,
        init_from: str | None = None,
        learn_upsampling: Literal["none", "intermediate", "all"] = "none",
        width: int = 64,
        **kwargs: Any,
    ):
        check_start(pretrained, init_from, width)
        network = FCNNetwork(num_classes, self.variant, learn_upsampling, width)
        super().__init__(network=network, num_classes=num_classes, pretrained=pretrained, init_from=init_from, **kwargs)

    @property
    def _name(self) -> str:
        return f"FCN-{self.variant}"


class FCN32s(FCNVGG16):
    """FCN-32s: fc7 scored at stride 32. The first stage; start it from `pretrained`."""

    variant = "32s"


class FCN16s(FCNVGG16):
    """FCN-16s: adds a score of pool4. Start it from an FCN-32s with `init_from`."""

    variant = "16s"


class FCN8s(FCNVGG16):
    """FCN-8s: adds scores of pool4 and pool3. Start it from an FCN-16s with `init_from`."""

    variant = "8s"


class FCN8sAtOnce(FCNVGG16):
    """FCN-8s trained in one go: its skips are scaled, so that `pretrained` is all it needs to start from."""

    variant = "8s-atonce"
