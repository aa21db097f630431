"""Masks that nobody has described: what the doctor says of their values, and that its advice works."""

import numpy as np
import pytest
from clinic import alarms, found, picture
from PIL import Image

from seglight.data.folder import Folder


def relabelled(copy, name, change):
    """A folder without classes.txt whose masks are changed."""
    root = copy(name)
    (root / "classes.txt").unlink()
    for path in root.glob("*/masks/*"):
        change(path)
    return root


def mapped(change):
    def rewrite(path):
        Image.fromarray(change(np.array(picture(path))).astype(np.uint8)).save(path)

    return rewrite


def smoothed(labels):
    big = np.where((labels > 0) & (labels < 255), 255, 0).astype(np.uint8)
    return np.array(Image.fromarray(big).resize((224, 192), 0).resize((112, 96), Image.BICUBIC))


FOUND = {
    "0 and 255": (
        lambda v: np.where((v > 0) & (v < 255), 255, 0),
        "binary-mask",
        "data.values: {0: background, 255: object}",
    ),
    "from 1": (lambda v: np.where(v == 255, 1, v + 1), "label-values", "data.values: {1: class_1, 2: class_2"),
    "gaps": (lambda v: np.where(v == 255, 0, v * 10), "label-values", "10: class_10, 20: class_20"),
    "labels": (lambda v: v, "no-classes", "data.classes: [background, class_1"),
    "smooth": (smoothed, "mask-smooth", ""),
}


@pytest.mark.parametrize("name", FOUND)
def test_values_are_explained(name, copy):
    change, rule, block = FOUND[name]
    root = relabelled(copy, "folder", mapped(change))
    findings = found(str(root))
    assert alarms(findings) == {rule}, [one.head for one in findings.values()]
    one = findings[rule]
    words = {"0 and 255": "255 for the object", "from 1": "start at 1", "gaps": "gaps", "smooth": "without smoothing"}
    assert words.get(name, "names") in one.fix
    assert block in one.block and one.splits == ("train", "val") and len(one.places) == 15


def test_the_suggested_lines_work(copy):
    """What the doctor says, done: the dataset is sound."""
    import yaml

    for name, kind in (("folder", FOUND["0 and 255"][0]), ("rgb", None)):
        root = relabelled(copy, name, mapped(kind) if kind else lambda path: None)
        one = next(one for one in found(str(root)).values() if one.severity == "error")
        options = {key.removeprefix("data."): value for key, value in yaml.safe_load(one.block).items()}
        assert not alarms(found(Folder(root=str(root), **options)))


def test_a_palette_shows_its_colours(copy):
    one = found(str(relabelled(copy, "palette", lambda path: None)))["no-classes"]
    assert "  1: class_1  # 226, 74, 51" in one.block


def test_colours_become_a_map(copy):
    one = found(str(relabelled(copy, "rgb", lambda path: None)))["mask-colours"]
    assert "[226, 74, 51]" in one.block and "void: [224, 224, 192]" in one.block and "data.ignore: [void]" in one.block
    assert one.block.count("\n") == 10


def test_grey_saved_as_rgb(copy):
    root = relabelled(copy, "folder", lambda path: picture(path).convert("RGB").save(path))
    one = found(str(root))["mask-colours"]
    assert "grey, saved as RGB" in one.what and "getchannel(0)" in one.fix and "data.classes" in one.block


def test_mask_suffixes_and_other_folder_names(copy):
    root = copy("folder")
    (root / "classes.txt").unlink()
    for split in ("train", "val"):
        (root / split / "images").rename(root / split / "JPEGImages")
        (root / split / "masks").rename(root / split / "gt")
        for path in (root / split / "gt").iterdir():
            path.rename(path.with_name(f"{path.stem}_seg.png"))
    findings = found(str(root))
    assert findings["mask-suffix"].block == "data.mask_suffix: '_seg'" and alarms(findings) == {"no-classes"}


def test_an_experiment_with_a_typo(copy, tmp_path):
    root = copy("folder")
    file = tmp_path / "mine.yaml"
    file.write_text(f"data:\n  class_path: Folder\n  init_args:\n    root: {root}\n    croop: 3\n")
    findings = found(str(file))
    assert alarms(findings) == {"experiment"} and "croop" in findings["experiment"].what + findings["experiment"].fix
