"""Separate objects in a mask: connected components with area, box and score."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hsnet.errors import ConfigError, ShapeError
from pipeline.annotations.found import Instance

_NEIGHBOURS = np.ones((3, 3), np.int8)


def find_instances(
    mask: NDArray[np.bool_], soft: NDArray[np.floating] | None = None, least_area: int = 1
) -> tuple[Instance, ...]:
    """The connected components of a mask, largest first; those of one area from top to bottom, left to right.

    Pixels that touch at a side or at a corner are one component. Holes stay holes, and an object in the hole of another
    is one of its own. The instances' masks together are the mask, less the components that are too small.

    Args:
        mask: (H, W), true inside the object.
        soft: (H, W) probabilities, 0 to 1, for the scores; without it there are none.
        least_area: components of fewer pixels are left out, at least 1.

    Returns:
        `Instance`s with the mask inside the box, the box (left, top, width, height) in pixels, the area in pixels, and
        as score the mean probability inside the mask.

    Raises:
        ConfigError: `least_area` below 1.
        ShapeError: the mask is no (H, W) of booleans, or `soft` has another size or leaves 0 to 1.

    Memory: beside mask and `soft`, four bytes per pixel of the photo.
    """
    if least_area < 1:
        raise ConfigError(f"The least area of an instance is at least 1 pixel, got {least_area}.")
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ShapeError(f"A mask is (H, W) of booleans, got {mask.shape} of {mask.dtype}.")
    if soft is not None and soft.shape != mask.shape:
        raise ShapeError(f"The soft map has the shape {soft.shape}, its mask {mask.shape}.")
    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, _NEIGHBOURS, labels)
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        if (rows.stop - rows.start) * (columns.stop - columns.start) < least_area:
            continue  # its box alone is too small: of many specks, most go here
        inside = labels[rows, columns] == number
        area = int(inside.sum())
        if area < least_area:
            continue
        score = None if soft is None else float(soft[rows, columns][inside].mean(dtype=np.float64))
        box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        found.append(Instance(mask=inside, box=box, area=area, score=score))
    return tuple(sorted(found, key=lambda one: (-one.area, one.box[1], one.box[0])))
