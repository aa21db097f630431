"""Several datasets as one training set."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import Blocks

from seglight.data import (
    SBD,
    VOC,
    Cityscapes,
    COCOSemantic,
    COCOStuff,
    Folder,
    Mixed,
    PascalContext,
    Shapes,
    ShapesInstances,
)
from seglight.data.cache_write import plan, write
from seglight.data.findings import DataError
from seglight.data.formats import (
    write_cityscapes,
    write_cocostuff,
    write_context,
    write_folder,
    write_sbd,
    write_voc,
)
from seglight.data.scenes import split_scenes

SIZE = (64, 72)
SCENES = {"train": list(split_scenes("train", 5, 0, SIZE)), "val": list(split_scenes("val", 3, 0, SIZE))}
OTHERS = {"train": list(split_scenes("train", 4, 7, SIZE)), "val": list(split_scenes("val", 2, 7, SIZE))}
OPTIONS = {"batch_size": 3, "crop": 32, "workers": 0, "seed": 1}


@pytest.fixture
def roots(tmp_path):
    write_folder(tmp_path / "one", SCENES)
    write_folder(tmp_path / "two", OTHERS)
    return tmp_path


def folders(roots, **options):
    return {name: Folder(str(roots / name), **options) for name in ("one", "two")}


def test_all_parts_train_and_the_first_is_judged(roots):
    parts = folders(roots)
    data = Mixed(parts, **OPTIONS)
    train = data.split("train")
    names = [f"one/scene_000{i}" for i in range(5)] + [f"two/scene_000{i}" for i in range(4)]
    assert train.ids == names and len(train) == 9
    for index, scene in enumerate([*SCENES["train"], *OTHERS["train"]]):
        image, mask = train.read(index)
        assert np.array_equal(image, scene.image) and np.array_equal(mask, scene.mask)
    for split in ("val", "test"):
        assert [name.split("/")[-1] for name in data.split(split).ids] == ["scene_0005", "scene_0006", "scene_0007"]
        assert np.array_equal(data.split(split).read(0)[1], SCENES["val"][0].mask)
    assert data.classes == parts["one"].classes and data.palette == parts["one"].palette and data.num_classes == 8
    other = Mixed(parts, evaluate="two", **OPTIONS)
    assert np.array_equal(other.split("val").read(1)[1], OTHERS["val"][1].mask)
    train.check(8)
    data.prepare_data()
    found = data.fingerprint()
    assert found["train"]["samples"] == 9 and found["train"]["parts"]["two"]["samples"] == 4


def test_repeats_show_a_part_more_often_each_time_anew(roots):
    data = Mixed(folders(roots), repeats={"two": 3}, **OPTIONS)
    train = data.split("train")
    assert len(train) == 5 + 3 * 4 == len(set(train.ids))
    assert (
        train.ids[5] == "two/scene_0000" and train.ids[9] == "two/scene_0000#2" and train.ids[16] == "two/scene_0003#3"
    )
    assert all(np.array_equal(train.read(5)[1], train.read(index)[1]) for index in (9, 13))
    make = data.train_builder()
    once, again = (make([(0, index)])["image"] for index in (5, 9))
    assert not (once == again).all()
    assert train.fingerprint()["parts"]["two"]["repeats"] == 3
    sampled = [name for batch in data.train_batches(17) for name in batch["image_id"]]
    assert sorted(sampled) == sorted(train.ids * 3), "passes over the data have every sample as often as it is there"


def renumbered(root, order):
    """The masks of a folder with their classes in another order."""
    names = (root / "classes.txt").read_text().split()
    table = np.full(256, 255, np.uint8)
    table[order] = np.arange(len(order))
    for path in root.glob("*/masks/*.png"):
        Image.fromarray(table[np.array(Image.open(path))]).save(path)
    (root / "classes.txt").write_text("\n".join(names[label] for label in order))


def test_classes_are_matched_by_name(roots):
    renumbered(roots / "two", [3, 0, 7, 1, 2, 4, 6, 5])
    data = Mixed(folders(roots), **OPTIONS)
    train = data.split("train")
    for index, scene in enumerate(OTHERS["train"]):
        assert np.array_equal(train.read(5 + index)[1], scene.mask)
    judged = Mixed(folders(roots), evaluate="two", **OPTIONS)
    assert judged.classes[0] == data.classes[3]
    found = judged.split("train").read(0)[1]
    both = {(int(a), int(b)) for a, b in zip(found.flat, SCENES["train"][0].mask.flat, strict=True)}
    assert all(a == b == 255 or judged.classes[a] == data.classes[b] for a, b in both) and len(both) > 3


def test_names_that_differ(roots):
    file = roots / "two/classes.txt"
    old = file.read_text().split()
    file.write_text(file.read_text().replace(old[2], "pyramid").replace(old[5], "rod"))
    with pytest.raises(ValueError, match=rf"data\.parts\.two .*: pyramid, rod\. Say in data\.rename\.two.*{old[2]}"):
        Mixed(folders(roots), **OPTIONS)
    rename = {"two": {"pyramid": old[2], "rod": "ignore"}}
    train = Mixed(folders(roots), rename=rename, **OPTIONS).split("train")
    for index, scene in enumerate(OTHERS["train"]):
        expected = np.where(scene.mask == 5, 255, scene.mask)
        assert np.array_equal(train.read(5 + index)[1], expected)
    with pytest.raises(ValueError, match=r"rename\.two: cone is no class of two"):
        Mixed(folders(roots), rename={"two": {"cone": old[2]}}, **OPTIONS)
    with pytest.raises(ValueError, match=r"pyramid \(renamed nothing\)"):
        Mixed(folders(roots), rename={"two": {"pyramid": "nothing", "rod": "ignore"}}, **OPTIONS)


def test_a_value_that_is_no_label_does_not_become_one(roots):
    renumbered(roots / "two", [3, 0, 7, 1, 2, 4, 6, 5])
    path = roots / "two/train/masks/scene_0000.png"
    Image.fromarray(np.full(SIZE, 99, np.uint8)).save(path)
    train = Mixed(folders(roots), **OPTIONS).split("train")
    with pytest.raises(DataError, match=r"(?s)^two: .*values 99 in the masks.*scene_0000\.png"):
        train.check(8)
    assert np.unique(train.read(5)[1]).tolist() == [254]
    (roots / "one/train/images/scene_0001.png").unlink()
    with pytest.raises(DataError, match=r"(?s)one: .*missing.*two: .*values 99"):
        train.check(8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": {}}, "data.parts is empty"),
        ({"evaluate": "three"}, "data.evaluate names three; the parts are one, two"),
        ({"repeats": {"three": 2}}, "data.repeats names three"),
        ({"rename": {"three": {}}}, "data.rename names three"),
        ({"repeats": {"two": 0}}, "at least 1"),
    ],
)
def test_wrong_options(roots, options, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        Mixed(**{"parts": folders(roots), **options}, **OPTIONS)
    with pytest.raises(ValueError, match="a/b cannot be a name"):
        Mixed({"a/b": Folder(str(roots / "one"))})


# ---------------------------------------------------------------- leaks


def test_training_on_what_another_part_is_judged_by(tmp_path):
    """PASCAL-Context trains on images that VOC validates on; all three share the names of VOC."""
    root = write_sbd(tmp_path / "voc", SCENES)
    write_context(tmp_path / "context", SCENES)
    voc = VOC(str(root), train_split="trainaug")
    assert len(Mixed({"voc": voc, "again": VOC(str(root))}, **OPTIONS).split("train")) > len(voc.split("train"))
    name = voc.split("val").ids[0]
    with pytest.raises(DataError, match=rf"validation split of voc has pictures.*1 samples of sbd: sbd/{name}"):
        Mixed({"voc": voc, "sbd": SBD(str(root))}, **OPTIONS).split("train")
    rename = {"context": dict.fromkeys(PascalContext(str(tmp_path / "context")).classes[1:], "ignore")}
    mixed = Mixed({"voc": voc, "context": PascalContext(str(tmp_path / "context"))}, rename=rename, **OPTIONS)
    lists = tmp_path / "context/VOCdevkit/VOC2010"
    first = mixed.parts["context"].dataset("train").ids[0]
    mixed.split("train")
    for path in (lists / f"JPEGImages/{first}.jpg", tmp_path / f"context/trainval/{first}.mat"):
        path.rename(path.with_stem(name))
    text = (lists / "ImageSets/Main/train.txt").read_text().replace(first, name)
    (lists / "ImageSets/Main/train.txt").write_text(text)
    mixed = Mixed({"voc": voc, "context": PascalContext(str(tmp_path / "context"))}, rename=rename, **OPTIONS)
    with pytest.raises(DataError, match=rf"context/{name}"):
        mixed.split("train")


def test_folders_are_compared_by_file(roots):
    """Equal names in two folders are different pictures, the same file is the same picture."""
    whole = {"images": "{split}/images", "masks": "{split}/masks"}
    lists = {"train.txt": [f"scene_000{i}" for i in (0, 1, 2)], "val.txt": ["scene_0003"]}
    for name, lines in lists.items():
        (roots / "one" / name).write_text("\n".join(lines))
    for kind in ("images", "masks"):
        (roots / "one/val" / kind / "scene_0003.png").symlink_to(roots / "one/train" / kind / "scene_0003.png")
    part = Folder(str(roots / "one"), images="train/images", masks="train/masks", lists="{split}.txt")
    assert len(Mixed({"part": part, "two": Folder(str(roots / "two"), **whole)}, **OPTIONS).split("train")) == 7
    leaking = Folder(str(roots / "one"), **whole)
    with pytest.raises(DataError, match=r"1 samples of all: all/scene_0003"):
        Mixed({"part": part, "all": leaking}, **OPTIONS).split("train")


def test_pictures_of_the_test_split_are_as_much_refused(roots):
    """Those of a part's own test split that another part trains on."""
    (roots / "one/test").mkdir()
    for kind in ("images", "masks"):
        (roots / "one/test" / kind).mkdir()
        (roots / "one/test" / kind / "last.png").symlink_to(next((roots / "two/train" / kind).iterdir()))
    whole = {"images": "{split}/images", "masks": "{split}/masks"}
    one, two = (Folder(str(roots / name), **whole) for name in ("one", "two"))
    with pytest.raises(DataError, match=r"the test split of one has pictures.*1 samples of two: two/"):
        Mixed({"one": one, "two": two}, **{**OPTIONS, "evaluate": "one"}).split("train")


# ---------------------------------------------------------------- in use


@pytest.mark.parametrize("way", ["links", "relative", "files"])
def test_a_file_is_the_same_however_it_is_reached(roots, monkeypatch, way):
    other = roots / "other"
    for kind in ("images", "masks"):
        (other / "train").mkdir(parents=True, exist_ok=True)
        if way == "files":
            (other / "train" / kind).mkdir()
            for path in (roots / "one/val" / kind).iterdir():
                (other / "train" / kind / path.name).symlink_to(path)
        else:
            (other / "train" / kind).symlink_to(roots / "one/val" / kind)
    (other / "val").symlink_to(roots / "one/train")
    (other / "classes.txt").write_bytes((roots / "one/classes.txt").read_bytes())
    monkeypatch.chdir(roots)
    names = ("one", "other") if way == "relative" else (str(roots / "one"), str(other))
    with pytest.raises(DataError, match=r"3 samples of two"):
        Mixed({"one": Folder(names[0]), "two": Folder(names[1])}, **OPTIONS).split("train")
    with pytest.raises(DataError, match=r"samples of two"):
        options = {"images": "val/images", "masks": "val/masks"}
        Mixed({"one": Folder(str(roots / "one")), "two": Folder("one", **options)}, **OPTIONS).split("train")


def test_members_of_an_archive_are_compared(tmp_path):
    write_cityscapes(tmp_path / "cs", SCENES, zipped=True)
    (tmp_path / "link").symlink_to(tmp_path / "cs")
    parts = {name: Cityscapes(str(tmp_path / name)) for name in ("cs", "link")}
    parts["link"].parts["train"] = parts["cs"].parts["val"]
    with pytest.raises(DataError, match="3 samples of link"):
        Mixed(parts, **OPTIONS).split("train")


def test_batches_are_the_same_in_worker_processes(roots):
    renumbered(roots / "two", [3, 0, 7, 1, 2, 4, 6, 5])
    whole = list(Mixed(folders(roots), **OPTIONS).train_batches(5))
    assert {name.split("/")[0] for batch in whole for name in batch["image_id"]} == {"one", "two"}
    for workers in (1, 2):
        found = list(Mixed(folders(roots), **{**OPTIONS, "workers": workers}).train_batches(5))
        for a, b in zip(whole, found, strict=True):
            assert (
                a["image_id"] == b["image_id"] and (a["image"] == b["image"]).all() and (a["mask"] == b["mask"]).all()
            )
    data = Mixed(folders(roots), repeats={"one": 2}, **OPTIONS).split("train")
    copy = pickle.loads(pickle.dumps(data))
    assert copy.ids == data.ids and np.array_equal(copy.read(13)[1], data.read(13)[1])


def test_mixtures_may_be_parts(roots, tmp_path):
    write_folder(tmp_path / "three", {"train": OTHERS["val"], "val": OTHERS["train"]})
    inner = Mixed(folders(roots), **OPTIONS)
    data = Mixed({"three": Folder(str(tmp_path / "three")), "mix": inner}, **OPTIONS).split("train")
    assert len(data) == 2 + 9 and data.ids[-1] == "mix/two/scene_0003"
    assert np.array_equal(data.read(10)[1], OTHERS["train"][3].mask)


def test_a_mixture_from_a_cache_leaks_as_well(tmp_path):
    write_voc(tmp_path / "voc", SCENES)
    turned = {"train_split": "val", "val_split": "train", "test_split": "train"}

    def inner(**options):
        return Mixed({"voc": VOC(str(tmp_path / "voc"), **turned)}, **OPTIONS, **options)

    data = {split: inner().dataset(split) for split in ("train",)}
    write(plan(data, list(VOC.classes), tmp_path / "cache"), tmp_path / "cache")
    for part in (inner(), inner(cache=str(tmp_path / "cache"))):
        with pytest.raises(DataError, match="3 samples of both"):
            Mixed({"judge": VOC(str(tmp_path / "voc")), "both": part}, **OPTIONS).split("train")


def test_coco_is_compared_by_number_whatever_its_ids_look_like(tmp_path):
    write_cocostuff(tmp_path, SCENES)
    turned = {"train_split": "val2017", "val_split": "train2017", "test_split": "train2017"}
    parts = {
        "stuff": COCOStuff(str(tmp_path)),
        "things": COCOSemantic(str(tmp_path), classes="coco", min_pixels=0, **turned),
    }
    with pytest.raises(DataError, match="3 samples of things"):
        Mixed(parts, rename={"things": {"background": "ignore"}}, **OPTIONS).split("train")


def test_datasets_of_objects_are_refused():
    with pytest.raises(ValueError, match=r"data\.parts: objects has no pixel labels"):
        Mixed({"shapes": Shapes(**OPTIONS), "objects": ShapesInstances()}, **OPTIONS)


def test_generated_parts():
    data = Mixed({"a": Blocks(), "b": Blocks(val_size=2)}, evaluate="b", **OPTIONS)
    assert len(data.split("train")) == 16 and len(data.split("val")) == 2


def test_fine_and_coarse_cityscapes(tmp_path):
    from seglight.data import Cityscapes

    root = write_cityscapes(tmp_path / "cityscapes", SCENES)
    parts = {"fine": Cityscapes(str(root)), "again": Cityscapes(str(root))}
    data = Mixed(parts, repeats={"fine": 2}, **OPTIONS)
    assert len(data.split("train")) == 15 and data.num_classes == 19 and len(data.split("val")) == 3


CONFIG = """
data:
  class_path: Mixed
  init_args:
    parts:
      voc:
        class_path: VOC
        init_args: {root: ROOT/voc}
      own:
        class_path: Folder
        init_args: {root: ROOT/one}
    repeats: {voc: 2}
    rename: RENAME
    batch_size: 2
    crop: 48
    workers: 1
model: SMP
model.arch: Unet
model.encoder: resnet18
trainer.max_steps: 2
trainer.accelerator: cpu
"""


@pytest.mark.slow
def test_a_run_from_yaml(roots, tmp_path):
    write_voc(tmp_path / "voc", SCENES)
    names = (roots / "one/classes.txt").read_text().split()
    rename = {"own": {name: VOC.classes[i] for i, name in enumerate(names)}}
    text = CONFIG.replace("ROOT", str(tmp_path)).replace("RENAME", yaml.dump(rename, default_flow_style=True).strip())
    (tmp_path / "mix.yaml").write_text(text)
    command = [sys.executable, "-m", "seglight", "fit", "-c", "mix.yaml", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "own" in (tmp_path / "run/data.json").read_text()


def test_the_experiment_with_coco_is_a_mixture(capsys):
    from seglight.cli.experiment import main

    file = Path(__file__).parents[1] / "experiments/voc/dilation_front.yaml"
    with pytest.raises(SystemExit) as done:
        main(["fit", "-c", str(file), "--print_config"])
    assert not done.value.code
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["class_path"].endswith("Mixed") and list(data["init_args"]["parts"]) == ["voc", "coco"]
    assert data["init_args"]["parts"]["voc"]["init_args"]["train_split"] == "trainaug"
    assert data["init_args"]["batch_size"] == 14
