"""What the network gets, as a picture: batches with their labels, after augmentation in training.

Samples come from the same builders and in the same order as in training, so a fault that shows here is one that the
network sees: labels beside their objects, wrong colours, crops that hold nothing.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from seglight import visualize
from seglight.types import IGNORE_INDEX

if TYPE_CHECKING:
    from PIL import Image

    from seglight.data.base import DataModule, Split
    from seglight.visualize_objects import Objects

SOFTWARE = "seglight data show"
_CROWD = (150, 150, 150)
_MADE_BY = ("seglight data show", "seglight data stats")
_HEAD, _GAP, _LINE = 36, 8, 24  # pixels: height of the title, between cells, height of a line of text


class Shown(NamedTuple):
    """One sample as the network gets it."""

    image: np.ndarray
    """uint8 (H, W, 3)."""
    labels: np.ndarray | Objects
    """uint8 (H, W), or objects; boxes of the latter are in `boxes`."""
    boxes: np.ndarray | None
    """float (N, 4), x1 y1 x2 y2."""
    image_id: str
    note: str
    """How it was made."""


def show(
    datamodule: DataModule,
    split: Split = "train",
    count: int = 8,
    batch: int = 0,
    class_name: str | None = None,
    ids: Sequence[str | int] | None = None,
    augment: int = 0,
    epoch: int = 0,
    panel: int | None = None,
) -> Image.Image:
    """A picture of samples with their labels, training ones augmented as the seed of the datamodule says.

    Args:
        datamodule: any.
        split: "train", "val" or "test"; the latter two as stored.
        count: samples.
        batch: of the first sample, counted from 0. Training batches are those of one device; on more devices each gets
            its part of a larger batch.
        class_name: only samples in which this class shows, from that batch on, looking at each sample once.
        ids: these samples instead: names, or positions in the split.
        augment: so many passes over one sample instead (the first of `ids` or of the batch), after the stored one.
        epoch: pass over the data that `ids` and `augment` begin with; it decides the augmentation.
        panel: longest side of each picture, pixels. Default: 320 for labels, 440 for objects.

    Raises:
        ValueError: no such class, sample, batch or split; nothing to show; a panel that nobody can see.
    """
    if panel is not None and not 16 <= panel <= 4096:
        raise ValueError(f"panel is {panel}; it must be 16 to 4096 pixels.")
    shown = samples(datamodule, split, count, batch, class_name, ids, augment, epoch)
    panel = panel or (320 if datamodule.task == "semantic" else 440)
    title = [f"{type(datamodule).__name__} {split}"]
    if augment:
        title.append(f"{shown[0].image_id} as stored, then {augment} draws")
    elif ids is None:
        size = datamodule.batch_size if split == "train" else datamodule.val_batch_size
        last = batch + (len(shown) - 1) // size
        whole = f"batch {batch}" if last == batch else f"batches {batch} to {last}"
        title.append(f"from batch {batch} on" if class_name else f"{whole} (size {size})")
    if class_name:
        title.append(f"only with {class_name}")
    if split == "train":
        title.append(f"seed {datamodule.seed}")
    return _sheet(shown, datamodule.classes, datamodule.palette, panel, "  ·  ".join(title))


def samples(
    datamodule: DataModule,
    split: Split = "train",
    count: int = 8,
    batch: int = 0,
    class_name: str | None = None,
    ids: Sequence[str | int] | None = None,
    augment: int = 0,
    epoch: int = 0,
) -> list[Shown]:
    """What `show` draws; arguments as there."""
    if split not in ("train", "val", "test"):
        raise ValueError(f"There is no split {split!r}; choose train, val or test.")
    for name, value, low in (("count", count, 1), ("batch", batch, 0), ("augment", augment, 0), ("epoch", epoch, 0)):
        if value < low:
            raise ValueError(f"{name} is {value}; it must be at least {low}.")
    if augment and split != "train":
        raise ValueError(f"augment shows what training draws, but the split is {split}; choose train.")
    if class_name and (ids is not None or augment):
        raise ValueError("class_name looks through the batches, so it does not go with ids or augment.")
    label = _label(datamodule, class_name) if class_name else None
    data = datamodule.split(split)
    if not len(data):
        raise ValueError(f"{type(datamodule).__name__} has no samples in {split}.")
    if split == "train":
        chosen = None if ids is None else [(epoch, _index(data, one, split)) for one in ids]
        if augment:
            index = chosen[0][1] if chosen else next(_training_keys(datamodule, len(data), batch))[0][1]
            stored = _stored(data, index, datamodule.task)
            drawn = _built(datamodule, split, ([(epoch + n, index)] for n in range(augment)))
            return [stored, *drawn]
        batches = ([key] for key in chosen) if chosen else _training_keys(datamodule, len(data), batch)
    else:
        batches = _eval_keys(datamodule, data, split, batch, ids)
    found = _built(datamodule, split, batches)
    if label is not None:
        found = (one for one in found if _holds(one, label))
    found = list(islice(found, count if ids is None else None))
    if not found:
        raise ValueError(
            f"No sample of {split} shows {class_name!r} from batch {batch} on. `seglight data stats` says how often "
            "each class occurs; crops may miss a rare one."
        )
    return found


def save(picture: Image.Image, path: str | Path) -> None:
    """Write the picture as PNG, over an older one of this command but over nothing else.

    Raises:
        ValueError: no .png, or a file of somebody else.
    """
    from PIL.PngImagePlugin import PngInfo

    refuse_foreign(path)
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG", pnginfo=info)


def refuse_foreign(path: str | Path) -> None:
    """Raise ValueError unless the path is a PNG that is not there yet or is a picture of these commands."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} does not end in .png, and pictures are written as PNG.")
    if path.exists() and not _ours(path):
        raise ValueError(f"{path} exists and was not written by this command. Choose another name.")


def _ours(path: Path) -> bool:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") in _MADE_BY
    except (OSError, UnidentifiedImageError):
        return False


def classes_shown(shown: Sequence[Shown], classes: Sequence[str]) -> Counter[str]:
    """How many samples show each class; how many objects of it there are, if labels are objects."""
    found: Counter[str] = Counter()
    for one in shown:
        if isinstance(one.labels, np.ndarray):
            found.update(classes[k] for k in np.unique(one.labels) if k < len(classes))
        else:
            found.update(classes[k] for k in one.labels.labels)
    return found


def _label(datamodule: DataModule, name: str) -> int:
    classes = list(datamodule.classes)
    if name not in classes:
        lower = {one.lower(): one for one in classes}
        near = difflib.get_close_matches(name.lower(), lower, 3, 0.5)
        hint = f"; nearest: {', '.join(lower[one] for one in near)}" if near else f"; classes: {', '.join(classes)}"
        raise ValueError(f"{type(datamodule).__name__} has no class {name!r}{hint}.")
    return classes.index(name)


def _index(data: Any, wanted: str | int, split: str) -> int:
    """Position of a sample: a number is one; a text is a name first."""
    if isinstance(wanted, str):
        names = list(data.ids)
        if wanted in names:
            return names.index(wanted)
        near = difflib.get_close_matches(wanted, names, 3, 0.5)
        hint = f"nearest: {', '.join(near)}" if near else f"the first are {', '.join(names[:3])}"
        raise ValueError(f"There is no sample {wanted!r} in {split}; {hint}.")
    if not -len(data) <= wanted < len(data):
        raise ValueError(f"There is no sample {wanted} in {split}; it holds {len(data):,}, counted from 0.")
    return wanted % len(data)


def _training_keys(datamodule: DataModule, length: int, batch: int) -> Iterator[list[tuple[int, int]]]:
    """Training batches of one device from `batch` on, for one pass over the data, as pairs of pass and index."""
    from seglight.data.samplers import TrainSampler

    size = datamodule.batch_size
    count = max(1, math.ceil(length / size))
    keys = iter(TrainSampler(length, size, batch + count, datamodule.seed, skip=batch, apart=datamodule.apart()))
    return iter(lambda: list(islice(keys, size)), [])


def _eval_keys(datamodule: DataModule, data: Any, split: str, batch: int, ids: Any) -> Iterator[list[int]]:
    if ids is not None:
        return iter([[_index(data, one, split)] for one in ids])
    size = datamodule.val_batch_size
    count = math.ceil(len(data) / size)
    if batch >= count:
        raise ValueError(f"There is no batch {batch} in {split}; there are {count} of {size}, counted from 0.")
    return (list(range(first, min(first + size, len(data)))) for first in range(batch * size, len(data), size))


def _built(datamodule: DataModule, split: str, batches: Iterator[list[Any]]) -> Iterator[Shown]:
    training = split == "train"
    build = datamodule.train_builder() if training else datamodule.eval_builder(split)
    for keys in batches:
        batch = build(keys)
        for slot, key in enumerate(keys):
            note = f"pass {key[0]}" if training else "as stored"
            target = batch["mask" if datamodule.task == "semantic" else "target"][slot]
            yield _shown(batch["image"][slot], target, batch["image_id"][slot], note)


def _shown(image: Any, target: Any, image_id: str, note: str) -> Shown:
    from seglight.visualize_objects import Objects

    pixels = image.permute(1, 2, 0).numpy()
    if not isinstance(target, dict):
        return Shown(pixels, target.numpy(), None, image_id, note)
    labels, crowd = target["labels"].numpy(), target["iscrowd"].numpy()
    if "rles" in target:
        objects = Objects(labels, target["rles"], crowd=crowd)
    else:
        objects = Objects.dense(labels, target["masks"].numpy())
        objects.crowd = crowd
    return Shown(pixels, objects, target["boxes"].numpy(), image_id, note)


def _stored(data: Any, index: int, task: str) -> Shown:
    """A sample without augmentation."""
    import torch

    from seglight.data import instances, transforms

    if task == "semantic":
        batch = transforms.eval_batch(data, [index])
        return _shown(batch["image"][0], batch["mask"][0], batch["image_id"][0], "as stored")
    batch = instances.eval_batch(data, [index])
    return _shown(torch.as_tensor(batch["image"][0]), batch["target"][0], batch["image_id"][0], "as stored")


def _holds(one: Shown, label: int) -> bool:
    return bool(((one.labels if isinstance(one.labels, np.ndarray) else one.labels.labels) == label).any())


def _sheet(
    shown: Sequence[Shown], classes: Sequence[str], palette: visualize.Palette, panel: int, title: str
) -> Image.Image:
    """Pairs of image and labels in rows, a caption below each, all classes at the end."""
    from PIL import Image, ImageDraw

    semantic = isinstance(shown[0].labels, np.ndarray)
    cells = [_pair(one, classes, palette, panel) for one in shown]
    width = max(cell.shape[1] for cell in cells)
    columns = min(len(cells), max(1, min(3, 2200 // width)))
    columns = 2 if len(cells) == 4 else columns
    heights = [max(cell.shape[0] for cell in cells[i : i + columns]) for i in range(0, len(cells), columns)]
    tops = np.cumsum([_HEAD, *(height + _LINE + _GAP for height in heights)]).tolist()
    total = max(columns * (width + _GAP) + _GAP, 640)
    below = _legend(shown, classes, palette, total) if semantic else _names(shown, classes, total)
    picture = Image.new("RGB", (total, tops[-1] + below.shape[0]), "white")
    draw, font = ImageDraw.Draw(picture), visualize.font_of(14)
    draw.text((_GAP, _HEAD / 2), title, fill=(20, 20, 20), font=visualize.font_of(17), anchor="lm")
    for i, (one, cell) in enumerate(zip(shown, cells, strict=True)):
        x, y = _GAP + i % columns * (width + _GAP), tops[i // columns]
        picture.paste(Image.fromarray(cell), (x, y))
        caption = f"{one.image_id}  ·  {one.image.shape[1]}x{one.image.shape[0]}  ·  {one.note}"
        if not semantic:
            caption += f"  ·  {_plural(len(one.labels.labels), 'object')}"
        while draw.textlength(caption, font) > width and len(caption) > 12:
            caption = "…" + caption[2:]
        draw.text((x, y + cell.shape[0] + _LINE / 2), caption, fill=(90, 90, 90), font=font, anchor="lm")
    picture.paste(Image.fromarray(below), (0, tops[-1]))
    return picture


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _pair(one: Shown, classes: Sequence[str], palette: visualize.Palette, panel: int) -> np.ndarray:
    """Image and labels side by side: uint8 (h, w, 3)."""
    image = visualize.fit(one.image, panel)
    if isinstance(one.labels, np.ndarray):
        mask = visualize.fit(one.labels, panel, labels=True)
        drawn = _hatch(visualize.overlay(image, mask, palette, 0.6), mask == IGNORE_INDEX)
    else:
        drawn = _with_objects(image, one, classes)
    return np.concatenate([image, np.full((image.shape[0], 3, 3), 255, np.uint8), drawn], 1)


def _with_objects(image: np.ndarray, one: Shown, classes: Sequence[str]) -> np.ndarray:
    """Masks in a colour of their own with box and name; crowds hatched in grey."""
    import cv2

    from seglight import masks as mask_tools
    from seglight import visualize_objects

    size, count = image.shape[:2], len(one.labels.labels)
    if not count:
        return image
    wheel = visualize.default_palette(24)[1:]
    colours = [_CROWD if one.labels.crowd[i] else wheel[i % len(wheel)] for i in range(count)]
    dense = np.stack(
        [
            cv2.resize(mask_tools.decode([rle])[0].view(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
            for rle in one.labels.rles
        ]
    )
    objects = visualize_objects.Objects.dense(one.labels.labels, dense.astype(bool))
    objects.crowd = one.labels.crowd
    picture = visualize_objects.overlay(image, objects, classes, colours, names=False)
    if one.labels.crowd.any():
        picture = _hatch(picture, dense[one.labels.crowd].any(0))
    scale = np.array([size[1] / one.image.shape[1], size[0] / one.image.shape[0]] * 2)
    for box, colour in zip(np.round(one.boxes * scale).astype(int), colours, strict=True):
        corners = (int(box[0]), int(box[1])), (int(box[2]) - 1, int(box[3]) - 1)
        cv2.rectangle(picture, *corners, tuple(int(v) for v in colour), 1)
    return visualize_objects._write_names(picture, objects, classes)


def _hatch(picture: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Grey diagonal stripes, uint8 (h, w, 3): nobody learns here."""
    rows, columns = np.indices(where.shape, sparse=True)
    stripe = (rows + columns) // 3 % 3 == 0
    picture = picture.copy()
    picture[where] = (0.5 * picture[where] + 0.5 * 205).astype(np.uint8)
    picture[where & stripe] = 110
    return picture


def _legend(shown: Sequence[Shown], classes: Sequence[str], palette: visualize.Palette, width: int) -> np.ndarray:
    """Colours of the classes that occur; void as it is drawn."""
    values = np.unique(np.concatenate([np.unique(one.labels) for one in shown])).tolist()
    present = [k for k in values if k < len(classes)]
    names, colours = [classes[k] for k in present], [palette[k] for k in present]
    if strange := [str(k) for k in values if len(classes) <= k < IGNORE_INDEX]:
        names, colours = [*names, f"no class: {', '.join(strange)}"], [*colours, visualize.STRANGE]
    if IGNORE_INDEX in values:
        void = "hatched: ignored (255)" if present else "hatched: ignored (255). Nothing here has a label"
        names, colours = [*names, void], [*colours, (180, 180, 180)]
    return visualize.legend(names, colours, width, 15)


def _names(shown: Sequence[Shown], classes: Sequence[str], width: int) -> np.ndarray:
    """How many objects of each class there are; every object has a colour of its own."""
    counts = classes_shown(shown, classes)
    names = [f"{name} x {count}" for name, count in counts.most_common()] or ["no objects"]
    if crowds := sum(int(one.labels.crowd.sum()) for one in shown):
        names.append(f"hatched: {_plural(crowds, 'crowd')}")
    return _written(", ".join(names), width)


def _written(text: str, width: int) -> np.ndarray:
    """Text in as many lines as it needs: uint8 (h, width, 3)."""
    from PIL import Image, ImageDraw

    font, lines = visualize.font_of(15), [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width - 2 * _GAP:
            lines.append(word)
        else:
            lines[-1] = longer
    picture = Image.new("RGB", (width, _LINE * len(lines) + _GAP), "white")
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        draw.text((_GAP, _LINE * (i + 0.5)), line, fill=(30, 30, 30), font=font, anchor="lm")
    return np.asarray(picture)
