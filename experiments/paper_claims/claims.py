"""Why each paper's idea works, shown on generated pictures: `python experiments/paper_claims/claims.py [NAME ...]`.

A claim compares networks that differ in one thing, trained alike on the same pictures, over several seeds. It holds if
the 95 % interval (Student's t) of the paired differences lies above zero. A figure for each claim, and all numbers as
claims.json, go to the folder `--out`.
"""

from __future__ import annotations

import argparse
import json
import logging
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import Trainer, seed_everything
from scenes import Claim
from scipy import stats

import seglight
from seglight import crf, models

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "use_distributed_sampler": False,
}  # fmt: skip
INK, GREY = "#1f4e79", "#9a9a9a"


@dataclass
class Comparison:
    """What is compared, and which differences must be positive."""

    says: str
    """The claim in one sentence."""
    data: dict[str, Any]
    """Arguments of `scenes.Claim`."""
    models: dict[str, Callable[[Claim], seglight.SemanticModel] | str]
    """Networks by the name in the figure. The name of another one stands for that network, tested with the CRF."""
    better: list[tuple[str, str]]
    """Pairs of names, the better one first."""
    score: tuple[int, ...]
    """Classes whose mean IoU is compared."""
    steps: int = 150


def _model(name: str, **options: Any) -> Callable[[Claim], seglight.SemanticModel]:
    adam = {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.01, "warmup": 10}
    return lambda data: getattr(models, name)(
        num_classes=data.num_classes, classes=list(data.classes), **{**adam, **options}
    )


# VGG16 has no batch norm: from scratch it wants a smaller step.
SLOW: dict[str, Any] = {"width": 8, "lr": 1e-3, "weight_decay": 0.0}
# A trunk whose effective view is small, so that context must come from what the papers add.
SHALLOW: dict[str, Any] = {"backbone": "resnet10t", "dilation": "lagged-first", "width": 64}
PLAIN = _model("PSPNet", **SHALLOW, bins=[], loss_weights={"out": 1.0})
CRF = {"preset": "deeplabv2_vgg", "sigma_beta": 20.0}  # the pictures' noise has a standard deviation of 8

CLAIMS = {
    "skips": Comparison(
        "FCN: the finer the skips, the thinner the structures that are found",
        {"kind": "wires", "side": 96, "batch_size": 4},
        {name: _model(name.replace("-", ""), **SLOW) for name in ("FCN-32s", "FCN-16s", "FCN-8s")},
        [("FCN-16s", "FCN-32s"), ("FCN-8s", "FCN-16s")],
        score=(1,),
        steps=500,
    ),
    # Two layers of context: with fc7's alone one seed of three left the plateau. Chosen among five variants on seed 1.
    "global_context": Comparison(
        "ParseNet: the mean over the picture tells classes that only the scene decides",
        {"kind": "context", "side": 97},
        {
            "local features": _model("ParseNet", **SLOW, context_layers=[], skip_layers=["conv5_3", "fc7"]),
            "with global context": _model("ParseNet", **SLOW, context_layers=["conv5_3", "fc7"]),
        },
        [("with global context", "local features")],
        score=(1, 2),
        steps=400,
    ),
    "pyramid": Comparison(
        "PSPNet: pooling the picture in a pyramid tells classes that only the scene decides",
        {"kind": "context", "side": 129},
        {"no pooling": PLAIN, "pyramid pooling": _model("PSPNet", **SHALLOW, loss_weights={"out": 1.0})},
        [("pyramid pooling", "no pooling")],
        score=(1, 2),
    ),
    "encoding": Comparison(
        "EncNet: encoding the picture's statistics tells classes that only the scene decides",
        {"kind": "context", "side": 129},
        {
            "no encoding": PLAIN,
            "context encoding": _model("EncNet", **SHALLOW, lateral=False, loss_weights={"out": 1.0, "se": 0.2}),
        },
        [("context encoding", "no encoding")],
        score=(1, 2),
    ),
    "atrous": Comparison(
        "DeepLab: with as many weights, atrous convolution keeps what strides lose",
        {"kind": "wires", "side": 97},
        {
            "stride 32": _model("PSPNet", **SHALLOW, bins=[], output_stride=32, loss_weights={"out": 1.0}),
            "atrous, stride 8": PLAIN,
        },
        [("atrous, stride 8", "stride 32")],
        score=(1,),
        steps=100,
    ),
    "crf": Comparison(
        "DeepLab v2: the dense CRF brings the borders of coarse scores to those of the picture",
        {"kind": "edges", "side": 97},
        {"LargeFOV": _model("DeepLabV2VGG", width=8, head="largefov"), "LargeFOV + CRF": "LargeFOV"},
        [("LargeFOV + CRF", "LargeFOV")],
        score=(1,),
        steps=400,
    ),
}


def run(claim: Comparison, seed: int, steps: int | None = None) -> dict[str, float]:
    """Score of each network of a claim, trained from one seed."""
    scores: dict[str, float] = {}
    trained: dict[str, seglight.SemanticModel] = {}
    for name, build in claim.models.items():
        data = Claim(seed=seed, **claim.data)
        if isinstance(build, str):
            model = trained[build]
            model.test_crf = crf.parameters(CRF)
        else:
            seed_everything(seed, verbose=False)
            model = trained[name] = build(data)
            Trainer(max_steps=steps or claim.steps, limit_val_batches=0, **QUIET).fit(model, data)
        Trainer(**QUIET).validate(model, data, verbose=False)
        scores[name] = float(np.mean(model.scores.iou[list(claim.score)]))
    return scores


def interval(better: list[float], worse: list[float]) -> tuple[float, float, float]:
    """Mean of the paired differences and the ends of its 95 % interval."""
    difference = np.array(better) - np.array(worse)
    half = stats.t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / np.sqrt(len(difference))
    return float(difference.mean()), float(difference.mean() - half), float(difference.mean() + half)


def figure(name: str, claim: Comparison, scores: dict[str, list[float]], path: Path) -> None:
    """A line a seed over the networks, the mean in bold, the intervals below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(scores)
    table = 100 * np.array([scores[one] for one in names])
    plot, axes = plt.subplots(figsize=(1.6 + 1.7 * len(names), 3.6), layout="constrained")
    axes.plot(table, color=GREY, linewidth=1, marker="o", markersize=4, alpha=0.7)
    axes.plot(table.mean(1), color=INK, linewidth=2.5, marker="o", markersize=7)
    for x, mean in enumerate(table.mean(1)):
        style = {"textcoords": "offset points", "ha": "center", "color": INK, "weight": "bold"}
        axes.annotate(f"{mean:.1f}", (x, mean), (0, 9), **style)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.4, len(names) - 0.6)
    axes.set_ylim(0, max(100 * 0.05, table.max() * 1.2))
    classes = " and ".join(Claim.CLASSES[claim.data["kind"]][k] for k in claim.score)
    axes.set_ylabel(f"IoU of {classes} (%)")
    axes.set_title(textwrap.fill(claim.says, 29 * len(names)), fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    lines = []
    for better, worse in claim.better:
        mean, low, high = (100 * value for value in interval(scores[better], scores[worse]))
        lines.append(f"{better} - {worse}:\n{mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}")
    axes.set_xlabel("\n".join(lines), fontsize=8)
    plot.savefig(path / f"{name}.png", dpi=150)
    plt.close(plot)


def main() -> None:
    """Run the claims, print and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *CLAIMS], help=f"of {', '.join(CLAIMS)}; all without")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="instead of each claim's own")
    parser.add_argument("--out", type=Path, default=Path("runs/paper_claims"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {}
    for name in options.names or CLAIMS:
        claim, began = CLAIMS[name], time.perf_counter()
        runs = [run(claim, seed, options.steps) for seed in range(options.seeds)]
        scores = {network: [one[network] for one in runs] for network in runs[0]}
        figure(name, claim, scores, options.out)
        record[name] = {"scores": scores, "minutes": round((time.perf_counter() - began) / 60, 1), "differences": {}}
        print(f"{claim.says} ({record[name]['minutes']} min)")
        for better, worse in claim.better:
            mean, low, high = interval(scores[better], scores[worse])
            verdict = "holds" if low > 0 else "does not show"
            record[name]["differences"][f"{better} - {worse}"] = [mean, low, high]
            print(f"  {better} - {worse}: {100 * mean:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}): {verdict}")
        (options.out / "claims.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"Figures and numbers are in {options.out}.")


if __name__ == "__main__":
    main()
