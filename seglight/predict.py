"""Segment pictures: a file, a folder or a pattern; and the object that `model.predict` gives back."""

from __future__ import annotations

import argparse
import glob
import inspect
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seglight import masks as mask_tools
from seglight import visualize

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass
class SemanticPrediction:
    """What a semantic model says of one picture."""

    image: np.ndarray
    """uint8 (H, W, 3), RGB."""
    labels: np.ndarray
    """uint8 (H, W), 0..K-1."""
    classes: list[str]
    palette: list[tuple[int, int, int]] | None = None

    def __post_init__(self) -> None:
        if self.palette is None:
            self.palette = visualize.default_palette(len(self.classes))

    @property
    def shares(self) -> dict[str, float]:
        """Share of the pixels of each class that occurs, largest first."""
        counts = np.bincount(self.labels.reshape(-1), minlength=len(self.classes)) / self.labels.size
        return {self.classes[k]: float(counts[k]) for k in np.argsort(-counts, kind="stable") if counts[k]}

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """The picture with the classes' colours over it."""
        from PIL import Image

        return Image.fromarray(visualize.overlay(self.image, self.labels, self.palette, alpha))

    def save(self, path: str | Path) -> None:
        """Write the label map as a palette PNG of the picture's size, and the overlay beside it as NAME_overlay.jpg.

        A picture's suffix is replaced; what follows another dot is part of the name.
        """
        path = with_suffix(Path(path), ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        visualize.save_palette_png(path, self.labels, self.palette)
        self.overlay().save(overlay_path(path), quality=92)

    def _repr_png_(self) -> bytes:
        """Notebooks show the overlay."""
        return self.overlay()._repr_png_()


def with_suffix(path: Path, suffix: str) -> Path:
    """The path with this suffix, in place of one that a picture or `suffix` itself may have."""
    known = path.suffix.lower() in {*SUFFIXES, suffix}
    return path.with_suffix(suffix) if known else path.with_name(f"{path.name}{suffix}")


def overlay_path(path: Path) -> Path:
    """Where the overlay of a label map goes."""
    return path.with_name(f"{path.stem}_overlay.jpg")


def objects_path(path: Path) -> Path:
    """Where the masks of the objects in a json go."""
    return path.with_name(f"{path.stem}_objects")


def path_of(folder: Path, image_id: str, suffix: str = ".png") -> Path:
    """Where the prediction of an image of a dataset goes: subfolders of its id are kept, so that ids stay apart."""
    parts = image_id.replace("\\", "/").split("/")
    inside = ["__" if part == ".." else part for part in parts if part]  # never out of the folder
    return folder.joinpath(*inside[:-1], f"{inside[-1]}{suffix}")


def in_the_way(path: Path) -> Path | None:
    """What exists already of a picture's results: the file, its overlay or, of a json, a folder of masks."""
    for file in (path, overlay_path(path)):
        if file.exists():
            return file
    folder = objects_path(path)
    return folder if path.suffix == ".json" and folder.is_dir() and any(folder.iterdir()) else None


def as_array(source: str | Path | np.ndarray | Image.Image) -> np.ndarray:
    """Any picture as uint8 RGB (H, W, 3), turned upright by its EXIF orientation.

    Raises:
        ValueError: an array of another shape or type, a picture of more than 8 bits or without pixels.
    """
    from PIL import Image, ImageOps

    if isinstance(source, (str, Path)):
        from seglight.data.decode import read_image

        return read_image(source, exif=True)
    if isinstance(source, Image.Image):
        if source.mode.startswith(("I", "F")):
            raise ValueError(
                f'The picture has the mode "{source.mode}", more than 8 bits for each pixel; choose the grey values '
                f"that matter and bring them to 0..255 first."
            )
        source = np.array(ImageOps.exif_transpose(source).convert("RGB"))
    if not isinstance(source, np.ndarray):
        raise ValueError(
            f"The picture is a {type(source).__name__}; give a file, a PIL image or a NumPy array, uint8 (H, W, 3) in "
            f"RGB order, 0..255 (of a tensor (3, H, W): image.permute(1, 2, 0).cpu().numpy())."
        )
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
        raise ValueError(
            f"The picture is an array of {source.dtype} {source.shape}; give uint8 (H, W, 3) in RGB order, 0..255."
        )
    if not source.size:
        raise ValueError(f"The picture is {source.shape[0]} pixels high and {source.shape[1]} wide; give at least one.")
    return np.require(source, requirements=["C", "W"])  # torch warns of arrays that cannot be written to


def find(source: str) -> list[tuple[Path, Path]]:
    """Pictures of a file, a folder (with its subfolders) or a glob pattern, sorted, with their names relative to it.

    Those of a pattern are relative to the folder that they have in common.

    Raises:
        FileNotFoundError: nothing there.
    """
    path = Path(source)
    if path.is_file():
        return [(path, Path(path.name))]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        found = [(p, p.relative_to(path)) for p in files]
        rule = f"it holds no picture ({', '.join(SUFFIXES)})"
    else:
        files = [Path(p) for p in sorted(glob.glob(source, recursive=True)) if Path(p).is_file()]
        common = os.path.commonpath([p.parent for p in files]) if files else ""
        found = [(p, p.relative_to(common)) for p in files]
        rule = "there is no such file or folder, and as a pattern it matches nothing"
    if not found:
        raise FileNotFoundError(f"Nothing to predict in {source!r}: {rule}.")
    return found


def outputs(found: list[tuple[Path, Path]], out: Path, suffix: str = ".png") -> list[Path]:
    """One file per picture; pictures that differ only in their suffix keep it in the name."""
    stems = [name.with_suffix("") for _, name in found]
    twice = {stem for stem in stems if stems.count(stem) > 1} if len(set(stems)) < len(stems) else set()
    return [
        out / (name.with_name(f"{name.name}{suffix}") if stem in twice else name.with_suffix(suffix))
        for (_, name), stem in zip(found, stems, strict=True)
    ]


def read_ahead(paths: list[Path], ahead: int = 4) -> Iterator[tuple[np.ndarray | None, str]]:
    """Decode on threads while the network works; a picture that cannot be read comes as None with the reason."""

    def read(path: Path) -> tuple[np.ndarray | None, str]:
        try:
            return as_array(path), ""
        except (OSError, ValueError) as error:
            return None, str(error)

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(read, path) for path in paths[:ahead]]
        for number in range(len(paths)):
            result = waiting.pop(0).result()
            if number + ahead < len(paths):
                waiting.append(pool.submit(read, paths[number + ahead]))
            yield result


def main(argv: list[str]) -> int:
    """`seglight predict --source`: 0 when every picture was segmented, 1 when some could not be read."""
    parser = argparse.ArgumentParser(
        prog="seglight predict",
        description="Segment pictures. A semantic model writes for each a palette PNG of its size and an overlay; an "
        "instance model a json of its objects in COCO's results format, an overlay and a mask PNG per object, and "
        "objects.json, an annotation file of all pictures. "
        "Test-time options of the model: --model.test_flip true, --model.test_scales [0.75,1,1.25], ...",
    )
    parser.add_argument(
        "--ckpt_path",
        required=True,
        nargs="+",
        help="a checkpoint; several of instance models vote",
    )
    parser.add_argument("--source", required=True, help="a file, a folder, or a quoted glob pattern")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace results of the same name")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps; by default the best one there is")
    parser.add_argument(
        "--min_score", type=float, default=0.5, help="of instance models: leave out objects below it (0.5)"
    )
    args, rest = parser.parse_known_args(argv)
    from seglight.checkpoints import read

    try:
        found = find(args.source)
        task = read(args.ckpt_path[0]).get("seglight", {}).get("task", "semantic")
        paths = outputs(found, args.out, ".json" if task == "instance" else ".png")
        together = [args.out / "objects.json"] if task == "instance" else []
        occupied = [there for path in (*paths, *together) if (there := in_the_way(path))]
        if occupied and not args.overwrite:
            raise FileExistsError(
                f"{len(occupied)} of {len(paths)} results exist already, the first is {occupied[0]}. "
                f"Write elsewhere with --out, or replace them with --overwrite."
            )
        model = _model(args.ckpt_path, overrides(rest)).to(device_of(args.device))
    except (OSError, ValueError, TypeError) as error:
        print(f"seglight: {error}", file=sys.stderr)
        return 2
    options = {"min_score": args.min_score} if task == "instance" else {}
    return _predict_all(model, found, paths, args.out, options)


def device_of(asked: str | None) -> str:
    """The device that is asked for, or the best one there is.

    Raises:
        ValueError: no such device.
    """
    import torch

    here = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        kind = accelerator.type
        here = [kind, *(f"{kind}:{number}" for number in range(torch.accelerator.device_count())), *here]
    if asked is not None and asked not in here:
        raise ValueError(f"--device {asked} is not on this machine. Use one of {', '.join(here)}, or leave it out.")
    return asked or here[0]


def _model(checkpoints: list[str], options: dict[str, Any]) -> Any:
    """The model of a checkpoint, or an ensemble of several; options that are not its own go to its members."""
    from seglight.checkpoints import check_arguments, load

    if len(checkpoints) == 1:
        return load(checkpoints[0], **options)
    from seglight.models.ensemble import MaskEnsemble

    own = inspect.signature(MaskEnsemble).parameters.keys()
    of_members = {name: value for name, value in options.items() if name not in own}
    merging = {name: value for name, value in options.items() if name in own}
    check_arguments(MaskEnsemble, merging)
    return MaskEnsemble(checkpoints, test_options=of_members, **merging).eval()


def overrides(rest: list[str]) -> dict[str, Any]:
    """Test-time options of the command line: `--model.test_flip true` as {"test_flip": True}.

    Whether the model has such an option, and takes such a value, is for `seglight.load` to say.

    Raises:
        ValueError: an argument that is not called test_*, or has no value.
    """
    import yaml

    found, words = {}, iter(rest)
    for word in words:
        key, given, value = word.partition("=") if word.startswith("--") else (word, "", "")
        name = key.removeprefix("--model.").removeprefix("init_args.")
        if not key.startswith("--model.") or not name.startswith("test_"):
            raise ValueError(
                f"There is no option {key} here: only test-time options of the model can be changed, such as "
                f"--model.test_flip true."
            )
        if not given:
            value = next(words, "--")
            if value.startswith("--"):
                raise ValueError(f"{key} has no value.")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{key} is {value!r}, which is no YAML; write lists as [0.75,1].") from error
    return found


def _predict_all(
    model: Any, found: list[tuple[Path, Path]], paths: list[Path], out: Path, options: dict[str, Any]
) -> int:
    from tqdm import tqdm

    failed, objects = [], []
    sources = [source for source, _ in found]
    bar = tqdm(zip(found, paths, read_ahead(sources), strict=True), total=len(sources), unit="picture", disable=None)
    with ThreadPoolExecutor(2) as pool:
        saving = []
        for (source, name), path, (image, reason) in bar:
            if image is None:
                failed.append(f"{source}: {reason}" if str(source) not in reason else reason)
                continue
            prediction = model.predict(image, **options)
            saving.append(pool.submit(prediction.save, path))
            if options:
                objects.append((name, image.shape[:2], prediction.to_coco()))
        for task in saving:
            task.result()
    if options:
        document = annotations(objects, model.names)
        out.mkdir(parents=True, exist_ok=True)
        (out / "objects.json").write_text(json.dumps(document) + "\n")
    print(f"{len(sources) - len(failed)} of {len(sources)} pictures segmented into {out}")
    for line in failed:
        print(f"skipped {line}", file=sys.stderr)
    return 1 if failed else 0


def annotations(objects: list[tuple[Path, tuple[int, int], list[dict]]], classes: list[str]) -> dict[str, list]:
    """A COCO annotation file of predicted objects, which annotation tools open.

    Args:
        objects: for each picture its name, its size (H, W) and its entries of a results file.
        classes: K names; their ids are 1..K.
    """
    document: dict[str, list] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": k, "name": name} for k, name in enumerate(classes, start=1)],
    }
    for number, (name, (height, width), entries) in enumerate(objects, start=1):
        document["images"].append({"id": number, "file_name": name.as_posix(), "height": height, "width": width})
        for entry in entries:
            area = int(mask_tools.areas([entry["segmentation"]])[0])
            identity = {"id": len(document["annotations"]) + 1, "image_id": number, "area": area, "iscrowd": 0}
            document["annotations"].append({**entry, **identity})
    return document
