"""Through the front door: the command, its YAML and its errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny  # noqa: F401  makes the short names Tiny and Blocks known
import torch
import yaml

import seglight
from seglight.cli import main
from seglight.cli.experiment import validation_interval
from seglight.cli.experiment_file import UsageError, load_yaml

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(p for p in (ROOT / "experiments").rglob("*.yaml") if "_base" not in p.parts)
FAST = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "4", "--trainer.log_every_n_steps", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(*words, model="Tiny", data="Blocks"):
    return main(["fit", "--model", model, "--data", data, *FAST, *words])


def refused(capsys, *words, status=(1, 2)):
    """The one paragraph that a wrong command prints."""
    try:
        code = main(list(words))
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code in status, error
    lines = [line for line in error.splitlines() if line.startswith("seglight: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def test_a_run_leaves_everything_behind(here):
    assert fit("--out", "run") == 0
    run = here / "run"
    for name in (
        "config.yaml",
        "env.json",
        "data.json",
        "train.log",
        "metrics.jsonl",
        "results.csv",
        "best.json",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "plots/results.png",
        "plots/confusion.png",
    ):
        assert (run / name).is_file(), name
    assert list((run / "images").glob("*.png")) or list((run / "images").glob("*.jpg"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["class_path"].endswith("Tiny") and config["trainer"]["max_steps"] == 4
    assert json.loads((run / "data.json").read_text())["train"]["samples"] == 8
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"train/loss", "train/lr", "val/mIoU", "val_class/dark"} <= set().union(*records)
    content = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert content["seglight"]["init_args"]["num_classes"] == 4
    assert content["seglight"]["classes"] == ["dark", "middle", "bright", "never"]
    model = seglight.load(run / "checkpoints/best.ckpt")
    assert model.predict(torch.randint(0, 255, (9, 11, 3), dtype=torch.uint8).numpy()).labels.shape == (9, 11)
    log = (run / "train.log").read_text()
    assert "started: " in log and "step 4: mIoU 0." in log and "finished at step 4" in log


def test_a_checkpoint_is_scored_without_its_yaml_and_test_time_options_win(here, capsys):
    fit("--out", "run")
    best = "run/checkpoints/best.ckpt"
    assert main(["test", "--ckpt_path", best, "--trainer.accelerator", "cpu"]) == 0
    plain = json.loads((here / "run/test/scores_test.json").read_text())
    assert "one confusion matrix" in plain["definition"]
    assert "one confusion matrix" in " ".join(capsys.readouterr().out.split())
    assert main(["test", "--ckpt_path", best, "--trainer.accelerator", "cpu", "--model.test_scales", "[0.3]"]) == 0
    scaled = json.loads((here / "run/test-2/scores_test.json").read_text())
    assert plain["test/mIoU"] != scaled["test/mIoU"], "the flag must reach the model although a checkpoint is given"


def test_predict_of_an_experiment_writes_its_test_split(here):
    fit("--out", "run")
    words = ["--ckpt_path", "run/checkpoints/best.ckpt", "--trainer.accelerator", "cpu", "--out", "p"]
    assert main(["predict", *words]) == 0
    assert sorted(p.name for p in (here / "p/predictions").glob("*.png")) == [f"scene{i}.png" for i in range(200, 205)]


def test_the_config_of_a_run_can_be_fed_back(here):
    fit("--out", "one")
    assert main(["fit", "-c", "one/config.yaml", "--out", "two"]) == 0
    first, second = (
        (here / name / "config.yaml").read_text().replace("out: one", "out: two") for name in ("one", "two")
    )
    assert first == second


def test_occupied_run_folder(here, capsys):
    fit("--out", "run")
    kept = (here / "run/metrics.jsonl").read_text()
    message = refused(capsys, "fit", "--model", "Tiny", "--data", "Blocks", *FAST, "--out", "run")
    assert "--resume" in message and "--overwrite" in message
    assert (here / "run/metrics.jsonl").read_text() == kept
    words = ["fit", *FAST, "--out", "run", "--overwrite"]
    for missing in (
        ["Tiny", "--data", "VOC", "--data.root", "nowhere"],
        ["SMP", "--data", "Blocks", "--model.encoder", "x"],
    ):
        refused(capsys, *words, "--model", *missing)
        assert (here / "run/metrics.jsonl").read_text() == kept, "a run that cannot begin does not cost the old one"
    assert fit("--out", "run", "--overwrite") == 0
    (here / "mine").mkdir()
    (here / "mine/thesis.txt").write_text("years of work")
    assert "not a run folder" in refused(
        capsys, "fit", "--model", "Tiny", "--data", "Blocks", *FAST, "--out", "mine", "--overwrite"
    )
    assert (here / "mine/thesis.txt").exists()


def test_resume_continues_to_the_same_weights(here, capsys):
    options = ["--trainer.max_steps", "8", "--val_every", "2", "--data.crop", "12", "--model.dropout", "0.5"]
    fit("--out", "straight", *options)

    class Kill(Exception):
        pass

    from seglight.models.semantic import SemanticModel

    original, count = SemanticModel.training_step, [0]

    def dying(self, batch, batch_idx):
        count[0] += 1
        if count[0] == 7:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    SemanticModel.training_step = dying
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            fit("--out", "killed", *options)
            raise SystemExit
    finally:
        SemanticModel.training_step = original
    assert torch.load("killed/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    found = json.loads(Path("killed/data.json").read_text())
    Path("killed/data.json").write_text(json.dumps({**found, "val": {**found["val"], "samples": 6}}))
    assert fit("--out", "killed", *options, "--resume") == 0
    text = "The data are not those that this run began with: val (samples). If samples have moved"
    assert text in capsys.readouterr().out and text in Path("killed/train.log").read_text()
    assert json.loads(Path("killed/data.json").read_text()) != found, "it stays that of the run's beginning"
    a, b = (torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("straight", "killed"))
    assert a["global_step"] == b["global_step"] == 8
    assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"])
    steps = [json.loads(line).get("step") for line in (here / "killed/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_resume_without_a_run(here, capsys):
    message = refused(capsys, "fit", "--model", "Tiny", "--data", "Blocks", *FAST, "--out", "none", "--resume")
    assert "last.ckpt" in message and "--out" in message


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--modle.lr", "3"], "modle"),
        (["--model.widht", "3"], "Did you mean width"),
        (["--model.lrr", "3"], "Did you mean lr"),
        (["--data.crap", "3"], "Did you mean crop?"),
        (["--trainer.max_stps", "3"], "Did you mean max_steps"),
        (["--vale_every", "3"], "Did you mean val_every"),
        (["--model.lr", "fast"], "float"),
        (["--model.num_classes", "7"], "comes from the dataset"),
        (["--model.init_args.classes", "[a]"], "comes from the dataset"),
        (["--trainer.val_check_interval", "7"], "val_every"),
        (["--val_every", "3"], "does not divide"),
        (["--data.batch_size", "0"], "at least 1"),
        (["-c", "nowhere.yaml"], "nowhere.yaml"),
        (["--resume", "--overwrite"], "one of them"),
    ],
)
def test_wrong_options_are_explained(here, capsys, words, expected):
    assert expected in refused(capsys, "fit", "--model", "Tiny", "--data", "Blocks", *FAST, *words)


@pytest.mark.parametrize(
    "model, data, expected",
    [
        ("FCN9s", "Blocks", "Did you mean FCN8s"),
        ("Tiny", "VOCC", "Did you mean VOC"),
        ("SemanticModel", "Blocks", "base class"),
        ("UNet", "ShapesInstances", "UNet is for semantic segmentation, but ShapesInstances gives instance labels"),
        ("MaskRCNN", "Shapes", "Choose another model, or one of --data"),
    ],
)
def test_wrong_classes_are_explained(here, capsys, model, data, expected):
    assert expected in refused(capsys, "fit", "--model", model, "--data", data, *FAST)


def test_missing_parts_are_explained(here, capsys):
    assert "model" in refused(capsys, "fit", "--data", "Blocks")
    assert "--ckpt_path" in refused(capsys, "test")
    assert "no.ckpt" in refused(capsys, "test", "--ckpt_path", "no.ckpt")


def test_missing_dataset_names_the_path_and_the_command(here, capsys):
    message = refused(capsys, "fit", "--model", "Tiny", "--data", "VOC", "--data.root", "nowhere/voc", *FAST)
    assert "nowhere/voc" in message and "seglight data" in message


def test_a_job_that_slurm_put_back_goes_on(here, monkeypatch, capsys):
    """The same command, --overwrite included, whatever a requeued job finds."""
    words = ["--model", "Tiny", "--data", "Blocks", *FAST, "--out", "run", "--overwrite"]
    run = here / "run"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert fit("--out", "run") == 0  # it had not come to anything
    first = (run / "checkpoints/last.ckpt").stat().st_mtime_ns
    (run / "mine.txt").write_text("kept")
    assert main(["fit", *words]) == 0
    assert (run / "mine.txt").exists() and (run / "checkpoints/last.ckpt").stat().st_mtime_ns >= first
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert main(["fit", *words]) == 0
    assert not (run / "mine.txt").exists()


def test_ranks_that_slurm_has_not_started_are_not_waited_for(here, monkeypatch, capsys):
    job = {"JOB_ID": 7, "JOB_NAME": "train", "NTASKS": 2, "NTASKS_PER_NODE": 2, "NNODES": 1, "NODELIST": "localhost"}
    for name, value in {**job, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    words = ["fit", "--model", "Tiny", "--data", "Blocks", *FAST, "--out", "run", "--trainer.devices", "2"]
    message = refused(capsys, *words, "--trainer.strategy", "ddp")
    assert "it has started 0. Put srun before the command" in message and not (here / "run").exists()
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert "it has started 1." in refused(capsys, *words, "--trainer.strategy", "ddp")


def write(path, text):
    path.write_text(text)
    return str(path)


def printed(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_parts_by_path_and_overrides(here, capsys):
    """The behaviour of jsonargparse that our experiments rely on; see design fact 1."""
    (here / "parts").mkdir()
    write(here / "parts/data.yaml", "class_path: Blocks\ninit_args: {crop: 8, batch_size: 3}")
    write(here / "parts/trainer.yaml", "max_steps: 12\naccelerator: cpu")
    text = "data: parts/data.yaml\ndata.batch_size: 5\nmodel: Tiny\nmodel.width: 7\n"
    text += "trainer: parts/trainer.yaml\ntrainer.max_steps: 6\n"
    config = printed(capsys, "-c", write(here / "e.yaml", text), "--model.lr", "0.5")
    assert config["data"]["init_args"]["batch_size"] == 5 and config["data"]["init_args"]["crop"] == 8
    assert config["data"]["class_path"].endswith("Blocks") and config["model"]["class_path"].endswith("Tiny")
    assert config["model"]["init_args"]["width"] == 7 and config["model"]["init_args"]["lr"] == 0.5
    assert config["trainer"]["max_steps"] == 6 and config["trainer"]["accelerator"] == "cpu"


def test_an_override_above_its_part_is_refused(here, capsys):
    path = write(here / "e.yaml", "data.batch_size: 5\ndata: Blocks\nmodel: Tiny\n")
    assert "Move it below" in refused(capsys, "fit", "-c", path)
    with pytest.raises(UsageError):
        load_yaml("model.lr: 1\nmodel: Tiny")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model: Tiny\nmodle: 3\ndata: Blocks", "Did you mean model?"),
        ("model: Tiny\nmodel.widht: 3\ndata: Blocks", "Did you mean width"),
        ("model: Tiny\ndata: Blocks\ntrainer: {max_stps: 3}", "Did you mean max_steps"),
        ("model: FCN9s\ndata: Blocks", "Did you mean FCN8s"),
        ("model: {class_path: FCN9s, init_args: {a: 1}}\ndata: Blocks", "Did you mean FCN8s"),
        ("model: : x", "mapping"),
    ],
)
def test_mistakes_in_yaml_are_explained(here, capsys, text, expected):
    assert expected in refused(capsys, "fit", "-c", write(here / "e.yaml", text))


def test_tensorboard_is_one_more_part(here, capsys):
    write(
        here / "e.yaml",
        "model: Tiny\ndata: Blocks\ntrainer:\n  logger:\n"
        "    - {class_path: pytorch_lightning.loggers.CSVLogger, init_args: {save_dir: .}}\n",
    )
    config = printed(capsys, "-c", "e.yaml", "-c", str(ROOT / "experiments/_base/tensorboard.yaml"))
    assert [logger["class_path"].rpartition(".")[2] for logger in config["trainer"]["logger"]] == [
        "CSVLogger",
        "TensorBoard",
    ]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_experiment_resolves(path, capsys):
    config = printed(capsys, "-c", str(path))
    assert config["model"]["class_path"].startswith("seglight.models.") and config["trainer"]["max_steps"] > 0
    steps = config["trainer"]["max_steps"]
    assert validation_interval(config["val_every"], steps, 1) <= steps


@pytest.mark.parametrize(
    "every, steps, accumulate, expected",
    [
        (None, 1000, 1, 100),
        (None, 997, 1, 997),
        (None, 4, 1, 1),
        (50, 100, 3, 150),
        (500, 100, 1, 100),
    ],
)
def test_validation_interval(every, steps, accumulate, expected):
    assert validation_interval(every, steps, accumulate) == expected


def test_a_typo_costs_no_more_than_lightning():
    code = (
        "import sys\nfrom seglight.cli import main\n"
        "try: main(['fit', '--model', 'FCN8s', '--data', 'Shapes', '--model.lrr', '1'])\nexcept SystemExit: pass\n"
        "late = {'timm', 'segmentation_models_pytorch', 'wandb'} & set(sys.modules)\n"
        "assert not late, late"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(tmp_path):
    """Odd sets, images of different sizes: scores of 2 gloo processes equal those of 1 to the last bit."""
    run = "import sys, tiny; from seglight.cli import main; sys.exit(main(sys.argv[1:]))"
    script = tmp_path / "run.py"
    script.write_text(run)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}

    def call(*words):
        done = subprocess.run(
            [sys.executable, str(script), *words], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr[-3000:]

    # DDP wants every parameter in the loss, so the auxiliary head takes part
    train = ["fit", "--model", "Tiny", "--model.loss_weights", '{"out": 1.0, "aux": 0.4}', "--data", "Blocks", *FAST]
    call(*train, "--out", "run")
    one = ["test", "--ckpt_path", "run/checkpoints/best.ckpt", "--trainer.accelerator", "cpu"]
    call(*one, "--out", "one")
    call(*one, "--out", "two", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    first, second = (json.loads((tmp_path / name / "scores_test.json").read_text()) for name in ("one", "two"))
    assert first == second and first["test/mIoU"] > 0
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    call(*train, "--out", "ddp", *ranks, "--data.batch_size", "1")  # the same global batch
    records = [
        {
            json.dumps(sorted(k for k in json.loads(line) if k.startswith("val/")))
            for line in (tmp_path / name / "metrics.jsonl").open()
        }
        for name in ("run", "ddp")
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.max_epochs", "2"],
        ["--trainer.max_steps", "-1"],
        ["--trainer.max_steps", "-1", "--trainer.max_epochs", "2"],
    ],
)
def test_the_length_of_a_run_is_counted_in_steps_alone(here, capsys, words):
    """Else it could end without a checkpoint, or with steps that nobody scored."""
    assert "Give trainer.max_steps" in refused(capsys, "fit", "--model", "Tiny", "--data", "Blocks", *FAST, *words)


def test_what_lightning_refuses_is_one_paragraph(here, capsys):
    words = ["--model", "Tiny", "--data", "Blocks", *FAST, "--trainer.devices", "0"]
    assert refused(capsys, "fit", *words)


def test_the_second_of_two_nodes_leaves_the_run_folder_to_the_first(here, monkeypatch):
    """Without SLURM or torchrun no process of it knows its rank before the ranks have met."""
    assert fit("--out", "run") == 0
    (here / "run/mine.txt").write_text("kept")
    monkeypatch.setenv("NODE_RANK", "1")
    assert fit("--out", "run", "--overwrite") == 0
    assert (here / "run/mine.txt").exists()


def test_a_moved_run_keeps_its_best_score(here, capsys):
    """Lightning forgets it where the folder's path has changed."""
    assert fit("--out", "run", "--val_every", "2") == 0
    content = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    (key,) = [key for key in content["callbacks"] if key.startswith("Checkpoints") and "val/mIoU" in key]
    state = content["callbacks"][key]
    state["best_model_score"] = state["kth_value"] = torch.tensor(0.99)
    state["best_k_models"] = {path: torch.tensor(0.99) for path in state["best_k_models"]}
    torch.save(content, "run/checkpoints/last.ckpt")
    best = (here / "run/checkpoints/best.ckpt").read_bytes()
    shutil.move("run", "moved")
    assert fit("--out", "moved", "--val_every", "2", "--trainer.max_steps", "6", "--resume") == 0
    assert "The data are not those" not in capsys.readouterr().out
    again = torch.load("moved/checkpoints/last.ckpt", weights_only=True)["callbacks"][key]
    assert again["best_model_score"] == pytest.approx(0.99)
    assert Path(again["best_model_path"]).parts[-3:] == ("moved", "checkpoints", "best.ckpt")
    assert (here / "moved/checkpoints/best.ckpt").read_bytes() == best


@pytest.mark.parametrize("nothing", [["--trainer.limit_val_batches", "0"], ["--data.val_size", "0"]])
def test_a_run_that_validates_nothing_is_not_lost(here, nothing):
    assert fit("--out", "run", "--val_every", "2", *nothing) == 0
    last = here / "run/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4 and not (here / "run/checkpoints/best.ckpt").exists()
    assert fit("--out", "run", "--trainer.max_steps", "6", "--val_every", "3", "--resume", *nothing) == 0
    assert torch.load(last, weights_only=True)["global_step"] == 6


def test_checkpoints_of_ones_own_beside_those_of_the_run(here):
    more = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/loss"]
    more += ["--trainer.callbacks.filename=lowest", "--trainer.callbacks+=ModelCheckpoint"]
    assert fit("--out", "run", *more, "--trainer.callbacks.save_last=true") == 0
    best = json.loads((here / "run/best.json").read_text())
    assert 0 < best["val/mIoU"] <= 1 and best["checkpoint"] == "checkpoints/best.ckpt"
    assert list((here / "run").rglob("lowest.ckpt"))


def test_the_bar_and_the_checkpoints_can_be_turned_off(here):
    off = ["--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"]
    assert fit("--out", "run", *off) == 0
    assert (here / "run/metrics.jsonl").exists() and not list((here / "run").rglob("*.ckpt"))


def test_what_a_callback_has_to_say_is_said(here):
    """Why a run ended early, and the table of a profiler."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tiny; from seglight.cli import main;"
        "sys.exit(main(['fit', '--model', 'Tiny', '--data', 'Blocks', '--out', 'run', *sys.argv[2:]]))"
    )
    words = [*FAST, "--val_every", "1", "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    words += [
        "--trainer.callbacks.mode=min",
        "--trainer.callbacks.stopping_threshold=99",
        "--trainer.callbacks.verbose=true",
        "--trainer.profiler=simple",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "tests"), *words], capture_output=True, text=True, timeout=300
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "Stopping threshold reached" in said and "run_training_batch" in said, said
    assert "Ended at step 1 of 4" in done.stdout


def test_passes_of_half_steps_are_refused(here, capsys):
    words = ["--trainer.limit_train_batches", "3", "--trainer.accumulate_grad_batches", "2"]
    message = refused(capsys, "fit", "--model", "Tiny", "--data", "Blocks", *FAST, *words)
    assert "limit_train_batches is 3" in message and "multiple of 2" in message
