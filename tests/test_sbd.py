"""SBD's MATLAB files, trainaug, seg11valid, and what must not be trained on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from seglight.cli.data import main
from seglight.data import SBD, VOC, VOCInstances
from seglight.data.decode import read_mask
from seglight.data.findings import DataError
from seglight.data.formats.sbd import sbd_classes, write_sbd
from seglight.data.scenes import VOID, split_scenes

SIZE = (64, 72)
TRAIN, VAL = list(split_scenes("train", 12, 0, SIZE)), list(split_scenes("val", 4, 0, SIZE))


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.delenv("SEGLIGHT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return write_sbd(tmp_path / "sbd", {"train": TRAIN, "val": VAL})


def lists(root):
    voc, sbd = root / "VOCdevkit/VOC2012/ImageSets/Segmentation", root / "benchmark_RELEASE/dataset"
    files = {"train": voc / "train.txt", "val": voc / "val.txt", "sbd": sbd / "train.txt", "sbd_val": sbd / "val.txt"}
    return {name: file.read_text().split() for name, file in files.items()}


def scene_of(name, root):
    """The scene that a name of the miniature shows: numbers go up by 7."""
    number = (int(name.split("_")[1]) - 32) // 7
    return [*TRAIN, *VAL][number]


# ---------------------------------------------------------------- the files


@pytest.mark.fidelity
def test_the_miniature_is_as_the_archive_unpacks(root):
    sbd, names = root / "benchmark_RELEASE/dataset", lists(root)
    for name in names["sbd"] + names["sbd_val"]:
        one = scene_of(name, root)
        content = loadmat(sbd / f"cls/{name}.mat")["GTcls"]
        classes = content[0]["Segmentation"][0]  # as the SBD page shows it
        assert classes.dtype == np.uint8 and 255 not in classes and np.array_equal(classes, sbd_classes(one))
        known = one.mask != VOID
        assert np.array_equal(classes[known], one.mask[known])
        assert (~known).any() or not one.objects
        assert content["CategoriesPresent"][0, 0].ravel().tolist() == sorted(set(classes.ravel().tolist()) - {0})
        objects = loadmat(sbd / f"inst/{name}.mat")["GTinst"]
        numbers, categories = objects[0]["Segmentation"][0], objects[0]["Categories"][0]
        for number in range(1, len(categories) + 1):
            assert set(classes[numbers == number].tolist()) == {int(categories[number - 1, 0])}
        assert (sbd / f"img/{name}.jpg").is_file()
    assert set(names["sbd"]) & set(names["val"]) and set(names["sbd_val"]) & set(names["val"]), "the traps"
    assert set(names["sbd"]) & set(names["train"]), "an overlap"
    assert not set(names["sbd"]) & set(names["sbd_val"])


def test_data_sample_and_its_command(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["sample", "--format", "sbd", str(out), "--train", "3", "--val", "2", "--size", "48", "50"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "--data VOC" in printed and "--data.train_split trainaug" in printed
    assert len(VOC(root=str(out), train_split="trainaug").dataset("train")) == 3
    assert main(["sample", "--format", "sbd", str(tmp_path / "one"), "--train", "1", "--val", "1"]) == 0
    assert len(VOC(root=str(tmp_path / "one"), train_split="trainaug").dataset("train")) == 1


# ---------------------------------------------------------------- trainaug


@pytest.mark.fidelity
def test_trainaug_is_the_union_without_val(root):
    names = lists(root)
    data = VOC(root=str(root), train_split="trainaug")
    train = data.dataset("train")
    expected = (set(names["train"]) | set(names["sbd"]) | set(names["sbd_val"])) - set(names["val"])
    assert train.ids == sorted(expected) and len(train) == 12 > len(names["train"])
    train.check(21)
    for index, name in enumerate(train.ids):
        one, (image, mask) = scene_of(name, root), train.read(index)
        own = name in names["train"]
        assert np.array_equal(mask, one.mask if own else sbd_classes(one)), "VOC's masks win"
        assert (255 in mask) == own and mask.dtype == np.uint8
        assert np.abs(image.astype(int) - one.image).mean() < 8
    assert any(name in names["sbd"] for name in names["train"]), "one of them is in both"
    folders = {path.parent.name for path in train.image_paths}
    assert folders == {"img", "JPEGImages"}, "pictures of SBD where VOC has none"
    assert np.array_equal(data.dataset("val").read(0)[1], VAL[0].mask)


def test_a_mask_that_voc_has_beyond_its_lists_wins_too(root):
    name = next(one for one in lists(root)["sbd_val"] if one not in lists(root)["val"])
    path = root / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png"
    Image.fromarray(np.full(SIZE, 7, np.uint8)).save(path)
    data = VOC(root=str(root), train_split="trainaug").dataset("train")
    assert np.unique(data.read(data.ids.index(name))[1]).tolist() == [7]


def test_a_mask_that_voc_should_have_is_missed(root):
    name = next(one for one in lists(root)["sbd"] if one in lists(root)["train"])
    (root / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png").unlink()
    with pytest.raises(DataError, match=rf"(?s)missing.*SegmentationClass/{name}\.png"):
        VOC(root=str(root), train_split="trainaug").dataset("train").check(21)


@pytest.mark.fidelity
def test_the_official_count_is_held(root, caplog):
    """Lists of the official sizes that do not give 10,582 were changed."""
    voc, sbd = root / "VOCdevkit/VOC2012/ImageSets/Segmentation", root / "benchmark_RELEASE/dataset"
    train, val = [f"t{i}" for i in range(1464)], [f"v{i}" for i in range(1449)]
    only = [f"s{i}" for i in range(9118)]
    both = [*only, *train[:1032], *val[:1205]]  # 11,355
    parts = {
        voc / "train.txt": train,
        voc / "val.txt": val,
        sbd / "train.txt": both[:8498],
        sbd / "val.txt": both[8498:],
    }
    for path, names in parts.items():
        path.write_text("\n".join(names))
    assert len(both) == 11355
    with caplog.at_level("INFO"):
        data = VOC(root=str(root), train_split="trainaug").dataset("train")
    assert len(data) == 10582 == 1464 + 9118
    assert "trainaug: 10582 images (VOC train 1464, VOC val 1449, SBD train 8498, SBD val 2857" in caplog.text
    assert "Scores do not compare" not in caplog.text
    (sbd / "val.txt").write_text("\n".join([*both[8498:-1], "new"]))
    with pytest.raises(DataError, match="trainaug has 10583 images, but the official lists give 10582"):
        VOC(root=str(root), train_split="trainaug").dataset("train")


def test_other_counts_are_reported(root, caplog):
    with caplog.at_level("INFO"):
        VOC(root=str(root), train_split="trainaug").dataset("train")
    assert "trainaug: 12 images" in caplog.text
    assert "VOC trainaug has 12 of the 10,582 published samples" in caplog.text


@pytest.mark.parametrize(
    "place", ["benchmark_RELEASE", "VOCdevkit/benchmark_RELEASE", "VOCdevkit/VOC2012/sbd", "../data/sbd", "env"]
)
def test_where_sbd_is_found(root, place, monkeypatch, tmp_path):
    target = tmp_path / "home/sbd" if place == "env" else root / place
    if place == "env":
        monkeypatch.setenv("SEGLIGHT_DATA", str(tmp_path / "home"))
    if place != "benchmark_RELEASE":
        whole = root / "benchmark_RELEASE"
        target.parent.mkdir(parents=True, exist_ok=True)
        (whole if target.name == "benchmark_RELEASE" else whole / "dataset").rename(target)
    for voc in (root, root / "VOCdevkit", root / "VOCdevkit/VOC2012"):
        assert len(VOC(root=str(voc), train_split="trainaug").dataset("train")) == 12


def test_relative_paths(root, monkeypatch):
    """What the check reports needs a common folder of VOC's files and SBD's."""
    monkeypatch.chdir(root)
    for options in (
        {"root": "VOCdevkit"},
        {"root": ".", "sbd": "benchmark_RELEASE"},
        {"root": str(root / "VOCdevkit")},
    ):
        train = VOC(**options, train_split="trainaug").dataset("train")
        train.check(21)
        path = train.mask_paths[-1]
        content = path.read_bytes()
        path.write_bytes(b"")
        with pytest.raises(DataError, match=path.name):
            train.check(21)
        path.write_bytes(content)


def test_where_the_user_says_it_is(root, tmp_path):
    (root / "benchmark_RELEASE").rename(tmp_path / "elsewhere")
    for folder in (tmp_path / "elsewhere", tmp_path / "elsewhere/dataset"):
        assert len(VOC(root=str(root), train_split="trainaug", sbd=str(folder)).dataset("train")) == 12
    with pytest.raises(FileNotFoundError) as error:
        VOC(root=str(root), train_split="trainaug").dataset("train")
    text = str(error.value)
    for words in ("SBD is missing", "data.sbd", "benchmark.tgz", "seglight data prepare sbd", "trainaug.txt"):
        assert words in text
    with pytest.raises(FileNotFoundError, match=r"data\.sbd"):
        VOC(root=str(root), train_split="trainaug", sbd=str(tmp_path / "no")).dataset("train")


def test_the_files_of_other_toolboxes(root):
    voc = root / "VOCdevkit/VOC2012"
    shutil.rmtree(root / "benchmark_RELEASE")
    names = lists_of(voc / "ImageSets/Segmentation/train.txt")
    (voc / "ImageSets/Segmentation/trainaug.txt").write_text("\n".join(names[:3]))
    (voc / "SegmentationClassAug").mkdir()
    for name in (*names, *lists_of(voc / "ImageSets/Segmentation/val.txt")):
        Image.fromarray(np.full(SIZE, 9, np.uint8)).save(voc / f"SegmentationClassAug/{name}.png")
    found = VOC(root=str(root), train_split="trainaug")
    assert found.dataset("train").ids == names[:3] and np.unique(found.dataset("train").read(0)[1]).tolist() == [9]
    assert np.array_equal(found.dataset("val").read(0)[1], VAL[0].mask), "scores are those of VOC's masks"
    said = VOC(root=str(root), train_split="trainaug", masks="SegmentationClassAug")
    assert said.dataset("train").mask_paths == found.dataset("train").mask_paths
    with pytest.raises(FileNotFoundError, match=r"SegmentationClassOld \(data\.masks\)\. Leave data\.masks out"):
        VOC(root=str(root), masks="SegmentationClassOld")
    with pytest.raises(FileNotFoundError, match=r"data\.sbd"):
        VOC(root=str(root), train_split="trainaug", sbd="nowhere").dataset("train")


def lists_of(path):
    return path.read_text().split()


# ---------------------------------------------------------------- leaks


@pytest.mark.fidelity
def test_training_on_sbd_leaks_val_and_is_refused(root):
    leaked = sorted(set(lists(root)["sbd"]) & set(lists(root)["val"]))
    with pytest.raises(DataError, match=rf"1 of the training samples.*{leaked[0]}.*data\.train_split"):
        VOC(root=str(root), train_split="sbd_train").dataset("train")
    with pytest.raises(DataError, match="of the training samples are also"):
        VOC(root=str(root), train_split="sbd_val").dataset("train")
    with pytest.raises(DataError, match=leaked[0]):
        VOCInstances(root=str(root), train_split="sbd_train").dataset("train")


def test_a_trainaug_list_that_leaks_is_refused(root):
    voc = root / "VOCdevkit/VOC2012"
    (voc / "SegmentationClassAug").mkdir()
    names = lists(root)
    (voc / "ImageSets/Segmentation/trainaug.txt").write_text("\n".join([*names["train"], names["val"][2]]))
    with pytest.raises(DataError, match=rf"1 of the training samples.*{names['val'][2]}"):
        VOC(root=str(root), train_split="trainaug", masks="SegmentationClassAug").dataset("train")


# ---------------------------------------------------------------- seg11valid


@pytest.mark.fidelity
def test_fcn_protocol(root, caplog):
    names = lists(root)
    options = {"train_split": "sbd_train", "val_split": "seg11valid", "test_split": "seg11valid"}
    data = VOC(root=str(root), **options)
    train, val = data.dataset("train"), data.dataset("val")
    assert val.ids == [name for name in names["val"] if name not in names["sbd"]] == data.dataset("test").ids
    assert all(path.suffix == ".png" and path.parent.name == "SegmentationClass" for path in val.mask_paths)
    assert train.ids == names["sbd"] and all(path.suffix == ".mat" for path in train.mask_paths)
    assert "seg11valid has 3 of the 736 published samples" in caplog.text
    index = train.ids.index(next(name for name in names["sbd"] if name in names["train"]))
    assert 255 not in train.read(index)[1], "SBD's own masks, also where VOC has one"


def test_seg11valid_made_from_voc_2011(root):
    names = lists(root)
    voc = root / "VOCdevkit"
    (voc / "VOC2012/ImageSets/Segmentation/seg11valid.txt").unlink()
    options = {"train_split": "sbd_train", "val_split": "seg11valid"}
    with pytest.raises(FileNotFoundError, match=r"seg11valid\.txt.*VOC2011.*736 lines"):
        VOC(root=str(root), **options).dataset("val")
    (voc / "VOC2011/ImageSets/Segmentation").mkdir(parents=True)
    (voc / "VOC2011/ImageSets/Segmentation/val.txt").write_text("\n".join(names["val"][:3]))
    found = VOC(root=str(root), **options).dataset("val").ids
    assert found == [name for name in names["val"][:3] if name not in names["sbd"]] and len(found) == 2


def test_a_list_of_the_user(root, tmp_path):
    names = lists(root)
    (tmp_path / "mine.txt").write_text("\n".join(names["val"][1:3]))
    assert VOC(root=str(root), val_split=str(tmp_path / "mine.txt")).dataset("val").ids == names["val"][1:3]
    (tmp_path / "bad.txt").write_text(names["train"][0])
    with pytest.raises(DataError, match=names["train"][0]):
        VOC(root=str(root), val_split=str(tmp_path / "bad.txt"), train_split="trainaug").dataset("train")


@pytest.mark.fidelity
def test_the_real_seg11valid(real_data, caplog):
    """FCN's own list has 736 images; VOC's train list, as far as it is there, has none of them."""
    path = real_data / "pascal_context/pascal/seg11valid.txt"
    with caplog.at_level("WARNING"):
        data = VOC(root=str(real_data / "voc2012"), val_split=str(path))
        ids = data.files("val", "Class").ids
    assert len(ids) == len(set(ids)) == 736
    data.dataset("train")
    val = set(VOC(root=str(real_data / "voc2012")).dataset("val").ids)
    assert len(val & set(ids)) > 50, "seg11valid is a part of VOC 2012 val"


# ---------------------------------------------------------------- SBD alone, objects, faults


def test_sbd_alone(root):
    data = SBD(root=str(root))
    names = lists(root)
    train, val = data.dataset("train"), data.dataset("val")
    assert (train.ids, val.ids) == (names["sbd"], names["sbd_val"]) and data.num_classes == 21
    train.check(21)
    assert np.array_equal(val.read(0)[1], sbd_classes(scene_of(val.ids[0], root)))
    with pytest.raises(DataError, match=r"SBD: .* of the training samples"):
        SBD(root=str(root), val_split="train").dataset("train")
    with pytest.raises(FileNotFoundError, match=r"benchmark\.tgz.*--format sbd"):
        SBD(root=str(root / "VOCdevkit"))


def test_objects_of_both(root):
    pytest.importorskip("pycocotools")
    names = lists(root)
    data = VOCInstances(root=str(root), train_split="trainaug").dataset("train")
    assert len(data) == 12
    data.check(20)
    for index, name in enumerate(data.ids):
        one, objects = scene_of(name, root), data.objects(index)
        if name in names["train"]:
            continue
        numbers = loadmat(root / f"benchmark_RELEASE/dataset/inst/{name}.mat")["GTinst"][0]["Segmentation"][0]
        assert len(objects) == len(set(numbers.ravel().tolist()) - {0})
        expected = {(one.objects[n - 1].label - 1, int((numbers == n).sum())) for n in range(1, len(one.objects) + 1)}
        found = {(int(label), int(area)) for label, area in zip(objects.labels, objects.area, strict=True)}
        assert {pair for pair in expected if pair[1]} <= found


def test_faults_of_the_files(root):
    train = VOC(root=str(root), train_split="trainaug").dataset("train")
    mats = [path for path in train.mask_paths if path.suffix == ".mat"]
    savemat(mats[0], {"GTcls": {"Segmentation": np.full(SIZE, 21, np.uint8)}})
    savemat(mats[1], {"GTinst": {"Segmentation": np.zeros(SIZE, np.uint8)}})
    mats[2].write_bytes(mats[2].read_bytes()[:60])
    savemat(mats[3], {"GTcls": {"Segmentation": np.zeros((64, 71), np.uint8)}})
    with pytest.raises(DataError) as error:
        train.check(21)
    text = str(error.value)
    assert "values 21 in the masks" in text and "labels are 0..20" in text and f"{mats[0].name} (21)" in text
    assert "has no GTcls.Segmentation" in text and "not a readable MATLAB file" in text and "differ in size" in text
    assert "benchmark.tgz" in text and all(path.name in text for path in mats[:4])
    savemat(mats[0], {"GTcls": {"Segmentation": np.full(SIZE, 0.5)}})
    with pytest.raises(DataError, match="is float64 with 2 axes"):
        train.read(train.mask_paths.index(mats[0]))
    savemat(mats[0], {"GTcls": {"Segmentation": np.full(SIZE, 300, np.uint16)}})
    with pytest.raises(DataError, match="holds 300, but labels have 8 bits"):
        train.read(train.mask_paths.index(mats[0]))
    savemat(mats[0], {"GTcls": {"Segmentation": np.full(SIZE, 3, np.int32)}})
    assert np.unique(train.read(train.mask_paths.index(mats[0]))[1]).tolist() == [3]
    mats[0].unlink()
    with pytest.raises(DataError, match=r"(?s)missing.*cls/"):
        train.check(21)


def test_test_split_without_labels(root):
    voc = root / "VOCdevkit/VOC2012"
    shutil.copy(voc / "JPEGImages" / f"{lists(root)['val'][0]}.jpg", voc / "JPEGImages/2012_000001.jpg")
    (voc / "ImageSets/Segmentation/test.txt").write_text("2012_000001\n")
    data = VOC(root=str(root), test_split="test").dataset("test")
    data.check(21)
    assert np.unique(data.read(0)[1]).tolist() == [255]


def with_the_names_of_voc(folder):
    """The categories of the miniature are called as COCO calls VOC's classes."""
    from seglight.data.coco_semantic import VOC_NAMES

    for file in folder.glob("instances_*.json"):
        document = json.loads(file.read_text())
        ids = [one["id"] for one in document["categories"]]
        ids += range(100, 100 + len(VOC_NAMES) - len(ids))
        document["categories"] = [{"id": i, "name": name} for i, name in zip(ids, VOC_NAMES, strict=True)]
        file.write_text(json.dumps(document))


EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments/voc").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_recipes_load_from_the_official_files(root, path, tmp_path):
    from seglight.cli.datamodule import resolve
    from seglight.data.formats import write_coco

    coco = "data: ../_base/voc_coco.yaml" in path.read_text()
    words = ["--data.root", str(root)]
    if coco:
        pytest.importorskip("pycocotools")
        write_coco(tmp_path / "data/coco", {"train": TRAIN[:4], "val": VAL[:2]})
        with_the_names_of_voc(tmp_path / "data/coco/annotations")
        (tmp_path / "data/voc2012").symlink_to(root)
        (tmp_path / "data/sbd").symlink_to(root / "benchmark_RELEASE")
        words = []
    data = resolve(path, [*words, "--data.workers", "0"])
    train, val = data.split("train"), data.split("val")
    train.check(data.num_classes)
    assert len(train) >= 4 and len(val) >= 3 and train.read(0)[0].dtype == np.uint8


def test_read_mask_and_mat_agree(root):
    """The PNG and the MATLAB file of one image differ on borders only."""
    name = next(one for one in lists(root)["sbd"] if one in lists(root)["train"])
    png = read_mask(root / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png")
    mat = loadmat(root / f"benchmark_RELEASE/dataset/cls/{name}.mat", simplify_cells=True)["GTcls"]["Segmentation"]
    assert np.array_equal(png[png != 255], mat[png != 255])
