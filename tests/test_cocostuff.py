"""COCO-Stuff: 171 classes of the official maps, from folders and archives."""

import shutil

import numpy as np
import pytest
from PIL import Image

from seglight.data.coco_names import STUFF, THINGS
from seglight.data.cocostuff import COCOStuff
from seglight.data.findings import DataError
from seglight.data.formats.cocostuff import COCOSTUFF_LABELS, write_cocostuff
from seglight.data.scenes import VOID, split_scenes

SIZE = (64, 72)


def drawn():
    return {"train": list(split_scenes("train", 4, 0, SIZE)), "val": list(split_scenes("val", 2, 0, SIZE))}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stuff")
    for name in ("plain", "zipped"):
        write_cocostuff(folder / name, drawn(), zipped=name == "zipped")
    return folder


@pytest.mark.fidelity
def test_the_171_classes():
    """Facts of labels.txt and the README of the official repository."""
    assert len(STUFF) == 91 and min(STUFF) == 92 and max(STUFF) == 182
    known = {92: "banner", 113: "fence", 124: "grass", 149: "road", 157: "sky-other", 169: "tree", 182: "wood"}
    assert {number: STUFF[number] for number in known} == known
    assert list(STUFF.values()) == sorted(STUFF.values())
    assert len(COCOStuff.classes) == len(set(COCOStuff.classes)) == 171
    known = {0: "person", 79: "toothbrush", 80: "banner", 156 - 11: "sky-other", 170: "wood"}
    assert {label: COCOStuff.classes[label] for label in known} == known
    assert set(range(1, 183)) - set(THINGS) - set(STUFF) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}


@pytest.mark.parametrize("place", ["plain", "zipped"])
def test_labels_are_contiguous(roots, place):
    module = COCOStuff(root=str(roots / place))
    names = {**THINGS, **STUFF}
    for split, scenes in drawn().items():
        data = module.dataset(split)
        data.check(171)
        assert len(data) == len(scenes)
        for i, scene in enumerate(scenes):
            expected = np.full(SIZE, 255)
            for label, number in COCOSTUFF_LABELS.items():
                if label != VOID:
                    expected[scene.mask == label] = module.classes.index(names[number])
            assert np.array_equal(data.read(i)[1], expected)
    used = data.fingerprint().get("archives")
    assert used == (["stuffthingmaps_trainval2017.zip", "val2017.zip"] if place == "zipped" else None)


def test_layouts(roots, tmp_path):
    """Images unpacked and maps not, and the folders of the authors' own instructions."""
    expected = COCOStuff(root=str(roots / "plain")).dataset("train")
    mixed = shutil.copytree(roots / "plain", tmp_path / "mixed")
    shutil.rmtree(mixed / "stuffthingmaps")
    shutil.copy(roots / "zipped/stuffthingmaps_trainval2017.zip", mixed)
    authors = tmp_path / "dataset"
    shutil.copytree(roots / "plain/train2017", authors / "images/train2017")
    for split in ("train2017", "val2017"):
        shutil.copytree(roots / f"plain/stuffthingmaps/{split}", authors / f"annotations/{split}")
    for root in (mixed, authors):
        data = COCOStuff(root=str(root)).dataset("train")
        assert data.ids == expected.ids and np.array_equal(data.read(2)[1], expected.read(2)[1])


def test_what_is_refused(roots, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"stuffthingmaps.*data sample --format cocostuff"):
        COCOStuff(root=str(tmp_path))
    with pytest.raises(DataError, match="cannot be trained and judged on"):
        COCOStuff(root=str(roots / "plain"), val_split="train2017")
    root = shutil.copytree(roots / "plain", tmp_path / "copy")
    path = sorted((root / "stuffthingmaps/train2017").iterdir())[0]
    values = np.array(Image.open(path))
    values[0, :3] = (11, 182, 254)
    Image.fromarray(values).save(path)
    with pytest.raises(DataError, match=r"values 11, 182, 254 in the masks.*maps that were converted"):
        COCOStuff(root=str(root)).dataset("train").check(171)
    path.unlink()
    with pytest.raises(DataError, match=r"1 images without a mask.*000000000009"):
        COCOStuff(root=str(root)).dataset("train")
    shutil.rmtree(root / "stuffthingmaps/val2017")
    shutil.rmtree(root / "val2017")
    with pytest.raises(FileNotFoundError, match="no images and no maps of val2017"):
        COCOStuff(root=str(root)).dataset("val")


def test_maps_that_mmsegmentation_has_converted_do_not_count(roots, tmp_path):
    (tmp_path / "images").symlink_to(roots / "plain")
    for split in ("train2017", "val2017"):
        shutil.copytree(roots / f"plain/stuffthingmaps/{split}", tmp_path / f"annotations/{split}")
        for path in list((tmp_path / f"annotations/{split}").iterdir()):
            shutil.copy(path, path.with_name(f"{path.stem}_labelTrainIds.png"))
    one, other = (COCOStuff(str(root)).dataset("train") for root in (tmp_path, roots / "plain"))
    assert one.ids == other.ids and all(np.array_equal(one.read(i)[1], other.read(i)[1]) for i in range(len(one)))
