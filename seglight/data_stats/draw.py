"""One picture of `seglight.data_stats.Statistics`: frequencies, company, sizes, colours, places."""

from __future__ import annotations

import math
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from seglight.data_stats.result import LARGE, SMALL
from seglight.data_stats.text import percent
from seglight.visualize import plain

if TYPE_CHECKING:
    from pathlib import Path

    from seglight.data_stats.result import Statistics

WIDTH = 15.0  # inches
_IN_ROW = 8  # maps of places
_FEW = 30  # classes whose company fits beside the bars
_BLUE, _ORANGE = "#0072B2", "#D55E00"
_LIGHT = ("#c0392b", "#1e8449", "#2471a3")


def draw(stats: Statistics, path: str | Path | IO[bytes]) -> None:
    """Write the picture as PNG. Classes are in label order throughout; matplotlib's global state is left alone."""
    from matplotlib.figure import Figure

    count = len(stats.classes)
    painters = {"classes": _classes, "company": _company, "sizes": _sizes, "colours": _colours, "objects": _objects}
    layout, ratios = _layout(count, objects=len(stats.objects) > 0)
    top = max(4.0 if count == 1 else 6.4 if len(layout) == 3 else 5.2, 1.3 + 0.17 * count)
    rows = math.ceil(count / _IN_ROW)
    bottom = 1.75 * rows + 0.5
    figure = Figure(figsize=(WIDTH, top + bottom + 0.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[top, bottom])
    void = "unlabelled" if stats.task == "semantic" else "without an object"
    noun = "class" if count == 1 else "classes"
    figure.suptitle(
        f"{stats.name} {stats.split}: {stats.images:,} images, {count} {noun}, "
        f"{percent(stats.unlabelled_share)} % of the pixels {void}",
        x=0.01, ha="left", fontsize=14,
    )  # fmt: skip
    for name, axes in upper.subplot_mosaic(layout, **ratios).items():
        painters[name](axes, stats)
        axes.spines[["top", "right"]].set_visible(False)
    _places(lower, stats, rows)
    figure.savefig(path, dpi=100, format="png", metadata={"Software": "seglight data stats"})


def _layout(count: int, objects: bool) -> tuple[list[list[str]], dict[str, list[float]]]:
    """Which panel lies where, and how wide and high they are."""
    beside = ["sizes", "colours", *(["objects"] if objects else [])]
    if count == 1:
        return [beside], {}
    if count <= _FEW:
        return [["classes", "company", name] for name in beside], {"width_ratios": [1.15, 1.2, 0.85]}
    lines = [["classes", *["company"] * len(beside)], ["classes", *beside]]
    return lines, {"width_ratios": [1, *[1.7 / len(beside)] * len(beside)], "height_ratios": [3, 1]}


def _font(count: int) -> float:
    """Points that fit a line per class, 0.17 inches or more."""
    return 9 if count <= 40 else 7.5


def _classes(axes: Any, stats: Statistics) -> None:
    count, share = len(stats.classes), 100 * stats.frequency
    colours = [tuple(v / 255 for v in colour) for colour in stats.colours]
    axes.barh(range(count), np.maximum(share, 1e-9), color=colours, edgecolor="0.35", lw=0.6)
    low = share[share > 0].min(initial=1.0)
    axes.set(xscale="log", xlim=(low / 2, 100 * 12), ylim=(count - 0.4, -0.6))
    for k in range(count):
        text = f"{percent(share[k] / 100)} %, {stats.holding[k]:,} img"
        if stats.task == "instance":
            text = f"{percent(share[k] / 100)} %, {int((stats.objects[:, 0] == k).sum()):,} obj"
        absent = not stats.holding[k]
        place = low / 2 if absent else share[k]
        axes.text(place * 1.15, k, "never" if absent else text, va="center", fontsize=_font(count) - 1, color="0.25")
    axes.set_yticks(range(count), map(plain, stats.classes), fontsize=_font(count))
    axes.set_xticks([10.0**e for e in range(math.floor(math.log10(low / 2)) + 1, 3)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    unit = "images" if stats.task == "semantic" else "objects"
    axes.set_title(f"share of the pixels, % (log), and {unit}", loc="left", fontsize=11)


def _company(axes: Any, stats: Statistics) -> None:
    """Of the images with the class of a row, the share that also has that of a column."""
    count = len(stats.classes)
    held = np.diag(stats.together)[:, None]
    share = np.where(held > 0, 100 * stats.together / held.clip(1), np.nan)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axes.set_facecolor("0.92")
    if count <= 21:
        for row, column in np.argwhere(np.nan_to_num(share) >= 0.5):
            dark = share[row, column] > 55
            text = f"{share[row, column]:.0f}"
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if dark else "0.2",
                in_layout=False,
            )
    size = 9 if count <= _FEW else min(7.5, 520 / count)
    # More than 100 would not be legible, and the order is that of the bars.
    names = [plain(name) if count <= 100 else "" for name in stats.classes]
    axes.set_xticks(range(count), names, rotation=90, fontsize=size)
    axes.set_yticks(range(count), names, fontsize=size)
    axes.tick_params(length=0)
    axes.set_title("images with the row's class that have the column's, %", loc="left", fontsize=11)


def _sizes(axes: Any, stats: Statistics) -> None:
    heights, widths, counts = np.array([(*size, number) for size, number in sorted(stats.sizes.items())]).T
    axes.scatter(widths, heights, 12 + 250 * counts / stats.images, color=_BLUE, alpha=0.5, lw=0)
    axes.set(xlim=(0, 1.15 * widths.max()), ylim=(0, 1.15 * heights.max()), xlabel="width", ylabel="height")
    if len(counts) == 1:
        text = f"all {widths[0]}x{heights[0]}"
        axes.annotate(text, (widths[0], heights[0]), (-12, -14), textcoords="offset points", ha="right", fontsize=9)
    axes.set_title("image sizes, pixels", loc="left", fontsize=11)
    axes.grid(color="0.93")


def _colours(axes: Any, stats: Statistics) -> None:
    share = 100 * stats.intensities / stats.intensities.sum(1, keepdims=True).clip(1)
    for name, one, colour, mean, std in zip(
        ("red", "green", "blue"), share, _LIGHT, stats.mean, stats.std, strict=True
    ):
        axes.plot(np.arange(256), one, color=colour, lw=1.3, label=f"{name} {mean:.3f} ± {std:.3f}")
    axes.set(
        xlim=(0, 255),
        ylim=(0, 1.15 * (np.quantile(share, 0.99) or share.max() or 1)),
        xlabel="value",
        ylabel="pixels, %",
    )
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("colours (mean ± std of 0..1)", loc="left", fontsize=11)


def _objects(axes: Any, stats: Statistics) -> None:
    _, area, width, height, factor = stats.objects.T
    sides = {
        "in the image": (np.sqrt(area), _BLUE),
        "box at training size": (factor * np.sqrt(width * height), _ORANGE),
    }
    both = np.concatenate([side for side, _ in sides.values()]).clip(1)
    low, high = math.floor(math.log2(both.min())), max(math.ceil(math.log2(both.max())), 7)
    for name, (side, colour) in sides.items():
        axes.hist(side.clip(1), np.logspace(low, high, 6 * (high - low) + 1, base=2), histtype="step", color=colour,
                  lw=1.6, label=name)  # fmt: skip
    for limit in (SMALL, LARGE):
        axes.axvline(math.sqrt(limit), color="0.6", lw=1, ls=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="pixels (dotted: 32 and 96)", ylabel="objects", ylim=(0, 1.3 * axes.get_ylim()[1]))
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("square root of the object's area", loc="left", fontsize=11)


def _places(figure: Any, stats: Statistics, rows: int) -> None:
    heat = stats.heat
    height, width = max(stats.sizes.items(), key=lambda item: (item[1], item[0]))[0]
    columns = min(_IN_ROW, max(4, len(stats.classes)))
    grid = np.atleast_2d(figure.subplots(rows, columns))
    for axes in grid.flat:
        axes.set_axis_off()
    for k, axes in zip(range(len(stats.classes)), grid.flat, strict=False):
        most = heat[k].max()
        axes.imshow(
            heat[k], cmap="magma", vmin=0, vmax=most or 1, extent=(0, width, height, 0), interpolation="bilinear"
        )
        axes.set_title(f"{plain(stats.classes[k])} ≤ {percent(most)} %", fontsize=9, loc="left")
    figure.suptitle(
        "where in the picture: share of the class at each place in the images that hold it, up to the number above",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
