"""From a network's mask grids to run lengths and to AP, against torchvision's paste, pycocotools and torchmetrics.

Marks: paste + run lengths at most 0.1 of the time; masks to AP at most 0.2, growing linearly; memory at most 0.1.
The peers' paste rounds windows to whole pixels, so their AP differs a little.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc

import numpy as np
import torch

from seglight import masks
from seglight.benchmarks.timing import paired, single_thread
from seglight.detection_metrics import AveragePrecision

SIZE = (480, 640)
CLASSES = 20


def main(argv: list[str] | None = None) -> int:
    """Print one table per comparison."""
    parser = argparse.ArgumentParser(prog="seglight bench masks", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--ap-rounds", type=int, default=3, help="a round of the comparison of AP takes a minute")
    parser.add_argument("--only", choices=("encode", "ap"))
    options = parser.parse_args(argv)
    if options.only != "ap":
        encoding(options.rounds)
    if options.only != "encode":
        average_precision(options.images, options.ap_rounds)
    return 0


def encoding(rounds: int) -> None:
    """100 detections of one image of 640 x 480."""
    from pycocotools import mask

    draw = torch.Generator().manual_seed(0)
    boxes = objects(100, draw)
    grids = blobs(100, draw)
    dense = masks.paste(grids, boxes, SIZE).numpy()
    expected = mask.encode(np.asfortranarray(dense.transpose(1, 2, 0).view(np.uint8)))
    equal = sum(a == b for a, b in zip(masks.encode(grids, boxes, SIZE), expected, strict=True))
    paired(
        {
            "torchvision paste + encode": lambda: torchvision_rles(grids, boxes),
            "torchvision paste + encode at once": lambda: torchvision_rles(grids, boxes, together=True),
            "grid_sample + encode": lambda: sampled_rles(grids, boxes),
            "seglight encode": lambda: masks.encode(grids, boxes, SIZE),
            "seglight paste": lambda: masks.paste(grids, boxes, SIZE),
        },
        baseline="torchvision paste + encode",
        rounds=rounds,
        marks={
            "torchvision paste + encode": "mask by mask",
            "grid_sample + encode": "the same masks as ours",
            "seglight encode": f"<= 0.1; {equal} of 100 strings equal pycocotools' of the pasted masks",
            "seglight paste": "dense, for pictures",
        },
        title="100 masks of 28 x 28 in an image of 640 x 480",
    )


def average_precision(images: int, rounds: int) -> None:
    """Masks to AP of masks and boxes, the network's outputs being ready.

    The truth is kept as run lengths; torchmetrics wants it dense, so its time has that decoding too, some percent.
    """
    data = scenes(images)
    half, double = data[: len(data) // 2], scenes(2 * images)
    dense = sum(len(one["rles"]) + len(one["scores"]) for one in data) * SIZE[0] * SIZE[1]
    gap = abs(ours(data[:40])[1]["val/AP"] - torchmetrics(data[:40])["segm_map"])
    rows = paired(
        {
            "torchvision + torchmetrics": lambda: torchmetrics(data),
            "seglight": lambda: ours(data),
            "seglight, pycocotools": lambda: ours(data, reference=True),
            f"seglight, {len(half)} images": lambda: ours(half),
            f"seglight, {len(double)} images": lambda: ours(double),
        },
        baseline="torchvision + torchmetrics",
        rounds=rounds,
        marks={
            "torchvision + torchmetrics": "backend pycocotools, masks and boxes",
            "seglight": f"<= 0.2; AP of 40 images differs by {gap:.4f}, for the other paste",
            "seglight, pycocotools": "reference=True",
        },
        title=f"{images} images with 20 to 45 detections, 28 x 28 masks to AP",
    )
    times = {row.name: row.ms for row in rows}
    print(
        f"from {len(half)} to {len(double)} images: x"
        f"{times[f'seglight, {len(double)} images'] / times[f'seglight, {len(half)} images']:.2f} (linear: x4)"
    )
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    metric = collected(data)
    kept = tracemalloc.get_traced_memory()[0] - before
    metric.compute()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    print(
        f"memory: {kept / 2**20:.1f} MiB kept, peak {peak / 2**20:.1f} MiB with the evaluation; dense masks "
        f"{dense / 2**20:.0f} MiB: x{peak / dense:.4f} (mark <= 0.1)"
    )
    with single_thread():
        start = time.perf_counter()
        metric.compute()
        print(f"of which evaluation: {time.perf_counter() - start:.2f} s")


def objects(n: int, draw: torch.Generator) -> torch.Tensor:
    """Boxes float32 (n, 4) in an image: sides of 16 to 300 pixels, small ones more often."""
    whole = torch.tensor([SIZE[1], SIZE[0]])
    sides = torch.exp(torch.rand(n, 2, generator=draw) * 2.93 + 2.77)
    centres = torch.rand(n, 2, generator=draw) * whole
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], 1)
    limit = torch.cat([whole, whole])
    return boxes.clamp(min=0).minimum(limit)


def blobs(n: int, draw: torch.Generator) -> torch.Tensor:
    """Probabilities float32 (n, 28, 28): ellipses with a wavy border, as a mask branch gives."""
    x = torch.linspace(-1, 1, 28)
    far = x[:, None] ** 2 + x[None] ** 2
    waves = torch.nn.functional.interpolate(torch.randn(n, 1, 6, 6, generator=draw), size=28, mode="bicubic")[:, 0]
    return torch.sigmoid(8 * (0.9 - far + 0.25 * waves))


def scenes(images: int) -> list[dict]:
    """Per image the network's output (`boxes`, `labels`, `scores`, `masks`) and the truth, as run lengths and dense."""
    out = []
    for i in range(images):
        draw = torch.Generator().manual_seed(i)
        truth = int(torch.randint(15, 31, (), generator=draw))
        false = int(torch.randint(5, 16, (), generator=draw))
        there = objects(truth, draw)
        grids = blobs(truth, draw)
        labels = torch.randint(0, CLASSES, (truth,), generator=draw)
        shift = 0.06 * torch.randn(truth, 4, generator=draw) * (there[:, 2:] - there[:, :2]).repeat(1, 2)
        near = torch.cat([(there + shift)[:, :2], torch.maximum((there + shift)[:, 2:], (there + shift)[:, :2] + 1)], 1)
        far = objects(false, draw)
        rles = masks.encode(grids, there, SIZE)
        out.append(
            {
                "boxes": torch.cat([near, far]),
                "labels": torch.cat([labels, torch.randint(0, CLASSES, (false,), generator=draw)]),
                "scores": torch.cat([0.4 + 0.6 * torch.rand(truth, generator=draw), torch.rand(false, generator=draw)]),
                "masks": torch.cat([grids, blobs(false, draw)]),
                "truth_boxes": there,
                "truth_labels": labels,
                "rles": rles,
                "area": torch.from_numpy(masks.areas(rles)).double(),
            }
        )
    return out


def collected(data: list[dict], reference: bool = False) -> AveragePrecision:
    """Ours up to the evaluation."""
    metric = AveragePrecision([str(i) for i in range(CLASSES)], reference=reference)
    for i, one in enumerate(data):
        found = {key: one[key] for key in ("boxes", "labels", "scores")}
        found["rles"] = masks.encode(one["masks"], one["boxes"], SIZE)
        crowd = torch.zeros(len(one["rles"]), dtype=torch.bool)
        truth = {"boxes": one["truth_boxes"], "labels": one["truth_labels"], "rles": one["rles"]}
        metric.update(str(i), SIZE, found, {**truth, "iscrowd": crowd, "area": one["area"]})
    return metric


def ours(data: list[dict], reference: bool = False) -> tuple[AveragePrecision, dict[str, float]]:
    """Grids to scores."""
    metric = collected(data, reference)
    return metric, metric.compute().as_dict()


def torchmetrics(data: list[dict]) -> dict[str, float]:
    """The usual way: dense masks, which torchmetrics encodes; the truth has to be dense too."""
    from torchmetrics.detection import MeanAveragePrecision
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    metric = MeanAveragePrecision(iou_type=("bbox", "segm"), backend="pycocotools")
    metric.warn_on_many_detections = False
    for one in data:
        dense = paste_masks_in_image(one["masks"][:, None], one["boxes"], SIZE)[:, 0] >= 0.5
        found = {key: one[key] for key in ("boxes", "labels", "scores")}
        truth = {"boxes": one["truth_boxes"], "labels": one["truth_labels"], "area": one["area"]}
        truth["masks"] = torch.from_numpy(masks.decode(one["rles"]))
        metric.update([{**found, "masks": dense}], [truth])
    return {key: float(value) for key, value in metric.compute().items() if value.numel() == 1}


def torchvision_rles(grids: torch.Tensor, boxes: torch.Tensor, together: bool = False) -> list[dict]:
    """Paste with rounded windows, then encode the dense masks one by one, or all in one call."""
    from pycocotools import mask
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    dense = (paste_masks_in_image(grids[:, None], boxes, SIZE)[:, 0] >= 0.5).numpy().view(np.uint8)
    if together:
        return mask.encode(np.asfortranarray(dense.transpose(1, 2, 0)))
    return [mask.encode(np.asfortranarray(one)) for one in dense]


def sampled_rles(grids: torch.Tensor, boxes: torch.Tensor) -> list[dict]:
    """Sample every pixel of the image for every mask, as detectron2 does on a GPU."""
    from pycocotools import mask

    y, x = torch.arange(SIZE[0]) + 0.5, torch.arange(SIZE[1]) + 0.5
    sides = (boxes[:, 2:] - boxes[:, :2])[:, None]
    x, y = ((v - boxes[:, i, None]) / sides[:, :, i] * 2 - 1 for i, v in ((0, x), (1, y)))
    at = torch.stack([x[:, None].expand(-1, *SIZE), y[:, :, None].expand(-1, *SIZE)], -1)
    dense = torch.nn.functional.grid_sample(grids[:, None], at, align_corners=False)[:, 0] >= 0.5
    return [mask.encode(np.asfortranarray(one)) for one in dense.numpy().view(np.uint8)]


if __name__ == "__main__":
    raise SystemExit(main())
