"""What `seglight data ...` understands as the name of a dataset."""

import json
from pathlib import Path

import pytest

from seglight.cli import data as command
from seglight.cli.datamodule import recognise, resolve
from seglight.data import COCO, VOC, CamVid, COCOFormat, Folder, Shapes, formats
from seglight.data.scenes import split_scenes

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder of each format."""
    out = tmp_path_factory.mktemp("formats")

    def splits():
        return {split: split_scenes(split, 3, 0, (64, 72)) for split in ("train", "val")}

    for name in ("voc", "coco", "cityscapes", "context", "folder"):
        getattr(formats, f"write_{name}")(out / name, splits())
    return out


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("voc", "VOC"),
        ("coco", "COCO"),
        ("cityscapes", "Cityscapes"),
        ("context", "PascalContext"),
        ("folder", "Folder"),
    ],
)
def test_a_folder_is_recognised_by_its_layout(folders, name, cls):
    """Each written format gives its own class, with three samples to validate on."""
    module = resolve(folders / name)
    assert type(module).__name__ == cls
    assert len(module.split("val")) == 3


def test_coco_files_under_other_names(folders, tmp_path):
    """Pairs of a folder and instances_FOLDER.json, or one json beside its images."""
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(folders / f"coco/{split}2017")
        (tmp_path / f"annotations/instances_{split}.json").symlink_to(
            folders / f"coco/annotations/instances_{split}2017.json"
        )
    module = resolve(tmp_path)
    assert type(module) is COCOFormat
    assert module.files["val"][0].name == "val"
    one = tmp_path / "one"
    one.mkdir()
    (one / "images").symlink_to(folders / "coco/train2017")
    (one / "all.json").symlink_to(folders / "coco/annotations/instances_train2017.json")
    assert recognise(one)["init_args"] == {"images": str(one / "images"), "annotations": str(one / "all.json")}


def test_an_unknown_folder_lists_what_it_holds(tmp_path):
    """And how to say what it is."""
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no layout of a known dataset.*pictures.*--data\.images"):
        resolve(tmp_path)


def test_an_experiment_and_a_part_with_overrides(folders):
    """Parts are relative to the experiment, the dataset's root to where the command is typed."""
    assert type(resolve(EXPERIMENTS / "shapes/quickstart.yaml")) is Shapes
    words = ["--data.root", str(folders / "voc"), "--data.train_split=train", "--data.val_split=val"]
    module = resolve(EXPERIMENTS / "voc/fcn8s.yaml", words)
    assert type(module) is VOC
    assert len(module.split("train")) == 3
    with pytest.raises(FileNotFoundError, match="camvid"):
        resolve(EXPERIMENTS / "_base/camvid.yaml", ["--data.root", str(folders / "camvid")])


def test_the_seed_of_an_experiment_counts(tmp_path):
    """Batches shown are those that training gets; a seed of the data itself wins."""
    file = tmp_path / "one.yaml"
    file.write_text("seed_everything: 7\ndata: Shapes\n")
    assert resolve(file).seed == 7
    file.write_text("seed_everything: 7\ndata:\n  class_path: Shapes\n  init_args: {seed: 3}\n")
    assert resolve(file).seed == 3


def test_a_run_folder(tmp_path, folders):
    """config.yaml of a run says the data."""
    part = {"class_path": "seglight.data.Folder", "init_args": {"root": str(folders / "folder"), "crop": 32}}
    (tmp_path / "config.yaml").write_text(json.dumps({"seed_everything": 1, "data": part, "model": {}}))
    module = resolve(tmp_path)
    assert type(module) is Folder
    assert module.transform.crop == (32, 32)


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("Vox", [], "Did you mean VOC"),
        ("Shapes", ["--data.croq", "3"], "no option 'croq'. Did you mean crop"),
        ("missing.yaml", [], "There is no missing.yaml"),
        ("no/such/folder", [], "Give an experiment"),
    ],
)
def test_wrong_names_are_explained(source, overrides, message):
    """One sentence, with the nearest name."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        resolve(source, overrides)


def test_a_part_without_data_is_refused(tmp_path):
    """A model alone is no dataset."""
    (tmp_path / "model.yaml").write_text("model: UNet\n")
    with pytest.raises(ValueError, match="names no dataset"):
        resolve(tmp_path / "model.yaml")


def test_real_folders(real_data):
    """The small real datasets."""
    found = {name: type(resolve(real_data / name)) for name in ("voc2012", "camvid", "coco", "nuclei", "fruitsnuts")}
    assert found == {"voc2012": VOC, "camvid": CamVid, "coco": COCO, "nuclei": COCOFormat, "fruitsnuts": COCOFormat}


def test_options_of_the_dataset_go_only_to_verbs_that_take_them(capsys, tmp_path):
    """`data sample` has no dataset to change."""
    assert command.main(["sample", "--format", "voc", "--data.crop", "3", str(tmp_path / "x")]) == 2
    assert "no option --data.crop" in capsys.readouterr().err
