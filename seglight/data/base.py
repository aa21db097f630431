"""What every dataset has in common: its classes, its splits, its loaders."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pytorch_lightning import LightningDataModule
from torch import distributed
from torch.utils.data import DataLoader, Dataset

from seglight.data.boxes import BoxTransform, load_proposals
from seglight.data.cache import Cached
from seglight.data.dataset import SemanticDataset
from seglight.data.faults import FaultySample, Ledger, Loader, Stop
from seglight.data.findings import DataError, choice
from seglight.data.samplers import NOTHING, EvalSampler, TrainSampler
from seglight.data.shared import ship
from seglight.data.transforms import TrainTransform, eval_batch, train_batch

if TYPE_CHECKING:
    from seglight.official import OfficialScores

Split = Literal["train", "val", "test"]


class _View(Dataset):
    """Lets a DataLoader worker build a whole batch at once, each sample written straight into its slot.

    What cannot be read comes back as a `Stop`. In training a key without its pass, as Lightning gives it for
    `trainer.overfit_batches`, is of the first one.
    """

    def __init__(self, length: int, build: Callable[[list[Any]], Any], train: bool = False):
        self.length, self.build, self.train = length, build, train

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, keys: list[Any]) -> Any:
        try:
            if self.train:
                return self.build([key if isinstance(key, tuple) else (0, key) for key in keys])
            return self.build([key for key in keys if key != NOTHING])
        except FaultySample as fault:
            return Stop(f"Sample {fault.name} cannot be read. {fault}")
        except DataError as error:
            return Stop(str(error))


def _start_worker(worker: int) -> None:
    """What a worker process needs of its own.

    Workers are the parallelism: OpenCV's own threads on top would only get in each other's way.

    And SLURM tells every process of a job that it must make room. The handler of SIGUSR1 that a worker has from the
    trainer would save the run there and wait for the other ranks for ever; and a worker that a first SIGTERM ends takes
    the run with it, before that can save its last step.
    """
    import cv2

    cv2.setNumThreads(0)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class DataModule(LightningDataModule):
    """One dataset: its classes, its splits, its loaders.

    Subclasses set `classes` and `palette` and write `dataset(split)`, `train_builder` and `eval_builder`.

    Args:
        batch_size: training samples per device.
        val_batch_size: images per device in validation and test. Scores do not depend on it.
        workers: loader processes per device; 0 loads in the main process. Batches do not depend on it.
        seed: of shuffling and augmentation; by default that of `seed_everything`.
        check: look at every file before training starts, so that a fault costs seconds rather than a night.
        faulty_samples: what to do about a file that breaks during training: "error" stops and names it; "skip" takes
            the next sample that can be read in its place, so that batches keep their size, and names and counts it. The
            check before training still refuses what it finds. Validation and test always stop.
    """

    task: str
    """"semantic" or "instance": what its batches hold."""
    classes: tuple[str, ...]
    """K class names, in label order."""
    palette: tuple[tuple[int, int, int], ...]
    """K RGB colours."""
    protocol = ""
    """What the reader of a score must know about this benchmark; printed with it."""
    id_space: str | None = None
    """Datasets of one space give the same picture the same id, but for zeros before it, so that `Mixed` can tell what
    it is judged by."""

    def __init__(
        self,
        batch_size: int = 8,
        val_batch_size: int = 1,
        workers: int = 2,
        seed: int | None = None,
        check: bool = True,
        faulty_samples: Literal["error", "skip"] = "error",
    ):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer images than ranks is legal in evaluation
        for name, value, low in (
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("workers", workers, 0),
        ):
            if value < low:
                raise ValueError(f"data.{name} is {value}; it must be at least {low}.")
        self.batch_size, self.val_batch_size, self.workers = batch_size, val_batch_size, workers
        self.seed = (
            int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        )  # Lightning puts its seed there
        self.check = check
        choice("faulty_samples", faulty_samples, ("error", "skip"))
        self.faulty_samples = faulty_samples
        self.ledger = Ledger()
        """The training samples that were skipped."""
        self._datasets: dict[str, Any] = {}
        self._sampler: TrainSampler | None = None
        self._goes_on: dict[str, int] = {}  # where in the stream of batches a resumed run goes on

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)

    def dataset(self, split: Split) -> Any:
        """The samples of a split, without augmentation."""
        raise TypeError(f"{type(self).__name__} must define dataset(split).")

    def split(self, split: Split) -> Any:
        """`dataset(split)`, built once."""
        if split not in self._datasets:
            self._datasets[split] = self.dataset(split)
        return self._datasets[split]

    def official_scores(self, split: Split) -> OfficialScores | None:
        """What the benchmark scores beyond mIoU or COCO's AP, for `seglight test`; see `seglight.official`."""
        return None

    def train_builder(self) -> Callable[[list[tuple[int, int]]], Any]:
        """What makes a training batch of pairs of pass number and index; it travels to the workers."""
        raise TypeError(f"{type(self).__name__} must define train_builder().")

    def eval_builder(self, split: Split) -> Callable[[list[int]], Any]:
        """What makes a batch of samples of a split as they are; it travels to the workers."""
        raise TypeError(f"{type(self).__name__} must define eval_builder(split).")

    def prepare_data(self) -> None:
        """Check the files of the splits that the command will use. Lightning calls this on one process per node."""
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        wanted = splits.get(self.trainer.state.fn if self.trainer else "fit", ())
        for split in wanted if self.check else ():
            try:
                self.split(split).check(self.num_classes)
            except DataError as error:
                if split != "train" or self.faulty_samples != "skip":
                    raise
                raise DataError(f"{error}\nTo train without what cannot be read, say data.check: false.") from error

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data of the splits in use, for the run folder."""
        return {
            "name": type(self).__name__,
            "classes": list(self.classes),
            **{split: data.fingerprint() for split, data in self._datasets.items()},
        }

    def train_dataloader(self) -> DataLoader:
        """Training batches: endless passes over the shuffled data."""
        trainer, data = self.trainer, self.split("train")
        world, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        batches, position = max(1, len(data) // (self.batch_size * world)), self._goes_on
        if trainer and trainer.max_steps > 0:
            batches = trainer.max_steps * trainer.accumulate_grad_batches
            position = position or {"skip": trainer.global_step * trainer.accumulate_grad_batches}  # early checkpoints
        self._goes_on = {}
        self._sampler = TrainSampler(
            len(data), self.batch_size, batches, self.seed, rank, world, apart=self.apart(), **position
        )
        return self._train_loader(self._sampler)

    def train_batches(self, count: int) -> DataLoader:
        """The first `count` training batches of this rank, apart from any training that is going on."""
        trainer = self.trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        data = self.split("train")
        sampler = TrainSampler(len(data), self.batch_size, count, self.seed, rank, world, apart=self.apart())
        return self._train_loader(sampler)

    def apart(self) -> np.ndarray | None:
        """Training samples that share no batch with the others, see `TrainSampler`."""
        return None

    def batch_bytes(self) -> int:
        """What the images and masks of a training batch take; 0 where that differs from batch to batch."""
        return 0

    def _train_loader(self, sampler: TrainSampler) -> DataLoader:
        view = _View(len(self.split("train")), self.train_builder(), train=True)
        advice = "To leave such samples out of training, say data.faulty_samples: skip."
        return Loader(
            view,
            batch_size=self.batch_size,
            sampler=sampler,
            ledger=self.ledger,
            block=self.batch_bytes(),
            advice="" if self.faulty_samples == "skip" else advice,
            **self._loader_options(),
        )

    def _eval_dataloader(self, split: Split) -> DataLoader:
        data = self.split(split)
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = EvalSampler(len(data), rank, world)
        view = _View(len(data), self.eval_builder(split))
        advice = "Scores of a part of the split would not be those of the split, so none are given."
        return Loader(view, batch_size=self.val_batch_size, sampler=sampler, advice=advice, **self._loader_options())

    def val_dataloader(self) -> DataLoader:
        """Samples at their original size, each image once over all ranks."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """As `val_dataloader`, for the test split."""
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        """The test split; labels travel along and are not looked at."""
        return self._eval_dataloader("test")

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: where in the stream of batches the training is, and which samples were skipped."""
        state: dict[str, Any] = {"faulty": dict(self.ledger.reasons)} if self.ledger.reasons else {}
        if self.trainer is not None and self.trainer.state.fn == "fit" and self._sampler is not None:
            loop = self.trainer.fit_loop
            start = self._sampler.start_of(loop.epoch_progress.current.ready - 1)
            seen = loop.epoch_loop.batch_progress.current.ready
            whole = seen >= self.trainer.num_training_batches
            state["position"] = {"start": start + whole * self._sampler.batches, "skip": 0 if whole else seen}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.ledger.reasons.update(state_dict.get("faulty", {}))
        self._goes_on = dict(state_dict.get("position", {}))

    def teardown(self, stage: str) -> None:
        """After training, say which samples took no part in it; rank 0 does so for all."""
        if stage != "fit":
            return
        if distributed.is_available() and distributed.is_initialized():
            found: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(found, self.ledger.reasons)
            self.ledger.reasons = {name: reason for one in found for name, reason in one.items()}
            if distributed.get_rank():
                return
        self.ledger.report()

    def _loader_options(self) -> dict[str, Any]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "num_workers": self.workers,
            "collate_fn": ship,  # it is already a batch
            "pin_memory": on_gpu,
            "persistent_workers": self.workers > 0,
            "worker_init_fn": _start_worker,
        }


class SemanticDataModule(DataModule):
    """One dataset for semantic segmentation.

    Batches are `seglight.types.SemanticBatch` in training and `SemanticEvalBatch` elsewhere. Subclasses set `classes`
    and `palette` and write `dataset(split)`, which returns a `SemanticDataset`.

    Args:
        crop: height and width of a training crop in pixels; one number for a square; null trains on whole images.
        scale: range of the random resize before the crop.
        flip: probability of mirroring left to right.
        rotate: largest random rotation, degrees either way.
        elastic: standard deviation of the elastic deformation, pixels (U-Net paper: 10).
        jitter: strength of random brightness, contrast and saturation, 0 for none.
        crop_around: "objects" or "proposals": crops show a box of the image rather than a random part of it, for the
            two stages of DeconvNet; see `seglight.data.boxes.BoxTransform`.
        proposals: a file of `seglight.data.boxes.save_proposals`, for crops around proposals.
        cache: folder of `seglight data cache`, to read decoded samples from. Batches do not depend on it.
    """

    task = "semantic"

    def __init__(
        self,
        batch_size: int = 8,
        crop: int | tuple[int, int] | None = 512,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        rotate: float = 0.0,
        elastic: float = 0.0,
        jitter: float = 0.0,
        crop_around: Literal["objects", "proposals"] | None = None,
        proposals: str | None = None,
        cache: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(batch_size=batch_size, **kwargs)
        self.cache = cache
        if crop is None and batch_size > 1:
            raise ValueError(
                f"data.crop is null, so images keep their own sizes and cannot be stacked, but data.batch_size is "
                f"{batch_size}. Set it to 1 (trainer.accumulate_grad_batches makes up for it) or give a crop."
            )
        augment = {
            "crop": crop, "scale": scale, "flip": flip, "rotate": rotate, "elastic": elastic, "jitter": jitter
        }  # fmt: skip
        self.transform = TrainTransform(**augment)
        if crop_around or proposals:
            self.transform = BoxTransform(crop_around, load_proposals(proposals) if proposals else None, **augment)

    def split(self, split: Split) -> SemanticDataset:
        """`dataset(split)`, built once, from the cache if there is one."""
        data = super().split(split)
        if self.cache and not isinstance(data, Cached):
            data = self._datasets[split] = Cached(data, self.cache, self.classes)
        return data

    def batch_bytes(self) -> int:
        """See `DataModule.batch_bytes`."""
        return 4 * self.batch_size * math.prod(self.transform.crop or (0,))

    def train_builder(self) -> Callable[[list[tuple[int, int]]], dict[str, Any]]:
        """Makes a `seglight.types.SemanticBatch`."""
        transform = self.transform.of(self.classes)
        skip = self.faulty_samples == "skip"
        return partial(train_batch, self.split("train"), transform=transform, seed=self.seed, skip=skip)

    def eval_builder(self, split: Split) -> Callable[[list[int]], dict[str, Any]]:
        """Makes a `seglight.types.SemanticEvalBatch`."""
        return partial(eval_batch, self.split(split))
