"""`seglight explain-metric`: the same predictions by every definition of mIoU in use."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seglight.cli.verb import Parser, console, guarded, take, writable

if TYPE_CHECKING:
    import numpy as np

DESCRIPTION = """Score predictions by every definition of mIoU in use, and say who uses which.

SOURCE is a checkpoint, which is run on its dataset as by `seglight test`, or a folder of label PNGs named as the images
(what `seglight predict` writes); a folder needs --data. Further options are those of the dataset and the test-time ones
of the model, as in `seglight test`: --data.root DIR, --model.test_flip true."""


def main(argv: list[str]) -> int:
    """Run `seglight explain-metric ...`; returns the exit status of `seglight.cli.verb.guarded`."""

    def call() -> int:
        words, found = take(argv)
        return run(_parser().parse_args(words), found["--data."], found["--model."])

    return guarded("seglight explain-metric", call)


def _parser() -> Parser:
    parser = Parser(prog="seglight explain-metric", description=DESCRIPTION)
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint, or a folder of label PNGs")
    parser.add_argument(
        "--data", metavar="DATA", help="a dataset: class name, experiment, folder (default: that of the checkpoint)"
    )
    parser.add_argument("--split", choices=("val", "test"), default="test", help="default: test, as `seglight test`")
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="images per batch, for means over batches (8)"
    )
    parser.add_argument(
        "--side", type=int, default=512, metavar="PIXELS", help="of the square for scores of resized labels (512)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the numbers there too")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default the best one there is")
    return parser


def run(options: argparse.Namespace, data_options: list[str], model_options: list[str]) -> int:
    """Count once, print the table; returns the exit status."""
    for name in ("batch", "side"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least 1.")
    if options.out:
        writable(options.out.parent)
    if options.out and options.out.exists():
        raise FileExistsError(f"{options.out} exists. Nothing is overwritten: choose another --out.")
    source = Path(options.source)
    refuse_run_folder(source)
    if source.is_dir() and options.data is None:
        raise ValueError(f"{source} is a folder of predictions; say of which dataset: --data VOC --data.root DIR.")
    if source.is_dir() and model_options:
        raise ValueError(f"{model_options[0]} is of a model, but {source} is a folder of predictions.")
    from seglight.cli.datamodule import resolve
    from seglight.explain_metric import Tally, as_records, as_table, definitions, resized
    from seglight.predict import overrides

    found = overrides(model_options)
    if source.is_dir():
        data = _semantic(resolve(options.data, data_options))
        pairs = _saved(source, data, options.split)
    else:
        model = load_model(source, options.device, found)
        data = _semantic(resolve(options.data or source, data_options))
        _refuse_other_classes(model, data, source)
        pairs = _predicted(model, data, options.split)
    whole, square = Tally(data.num_classes), Tally(data.num_classes)
    for name, labels, mask in pairs:
        whole.add(name, labels, mask)
        square.add(name, resized(labels, options.side), resized(mask, options.side))
    if not whole.table.any():
        raise ValueError(
            f"{type(data).__name__} {options.split} has no labels, so nothing can be scored. Try --split val."
        )
    lines = definitions(whole, data.classes, options.batch, square, options.side)
    title = f"{type(data).__name__} {options.split}: {len(whole.rows):,} images, {data.num_classes} classes"
    console().print(as_table(lines, title, data.protocol))
    if options.out:
        record = {
            "data": type(data).__name__,
            "split": options.split,
            "images": len(whole.rows),
            "batch": options.batch,
        }
        record |= {"side": options.side, "protocol": data.protocol, "definitions": as_records(lines)}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")
        print(f"Wrote {options.out}")
    return 0


def refuse_run_folder(path: Path) -> None:
    """Raise ValueError if a run folder is given for one of its checkpoints."""
    if (path / "config.yaml").is_file():
        raise ValueError(f"{path} is a run folder. Give one of its checkpoints: {path / 'checkpoints/best.ckpt'}.")


def load_model(path: Path, device: str | None, options: dict[str, Any]) -> Any:
    """The model of a checkpoint, ready to predict, on the best device there is.

    Raises:
        ValueError: no such device, not a checkpoint of seglight, or options that do not fit it.
    """
    from seglight.checkpoints import load
    from seglight.predict import device_of

    try:
        return load(path, device_of(device), **options)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error


def _semantic(data: Any) -> Any:
    if data.task != "semantic":
        raise ValueError(
            f"{type(data).__name__} has objects, and this table is about mIoU. The definitions of AP are printed by "
            "`seglight test`."
        )
    return data


def _refuse_other_classes(model: Any, data: Any, source: Path) -> None:
    if model.task != "semantic" or list(model.classes) != list(data.classes):
        raise ValueError(
            f"{source} was trained on {model.num_classes} classes ({', '.join(model.classes[:3])}, ...), but "
            f"{type(data).__name__} has {data.num_classes} ({', '.join(data.classes[:3])}, ...). Its labels would mean "
            "something else."
        )


def _predicted(model: Any, data: Any, split: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Image id, label map and ground truth, from the network."""
    import torch
    from tqdm import tqdm

    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    for batch in tqdm(loader, unit="batch", disable=None):
        with torch.inference_mode():
            labels, _ = model.labels([image.to(model.device) for image in batch["image"]])
        for name, one, mask in zip(batch["image_id"], labels, batch["mask"], strict=True):
            yield name, one.to("cpu", torch.uint8).numpy(), mask.numpy()


def _saved(folder: Path, data: Any, split: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The same from files."""
    from seglight.data.decode import read_mask
    from seglight.data.findings import listing
    from seglight.predict import path_of

    dataset = data.split(split)
    files = {name: path_of(folder, name) for name in dataset.ids}
    if missing := [str(file.relative_to(folder)) for file in files.values() if not file.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} predictions are not in {folder}: {listing(missing, 3)}. Label PNGs are "
            "named as the images, and every image of the split needs one."
        )
    for index, (name, file) in enumerate(files.items()):
        yield name, read_mask(file), dataset.read(index)[1]
