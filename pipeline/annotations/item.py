"""A photo with what is known of it, as read from any annotation format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import DataError

Mask = NDArray[np.bool_]
"""(H, W) bool, True on the object."""

IGNORE = "(ignore)"
"""As the name of a class, on reading: its pixels are not known."""


@dataclass(frozen=True, eq=False)
class Annotation:
    """What somebody said of one photo.

    A class neither in `masks` nor in `absent` is unknown: it may be in the photo, unmarked. With both empty, nothing is
    known of the photo.

    Raises:
        DataError: masks of several sizes or types, a mask that marks nothing, or a class both marked and absent.
            Names the photo.
    """

    photo: Path
    """An image file that exists."""
    masks: Mapping[str, Mask] = field(default_factory=dict)
    """Class name -> (H, W) bool, the union of its instances, of the photo's size as viewers show it (turned by its EXIF
    tag), as `pipeline.datasets.images.read_photo(photo)` gives it. At least one pixel of each is True."""
    absent: frozenset[str] = frozenset()
    """Classes known not to be in the photo."""
    ignore: Mask | None = None
    """(H, W) bool, True where nothing is known (boundaries, crowds); None if something is known everywhere. No marked
    pixel is in it when it comes from `read_annotations`."""

    def __post_init__(self) -> None:
        layers = {**self.masks} if self.ignore is None else {**self.masks, "(ignored)": self.ignore}
        for name, layer in layers.items():
            if layer.dtype != np.bool_ or layer.ndim != 2:
                raise DataError(
                    f"{self.photo}: the mask of '{name}' is {layer.dtype} of {layer.ndim} dimensions, "
                    f"must be (H, W) bool."
                )
        sizes = {name: layer.shape for name, layer in layers.items()}
        if len(set(sizes.values())) > 1:
            said = ", ".join(f"'{name}' {shape[1]} x {shape[0]}" for name, shape in sizes.items())
            raise DataError(f"{self.photo}: masks of different sizes (width x height): {said}.")
        for name, mask in self.masks.items():
            if not mask.any():
                raise DataError(
                    f"{self.photo}: the mask of '{name}' marks no pixel. Mark it, or say the class is absent."
                )
        both = sorted(set(self.masks) & self.absent)
        if both:
            raise DataError(f"{self.photo}: '{both[0]}' is marked and said to be absent. Keep one of the two.")

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the masks; None if there is none."""
        layers = [*self.masks.values(), *([] if self.ignore is None else [self.ignore])]
        return (layers[0].shape[0], layers[0].shape[1]) if layers else None
