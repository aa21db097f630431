"""Pictures of label maps, of errors and of curves.

Arrays in and arrays out: images are uint8 (H, W, 3) RGB, label maps (H, W) with 0..K-1 or 255, palettes K RGB colours.
cv2, PIL and matplotlib are imported where they are used; matplotlib's global state (pyplot) is not touched, so the
functions work without a display, in threads and beside a user's own figures.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seglight.types import IGNORE_INDEX

Palette = Sequence[tuple[int, int, int]]

VOID = (224, 224, 192)
"""Colour of label 255, as the VOC devkit paints it."""
STRANGE = (255, 0, 255)
"""Colour of labels that belong to no class: a fault in the data, and it should be seen."""
WRONG = (214, 30, 40)

# Okabe and Ito's set (jfly.uni-koeln.de/color), told apart with any common colour vision, after a grey for class 0.
_FIRST = (
    (90, 90, 90), (230, 159, 0), (0, 114, 178), (0, 158, 115),
    (213, 94, 0), (204, 121, 167), (86, 180, 233), (240, 228, 66),
)  # fmt: skip
# Linear RGB as people without red or without green cones see it: Machado, Oliveira, Fernandes 2009, severity 1.
_PROTANOPIA = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))
_DEUTERANOPIA = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))


def default_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """K colours that stay apart also with red-green colour blindness; the first ones do not depend on K.

    Eight well-known colours, then always the colour whose nearest neighbour is farthest, where the distance of two
    colours is the smallest CIELAB distance over normal, protanope and deuteranope vision.
    """
    if not 1 <= num_classes <= IGNORE_INDEX:
        raise ValueError(f"{num_classes} colours were asked for; a label map has 1 to {IGNORE_INDEX} classes.")
    levels = np.linspace(0, 255, 11)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    seen = _vision(candidates)
    tint = (seen[0, :, 0] > 28) & (seen[0, :, 0] < 92)  # darker or lighter ones are lost over a photograph
    candidates, seen = candidates[tint], seen[:, tint]
    chosen = [np.array(colour, float) for colour in _FIRST[:num_classes]]
    nearest = np.full(len(candidates), np.inf)
    for colour in (*chosen, VOID, WRONG):
        nearest = np.minimum(nearest, _distance(seen, _vision(np.array([colour], float))))
    while len(chosen) < num_classes:
        best = int(nearest.argmax())
        chosen.append(candidates[best])
        nearest = np.minimum(nearest, _distance(seen, seen[:, best : best + 1]))
    return [tuple(round(float(v)) for v in colour) for colour in chosen]


def _vision(colours: np.ndarray) -> np.ndarray:
    """CIELAB (3, N, 3) of RGB 0..255 (N, 3), for three kinds of colour vision."""
    import cv2

    rgb = np.asarray(colours) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    views = np.stack([linear @ np.array(m).T for m in (np.eye(3), _PROTANOPIA, _DEUTERANOPIA)]).clip(0, 1)
    srgb = np.where(views <= 0.0031308, views * 12.92, 1.055 * views ** (1 / 2.4) - 0.055)
    return cv2.cvtColor(srgb.astype(np.float32), cv2.COLOR_RGB2LAB)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a - b, axis=-1).min(0)


def _table(palette: Palette) -> np.ndarray:
    """Colour of each of the 256 label values, uint8 (256, 3)."""
    table = np.empty((256, 3), np.uint8)
    table[:] = STRANGE
    table[: len(palette)] = np.asarray(palette, np.uint8).reshape(-1, 3)
    table[IGNORE_INDEX] = VOID
    return table


def colorize(mask: np.ndarray, palette: Palette) -> np.ndarray:
    """Paint a label map: uint8 (H, W, 3). 255 is drawn in `VOID`, a label without a class in `STRANGE`."""
    return _table(palette).take(np.asarray(mask).astype(np.uint8), 0)


def _edges(mask: np.ndarray, thickness: int = 1) -> np.ndarray:
    """Bool (H, W): pixels whose right or lower neighbour has another label, widened to `thickness`."""
    edges = np.zeros(mask.shape, bool)
    edges[:, :-1] |= mask[:, 1:] != mask[:, :-1]
    edges[:-1] |= mask[1:] != mask[:-1]
    if thickness > 1:
        import cv2

        edges = cv2.dilate(edges.astype(np.uint8), np.ones((thickness, thickness), np.uint8)).astype(bool)
    return edges


def overlay(image: np.ndarray, mask: np.ndarray, palette: Palette, alpha: float = 0.5) -> np.ndarray:
    """The image with its labels as a tint and their outlines in full colour: uint8 (H, W, 3).

    Void pixels and classes whose colour is black (the background of VOC) leave the image as it is.

    Args:
        alpha: share of the class colour, 0..1.
    """
    import cv2

    colours = colorize(mask, palette)
    table = _table(palette)
    plain = (~table.any(1) | (np.arange(256) == IGNORE_INDEX))[np.asarray(mask).astype(np.uint8)]
    picture = cv2.addWeighted(np.ascontiguousarray(image), 1 - alpha, colours, alpha, 0)
    picture[plain] = image[plain]
    line = _edges(mask, max(1, round(min(mask.shape) / 300)))
    picture[line] = colours[line]
    picture[line & plain] = 235
    return picture


def error_map(image: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Where the prediction is wrong: uint8 (H, W, 3); right is the image in dim grey, wrong red, void neutral.

    Args:
        image: uint8 (H, W, 3).
        mask: ground truth (H, W).
        labels: prediction (H, W).
    """
    import cv2

    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    picture = cv2.cvtColor(cv2.convertScaleAbs(grey, alpha=0.4, beta=70), cv2.COLOR_GRAY2RGB)
    wrong = mask != labels
    picture[wrong] = (0.2 * picture[wrong] + 0.8 * np.array(WRONG)).round()
    picture[mask == IGNORE_INDEX] = VOID
    return picture


def legend(classes: Sequence[str], palette: Palette, width: int = 1024, size: int = 15) -> np.ndarray:
    """Names beside their colours in as many rows as they need: uint8 (h, width, 3) on white.

    Args:
        classes: names, any number.
        palette: one colour per name, or more.
        width: of the picture, pixels.
        size: of the text, pixels.
    """
    from PIL import Image, ImageDraw

    font = font_of(size)
    gap, swatch, row = size, size, int(size * 1.7)
    place, x, y = [], gap, 0
    for name in classes:
        length = swatch + size // 2 + math.ceil(font.getlength(name))
        if x + length > width - gap and x > gap:
            x, y = gap, y + row
        place.append((x, y))
        x += length + gap
    picture = Image.new("RGB", (width, y + row + 4), "white")
    draw = ImageDraw.Draw(picture)
    for name, colour, (x, y) in zip(classes, palette, place, strict=False):
        top = y + (row - swatch) // 2 + 2
        draw.rectangle((x, top, x + swatch, top + swatch), fill=tuple(int(v) for v in colour), outline=(120, 120, 120))
        draw.text((x + swatch + size // 2, top + swatch / 2), name, fill=(30, 30, 30), font=font, anchor="lm")
    return np.asarray(picture)


@functools.cache
def font_of(size: int) -> Any:
    """DejaVu Sans as matplotlib brings it, about as high as Pillow's own font of this size, which is for English."""
    from PIL import ImageFont

    folder = Path(importlib.util.find_spec("matplotlib").origin).parent  # without importing it
    return ImageFont.truetype(folder / "mpl-data/fonts/ttf/DejaVuSans.ttf", 0.92 * size)


def plain(name: str) -> str:
    """A name for matplotlib, which takes what stands between two dollar signs for a formula."""
    return name.replace("$", r"\$")


def shrink(image: np.ndarray, longest: int, labels: bool = False) -> np.ndarray:
    """Resize so that the longer side is at most `longest`; labels are picked, not mixed."""
    import cv2

    height, width = image.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_NEAREST if labels else cv2.INTER_AREA)


def fit(image: np.ndarray, longest: int, labels: bool = False) -> np.ndarray:
    """As `shrink`; a small picture is enlarged, each pixel kept visible."""
    factor = max(1, longest // max(image.shape[:2]))
    return shrink(image.repeat(factor, 0).repeat(factor, 1), longest, labels)


def side_by_side(panels: Mapping[str, np.ndarray], below: Callable[[int], np.ndarray] | None, title: str) -> np.ndarray:
    """Pictures of one size in a row, each below its caption: uint8 (h, w, 3).

    Args:
        panels: by caption, uint8 (H, W, 3).
        below: from the width to what is written below them, if anything is.
        title: at the end, or "".
    """
    from PIL import Image, ImageDraw

    gap, bar, font = 6, 26, font_of(15)
    height, width = next(iter(panels.values())).shape[:2]
    total = len(panels) * width + (len(panels) + 1) * gap
    foot = np.zeros((0, total, 3), np.uint8) if below is None else below(total)
    picture = Image.new("RGB", (total, bar + height + gap + len(foot) + (bar if title else 0)), "white")
    draw = ImageDraw.Draw(picture)
    for i, (caption, content) in enumerate(panels.items()):
        x = gap + i * (width + gap)
        draw.text((x + 2, bar / 2), caption, fill=(30, 30, 30), font=font, anchor="lm")
        picture.paste(Image.fromarray(content), (x, bar))
    if len(foot):
        picture.paste(Image.fromarray(foot), (0, bar + height + gap))
    if title:
        draw.text((gap + 2, picture.height - bar / 2), title, fill=(110, 110, 110), font=font, anchor="lm")
    return np.asarray(picture)


def triptych(
    image: np.ndarray,
    mask: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    palette: Palette,
    panel: int = 480,
    title: str = "",
) -> np.ndarray:
    """Image, ground truth, prediction and error side by side, with the classes that occur below: uint8 (h, w, 3).

    Args:
        image: uint8 (H, W, 3).
        mask: ground truth (H, W).
        labels: prediction (H, W).
        classes: K names.
        palette: K colours.
        panel: longest side of each of the four pictures, pixels.
        title: written before the legend, for instance the image's id.
    """
    valid = mask != IGNORE_INDEX
    error = f"error: {100 * (mask != labels)[valid].mean():.1f} % of the pixels" if valid.any() else "error"
    image, mask, labels = fit(image, panel), fit(mask, panel, labels=True), fit(labels, panel, labels=True)
    panels = {
        "image": image,
        "ground truth": overlay(image, mask, palette, 0.6),
        "prediction": overlay(image, labels, palette, 0.6),
        error: error_map(image, mask, labels),
    }
    present = sorted((set(np.unique(mask)) | set(np.unique(labels))) & set(range(len(classes))))
    names, colours = [classes[k] for k in present], [palette[k] for k in present]
    if not valid.all():
        names, colours = [*names, "void"], [*colours, VOID]
    return side_by_side(panels, lambda width: legend(names, colours, width), title)


def grid(pictures: Sequence[np.ndarray], columns: int = 4, gap: int = 6) -> np.ndarray:
    """Pictures (H_i, W_i, 3) in rows on white, each in a cell as large as the largest."""
    height, width = max(p.shape[0] for p in pictures), max(p.shape[1] for p in pictures)
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return sheet


def save_palette_png(path: str | Path, labels: np.ndarray, palette: Palette) -> None:
    """Write a label map as an index PNG: pixel values are the labels, colours are for the eye; size unchanged."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(labels, dtype=np.uint8))
    picture.putpalette(_table(palette).tobytes())  # turns mode L into mode P
    picture.save(path, format="PNG")


def confusion_png(path: str | Path, table: np.ndarray, classes: Sequence[str]) -> None:
    """Draw a confusion matrix, each row (a true class) in percent of its pixels; rows without pixels are hatched.

    Drawn with PIL: 150 classes take matplotlib seconds, and this is drawn after every validation.

    Args:
        table: (K, K) counts, [true, predicted].
        classes: K names; 2 to 150 stay readable.
    """
    from PIL import Image, ImageDraw

    table, count = np.asarray(table, float), len(classes)
    support = table.sum(1, keepdims=True)
    share = np.divide(100 * table, support, out=np.zeros_like(table), where=support > 0)
    cell, letters = (max(54, 220 // count), 17) if count <= 12 else (34, 14) if count <= 30 else (15, 12)
    font, small, big = font_of(letters), font_of(round(letters * 0.85)), font_of(17)
    name_width = math.ceil(max(font.getlength(name) for name in classes))
    left, top, side = name_width + 44, 42, cell * count
    picture = Image.new("RGB", (left + side + 80, max(top + side + name_width + 48, 300)), "white")
    draw = ImageDraw.Draw(picture)
    heat = _blues(share).repeat(cell, 0).repeat(cell, 1)
    if cell > 20:
        heat[cell - 1 :: cell], heat[:, cell - 1 :: cell] = 235, 235
    picture.paste(Image.fromarray(heat), (left, top))
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline=(190, 190, 190))
    for i, name in enumerate(classes):
        y = top + (i + 0.5) * cell
        draw.text((left - 8, y), name, fill=(30, 30, 30), font=font, anchor="rm")
        if support[i] == 0:
            for x in range(left, left + side, 12):
                draw.line((x, y + 3, x + 6, y - 3), fill=(200, 200, 200))
    names = Image.new("RGB", (name_width, side), "white")  # written sideways, then turned upright
    for j, name in enumerate(classes):
        place = (name_width, (j + 0.5) * cell)
        ImageDraw.Draw(names).text(place, name, fill=(30, 30, 30), font=font, anchor="rm")
    picture.paste(names.transpose(Image.Transpose.ROTATE_90), (left, top + side + 8))
    for i, j in zip(*np.nonzero(share >= 0.5), strict=True) if cell > 20 else ():
        colour = (255, 255, 255) if share[i, j] > 30 else (40, 40, 40)
        place = (left + (j + 0.5) * cell, top + (i + 0.5) * cell)
        draw.text(place, f"{share[i, j]:.0f}", fill=colour, font=small, anchor="mm")
    draw.text((left, 10), "percent of the true class's pixels", fill=(30, 30, 30), font=big)
    draw.text((left + side / 2, picture.height - 14), "predicted", fill=(30, 30, 30), font=big, anchor="mm")
    true = Image.new("RGB", (60, 24), "white")
    ImageDraw.Draw(true).text((30, 12), "true", fill=(30, 30, 30), font=big, anchor="mm")
    picture.paste(true.transpose(Image.Transpose.ROTATE_90), (6, round(top + side / 2) - 30))
    high = min(side, 240)
    scale = _blues(np.linspace(10, 0, high)[:, None] ** 2).repeat(14, 1)
    picture.paste(Image.fromarray(scale), (left + side + 20, top))
    for value in (0, 1, 5, 20, 50, 100):
        y = top + (1 - math.sqrt(value / 100)) * (high - 1)
        draw.text((left + side + 40, y), str(value), fill=(30, 30, 30), font=font_of(13), anchor="lm")
    picture.save(path, format="PNG")


def _blues(percent: np.ndarray) -> np.ndarray:
    """White to dark blue, uint8 (..., 3), by the square root: small confusions show beside a large diagonal."""
    stops = np.array([(255, 255, 255), (214, 229, 244), (107, 174, 214), (33, 113, 181), (8, 48, 107)], float)
    at = np.sqrt(percent / 100)
    return np.stack([np.interp(at, np.linspace(0, 1, 5), channel) for channel in stops.T], -1).round().astype(np.uint8)


def results_png(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the curves of a run over its optimiser steps: losses, learning rate and the scores that it has.

    Args:
        rows: records with `step` and any metrics, as `seglight.loggers.read_metrics` returns them; panels without
            data are left out.
    """
    from matplotlib.figure import Figure

    panels = [
        ("loss", {"train": "train/loss", "val": "val/loss"}, 1.0),
        ("learning rate", {"": "train/lr"}, 1.0),
        ("val mIoU, %", {"": "val/mIoU"}, 100.0),
        ("val pixel accuracy, %", {"": "val/pixAcc"}, 100.0),
        ("val AP, %", {"masks": "val/AP", "boxes": "val/box_AP"}, 100.0),
        ("val AR1000, %", {"masks": "val/AR1000"}, 100.0),
    ]
    drawn = []
    for title, names, factor in panels:
        curves = {label: _curve(rows, key, factor) for label, key in names.items()}
        curves = {label: curve for label, curve in curves.items() if len(curve[0])}
        if curves:
            drawn.append((title, curves))
    figure = Figure(figsize=(4.2 * max(1, len(drawn)), 3.2), layout="constrained")
    for i, (title, curves) in enumerate(drawn):
        axes = figure.add_subplot(1, len(drawn), i + 1)
        for colour, (label, (steps, values)) in zip(("#0072B2", "#D55E00"), curves.items(), strict=False):
            if label == "train" and len(steps) >= 20:  # noisy: the points faintly, their mean on top
                axes.plot(steps, values, color=colour, alpha=0.3, lw=1.2)
                values = _smooth(values)
            marker = "o" if len(steps) <= 20 else None
            axes.plot(steps, values, color=colour, lw=1.8, label=label, marker=marker, ms=3.5)
        if title.startswith(("val mIoU", "val AP", "val AR")):
            steps, values = next(iter(curves.values()))
            best = int(np.argmax(values))
            title = f"{title} (best {values[best]:.1f} at step {steps[best]:.0f})"
        if len(curves) > 1:
            axes.legend(frameon=False)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("optimiser step")
        axes.grid(color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, format="png")


def _curve(rows: Sequence[Mapping[str, Any]], key: str, factor: float) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], factor * row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    points = [point for point in points if math.isfinite(point[1])]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving mean over a twentieth of the curve; its ends use the points there are."""
    width = max(3, len(values) // 20)
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
