"""From a parser's message to one paragraph that names the nearest valid word."""

from __future__ import annotations

import difflib
import inspect
import re

from pytorch_lightning import Trainer

from seglight.data.base import DataModule
from seglight.models.base import BaseModel

LINKED = ("num_classes", "classes", "palette")
"""What a model always gets from its dataset."""

TOP = ("model", "data", "trainer", "out", "resume", "overwrite", "val_every", "seed_everything", "ckpt_path", "config")


def subclasses(cls: type) -> dict[str, type]:
    """All imported descendants by name."""
    found: dict[str, type] = {}
    for child in cls.__subclasses__():
        found[child.__name__] = child
        found.update(subclasses(child))
    return found


def options(cls: type) -> set[str]:
    """Constructor arguments of a class and of its bases."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base) and base.__module__.startswith("seglight"):
            names |= set(inspect.signature(base.__init__).parameters)
    return names - {"self", "kwargs", "network"}


def annotation(name: str, classes: list[type]) -> str:
    """How the signatures write the type of an argument."""
    for cls in classes:
        for base in cls.__mro__:
            parameter = inspect.signature(base.__init__).parameters.get(name) if "__init__" in vars(base) else None
            if parameter is not None and base.__module__.startswith("seglight"):
                return str(parameter.annotation)
    return "of another type"


def linked(name: str) -> str:
    """An argument that the dataset provides was given by hand."""
    return (
        f"model.{name} is given, but it always comes from the dataset. Remove it; if the dataset's classes are wrong, "
        f"change them there."
    )


def nearest(word: str, choices: set[str] | list[str]) -> str:
    """`Did you mean ...?` or the whole list when it is short."""
    lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), list(lower), 3, 0.5)
    alike = [difflib.SequenceMatcher(None, name, word.lower()).ratio() for name in close]
    near = [lower[name] for name, ratio in zip(close, alike, strict=True) if ratio > alike[0] - 0.15]
    if near:
        return f" Did you mean {' or '.join(near)}?"
    return f" Known: {', '.join(sorted(choices))}." if len(choices) <= 40 else ""


def explain(message: str) -> str:
    """One paragraph for a message of jsonargparse."""
    models, datas = subclasses(BaseModel), subclasses(DataModule)
    unknown = re.search(r"(?:[Oo]ption|accept option) '([\w.+]+)'|unrecognized arguments: --([\w.+]+)", message)
    if unknown:
        key = unknown[1] or unknown[2]
        head, _, word = key.rpartition(".")
        if head.startswith("trainer"):
            choices = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
        elif head.startswith("model"):
            choices = set().union(*(options(cls) for cls in models.values()))
        elif head.startswith("data"):
            choices = set().union(*(options(cls) for cls in datas.values()))
        elif f"Option '{key}' is not accepted" in message:  # without saying whether of the model or the data
            choices = set().union(*(options(cls) for cls in (*models.values(), *datas.values())))
        else:
            choices = set(TOP)
        if word in LINKED:
            return linked(word)
        if word in choices:  # jsonargparse says "not accepted" of a value, too
            kind = annotation(word, [*models.values(), *datas.values()])
            return f"the value given for {key!r} does not fit; it must be {kind}."
        return f"there is no option {key!r}.{nearest(word, choices)}"
    wrong_class = re.search(r'Parser key "(model|data)"', message)
    given = re.search(r"Expected a dot import path string: (\S+)", message)
    if wrong_class and given:
        known = models if wrong_class[1] == "model" else datas
        public = {name for name, cls in known.items() if not name.endswith(("Model", "DataModule"))}
        return f"there is no {wrong_class[1]} {given[1]!r}.{nearest(given[1], public)}"
    if "val_check_interval" in message:
        return "trainer.val_check_interval counts batches; give val_every, in optimiser steps, instead."
    if "arguments are required: network" in message:
        return "model names the bare base class. Give the class of an architecture, for instance --model UNet."
    union = re.search(r"Union subtypes.*?Errors:\n  - (.*?)\n  - Expected a <class 'NoneType'>", message, re.DOTALL)
    if union:  # an error of ours, raised while the model or the dataset was built
        return union[1]
    value = re.search(
        r"Problem with given class_path '(\S+)':\s+Parser key \"([\w.]+)\":.*?Given value: ([^\n]*)", message, re.DOTALL
    )
    if value:  # of an argument of the model or the dataset
        kind = annotation(value[2], [*models.values(), *datas.values()])
        return f"{value[3]!r} is no {value[2]} for {value[1].rpartition('.')[2]}; it must be {kind}."
    lacking = re.search(r"Problem with given class_path '(\S+)':\s+the following arguments are required: (.*)", message)
    if lacking:
        name, words = lacking[1].rpartition(".")[2], lacking[2].split(", ")
        part = "data" if name in datas else "model"
        return f"{name} needs {' and '.join(words)}: give {' '.join(f'--{part}.{word} ...' for word in words)}."
    required = re.search(r"arguments are required: (.*)", message)
    if required:
        missing = [name.rpartition(".")[2] for name in required[1].split(", ")]
        return (
            f"{' and '.join(missing)} missing. Give an experiment (-c experiments/shapes/unet.yaml) or "
            f"{' '.join(f'--{name} NAME' for name in missing)}."
        )
    return re.sub(r"\s*\n\s*", " ", message).replace("Parser key ", "").strip()
