"""What every model shares: normalisation, optimiser, schedule, the training loss curve and the checkpoint's content."""

from __future__ import annotations

import atexit
import inspect
import logging
import math
import os
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, distributed, nn

from seglight.checkpoints import STARTS, read
from seglight.models.weights import hand_on

log = logging.getLogger(__name__)

# Preprocessing families (mean and standard deviation in RGB order, on 0..255 pixels). "caffe" is the one of the
# Caffe model zoo: BGR, mean only. "grey" is the mean of the channels, 0..1, as one channel.
PREPROCESSING: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "torch": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "caffe": ((122.67892, 116.66877, 104.00699), (1.0, 1.0, 1.0)),
    "half": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "grey": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
}
Preprocessing = Literal["torch", "caffe", "half", "grey"]


class RemembersArguments:
    """Keeps the constructor's arguments in `init_args`: a checkpoint stores them, and so rebuilds the model alone.

    A class of its own, because jsonargparse reads the options of a class from `__new__` where it has one.
    """

    init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> RemembersArguments:
        """Bind the arguments to the names and defaults of `cls.__init__`."""
        self = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = {name: value for name, value in bound.arguments.items() if name not in ("self", "kwargs")}
        object.__setattr__(self, "init_args", {**arguments, **bound.arguments.get("kwargs", {})})
        return self


def end_process_group() -> None:
    """For the end of a process that goes well: end gloo's threads, as Lightning does with NCCL's.

    A thread that drops its last tensor when Python is already half gone aborts the process (torch's pull request
    179291). Not when something has failed: then this waits for an answer of ranks that may never give one.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


class BaseModel(RemembersArguments, LightningModule):
    """A network with its normalisation, its optimiser and its name in a checkpoint.

    Learning rates are in effect per parameter group: parameters whose name starts with `backbone.` use `lr`, all
    others `lr * head_lr`; biases use `bias_lr` times their group's rate, and no weight decay unless `decay_bias`.

    Args:
        network: the pure `nn.Module`; it gets a float32 normalised image.
        num_classes: K; comes from the datamodule under the command line.
        classes: K names; from the datamodule.
        palette: K RGB colours; from the datamodule.
        preprocessing: the family that the network's weights expect.
        optimizer: "sgd" or "adamw".
        lr: base learning rate.
        momentum: of SGD.
        weight_decay: L2 for SGD, decoupled for AdamW.
        schedule: "poly" multiplies by (1 - step / max_steps) ** power, "steps" by 0.1 at each milestone.
        power: of the poly schedule.
        warmup: optimiser steps of linear rise from 0.
        milestones: optimiser steps of the "steps" schedule.
        head_lr: factor for everything outside the backbone (papers that fine-tune use 10).
        bias_lr: factor for biases (Caffe recipes use 2).
        decay_bias: whether biases get weight decay (Caffe recipes: no).
        batch_norm: "train"; "eval" keeps the running statistics as they are (a second stage with small batches);
            "frozen" does not train scale and shift either. Across GPUs set `trainer.sync_batchnorm`.
        init_from: a file to start from: a seglight checkpoint of the same family, or what the architecture names.
        init_without: layers (prefixes of names in the network) to leave as initialised although `init_from` has them,
            such as the classifier when the number of classes differs.
    """

    task: str
    """"semantic" or "instance": a model learns from datasets of the same task."""
    monitor: str
    """The logged score, higher is better, that selects `best.ckpt`."""
    show: tuple[str, ...] = ()
    """Further logged scores of the line after a validation."""
    free: frozenset[str] = frozenset({"classes", "palette", *STARTS})
    """Constructor arguments of an architecture that may differ between a checkpoint and the model that loads it, beside
    those that are named test_*."""

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        classes: list[str] | None = None,
        palette: list[tuple[int, int, int]] | None = None,
        preprocessing: Preprocessing = "torch",
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        schedule: Literal["poly", "steps", "constant"] = "poly",
        power: float = 0.9,
        warmup: int = 0,
        milestones: list[int] | None = None,
        head_lr: float = 1.0,
        bias_lr: float = 1.0,
        decay_bias: bool = True,
        batch_norm: Literal["train", "eval", "frozen"] = "train",
        init_from: str | None = None,
        init_without: list[str] | None = None,
    ):
        super().__init__()
        if num_classes < 1 or num_classes > 255:
            raise ValueError(
                f"num_classes is {num_classes}; it must lie between 1 and 255, because label 255 is ignore."
            )
        if classes is not None and len(classes) != num_classes:
            raise ValueError(f"{len(classes)} class names for {num_classes} classes; give one name per class.")
        rates = {"lr": lr, "head_lr": head_lr, "bias_lr": bias_lr, "momentum": momentum, "weight_decay": weight_decay}
        for name, rate in rates.items():
            if not 0 <= rate < math.inf:
                raise ValueError(f"{name} is {rate}; give a number of at least 0.")
        if schedule == "steps" and not milestones:
            raise ValueError(
                'model.schedule is "steps" but model.milestones is empty; list the steps that divide by 10.'
            )
        self.network = network
        self.num_classes = num_classes
        self.classes = list(classes) if classes else [f"class {k}" for k in range(num_classes)]
        self.palette = palette
        self.preprocessing = preprocessing
        self.optimizer, self.lr, self.momentum, self.weight_decay = optimizer, lr, momentum, weight_decay
        self.schedule, self.power, self.warmup, self.milestones = schedule, power, warmup, milestones or []
        self.head_lr, self.bias_lr, self.decay_bias = head_lr, bias_lr, decay_bias
        self.channels_last = False
        mean, std = PREPROCESSING[preprocessing]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._losses: dict[str, Tensor] = {}
        self._loss_count = 0
        self._seed, self._benchmark = 0, False
        self._rates: list[dict[str, float]] = []
        self._shape: tuple[int, ...] | None = None
        self.batch_norm = batch_norm
        if batch_norm == "frozen":
            for layer in self._batch_norms():
                layer.requires_grad_(False)
        self.train()  # puts batch norm into its mode; Lightning never calls this, it keeps the modes that it finds
        if init_without and not init_from:
            raise ValueError(f"init_without names {init_without}, but there is no init_from to leave them out of.")
        if init_from:
            content = read(init_from)
            if not isinstance(content, dict):
                raise ValueError(f"{init_from} holds a {type(content).__name__}, not a checkpoint or a state dict.")
            self.start_from(content, init_from, tuple(init_without or ()))

    def start_from(self, content: dict[str, Any], path: str, without: tuple[str, ...] = ()) -> None:
        """Copy weights of a file into the network; architectures that take foreign files override this.

        Args:
            content: of the file.
            path: of the file, for messages.
            without: prefixes of layer names that stay as initialised.

        Raises:
            ValueError: it is no checkpoint of this family, or of another preprocessing or shape.
        """
        if "state_dict" not in content:
            raise ValueError(f"{path} is not a seglight checkpoint, and {type(self).__name__} reads no other files.")
        description = content.get("seglight", {})
        stored = description.get("preprocessing", description.get("init_args", {}).get("preprocessing"))
        if stored not in (None, self.preprocessing):  # early checkpoints say it only where a user chose it
            raise ValueError(
                f'{path} was trained with preprocessing "{stored}", this model has "{self.preprocessing}"; use one.'
            )
        theirs = description.get("init_args", {})
        same_class = description.get("class_path", "").rpartition(".")[2] == self._name
        for name in sorted((self.architecture() & set(theirs)) - {"num_classes", "output_stride"}):
            if same_class and _plain(theirs[name]) != _plain(self.init_args[name]):
                log.warning(
                    f"{path} was trained with {name}={theirs[name]!r}, this model has {name}={self.init_args[name]!r}: "
                    f"it starts from weights that were made for another network."
                )
        weights = {key: value for key, value in content["state_dict"].items() if key.startswith("network.")}
        weights = {key.removeprefix("network."): value for key, value in weights.items()}
        hand_on(self.network, weights, path, self._name, without)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _batch_norms(self) -> list[nn.Module]:
        return [layer for layer in self.network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True) -> BaseModel:
        """As `nn.Module.train`; batch norm stays as `batch_norm` says."""
        super().train(mode)
        if self.batch_norm != "train":
            for layer in self._batch_norms():
                layer.eval()
        return self

    def normalize(self, image: Tensor) -> Tensor:
        """The one place where pixels become network input.

        Args:
            image: (B, 3, H, W), RGB 0..255, uint8 or float.

        Returns:
            float32 (B, 3, H, W), or (B, 1, H, W) for the "grey" family.
        """
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        image = (image.to(torch.float32, memory_format=layout) - self.mean) / self.std
        if self.preprocessing == "caffe":
            return image.flip(1)
        if self.preprocessing == "grey":
            return image.mean(1, keepdim=True)
        return image

    # ------------------------------------------------------------------ training

    @property
    def trains_on_gpu(self) -> bool:
        """Whether the trainer runs on GPUs, where channels_last and a fused optimiser are the default."""
        return bool(self.trainer.strategy.root_device.type == "cuda")

    def setup(self, stage: str) -> None:
        """Tensor cores want channels last; on a CPU the better layout depends on the network, so it stays as it is.

        This is early enough: DDP's buckets would hand gradients of another layout to weights that change theirs later.
        """
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision is {self.trainer.precision}, but images are normalised and batch norm is averaged "
                f"in float32. Use {str(self.trainer.precision).replace('true', 'mixed')}."
            )
        self.channels_last = self.trains_on_gpu
        if self.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self._benchmark = torch.backends.cudnn.benchmark
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))  # that of Lightning's seed_everything
        atexit.unregister(end_process_group)

    def teardown(self, stage: str) -> None:
        """All went well; see `end_process_group`."""
        atexit.register(end_process_group)

    def on_train_start(self) -> None:
        """Let a resumed run have the learning rate, momentum and weight decay that it was given.

        Optimiser and schedule come back from the checkpoint with those of the run before.
        """
        if self.trainer.global_step == 0:
            self._losses, self._loss_count = {}, 0  # of an earlier fit
        own = type(self).configure_optimizers is BaseModel.configure_optimizers
        scheduler = self.trainer.lr_scheduler_configs[0].scheduler if own else None
        if not self.trainer.global_step or not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            return  # nothing came back, or Lightning looks for a learning rate, with a schedule of its own
        for i, (group, wanted) in enumerate(zip(scheduler.optimizer.param_groups, self._rates, strict=False)):
            scheduler.base_lrs[i] = group["initial_lr"] = wanted["lr"]
            group["lr"] = wanted["lr"] * scheduler.lr_lambdas[i](scheduler.last_epoch)
            group["weight_decay"] = wanted["weight_decay"]
            if "momentum" in group:
                group["momentum"] = self.momentum
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let dropout, and samples that a detector draws, depend on the run's seed, the step and the rank alone.

        Otherwise a resumed run would draw anew, and not be the run that was interrupted. And let cuDNN try its kernels
        only where the batch has the size of the one before.
        """
        trainer = self.trainer
        part = batch_idx % trainer.accumulate_grad_batches
        draw = np.random.SeedSequence([self._seed, trainer.global_step, part, trainer.global_rank])
        seed = int(draw.generate_state(1)[0])
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` notes the stack for each device it may have
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        image = batch["image"]
        shape = tuple(image.shape) if isinstance(image, Tensor) else None
        torch.backends.cudnn.benchmark = self._benchmark and shape is not None and shape == self._shape
        self._shape = shape

    def on_validation_start(self) -> None:
        """`trainer.benchmark` is for crops of one size: at each new size cuDNN would try all its kernels anew."""
        torch.backends.cudnn.benchmark = False

    def on_test_start(self) -> None:
        """As for a validation."""
        torch.backends.cudnn.benchmark = False

    def on_predict_start(self) -> None:
        """As for a validation."""
        torch.backends.cudnn.benchmark = False

    def track(self, losses: dict[str, Tensor]) -> None:
        """Add one step's losses to the running mean; log the mean when Lightning is about to log.

        Nothing is read back from the device here, and `self.log` is called at log boundaries only: called on every
        step it costs more host time than the rest of Lightning together.
        """
        if losses.keys() != self._losses.keys():
            self._losses, self._loss_count = {}, 0
        for name, value in losses.items():
            value = value.detach()
            self._losses[name] = self._losses[name] + value if self._loss_count else value
        self._loss_count += 1
        trainer = self.trainer
        every = trainer.log_every_n_steps
        if every and (trainer.global_step + 1) % every == 0 and not trainer.fit_loop._should_accumulate():
            for name, value in self.running_losses().items():
                self.log(f"train/{name}", value, batch_size=1)
            self.log("train/lr", trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)
            self.log("step", float(trainer.global_step + 1), batch_size=1)  # Lightning would count from 0
            self._loss_count = 0

    def running_losses(self) -> dict[str, Tensor]:
        """Mean losses since the last log, 0-dimensional tensors on the device; empty before the first step."""
        return {name: total / max(self._loss_count, 1) for name, total in self._losses.items()}

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD or AdamW over the parameter groups, with the schedule stepped once per optimiser step.

        Fused on a GPU, unless gradients are clipped: Lightning has no clipping for fused optimisers.
        """
        groups = self.parameter_groups()
        self._rates = [{name: group[name] for name in ("lr", "weight_decay")} for group in groups]
        # None is torch's own choice: one kernel per operation on a GPU, a loop over the weights on a CPU.
        fused = True if self.trains_on_gpu and not self.trainer.gradient_clip_val else None
        if self.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, fused=fused)
        else:
            optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=fused)
        optimizer.register_load_state_dict_post_hook(partial(_settle, fused=fused))
        total = self.trainer.estimated_stepping_batches
        if self.schedule == "poly" and math.isinf(total):
            raise ValueError("The poly schedule ends with the run, but this one has no end. Give trainer.max_steps.")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.lr_factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_factor(self, step: int, total: float) -> float:
        """What the schedule multiplies the learning rate by at an optimiser step, out of `total`."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "poly":
            return rise * max(0.0, 1 - step / total) ** self.power
        if self.schedule == "steps":
            return rise * 0.1 ** sum(step >= milestone for milestone in self.milestones)
        return rise

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters by learning rate and weight decay, the plain backbone weights first."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad:
                continue
            name, bias = _eager(name), name.endswith("bias")
            lr = self.lr * (1.0 if name.startswith("backbone.") else self.head_lr) * (self.bias_lr if bias else 1.0)
            decay = self.weight_decay if self.decay_bias or not bias else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
        return [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]

    # ---------------------------------------------------------------- checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what `seglight.load` needs to build this model again: its class and its arguments, plain types only.

        Weights have the names that they have without `torch.compile`.
        """
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = {_eager(name): v for name, v in checkpoint["state_dict"].items()}
        checkpoint["seglight"] = {
            "class_path": f"{type(self).__module__}.{type(self).__qualname__}",
            "init_args": {name: value for name, value in self.init_args.items() if not isinstance(value, nn.Module)},
            "task": self.task,
            "preprocessing": self.preprocessing,
            "classes": self.classes,
            "palette": self.palette,
            "running": {"losses": {name: v.cpu() for name, v in self._losses.items()}, "count": self._loss_count},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another architecture: some options change the output without changing any shape."""
        if "state_dict" in checkpoint:  # sharded strategies load the weights themselves
            names = {_eager(name): name for name in self.state_dict()}
            checkpoint["state_dict"] = {names.get(name, name): v for name, v in checkpoint["state_dict"].items()}
        stored = checkpoint.get("seglight")
        if stored is None:
            return
        running = stored.get("running", {"losses": {}, "count": 0})
        self._losses, self._loss_count = dict(running["losses"]), running["count"]  # the curve goes on, too
        for name in sorted(self.architecture()):
            ours, theirs = _plain(self.init_args.get(name)), _plain(stored["init_args"].get(name))
            if name in stored["init_args"] and ours != theirs:
                raise ValueError(
                    f"The checkpoint was trained with {name}={theirs!r}, but this model has {name}={ours!r}. Build the "
                    f"model as it was trained (seglight.load does), or start from these weights with model.init_from."
                )

    def architecture(self) -> set[str]:
        """Names of the constructor arguments that decide what the network computes: those of the paper's class."""
        names = {"preprocessing", "align_corners"} & set(self.init_args)
        for cls in type(self).__mro__:
            if issubclass(cls, BaseModel) and "__init__" in vars(cls):
                parameters = set(inspect.signature(cls.__init__).parameters)
                names |= set() if "network" in parameters else parameters & set(self.init_args)
        return {name for name in names - self.free if not name.startswith("test_")}


def _settle(optimizer: torch.optim.Optimizer, *, fused: bool | None) -> None:
    """Make a loaded state that of this device: a file of another one brings its `fused` and its memory layout.

    A fused kernel walks through a weight and its momentum side by side, in memory: of two layouts it makes nonsense.
    And it counts steps on the device, where the others count them on the host.
    """
    for group in optimizer.param_groups:
        group["fused"] = fused
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            if isinstance(steps := state.get("step"), Tensor):
                state["step"] = steps.to(parameter.device if fused else "cpu", torch.float32)


def _eager(name: str) -> str:
    """The name of a weight without what `torch.compile(module)` puts into it."""
    return name.replace("_orig_mod.", "")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
