"""From what a person names to the splits that are examined, also where no datamodule would take it yet."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from seglight.data.base import DataModule, Split
from seglight.data.coco import COCOFormat
from seglight.data.cocojson.document import Document
from seglight.data.cocojson.reader import read
from seglight.data.findings import DataError
from seglight.data.folder import IMAGES, Folder
from seglight.data.mixed import Mixed, MixedDataset
from seglight.doctor.case import SPLITS, Case, Part
from seglight.doctor.findings import Finding, Place, of_text, told
from seglight.doctor.pairs import as_dataset, pairs_of, raw


def open_source(source: Any, overrides: Sequence[str] = (), split: str | None = None) -> Case:
    """Find out what is to be examined.

    Args:
        source: a datamodule, or whatever `seglight.cli.datamodule.resolve` takes; also a folder with images and masks,
            a json in COCO's format, and an experiment with faults.
        overrides: options of the dataset, for `resolve`.
        split: only this one.

    Raises:
        FileNotFoundError: there is no such thing, or no dataset in it.
        ValueError: it names no dataset.
    """
    with _listening() as said:
        case = _open(source, overrides, split)
    texts = [told(text) for text in dict.fromkeys(said)]
    if fewer := tuple(Place(what.rstrip(".")) for what, _ in texts if "published" in what):
        what, fix = "not as many samples as published.", "Scores do not compare with published ones."
        case.findings.append(Finding("note", "size-of-split", what, fix, fewer, "split"))
    case.findings += [Finding("note", "log", *text, unit="") for text in texts if "published" not in text[0]]
    return case


def _open(source: Any, overrides: Sequence[str], split: str | None) -> Case:
    if isinstance(source, DataModule):
        return _of_module(source, split)
    path = Path(source).expanduser()
    if path.suffix == ".json" and path.is_file():
        return _of_documents([path], split)
    from seglight.cli.datamodule import resolve

    try:
        module = resolve(source, overrides)
        if path.is_dir() and type(module) is COCOFormat and not _images_there(module):
            return _of_documents([file for _, file in module.files.values()], split)
        return _of_module(module, split)
    except (ValueError, OSError, TypeError) as error:
        case = _by_sight(path, error, split)
        if case is None:
            raise
        return case


@contextmanager
def _listening() -> Iterator[list[str]]:
    """What datasets log as warnings, which become findings and are not printed."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("seglight.data")
    before, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.propagate = before


def _images_there(module: COCOFormat) -> bool:
    """Whether the folders that were guessed hold an image of the files."""
    return any(path.suffix.lower() in IMAGES for folder, _ in module.files.values() for path in folder.rglob("*"))


def _by_sight(path: Path, error: Exception, split: str | None) -> Case | None:
    """What no datamodule accepts, as far as it can be examined all the same."""
    if path.is_dir():
        return raw(path, error, split) or _of_json(path, split)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return None
    finding = of_text(str(error), [Place(str(path))], unit="")
    finding = Finding("error", "experiment", finding.what, finding.fix, finding.places, "experiment")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        return None
    options = _options(tree)
    for key in ("root", "images", "annotations"):
        place = options.get(key)
        if not isinstance(place, str):
            continue
        place = Path(place).expanduser()
        if place.suffix == ".json" and place.is_file():
            case = _of_documents([place], split)
        elif place.is_dir():
            case = raw(place, None, split) or _of_json(place, split)
        else:
            continue
        if case is not None:
            case.findings.insert(0, finding)
            return case
    return None


def _options(tree: Any) -> dict[str, Any]:
    """Arguments of the data part of an experiment, however it is written."""
    found: dict[str, Any] = {}
    if isinstance(tree, dict):
        part = tree.get("data") if isinstance(tree.get("data"), dict) else tree
        found |= part.get("init_args") or {}
        found |= {key.split(".")[-1]: value for key, value in tree.items() if str(key).startswith("data.")}
    return found


# ---------------------------------------------------------------- datamodules


def _of_module(module: DataModule, split: str | None) -> Case:
    own = isinstance(module, Folder) or type(module) is COCOFormat
    case = Case(type(module).__name__, "", tuple(module.classes), own)
    if isinstance(module, COCOFormat):
        _documents_of(module, case, split)
    else:
        for one in [split] if split else SPLITS:
            _add_split(module, case, one, asked=split is not None)
    case.root = _root(case)
    return case


def _add_split(module: DataModule, case: Case, split: Split, asked: bool) -> None:
    try:
        data = module.dataset(split)
    except (DataError, FileNotFoundError) as error:
        if split == "test" and not asked and isinstance(error, FileNotFoundError):
            return  # test labels are seldom public
        found = of_text(str(error), split=split, unit="")
        if found.rule == "unpaired" and isinstance(module, Folder):
            pairs, lonely = pairs_of(module, split)
            case.findings += lonely
            if pairs:
                name = split if "{split}" in module.images else "train and val"  # one folder is all of them
                if all(part.split != name for part in case.parts):
                    case.parts.append(Part(name, as_dataset(f"Folder {name}", pairs, module.lut, module.colours)))
            return
        if all(found.what != other.what for other in case.findings):
            case.findings.append(found)
        return
    ids = list(data.ids)
    if any(part.split == "val" and ids == list(part.data.ids) for part in case.parts) and split == "test":
        return  # the default of datasets without public test labels
    if isinstance(data, MixedDataset) and isinstance(module, Mixed):
        case.parts += [Part(split, one, classes=tuple(module.parts[name].classes)) for name, one in data.data.items()]
    else:
        case.parts.append(Part(split, data))


def _documents_of(module: COCOFormat, case: Case, split: str | None) -> None:
    """The json files themselves, because a dataset of a faulty one refuses to be."""
    seen: dict[tuple[Path, Path], Part] = {}
    for one in [split] if split else SPLITS:
        folder, file = module.files[one]
        if (folder, file) in seen:
            if one != "test":
                seen[folder, file].split += f" and {one}"
            continue
        try:
            document = read(file, labelled=one != "test" or file in (module.files["train"][1], module.files["val"][1]))
        except DataError as error:
            case.findings.append(of_text(str(error), split=one, unit=""))
            continue
        seen[folder, file] = Part(one, document, folder, drop=module.faulty == "drop")
    if module.files["train"] == module.files["val"] and (part := seen.get(module.files["train"])) and not split:
        try:
            part.chosen = {one: module.dataset(one).indices for one in ("train", "val")}
        except DataError:  # too few images, or faults that are reported by themselves
            part.chosen = None
    case.parts += seen.values()


# ---------------------------------------------------------------- json files alone


def _of_json(folder: Path, split: str | None) -> Case | None:
    """The json files of a folder that look like COCO's."""
    files = sorted([*folder.glob("*.json"), *folder.glob("annotations/*.json")])
    return _of_documents(files, split) if files else None


def _of_documents(files: Sequence[Path], split: str | None) -> Case:
    case = Case("COCO's format", "", None, True)
    for file in dict.fromkeys(files):
        name = next((one for one in SPLITS if one in file.stem), file.stem)
        if split and name != split:
            continue
        try:
            document = read(file)
        except DataError as error:
            finding = of_text(str(error).removeprefix(str(file)).lstrip(": "), [Place(str(file))])
            case.findings.append(finding)
            continue
        folder = _images_of(file, document)
        if folder is None:
            what = f"the images of {file.name} were not found near it, so only the json was examined."
            fix = "Check them together: seglight data check COCOFormat --data.images DIR --data.annotations FILE."
            case.findings.append(Finding("note", "no-images", what, fix, (Place(str(file)),), ""))
        case.parts.append(Part(name, document, folder))
        case.classes = case.classes or document.categories
    case.root = os.path.commonpath([file.resolve().parent for file in files]) if files else ""
    case.parts.sort(key=lambda part: SPLITS.index(part.split) if part.split in SPLITS else 3)
    return case


def _images_of(file: Path, document: Document) -> Path | None:
    """The folder that holds most of the images of a json file, among those where people put it."""
    from seglight.data.packed import Strings

    names = Strings(document.packed.names, document.packed.name_starts)
    some = [names[i] for i in range(0, len(names), max(1, len(names) // 20))]
    split = file.stem.removeprefix("instances_")
    above, beside = file.parent.parent, file.parent
    places = (
        beside,
        beside / "images",
        above / "images",
        above / split,
        above / "images" / split,
        beside / split,
        above,
    )
    counts = [sum((place / name).is_file() for name in some) for place in places]
    return places[int(np.argmax(counts))] if some and max(counts) else None


def _root(case: Case) -> str:
    """The folder that holds all files."""
    folders: set[str] = set()
    for part in case.parts:
        if part.folder is not None:
            folders.add(str(part.folder))
        datasets = getattr(part.data, "parts", (part.data,))
        for one in datasets:
            for paths in (getattr(one, "image_paths", ()), getattr(one, "mask_paths", ())):
                folders |= {str(path.parent) for path in paths if path is not None}
    return os.path.commonpath(folders) if folders else ""
