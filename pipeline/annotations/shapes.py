"""What an annotation file says of a photo, before it is drawn: outlines with a class, and where they come from."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import DataError
from pipeline.annotations.item import Mask
from pipeline.datasets.images import Size
from pipeline.datasets.instances import draw_polygons

log = logging.getLogger(__name__)

MOST_SHAPES = 20_000
"""Of one photo."""
_FAR = 10
"""Points may lie so many photo sides outside: further ones are no slip of a hand."""
_LONGEST = 5_000_000
"""Pixels along one outline. The drawing code holds five points for each."""
_NEARLY = 1e-3
"""Pixels."""

Patch = tuple[int, int, Mask]
"""top, left, and a mask (h, w) that lies there in the photo."""


@dataclass(frozen=True)
class Shape:
    """One object as the file gives it.

    `draw(height, width)` gives its pixels in a photo of that size; raises DataError, which names photo and place.
    """

    label: str
    """Class, by its name in the file."""
    where: str
    """For messages: "annotation 7"."""
    draw: Callable[[int, int], Patch]
    sure: bool = True
    """False for what says only that the class is about there (crowds, boxes): its pixels are ignored, and the class is
    neither marked nor absent on account of it."""


@dataclass(frozen=True)
class Entry:
    """One photo of an annotation file."""

    photo: Path
    size: Size | Path | None
    """(height, width) that shapes are drawn for, the mask file that has it, or None: the photo's as viewers show it."""
    shapes: Callable[[], Sequence[Shape]]
    """May read a file: raises DataError."""
    exhaustive: bool = True
    """Whether a class of the file without a shape is absent; otherwise it is unknown."""
    absent: frozenset[str] = frozenset()
    """Further classes known to be absent, by their names in the file."""


@dataclass(frozen=True)
class Source:
    """An annotation file or folder, opened."""

    path: Path
    kind: str
    classes: tuple[str, ...]
    """All names of the file, in its order."""
    entries: Sequence[Entry]
    notes: tuple[str, ...] = field(default=())


def polygon(label: str, place: str, where: str, points: Sequence[Sequence[float]] | NDArray[np.float64]) -> Shape:
    """An outline in pixels, (N, 2) of x, y; (0, 0) is the upper left corner of the photo. Closed by itself.

    Args:
        place: file and photo, for messages.
        where: which of its shapes.
    """
    return Shape(
        label, where, lambda height, width: draw_outlines([_points(points, place, where)], place, where, height, width)
    )


def scaled_polygon(
    label: str, place: str, where: str, points: Sequence[Sequence[float]] | NDArray[np.float64], full: float
) -> Shape:
    """The same in shares of the photo's width and height: `full` is all of it (1, or 100 for percent)."""

    def draw(height: int, width: int) -> Patch:
        pixels = _points(points, place, where) * (width / full, height / full)
        return draw_outlines([pixels], place, where, height, width)

    return Shape(label, where, draw)


def box(label: str, where: str, corners: Callable[[int, int], Sequence[float]]) -> Shape:
    """A rectangle left, top, right, bottom in pixels of a photo (height, width): ignored, not marked."""

    def draw(height: int, width: int) -> Patch:
        left, top, right, bottom = corners(height, width)
        if not all(map(math.isfinite, (left, top, right, bottom))):
            return nothing(height, width)
        # Every pixel that it touches; percents meet the sides of pixels only nearly.
        rows = slice(max(0, math.floor(top + _NEARLY)), max(0, min(height, math.ceil(bottom - _NEARLY))))
        columns = slice(max(0, math.floor(left + _NEARLY)), max(0, min(width, math.ceil(right - _NEARLY))))
        shape = (max(0, rows.stop - rows.start), max(0, columns.stop - columns.start))
        return rows.start, columns.start, np.ones(shape, bool)

    return Shape(label, where, draw, sure=False)


def mention(label: str, where: str) -> Shape:
    """A class that is there, nobody can say where (a point, a line)."""
    return Shape(label, where, nothing, sure=False)


def nothing(height: int, width: int) -> Patch:
    return 0, 0, np.zeros((0, 0), bool)


def draw_outlines(outlines: Sequence[NDArray[np.float64]], place: str, where: str, height: int, width: int) -> Patch:
    """The union of outlines (N, 2) in pixels, each filled by even-odd, cut to the part of the photo that they touch.

    Raises:
        DataError: they lie wholly outside the photo, or are longer than any outline in such a photo.
    """
    outlines = [points for points in outlines if len(points) >= 3]
    if not outlines:
        return nothing(height, width)
    everything = np.concatenate(outlines)
    (left, top), (right, bottom) = everything.min(axis=0), everything.max(axis=0)
    said = f"reaches from ({left:g}, {top:g}) to ({right:g}, {bottom:g}), the photo has {width} x {height} pixels"
    if (
        right <= 0
        or bottom <= 0
        or left >= width
        or top >= height
        or np.abs(everything).max() > _FAR * max(height, width)
    ):
        raise DataError(f"{place}: {where} lies outside its photo: it {said}. Are these the annotations of this photo?")
    length = sum(float(np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1).sum()) for points in outlines)
    if length > _LONGEST:
        raise DataError(
            f"{place}: {where} has an outline of {length:,.0f} pixels; {_LONGEST:,} is the most that is drawn."
        )
    if left < -1 or top < -1 or right > width + 1 or bottom > height + 1:
        log.warning("%s: %s %s: clipped to it", place, where, said)
    first, start = max(0, math.floor(top) - 1), max(0, math.floor(left) - 1)
    h, w = min(height, math.ceil(bottom) + 1) - first, min(width, math.ceil(right) + 1) - start
    # Moved by whole pixels, so that the mask is that of the whole photo.
    return first, start, draw_polygons([(points - (start, first)).ravel() for points in outlines], h, w)


def _points(points: Sequence[Sequence[float]] | NDArray[np.float64], place: str, where: str) -> NDArray[np.float64]:
    try:
        array = np.asarray(points, np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{place}: the points of {where} are no list of x, y: {str(error)[:80]}.") from error
    if array.size == 0:
        return np.zeros((0, 2))
    if array.ndim != 2 or array.shape[1] != 2 or not np.isfinite(array).all():
        raise DataError(f"{place}: the points of {where} are no list of pairs x, y of finite numbers.")
    return array
