"""VOC in the devkit's layout, and the real files where they are."""

import numpy as np
import pytest
from PIL import Image

from seglight.data.findings import DataError
from seglight.data.palette import palette
from seglight.data.voc import VOC

LISTS = {"train": ["2007_000001", "2007_000002"], "val": ["2008_000003"]}


@pytest.fixture
def devkit(tmp_path):
    """A miniature VOCdevkit/VOC2012."""
    folder = tmp_path / "data/VOCdevkit/VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    lists = {**LISTS, "trainval": LISTS["train"] + LISTS["val"]}
    for split, names in lists.items():
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
    rng = np.random.default_rng(0)
    for name in lists["trainval"]:
        Image.fromarray(rng.integers(0, 256, (30, 41, 3), dtype=np.uint8)).save(folder / f"JPEGImages/{name}.jpg")
        labels = Image.fromarray(np.resize(np.array([0, 5, 20, 255], np.uint8), (30, 41)))
        labels.putpalette([channel for colour in palette(256) for channel in colour])
        labels.save(folder / f"SegmentationClass/{name}.png")
    return folder


@pytest.mark.parametrize("up", [0, 1, 2])
def test_the_root_may_be_any_of_three_folders(devkit, up):
    module = VOC(root=str([devkit, *devkit.parents][up]))
    for split, names in {**LISTS, "test": LISTS["val"]}.items():
        data = module.dataset(split)
        assert data.ids == names
        data.check(module.num_classes)
        image, mask = data.read(0)
        assert image.shape == (30, 41, 3) and np.unique(mask).tolist() == [0, 5, 20, 255]


def test_the_default_root(devkit, monkeypatch, tmp_path):
    monkeypatch.delenv("SEGLIGHT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert VOC().root.resolve() == devkit
    monkeypatch.chdir(devkit)
    monkeypatch.setenv("SEGLIGHT_DATA", str(tmp_path))
    (tmp_path / "voc2012").symlink_to(tmp_path / "data")
    assert VOC().root.resolve() == devkit


def test_classes_and_palette_are_those_of_the_devkit():
    assert len(VOC.classes) == len(VOC.palette) == 21
    objects = (  # in alphabetical order, as in the development kit
        "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
        "sheep sofa train tvmonitor"
    )
    assert " ".join(VOC.classes) == f"background {objects}" and sorted(objects.split()) == objects.split()
    known = {0: (0, 0, 0), 1: (128, 0, 0), 6: (0, 128, 128), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert {label: VOC.palette[label] for label in known} == known
    assert palette(256)[255] == (224, 224, 192) and len(set(palette(256))) == 256


def test_missing_data_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        VOC(root=str(tmp_path / "nowhere"))
    text = str(error.value)
    archive = ("VOCtrainval_11-May-2012.tar", "seglight data prepare voc")
    for words in (*archive, "nowhere/VOCdevkit/VOC2012", "data.root", "seglight data sample --format voc"):
        assert words in text


def test_a_missing_list_names_those_there(devkit):
    with pytest.raises(FileNotFoundError, match=r"minival\.txt.*train, trainval, val"):
        VOC(root=str(devkit), train_split="minival").dataset("train")


def test_lists_as_windows_writes_them(devkit):
    lines = "".join(f"{name} \r\n" for name in LISTS["train"])
    (devkit / "ImageSets/Segmentation/mine.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert VOC(str(devkit), train_split="mine").dataset("train").ids == LISTS["train"]


def test_lists_of_paths_as_deeplab_has_them(devkit):
    lines = "".join(f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in LISTS["train"])
    (devkit / "ImageSets/Segmentation/mine.txt").write_text(lines)
    data = VOC(str(devkit), train_split="mine").dataset("train")
    assert data.ids == LISTS["train"]
    data.check(21)
    (devkit / "ImageSets/Segmentation/mine.txt").write_text(f"{lines}/JPEGImages/{LISTS['val'][0]}.jpg x.png\n")
    with pytest.raises(DataError, match="1 of the training samples are also in the val split"):
        VOC(str(devkit), train_split="mine").dataset("train")
    with pytest.raises(DataError, match=r"of the training samples are also in the test split.*data\.test_split"):
        VOC(str(devkit), test_split="train").dataset("train")


def test_the_name_of_a_text_file_does_not_matter(devkit, monkeypatch, tmp_path):
    (tmp_path / "sbd_mine.txt").write_text("\n".join(LISTS["train"]))
    monkeypatch.chdir(tmp_path)
    assert VOC(str(devkit), train_split="sbd_mine.txt").dataset("train").ids == LISTS["train"]


def test_training_on_validation_images_is_refused(devkit):
    module = VOC(root=str(devkit), train_split="trainval")
    with pytest.raises(DataError, match=r"1 of the training samples.*2008_000003"):
        module.dataset("train")
    assert len(module.dataset("val")) == 1


def test_masks_of_another_folder(devkit):
    other = devkit / "SegmentationClassAug"
    other.mkdir()
    for name in LISTS["train"]:
        Image.fromarray(np.full((30, 41), 7, np.uint8)).save(other / f"{name}.png")
    data = VOC(root=str(devkit), masks="SegmentationClassAug").dataset("train")
    assert np.unique(data.read(1)[1]).tolist() == [7]


def test_the_real_files(real_data):
    module = VOC(root=str(real_data / "voc2012"))
    train, val = module.dataset("train"), module.dataset("val")
    assert (len(train), len(val)) == (467, 160) and not set(train.ids) & set(val.ids)
    val.check(module.num_classes)
    seen = np.zeros(256, bool)
    for index in range(len(val)):
        seen[val.values(index)] = True
    assert set(np.flatnonzero(seen)) <= {*range(21), 255} and seen[255]
    assert not seen[VOC.classes.index("bus")], "the sample has no bus in val"
    with Image.open(val.mask_paths[0]) as picture:
        assert tuple(tuple(picture.getpalette()[3 * k : 3 * k + 3]) for k in range(21)) == VOC.palette
