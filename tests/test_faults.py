"""Files that break in the middle of a run: named, counted, and passed over when asked."""

import errno
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tiny import Blocks, Tiny

from seglight.data import COCO, Folder
from seglight.data.dataset import SemanticDataset
from seglight.data.faults import FaultySample, Ledger, reading, this_or_another
from seglight.data.findings import DataError
from seglight.data.formats import write_coco, write_folder
from seglight.data.instance_transforms import InstanceTransform
from seglight.data.instance_transforms import train_batch as instance_batch
from seglight.data.scenes import split_scenes
from seglight.data.transforms import TrainTransform, train_batch

SIZE = (64, 72)


@pytest.fixture
def root(tmp_path):
    return write_folder(
        tmp_path / "data", {"train": split_scenes("train", 6, 0, SIZE), "val": split_scenes("val", 3, 0, SIZE)}
    )


def module(root, **options):
    return Folder(str(root), **{"batch_size": 3, "crop": 32, "workers": 0, "seed": 1, **options})


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def broken(data):
    """An image cut off and a mask gone; their ids."""
    train = data.split("train")
    cut(train.image_paths[1])
    train.mask_paths[4].unlink()
    return [train.ids[1], train.ids[4]]


def order_instead(index, count=6):
    """In which order samples are tried in the place of a broken one."""
    return np.random.default_rng((index, count)).permutation(count).tolist()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_skipping_draws_another_sample_and_changes_nothing_else(root, workers):
    """Samples 1 and 4 are broken, so others of the same pass stand in their places."""
    whole = list(module(root, workers=0).train_batches(6))
    data = module(root, workers=workers, faulty_samples="skip")
    bad = broken(data)
    batches = list(data.train_batches(6))
    ids = data.split("train").ids
    instead = {ids[i]: ids[next(k for k in order_instead(i) if k not in (1, 4))] for i in (1, 4)}
    shown = [zip(full["image_id"], full["image"], full["mask"], strict=True) for full in whole]
    of_pass = [{name: pair for batch in shown[i : i + 2] for name, *pair in batch} for i in (0, 2, 4)]
    assert len(batches) == 6 and sorted(instead) == sorted(bad)
    for number, (full, part) in enumerate(zip(whole, batches, strict=True)):
        assert part.keys() == full.keys() == {"image", "mask", "image_id"}
        assert part["image_id"] == [instead.get(name, name) for name in full["image_id"]]
        for name, image, mask in zip(part["image_id"], part["image"], part["mask"], strict=True):
            expected = of_pass[number // 2][name]
            assert torch.equal(image, expected[0]) and torch.equal(mask, expected[1])
    assert sorted(data.ledger.reasons) == sorted(bad)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_by_default_the_run_stops_with_the_file(root, workers):
    data = module(root, workers=workers)
    path = data.split("train").image_paths[1]
    cut(path)
    with pytest.raises(DataError) as error:
        list(data.train_batches(4))
    text = str(error.value)
    assert str(path) in text and "Sample scene_0001 cannot be read" in text and "truncated" in text
    assert "data.faulty_samples: skip" in text and "Traceback" not in text and "worker" not in text


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_always_stops(root, workers):
    data = module(root, workers=workers, faulty_samples="skip")
    data.split("test")
    path = data.split("val").mask_paths[2]
    path.unlink()
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        with pytest.raises(DataError) as error:
            list(loader)
        text = str(error.value)
        assert f"{path}: missing" in text and "none are given" in text and "faulty_samples" not in text


def test_what_stands_for_a_lost_folder_is_not_one_image():
    """Half of the samples, one after the other, cannot be read."""
    tried = []

    def read(index):
        tried.append(index)
        if index < 100:
            raise FaultySample(str(index), "lost")
        return index

    drawn = [this_or_another(read, index, 200, [])[0] for index in range(0, 100, 5)]
    assert len(set(drawn)) > 15 and len(tried) < 80 and min(drawn) >= 100


@pytest.mark.parametrize("size", [1, 2])
def test_small_batches_go_on_as_long_as_one_sample_is_left(root, size):
    data = module(root, batch_size=size, faulty_samples="skip")
    *paths, last = data.split("train").image_paths
    for path in paths:
        cut(path)
    assert [batch["image_id"] for batch in data.train_batches(3)] == 3 * [size * [data.split("train").ids[5]]]
    cut(last)
    with pytest.raises(DataError, match=r"None of the 6 training samples can be read: scene_000\d.*truncated"):
        list(data.train_batches(3))


def test_names_once_and_a_report(caplog):
    ledger = Ledger()
    with caplog.at_level("WARNING"):
        ledger.report()
        for name in ("b", "a", "b"):
            ledger.add(name, f"/x/{name}.png: truncated")
        ledger.report()
    assert [record.getMessage() for record in caplog.records] == [
        "Training goes on without b: /x/b.png: truncated",
        "Training goes on without a: /x/a.png: truncated",
        "2 training samples could not be read and took no part in training:\n"
        "  a: /x/a.png: truncated\n  b: /x/b.png: truncated",
    ]
    for number in range(20):
        ledger.add(f"n{number}", "gone")
    caplog.clear()
    ledger.report()
    lines = caplog.text.splitlines()
    assert "22 training samples" in lines[0] and lines[-1] == "  and 12 more, named above" and len(lines) == 12


class Breaking(SemanticDataset):
    """Blocks of which sample 3 cannot be read."""

    def __init__(self, whole):
        self.whole, self.ids = whole, whole.ids

    def read(self, index):
        if index == 3:
            raise DataError("/x/3.png: truncated. Copy it again.")
        return self.whole.read(index)


class BreakingBlocks(Blocks):
    def dataset(self, split):
        return Breaking(super().dataset(split)) if split == "train" else super().dataset(split)


def fit(tmp_path, steps, resume=None, **options):
    data = BreakingBlocks(faulty_samples="skip", seed=2, **options)
    model = Tiny(num_classes=4, classes=list(data.classes))
    seen = []
    model.on_train_batch_start = lambda batch, index: seen.append(len(batch["image_id"]))
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
        default_root_dir=tmp_path, limit_val_batches=0, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=resume)
    trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
    return data, trainer, seen


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_and_its_resumption(tmp_path, caplog, workers):
    """Whole batches, the same number of steps, one notice in all and a report at the end of each run."""
    data, trainer, seen = fit(tmp_path, 8, workers=workers)
    first = caplog.text
    caplog.clear()
    assert trainer.global_step == 8 and seen == 8 * [2]
    assert first.count("Training goes on without scene3: /x/3.png: truncated") == 1
    assert "1 training sample could not be read and took no part in training:\n  scene3: /x/3.png" in first
    data, trainer, seen = fit(tmp_path, 16, tmp_path / "8.ckpt", workers=workers)
    second = caplog.text
    assert trainer.global_step == 16 and seen == 8 * [2]
    assert "goes on without" not in second, "the first run has named it"
    assert "  scene3: /x/3.png" in second and list(data.ledger.reasons) == ["scene3"]


def test_nothing_is_said_when_nothing_is_wrong(tmp_path, caplog):
    data = Blocks(faulty_samples="skip")
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=2,
        default_root_dir=tmp_path, limit_val_batches=0, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Tiny(num_classes=4, classes=list(data.classes)), data)
    assert "could not be read" not in caplog.text and "faulty" not in data.state_dict()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert "faulty" not in torch.load(tmp_path / "a.ckpt", weights_only=True)["Blocks"]


def test_a_sample_in_the_place_of_another_is_the_one_it_is_elsewhere(root):
    """The slot that a broken sample began to fill is used by the other one, wholly."""
    data = module(root).split("train")
    transform = TrainTransform(crop=120, scale=(0.5, 0.5))  # much padding
    other = next(i for i in order_instead(1) if i != 1)
    whole = train_batch(data, [(0, 0), (0, other), (0, 3)], transform, 5)
    cut(data.image_paths[1])
    part = train_batch(data, [(0, 0), (0, 1), (0, 3)], transform, 5, skip=True)
    assert torch.equal(part["image"], whole["image"]) and torch.equal(part["mask"], whole["mask"])
    assert part["faulty"][0][0] == data.ids[1]
    with pytest.raises(FaultySample, match="truncated"):
        train_batch(data, [(0, 0), (0, 1), (0, 2)], transform, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_objects(tmp_path, workers):
    pytest.importorskip("pycocotools")
    root = write_coco(
        tmp_path / "coco", {"train": split_scenes("train", 6, 0, SIZE), "val": split_scenes("val", 3, 0, SIZE)}
    )
    options = {"batch_size": 3, "short_side": 48, "long_side": 80, "workers": workers, "seed": 3, "skip_empty": False}
    whole = list(COCO(str(root), **{**options, "workers": 0}).train_batches(4))
    data, strict = (COCO(str(root), faulty_samples=what, **options) for what in ("skip", "error"))
    for one in (strict, data):  # what is broken before is dropped when the file is read
        one.split("train"), one.split("val")
    path, names = data.split("train").path(2), list(data.split("train").ids)
    bad, after = names[2], names[next(i for i in order_instead(2) if i != 2)]
    cut(path)
    part = list(data.train_batches(4))
    for full, one in zip(whole, part, strict=True):
        keep = [i for i, name in enumerate(full["image_id"]) if name != bad]
        expected = [after if name == bad else name for name in full["image_id"]]
        assert one["image_id"] == expected and one.keys() == full.keys()
        assert all(torch.equal(one["image"][i], full["image"][i]) for i in keep)
        assert all(torch.equal(one["target"][i]["masks"], full["target"][i]["masks"]) for i in keep)
    assert list(data.ledger.reasons) == [bad] and str(path) in data.ledger.reasons[bad]
    with pytest.raises(DataError, match=f"Sample {bad} cannot be read.*truncated.*data.faulty_samples"):
        list(strict.train_batches(4))
    cut(data.split("val").path(1))
    with pytest.raises(DataError, match=r"truncated.*none are given"):
        list(data.val_dataloader())


def test_an_image_to_paste_from_counts_by_its_own_name(tmp_path):
    pytest.importorskip("pycocotools")
    scenes = {"train": split_scenes("train", 4, 0, SIZE), "val": split_scenes("val", 1, 0, SIZE)}
    data = COCO(str(write_coco(tmp_path / "coco", scenes)), skip_empty=False).split("train")
    cut(data.path(3))
    transform = InstanceTransform(crop=48, scale=(0.5, 1.5), copy_paste=1.0)
    batch = instance_batch(data, [(epoch, 0) for epoch in range(12)], transform, 1, skip=True)
    assert len(batch["image"]) == 12 and {name for name, _ in batch["faulty"]} == {data.ids[3]}
    assert batch["image_id"] == 12 * [data.ids[0]], "another one is pasted from"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DataError("a.png: empty."), r"^a\.png: empty\.$"),
        (FileNotFoundError(2, "No such file", "a.png"), r"^a\.png: missing\. Copy"),
        (PermissionError(13, "Permission denied", "a.png"), r"^a\.png: cannot be read \(Permission denied\)"),
        (OSError("image file is truncated"), r"^cannot be read \(image file is truncated\)"),
    ],
)
def test_what_counts_as_a_fault_of_the_sample(error, words):
    with pytest.raises(FaultySample, match=words) as caught, reading("a"):
        raise error
    assert caught.value.name == "a"


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), ValueError("no"), KeyError("x")])
def test_what_does_not(error):
    with pytest.raises(type(error)) as caught, reading("a"):
        raise error
    assert caught.value is error


def test_other_errors_of_a_loader_process_keep_their_traceback():
    class Odd(Blocks):
        def dataset(self, split):
            data = super().dataset(split)
            data.read = lambda index: {}["nothing"]
            return data

    with pytest.raises(KeyError, match="nothing"):
        list(Odd(faulty_samples="skip").train_batches(1))


def test_the_check_before_training_says_how_to_go_on(root):
    data = module(root, faulty_samples="skip")
    cut(data.split("train").image_paths[1])
    with pytest.raises(DataError, match=r"(?s)truncated.*scene_0001.*say data\.check: false\.$"):
        data.prepare_data()
    with pytest.raises(DataError) as error:
        module(root).prepare_data()
    assert "data.check" not in str(error.value)


def test_a_wrong_option(root):
    with pytest.raises(ValueError, match=r"data\.faulty_samples is 'replace'; it must be error or skip"):
        module(root, faulty_samples="replace")


JOB = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import pytorch_lightning as pl
    from test_faults import BreakingBlocks
    from tiny import Tiny
    data = BreakingBlocks(faulty_samples="skip", seed=2)
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true", max_steps=8,
                         limit_val_batches=0, **off)
    trainer.fit(Tiny(num_classes=4, classes=list(data.classes)), data)
"""


@pytest.mark.slow
def test_rank_0_reports_for_all(tmp_path):
    (tmp_path / "job.py").write_text(textwrap.dedent(JOB))
    command = [sys.executable, str(tmp_path / "job.py"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("could not be read and took no part", done.stderr)) == 1
    assert len(re.findall(r"^  scene3: /x/3\.png", done.stderr, re.M)) == 1
    assert np.isin(len(re.findall("goes on without scene3", done.stderr)), [1, 2])
