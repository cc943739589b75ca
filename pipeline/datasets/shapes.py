"""A generated data set: textured objects of 32 classes on cluttered scenes, drawn on demand from a seed.

Nothing is read from or written to disk: image `i` is a pure function of (seed, size, i), so any worker can draw
any image. It serves the demo, the tests, and a machine without data sets. Scores on it say whether the pipeline
works, not how good a model is.

A class is a silhouette with a texture and a pair of colours ("checked star"). Class `c` has silhouette `c % 16`
and texture `(c // 4) % 8`, and is novel in fold `c % 4`. So each fold holds out 8 classes, one for each texture,
whose 4 silhouettes no training class has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageDraw

from hsnet.errors import ConfigError, DataError
from pipeline.common.philox import Draws
from pipeline.datasets.index import DatasetIndex, Split

Polygon = list[tuple[float, float]]

TEXTURES = ("plain", "striped", "checked", "dotted", "ringed", "speckled", "wavy", "gridded")
FOLDS = 4
SUPERSAMPLING = 2
"""Scenes are drawn this much larger and averaged down, for smooth edges."""


@dataclass(frozen=True)
class Shapes:
    """The generated data set.

    Args:
        seed: another seed gives other scenes of the same classes.
        size: side of the square images, pixels; at least 32.
        trn_per_class, val_per_class: images per class on the training and on the validation side, at least 2. An
            image is listed for one class, its main one; other objects in it are labelled but not listed.
    """

    seed: int = 0
    size: int = 160
    trn_per_class: int = 20
    val_per_class: int = 12

    def __post_init__(self) -> None:
        if self.size < 32 or min(self.trn_per_class, self.val_per_class) < 2:
            raise ConfigError(
                f"shapes: size {self.size} must be at least 32 pixels, and {self.trn_per_class} training and "
                f"{self.val_per_class} validation images per class at least 2 each."
            )

    @cached_property
    def index(self) -> DatasetIndex:
        """Splits as in PASCAL-5i: trn and val hold the base classes, test the fold's novel ones."""
        sides = {"trn": self.trn_per_class, "val": self.val_per_class}
        listed = {
            side: [(f"{side}/{c:02d}_{n:03d}", c) for n in range(count) for c in range(len(CLASSES))]
            for side, count in sides.items()
        }
        images = tuple(image for entries in listed.values() for image, _ in entries)
        number = {image: i for i, image in enumerate(images)}

        def split(side: str, fold: int, novel: bool) -> Split:
            return Split(tuple((number[image], c) for image, c in listed[side] if (c % FOLDS == fold) == novel))

        return DatasetIndex(
            # The name is part of the digest: other pictures must not pass for the same data set.
            name="shapes" if (self.seed, self.size) == (0, 160) else f"shapes seed {self.seed}, {self.size} px",
            classes={c: kind.name for c, kind in enumerate(CLASSES)},
            images=images,
            splits={
                fold: {
                    "trn": split("trn", fold, novel=False),
                    "val": split("val", fold, novel=False),
                    "test": split("val", fold, novel=True),
                }
                for fold in range(FOLDS)
            },
            query_order="list",
            has_ignore=False,
        )

    def image(self, number: int) -> Image.Image:
        """Image `number` as RGB, size x size."""
        return Image.fromarray(self._scene(number)[0])

    def label(self, number: int) -> np.ndarray:
        """Label map of image `number`: (size, size) uint8, class id + 1 on an object, 0 elsewhere."""
        return self._scene(number)[1].copy()

    def _scene(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= number < len(self.index.images):
            raise DataError(f"shapes has images 0 to {len(self.index.images) - 1}, not {number}.")
        return _draw_scene(self.seed, self.size, self.index.images[number])


# --- scenes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Object:
    class_id: int
    x: float
    y: float
    radius: float


@lru_cache(maxsize=8)  # image and label of one number are asked for one after the other
def _draw_scene(seed: int, size: int, image_id: str) -> tuple[np.ndarray, np.ndarray]:
    """(size, size, 3) uint8 image and (size, size) uint8 label map; coordinates are in units of the side."""
    draws = Draws("shapes", seed, image_id)
    main = int(image_id.split("/")[1].split("_")[0])
    side = size * SUPERSAMPLING
    canvas = _background(draws, side)
    label = np.zeros((size, size), np.uint8)
    for item in _arrange(draws, main):
        _paint(canvas, label, item, draws)
    canvas *= draws.between(0.75, 1.1)
    large = Image.fromarray((np.clip(canvas, 0, 1) * 255).astype(np.uint8))
    grain = np.rint((draws.array(size, size, 1) - 0.5) * 16).astype(np.int16)
    image = np.clip(np.asarray(large.reduce(SUPERSAMPLING)) + grain, 0, 255)
    return image.astype(np.uint8), label


def _arrange(draws: Draws, main: int) -> list[_Object]:
    """One or two objects of the main class, then one to three smaller ones of other classes, hardly touching."""
    objects: list[_Object] = []

    def place(class_id: int, low: float, high: float) -> None:
        for _ in range(30):
            radius = draws.between(low, high)
            item = _Object(class_id, draws.between(radius, 1 - radius), draws.between(radius, 1 - radius), radius)
            if all(math.hypot(item.x - o.x, item.y - o.y) > 0.95 * (item.radius + o.radius) for o in objects):
                objects.append(item)
                return

    twins = draws.chance(0.25)
    place(main, *((0.18, 0.24) if twins else (0.22, 0.34)))
    if twins:
        place(main, 0.16, 0.22)
    for _ in range(1 + draws.below(3)):
        other = (main + 1 + draws.below(len(CLASSES) - 1)) % len(CLASSES)
        place(other, 0.11, 0.2)
    return objects


def _background(draws: Draws, side: int) -> np.ndarray:
    """(side, side, 3) float32 in [0, 1]: colour noise of three scales under unlabelled patches and strokes."""
    canvas = np.zeros((side, side, 3), np.float32)
    for cells, weight in ((3, 0.5), (9, 0.3), (40, 0.2)):
        noise = Image.fromarray((draws.array(cells, cells, 3) * 255).astype(np.uint8))
        canvas += np.asarray(noise.resize((side, side), Image.Resampling.BILINEAR)) * np.float32(weight / 255)
    grey = canvas.mean(axis=2, keepdims=True)
    canvas = grey + np.float32(draws.between(0.2, 0.9)) * (canvas - grey)
    for _ in range(8 + draws.below(8)):
        _patch(canvas, draws)
    return canvas


def _patch(canvas: np.ndarray, draws: Draws) -> None:
    """A faint textured polygon, sometimes thin as a stroke, anywhere on the canvas."""
    thin, corners = draws.between(0.05, 1.0), 3 + draws.below(4)
    turns = sorted(draws.between(0, math.tau) for _ in range(corners))
    outline = [(math.cos(turn), thin * math.sin(turn)) for turn in turns]
    reach, turn = draws.between(0.03, 0.22), draws.between(0, math.tau)
    frame = _Frame(draws.between(0, 1), draws.between(0, 1), reach, turn, len(canvas))
    pattern = _texture(TEXTURES[draws.below(len(TEXTURES))], draws, frame.grid())
    first, second = draws.array(3), draws.array(3)
    colour = 0.2 + 0.6 * (first + pattern[:, :, None] * (second - first) * 0.6)
    alpha = np.asarray(frame.cover([(outline, True)]))[:, :, None] / 255 * draws.between(0.35, 0.9)
    canvas[frame.window] += (alpha * (colour - canvas[frame.window])).astype(np.float32)


def _paint(canvas: np.ndarray, label: np.ndarray, item: _Object, draws: Draws) -> None:
    kind = CLASSES[item.class_id]
    frame = _Frame(item.x, item.y, item.radius, draws.between(-0.7, 0.7), len(canvas))
    u, v = grid = frame.grid()
    pattern = _texture(kind.texture, draws, grid)
    hue = kind.hue + draws.between(-0.04, 0.04)
    first = _rgb(hue, draws.between(0.65, 0.95), draws.between(0.75, 0.95))
    second = _rgb(hue + kind.contrast, draws.between(0.5, 0.9), draws.between(0.3, 0.6))
    colour = first + pattern[:, :, None] * (second - first)
    light = 1 + draws.between(-0.25, 0.25) * u + draws.between(-0.25, 0.25) * v
    cover = frame.cover(SILHOUETTES[kind.silhouette]())
    alpha = np.asarray(cover)[:, :, None] / 255
    canvas[frame.window] += (alpha * (colour * light[:, :, None] - canvas[frame.window])).astype(np.float32)
    rows, columns = (slice(w.start // SUPERSAMPLING, w.stop // SUPERSAMPLING) for w in frame.window)
    label[rows, columns][np.asarray(cover.reduce(SUPERSAMPLING)) >= 128] = item.class_id + 1


class _Frame:
    """An object's own coordinates, where its radius is 1, over the window of the canvas that it can reach."""

    def __init__(self, x: float, y: float, radius: float, turn: float, side: int) -> None:
        self._x, self._y, self._side = x, y, side
        self._cos, self._sin, self._radius = math.cos(turn), math.sin(turn), radius

        def span(centre: float) -> slice:  # whole pixels of the final image, for the label map
            low, high = ((centre + sign * 1.2 * radius) * side / SUPERSAMPLING for sign in (-1, 1))
            return slice(*(min(max(round(end) * SUPERSAMPLING, 0), side) for end in (low, high)))

        self.window = span(y), span(x)
        """Rows and columns of the canvas."""

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """The object's coordinates at every pixel centre of the window."""
        rows, columns = (np.arange(w.start, w.stop) + 0.5 for w in self.window)
        dx = (columns[None, :] / self._side - self._x) / self._radius
        dy = (rows[:, None] / self._side - self._y) / self._radius
        return self._cos * dx + self._sin * dy, self._cos * dy - self._sin * dx

    def cover(self, parts: list[tuple[Polygon, bool]]) -> Image.Image:
        """The window as an "L" image: 255 where the polygons are; those marked False cut holes."""
        rows, columns = self.window
        cover = Image.new("L", (columns.stop - columns.start, rows.stop - rows.start))
        pen = ImageDraw.Draw(cover)
        for polygon, solid in parts:
            # Whole pixels: the outline must not hang on how a platform rounds inside the rasteriser.
            corners = [
                (
                    round((self._x + self._radius * (self._cos * u - self._sin * v)) * self._side) - columns.start,
                    round((self._y + self._radius * (self._sin * u + self._cos * v)) * self._side) - rows.start,
                )
                for u, v in polygon
            ]
            pen.polygon(corners, fill=255 if solid else 0)
        return cover


# --- classes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What a class looks like; hues are in turns of the colour circle."""

    silhouette: str
    texture: str
    hue: float
    contrast: float

    @property
    def name(self) -> str:
        return f"{self.texture} {self.silhouette}"


def _circle(radius: float = 1.0, x: float = 0.0, y: float = 0.0, corners: int = 48) -> Polygon:
    turns = [math.tau * i / corners for i in range(corners)]
    return [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in turns]


def _spikes(points: int, inner: float) -> Polygon:
    turns = [math.pi * i / points - math.pi / 2 for i in range(2 * points)]
    radii = [1.0 if i % 2 == 0 else inner for i in range(2 * points)]
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns, strict=True)]


def _gear() -> Polygon:
    turns = [math.tau * (i + 0.5) / 32 for i in range(32)]
    return [
        ((1.0 if i % 4 < 2 else 0.68) * math.cos(t), (1.0 if i % 4 < 2 else 0.68) * math.sin(t))
        for i, t in enumerate(turns)
    ]


def _heart() -> Polygon:
    turns = [math.tau * i / 60 for i in range(60)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
        )
        for t in turns
    ]


def _drop() -> Polygon:
    arc = [math.radians(-20 + 220 * i / 30) for i in range(31)]
    return [(0.62 * math.cos(t), 0.36 + 0.62 * math.sin(t)) for t in arc] + [(0.0, -1.0)]


def _boxes(*boxes: tuple[float, float, float, float]) -> list[tuple[Polygon, bool]]:
    return [([(l, t), (r, t), (r, b), (l, b)], True) for l, t, r, b in boxes]  # noqa: E741


SILHOUETTES: dict[str, Callable[[], list[tuple[Polygon, bool]]]] = {
    "disc": lambda: [(_circle(0.9), True)],
    "square": lambda: _boxes((-0.75, -0.75, 0.75, 0.75)),
    "triangle": lambda: [(_circle(1.0, corners=3), True)],
    "star": lambda: [(_spikes(5, 0.45), True)],
    "ring": lambda: [(_circle(1.0), True), (_circle(0.45), False)],
    "cross": lambda: _boxes((-0.95, -0.32, 0.95, 0.32), (-0.32, -0.95, 0.32, 0.95)),
    "crescent": lambda: [(_circle(1.0), True), (_circle(0.75, 0.5, -0.1), False)],
    "heart": lambda: [(_heart(), True)],
    "burst": lambda: [(_spikes(9, 0.62), True)],
    "drop": lambda: [(_drop(), True)],
    "gear": lambda: [(_gear(), True)],
    "bow tie": lambda: [([(-0.9, -0.65), (0, -0.15), (0.9, -0.65), (0.9, 0.65), (0, 0.15), (-0.9, 0.65)], True)],
    "arrow": lambda: [
        ([(0, -1), (0.8, -0.1), (0.35, -0.1), (0.35, 0.9), (-0.35, 0.9), (-0.35, -0.1), (-0.8, -0.1)], True)
    ],
    "letter T": lambda: _boxes((-0.75, -0.8, 0.75, -0.25), (-0.3, -0.8, 0.3, 0.9)),
    "letter U": lambda: _boxes((-0.75, -0.8, -0.2, 0.75), (0.2, -0.8, 0.75, 0.75), (-0.75, 0.25, 0.75, 0.75)),
    "letter L": lambda: _boxes((-0.65, -0.9, -0.05, 0.85), (-0.65, 0.25, 0.75, 0.85)),
}

CLASSES = tuple(
    # The golden ratio spreads the hues evenly however many classes there are.
    Kind(list(SILHOUETTES)[c % 16], TEXTURES[c // 4 % 8], c * 0.618034 % 1.0, (0.5, 0.33, 0.15, 0.7)[c // 8])
    for c in range(32)
)


def _texture(name: str, draws: Draws, grid: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Blend between an object's two colours at every pixel, in [0, 1]."""
    u, v = grid
    scale = draws.between(0.85, 1.2)
    shift = draws.between(0, 1)
    if name == "plain":
        return np.zeros_like(u + v)
    if name == "striped":
        return _wave(2.6 * scale * (u + 0.0 * v) + shift)
    if name == "checked":
        return (_wave(1.9 * scale * u + shift) + _wave(1.9 * scale * v + shift)) % 2
    if name == "dotted":
        cells = [(2.6 * scale * axis + shift) % 1 - 0.5 for axis in (u, v)]
        return (cells[0] ** 2 + cells[1] ** 2 < 0.1).astype(float)
    if name == "ringed":
        return _wave(2.4 * scale * np.sqrt(u**2 + v**2) + shift)
    if name == "speckled":
        cells = [np.floor(5.5 * scale * axis).astype(int) % 16 for axis in (u, v)]
        return (draws.array(16, 16)[cells[0], cells[1]] < 0.45).astype(float)
    if name == "wavy":
        return _wave(2.2 * scale * v + 0.35 * np.abs((1.6 * scale * u + shift) % 2 - 1))
    lines = [(2.2 * scale * axis + shift) % 1 < 0.28 for axis in (u, v)]
    return (lines[0] | lines[1]).astype(float)


def _wave(phase: np.ndarray) -> np.ndarray:
    return (phase % 1 < 0.5).astype(float)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    channels = np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1
    return value * (1 - saturation * (1 - np.clip(channels, 0, 1)))
