"""PASCAL-Context: numbers, orders, backgrounds, and the files of `data sample`."""

import numpy as np
import pytest
from scipy.io import savemat

from seglight.data.context import FCN_ORDER, NUMBERS, PascalContext
from seglight.data.findings import DataError
from seglight.data.formats.context import CONTEXT_LABELS, write_context
from seglight.data.scenes import VOID, split_scenes


@pytest.fixture
def root(tmp_path):
    scenes = {"train": split_scenes("train", 3, 0, (64, 72)), "val": split_scenes("val", 2, 0, (64, 72))}
    return write_context(tmp_path / "context", scenes)


@pytest.mark.fidelity
def test_the_59_classes():
    assert len(NUMBERS) == 59 and list(NUMBERS) == sorted(NUMBERS)
    assert sorted(NUMBERS.values()) == list(NUMBERS.values())  # ascending numbers are alphabetical names
    assert sorted(FCN_ORDER) == list(NUMBERS) and len(FCN_ORDER) == 59
    assert FCN_ORDER[10] == "table" and FCN_ORDER[19:22] == ("tvmonitor", "bag", "bed")


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("order", ["alphabetical", "fcn"])
def test_numbers_become_labels(root, background, order):
    data = PascalContext(root=str(root), background=background, order=order)
    assert len(data.classes) == len(data.palette) == data.num_classes == 59 + background
    sets = {split: data.dataset(split) for split in ("train", "val", "test")}
    assert [len(sets[split]) for split in ("train", "val", "test")] == [3, 2, 2]
    for split in ("train", "val"):
        sets[split].check(data.num_classes)
        for i, scene in enumerate(split_scenes(split, len(sets[split]), 0, (64, 72))):
            image, mask = sets[split].read(i)
            assert image.shape == (64, 72, 3)
            expected = np.full((64, 72), 0 if background else 255)
            for label, (_, name) in CONTEXT_LABELS.items():
                if label != VOID:
                    expected[scene.mask == label] = data.classes.index(name)
            assert np.array_equal(mask, expected)


def test_what_is_refused(root):
    names = [path.stem for path in sorted((root / "trainval").glob("*.mat"))]
    data = PascalContext(root=str(root))
    first = root / "trainval" / f"{data.dataset('train').ids[0]}.mat"
    savemat(first, {"LabelMap": np.full((64, 72), 460, np.uint16)})
    with pytest.raises(DataError, match=r"LabelMap holds 460, but the numbers are 1\.\.459"):
        data.dataset("train").check(60)
    savemat(first, {"Other": np.zeros((64, 72), np.uint16)})
    with pytest.raises(DataError, match="has no LabelMap"):
        data.dataset("train").check(60)
    first.write_bytes(first.read_bytes()[:40])
    with pytest.raises(DataError, match="not a readable MATLAB file"):
        data.dataset("train").check(60)
    savemat(first, {"LabelMap": np.ones((64, 71), np.uint16)})
    with pytest.raises(DataError, match="differ in size"):
        data.dataset("train").check(60)
    first.unlink()
    with pytest.raises(DataError, match="missing"):
        data.dataset("train").check(60)
    with pytest.raises(DataError, match="3 of the training samples are also in the val split"):
        PascalContext(root=str(root), val_split="trainval").dataset("train")
    with pytest.raises(FileNotFoundError, match="voc2010"):
        PascalContext(root=str(root.parent / "nowhere"))
    assert len(names) == 5
