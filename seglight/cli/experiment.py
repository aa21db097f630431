"""`seglight fit|validate|test|predict`: LightningCLI on YAML experiments."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionYesNo, set_loader
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from seglight import data, models
from seglight.callbacks.best import Checkpoints
from seglight.callbacks.parts import trainer_parts
from seglight.callbacks.progress import Progress
from seglight.checkpoints import of_run, read
from seglight.cli.errors import LINKED, explain, linked, subclasses
from seglight.cli.evaluation import complete, option
from seglight.cli.experiment_file import UsageError, load_yaml
from seglight.data.base import DataModule
from seglight.models.base import BaseModel

for package in (models, data):  # jsonargparse knows a short name such as FCN8s once its class is imported
    for public in package.__all__:
        getattr(package, public)

set_loader("seglight", load_yaml, exceptions=(yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """Errors are one readable paragraph."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Explain and leave with status 2."""
        fail(explain(str(message)))


def fail(message: str) -> None:
    """Print one paragraph on rank 0 and leave with status 2."""
    if rank_zero_only.rank == 0:
        print(f"seglight: {message}", file=sys.stderr)
    raise SystemExit(2)


def validation_interval(val_every: int | None, max_steps: int, accumulate: int) -> int | None:
    """Optimiser steps between validations as Lightning counts them: in batches.

    The last step is always one that is scored: a given interval must divide max_steps, the default is the nearest
    divisor that gives ten validations or fewer.
    """
    if val_every is None:
        val_every = next(max_steps // n for n in range(min(10, max_steps), 0, -1) if max_steps % n == 0)
    val_every = min(val_every, max_steps)
    if val_every < 1 or max_steps % val_every:
        down, up = max_steps // max(val_every, 1) * val_every, -(-max_steps // max(val_every, 1)) * val_every
        raise UsageError(
            f"val_every is {val_every} and does not divide trainer.max_steps {max_steps}, so the last steps would "
            f"never be scored. Use a max_steps of {down} or {up}, or another val_every."
        )
    return val_every * accumulate


class ExperimentCLI(LightningCLI):
    """LightningCLI plus: the class link, the run folder, `--resume`, and steps as the only unit."""

    _replaced: Path | None = None  # the old run folder that --overwrite deletes

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links and the few options that are neither model, data nor Trainer."""
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        parser.add_argument("--out", type=str | None, help="Run folder; by default runs/ and the experiment's name.")
        parser.add_argument(
            "--resume", action=ActionYesNo, default=False, help="Continue from last.ckpt of the run folder."
        )
        parser.add_argument(
            "--overwrite", action=ActionYesNo, default=False, help="Delete the run folder and start anew."
        )
        parser.add_argument("--val_every", type=int | None, help="Optimiser steps between validations.")
        parser.set_defaults(
            {
                "trainer.max_steps": 10000,
                "trainer.check_val_every_n_epoch": None,
                "trainer.num_sanity_val_steps": 1,
                "trainer.enable_model_summary": False,  # the run folder's first screen says it
                "trainer.logger": False,
                "trainer.use_distributed_sampler": False,
            }
        )

    def before_instantiate_classes(self) -> None:
        """Everything that can be refused before anything heavy is built is refused here."""
        config = self.config[self.subcommand]
        self._refuse_linked(config)
        _refuse_other_task(config)
        trainer = config.trainer
        if self.subcommand == "fit" and (trainer.max_steps < 1 or trainer.max_epochs not in (None, -1)):
            raise UsageError(
                f"trainer.max_steps is {trainer.max_steps} and trainer.max_epochs {trainer.max_epochs}, but the length "
                f"of a run is counted in optimiser steps alone. Give trainer.max_steps; one pass over the images takes "
                f"their number divided by data.batch_size, the devices and trainer.accumulate_grad_batches."
            )
        limit, accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
        if isinstance(limit, int) and limit % accumulate:
            raise UsageError(
                f"trainer.limit_train_batches is {limit} and trainer.accumulate_grad_batches {accumulate}: the last "
                f"step of each pass would be made of fewer batches. Use a multiple of {accumulate}."
            )
        interval = validation_interval(config.val_every, trainer.max_steps, trainer.accumulate_grad_batches)
        if trainer.val_check_interval is not None:
            raise UsageError("trainer.val_check_interval counts batches; give val_every, in optimiser steps, instead.")
        self.yaml = self._parser(self.subcommand).dump(config, skip_link_targets=True)
        trainer.val_check_interval = interval
        self._choose_for_device(trainer)
        if "verbose" in config:
            config.verbose = False  # the run folder prints the table, with its definition
        self.run_dir = self._run_dir(config)
        for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
            arguments = getattr(logger, "init_args", {})
            if "save_dir" in arguments and str(arguments["save_dir"] or ".") == ".":
                arguments["save_dir"] = str(self.run_dir)
            if config.get("resume") and arguments.get("id", "") is None:
                arguments["id"] = _dashboard_id(config.ckpt_path)

    def _refuse_linked(self, config: Any) -> None:
        bare = {"model": {BaseModel.__name__}, "data": {"DataModule", "SemanticDataModule", "InstanceDataModule"}}
        for section, bases in bare.items():
            if config[section].class_path.rpartition(".")[2] in bases:
                raise UsageError(f"{section} does not say which class. Give one, for instance --{section} NAME.")
        for name in LINKED:
            if config.model.init_args.get(name) is not None:
                raise UsageError(linked(name))

    def _choose_for_device(self, trainer: Any) -> None:
        import torch

        on_gpu = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
        if trainer.precision is None:
            fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
            trainer.precision = "bf16-mixed" if fast else "32-true"
        elif "bf16" in str(trainer.precision) and not on_gpu:
            warnings.warn(
                f"trainer.precision is {trainer.precision} on a CPU: most CPUs emulate bf16 and train 10 to 30 times "
                f"slower than with 32-true.",
                stacklevel=2,
            )
        if trainer.sync_batchnorm and not on_gpu:
            trainer.sync_batchnorm = False  # torch has it for GPUs only, and refuses several ranks on a CPU
            if trainer.devices not in ("auto", 1, "1"):
                warnings.warn("trainer.sync_batchnorm needs GPUs; each rank uses statistics of its own.", stacklevel=2)

    def _run_dir(self, config: Any) -> Path:
        """The run folder, named and checked; `instantiate_trainer` empties it if that was asked for."""
        # Of several nodes without SLURM or torchrun each takes itself for the first, until the ranks have met.
        first = rank_zero_only.rank == 0 and int(os.environ.get("NODE_RANK") or 0) == 0
        if self.subcommand != "fit":
            return _free(Path(config.get("out") or _run_of(config) / self.subcommand))
        path = Path(config.out or Path("runs") / experiment_name(config))
        last = path / "checkpoints" / "last.ckpt"
        if requeued() and (path / "config.yaml").is_file():
            config.resume, config.overwrite = last.is_file(), not last.is_file()
        if config.resume and config.overwrite:
            raise UsageError("--resume continues a run and --overwrite deletes it; give one of them.")
        if config.resume:
            if not last.is_file():
                raise UsageError(f"--resume finds no {last}. Start the run without it, or name its folder with --out.")
            config.ckpt_path = str(last)
        elif first and path.is_dir() and any(path.iterdir()):
            if not config.overwrite:
                raise UsageError(
                    f"The run folder {path} is not empty. Continue that run with --resume, delete it with "
                    f"--overwrite, or write elsewhere with --out FOLDER."
                )
            if not (path / "config.yaml").is_file():
                raise UsageError(f"{path} holds no config.yaml, so it is not a run folder and is not deleted.")
            self._replaced = path
        return path

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add to the experiment's Trainer what every run has."""
        config = self.config_init[self.subcommand]["trainer"]
        loggers = config.get("logger") or []
        loggers = loggers if isinstance(loggers, list) else [loggers]
        chosen = {"monitor": self.model.monitor, "show": self.model.show}
        parts = trainer_parts(self.run_dir, self.yaml, loggers=loggers, **chosen)
        off = [Progress] if config.get("enable_progress_bar") is False else []
        off += [Checkpoints] if config.get("enable_checkpointing") is False else []
        kept = [part for part in parts["callbacks"] if not isinstance(part, tuple(off))]
        parts["callbacks"] = [*(config.get("callbacks") or []), *kept]
        plugins = config.get("plugins") or []
        parts["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), *parts["plugins"]]
        trainer = super().instantiate_trainer(**parts, **kwargs)
        _refuse_absent_ranks(trainer)
        if self._replaced is not None:
            self.datamodule.prepare_data()  # a run that cannot begin, for want of its data, must not cost the old one
            shutil.rmtree(self._replaced)
        return trainer


def _refuse_other_task(config: Any) -> None:
    """A semantic model cannot learn from boxes and masks, nor the other way round: say so before building anything."""
    model, dataset = (_class(config[section].class_path) for section in ("model", "data"))
    if model.task != dataset.task:
        fitting = sorted(
            name for name, cls in subclasses(DataModule).items() if getattr(cls, "task", None) == model.task
        )
        raise UsageError(
            f"{model.__name__} is for {model.task} segmentation, but {dataset.__name__} gives {dataset.task} labels. "
            f"Choose another model, or one of --data {', '.join(fitting)}."
        )


def _refuse_absent_ranks(trainer: Any) -> None:
    """In a SLURM job Lightning starts no processes, and would wait for ever for those that `srun` has not started."""
    cluster = getattr(trainer.strategy, "cluster_environment", None)
    ranks, tasks = trainer.num_nodes * trainer.num_devices, int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if isinstance(cluster, SLURMEnvironment) and ranks > tasks:
        started = tasks if "SLURM_STEP_ID" in os.environ else 0
        raise UsageError(
            f"trainer.num_nodes {trainer.num_nodes} with {trainer.num_devices} devices each need {ranks} processes. "
            f"In a SLURM job srun has to start them, but it has started {started}. "
            f"Put srun before the command, with #SBATCH --nodes={trainer.num_nodes} "
            f"--ntasks-per-node={trainer.num_devices}; or run it with one device."
        )


def requeued() -> bool:
    """Whether SLURM has put this job back into the queue: the same command then means to go on, not to start anew."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def experiment_name(config: Any) -> str:
    """`voc/fcn8s` for experiments/voc/fcn8s.yaml, else model and dataset: `fcn8s-shapes`."""
    files = [Path(str(path)) for path in config.get("config") or []]
    if files:
        return "/".join(part for part in (files[0].resolve().parent.name, files[0].stem) if part != "experiments")
    return "-".join(config[part].class_path.rpartition(".")[2].lower() for part in ("model", "data"))


def _run_of(config: Any) -> Path:
    """The run folder that a checkpoint lies in; that of the experiment for an ensemble, which has none of its own."""
    if config.ckpt_path is None:
        return Path("runs") / experiment_name(config)
    checkpoint = Path(config.ckpt_path)
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def _dashboard_id(checkpoint: str) -> str | None:
    """The W&B run that a checkpoint belongs to."""
    return of_run(read(checkpoint)).get("wandb_id")


def _free(path: Path) -> Path:
    """This folder, or the first of NAME-2, NAME-3, ... that does not exist: results are never overwritten."""
    if rank_zero_only.rank != 0 or not path.exists():
        return path
    number = 2
    while path.with_name(f"{path.name}-{number}").exists():
        number += 1
    return path.with_name(f"{path.name}-{number}")


def _silence_known() -> None:
    """Warnings that a user can do nothing about."""
    ignore = partial(warnings.filterwarnings, "ignore")
    # We do run from the command line; only the stored config of a checkpoint was put before the arguments.
    ignore(message="LightningCLI's args parameter")
    # Lightning 2.6 calls jsonargparse and torch by names that their newest versions are about to rename.
    ignore(category=DeprecationWarning, module="pytorch_lightning")
    ignore(category=FutureWarning, module="pytorch_lightning")
    # Scores are summed over ranks already.
    ignore(message=".*It is recommended to use `self.log.*sync_dist=True")
    if "SLURM_JOB_ID" not in os.environ:  # on a machine that can also submit jobs
        ignore(message="The `srun` command is available on your system but is not used")
    # Batches are built by our own workers; how many is the user's choice in data.workers.
    ignore(message=".*does not have many workers")
    ignore(message=".*Your `val_dataloader`'s sampler has shuffling enabled")
    ignore(message=".*Checkpoint directory .* exists and is not empty")  # --resume, checked by us
    ignore(message=".*The dirpath has changed from")  # a test writes beside the run that it scores
    ignore(message=".*`ModelCheckpoint` callback states in the checkpoint")
    # A rank without images of its own still takes part in the sum.
    ignore(message=".*The ``compute`` method of metric ConfusionMatrix was called before")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    for name in ("callbacks.early_stopping", "profilers", "tuner"):  # what was asked for is to be said
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.INFO)


def _show_messages() -> None:
    """What models and data say while they are built belongs on the terminal: weights taken, samples left out."""
    for name in ("seglight.models", "seglight.data"):
        messages = logging.getLogger(name)
        if rank_zero_only.rank == 0 and not messages.handlers:
            messages.addHandler(logging.StreamHandler(sys.stdout))
            messages.setLevel(logging.INFO)


def main(argv: list[str]) -> int:
    """Run one of LightningCLI's verbs; returns the exit status."""
    if argv[0] == "predict" and option(argv, "--source"):
        from seglight.predict import main as predict

        return predict(argv[1:])
    try:
        completed = complete(argv)
        with warnings.catch_warnings():
            _silence_known()
            _show_messages()
            ExperimentCLI(
                BaseModel,
                DataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,
                seed_everything_default=0,
                auto_configure_optimizers=False,  # its --optimizer would replace our parameter groups
                parser_class=Parser,
                parser_kwargs={"parser_mode": "seglight"},
                args=completed,
            )
    except (UsageError, MisconfigurationException, ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("SEGLIGHT_TRACEBACK"):
            raise
        message = str(error)  # one of ours, which jsonargparse may have wrapped
        print(f"seglight: {explain(message) if 'Union subtypes' in message else message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0
