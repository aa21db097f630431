"""The local files, the offline W&B run, and that no failing logger ever stops a training."""

from __future__ import annotations

import csv
import json
import os
import struct
import time
import warnings
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger

from seglight.callbacks.pictures import Pictures
from seglight.loggers import Masked, RunLogger, WandB, log_masks, log_pictures, log_table, read_metrics
from seglight.loggers.dashboard import wandb_mode

QUIET = {
    "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
    "enable_checkpointing": False, "check_val_every_n_epoch": None, "log_every_n_steps": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    for name in ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR", "ARTIFACT_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb_home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("API_KEY", "RUN_ID", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------- RunLogger


def test_records_and_rows(tmp_path):
    logger = RunLogger(tmp_path / "run")
    assert not (tmp_path / "run").exists(), "a logger that logs nothing leaves nothing"
    logger.log_metrics({"train/loss": torch.tensor(0.1), "train/lr": 0.01}, step=10)
    logger.log_metrics({"val/mIoU": 0.5, "val_class/a": float("nan"), "epoch": 0}, step=10)
    logger.log_metrics({"train/loss": 0.05}, step=20)
    logger.log_metrics({"val/mIoU": 0.6}, step=20)
    logger.log_metrics({"val/pixAcc": 0.9}, step=20)
    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records] == [10, 10, 20, 20, 20]
    assert records[0]["train/loss"] == 0.1, "float32 without invented digits"
    assert records[1]["val_class/a"] is None and records[1]["epoch"] == 0
    assert all(isinstance(r["time"], float) for r in records)
    for line in logger.path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # strict JSON: no NaN
    rows = rows_of(tmp_path / "run/results.csv")
    assert [row["step"] for row in rows] == ["10", "20"], "one row per validation, also when it is logged in two calls"
    assert rows[1]["val/mIoU"] == "0.6" and rows[1]["val/pixAcc"] == "0.9" and rows[1]["train/loss"] == "0.05"
    assert rows[0]["val/pixAcc"] == "" and rows[0]["val/mIoU"] == "0.5", "a new column does not move old values"


def test_a_validation_is_on_the_disk_at_once(tmp_path):
    logger = RunLogger(tmp_path)
    logger.log_metrics({"val/mIoU": 0.5}, step=1)
    assert len(read_metrics(tmp_path)) == 1
    logger.log_metrics({"train/loss": 1.0}, step=2)
    logger.save()
    assert len(read_metrics(tmp_path)) == 1, "not a write per line"
    logger._flushed -= logger.FLUSH_EVERY + 1
    logger.save()
    assert len(read_metrics(tmp_path)) == 2


def test_resume_drops_what_the_killed_run_did_after_its_checkpoint(tmp_path):
    killed = RunLogger(tmp_path)
    for step in (10, 20, 30, 40):
        killed.log_metrics({"train/loss": float(step)}, step=step)
        killed.log_metrics({"val/mIoU": step / 100}, step=step)
    killed.flush()
    with open(killed.path, "a") as file:
        file.write('{"step": 45, "train/lo')  # killed while writing
    resumed = RunLogger(tmp_path)
    resumed.resume(20)
    resumed.log_metrics({"train/loss": 31.0}, step=30)
    resumed.log_metrics({"val/mIoU": 0.31, "val/mAcc": 0.4}, step=30)
    resumed.finalize("success")
    records = [r for r in read_metrics(tmp_path) if "train/loss" in r]
    assert [(r["step"], r["train/loss"]) for r in records] == [(10, 10.0), (20, 20.0), (30, 31.0)]
    rows = rows_of(tmp_path / "results.csv")
    assert [(row["step"], row["val/mIoU"], row["val/mAcc"]) for row in rows] == [
        ("10", "0.1", ""), ("20", "0.2", ""), ("30", "0.31", "0.4"),
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.part"))


def test_appending_after_a_crash_starts_a_new_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    logger = RunLogger(tmp_path)
    logger.log_metrics({"a": 3}, step=3)
    logger.finalize("success")
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 3]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    from pytorch_lightning.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = RunLogger(tmp_path / "run")
    logger.log_metrics({"val/mIoU": 0.5}, step=1)
    logger.resume(0)
    logger.finalize("success")
    wandb = WandB(save_dir=tmp_path / "wandb_run")
    wandb.log_config({"a": 1})
    wandb.log_metrics({"val/mIoU": 0.5}, step=1)
    wandb.finalize("success")
    assert wandb.run_id is None and not (tmp_path / "run").exists() and not (tmp_path / "wandb_run").exists()


# ------------------------------------------------------------------------ W&B


def records_of(path: Path):
    """Records of a .wandb file: LevelDB's log format in 32 KiB blocks behind a 7-byte file header, protobuf inside."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0 or place + 7 + length > len(data):  # still being written
            break
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def nest(items, target: dict) -> dict:
    for item in items:
        *path, last = list(item.nested_key) or [item.key]
        place = target
        for key in path:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return target


def parse(run: Path) -> dict:
    """Config, history, metric definitions and files of an offline run."""
    found = {"config": {}, "history": [], "metrics": {}, "run": None, "closed": False}
    for record in records_of(next(run.glob("*.wandb"))):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            updates = record.run.config.update
        elif kind == "config":
            updates = record.config.update
        else:
            updates = ()
        nest(updates, found["config"])
        found["closed"] |= kind == "exit"
        if kind == "history":
            found["history"].append(nest(record.history.item, {}))
        if kind == "metric":
            found["metrics"][record.metric.name or record.metric.glob_name] = record.metric
    return found


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """A real training through the front classes, with the offline W&B run parsed once for all tests below."""
    folder = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", "secret" + "0" * 34)
        patch.delenv("WANDB_RUN_ID", raising=False)
        for name in ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
            patch.setenv(f"WANDB_{name}", str(folder / "home"))
        logger = WandB(project="proj", name="fcn on blocks", save_dir=folder, id="run7", tags=["t"])
        config = {"class_path": "Tiny", "init_args": {"lr": 0.1, "milestones": (1, 2)}}
        logger.log_config({"model": config, "out": Path("x")})
        data = tiny.Blocks()
        model = tiny.Tiny(num_classes=4, classes=list(data.classes), palette=list(data.palette))
        model.save_hyperparameters({"lr": 0.1})
        local = RunLogger(folder)
        trainer = Trainer(
            max_steps=4, val_check_interval=2, num_sanity_val_steps=1, logger=[local, logger],
            callbacks=[Pictures(count=3)], default_root_dir=folder, **QUIET,
        )  # fmt: skip
        trainer.fit(model, data)
        logger.finish()
    folder.joinpath("iou.json").write_text(json.dumps([None if iou != iou else float(iou) for iou in model.scores.iou]))
    runs = list((folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 1, "one run per job"
    for _ in range(100):  # wandb's own process closes the file a moment after finish()
        found = parse(runs[0])
        if found["closed"]:
            break
        time.sleep(0.1)
    return folder, runs[0], found


def test_config_is_nested_and_sent_once(offline_run):
    config = offline_run[2]["config"]
    assert config["model"] == {"class_path": "Tiny", "init_args": {"lr": 0.1, "milestones": [1, 2]}}
    assert config["out"] == "x" and "lr" not in config, "Lightning's flat hyperparameters do not come on top"
    assert not [key for key in config if "/" in key]


def test_run_has_id_name_project(offline_run):
    run = offline_run[2]["run"]
    assert (run.run_id, run.display_name, run.project, list(run.tags)) == ("run7", "fcn on blocks", "proj", ["t"])


def test_metrics_and_our_step(offline_run):
    history = offline_run[2]["history"]
    keys = set().union(*history)
    assert {"train/loss", "train/lr", "val/mIoU", "val/pixAcc", "val_class/dark", "step"} <= keys
    assert "trainer/global_step" not in keys, "one step key, ours"
    assert all("step" in entry for entry in history)
    assert sum("val/mIoU" in entry for entry in history) == 2
    metrics = offline_run[2]["metrics"]
    assert metrics["*"].step_metric == "step"
    assert metrics["val/mIoU"].summary.max and metrics["val/mIoU"].step_metric == "step"


def test_native_masks_with_class_names(offline_run):
    _, run, found = offline_run
    logged = [entry["media/val"] for entry in found["history"] if "media/val" in entry]
    assert len(logged) == 2 and logged[0]["count"] == 3
    assert logged[0]["captions"] == logged[1]["captions"] == ["scene100", "scene102", "scene104"], "the same images"
    masks = logged[1]["all_masks"]
    assert [set(m) for m in masks] == [{"ground truth", "prediction", "error"}] * 3
    truths = [tiny.BlockScenes(5, 100).read(index)[1] for index in (0, 2, 4)]
    assert len({truth.shape for truth in truths}) > 1
    largest = tuple(max(truth.shape[axis] for truth in truths) for axis in (0, 1))
    for truth, mask, name in zip(truths, masks, logged[1]["filenames"], strict=True):
        files = {kind: np.array(Image.open(run / "files" / item["path"])) for kind, item in mask.items()}
        inside = np.zeros(largest, bool)
        inside[: truth.shape[0], : truth.shape[1]] = True
        cut = {kind: values[: truth.shape[0], : truth.shape[1]] for kind, values in files.items()}
        assert np.array_equal(cut["ground truth"], truth) and cut["prediction"].max() <= 3
        assert np.array_equal(cut["error"], np.where(truth == 255, 255, cut["prediction"] != truth))
        assert all(values.shape == largest and (values[~inside] == 255).all() for values in files.values())
        image = Image.open(run / "files" / name)
        assert image.mode == "RGB" and image.size == largest[::-1], "W&B wants one size per key"
    names = found["config"]["_wandb"]["mask/class_labels"]
    for mask in ("ground truth", "prediction"):
        meaning = names[f"media/val_wandb_delimeter_{mask}"]["value"]
        assert meaning == {"0": "dark", "1": "middle", "2": "bright", "3": "never", "255": "void"}
    assert names["media/val_wandb_delimeter_error"]["value"] == {"0": "right", "1": "wrong", "255": "void"}


def test_table_and_pictures(offline_run):
    folder, run, found = offline_run
    table = [entry["val_class/table"] for entry in found["history"] if "val_class/table" in entry][-1]
    content = json.loads((run / "files" / table["path"]).read_text())
    assert content["columns"] == ["class", "IoU", "accuracy", "pixels"]
    assert [row[0] for row in content["data"]] == ["dark", "middle", "bright", "never"]
    assert [row[1] for row in content["data"]] == pytest.approx(json.loads((folder / "iou.json").read_text()))
    assert content["data"][3][2:] == [None, 0], "a class without pixels has no accuracy"
    for key in ("val/confusion", "media/val_colours", "media/train_batch0"):
        entry = next(entry[key] for entry in found["history"] if key in entry)
        assert all((run / "files" / name).is_file() for name in entry["filenames"])


def test_no_secret_is_written(offline_run):
    for path in offline_run[1].rglob("*"):
        assert not path.is_file() or b"secret0000" not in path.read_bytes(), path


def test_local_files_have_the_same_numbers(offline_run):
    folder, _, found = offline_run
    ours = [r["val/mIoU"] for r in read_metrics(folder) if "val/mIoU" in r]
    theirs = [entry["val/mIoU"] for entry in found["history"] if "val/mIoU" in entry]
    assert ours == pytest.approx(theirs, rel=1e-6) and len(rows_of(folder / "results.csv")) == 2


def test_sync_command_and_resumed_run(tmp_path, capsys):
    """A resumed job passes the id of its checkpoint: a second folder of the same run, and one command uploads both."""
    for _ in range(2):
        logger = WandB(save_dir=tmp_path, id="abc")
        logger.log_hyperparams({"lr": 1.0})
        assert logger.run_id == "abc" and isinstance(logger.run_id, str)
        logger.finalize("success")
        logger.finalize("success")
        logger.finish()
        time.sleep(1.1)  # wandb names its folders by the second
    line = capsys.readouterr().out.strip().splitlines()
    assert len(line) == 2 and line[1].startswith("W&B: recorded offline. To upload:  wandb sync ")
    folders = line[1].split("wandb sync ")[1].split()
    assert len(folders) == 2 and all(Path(name).is_dir() and name.endswith("-abc") for name in folders)


def test_online_only_when_logged_in(tmp_path, monkeypatch):
    import wandb

    class Settings:
        mode, api_key, base_url = "online", None, "https://api.wandb.ai"

    monkeypatch.setattr(wandb, "setup", lambda: type("Setup", (), {"settings": Settings})())
    for asked, mode in (("dryrun", "offline"), ("disabled", "disabled"), ("online", "online")):
        monkeypatch.setenv("WANDB_MODE", asked)
        assert wandb_mode() == mode
    monkeypatch.delenv("WANDB_MODE")
    assert wandb_mode() == "offline", "not logged in"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password abc\n")
    assert wandb_mode() == "online"
    (tmp_path / "netrc").write_text("machine elsewhere.org login user password abc\n")
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    assert wandb_mode() == "online"
    Settings.mode = "offline"  # `wandb offline` in this folder
    assert wandb_mode() == "offline"


# ------------------------------------------------------------- failing loggers


def fit(tmp_path, *loggers):
    data = tiny.Blocks()
    trainer = Trainer(
        max_steps=3, val_check_interval=1, num_sanity_val_steps=0, logger=list(loggers),
        callbacks=[Pictures(count=2)], default_root_dir=tmp_path, **QUIET,
    )  # fmt: skip
    trainer.fit(tiny.Tiny(num_classes=4, classes=list(data.classes)), data)
    assert trainer.global_step == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_does_not_stop_training(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    logger = RunLogger(folder)
    with pytest.warns(RuntimeWarning, match="RunLogger.log_metrics failed, training goes on") as caught:
        fit(tmp_path, logger)
    assert len([w for w in caught if "RunLogger.log_metrics" in str(w.message)]) == 1, "one warning per kind"


def test_a_wandb_that_cannot_start_does_not_stop_training(tmp_path, monkeypatch):
    import wandb

    calls = []

    def refuse(**options):
        calls.append(options)
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    logger = WandB(save_dir=tmp_path)
    with pytest.warns(RuntimeWarning, match="WandB.start failed"):
        fit(tmp_path, logger)
    assert len(calls) == 1, "a server that does not answer is asked once, not at every step"
    assert logger.run_id is None, "checkpoints store it"


def test_wandb_falls_back_to_offline(tmp_path, monkeypatch, capsys):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    modes = []

    class Run:
        id, dir = "x", str(tmp_path / "wandb/offline-run-1-x/files")

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    def init(**options):
        modes.append(options["mode"])
        if options["mode"] == "online":
            raise wandb.errors.CommError("timed out")
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    logger = WandB(save_dir=tmp_path, log_model=True)
    logger.log_metrics({"a": 1.0}, 1)
    logger.finalize("success")
    assert modes == ["online", "offline"] and logger.run_id == "x"
    assert "recorded offline" in capsys.readouterr().out


def test_options_left_empty_on_the_command_line_change_nothing(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "init", Mock())
    for options in ({}, {"settings": None, "resume": None, "mode": None, "reinit": None}):
        WandB(save_dir=tmp_path, **options)._start()
    plain, empty = (call.kwargs for call in wandb.init.call_args_list)
    assert plain["settings"].silent and plain["resume"] == "allow" and plain["mode"] == "offline"
    assert {**empty, "settings": 0} == {**plain, "settings": 0} and empty["settings"].silent


def test_wandb_failing_later_does_not_stop_training(tmp_path):
    class Broken:
        id = "x"

        def __getattr__(self, name):
            def fails(*args, **kwargs):
                raise ConnectionError("gone")

            return fails

    logger = WandB(save_dir=tmp_path)
    logger._experiment = Broken()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, logger)
    kinds = [str(w.message).split(" failed")[0] for w in caught if "goes on without" in str(w.message)]
    assert "WandB.log_metrics" in kinds and len(kinds) == len(set(kinds)), kinds


def test_pictures_and_tables_for_any_logger(tmp_path):
    image = np.zeros((8, 9, 3), np.uint8)
    masked = [Masked(image, {"prediction": image[..., 0]})]
    board = TensorBoardLogger(tmp_path)

    class Failing(TensorBoardLogger):
        @property
        def experiment(self):
            raise OSError("no space left on device")

    for loggers in ([], [RunLogger(tmp_path / "run")], [board]):
        log_masks(loggers, "media/val", masked, {"prediction": {0: "a"}}, 3)
        log_pictures(loggers, "val/picture", [image, image], 3, ["a", "b"])
        log_table(loggers, "val_class/table", ["class", "IoU"], [["a", 0.5], ["b", None]], 3)
    with pytest.warns(RuntimeWarning, match="no space left"):
        log_pictures([Failing(tmp_path / "f")], "val/picture", [image], 3)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board.experiment.flush()
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert set(events.Tags()["images"]) == {"val/picture/a", "val/picture/b"}
    assert any("val_class/table" in tag for tag in events.Tags()["tensors"])


def test_a_board_that_cannot_be_written_does_not_stop_training(tmp_path, monkeypatch, capsys):
    from seglight.loggers.tensorboard import TensorBoard

    board = TensorBoard(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in ("add_scalar", "add_scalars", "flush", "close", "add_hparams"):
        monkeypatch.setattr(type(board.experiment), name, full, raising=False)
    board.log_metrics({"val/mIoU": 0.5}, 3)
    board.log_hyperparams({"lr": 0.1})
    board.save()
    board.finalize("success")
    assert "TensorBoard.log_metrics failed, training goes on" in capsys.readouterr().err
