"""Overlapping tiles of a photo at full resolution, so that small objects keep pixels, and their answers as one map.

A network sees a photo squashed to a square of S by S pixels; an object of 20 by 20 pixels in a photo of 4,000 by 3,000
is then 1 by 1 at S = 224. Seen tile by tile it keeps its pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from hsnet.errors import ConfigError, ShapeError
from pipeline.datasets.images import resize_label

FEW_PIXELS = 50
"""Network pixels of an object below which what a network says of it is little more than chance."""

ENOUGH_PIXELS = 400
"""Network pixels that a suggested tile gives the smaller objects: two cells of a grid at a 14th of the network."""

ROOM = 2.0
"""How many times the longer side of its objects a suggested tile has: a network needs what is around them."""


@dataclass(frozen=True)
class Tile:
    """A part of a photo, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom), as Pillow takes it."""
        return self.left, self.top, self.left + self.width, self.top + self.height


def plan_tiles(height: int, width: int, tile: int, overlap: float = 0.25) -> tuple[Tile, ...]:
    """Square tiles that cover a photo, row by row.

    All lie inside the photo and have one size: `tile` by `tile` pixels, or the photo's own side where that is shorter.
    They are spread evenly, as few as overlap each other by at least that share of their side.

    Args:
        height, width: of the photo, pixels, at least 1.
        tile: side of a tile, pixels, at least 1.
        overlap: share of a tile's side that its neighbour covers, too, 0 to 0.9.

    Raises:
        ConfigError: one of them is out of its range.
    """
    if min(height, width) < 1 or tile < 1:
        raise ConfigError(
            f"A photo and a tile have at least 1 pixel a side, got {height} x {width} and tiles of {tile}."
        )
    if not 0 <= overlap <= 0.9:
        raise ConfigError(f"Tiles overlap by 0 to 0.9 of their side, got {overlap}.")
    rows, columns = _starts(height, tile, overlap), _starts(width, tile, overlap)
    size = min(tile, height), min(tile, width)
    return tuple(Tile(top, left, *size) for top in rows for left in columns)


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    if length <= tile:
        return [0]
    step = max(1.0, tile * (1 - overlap))
    gaps = int(np.ceil((length - tile) / step))
    return [round(number * (length - tile) / gaps) for number in range(gaps + 1)]


def crops(photo: Image.Image, tiles: Iterable[Tile]) -> Iterator[Image.Image]:
    """The tiles' pixels, each cut out when it is asked for: no more than one is held here."""
    for tile in tiles:
        yield photo.crop(tile.box)


def merge_tiles(
    height: int, width: int, answers: Iterable[tuple[Tile, NDArray[np.float32]]], size: tuple[int, int] | None = None
) -> NDArray[np.float32]:
    """The tiles' maps as one of the whole photo, without seams; taken one by one and not kept.

    Where tiles overlap, each counts the more the farther the place is from the tile's inner edges: a network knows
    least at the edge of what it sees. Weights are smooth and positive inside the tile; edges of the photo are none.

    Args:
        height, width: of the photo, pixels.
        answers: tiles of `plan_tiles` with their maps, (h, w) each, all of one size; margins, or anything that may be
            averaged. A map's positions are the cells of an even grid on its tile.
        size: (h', w') of the result; by default as fine as the tiles' own maps, and the map itself for one tile.

    Returns:
        (h', w') float32, cells of an even grid on the photo.

    Raises:
        ShapeError: no tile, maps of several sizes, or tiles that leave a part of the photo out.
    """
    total: NDArray[np.float64] | None = None
    weights = np.zeros(())
    first: tuple[int, ...] = ()
    for tile, answer in answers:
        if total is None:
            first = answer.shape
            size = size or _fineness(height, width, tile, first)
            total, weights = np.zeros(size), np.zeros(size)
        if answer.shape != first:
            raise ShapeError(f"All tiles must have maps of one size, got {first} and {answer.shape}.")
        rows = _Span.of(total.shape[0], height, tile.top, tile.height, answer.shape[0])
        columns = _Span.of(total.shape[1], width, tile.left, tile.width, answer.shape[1])
        weight = rows.weight[:, None] * columns.weight
        place = (rows.cells, columns.cells)
        total[place] += weight * columns.sampled(rows.sampled(answer.astype(np.float64)).T).T
        weights[place] += weight
    if total is None or not (weights > 0).all():
        raise ShapeError(f"The tiles leave a part of the photo ({height} x {width}) out: give all of `plan_tiles`.")
    return (total / weights).astype(np.float32)


def _fineness(height: int, width: int, tile: Tile, shape: tuple[int, ...]) -> tuple[int, int]:
    """Cells of the whole photo that are as large as those of a tile."""
    return max(1, round(height * shape[0] / tile.height)), max(1, round(width * shape[1] / tile.width))


@dataclass(frozen=True)
class _Span:
    """One axis: which cells of the whole a tile reaches, what it counts there, and where to read its map."""

    cells: slice
    weight: NDArray[np.float64]
    below: NDArray[np.intp]
    share: NDArray[np.float64]
    """Each cell is (1 - share) of the map's position `below` and share of the next one."""

    @classmethod
    def of(cls, cells: int, length: int, start: int, tile: int, positions: int) -> _Span:
        middles = (np.arange(cells) + 0.5) * length / cells
        # A cell belongs to every tile that its middle lies in; the photo's ends belong to the tiles there.
        (inside,) = np.nonzero((middles >= start) & (middles <= start + tile))
        at = middles[inside] - start
        before = np.inf if start == 0 else 0.0
        after = np.inf if start + tile == length else 0.0
        nearest = np.minimum(at + before, tile - at + after)
        weight = np.minimum(1.0, np.maximum(nearest, 1e-3) / (tile / 2))
        place = at * positions / tile - 0.5
        # In the outer half of the outermost positions, the line through the last two goes on: a ramp stays one.
        below = np.clip(np.floor(place), 0, max(0, positions - 2)).astype(np.intp)
        share = place - below if positions > 1 else np.zeros(len(place))
        found = slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)
        return cls(found, weight * weight * (3 - 2 * weight), below, share)

    def sampled(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of the map along its first axis, at the cells."""
        share = self.share[:, None]
        above = np.minimum(self.below + 1, len(values) - 1)
        return (1 - share) * values[self.below] + share * values[above]


def object_pixels(mask: NDArray[np.bool_], size: int) -> int:
    """How many pixels of an object (H, W) a network sees that photos are squashed to, (size, size); 0 if none is left.

    Counted as the heads see a support's mask: nearest, not by area.
    """
    return int(np.count_nonzero(resize_label(mask, (size, size))))


def suggest_tile(masks: Sequence[NDArray[np.bool_]], size: int) -> int | None:
    """Side of tiles, in pixels of the photos, that would let a network see small objects; None if it sees them now.

    Tiles are suggested if half of the photos' objects have fewer than `ENOUGH_PIXELS` network pixels in the photo, at a
    side where three quarters of them have so many. They are not smaller than `ROOM` times what the objects measure
    in half of the photos (with several objects in a photo, the largest of them), not smaller than half the network's
    own size, where there are no more pixels to see, and smaller than the photos.

    Args:
        masks: (H, W) of annotated photos, at the photos' own size; those without an object are left out.
        size: side of the network's square, pixels.
    """
    seen = [mask for mask in masks if mask.any()]
    if not seen:
        return None
    areas = np.array([np.count_nonzero(mask) for mask in seen], np.float64)
    photos = np.array([mask.shape for mask in seen], np.float64)
    if float(np.median(areas * size**2 / photos.prod(1))) >= ENOUGH_PIXELS:
        return None
    wide = float(np.median([_longest(mask) for mask in seen]))
    enough = size * float(np.sqrt(np.quantile(areas, 0.25) / ENOUGH_PIXELS))
    side = round(max(enough, ROOM * wide, size / 2))
    return side if side < float(np.median(photos.max(1))) else None


def _longest(mask: NDArray[np.bool_]) -> int:
    """Longer side, in pixels, of the largest connected part."""
    parts = ndimage.find_objects(ndimage.label(mask, np.ones((3, 3), np.int8))[0])
    return max(max(side.stop - side.start for side in part) for part in parts)
