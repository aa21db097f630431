"""Any way of naming a dataset to its datamodule: an experiment, a run, a checkpoint, a class, a folder."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from seglight.data.base import DataModule

SOURCE = (
    "an experiment or a part of one (YAML), a run folder, a checkpoint, the name of a dataset class, or a dataset's "
    "folder, whose layout is recognised"
)
"""What `resolve` takes, for messages."""

HELP = textwrap.fill(
    f"SOURCE is {SOURCE}. Options of the dataset are those of `seglight fit`: --data.root DIR, --data.crop 256.", 116
)
"""The same for the help of commands."""

KNOWN = ("PascalContext", "VOC", "SBD", "CamVid", "COCO", "COCOStuff", "Cityscapes", "ADE20K", "ISBI", "Folder")
"""Datasets that a folder may be, the most particular layout first."""


def resolve(source: str | Path, overrides: Sequence[str] = ()) -> DataModule:
    """The datamodule that a source means.

    Args:
        source: see `SOURCE`.
        overrides: options as of `seglight fit`: "--data.crop", "128", or "--data.crop=128".

    Raises:
        FileNotFoundError: there is no such file, or no dataset is recognised in the folder.
        ValueError: the source names no dataset, or an option is wrong.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        run = path / "config.yaml"
        return _build(_part(run), overrides) if run.is_file() else _build(recognise(path), overrides)
    if path.suffix == ".ckpt":
        return _build(_stored(path), overrides)
    if path.suffix in (".yaml", ".yml"):
        return _build(_part(path), overrides)
    if path.is_file():
        raise ValueError(f"{source} is a file that names no dataset. Give {SOURCE}.")
    if str(source).isidentifier():
        _known(str(source))
        return _build({"class_path": str(source)}, overrides)
    raise FileNotFoundError(f"There is no {source}. Give {SOURCE}.")


def recognise(folder: Path) -> dict[str, Any]:
    """Class and arguments of the dataset that lies in a folder.

    Raises:
        FileNotFoundError: no known layout.
        seglight.data.findings.DataError: a known layout with something wrong in it.
    """
    from seglight import data

    for name in (name for name in KNOWN if name in data.__all__):
        try:
            getattr(data, name)(root=str(folder))
        except FileNotFoundError:
            continue
        return {"class_path": name, "init_args": {"root": str(folder)}}
    if found := _coco_files(folder):
        return {"class_path": "COCOFormat", "init_args": found}
    inside = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
    raise FileNotFoundError(
        f"{folder} has no layout of a known dataset ({', '.join(KNOWN)}, or a json in COCO's format). It holds: "
        f"{inside}. Say what it is in an experiment, or with the class: Folder --data.root {folder} --data.images ... "
        "--data.masks ..."
    )


def _coco_files(folder: Path) -> dict[str, str] | None:
    """Arguments of `COCOFormat` for annotations/instances_X.json with images in X, or one json beside its images."""
    found = sorted(folder.glob("annotations/instances_*.json"))
    pairs = {file.stem.removeprefix("instances_"): file for file in found}
    pairs = {split: file for split, file in pairs.items() if (folder / split).is_dir()}
    train = next((split for split in pairs if split.startswith("train")), None)
    val = next((split for split in pairs if split.startswith("val")), None)
    if train and val:
        return {
            "images": str(folder / train),
            "annotations": str(pairs[train]),
            "val_images": str(folder / val),
            "val_annotations": str(pairs[val]),
        }
    if len(alone := sorted(folder.glob("*.json"))) == 1:
        images = next((place for place in (folder / "images", folder) if place.is_dir()), folder)
        return {"images": str(images), "annotations": str(alone[0])}
    return None


def _part(file: Path) -> dict[str, Any]:
    """The data part of an experiment; parts that it names are relative to it."""
    from seglight.cli.experiment_file import load_yaml

    if not file.is_file():
        raise FileNotFoundError(f"There is no {file}.")
    text, before = file.read_text(), Path.cwd()
    os.chdir(file.resolve().parent)
    try:
        tree = load_yaml(text)
    finally:
        os.chdir(before)
    return _data_of(tree, str(file))


def _stored(checkpoint: Path) -> dict[str, Any]:
    from seglight.checkpoints import of_run, read

    stored = of_run(read(checkpoint)).get("config")
    if stored is None:
        raise ValueError(f"{checkpoint} was not made by `seglight fit` and stores no dataset. Give an experiment.")
    return _data_of(yaml.safe_load(stored), str(checkpoint))


def _data_of(tree: Any, name: str) -> dict[str, Any]:
    tree = tree if isinstance(tree, dict) else {}
    part = tree if "class_path" in tree else tree.get("data")
    if not isinstance(part, dict) or "class_path" not in part:
        raise ValueError(f"{name} has no `data:` with a class, so it names no dataset.")
    seed = tree.get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool):
        part["init_args"] = {"seed": seed, **(part.get("init_args") or {})}
    return part


def _known(name: str) -> None:
    """Raise ValueError if no dataset has that name."""
    from seglight.cli.errors import nearest, subclasses
    from seglight.data.base import DataModule

    _import_all()
    found = subclasses(DataModule)
    if name not in found:
        near = nearest(name, {one for one in found if not one.endswith("DataModule")})
        raise ValueError(f"There is no file or folder {name}, and no dataset class of that name.{near}")


def _import_all() -> None:
    """A short name is known once its class is imported."""
    from seglight import data

    for public in data.__all__:
        getattr(data, public)


def _build(part: dict[str, Any], overrides: Sequence[str]) -> DataModule:
    from jsonargparse import ArgumentError, ArgumentParser

    from seglight.cli.errors import explain
    from seglight.data.base import DataModule

    _import_all()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DataModule, "data", required=True)
    try:
        config = parser.parse_args([f"--data={json.dumps(part)}", *overrides])
    except ArgumentError as error:
        raise ValueError(explain(str(error))) from error
    try:
        return parser.instantiate(config).data
    except ValueError as error:
        own: BaseException = error  # jsonargparse wraps what a dataset has to say
        while "Union subtypes" in str(own) and own.__cause__:
            own = own.__cause__
        raise own from None
