"""Cityscapes: label ids, fine and coarse parts, archives as downloaded, and the files of `data sample`."""

import shutil

import numpy as np
import pytest
from PIL import Image

from seglight.data.archive import Member
from seglight.data.cityscapes import ARCHIVES, BLACK, CLASSES, COUNTS, Cityscapes, CityscapesInstances
from seglight.data.findings import DataError
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


@pytest.mark.fidelity
def test_published_counts():
    assert {split: sum(cities.values()) for split, cities in COUNTS.items()} == {
        "train": 2975,
        "val": 500,
        "test": 1525,
    }
    assert {split: len(cities) for split, cities in COUNTS.items()} == {"train": 18, "val": 3, "test": 6}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same dataset with all its parts, unpacked and in archives."""
    counts = {"train": 3, "val": 2, "test": 2, "train_extra": 2}
    drawn = iter(split_scenes("train", sum(counts.values()), 0, (64, 72)))
    scenes = {split: [next(drawn) for _ in range(count)] for split, count in counts.items()}
    folder = tmp_path_factory.mktemp("cityscapes")
    for name in ("plain", "zipped"):
        write_cityscapes(folder / name, scenes, coarse=True, plates=True, zipped=name == "zipped")
    return folder


def test_archives_hold_what_the_site_offers(whole):
    assert {path.name for path in (whole / "zipped").iterdir()} == {
        name for names in ARCHIVES.values() for name in names
    }


@pytest.mark.parametrize("labels", ["fine", "coarse", "fine+coarse"])
def test_archives_and_folders_give_the_same(whole, labels):
    plain, zipped = (
        Cityscapes(root=str(whole / name), train_labels=labels, test_split="test") for name in ("plain", "zipped")
    )
    used = []
    for split in ("train", "val", "test"):
        a, b = plain.dataset(split), zipped.dataset(split)
        assert a.ids == b.ids and all(isinstance(path, Member) for path in (*b.image_paths, *b.mask_paths))
        b.check(19)
        for i in range(len(a)):
            assert all(np.array_equal(x, y) for x, y in zip(a.read(i), b.read(i), strict=True))
        archives = b.fingerprint().pop("archives")
        assert b.fingerprint() == {**a.fingerprint(), "archives": archives}
        used += archives
    fine = {"leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"}
    assert set(used) == (fine if labels == "fine" else {*fine, "gtCoarse.zip", "leftImg8bit_trainextra.zip"})


def test_objects_from_archives(whole):
    plain, zipped = (CityscapesInstances(root=str(whole / name)) for name in ("plain", "zipped"))
    for split in ("train", "val"):
        a, b = plain.dataset(split), zipped.dataset(split)
        b.check(8)
        for i in range(len(a)):
            x, y = a.objects(i), b.objects(i)
            assert np.array_equal(x.boxes, y.boxes) and np.array_equal(x.labels, y.labels) and len(x)
        assert b.fingerprint()["archives"] == ["gtFine_trainvaltest.zip", "leftImg8bit_trainvaltest.zip"]


def test_what_is_unpacked_counts_before_an_archive(whole, tmp_path):
    root = shutil.copytree(whole / "zipped", tmp_path / "both")
    shutil.copytree(whole / "plain/gtFine/val", root / "gtFine/val")
    data = Cityscapes(root=str(root))
    assert data.dataset("val").fingerprint()["archives"] == ["leftImg8bit_trainvaltest.zip"]
    assert len(data.dataset("train").fingerprint()["archives"]) == 2
    next((root / "gtFine/val").glob("*/*_labelIds.png")).unlink()
    with pytest.raises(DataError, match=r"1 images without a mask.*remove what is unpacked"):
        data.dataset("val")


def test_licence_plates_belong_to_nothing(whole):
    module = CityscapesInstances(root=str(whole / "plain"))
    data, seen = module.dataset("train"), 0
    for i in range(len(data)):
        numbers = data.parts[0].numbers(i)
        plate = numbers == 65535
        seen += plate.sum()
        labels = np.array(Image.open(str(data.parts[0].mask_paths[i]).replace("instanceIds", "labelIds")))
        assert np.array_equal(plate, labels == 255) and (data.parts[0].read(i)[1][plate] == 255).all()
        covered = np.zeros(plate.shape, bool)
        for one in data.objects(i).segmentations:
            covered[one.top : one.top + one.mask.shape[0], one.left : one.left + one.mask.shape[1]] |= one.mask
        assert not (covered & plate).any()
    assert seen


def test_coarse_training_leaves_out_the_black_image(whole):
    assert (whole / f"plain/leftImg8bit/train_extra/troisdorf/{BLACK}_leftImg8bit.png").is_file()
    for kind, count in (("coarse", 5), ("fine+coarse", 5)):
        ids = Cityscapes(root=str(whole / "plain"), train_labels=kind).dataset("train").ids
        assert len(ids) == count and BLACK not in ids and sum("troisdorf" in name for name in ids) == 1


@pytest.mark.parametrize("place", ["plain", "zipped"])
def test_the_test_split_has_no_labels(whole, tmp_path, place):
    stubs = Cityscapes(root=str(whole / place), test_split="test").dataset("test")
    assert len(stubs) == 2 and all((stubs.read(i)[1] == 255).all() for i in range(2))
    root = shutil.copytree(whole / place, tmp_path / "copy")
    if place == "plain":
        shutil.rmtree(root / "gtFine/test")
    else:
        (root / "gtFine_trainvaltest.zip").unlink()
    data = Cityscapes(root=str(root), test_split="test").dataset("test")
    data.check(19)
    assert data.ids == stubs.ids and data.mask_paths == [None, None]
    for i in range(2):
        assert all(np.array_equal(a, b) for a, b in zip(data.read(i), stubs.read(i), strict=True))
    objects = CityscapesInstances(root=str(root), test_split="test").dataset("test")
    objects.check(8)
    assert [len(objects.objects(i)) for i in range(2)] == [0, 0] and objects.image(0).shape == (64, 72, 3)


def test_incomplete_data_is_told_and_used(whole, caplog):
    Cityscapes(root=str(whole / "plain"), train_labels="fine+coarse").dataset("train")
    assert [record.getMessage() for record in caplog.records] == [
        "Cityscapes gtFine/train has 3 of the 2,975 published samples: aachen 2 of 174, bochum 0 of 96, bremen 0 of "
        "316 and 15 more. Scores do not compare with published ones.",
        "Cityscapes gtCoarse/train_extra has 2 of the 19,997 published samples. Scores do not compare with published "
        "ones.",
    ]


def test_all_missing_parts_are_named(whole, tmp_path):
    root = tmp_path / "empty"
    (root / "leftImg8bit").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as error:
        Cityscapes(root=str(root)).dataset("train")
    for words in ("leftImg8bit/train (", "gtFine/train (", "leftImg8bit_trainvaltest.zip", "account at"):
        assert words in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"no leftImg8bit/test \(") as error:
        Cityscapes(root=str(root), test_split="test").dataset("test")
    assert "gtFine/test" not in str(error.value)
    (root / "leftImg8bit/val/frankfurt").mkdir(parents=True)
    shutil.copytree(whole / "plain/gtFine/val", root / "gtFine/val")
    with pytest.raises(DataError, match=r"leftImg8bit/val holds no CITY"):
        Cityscapes(root=str(root)).dataset("val")
    for split in ("train", "train_extra"):
        with pytest.raises(DataError, match="cannot be validated on"):
            Cityscapes(root=str(whole / "plain"), train_labels="coarse", test_split=split)
