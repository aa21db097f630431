"""Dilated VGG16 and the context module (Yu and Koltun, ICLR 2016), with the layer names of the release.

The front end is VGG16 without pool4 and pool5: conv5 is dilated by 2, fc6 by 4, so that scores have stride 8. Nothing
is padded inside; the image is mirrored by 186 pixels instead. The context module sees 67 x 67 scores through eight
layers and gives as many back:

    layer             conv1_1  conv1_2  conv2_1  conv3_1  conv4_1  conv5_1  fc1      final
    kernel            3        3        3        3        3        3        3        1
    dilation          1        1        2        4        8        16       1        1
    receptive field   3        5        9        17       33       65       67       67
    channels, basic   C        C        C        C        C        C        C        C
    channels, large   2 C      2 C      4 C      8 C      16 C     32 C     32 C     C
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from seglight import inference
from seglight.models.blocks import HeConv2d
from seglight.models.fcn import FCN
from seglight.models.vgg import VGG16
from seglight.models.weights import check_start, hand_on

MARGIN = 186
"""Pixels that the front end loses on each side, and half of a cell of 8 more: score i is centred on pixels 8i..8i+7."""

Context = Literal["none", "basic", "large"]


class ContextConv2d(nn.Conv2d):
    """A convolution that starts by handing each class's channels on, so that a path of them is the identity.

    A channel belongs to the class floor(channel * C / channels). Between channels of one class the middle of the kernel
    is C / out_channels; all other weights are N(0, noise * C / out_channels), which lets channels of a class part. The
    paper's basic module has no noise, for the large one it says small; the release takes 0.01 in both.
    """

    def __init__(self, num_classes: int, before: int, after: int, size: int, dilation: int, padding: int, noise: float):
        self.num_classes, self.noise = num_classes, noise
        super().__init__(before, after, size, dilation=dilation, padding=padding)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weights to the identity and noise."""
        share = self.num_classes / self.out_channels
        nn.init.normal_(self.weight, std=self.noise * share)
        after, before = (
            torch.arange(count) * self.num_classes // count for count in (self.out_channels, self.in_channels)
        )
        middle = self.kernel_size[0] // 2
        own = (after[:, None] == before).to(self.weight.device)
        self.weight[..., middle, middle] = torch.where(own, share, self.weight[..., middle, middle])
        nn.init.zeros_(self.bias)


def context_module(
    num_classes: int, large: bool, layers: int = 8, pad: bool = False, noise: float = 0.01
) -> dict[str, nn.Module]:
    """The layers of a context module by name, in order; `pad` makes each convolution keep the size of its input."""
    rates = [1, 1, *(2**i for i in range(1, layers - 3)), 1]
    names = ["conv1_1", "conv1_2", *(f"conv{i}_1" for i in range(2, layers - 2)), "fc1"]
    widths = [num_classes * (2 * rate if large else 1) for rate in rates]
    widths[-1] = widths[-2]
    module: dict[str, nn.Module] = {}
    before = num_classes
    for name, rate, after in zip(names, rates, widths, strict=True):
        module[f"ctx_{name}"] = ContextConv2d(num_classes, before, after, 3, rate, rate if pad else 0, noise)
        module[f"ctx_relu_{name}"] = nn.ReLU(inplace=True)
        before = after
    module["ctx_final"] = ContextConv2d(num_classes, before, num_classes, 1, 1, 0, noise)
    return module


class DilationNetwork(nn.Module):
    """Front end, context module, bilinear interpolation by 8.

    Args: as of `Dilation`.

    Shapes: (B, 3, H, W) -> {"out": (B, K, H, W)}, for any H and W.
    """

    def __init__(
        self,
        num_classes: int,
        context: Context = "large",
        context_layers: int = 8,
        context_padding: Literal["buffer", "layers"] = "buffer",
        context_noise: float = 0.01,
        freeze_front: bool = False,
        width: int = 64,
    ):
        super().__init__()
        if context not in ("none", "basic", "large") or context_padding not in ("buffer", "layers"):
            raise ValueError(
                f'context is "{context}" and context_padding "{context_padding}"; choose "none", "basic" or "large", '
                f'and "buffer" or "layers".'
            )
        if context_layers < 5:
            raise ValueError(f"context_layers is {context_layers}; the module has 8 layers in the paper, at least 5.")
        if freeze_front and context == "none":
            raise ValueError('freeze_front is set and context is "none": nothing would train; change one of them.')
        layers: dict[str, nn.Module] = {}
        channels = 3
        for stage, (factor, count) in enumerate(VGG16, start=1):
            for i in range(1, count + 1):
                layers[f"conv{stage}_{i}"] = HeConv2d(channels, factor * width, 3, dilation=2 if stage == 5 else 1)
                layers[f"relu{stage}_{i}"] = nn.ReLU(inplace=True)
                channels = factor * width
            if stage < 4:
                layers[f"pool{stage}"] = nn.MaxPool2d(2, 2)
        for i, size in ((6, 7), (7, 1)):
            layers[f"fc{i}"] = HeConv2d(channels, 64 * width, size, dilation=4 if i == 6 else 1)
            layers[f"relu{i}"] = nn.ReLU(inplace=True)
            layers[f"drop{i}"] = nn.Dropout(0.0 if freeze_front else 0.5)
            channels = 64 * width
        layers["final"] = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(layers["final"].weight, std=0.001)
        nn.init.zeros_(layers["final"].bias)
        for layer in layers.values():
            layer.requires_grad_(not freeze_front)
        self.buffer = 0
        if context != "none":
            pad = context_padding == "layers"
            module = context_module(num_classes, context == "large", context_layers, pad, context_noise)
            layers |= module
            if not pad:
                self.buffer = sum(conv.dilation[0] for conv in module.values() if hasattr(conv, "dilation")) - 1
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score a normalised image; see the class."""
        height, width = image.shape[-2:]
        x = inference.mirror_pad(image, (MARGIN, MARGIN + -height % 8), (MARGIN, MARGIN + -width % 8))
        for name, layer in self.named_children():
            if name == "ctx_conv1_1":
                x = nn.functional.pad(x, (self.buffer,) * 4)
            x = layer(x)
        x = nn.functional.interpolate(x, scale_factor=8, mode="bilinear", align_corners=False)
        return {"out": x[..., :height, :width]}


class Dilation(FCN):
    """Dilated VGG16 with the context module: 141,149,720 parameters with 21 classes and the large module, 134,374,973
    with the basic one, 134,346,581 without any.

    The paper's VOC results (validation, trained on VOC, SBD and COCO): front end 69.8, basic 71.3, large 72.1. It
    trains the front end first (60k steps of 14 images, lr 1e-3, momentum 0.9), then the module on it: train a model of
    `context: none`, and give it to one of `freeze_front: true` as `init_from`. Joint training (lr 1e-5) is the last
    stage of the release.

    Differences: the release trains on labels at every eighth pixel, the first of a cell of 8 x 8, here the interpolated
    scores meet all labels, and a score lies in the middle of its cell; the release mirrors whole images before it cuts
    crops with 186 pixels of context, here the crop itself is mirrored. Its mean colour is that of VOC, within 6 of the
    "caffe" family's.

    Args:
        num_classes: K.
        context: "large" or "basic" module, or "none": the front end alone.
        context_layers: 8 for VOC and CamVid; the release has 10 (dilations up to 64) for Cityscapes and 7 for KITTI.
        context_padding: zeros around the scores, all at once as in the paper and its VOC network ("buffer"), or at each
            layer as in the later networks of the release ("layers").
        context_noise: of the module's initial weights, relative to the identity's.
        freeze_front: train the context module alone, on scores without dropout.
        pretrained: start from torchvision's ImageNet weights of VGG16 (needs width 64 and "torch" preprocessing).
        init_from: start from a file instead: a seglight checkpoint of this family, torchvision's VGG16, or a network of
            the release with the same context module, converted from Caffe.
        width: channels of the first stage; 64 is the paper's network, less is for trials.
    """

    free = FCN.free | {"context_noise", "freeze_front"}

    def __init__(
        self,
        num_classes: int,
        context: Context = "large",
        context_layers: int = 8,
        context_padding: Literal["buffer", "layers"] = "buffer",
        context_noise: float = 0.01,
        freeze_front: bool = False,
        pretrained: bool = False,
        init_from: str | None = None,
        width: int = 64,
        **kwargs: Any,
    ):
        check_start(pretrained, init_from, width)
        network = DilationNetwork(
            num_classes, context, context_layers, context_padding, context_noise, freeze_front, width
        )
        super().__init__(network=network, num_classes=num_classes, pretrained=pretrained, init_from=init_from, **kwargs)

    def start_from_caffe(self, content: dict[str, Tensor], path: str, without: tuple[str, ...] = ()) -> None:
        """Take the release's files: the VOC network has other names, the Cityscapes one a fixed interpolation."""
        weights = {
            key.replace("fc-final", "final").replace("ct_", "ctx_"): weight
            for key, weight in content.items()
            if not key.startswith("ctx_upsample")
        }
        hand_on(self.network, weights, path, self._name, without, strict=True)

    @property
    def _name(self) -> str:
        return "Dilation"
