"""What everything around a training step costs: `python -m seglight.benchmarks.step`.

A network so small that a bare PyTorch loop needs about a millisecond per step; what a framework adds to it, it adds to
any other network too (on a GPU at most that, because host work hides behind queued kernels). Mark: the whole of
seglight, with its losses logged, its metric, its checkpoint callbacks, its guard, its bar and its logger, adds less
than 2 ms per step. The contestants compute the same loss and the same label maps of the same batches. Nothing here
waits, so on an idle machine the processor time is the time; it is shown because other programs disturb it less.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from seglight.benchmarks.timing import Row, show, single_thread
from seglight.callbacks.parts import trainer_parts
from seglight.models.semantic import SemanticModel

CLASSES, LIMIT = 5, 2.0


def main(argv: list[str] | None = None) -> int:
    """Print one table."""
    parser = argparse.ArgumentParser(prog="seglight bench step", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(argv)
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    order, draw = list(CONTESTANTS), random.Random(0)
    with single_thread(), _quiet(), tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds + 1):
            draw.shuffle(order)
            for name in order:
                ms = CONTESTANTS[name](options.steps, Path(folder) / f"{turn}{name}")
                if turn:  # the first turn warms up
                    times[name].append(ms)
    base = times["bare loop"]
    added = {name: statistics.median(t - b for t, b in zip(ms, base, strict=True)) for name, ms in times.items()}
    marks = {name: f"adds {more:.2f} ms" for name, more in added.items() if name != "bare loop"}
    marks["seglight"] += f"; mark: < {LIMIT} ms, {'met' if added['seglight'] < LIMIT else 'MISSED'}"
    rows = []
    for name, ms in times.items():
        ratio = statistics.median(t / b for t, b in zip(ms, base, strict=True))
        rows.append(Row(name, statistics.median(ms), ratio, marks.get(name, "")))
    show(rows, "bare loop", options.rounds, f"one training step, mean of {options.steps}")
    return 0


class Batches(Dataset):
    """The same small batch again and again."""

    def __init__(self, steps: int):
        generator = torch.Generator().manual_seed(0)
        self.steps = steps
        self.batch = {
            "image": torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8),
            "mask": torch.randint(0, CLASSES, (4, 32, 32), generator=generator, dtype=torch.uint8),
            "image_id": [f"picture {i}" for i in range(4)],
        }

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict:
        return self.batch


def _loader(steps: int) -> DataLoader:
    return DataLoader(Batches(steps), batch_size=None)


class TinyNetwork(nn.Module):
    """Four convolutions."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"out": self.body(image)}


def _labels(outputs: dict[str, Tensor]) -> Tensor:
    return outputs["out"].detach().argmax(1).to(torch.uint8)


class Clock:
    """When the first and the last steps began; the first tenth is not counted."""

    def __init__(self, steps: int):
        self.count, self.first, self.last = 0, steps // 10, steps

    def tick(self) -> None:
        self.count += 1
        if self.count == self.first:
            self.begun = time.process_time()
        self.now = time.process_time()

    @property
    def ms(self) -> float:
        return 1000 * (self.now - self.begun) / (self.count - self.first)


class Ours(SemanticModel):
    """A seglight model that also counts every training batch in its confusion matrix."""

    def __init__(self, clock: Clock):
        super().__init__(network=TinyNetwork(), num_classes=CLASSES)
        self.clock = clock

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        self.clock.tick()
        outputs = self.network(self.normalize(batch["image"]))
        losses = self.loss(outputs, batch)
        self.confusion.update(_labels(outputs), batch["mask"])
        self.track(losses)
        return losses["loss"]


class Plain(LightningModule):
    """The same network and loss in a module of Lightning's usual kind; `chatty` logs as many projects do."""

    def __init__(self, clock: Clock, chatty: bool):
        super().__init__()
        from torchmetrics.classification import MulticlassJaccardIndex

        self.clock, self.chatty = clock, chatty
        self.model = SemanticModel(network=TinyNetwork(), num_classes=CLASSES)
        self.jaccard = MulticlassJaccardIndex(CLASSES, ignore_index=255)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        self.clock.tick()
        outputs = self.model.network(self.model.normalize(batch["image"]))
        loss, labels = self.model.loss(outputs, batch)["loss"], _labels(outputs)
        if self.chatty:
            iou = self.jaccard(labels, batch["mask"])
            accuracy = (labels == batch["mask"]).float().mean()
            self.log("train/loss", loss, prog_bar=True, batch_size=4)
            self.log("train/iou", iou, prog_bar=True, batch_size=4)
            self.log("train/accuracy", accuracy, prog_bar=True, batch_size=4)
            self.log("train/loss_main", loss.detach(), batch_size=4)
            self.log("train/loss_aux", 0.4 * loss.detach(), batch_size=4)
            self.log("train/batch", float(batch_idx), batch_size=4)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def bare(steps: int, folder: Path) -> float:
    """A loop of one's own."""
    clock, model = Clock(steps), SemanticModel(network=TinyNetwork(), num_classes=CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for batch in _loader(steps):
        clock.tick()
        outputs = model.network(model.normalize(batch["image"]))
        loss, _ = model.loss(outputs, batch)["loss"], _labels(outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clock.ms


def _fit(model: LightningModule, steps: int, folder: Path, **options: object) -> float:
    options = {"accelerator": "cpu", "default_root_dir": folder, "enable_model_summary": False, **options}
    trainer = Trainer(max_steps=steps, use_distributed_sampler=False, **options)
    trainer.fit(model, _loader(steps))
    return model.clock.ms


def minimal(steps: int, folder: Path) -> float:
    """Lightning with everything off."""
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return _fit(Plain(Clock(steps), chatty=False), steps, folder, **off)


def seglight(steps: int, folder: Path) -> float:
    """Everything that `seglight fit` has."""
    return _fit(Ours(Clock(steps)), steps, folder, log_every_n_steps=20, **trainer_parts(folder))


def usual(steps: int, folder: Path) -> float:
    """Lightning as many research projects use it: six values and a metric logged at each step."""
    extras = [LearningRateMonitor("step"), ModelCheckpoint(folder)]
    options = {"logger": CSVLogger(folder), "callbacks": extras, "log_every_n_steps": 1}
    return _fit(Plain(Clock(steps), chatty=True), steps, folder, **options)


CONTESTANTS: dict[str, Callable[[int, Path], float]] = {
    "bare loop": bare,
    "Trainer, everything off": minimal,
    "seglight": seglight,
    "Trainer, 6 self.log and Jaccard per step": usual,
}


class _Terminal(io.StringIO):
    """Swallows what is written, and makes a bar believe that someone watches."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither bars nor messages of the many short trainings."""
    import logging

    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    out, err = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = _Terminal()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout, sys.stderr = out, err
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


if __name__ == "__main__":
    raise SystemExit(main())
