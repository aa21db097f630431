"""ISBI 2012: TIFF stacks and numbered PNGs, and the slices that validate."""

import shutil

import numpy as np
import pytest
from PIL import Image

from seglight.cli.data import main
from seglight.cli.datamodule import recognise
from seglight.data import ISBI, Folder
from seglight.data.findings import DataError
from seglight.data.formats.isbi import labels_of, slice_of, write_isbi
from seglight.data.scenes import split_scenes

SIZE = (64, 72)
SCENES = [*split_scenes("train", 9, 0, SIZE), *split_scenes("val", 3, 0, SIZE)]


@pytest.fixture
def stacks(tmp_path):
    return write_isbi(tmp_path / "stacks", {"train": SCENES[:9], "val": SCENES[9:]})


@pytest.fixture
def pngs(tmp_path):
    """Twelve slices called 0.png to 11.png."""
    for kind, draw in (("image", slice_of), ("label", labels_of)):
        (tmp_path / "pngs/train" / kind).mkdir(parents=True)
        for number, one in enumerate(SCENES):
            Image.fromarray(draw(one)).save(tmp_path / f"pngs/train/{kind}/{number}.png")
    return tmp_path / "pngs"


@pytest.mark.parametrize("layout", ["stacks", "pngs"])
def test_slices_in_the_order_of_their_numbers(request, layout):
    data = ISBI(str(request.getfixturevalue(layout)))
    assert data.classes == ("membrane", "cell")
    train, val, test = (data.dataset(split) for split in ("train", "val", "test"))
    assert train.ids == [str(i) for i in range(10)] and val.ids == test.ids == ["10", "11"], "10 comes after 9"
    for part in (train, val):
        part.check(2)
        for index, name in enumerate(part.ids):
            image, mask = part.read(index)
            assert image.dtype == mask.dtype == np.uint8 and image.shape == (*SIZE, 3)
            assert np.array_equal(image, np.repeat(slice_of(SCENES[int(name)])[..., None], 3, 2))
            assert np.array_equal(mask, labels_of(SCENES[int(name)]) // 255)
    found = train.fingerprint()
    assert found["samples"] == 10 and len(found["sha256"]) == 64 and found != val.fingerprint()


def test_chosen_slices_validate(stacks):
    data = ISBI(str(stacks), val_slices=[10, 2, 0])
    assert data.dataset("val").ids == ["0", "2", "10"]
    assert data.dataset("train").ids == [str(i) for i in range(12) if i not in (0, 2, 10)]
    for wrong, words in (
        ([12], "12, but the 12 slices are 0..11"),
        ([-1], "-1, but"),
        ([], "one at least"),
        ([1, 1], "each slice once"),
        (list(range(12)), "leave some of the 12"),
    ):
        with pytest.raises(ValueError, match=words):
            ISBI(str(stacks), val_slices=wrong)


def test_the_test_volume_can_be_predicted(stacks, pngs):
    data = ISBI(str(stacks), test_split="test", workers=0)
    test = data.dataset("test")
    assert len(test) == 3 and np.unique(test.read(1)[1]).tolist() == [255]
    assert np.array_equal(test.read(0)[0][..., 0], slice_of(SCENES[9])[::-1])
    test.check(2)
    assert [batch["image_id"] for batch in data.predict_dataloader()] == [["0"], ["1"], ["2"]]
    with pytest.raises(FileNotFoundError, match=r"data\.test_split"):
        ISBI(str(pngs), test_split="test").dataset("test")
    shutil.copytree(pngs / "train/image", pngs / "test")
    test = ISBI(str(pngs), test_split="test").dataset("test")
    assert test.ids[-2:] == ["10", "11"] and np.unique(test.read(0)[1]).tolist() == [255]
    (stacks / "test-volume.tif").unlink()
    with pytest.raises(FileNotFoundError, match=r"test-volume\.tif"):
        ISBI(str(stacks), test_split="test").dataset("test")


@pytest.mark.fidelity
def test_the_written_stacks(stacks):
    """Read by means of its own: pages of 8-bit grey, labels 0 and 255, membranes dark."""
    for name, count in (("train-volume", 12), ("train-labels", 12), ("test-volume", 3)):
        with Image.open(stacks / f"{name}.tif") as file:
            assert (file.format, file.mode, file.n_frames, file.size) == ("TIFF", "L", count, SIZE[::-1])
            if name == "train-labels":
                assert set(np.unique(np.array(file)).tolist()) <= {0, 255}
    image, labels = slice_of(SCENES[0]), labels_of(SCENES[0])
    assert image[labels == 0].mean() < image[labels == 255].mean()


def test_what_is_refused(stacks, pngs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-volume\.tif.*--format isbi"):
        ISBI(str(tmp_path))
    (stacks / "train-labels.tif").rename(stacks / "old.tif")
    with pytest.raises(FileNotFoundError, match=r"train-labels\.tif"):
        ISBI(str(stacks))
    shutil.copy(stacks / "test-volume.tif", stacks / "train-labels.tif")
    with pytest.raises(DataError, match=r"has 12 slices, but .* 3"):
        ISBI(str(stacks))
    shutil.copy(stacks / "train-volume.tif", stacks / "train-labels.tif")
    with pytest.raises(DataError, match=r"train-labels\.tif: values .* in slices 0, 1.*0 \(membrane\) and 255"):
        ISBI(str(stacks)).dataset("train").check(2)
    first, *others = [Image.new("RGB", SIZE[::-1])] * 12
    first.save(stacks / "train-labels.tif", save_all=True, append_images=others)
    with pytest.raises(DataError, match="page 0 is RGB"):
        ISBI(str(stacks)).dataset("train")
    first, *others = [Image.new("L", (30, 40))] * 12
    first.save(stacks / "train-labels.tif", save_all=True, append_images=others)
    with pytest.raises(DataError, match="differ in size"):
        ISBI(str(stacks)).dataset("train")
    (stacks / "train-labels.tif").write_bytes(b"no")
    with pytest.raises(DataError, match="not a TIFF file"):
        ISBI(str(stacks))
    whole = (stacks / "old.tif").read_bytes()
    (stacks / "train-labels.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-labels\.tif"):
        ISBI(str(stacks)).dataset("train")
    (pngs / "train/label/7.png").unlink()
    with pytest.raises(DataError, match="not in both: 7"):
        ISBI(str(pngs))
    Image.fromarray(np.full(SIZE, 3, np.uint8)).save(pngs / "train/label/7.png")
    with pytest.raises(DataError, match=r"(?s)values 3 in the masks.*0 \(membrane\) and 255 \(cell\).*7\.png"):
        ISBI(str(pngs)).dataset("train").check(2)


def test_folders_of_others_are_not_taken_for_isbi(pngs):
    assert recognise(pngs)["class_path"] == "ISBI"
    for path in (pngs / "train/label").iterdir():
        Image.fromarray(np.resize(np.array([0, 1], np.uint8), SIZE)).save(path)
    with pytest.raises(FileNotFoundError, match="not ISBI"):
        ISBI(str(pngs))
    (pngs / "classes.txt").write_text("a\nb\n")
    assert recognise(pngs)["class_path"] == "Folder"


def test_batches_are_the_same_in_worker_processes(stacks):
    one, two = (
        list(ISBI(str(stacks), batch_size=2, crop=32, workers=workers, seed=1).train_batches(4)) for workers in (0, 2)
    )
    for a, b in zip(one, two, strict=True):
        assert a["image_id"] == b["image_id"] and (a["image"] == b["image"]).all() and (a["mask"] == b["mask"]).all()


def test_data_sample_and_its_command(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["sample", "--format", "isbi", str(out), "--train", "3", "--val", "2", "--size", "48", "50"]) == 0
    assert "--data ISBI" in (printed := capsys.readouterr().out) and "--data.val_slices [3,4]" in printed


def test_the_real_slices(real_data, caplog):
    root = real_data / "isbi2012"
    with caplog.at_level("WARNING"):
        data = ISBI(str(root))
        train, val = data.dataset("train"), data.dataset("val")
    assert train.ids == [str(i) for i in range(19)] and val.ids == ["19", "20", "21", "22", "23"]
    assert "ISBI has 24 of the 30 published samples" in caplog.text
    train.check(2)
    val.check(2)
    image, labels = val.read(0)
    assert image.shape == (512, 512, 3) and image[labels == 0].mean() < image[labels == 1].mean()
    folder = Folder(str(root), values={0: "membrane", 255: "cell"})
    places = sorted(int(name) for name in folder.dataset("val").ids)
    same = ISBI(str(root), val_slices=places)
    assert places == [4, 10, 14, 16, 23], "what the experiment names: the slices that Folder draws"
    for split in ("train", "val"):
        a, b = folder.dataset(split), same.dataset(split)
        assert set(a.ids) == set(b.ids)
        for index, name in enumerate(b.ids):
            for mine, other in zip(b.read(index), a.read(a.ids.index(name)), strict=True):
                assert np.array_equal(mine, other)
