"""Photos and masks out of requests: read with limits, and named so that no name is a path."""

from __future__ import annotations

import base64
import binascii
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hsnet.errors import DataError, HSNetError
from pipeline.datasets.images import open_image, photo_size, read_photo, resize_label
from pipeline.datasets.queries import clean_name

MOST_PIXELS = 60_000_000
"""Of a photo in a request: a mask and a soft map of every class are made of it at once."""
_LONGEST_NAME = 80


class TooLarge(HSNetError):
    """More bytes or pixels than are taken."""


@dataclass(frozen=True, eq=False)
class Upload:
    """A photo that came with a request."""

    name: str
    """A file name without any folder, of the kind that the bytes are."""
    data: bytes
    photo: Image.Image
    """RGB, turned as viewers show it."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.photo.height, self.photo.width


def read_upload(data: bytes, name: str | None, most_pixels: int = MOST_PIXELS) -> Upload:
    """A photo from its bytes; its pixels are decoded only if they are not too many.

    Raises:
        DataError: no photo.
        TooLarge: more pixels than `most_pixels`.
    """
    said, _, ending = re.split(r"[\\/]", name or "")[-1].rpartition(".")
    said = said or ending
    stem = clean_name(said)[:_LONGEST_NAME].strip(". ") if said.strip(". ") else "photo"
    if not data:
        raise DataError(f"{stem} is empty. Nothing was kept.")
    with _file(data, f"{stem}.{_suffix(ending)}") as path:
        height, width = photo_size(path)
        if height * width > most_pixels:
            raise TooLarge(
                f"{stem} has {width} x {height} pixels, {most_pixels:,} are the most that are taken. Scale it down, or "
                "use `hsnet predict`, which has no such limit. Nothing was kept."
            )
        with open_image(path) as image:
            kind = _suffix(str(image.format))
        return Upload(f"{stem}.{'jpg' if kind == 'jpeg' else kind}", data, read_photo(path))


@contextmanager
def _file(data: bytes, name: str) -> Iterator[Path]:
    """Bytes as a file for a moment, for the readers of photos; messages name it without its folder."""
    with tempfile.TemporaryDirectory(prefix="hsnet-") as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            yield path
        except DataError as error:
            raise DataError(str(error).replace(f"{folder}/", "")) from error


def _suffix(text: str) -> str:
    """A part of a file name: five letters at most."""
    return re.sub("[^a-z0-9]", "", text.lower())[:5] or "img"


def decode_base64(text: object, what: str) -> bytes:
    """The bytes of base64 text, as it is or behind `data:image/...;base64,`. Raises DataError."""
    if not isinstance(text, str):
        raise DataError(f"{what} must be text in base64, got {type(text).__name__}.")
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise DataError(f"{what} must be in base64 (data:image/...;base64,...).")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{what} is no base64: {error}.") from error


def read_drawn(data: bytes, size: tuple[int, int], what: str = "mask.png") -> NDArray[np.bool_]:
    """What was drawn on a canvas of (height, width): a PNG, object where it is more opaque than not.

    Raises:
        DataError: no PNG, or of another size.
    """
    with _file(data, what) as path, open_image(path) as image:
        if (image.height, image.width) != size:
            raise DataError(
                f"{what} has {image.width} x {image.height} pixels, the canvas {size[1]} x {size[0]}. Nothing was kept."
            )
        if image.format != "PNG" or "A" not in image.getbands():
            raise DataError(f"{what} must be a PNG with transparency. Nothing was kept.")
        return np.asarray(image.getchannel("A")) >= 128


def merge_drawn(
    drawn: NDArray[np.bool_], shown: NDArray[np.bool_], mask: NDArray[np.bool_] | None, size: tuple[int, int]
) -> NDArray[np.bool_]:
    """What was drawn, at the photo's size: pixels that nobody changed keep what they were at that size.

    Args:
        drawn, shown: (h, w) after and before, at the canvas's size.
        mask: (H, W) that was shown; None for none.
        size: (H, W) of the photo.
    """
    changed = resize_label(np.ascontiguousarray(drawn != shown), size)
    now = resize_label(np.ascontiguousarray(drawn), size)
    return now if mask is None else np.where(changed, now, mask)
