"""What the pixels of a folder's masks mean: numbers or colours to class, background or nothing.

A mask is brought to one form, whatever dataset.yaml says of it: 0 background, class id + 1 the class, 255 and 65535
ignored. Class ids are mask value - 1 where 0 is the background, the mask value itself where it is not, and the order
of the list where classes are colours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import DataError
from pipeline.datasets.images import open_image, read_index_mask

IGNORED = 65535
_SHOWN = 6


@dataclass(frozen=True)
class MaskValues:
    """How to read the masks of a data set."""

    background: tuple[int, ...] = (0,)
    """Mask values, or colours as 0xRRGGBB, of the background; none: every pixel is of a class."""
    void: tuple[int, ...] = ()
    """Those that count for nothing, beside 255 and 65535."""
    colours: Mapping[str, int] | None = None
    """Class name -> its colour; None where masks hold numbers."""
    ignore: bool = True
    """Whether 255 (and 65535) in a mask of numbers means "ignored"."""

    @property
    def shift(self) -> int:
        """What is added to a mask value to give class id + 1: 1 where 0 is not the background."""
        return 0 if self.colours is not None or 0 in self.background else 1

    @property
    def has_ignore(self) -> bool:
        """Whether the read masks may hold ignored pixels."""
        return bool(self.void) or (self.ignore and self.colours is None)

    @property
    def classes(self) -> dict[int, str] | None:
        """Class id -> name, where colours say them."""
        return None if self.colours is None else dict(enumerate(self.colours))

    @property
    def plain(self) -> bool:
        """Whether masks are used as they are stored."""
        return self.colours is None and self.background == (0,) and not self.void

    def read(self, path: Path) -> NDArray[np.integer]:
        """The mask (H, W) uint8 or uint16 in the one form.

        Raises:
            DataError: unreadable, a colour image where numbers are wanted, or a colour that has no meaning.
        """
        if self.colours is not None:
            return self._of_colours(path)
        try:
            mask = read_index_mask(path)
        except DataError as error:
            if "colour image" not in str(error):
                raise
            raise DataError(f"{error} {_advice(path)}") from None
        return mask if self.plain else self._table[mask]

    @cached_property
    def _table(self) -> NDArray[np.uint16]:
        """(65536,): mask value -> value in the one form."""
        table = np.minimum(np.arange(65536) + self.shift, IGNORED)
        if self.ignore:
            table[[255, 65535]] = IGNORED
        table[list(self.void)] = IGNORED
        table[list(self.background)] = 0
        return table.astype(np.uint16)

    def _of_colours(self, path: Path) -> NDArray[np.uint16]:
        assert self.colours is not None
        codes = _colour_codes(path)
        known = [(code, number) for number, code in enumerate(self.colours.values(), 1)]
        known += [(code, 0) for code in self.background] + [(code, IGNORED) for code in self.void]
        known.sort()
        order, values = np.array([code for code, _ in known]), np.array([value for _, value in known], np.uint16)
        places = np.searchsorted(order, codes).clip(max=len(order) - 1)
        strange = order[places] != codes
        if strange.any():
            raise DataError(
                f"{path}: colours without a meaning: {_colour_counts(codes[strange])}. Name them in dataset.yaml under "
                f"`colours`, `background` or `void`; colours of a JPEG or of smoothed edges cannot be named, save "
                f"masks as PNG without smoothing."
            )
        mask: NDArray[np.uint16] = values[places]
        return mask


def colour_code(text: str) -> int | None:
    """0xRRGGBB of "#rrggbb"; None for anything else.

    >>> colour_code("#ff8000") == 0xFF8000, colour_code("red") is None
    (True, True)
    """
    digits = text[1:] if len(text) == 7 and text[0] == "#" else ""
    return int(digits, 16) if digits and all(letter in "0123456789abcdefABCDEF" for letter in digits) else None


def _colour_codes(path: Path) -> NDArray[np.int64]:
    """(H, W) 0xRRGGBB of an image."""
    with open_image(path) as image:
        rgb = np.asarray(image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB"), np.int64)
    codes: NDArray[np.int64] = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
    return codes


def _colour_counts(codes: NDArray[np.int64]) -> str:
    values, counts = np.unique(codes, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_SHOWN]
    text = ", ".join(f"#{values[i]:06x} ({counts[i]} px)" for i in order)
    return f"{text}, ..." if len(values) > _SHOWN else text


def _advice(path: Path) -> str:
    codes = _colour_codes(path)
    return (
        "If its colours are classes, name them in dataset.yaml, `colours: {name: '#rrggbb', ...}`; the most frequent "
        f"here are {_colour_counts(codes)}."
    )
