"""Masks as PNG files with a table of names, which `read_annotations` takes again (kind "masks").

masks/classes.json     {"classes": {"1": "car"}, "photos": {"NAME.png": "sub/photo.jpg"}}
masks/NAME.png         one map: 0 background, class numbers from 1, in colours of their own (palette); with more than
                       255 classes 16-bit grey; or, where classes may overlap,
masks/CLASS/NAME.png   0 and 255, for every class that was looked for
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.annotations.found import Found
from pipeline.annotations.mask_files import NAMES
from pipeline.annotations.streams import Names
from pipeline.common.files import replace_text, whole

_BYTE = 255
"""Classes in an 8-bit map."""


class MaskWriter:
    """`masks/`.

    Args:
        overlapping: one file per class; otherwise one map per photo, in which a pixel of several classes gets the one
            with the higher score, of equal ones the one with the smaller mask.
    """

    def __init__(self, out: Path, classes: Sequence[str], root: Path, overlapping: bool = False) -> None:
        self._folder = out / "masks"
        self.files = (self._folder,)
        self._names = Names(root)
        self._overlapping = overlapping
        self._numbers = {name: number for number, name in enumerate(classes, start=1)}
        self._photos: dict[str, str] = {}
        self._folder.mkdir(parents=True, exist_ok=True)

    def add(self, found: Found) -> None:
        file = f"{self._names.stem(found.photo)}.png"
        self._photos[file] = self._names.relative(found.photo)
        if self._overlapping:
            for name, found_class in found.classes.items():
                folder = self._folder / folder_name(name)
                folder.mkdir(exist_ok=True)
                _save(Image.fromarray(found_class.mask.astype(np.uint8) * np.uint8(255)), folder / file)
            return
        label = class_map(found, self._numbers)
        picture = Image.fromarray(label)
        if label.dtype == np.uint8:
            picture.putpalette(palette().ravel().tolist())
        _save(picture, self._folder / file)

    def close(self) -> None:
        table = {} if self._overlapping else {"classes": {str(n): name for name, n in self._numbers.items()}}
        replace_text(self._folder / NAMES, json.dumps({**table, "photos": self._photos}, indent=1))

    def discard(self) -> None:
        """What was written stays: files are whole."""


def class_map(found: Found, numbers: dict[str, int]) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """(H, W): 0 where nothing was found, else the number of a class; of several, the surest, then the smallest."""
    label = np.zeros((found.height, found.width), np.uint8 if max(numbers.values(), default=0) <= _BYTE else np.uint16)
    order = sorted(found.classes.items(), key=lambda item: (item[1].score or 0.0, -int(item[1].mask.sum())))
    for name, found_class in order:
        label[found_class.mask] = numbers[name]
    return label


def palette() -> NDArray[np.uint8]:
    """(256, 3): colours of class numbers, 0 black, neighbours far apart: bits of the number dealt to the channels in
    turn, the lowest to the highest bit of the colour, as PASCAL VOC does."""
    numbers = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= ((numbers >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours


def folder_name(name: str) -> str:
    """A class's name as the name of a folder, with %XX for what would lead elsewhere, be hidden or not be printed.

    >>> folder_name("sofa"), folder_name("../a"), folder_name("Tür 3")
    ('sofa', '%2E.%2Fa', 'Tür 3')
    """
    text = "".join(c if c.isprintable() and c not in '%/\\:*?"<>|' else quote(c, safe="") for c in name)
    return f"%{ord(text[0]):02X}{text[1:]}" if text[:1] in (".", "_") else text


def _save(picture: Image.Image, path: Path) -> None:
    with whole(path) as partial:
        picture.save(partial, format="PNG")
