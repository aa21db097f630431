"""ADE20K's 150 classes, from the folder and the archive as downloaded."""

import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from seglight.data.ade20k import ADE20K, NAMES
from seglight.data.findings import DataError
from seglight.data.formats.ade20k import ADE20K_LABELS, write_ade20k
from seglight.data.scenes import VOID, split_scenes

SIZE = (64, 72)


def drawn():
    return {"train": list(split_scenes("train", 4, 0, SIZE)), "val": list(split_scenes("val", 2, 0, SIZE))}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ade")
    for name in ("plain", "zipped"):
        write_ade20k(folder / name, drawn(), zipped=name == "zipped")
    return folder


@pytest.mark.fidelity
def test_the_150_classes():
    assert len(NAMES) == len(set(NAMES)) == 150 and all(name == name.strip() for name in NAMES)
    known = {0: "wall", 1: "building", 2: "sky", 12: "person", 20: "car", 67 - 1: "flower", 94 - 1: "pole", 149: "flag"}
    assert {label: NAMES[label] for label in known} == known


@pytest.mark.parametrize("place", ["plain", "plain/ADEChallengeData2016", "zipped"])
def test_labels_begin_at_0_and_other_objects_are_ignored(roots, place):
    module = ADE20K(root=str(roots / place))
    assert module.classes == NAMES and len(module.palette) == len(set(module.palette)) == 150
    for split, scenes in drawn().items():
        data = module.dataset(split)
        data.check(150)
        assert data.ids == [f"ADE_{split}_{i:08d}" for i in range(1, len(scenes) + 1)]
        for i, scene in enumerate(scenes):
            expected = np.full(SIZE, 255)
            for label, value in ADE20K_LABELS.items():
                if label != VOID:
                    expected[scene.mask == label] = value - 1
            assert np.array_equal(data.read(i)[1], expected)
    assert data.fingerprint().get("archives") == (["ADEChallengeData2016.zip"] if place == "zipped" else None)


def test_the_folder_one_is_in_may_be_the_root(roots, monkeypatch):
    monkeypatch.chdir(roots / "plain/ADEChallengeData2016")
    data = ADE20K(".").dataset("train")
    assert len(data) == 4 and data.read(0)[0].shape == (*SIZE, 3)


def test_names_of_the_file(roots, tmp_path):
    root = shutil.copytree(roots / "plain", tmp_path / "copy")
    file = root / "ADEChallengeData2016/objectInfo150.txt"
    lines = file.read_text().splitlines()
    assert lines[2].endswith("\tbuilding")
    lines[2] = lines[2].replace("building", "building, edifice ")
    lines[1] = lines[1].replace("wall", "WALL;rampart")
    file.write_text("\r\n".join(lines) + "\r\n")
    assert ADE20K(root=str(root)).classes == ("WALL", *NAMES[1:])
    with zipfile.ZipFile(tmp_path / "ADEChallengeData2016.zip", "w") as archive:
        archive.write(file, "ADEChallengeData2016/objectInfo150.txt")
    assert ADE20K(root=str(tmp_path)).classes == ("WALL", *NAMES[1:])
    file.write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match="lists 149 classes, not the 150"):
        ADE20K(root=str(root))
    file.unlink()
    assert ADE20K(root=str(root)).classes == NAMES


def test_sizes_that_differ_are_told(roots, caplog):
    module = ADE20K(root=str(roots / "plain"))
    module.dataset("train"), module.dataset("val")
    texts = [record.getMessage() for record in caplog.records]
    assert texts == [
        "ADE20K training has 4 of the 20,210 published samples. Scores do not compare with published ones.",
        "ADE20K validation has 2 of the 2,000 published samples. Scores do not compare with published ones.",
    ]


def test_what_is_refused(roots, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ADEChallengeData2016\.zip.*sceneparsing.*data sample"):
        ADE20K(root=str(tmp_path))
    with pytest.raises(DataError, match="cannot be trained and judged on"):
        ADE20K(root=str(roots / "plain"), test_split="training")
    with pytest.raises(FileNotFoundError, match="no images/testing and no annotations/testing"):
        ADE20K(root=str(roots / "plain"), test_split="testing").dataset("test")
    root = shutil.copytree(roots / "plain", tmp_path / "copy")
    path = sorted((root / "ADEChallengeData2016/annotations/training").iterdir())[1]
    values = np.array(Image.open(path))
    values[0] = 151
    Image.fromarray(values).save(path)
    with pytest.raises(DataError, match=r"values 151 in the masks.*not of the full ADE20K"):
        ADE20K(root=str(root)).dataset("train").check(150)
    path.unlink()
    with pytest.raises(DataError, match=r"1 images without a mask.*ADE_train_00000002"):
        ADE20K(root=str(root)).dataset("train")
