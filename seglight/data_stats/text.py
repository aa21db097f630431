"""`seglight.data_stats.Statistics` in words: a table of the classes, and lines that can be pasted into a command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seglight.data_stats.result import QUANTILES, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from seglight.data_stats.result import Statistics


def percent(share: float) -> str:
    """Three digits, and nothing but 0 for nothing: 41.3, 0.0271."""
    return "0" if not share else f"{100 * share:.3g}" if share < 0.1 else f"{100 * share:.1f}"


def table(stats: Statistics) -> Table:
    """A line per class, the most frequent first."""
    from rich.table import Table
    from rich.text import Text  # names as they are: square brackets in strings are styles

    semantic = stats.task == "semantic"
    caption = (
        "pixels: share of the labelled ones; there: share of all pixels of the images that hold the class"
        if semantic
        else "s / m / l: small, medium, large by COCO; side: median root of the area; h / w: median of the boxes"
    )
    shown = Table(caption=caption, caption_justify="left")
    names = ["pixels, %", "images"]
    names += ["there, %"] if semantic else ["objects", "crowds", "s / m / l", "side, px", "h / w"]
    shown.add_column("class", overflow="fold")
    for name in names:
        shown.add_column(name, justify="right")
    of_images = stats.pixels / stats.holding_pixels.clip(1)
    for k in sorted(range(len(stats.classes)), key=lambda k: (-stats.pixels[k], k)):
        cells = [percent(stats.frequency[k]), f"{stats.holding[k]:,}"]
        if semantic:
            cells.append(percent(of_images[k]))
        else:
            one = stats.object_sizes(k)
            cells += [f"{one['count']:,}", f"{stats.crowds[k]:,}"]
            cells.append(" / ".join(f"{one[size]:,}" for size in ("small", "medium", "large")))
            cells += [f"{one['side'][2]:.0f}", f"{one['aspect'][2]:.2f}"] if one["count"] else ["", ""]
        shown.add_row(Text(stats.classes[k]), *cells, style=None if stats.holding[k] else "dim")
    return shown


def lines(stats: Statistics) -> list[str]:
    """What is to be said beside the table."""
    found = [*_images(stats), *_labels(stats)]
    found += [
        "",
        "Colours, 0..1 (what a normalisation takes):",
        f"  mean {_list(stats.mean)}",
        f"  std  {_list(stats.std)}",
    ]
    return found + (_weights(stats) if stats.task == "semantic" else _objects(stats))


def _images(stats: Statistics) -> list[str]:
    (height, width), count = max(stats.sizes.items(), key=lambda item: (item[1], item[0]))
    heights, widths = zip(*stats.sizes, strict=True)
    if len(stats.sizes) == 1:
        sizes = f"all {width}x{height} pixels"
    else:
        sizes = (
            f"{len(stats.sizes)} sizes: width {min(widths)} to {max(widths)}, height {min(heights)} to {max(heights)}, "
            f"most often {width}x{height} ({count:,})"
        )
    return [f"{stats.images:,} images, {sizes}."]


def _labels(stats: Statistics) -> list[str]:
    semantic, found = stats.task == "semantic", []
    share, bare = percent(stats.unlabelled_share), stats.unlabelled_images
    if bare == stats.images:
        what = "every pixel is 255" if semantic else "no image has an object"
        found.append(f"{stats.split} has no labels: {what}. Only sizes and colours are known.")
    elif semantic:
        found.append(f"Unlabelled (255): {share} % of the pixels" + (f"; {bare:,} images wholly." if bare else "."))
    else:
        left = ", which training leaves out unless data.skip_empty is false" if bare and stats.split == "train" else ""
        found.append(f"{share} % of the pixels belong to no object; {bare:,} images hold none{left}.")
    absent = [name for name, images in zip(stats.classes, stats.holding, strict=True) if not images]
    if absent and bare < stats.images:
        found.append(f"Classes that never occur ({len(absent)}): {', '.join(absent)}.")
    if stats.strange:
        values = ", ".join(f"{value} ({pixels:,} pixels)" for value, pixels in list(stats.strange.items())[:5])
        found.append(f"Label values without a class: {values}. `seglight data check` says what to do.")
    return found


def _weights(stats: Statistics) -> list[str]:
    if not stats.pixels.any():
        return []
    found = ["", "Class weights, in label order:"]
    for kind, (formula, source) in WEIGHTS.items():
        found.append(f"  # {kind}: {formula} ({source})")
        found.append(f'  --model.class_weights "{_list(stats.class_weights(kind))}"')
    if not stats.pixels.all():
        found.append("  # a class that never occurs has weight 1, which nothing uses")
    return found


def _objects(stats: Statistics) -> list[str]:
    if not len(stats.objects):
        return []
    sizes, per_image = stats.object_sizes(), stats.objects_in_image
    mean = sum(number * count for number, count in per_image.items()) / stats.images
    shares = [f"{percent(sizes[name] / sizes['count'])} % {name}" for name in ("small", "medium", "large")]
    found = [
        "",
        f"{sizes['count']:,} objects and {stats.crowds.sum():,} crowds; {mean:.1f} objects an image, at most "
        f"{max(per_image)}. {', '.join(shares)} (COCO's ranges: below 32², up to 96², above).",
        f"{'':34}" + "".join(f"{f'{100 * q:.0f} %':>9}" for q in QUANTILES),
    ]
    texts = {
        "side": "square root of the area, px",
        "training_box": "square root of the box, training",
        "aspect": "height / width of the box",
    }
    for name, text in texts.items():
        found.append(f"  {text:32}" + "".join(f"{value:9.3g}" for value in sizes[name]))
    found += ["", "Anchors that fit these boxes at training size:", f'  --model.anchors "{stats.anchors()}"']
    return found


def _list(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"
