"""The data doctor leaves sound data in peace, changes nothing, and fits its findings into a screen."""

import argparse
import json
import os
import re

import numpy as np
import pytest
from clinic import alarms, found, picture, save_like

from seglight.data.cityscapes import CityscapesInstances
from seglight.data.folder import Folder
from seglight.data.scenes import CLASSES
from seglight.data.voc import VOCInstances
from seglight.doctor.findings import Finding, Place, Report

# ---------------------------------------------------------------- sound data


@pytest.mark.parametrize("name", ["voc", "coco", "cityscapes", "folder", "palette"])
def test_sound_data_gives_no_alarm(name, originals):
    assert not alarms(found(str(originals[name])))


def test_colours_with_their_map_give_no_alarm(originals):
    from seglight.data.formats.folder import VOID_COLOUR
    from seglight.data.scenes import PALETTE

    colors = {**{name: list(c) for name, c in zip(CLASSES, PALETTE, strict=True)}, "void": list(VOID_COLOUR)}
    assert not alarms(found(Folder(root=str(originals["rgb"]), colors=colors, ignore=["void"])))


def test_objects_of_maps_and_generated_scenes(originals, copy):
    for kind, name in ((VOCInstances, "voc"), (CityscapesInstances, "cityscapes")):
        assert not alarms(found(kind(root=str(originals[name]))))
    root = copy("voc") / "VOCdevkit/VOC2012"
    path = next(path for path in sorted((root / "SegmentationObject").iterdir()) if picture(path).getextrema()[1] > 0)
    labels = np.array(picture(root / "SegmentationClass" / path.name))
    labels[labels != 255] = 0
    save_like(root / "SegmentationClass" / path.name, labels)
    findings = found(VOCInstances(root=str(root)))
    assert any("lies on background" in one.what for one in findings.values())


def test_nothing_is_changed(originals):
    def state(root):
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}

    before = state(originals["folder"])
    found(str(originals["folder"]), workers=2)
    assert state(originals["folder"]) == before


# ---------------------------------------------------------------- what is shown


def test_the_screen_has_room_for_the_worst():
    from rich.console import Console

    from seglight.doctor.findings import worst_first
    from seglight.doctor.report import LINES, show

    kinds = ("note", "error", "warning")
    places = tuple(Place(f"a/long/path/to/{'x' * 40}_{i}.png") for i in range(30))
    words = "wrong in some way that takes a good many words to tell, so that it never fits into a single line."
    for count in (0, 1, 5, 12, 90):
        findings = [
            Finding(kinds[i % 3], f"rule-{i}", f"{i} {words}", words, places, block="\n".join("abcdefghijk"))
            for i in range(count)
        ]
        report = Report("data", "Folder", "data", ("a", "b"), {"train": 9}, worst_first(findings))
        for width in (80, 120, 200):
            with open(os.devnull, "w") as nowhere:
                console = Console(width=width, record=True, file=nowhere)
                show(report, console)
            lines = console.export_text().splitlines()
            marks = [line[0] for line in lines if line[:2] in ("✗ ", "! ", "· ")]
            assert len(lines) <= LINES and marks == sorted(marks, key="✗!·".index)
            assert (count > 1) == ("✗" in marks) and ("nothing wrong" in lines[1]) == (not count)
            left = [
                int(n) for line in lines if "--html" in line for n in re.findall(r"(\d+) (?:error|warn|note)", line)
            ]
            assert len(marks) + sum(left) == count


def test_the_command(copy, capsys, tmp_path):
    from seglight.cli.data_check import configure, run

    def check(*argv):
        parser = argparse.ArgumentParser()
        configure(parser)
        options, rest = parser.parse_known_args(["--workers", "1", *map(str, argv)])
        options.overrides = rest
        return run(options), capsys.readouterr().out

    root = copy("folder")
    status, text = check(root)
    assert status == 0 and "9 in train and 6 in val" in text
    (root / "classes.txt").write_text("\n".join([*CLASSES, "comet"]) + "\n")
    assert check(root)[0] == 0 and check(root, "--strict")[0] == 1
    broken = root / "train/images/scene_0002.png"
    broken.write_bytes(broken.read_bytes()[:-400])
    status, text = check(
        root, "--json", tmp_path / "out/found.json", "--html", tmp_path / "out/found.html", "--split", "train"
    )
    assert status == 1 and "truncated" in text and "in val" not in text
    told = json.loads((tmp_path / "out/found.json").read_text())
    assert told["errors"] == 1 and told["samples"] == {"train": 9} and told["findings"][0]["rule"] == "truncated"
    assert told["findings"][0]["where"] == ["images/scene_0002.png"] or "scene_0002" in told["findings"][0]["where"][0]
    page = (tmp_path / "out/found.html").read_text()
    assert "data:image/" in page and "http" not in page.replace("http://www.w3", "") and "scene_0002.png" in page
    status, text = check(root, "--json", "-")
    assert json.loads(text)["findings"] and status == 1
    with pytest.raises(ValueError, match="There is no"):
        check(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least 1"):
        check(root, "--workers", 0)


# ---------------------------------------------------------------- real data


@pytest.mark.slow
@pytest.mark.parametrize("name", ["voc2012", "camvid", "isbi2012", "coco", "nuclei", "fruitsnuts", "cocoapi_eval"])
def test_real_data_give_no_false_alarm(name, real_data):
    findings = found(str(real_data / name), workers=2)
    expected = {"nuclei": {"area-outline"}}  # annotation 1382: a hole that its polygon fills
    assert alarms(findings) == expected.get(name, set())
