"""What was found in a photo: the form in which every output format takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hsnet.errors import ShapeError
from pipeline.annotations.item import Mask

Box = tuple[int, int, int, int]
"""left, top, width, height in whole pixels; the pixel (x, y) is in it if left <= x < left + width, and so for y."""


@dataclass(frozen=True, eq=False)
class Instance:
    """One object: a connected part of a class's mask, as a rule.

    Raises:
        ShapeError: the mask has another size than the box, or its count of pixels is not `area`.
    """

    mask: Mask
    """(h, w) bool, cut to the box."""
    box: Box
    """Where the mask lies in the photo; inside it."""
    area: int
    """Pixels that are True, at least 1."""
    score: float | None = None
    """How sure that this is an object of its class, 0 to 1; None if not known."""

    def __post_init__(self) -> None:
        left, top, width, height = self.box
        if self.mask.shape != (height, width) or min(left, top) < 0:
            raise ShapeError(f"an instance's mask {self.mask.shape} does not fit its box {self.box}")
        if int(self.mask.sum()) != self.area or self.area < 1:
            raise ShapeError(f"an instance has {int(self.mask.sum())} pixels, but its area is said to be {self.area}")
        _require_score(self.score)


@dataclass(frozen=True, eq=False)
class FoundClass:
    """One class in one photo. A mask without a True pixel says that the class was looked for and not found."""

    mask: Mask
    """(H, W) bool, of the photo's size as viewers show it."""
    score: float | None = None
    """How sure that the class is in the photo, 0 to 1; None if not known."""
    instances: tuple[Instance, ...] = ()
    """Its objects, in any order. Without one, a format that lists objects takes the whole mask as one."""

    def __post_init__(self) -> None:
        _require_score(self.score)


@dataclass(frozen=True, eq=False)
class Found:
    """What was found in one photo.

    Raises:
        ShapeError: a mask has another size than (height, width), or an instance leaves it.
    """

    photo: Path
    width: int
    """Pixels, as viewers show the photo."""
    height: int
    classes: Mapping[str, FoundClass] = field(default_factory=dict)
    """Class name -> what was found, for every class that was looked for, in the order in which they are numbered."""

    def __post_init__(self) -> None:
        for name, found in self.classes.items():
            if found.mask.shape != (self.height, self.width) or found.mask.dtype != bool:
                raise ShapeError(
                    f"{self.photo}: the mask of '{name}' is {found.mask.dtype} {found.mask.shape}, "
                    f"must be bool ({self.height}, {self.width})"
                )
            for instance in found.instances:
                left, top, width, height = instance.box
                if left + width > self.width or top + height > self.height:
                    raise ShapeError(
                        f"{self.photo}: an instance of '{name}' at {instance.box} leaves the photo of "
                        f"{self.width} x {self.height} pixels"
                    )


def whole_mask(mask: Mask, score: float | None = None) -> Instance | None:
    """All of a mask (H, W) as one instance, cut to its smallest box; None if it marks nothing."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    cut = mask[top:bottom, left:right].copy()
    return Instance(cut, (left, top, right - left, bottom - top), int(cut.sum()), score)


def placed(instance: Instance, found: Found) -> Mask:
    """The instance's mask in its photo, (H, W)."""
    left, top, width, height = instance.box
    full = np.zeros((found.height, found.width), bool)
    full[top : top + height, left : left + width] = instance.mask
    return full


def objects_of(found: FoundClass) -> tuple[Instance, ...]:
    """The instances of a class, or its whole mask as one with the class's score if it names none."""
    if found.instances:
        return found.instances
    everything = whole_mask(found.mask, found.score)
    return () if everything is None else (everything,)


def _require_score(score: float | None) -> None:
    if score is not None and not 0 <= score <= 1:  # also refuses NaN
        raise ShapeError(f"a score is {score}, must be from 0 to 1")
