"""`WandB`: Weights & Biases, online or offline."""

from __future__ import annotations

import atexit
import netrc
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import DummyExperiment, rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from seglight.loggers.harmless import never_stops
from seglight.loggers.local import read_metrics
from seglight.types import IGNORE_INDEX

BETTER = {"max": max, "min": min}


@dataclass
class Masked:
    """A picture with label maps that a dashboard can switch on and off."""

    image: np.ndarray
    """uint8 (H, W, 3)."""
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    """uint8 (H, W) by name, for instance `prediction`."""
    caption: str = ""
    boxes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Boxes by name, each in wandb's form: position in pixels, class_id, box_caption and scores."""


class WandB(WandbLogger):
    """Weights & Biases, offline first, one run per job (rank 0).

    Online when there is a key (WANDB_API_KEY, `wandb login`) and WANDB_MODE does not say otherwise; offline in all
    other cases, also when the server cannot be reached at the start. An offline run prints the command that uploads
    it. The x axis of every chart is our optimiser step, `step`. The configuration is sent once, nested, before the
    first step: the first of `log_config` and `log_hyperparams` wins.

    wandb (up to 0.31 at least) has no way to give mask classes a colour, and drops one that is passed: the dataset's
    colours are in the pictures that `Pictures` logs beside the masks.

    Args:
        project: W&B project.
        name: of the run; W&B invents one otherwise.
        save_dir: files go to `save_dir`/wandb.
        id: of the run. A resumed job passes the id that its checkpoint holds, and so continues the same run.
        best: metrics whose best value the run's summary shows, each with "max" or "min"; by default those that
            select best.ckpt.
        log_model: upload checkpoints as artifacts, see Lightning's WandbLogger. Ignored offline.
        **kwargs: further arguments of Lightning's WandbLogger and of `wandb.init`: entity, group, tags, notes ...
    """

    START_TIMEOUT = 30.0
    """Seconds to wait for the server before the run goes offline."""
    END_TIMEOUT = 60.0
    """Seconds to wait at the end until the server has the whole run; ten times that with `log_model`."""
    TABLE_TIMEOUT, TABLE_PAUSE = 5.0, 600.0
    """Seconds: when a table keeps the training waiting longer than the first, none are logged for the second."""

    def __init__(
        self,
        project: str = "seglight",
        name: str | None = None,
        save_dir: str | Path = ".",
        id: str | None = None,
        best: dict[str, str] | None = None,
        log_model: bool = False,
        **kwargs: Any,
    ):
        super().__init__(name=name, save_dir=save_dir, id=id, project=project, **kwargs)
        self.best = {"val/mIoU": "max", "val/AP": "max"} if best is None else best
        self._want_model = log_model
        self._configured = self._broken = False
        self._announced = self._failed = False
        self._no_tables_until = 0.0
        self._earlier: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the run: a spawned rank 0 starts it, and no other process does."""
        return {**self.__dict__, "_experiment": None}

    @property
    def run_id(self) -> str | None:
        """The run's id, to be stored in checkpoints; None before the run has started."""
        return self.version or os.environ.get("WANDB_RUN_ID")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `wandb.Run`, started on first use; an object that ignores everything when it cannot start."""
        if self._experiment is None and not self._broken:
            self._experiment = self._start()
            self._broken = self._experiment is None
        return DummyExperiment() if self._broken else self._experiment

    @never_stops
    def _start(self) -> Any:
        import wandb

        # Of wandb's own words only warnings and errors: it has a line for every request to a failing server.
        wandb.setup(wandb.Settings(show_info=False))
        mode = "offline" if self._offline else self._wandb_init.get("mode") or wandb_mode()
        Path(self._wandb_init["dir"]).mkdir(parents=True, exist_ok=True)
        # The command line passes every option of wandb.init, most as None, which would undo the defaults of Lightning.
        options = {name: value for name, value in self._wandb_init.items() if value is not None}
        # Without an end to its patience wandb waits for a lost server for days.
        patience = self.END_TIMEOUT * (10 if self._want_model else 1)
        waiting = {"init_timeout": self.START_TIMEOUT, "finish_timeout": patience, "finish_timeout_raises": True}
        options.setdefault("settings", wandb.Settings(silent=True, **waiting))
        options.setdefault("resume", "allow")
        # A run of its own, whatever other runs this process has (a notebook, a sweep of short jobs).
        options.update(reinit="create_new", mode=mode)
        try:
            run = wandb.init(**options)
        except wandb.Error as error:
            if mode != "online":
                raise
            reason = str(error).splitlines()[0].rstrip(".")
            print(
                f"W&B: {wandb.setup().settings.base_url} cannot be used ({reason}), so the run is "
                f"recorded offline; the command that uploads it is printed at the end. Until then, check the network, "
                f"WANDB_BASE_URL and the key (wandb login --relogin).",
                flush=True,
            )
            options["mode"] = mode = "offline"
            run = wandb.init(**options)
        self._log_model = self._want_model and mode == "online"
        self._offline = mode == "offline"
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step", step_sync=True)
        for metric, summary in self.best.items():
            run.define_metric(metric, step_metric="step", step_sync=True, summary=summary)
        self._earlier = self._best_before()
        atexit.register(self.finish)  # before wandb's own, which says nothing of what it could not upload
        if mode == "online":
            print(f"W&B: {run.url}", flush=True)
        return run

    @rank_zero_only
    @never_stops
    def log_config(self, config: Any) -> None:
        """Send the whole configuration, nested, unless one was sent already.

        Args:
            config: dict or Namespace of plain values. It must not hold secrets: everything in it is sent.
        """
        run = self.experiment
        if not self._configured and not self._broken:
            run.config.update(_plain(config), allow_val_change=True)
            self._configured = True

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """As `log_config`; Lightning calls it with the model's hyperparameters."""
        self.log_config(params)

    @rank_zero_only
    @never_stops
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log values at an optimiser step."""
        self.experiment.log(dict(metrics) if step is None else {**metrics, "step": int(step)})
        for metric in self._earlier.keys() & metrics.keys():
            self._earlier[metric] = BETTER[self.best[metric]](self._earlier[metric], float(metrics[metric]))
            self.experiment.summary[metric] = {self.best[metric]: self._earlier[metric]}

    def _best_before(self) -> dict[str, float]:
        """Best values of a resumed run until now, as `RunLogger` has them: wandb's own begin anew with each job."""
        folder = Path(self._wandb_init["dir"])
        if self._id is None or not (folder / "metrics.jsonl").exists():
            return {}
        records = read_metrics(folder)
        ranked = [metric for metric, summary in self.best.items() if summary in BETTER]
        values = {metric: [r[metric] for r in records if r.get(metric) is not None] for metric in ranked}
        return {metric: BETTER[self.best[metric]](found) for metric, found in values.items() if found}

    @rank_zero_only
    @never_stops
    def log_masks(
        self, key: str, pictures: Sequence[Masked], class_labels: Mapping[str, Mapping[int, str]], step: int
    ) -> None:
        """Log pictures with native mask overlays under one key.

        One list under one key, because wandb stores the class names once per key and mask in the run's config.

        Args:
            key: for instance "media/val".
            pictures: in a stable order.
            class_labels: for each name of a mask, which all pictures have, what its values mean.
            step: optimiser step.
        """
        import wandb

        labels = {name: {int(k): str(v) for k, v in meaning.items()} for name, meaning in class_labels.items()}
        pixels = _same_size([picture.image for picture in pictures], 255)
        masks = {name: _same_size([picture.masks[name] for picture in pictures], IGNORE_INDEX) for name in labels}
        images = [
            wandb.Image(
                image,
                caption=pictures[i].caption,
                file_type="jpg",
                masks={name: {"mask_data": masks[name][i], "class_labels": labels[name]} for name in labels},
                boxes={
                    name: {"box_data": boxes, "class_labels": labels[name]} for name, boxes in pictures[i].boxes.items()
                }
                or None,
            )
            for i, image in enumerate(pixels)
        ]
        self.log_metrics({key: images}, step)
        # With each class name wandb (0.31) sends its config as it was before any metric was defined, which undoes the
        # definitions on the server. To define one again sends all of them.
        self.experiment.define_metric("step", hidden=True)

    @rank_zero_only
    @never_stops
    def log_picture(self, key: str, pictures: Sequence[np.ndarray], step: int, captions: Sequence[str] = ()) -> None:
        """Log uint8 (H, W, 3) arrays as they are."""
        import wandb

        names = captions or [""] * len(pictures)
        pixels = _same_size(pictures, 255)
        images = [wandb.Image(p, caption=name, file_type="jpg") for p, name in zip(pixels, names, strict=True)]
        self.log_metrics({key: images}, step)

    @rank_zero_only
    @never_stops
    def log_table(
        self, key: str, columns: Any = None, data: Any = None, dataframe: Any = None, step: int | None = None
    ) -> None:
        """Log a `wandb.Table`, unless the last one had to wait for the server.

        A table is the only thing for which wandb asks the server before it goes on, and it waits 20 s for an answer.
        """
        start = time.monotonic()
        if start < self._no_tables_until:
            return
        super().log_table(key, columns, data, dataframe, step)
        taken = time.monotonic() - start
        if taken > self.TABLE_TIMEOUT:
            self._no_tables_until = start + taken + self.TABLE_PAUSE
            print(
                f"W&B: the table {key} kept the training waiting for {taken:.0f} s, because the server does not "
                f"answer. Tables are left out for {self.TABLE_PAUSE / 60:.0f} minutes; training goes on.",
                flush=True,
            )

    @never_stops
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Upload it, when `log_model` asks for that."""
        super().after_save_checkpoint(checkpoint_callback)

    @rank_zero_only
    @never_stops
    def finalize(self, status: str) -> None:
        """Say how to upload an offline run. The run itself stays open for a test after the training."""
        super().finalize(status)
        self._failed = status != "success"
        if self._offline and not self._announced and getattr(self._experiment, "dir", None):
            self._announced = True
            here = Path(self._experiment.dir).parent
            runs = sorted(here.parent.glob(f"offline-run-*-{self._experiment.id}")) or [here]
            print("W&B: recorded offline. To upload:  wandb sync " + " ".join(map(str, runs)), flush=True)

    @rank_zero_only
    @never_stops
    def finish(self) -> None:
        """Close the run now; otherwise it is closed when the process ends."""
        if self._experiment is None:
            return
        atexit.unregister(self.finish)
        try:
            self._experiment.finish(exit_code=int(self._failed))
        except TimeoutError:
            print(
                f"W&B: {self._experiment.settings.base_url} has not taken the whole run within the time it is given at "
                f"the end. To upload the rest later:  wandb sync --include-online {Path(self._experiment.dir).parent}",
                flush=True,
            )


def wandb_mode() -> str:
    """`online` if there are credentials, without asking the network; `offline` otherwise; WANDB_MODE wins."""
    import wandb

    asked = os.environ.get("WANDB_MODE")
    if asked:
        return "offline" if asked == "dryrun" else asked
    settings = wandb.setup().settings
    if settings.mode != "online":  # after `wandb offline` in this folder
        return settings.mode
    if settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    host = urlsplit(settings.base_url).netloc
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in files):
        if path.is_file():
            try:
                known = netrc.netrc(path).authenticators(host)
            except (netrc.NetrcParseError, OSError):
                continue
            if known and known[2]:
                return "online"
    return "offline"


def _same_size(arrays: Sequence[np.ndarray], filling: int) -> list[np.ndarray]:
    """Filled up to the right and below: W&B shows pictures of one key wrongly when their sizes differ."""
    height, width = (max(array.shape[axis] for array in arrays) for axis in (0, 1))
    sizes = ([(0, height - a.shape[0]), (0, width - a.shape[1]), *[(0, 0)] * (a.ndim - 2)] for a in arrays)
    return [np.pad(a, size, constant_values=filling) for a, size in zip(arrays, sizes, strict=True)]


def _plain(value: Any) -> Any:
    """Nested dicts, lists and scalars; everything else as text."""
    if isinstance(value, Namespace) or hasattr(value, "as_dict"):  # jsonargparse's Namespace has as_dict
        value = value.as_dict() if hasattr(value, "as_dict") else vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
