"""Pictures of objects: tinted masks with names and scores, and what a detector got right, invented and missed.

Images are uint8 (H, W, 3) RGB, masks `seglight.types.RLE`. Every object has a colour of its own, not its class's: two
touching cells must be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seglight import masks as mask_tools
from seglight import visualize
from seglight.types import RLE

if TYPE_CHECKING:
    from seglight.instance_scores import InstanceScores

RIGHT, INVENTED, MISSED, IN_CROWD = (0, 158, 115), (214, 30, 40), (0, 114, 178), (225, 225, 225)
"""Green, red, blue and grey of the error panel."""


@dataclass
class Objects:
    """Objects of one image, predicted or true."""

    labels: np.ndarray
    """int (N,), 0..K-1."""
    rles: list[RLE]
    scores: np.ndarray | None = None
    """float (N,), 0..1; None for the truth."""
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """bool (N,) of the truth."""

    @classmethod
    def dense(cls, labels: np.ndarray, masks: np.ndarray) -> Objects:
        """Of masks bool (N, H, W)."""
        from pycocotools import mask as coco

        return cls(labels, coco.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8)))

    def above(self, score: float, most: int = 100) -> Objects:
        """The predicted objects of at least this score, the best `most` of them."""
        keep = [i for i in np.argsort(-self.scores, kind="stable") if self.scores[i] >= score][:most]
        return Objects(self.labels[keep], [self.rles[i] for i in keep], self.scores[keep])


def overlay(
    image: np.ndarray,
    objects: Objects,
    classes: Sequence[str],
    colours: Sequence[tuple[int, int, int]] | None = None,
    alpha: float = 0.5,
    names: bool = True,
) -> np.ndarray:
    """The image with tinted, outlined and named objects: uint8 (H, W, 3); the best score lies on top.

    Args:
        image: uint8 (H, W, 3).
        objects: to draw.
        classes: K names; a single one is not written beside every object.
        colours: one per object; otherwise told apart from their neighbours.
        alpha: share of the colour inside of an object, 0..1.
        names: write class and score where there is room.
    """
    import cv2

    picture = np.ascontiguousarray(image).copy()
    count = len(objects.rles)
    if not count:
        return picture
    if colours is None:
        wheel = visualize.default_palette(24)[1:]  # without the grey of a background
        colours = [wheel[i % len(wheel)] for i in range(count)]
    thickness = max(1, round(min(picture.shape[:2]) / 400))
    for i in reversed(range(count)):
        mask = mask_tools.decode([objects.rles[i]])[0]
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(ys):
            continue
        box = slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1)
        inside = mask[box]
        part = picture[box]
        part[inside] = ((1 - alpha) * part[inside] + alpha * np.array(colours[i])).round()
        outlines, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        corner = (int(xs[0]), int(ys[0]))
        cv2.drawContours(picture, outlines, -1, tuple(int(v) for v in colours[i]), thickness, offset=corner)
    return _write_names(picture, objects, classes) if names else picture


def _write_names(picture: np.ndarray, objects: Objects, classes: Sequence[str]) -> np.ndarray:
    """Class and score at the top left of every object that is wide enough for them."""
    from PIL import Image, ImageDraw

    canvas = Image.fromarray(picture)
    draw, size = ImageDraw.Draw(canvas), max(10, round(min(picture.shape[:2]) / 40))
    font = visualize.font_of(size)
    boxes = mask_tools.boxes(objects.rles)
    for i in reversed(range(len(objects.rles))):
        words = [classes[objects.labels[i]]] if len(classes) > 1 else []
        if objects.scores is not None:
            words.append(f"{100 * objects.scores[i]:.0f}")
        if len(objects.crowd) and objects.crowd[i]:
            words.append("(crowd)")
        text = " ".join(words)
        x1, y1, x2, y2 = boxes[i]
        if not text or draw.textlength(text, font) + 4 > x2 - x1 or y2 - y1 < 2.5 * size:  # it would hide the object
            continue
        x, y = float(max(x1, 0)), float(max(y1, 0))
        left, top, right, bottom = draw.textbbox((x + 2, y + 1), text, font)
        draw.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=(20, 20, 20))
        draw.text((x + 2, y + 1), text, fill=(255, 255, 255), font=font)
    return np.asarray(canvas).copy()


def match(truth: Objects, found: Objects, iou: float = 0.5, classes: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Which true object each predicted one hits, by the rule of COCO at one threshold.

    Best score first; each takes the free true object of its class with the largest overlap; crowds take any number.

    Args:
        truth: with `crowd`.
        found: best score first.
        iou: least intersection over union (over the prediction's area, for crowds).
        classes: whether classes must agree.

    Returns:
        int (N,), index of the true object that each prediction hits, -1 for none; bool (M,), which true ones were hit.
    """
    hit, taken = np.full(len(found.rles), -1), np.zeros(len(truth.rles), bool)
    if not len(hit) or not len(taken):
        return hit, taken
    from pycocotools import mask as coco

    crowd = truth.crowd if len(truth.crowd) else np.zeros(len(taken), bool)
    overlaps = np.asarray(coco.iou(found.rles, truth.rles, crowd.astype(np.uint8).tolist()))
    for i in range(len(hit)):
        fits = overlaps[i] >= iou
        if classes:
            fits &= truth.labels == found.labels[i]
        for free in (fits & ~taken & ~crowd, fits & crowd):
            if free.any():
                hit[i] = int(np.where(free, overlaps[i], -1).argmax())
                taken[hit[i]] = True
                break
    return hit, taken


def errors(image: np.ndarray, truth: Objects, found: Objects, classes: bool = True) -> tuple[np.ndarray, str]:
    """Found objects (at IoU 0.5) in green, invented ones in red, missed ones in blue, on grey; and a caption.

    Those in a crowd are neither right nor invented, and light grey.
    """
    import cv2

    hit, taken = match(truth, found, classes=classes)
    crowd = truth.crowd if len(truth.crowd) else np.zeros(len(taken), bool)
    missed = np.flatnonzero(~taken & ~crowd)
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    dim = cv2.cvtColor(cv2.convertScaleAbs(grey, alpha=0.5, beta=60), cv2.COLOR_GRAY2RGB)
    kinds = np.where(hit < 0, 1, 0)
    if len(taken):
        kinds[(hit >= 0) & crowd[hit]] = 2
    right, invented = int((kinds == 0).sum()), int((kinds == 1).sum())
    shown = range(len(hit)) if classes else np.flatnonzero(hit >= 0)  # of proposals, many are meant to be wrong
    rles = [*(found.rles[i] for i in shown), *(truth.rles[i] for i in missed)]
    colours = [(RIGHT, INVENTED, IN_CROWD)[kinds[i]] for i in shown] + [MISSED] * len(missed)
    drawn = Objects(np.zeros(len(rles), int), rles)
    if classes:
        caption = f"{right} right, {invented} invented, {len(missed)} missed"
    else:
        caption = f"{int((taken & ~crowd).sum())} found, {len(missed)} missed"
    return overlay(dim, drawn, ["object"], colours, 0.6, names=False), caption


def panels(
    image: np.ndarray,
    truth: Objects,
    found: Objects,
    classes: Sequence[str],
    agnostic: bool = False,
    panel: int = 480,
    title: str = "",
    min_score: float = 0.0,
) -> np.ndarray:
    """Image, ground truth, prediction and errors side by side: uint8 (h, w, 3).

    Args:
        image: uint8 (H, W, 3).
        truth: annotated objects.
        found: predicted objects worth drawing, best first.
        classes: K names.
        agnostic: classes need not agree.
        panel: longest side of each picture, pixels.
        title: written below, for instance the image's id.
        min_score: that objects worth drawing have at least; written beside their number.
    """
    best = f" of score {100 * min_score:.0f} or more" if min_score else ""
    wrong, caption = errors(image, truth, found, not agnostic)
    contents = {
        "image": image,
        f"ground truth: {len(truth.rles)} objects": overlay(image, truth, classes),
        f"prediction: {len(found.rles)} objects{best}": overlay(image, found, [""] if agnostic else classes),
        caption: wrong,
    }
    contents = {name: visualize.fit(content, panel) for name, content in contents.items()}
    return visualize.side_by_side(contents, None, title)


def label_map(objects: Objects, size: tuple[int, int]) -> np.ndarray:
    """Class of the best object at every pixel, uint8 (H, W); 255 where there is none. What a dashboard can show."""
    labels = np.full(size, 255, np.uint8)
    for i in reversed(range(len(objects.rles))):
        labels[mask_tools.decode([objects.rles[i]])[0]] = objects.labels[i]
    return labels


def box_data(objects: Objects, classes: Sequence[str], scale: float = 1.0) -> list[dict]:
    """Boxes of the objects in the form that W&B draws, in pixels of the image resized by `scale`."""
    corners = scale * mask_tools.boxes(objects.rles)
    data = []
    for i, (x1, y1, x2, y2) in enumerate(corners.tolist()):
        label = int(objects.labels[i])
        one = {
            "position": {"minX": x1, "minY": y1, "maxX": x2, "maxY": y2},
            "domain": "pixel",
            "class_id": label,
            "box_caption": classes[label],
        }
        if objects.scores is not None:
            one["scores"] = {"score": float(objects.scores[i])}
        data.append(one)
    return data


def precision_recall_png(path: str | Path, scores: InstanceScores, most: int = 12) -> None:
    """Draw precision over recall: at several IoUs averaged over the classes, and of single classes at IoU 0.5.

    Args:
        path: of the PNG.
        scores: of a whole set.
        most: classes drawn, those with most objects.
    """
    from matplotlib.figure import Figure

    recalls = np.linspace(0, 100, scores.precision.shape[1])
    counted = np.flatnonzero(scores.objects > 0)
    single = scores.agnostic or len(scores.classes) == 1
    figure = Figure(figsize=(5.2 if single else 10.4, 4.2), layout="constrained")
    axes = figure.add_subplot(1, 1 if single else 2, 1)
    for k, iou in ((0, 0.5), (3, 0.65), (5, 0.75), (7, 0.85), (9, 0.95)):
        curve = scores.precision[k][:, counted].mean(1) if len(counted) else np.zeros(len(recalls))
        shade = (0.85 - 0.85 * (iou - 0.5) / 0.45,) * 2
        label = f"IoU {iou:.2f}: {100 * curve.mean():.1f}"
        axes.plot(recalls, 100 * curve, color=(shade[0] * 0.3, shade[1] * 0.75, 0.75), lw=1.8, label=label)
    panels = [(axes, "all objects" if single else f"mean of {len(counted)} classes")]
    if not single:
        axes = figure.add_subplot(1, 2, 2)
        shown = counted[np.argsort(-scores.objects[counted], kind="stable")][:most]
        for k, colour in zip(shown, visualize.default_palette(most + 1)[1:], strict=False):
            label = f"{visualize.plain(scores.classes[k])}: {100 * scores.precision[0][:, k].mean():.1f}"
            axes.plot(recalls, 100 * scores.precision[0][:, k], color=np.array(colour) / 255, lw=1.6, label=label)
        more = f", {most} most frequent" if len(counted) > most else ""
        panels.append((axes, f"classes at IoU 0.50{more}"))
    for axes, title in panels:
        axes.set(xlim=(0, 100), ylim=(0, 102), xlabel="recall, %", ylabel="precision, %")
        axes.set_title(title, loc="left", fontsize=11)
        axes.legend(frameon=False, fontsize=8, title="area under the curve, %", title_fontsize=8, loc="best")
        axes.grid(color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, format="png")
