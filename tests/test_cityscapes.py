"""Cityscapes: label ids, fine and coarse parts, and the files of `data sample`."""

import shutil

import numpy as np
import pytest
from PIL import Image

from seglight.data.cityscapes import CLASSES, Cityscapes
from seglight.data.decode import DataError
from seglight.data.formats.cityscapes import CITYSCAPES_LABELS, write_cityscapes
from seglight.data.scenes import VOID, split_scenes


@pytest.fixture
def root(tmp_path):
    scenes = {"train": split_scenes("train", 3, 0, (64, 72)), "val": split_scenes("val", 2, 0, (64, 72))}
    return write_cityscapes(tmp_path / "cityscapes", scenes)


def coarsen(root):
    """gtCoarse for train, and a train_extra with one image of its own."""
    for split, source in (("train", "train"), ("train_extra", "val")):
        for path in sorted((root / "gtFine" / source).glob("*/*_labelIds.png")):
            new = root / "gtCoarse" / split / path.parent.name / path.name.replace("gtFine", "gtCoarse")
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, new)
    shutil.copytree(root / "leftImg8bit/val", root / "leftImg8bit/train_extra")


@pytest.mark.fidelity
def test_the_19_classes():
    known = {"road": 7, "building": 11, "pole": 17, "traffic light": 19, "sky": 23, "train": 31, "bicycle": 33}
    assert {name: CLASSES[name][0] for name in known} == known
    ids = [label_id for label_id, _ in CLASSES.values()]
    assert len(ids) == 19 and ids == sorted(ids) and not {9, 10, 14, 15, 16, 18, 29, 30} & set(ids)


def test_label_ids_become_train_ids(root):
    data = Cityscapes(root=str(root))
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [3, 2, 2]
    train = data.dataset("train")
    train.check(19)
    scenes = {f"{i:06d}": scene for i, scene in enumerate(split_scenes("train", 3, 0, (64, 72)))}
    for i, name in enumerate(train.ids):
        image, mask = train.read(i)
        scene = scenes[name.split("_")[1]]
        assert np.array_equal(image, scene.image)
        expected = np.full(mask.shape, 255)
        for label, (_, known, _) in CITYSCAPES_LABELS.items():
            if label != VOID:
                expected[scene.mask == label] = data.classes.index(known)
        assert np.array_equal(mask, expected)


def test_coarse_labels(root):
    coarsen(root)
    kinds = ("fine", "coarse", "fine+coarse")
    counts = {kind: len(Cityscapes(root=str(root), train_labels=kind).dataset("train")) for kind in kinds}
    assert counts == {"fine": 3, "coarse": 5, "fine+coarse": 5}


def test_what_is_refused(root):
    with pytest.raises(FileNotFoundError, match="gtCoarse"):
        Cityscapes(root=str(root), train_labels="coarse").dataset("train")
    with pytest.raises(DataError, match="cannot be validated on"):
        Cityscapes(root=str(root), val_split="train")
    mask = sorted((root / "gtFine/train").glob("*/*_labelIds.png"))[0]
    values = np.array(Image.open(mask))
    values[:2] = 40
    Image.fromarray(values).save(mask)
    with pytest.raises(DataError, match=r"values 40 in the masks.* labelIds are 0\.\.33"):
        Cityscapes(root=str(root)).dataset("train").check(19)
    mask.unlink()
    with pytest.raises(DataError, match="1 images without a mask"):
        Cityscapes(root=str(root)).dataset("train")
    with pytest.raises(FileNotFoundError, match="account at"):
        Cityscapes(root=str(root.parent / "nowhere"))
