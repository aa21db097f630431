"""The fully connected CRF against pydensecrf2's C++: `python -m seglight.benchmarks.crf`.

375 x 500 pixels, 21 classes, 10 iterations, one thread. Marks: at most 1.3 of the peer's time with all classes, less
than the peer's with `prune`, and on a GPU less than 100 ms. Without pydensecrf2 (`pip install pydensecrf2` compiles it)
the ratios are to ourselves.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seglight.benchmarks.timing import paired
from seglight.crf import CRF, PRESETS, mean_field

CLASSES = 21
SIZE = (375, 500)
PEER = "pydensecrf2"
CASES = {"bilateral 4 (49, 5), Gaussian 3 (3)": CRF(w1=4, sigma_alpha=49, sigma_beta=5, w2=3, sigma_gamma=3), **PRESETS}


def main(argv: list[str] | None = None) -> int:
    """Print one table per set of parameters."""
    parser = argparse.ArgumentParser(prog="seglight bench crf", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--image", help="a picture to use in place of a generated scene; its size is kept")
    parser.add_argument("--device", default="cpu", help="where else to run ours, for instance cuda")
    options = parser.parse_args(argv)
    image, probabilities = example(options.image)
    size = " x ".join(map(str, image.shape[1:]))
    for name, crf in CASES.items():
        contestants = {
            "seglight": lambda crf=crf: mean_field(image, probabilities, crf),
            "seglight, prune 0.5": lambda crf=crf: mean_field(image, probabilities, crf._replace(prune=0.5)),
            "seglight, prune 0.5, 5 iterations": lambda crf=crf: mean_field(
                image, probabilities, crf._replace(prune=0.5, iterations=5)
            ),
        }
        marks = {"seglight": "<= 1.3", "seglight, prune 0.5": "< 1"}
        if options.device != "cpu":
            ours = f"seglight, {options.device}"
            contestants[ours], marks[ours] = on_device(image, probabilities, crf, options.device), "< 100 ms"
        if importlib.util.find_spec("pydensecrf"):
            contestants[PEER] = lambda crf=crf: peer(image, probabilities, crf)
            expected = contestants[PEER]().argmax(0)
            for ours, mark in marks.items():
                same = (contestants[ours]().cpu().argmax(0) == expected).float().mean().item()
                marks[ours] = f"{mark}; {100 * same:.2f} % of labels equal"
        baseline = PEER if PEER in contestants else "seglight"
        paired(contestants, baseline, options.rounds, marks, f"{size}, {CLASSES} classes, {name}")
    return 0


def example(path: str | None = None) -> tuple[Tensor, Tensor]:
    """A picture uint8 (3, H, W) and log-probabilities (K, H, W) as blurred and doubtful as those of a network.

    The picture is an embedded scene with the noise of a camera, which gives lattices as large as photos do; of a
    picture of one's own, the brightness decides the classes.
    """
    if path:
        from seglight.predict import as_array

        image = as_array(path)
        mask = image.mean(2) // 64
    else:
        from seglight.data.scenes import scene

        drawn = scene(0, 0, SIZE)
        grain = np.random.default_rng(0).normal(0, 4, drawn.image.shape)
        image, mask = (drawn.image + grain).clip(0, 255).astype(np.uint8), np.where(drawn.mask == 255, 0, drawn.mask)
    generator = torch.Generator().manual_seed(0)
    logits = F.one_hot(torch.from_numpy(mask).long(), CLASSES).permute(2, 0, 1)[None].float()
    logits = 4 * F.avg_pool2d(logits, 17, stride=8, padding=8, count_include_pad=False)
    logits += 0.8 * torch.randn(logits.shape, generator=generator)
    logits = F.interpolate(logits, image.shape[:2], mode="bilinear")[0]
    return torch.from_numpy(image).permute(2, 0, 1).contiguous(), logits.log_softmax(0)


def peer(image: Tensor, log_probabilities: Tensor, crf: CRF) -> Tensor:
    """Probabilities (K, H, W) by pydensecrf2, with its defaults: symmetric normalisation, the Potts model."""
    from pydensecrf.densecrf import DenseCRF2D

    classes, height, width = log_probabilities.shape
    field = DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(-log_probabilities.reshape(classes, -1).numpy()))
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    field.addPairwiseBilateral(sxy=crf.sigma_alpha, srgb=crf.sigma_beta, rgbim=pixels, compat=crf.w1)
    field.addPairwiseGaussian(sxy=crf.sigma_gamma, compat=crf.w2)
    return torch.from_numpy(np.array(field.inference(crf.iterations))).view(classes, height, width)


def on_device(image: Tensor, log_probabilities: Tensor, crf: CRF, device: str) -> Callable[[], Tensor]:
    """Our CRF on another device, the result waited for."""
    image, log_probabilities = image.to(device), log_probabilities.to(device)

    def call() -> Tensor:
        result = mean_field(image, log_probabilities, crf)
        if result.device.type == "cuda":
            torch.cuda.synchronize(result.device)
        return result

    return call


if __name__ == "__main__":
    raise SystemExit(main())
