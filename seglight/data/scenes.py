"""Generated scenes: a small world of shapes over a skyline, with semantic and instance ground truth.

`scene(seed, index, size)` is a pure function: the same arguments give the same pixels on every machine, whatever was
drawn before. All drawing is integer arithmetic, and random numbers come from PCG64 seeded with (seed, index).

A network that only matches colours, or that loses resolution or sees a small field, must lose points somewhere. So
every difficulty is there to tell networks apart:

* Textured sky, buildings and objects (plain, stripes, checks, dots, grain, smooth noise), all from one pool of colours
  and patterns: colour and texture say nothing about the class, only shape does. A per-pixel classifier fails.
* Size from 6 pixels to more than half of the shorter side, so one scale of features is not enough.
* Occlusion (each object keeps at least 40 % of its pixels) and cut-off at the image edge: contours are incomplete.
* `ring` has a hole that shows what is behind it, and is otherwise a disc: small rings need fine detail.
* `wire` is 1 to 3 pixels wide, curves or poles: gone at stride 32, so decoders with skips win. Some stripes of the
  background look alike but are broad and periodic.
* `sun` and `moon` are the same disc. By day the windows of the skyline are dark on bright walls, by night they are lit
  on dark walls; nothing else in the picture depends on the time of day. Discs keep well above the roofs, so the answer
  is far away: it takes a large receptive field or global context. `scene(..., night=...)` forces either answer and
  changes no pixel outside the skyline.
* Noise, blur and an illumination ramp, each in a part of the scenes, against memorised textures.
* A border of 1 or 2 pixels labelled 255 around whatever is in front, as in PASCAL VOC.
* Swarms: a handful of small objects annotated as one crowd, for the crowd rules of instance evaluation. One scene in
  sixteen (`index % 16 == 11`, so that small samples have one too) holds no object at all.

What that costs, measured on 101 scenes of 160x192 pixels: the ground truth itself, averaged over cells of 4, 8, 16 or
32 pixels and interpolated back, has a mIoU of 0.93, 0.83, 0.68 or 0.38; with every disc called moon it has 0.79.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from seglight.data import strokes
from seglight.data.textures import (
    DIRECTIONS,
    apart,
    between,
    coloured,
    draw_colour,
    draw_texture,
    noise,
    shifted,
    waves,
    whole,
)

CLASSES = ("background", "square", "triangle", "star", "ring", "wire", "sun", "moon")
"""Names in label order. A square may be up to a quarter longer than wide."""
PALETTE = (
    (34, 40, 64),
    (226, 74, 51),
    (60, 180, 75),
    (240, 98, 200),
    (52, 152, 219),
    (250, 250, 250),
    (255, 200, 40),
    (160, 130, 250),
)
THINGS = (1, 2, 3, 4, 6, 7)
"""Labels of countable objects; background and wire are stuff."""
SQUARE, TRIANGLE, STAR, RING, WIRE, SUN, MOON = range(1, 8)
_COLOUR_OF = {**dict(enumerate(PALETTE)), WIRE: (20, 20, 20), MOON: PALETTE[SUN]}
"""Of simple scenes."""
VOID = 255

FIRST_INDEX = {"train": 0, "val": 1 << 24, "test": 2 << 24}
"""Index of the first scene of each split: far apart, so that no scene is in two, and fixed, so that a larger training
set changes no other split."""

MIN_SIZE = 48
_KEPT = 0.4  # share of an object that later objects must leave visible
_SKY, _GROUND = 0, 1  # owners of background pixels; objects and wires are numbered from 2

# Sixteenths of a unit vector in eight directions: integers, so that stripes are the same everywhere.


@dataclass(frozen=True)
class Instance:
    """One countable object, or one crowd of them, as far as it can be seen."""

    label: int
    """Index in `CLASSES`, one of `THINGS`."""
    box: tuple[int, int, int, int]
    """x1, y1, x2, y2 of the visible pixels; x2 and y2 are exclusive."""
    area: int
    """Visible pixels."""
    visible: float
    """Visible share of the pixels inside the image, 0..1; 1 when nothing is in front."""
    crowd: bool
    """Several objects annotated as one."""


@dataclass(frozen=True)
class Scene:
    """A picture and all that is known about it."""

    image: np.ndarray
    """uint8 (H, W, 3), RGB."""
    mask: np.ndarray
    """uint8 (H, W): index in `CLASSES`, or 255 on the border around things and wires."""
    instances: np.ndarray
    """int32 (H, W): 1 + index in `objects`, 0 where no object is. Exact visible extent: it has no void border."""
    objects: tuple[Instance, ...]
    """May be empty."""
    night: bool
    """Whether discs are moons."""

    def object_masks(self) -> np.ndarray:
        """Visible pixels of each object, bool (N, H, W)."""
        return self.instances[None] == np.arange(1, len(self.objects) + 1, dtype=np.int32)[:, None, None]


def scene(
    seed: int, index: int, size: tuple[int, int] = (160, 192), *, night: bool | None = None, simple: bool = False
) -> Scene:
    """Draw one scene.

    Args:
        seed: of the world, 0 or more.
        index: of the scene in it, 0 or more.
        size: height and width in pixels, each at least 48.
        night: draw it by day or by night whatever the seed says. Everything but the skyline stays as it is.
        simple: a grey sky, and a colour for each class (one for sun and moon together), so that a network learns most
            of it in minutes. Shapes and labels stay as they are.

    Raises:
        ValueError: on a negative seed or index, or a size below 48.
    """
    height, width = size
    if seed < 0 or index < 0:
        raise ValueError(f"Scene seed {seed}, index {index}: both must be 0 or more.")
    if min(height, width) < MIN_SIZE:
        raise ValueError(
            f"A scene of {height}x{width} pixels is too small to draw in; use at least {MIN_SIZE} each way."
        )
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index))))
    skyline_rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index, 1))))
    by_night = skyline_rng.random() < 0.5  # drawn in any case, so that forcing it changes nothing else
    night = bool(by_night if night is None else night)

    canvas = _Canvas(height, width, simple)
    _sky(canvas, rng)
    if simple:
        canvas.image[:] = canvas.image.mean(2, keepdims=True, dtype=np.float32).astype(np.uint8)
    roofs = _skyline(canvas, skyline_rng, night)
    if index % 16 != 11:
        for item in _plan(rng, height, width, roofs, night):
            _place(canvas, rng, item)
    _weather(canvas, rng)
    return canvas.finish(night)


def split_scenes(
    split: str, count: int, seed: int = 0, size: tuple[int, int] = (160, 192), simple: bool = False
) -> Iterator[Scene]:
    """The first `count` scenes of "train", "val" or "test"."""
    for index in range(count):
        yield scene(seed, FIRST_INDEX[split] + index, size, simple=simple)


# ---------------------------------------------------------------- the canvas


class _Canvas:
    """What has been painted so far. Later paint is in front."""

    def __init__(self, height: int, width: int, simple: bool = False):
        self.simple = simple
        self.image = np.zeros((height, width, 3), np.uint8)
        self.mask = np.zeros((height, width), np.uint8)
        self.owner = np.zeros((height, width), np.uint8)
        self.labels = [0, 0]
        self.colours = [(128, 128, 128), (128, 128, 128)]
        self.crowds = [False, False]
        self.painted = [height * width, 0]
        self.visible = [height * width, 0]
        self.kept = [0.25, 0.5]
        """Least share of each owner's pixels that stays visible. The skyline's half is what tells day from night."""

    def ground(self, inside: np.ndarray) -> None:
        """Hand pixels, bool (H, W), from the sky to the ground."""
        self.owner[inside] = _GROUND
        count = int(np.count_nonzero(inside))
        self.painted[:2] = self.visible[:2] = [self.painted[_SKY] - count, count]

    def paint(
        self, rng: np.random.Generator, shape: np.ndarray, label: int, border: int, contrast: int, crowd: bool = False
    ) -> bool:
        """Put a shape, uint8 (H, W) of 0 and 1, in front, unless that would hide too much of something else."""
        x, y, w, h = cv2.boundingRect(shape)
        if w == 0:
            return False
        top, left, bottom, right = max(y - border, 0), max(x - border, 0), y + h + border, x + w + border
        part = shape[top:bottom, left:right]
        inside = part.view(bool)
        owner = self.owner[top:bottom, left:right]
        covered = np.bincount(owner[inside], minlength=len(self.visible)).tolist()
        left_over = [v - c for v, c in zip(self.visible, covered, strict=True)]
        rules = zip(left_over, self.painted, self.kept, covered, strict=True)
        if any(c and v < p * k for v, p, k, c in rules):
            return False

        behind = self.colours[covered.index(max(covered))]
        colour = draw_colour(rng)
        while apart(colour, behind) < contrast:
            colour = draw_colour(rng)
        levels = draw_texture(rng, *part.shape) if label != WIRE else np.zeros(part.shape, np.uint8)
        low, high = colour, shifted(rng, colour, 60)
        if self.simple:
            low = _COLOUR_OF[label]
            high = tuple(value // 2 for value in low)
        colours = coloured(levels, low, high)
        number = len(self.labels)
        cv2.copyTo(colours, part, self.image[top:bottom, left:right])
        kernel = np.ones((2 * border + 1, 2 * border + 1), np.uint8)
        mask = self.mask[top:bottom, left:right]
        mask[cv2.dilate(part, kernel).view(bool)] = VOID
        mask[inside] = label
        owner[inside] = number

        count = sum(covered)
        self.visible = [*left_over, count]
        self.painted.append(count)
        self.labels.append(label)
        self.colours.append(colour)
        self.crowds.append(crowd)
        self.kept.append(_KEPT if label != WIRE else 0.25)
        return True

    def finish(self, night: bool) -> Scene:
        """Number the objects and measure what is visible of them."""
        numbers = np.zeros(len(self.labels), np.int32)
        objects: list[Instance] = []
        for owner, label in enumerate(self.labels):
            if label in THINGS:
                x, y, w, h = cv2.boundingRect((self.owner == owner).view(np.uint8))
                share = self.visible[owner] / self.painted[owner]
                box = (x, y, x + w, y + h)
                objects.append(Instance(label, box, self.visible[owner], share, self.crowds[owner]))
                numbers[owner] = len(objects)
        return Scene(self.image, self.mask, numbers[self.owner], tuple(objects), night)


# ---------------------------------------------------------------- background


def _sky(canvas: _Canvas, rng: np.random.Generator) -> None:
    """A ramp between two colours, a texture on it and sometimes clouds. Knows nothing of day and night."""
    height, width = canvas.mask.shape
    low = draw_colour(rng)
    high = shifted(rng, low, 70)
    texture = draw_texture(rng, height, width)
    ramp = waves(height, width, DIRECTIONS[whole(rng, 0, 7)], 300, whole(rng, 0, 255))
    clouds = noise(rng, height, width, whole(rng, 24, 48)) if rng.random() < 0.5 else texture
    levels = (texture * np.uint16(2) + ramp + clouds) >> 2
    canvas.image[:] = coloured(levels.astype(np.uint8), low, high)
    canvas.colours[_SKY] = tuple((a + b) // 2 for a, b in zip(low, high, strict=True))


def _skyline(canvas: _Canvas, rng: np.random.Generator, night: bool) -> int:
    """A row of houses along the lower edge; their windows tell the time of day. Returns the highest roof's y."""
    height, width = canvas.mask.shape
    tallest = int(height * between(rng, 0.22, 0.32))
    house = np.zeros(width, np.int32)  # of each column: number, first column, roof
    start, roof = np.zeros(width, np.int32), np.zeros(width, np.int32)
    x, number = -whole(rng, 0, 10), 0
    while x < width:
        end = x + whole(rng, 12, 30)
        columns = slice(max(x, 0), end)
        house[columns], start[columns] = number, x
        roof[columns] = whole(rng, tallest // 2, tallest)
        x, number = end, number + 1
    roof = height - roof
    first = int(roof.min())

    tone = [whole(rng, 0, 60) for _ in range(3 * number)]
    wall = np.array(tone, np.int32).reshape(number, 3) + (12 if night else 150)
    pane = np.full((number, 3), (235, 205, 110), np.int32) if night else wall - 85
    across, down = np.arange(width) - start, np.arange(first, height)[:, None] - roof
    window = (across % 6 >= 2) & (across % 6 <= 4) & (down % 7 >= 3) & (down % 7 <= 5)
    in_use = np.frombuffer(rng.bytes(64 * 64), np.uint8).reshape(64, 64) < 170
    window &= in_use[(house * 7 + across // 6) % 64, (down // 7) % 64]  # some are shut
    colours = np.concatenate([wall, pane]).astype(np.uint8).take(house + number * window, axis=0)
    ground = np.zeros((height, width), np.uint8)
    ground[first:] = down >= 0
    cv2.copyTo(colours, ground[first:], canvas.image[first:])
    canvas.ground(ground.view(bool))
    return first


# ---------------------------------------------------------------- objects


@dataclass(frozen=True)
class _Item:
    """Something to draw: its label, how large, where it may go, and how many at once."""

    label: int
    radius: float
    bottom: float
    """Lowest y of the centre."""
    count: int = 1


def _plan(rng: np.random.Generator, height: int, width: int, roofs: int, night: bool) -> list[_Item]:
    """What the scene shall hold, back to front: large things tend to be further back."""
    short = min(height, width)
    items: list[tuple[float, _Item]] = []

    def add(label: int, radius: float, bottom: float, depth: float, count: int = 1) -> None:
        items.append((depth, _Item(label, radius, bottom, count)))

    for _ in range(whole(rng, 2, 8)):
        label = whole(rng, SQUARE, RING)
        smallest = {SQUARE: 3.0, TRIANGLE: 4.0, STAR: 5.0, RING: 6.0}[label]
        # Close to log-uniform, so that small objects are as frequent as large ones.
        radius = smallest * (0.32 * short / smallest) ** (rng.random() ** 0.8)
        add(label, radius, height - 0.4 * radius, radius * between(rng, 0.5, 1.5))
    if rng.random() < 0.75:
        clear = roofs - short / 8  # a disc's lowest point; well away from the roofs
        for _ in range(whole(rng, 1, 2)):
            radius = 3 * (0.16 * short / 3) ** rng.random()
            add(MOON if night else SUN, radius, clear - radius, radius * between(rng, 0.3, 1.2))
    if rng.random() < 0.15:
        radius = between(rng, 4.5, 7)
        add(whole(rng, SQUARE, RING), radius, height - radius, radius, count=whole(rng, 5, 9))
    for _ in range(whole(rng, 0, 3)):
        add(WIRE, 0, height, between(rng, 3, 0.3 * short))
    return [item for _, item in sorted(items, key=lambda pair: -pair[0])]


def _place(canvas: _Canvas, rng: np.random.Generator, item: _Item) -> None:
    """Try a few places; give up when every one would hide too much."""
    height, width = canvas.mask.shape
    for _ in range(4):
        shape = np.zeros((height, width), np.uint8)
        if item.label == WIRE:
            _draw_wire(rng, shape)
            if canvas.paint(rng, shape, WIRE, border=1, contrast=80):
                return
            continue
        inset = 0.4 * item.radius
        x = between(rng, inset, width - inset)
        y = between(rng, min(inset, item.bottom), item.bottom)
        for _ in range(item.count):
            spread = 3.2 * item.radius if item.count > 1 else 0.0
            at = x + spread * (2 * rng.random() - 1), y + spread * (2 * rng.random() - 1)
            _draw_shape(rng, shape, item.label, at, item.radius)
        border = 1 if item.radius < 8 else whole(rng, 1, 2)
        if canvas.paint(rng, shape, item.label, border, contrast=60, crowd=item.count > 1):
            return


def _draw_shape(
    rng: np.random.Generator, shape: np.ndarray, label: int, at: tuple[float, float], radius: float
) -> None:
    """Add one object to a shape map. The radius is that of its circumscribed circle."""
    turn, stretch = 2 * np.pi * rng.random(), between(rng, 0.8, 1.0)
    if label in (SUN, MOON):
        strokes.ellipse(shape, at, (radius, radius), 0.0)
        return
    if label == RING:
        strokes.ellipse(shape, at, (radius, stretch * radius), turn, hole=between(rng, 0.45, 0.65))
        return
    count = {SQUARE: 4, TRIANGLE: 3, STAR: 10}[label]
    angles, reach = np.arange(count) * (2 * np.pi / count), np.full(count, radius)
    if label == SQUARE:
        angles += np.pi / 4  # so that stretching makes a rectangle, not a rhombus
    elif label == TRIANGLE:
        angles += [between(rng, -0.3, 0.3) for _ in range(3)]
    else:
        reach[1::2] *= between(rng, 0.36, 0.46)
    across, down = np.cos(angles) * reach, np.sin(angles) * reach * stretch
    cos, sin = np.cos(turn), np.sin(turn)
    strokes.polygon(shape, at[0] + cos * across - sin * down, at[1] + sin * across + cos * down)


def _draw_wire(rng: np.random.Generator, shape: np.ndarray) -> None:
    """One to three sagging cables side by side, a pole from the ground up, or a stray straight line."""
    height, width = shape.shape
    kind = rng.random()
    if kind < 0.5:
        start, end = between(rng, 0.05, 0.65) * height, between(rng, 0.05, 0.65) * height
        first, last = between(rng, -0.1, 0.3) * width, between(rng, 0.7, 1.1) * width
        sag, apart = between(rng, 0.0, 0.25) * height, between(rng, 6, 12)
        thickness = 1 if rng.random() < 0.5 else 2
        t = np.linspace(0, 1, 17)
        x, y = first + (last - first) * t, start + (end - start) * t + 4 * sag * t * (1 - t)
        for cable in range(whole(rng, 1, 3)):
            strokes.stroke(shape, x, y + cable * apart, thickness)
    elif kind < 0.8:
        x, lean = between(rng, 0.05, 0.95) * width, between(rng, -0.04, 0.04) * width
        top = between(rng, 0.1, 0.6) * height
        strokes.stroke(shape, np.array([x, x + lean]), np.array([height + 2.0, top]), whole(rng, 2, 3))
    else:
        x = np.array([rng.random() * width, rng.random() * width])
        y = np.array([rng.random() * 0.9 * height, rng.random() * 0.9 * height])
        strokes.stroke(shape, x, y, whole(rng, 1, 3))


# ---------------------------------------------------------------- weather


def _weather(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Light falling off to one side, blur and noise, each sometimes."""
    height, width = canvas.mask.shape
    image = canvas.image.astype(np.uint16)
    if rng.random() < 0.5:  # (1 2 1) both ways
        image[:, 1:-1] = (image[:, :-2] + 2 * image[:, 1:-1] + image[:, 2:] + 2) >> 2
        image[1:-1] = (image[:-2] + 2 * image[1:-1] + image[2:] + 2) >> 2
    if rng.random() < 0.5:
        ends = whole(rng, 150, 256), whole(rng, 150, 256)
        across = rng.random() < 0.5
        length = width if across else height
        light = ends[0] + (ends[1] - ends[0]) * np.arange(length, dtype=np.int32) // length
        light = light.astype(np.uint16)
        image = (image * (light[None, :, None] if across else light[:, None, None])) >> 8
    strength = whole(rng, 0, 24) if rng.random() < 0.6 else 0
    if strength:  # the sum of two uniform draws, which is roughly bell-shaped
        draws = np.frombuffer(rng.bytes(2 * image.size), np.uint8).reshape(2, *image.shape)
        noise = ((draws[0].astype(np.int16) + draws[1] - 255) * strength) >> 7
        image = np.clip(image.view(np.int16) + noise, 0, 255)
    canvas.image = image.astype(np.uint8)
