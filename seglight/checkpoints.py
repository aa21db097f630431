"""Checkpoints that survive a full disk, load without running code, and rebuild their model alone."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

if TYPE_CHECKING:
    from seglight.models.base import BaseModel

# Constructor arguments that say where weights start from, and what they are once a checkpoint brings the weights.
STARTS: dict[str, Any] = {"pretrained": False, "init_from": None, "init_without": None, "encoder_weights": None}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old file and replaces it only when the new one is whole and on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save or leave everything as it was.

        Raises:
            OSError: the checkpoint cannot be written; the previous one is untouched.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part{os.getpid()}")
        try:
            with open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            part.unlink(missing_ok=True)
            kept = f"The previous checkpoint {path} is untouched." if path.exists() else "No checkpoint existed there."
            raise OSError(
                f"Cannot write the checkpoint {path}: {error}. {kept} Free some disk space and continue with --resume."
            ) from error


def read(path: str | Path) -> dict[str, Any]:
    """The raw content of a checkpoint on the CPU, loaded with `weights_only=True`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        near = ", ".join(str(p) for p in sorted(path.parent.glob("*.ckpt"))) if path.parent.is_dir() else ""
        raise FileNotFoundError(f"No checkpoint {path}." + (f" In that folder: {near}." if near else ""))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise ValueError(f"{path} is not a readable checkpoint ({reason}).") from error


def of_run(content: dict[str, Any]) -> dict[str, Any]:
    """What the run that wrote a checkpoint says of itself: `config`, the experiment as YAML, and `wandb_id`."""
    return content.get("callbacks", {}).get("RunFolder") or {}


def check_arguments(cls: type[BaseModel], arguments: dict[str, Any]) -> None:
    """Refuse what the constructor of a model does not take: names, and of the test-time options values, too.

    Raises:
        ValueError: the first argument that does not fit, with what would.
    """
    if not arguments:
        return
    from jsonargparse import ArgumentParser, Namespace

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False)
    values = vars(parser.get_defaults())
    signatures = [inspect.signature(base.__init__).parameters for base in cls.__mro__ if "__init__" in vars(base)]
    known = {*values, *(name for signature in signatures for name in signature)}
    for name, value in arguments.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"{cls.__name__} has no option {name}." + (f" Did you mean {near[0]}?" if near else ""))
        if not name.startswith("test_") or name not in values:  # jsonargparse does not see through every **kwargs
            continue
        try:
            parser.validate(Namespace(**{name: value}), skip_required=True)
        except TypeError as error:
            wanted = next(signature[name] for signature in signatures if name in signature)
            kind = wanted.annotation  # a string where a module postpones annotations
            kind = kind if isinstance(kind, str) else inspect.formatannotation(kind)
            raise ValueError(
                f"{name} is {value!r}, but {cls.__name__} takes {name}: {kind} = {wanted.default!r}."
            ) from error


def load(path: str | Path, map_location: str | torch.device = "cpu", **overrides: Any) -> BaseModel:
    """Rebuild a model from its checkpoint alone, ready to predict.

    Args:
        path: a `.ckpt` file that seglight wrote.
        map_location: device of the model.
        overrides: constructor arguments to change, for instance `test_flip=True`; see `check_arguments`.

    Raises:
        ValueError: the file was not written by seglight, or does not fit the overrides.
    """
    from seglight.models.base import BaseModel  # which itself reads checkpoints

    checkpoint = read(path)
    stored = checkpoint.get("seglight")
    if stored is None:
        raise ValueError(f"{path} was not written by seglight: it does not say which model it holds.")
    module, _, name = stored["class_path"].rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path} holds a {stored['class_path']}, which cannot be imported ({error}).") from error
    if not (isinstance(cls, type) and issubclass(cls, BaseModel)):
        raise ValueError(f"{path} names {stored['class_path']}, which is not a seglight model.")
    check_arguments(cls, overrides)
    trained = len(stored["classes"])
    if overrides.get("num_classes", trained) != trained:
        raise ValueError(
            f"{path} was trained with num_classes={trained}, not {overrides['num_classes']}; start from these weights "
            f"with model.init_from."
        )
    arguments = {"classes": stored["classes"], "palette": stored["palette"], **stored["init_args"], **overrides}
    arguments.update({name: none for name, none in STARTS.items() if name in arguments})
    try:
        model = cls(**arguments)
    except TypeError as error:
        raise ValueError(
            f"{path} does not say all that {stored['class_path']} needs ({error}). A model made around a network "
            f"object is rebuilt with seglight.load(path, network=...)."
        ) from error
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return model.to(map_location).eval()
