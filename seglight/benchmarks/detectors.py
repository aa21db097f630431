"""A training step of Mask R-CNN against torchvision's own: `python -m seglight.benchmarks.detectors`.

Both have the same weights, images, targets and random numbers, so they do the same work: forward, losses, backward and
a step of SGD. torchvision's transform finds images that have their size already. Mark: at most 1.02 of its time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from seglight.benchmarks.timing import paired

CLASSES = 80


def main(argv: list[str] | None = None) -> int:
    """Print the table and the verdict."""
    parser = argparse.ArgumentParser(prog="seglight bench detectors", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), metavar=("H", "W"), help="of the images")
    parser.add_argument("--images", type=int, default=2, help="of a step")
    parser.add_argument("--objects", type=int, default=10, help="in each image")
    parser.add_argument("--trunk", choices=("resnet18", "resnet50"), default="resnet50")
    options = parser.parse_args(argv)
    theirs = _torchvision(options.trunk, tuple(options.size))
    contestants = {"torchvision": _their_step(theirs, options), "seglight": _our_step(theirs, options)}
    size = "x".join(map(str, options.size))
    title = (
        f"Mask R-CNN {options.trunk}, training step, {options.images} images of {size}, {options.objects} objects each"
    )
    rows = paired(contestants, "torchvision", options.rounds, {"seglight": "<= 1.02"}, title)
    ratio = next(row.ratio for row in rows if row.name == "seglight")
    print(f"mark <= 1.02, {'met' if ratio <= 1.02 else 'MISSED'}")
    return 0


def _torchvision(trunk: str, size: tuple[int, int]) -> nn.Module:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d

    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name=trunk, weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3)
    return MaskRCNN(backbone, CLASSES + 1, min_size=min(size), max_size=max(size)).train()


def _samples(options: argparse.Namespace) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """uint8 images of noise, and boxes with filled masks."""
    draw = torch.Generator().manual_seed(1)
    height, width = options.size
    images, targets = [], []
    for _ in range(options.images):
        images.append(torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=draw))
        corner = torch.rand(options.objects, 2, generator=draw) * torch.tensor([width * 0.6, height * 0.6])
        side = 16 + torch.rand(options.objects, 2, generator=draw) * 80
        boxes = torch.cat([corner, torch.minimum(corner + side, torch.tensor([width, height]))], 1).round()
        masks = torch.zeros(options.objects, height, width, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
        targets.append(
            {
                "boxes": boxes,
                "labels": torch.randint(0, CLASSES, (options.objects,), generator=draw),
                "masks": masks,
                "iscrowd": torch.zeros(options.objects, dtype=torch.bool),
                "area": masks.sum((1, 2)).float(),
            }
        )
    return images, targets


def _step(model: nn.Module, losses: Callable[[], dict[str, Tensor]]) -> Callable[[], Any]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9)  # at rest, so that every round does the same

    def step() -> None:
        torch.manual_seed(2)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses().values())).sum().backward()
        optimizer.step()

    return step


def _their_step(model: nn.Module, options: argparse.Namespace) -> Callable[[], Any]:
    images, targets = _samples(options)
    shifted = [{**target, "labels": target["labels"] + 1, "masks": target["masks"].byte()} for target in targets]
    return _step(model, lambda: model([image.float() / 255 for image in images], shifted))


def _our_step(theirs: nn.Module, options: argparse.Namespace) -> Callable[[], Any]:
    from seglight.models import MaskRCNN

    model = MaskRCNN(CLASSES, backbone=options.trunk)
    model.start_from(theirs.state_dict(), "torchvision's weights")
    model.train()
    images, targets = _samples(options)
    return _step(model, lambda: model.network([model.normalize(image[None])[0] for image in images], targets)[0])


if __name__ == "__main__":
    raise SystemExit(main())
