"""Learning for real: Mask R-CNN from scratch on photographs of nuclei, and its number by COCO's own code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from seglight.cli import main

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_mask_rcnn_learns_nuclei_from_scratch(tmp_path, monkeypatch):
    """100 of the recipe's 500 steps, about 5 minutes on two cores; one run had mask AP 14.6 and AP50 48.8 there."""
    home = os.environ.get("SEGLIGHT_DATA")
    if not home or not (Path(home) / "nuclei").is_dir():
        pytest.skip("needs $SEGLIGHT_DATA/nuclei")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    nuclei, run = Path(home).resolve() / "nuclei", tmp_path / "run"
    words = ["-c", str(ROOT / "experiments/nuclei/maskrcnn.yaml"), "--data.root", str(nuclei), "--data.workers", "0"]
    assert main(["fit", *words, "--trainer.max_steps", "100", "--val_every", "100", "--out", str(run)]) == 0
    assert json.loads((run / "best.json").read_text())["val/AP"] > 0.08
    best = str(run / "checkpoints/best.ckpt")
    assert main(["test", "--ckpt_path", best, "--out", str(tmp_path / "test")]) == 0
    scores = json.loads((tmp_path / "test/scores_test.json").read_text())
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(nuclei / "annotations/instances_val.json"))
    found = truth.loadRes(str(tmp_path / "test/results.json"))
    for kind, prefix in (("segm", ""), ("bbox", "box_")):
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        for position, name in enumerate(("AP", "AP50", "AP75", "APs", "APm")):
            assert scores[f"test/{prefix}{name}"] == pytest.approx(evaluation.stats[position], abs=1e-9), name
