"""From masks to polygons that give the same mask again.

contourpy traces the line at value one half between pixel centres, so that it crosses the middle of every pixel side
between object and background and cuts the corners: every centre is at least a third of a pixel from it. Filled by
the rule "a pixel is inside if its centre is", such a polygon is the mask again, exactly. Pixels that only touch at a
corner are parts of their own.

Points are in pixels, x to the right and y down, (0, 0) the upper left corner of the first pixel.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from contourpy import FillType, contour_generator
from numpy.typing import NDArray

from pipeline.annotations.item import Mask

Ring = NDArray[np.float64]
"""(N, 2) x, y; closed by itself: the first point is not repeated. Multiples of a half."""


def polygons(mask: Mask, left: int = 0, top: int = 0) -> list[list[Ring]]:
    """Connected parts (by sides) of a mask (h, w) that lies at (left, top): the outer ring, then its holes.

    Outer rings and holes turn in opposite ways. A part inside a hole is one of its own. An empty mask has no part.
    """
    if not mask.any():
        return []
    values = np.pad(mask.astype(np.float64), 1)
    lines = contour_generator(z=values, name="serial", fill_type=FillType.OuterOffset)
    # Declared as the union of what all fill types give.
    outer_offset: tuple[Any, ...] = lines.filled(0.5, np.inf)
    points, offsets = outer_offset
    moved = (left - 0.5, top - 0.5)
    return [
        [_corners(part[first : last - 1]) + moved for first, last in pairwise(ends.tolist())]
        for part, ends in zip(points, offsets, strict=True)
    ]


def joined(rings: list[Ring]) -> Ring:
    """An outer ring and its holes as one ring, for formats without holes.

    Each hole hangs on a line to the nearest point of the ring, walked there and back, so that it encloses nothing:
    filled by even-odd or by winding number, the hole stays empty.
    """
    ring = rings[0]
    for hole in sorted(rings[1:], key=lambda points: float(points[:, 0].min())):
        first = int(hole[:, 0].argmin())
        near = int(((ring - hole[first]) ** 2).sum(axis=1).argmin())
        way = np.concatenate([np.roll(hole, -first, axis=0), hole[first : first + 1], ring[near : near + 1]])
        ring = np.concatenate([ring[: near + 1], way, ring[near + 1 :]])
    return ring


def _corners(ring: NDArray[np.float64]) -> Ring:
    """Without the points in the middle of a straight line."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return ring[turns]
