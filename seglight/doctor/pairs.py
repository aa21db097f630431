"""Images and masks in two folders, paired by name, also where nobody has named the classes or the layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seglight.data.files import FileDataset, read_list
from seglight.data.findings import DataError
from seglight.data.folder import IMAGES, MASKS, Folder
from seglight.doctor.case import SPLITS, Case, Part
from seglight.doctor.findings import Finding, Place, of_text

if TYPE_CHECKING:
    from seglight.data.palette import Colour

_ALIASES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages", "leftImg8bit", "photos", "raw")
_MASK_FOLDERS = (
    *("masks", "mask", "labels", "label", "annotations", "annotation", "SegmentationClass", "gt", "groundtruth"),
    *("targets", "ann", "segmentation"),
)


def raw(root: Path, error: Exception | None, split: str | None) -> Case | None:
    """Pairs below a folder, whatever its masks hold; None if there are no two folders with pictures."""
    templates = _layout(root)
    if templates is None:
        return None
    case = Case("images and masks", str(root), None, True)
    file = root / "classes.txt"
    if file.is_file():
        try:
            case.classes = tuple(read_list(file)) or None
        except DataError as fault:
            error = fault
    seen: dict[tuple[Path, Path], str] = {}
    for one in [split] if split else SPLITS:
        places = [_place(root, template, one) for template in templates]
        if places[0] is None or places[1] is None or (places[0], places[1]) in seen:
            continue
        seen[places[0], places[1]] = one
        several = "{split}" in templates[0]
        pairs, lonely = pair_up(places[0], places[1], one if several else "")
        case.findings += lonely
        if pairs:
            case.parts.append(Part(one if several else "train and val", as_dataset(f"Folder {one}", pairs)))
    if not case.parts and not case.findings:
        return None
    told_anyway = "need names" in str(error) or "without" in str(error) or isinstance(error, FileNotFoundError)
    if error is not None and not told_anyway:
        case.findings.append(of_text(str(error), unit=""))
    return case


def as_dataset(
    name: str,
    pairs: dict[str, tuple[Path, Path]],
    lut: np.ndarray | None = None,
    colours: dict[Colour, int] | None = None,
) -> FileDataset:
    """The pairs as a dataset of files."""
    images, masks = zip(*pairs.values(), strict=True)
    return FileDataset(name, list(pairs), images, masks, lut, colours)


def _layout(root: Path) -> tuple[str, str] | None:
    """Templates of the folders of images and masks."""
    for place in ("{split}/{}", "{}/{split}", "{}"):
        for image in _IMAGE_FOLDERS:
            for mask in _MASK_FOLDERS:
                found = place.replace("{}", image), place.replace("{}", mask)
                if any(_place(root, found[0], one) and _place(root, found[1], one) for one in SPLITS):
                    return found
    return None


def _place(root: Path, template: str, split: str) -> Path | None:
    folders = (root / template.replace("{split}", name) for name in _ALIASES[split])
    return next((folder for folder in folders if folder.is_dir()), None)


def pairs_of(module: Folder, split: str) -> tuple[dict[str, tuple[Path, Path]], list[Finding]]:
    """The pairs of a `Folder` that refuses its split because of some that are none."""
    places = [_place(module.root, template, split) for template in (module.images, module.masks)]
    if places[0] is None or places[1] is None:
        return {}, []
    return pair_up(places[0], places[1], split if "{split}" in module.images else "", module.mask_suffix)


def pair_up(
    images: Path, masks: Path, split: str, suffix: str | None = None
) -> tuple[dict[str, tuple[Path, Path]], list[Finding]]:
    """Image and mask by name, and findings about those without a partner."""
    pictures, found = _by_name(images, IMAGES), _by_name(masks, MASKS)
    findings = []
    for what, group in (("images", pictures), ("masks", found)):
        if double := [path for paths in group.values() for path in paths[1:]]:
            text = "the same name as another file but for the suffix, so it is not clear which one is meant."
            places = tuple(Place(str(path), image=path) for path in double)
            findings.append(Finding("error", f"{what}-twice", text, "Remove one of each.", places, "file", (split,)))
    if suffix is None:
        suffix = _suffix(list(pictures), list(found))
    named = {name.removesuffix(suffix): paths[0] for name, paths in found.items() if name.endswith(suffix)}
    lonely = sorted(pictures.keys() - named.keys()), sorted(named.keys() - pictures.keys())
    fix = "Add what is missing, or move these away. An image and its mask have the same name but for the suffix."
    splits = (split,) if split else ()
    for names, of, partner, unit in ((lonely[0], pictures, "a mask", "image"), (lonely[1], named, "an image", "mask")):
        if names:
            paths = [of[name][0] if unit == "image" else of[name] for name in names]
            places = tuple(Place(str(path), image=path) for path in paths)
            findings.append(Finding("error", "unpaired", f"without {partner}.", fix, places, unit, splits))
    pairs = {name: (pictures[name][0], named[name]) for name in pictures if name in named}
    if suffix and pairs:
        text = f"the names of the masks end in {suffix!r}."
        findings.append(Finding("note", "mask-suffix", text, "Say so in the experiment.", (), "", splits,
                                f"data.mask_suffix: {suffix!r}"))  # fmt: skip
    return pairs, findings


def _by_name(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    return found


def _suffix(images: list[str], masks: list[str]) -> str:
    """What most mask names have after an image's name: "_mask"."""
    if not set(images).isdisjoint(masks):
        return ""
    ends = Counter(mask.removeprefix(name) for name in images[:50] for mask in masks if mask.startswith(name))
    return ends.most_common(1)[0][0] if ends else ""
