"""The page of published numbers, the table made from it, and its agreement with the experiments and the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from seglight import models
from seglight.cli import main
from seglight.cli.models import HEAD, cost, markdown, passed, published, replaced, results, rows

ROOT = Path(__file__).parents[1]
REVIEW = {  # section by section of the review: model, dataset, value
    ("FCN-8s", "VOC 2012", 62.2), ("ParseNet", "PASCAL-Context", 40.4), ("ParseNet", "VOC 2012", 69.8),
    ("DeconvNet", "VOC 2012", 72.5), ("PSPNet R101s", "VOC 2012", 85.4), ("DeepLab v2 R101", "VOC 2012", 79.7),
    ("DeepLab v2 R101", "PASCAL-Context", 45.7), ("DeepLab v2 R101", "Cityscapes", 70.4),
    ("DeepLab v3 R101", "VOC 2012", 86.9), ("DeepLab v3 R101", "Cityscapes", 81.3),
    ("DeepLab v3+ Xception-65", "VOC 2012", 89.0), ("DeepLab v3+ Xception-71", "Cityscapes", 82.1),
    ("EncNet R101s", "PASCAL-Context", 52.6), ("EncNet R101s", "PASCAL-Context", 81.2),
    ("EncNet R101s", "VOC 2012", 85.9), ("FPN mask proposals R50", "COCO", 48.1), ("Mask R-CNN X101-FPN", "COCO", 37.1),
    ("Mask R-CNN X101-FPN", "COCO", 41.8), ("PANet R50", "COCO", 42.0), ("PANet X101", "COCO", 46.7),
}  # fmt: skip


def test_the_page_is_whole():
    seen = set()
    for family, entry in published().items():
        assert (
            {"paper", "tests", "variants", "results"}
            <= set(entry)
            <= {"paper", "tests", "variants", "results", "measured"}
        )
        for name in entry["tests"]:
            assert (ROOT / f"tests/test_{name}.py").is_file(), name
        for variant, how in entry["variants"].items():
            assert hasattr(models, how["model"]), variant
        for result in entry["results"]:
            assert result["variant"] in entry["variants"], family
            assert (ROOT / "experiments" / result["experiment"]).is_file(), result["experiment"]
            assert str(result["value"]) in (ROOT / "experiments" / result["experiment"]).read_text(), result
            if result.get("review"):
                seen.add((result["variant"], result["dataset"], result["value"]))
    assert seen == REVIEW


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("variant", "count"),
    [
        ("FCN-32s", 136_152_917), ("FCN-16s", 134_815_994), ("FCN-8s", 134_489_759), ("FCN-32s CaffeNet", 58_704_590),
        ("FCN-32s GoogLeNet", 7_801_413), ("ParseNet", 20_528_981), ("DeconvNet", 251_805_653), ("U-Net", 31_030_658),
        ("Semantic FPN R50", 28_478_933), ("PSPNet R50s", 49_081_578), ("PSPNet R101s", 68_073_706),
        ("DeepLab v2 VGG16 LargeFOV", 20_505_429), ("DeepLab v2 VGG16 ASPP", 37_877_652),
        ("DeepLab v2 R101", 44_048_532), ("DeepLab v3 R50", 39_048_533), ("DeepLab v3 R101", 58_040_661),
        ("DeepLab v3 R101 cascade", 95_301_717), ("DeepLab v3+ Xception-65", 41_055_413),
        ("DeepLab v3+ R101", 59_344_309), ("EncNet R101s", 62_907_345),
        ("Mask R-CNN R50-FPN", 44_401_393), ("Mask R-CNN R101-FPN", 63_341_297), ("Mask R-CNN X101-FPN", 102_149_873),
        ("PANet R50", 108_751_429), ("PANet X101", 166_499_909), ("FPN mask proposals R50", 29_643_210),
    ],
)  # fmt: skip
def test_parameters_of_the_defaults(variant, count):
    """The specification's table, from each family's own defaults."""
    (how,) = (entry["variants"][variant] for entry in published().values() if variant in entry["variants"])
    assert cost(**how)[0] == count


def test_operations():
    """FCN-32s by hand: the convolutions of VGG16 on 698 pixels, fc6 and fc7, the score, the upsampling."""
    sides, total, channels = [698, 349, 175, 88, 44], 0, 3
    for side, width, convs in zip(sides, (64, 128, 256, 512, 512), (2, 2, 3, 3, 3), strict=True):
        for _ in range(convs):
            total += 9 * channels * width * side * side
            channels = width
    fc, score = 16, 16
    total += fc * fc * (49 * 512 * 4096 + 4096 * 4096 + 4096 * 21) + score * score * 64 * 64 * 21 * 21
    assert cost("FCN32s", 21, 500)[1] == pytest.approx(2 * total / 1e9, rel=1e-6)


def test_the_readme_shows_this_table():
    """All but the count of checks, which `make models` measures."""
    fresh = [line.split("|") for line in markdown(list(rows(published(), []))).splitlines()]
    readme = (ROOT / "README.md").read_text()
    shown = [
        line.split("|") for line in re.search(r"<!-- models.*?-->\n(.*?)\n<!-- /models", readme, re.S)[1].splitlines()
    ]
    column = HEAD.index("checks") + 1
    for line in (*fresh, *shown):
        del line[column]
    assert fresh == shown, "Run `make models`."


def test_the_verb(capsys, tmp_path):
    assert main(["models", "FCN-8s"]) == 0
    out = capsys.readouterr().out
    assert "134,489,759" in out and "whole image, one pass" in out and "experiments/voc/fcn8s.yaml" in out
    assert main(["models", "FCN8"]) == 2
    assert "nearest: FCN, FCN-8s" in capsys.readouterr().err


def test_counting_checks_and_replacing(tmp_path):
    report = tmp_path / "r.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_fcn" name="a"/><testcase classname="tests.test_fcn" '
        'name="b"><failure/></testcase><testcase classname="tests.test_unet" name="c"><skipped/></testcase>'
        '<testcase classname="tests.test_unet" name="d"/></testsuite></testsuites>'
    )
    assert passed(str(report)) == {"fcn": 1, "unet": 1}
    text = "a\n<!-- models: written by `make models` -->\nold\n<!-- /models -->\nb"
    assert replaced(text, "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="no place for the table"):
        replaced("a", "new")


def test_a_run_of_ours_is_shown():
    run = {"metric": "mIoU", "value": 66.6, "dataset": "CamVid", "split": "val", "steps": 10, "seed": 0,
           "hardware": "one core", "experiment": "camvid/pspnet.yaml"}  # fmt: skip
    families = {"FCN": {**published()["FCN"], "measured": {"FCN-8s": [run]}}}
    (line,) = rows(families, ["FCN-8s"])
    assert line[-1] == "66.6 CamVid val"
    assert any("10 steps, seed 0, one core" in text for text in results(families, ["FCN-8s"]))
