"""LabelMe: one JSON file per photo, with polygons in pixels and, in newer versions, masks.

    {"version", "flags": {}, "imagePath": "../photos/1.jpg", "imageData": null, "imageHeight", "imageWidth",
     "shapes": [{"label", "shape_type": "polygon", "points": [[x, y], ...], "group_id", "flags": {}, "score"}]}

Read are shapes of the types polygon and mask; a rectangle or circle is ignored, not filled; points and lines only say
that the class is there. The copy of the photo in the file (`imageData`) is not looked at. A class without a shape is
unknown. Written is a polygon for each connected part (exact: `outline`); the parts of one object have the same group.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from hsnet.errors import DataError
from pipeline.annotations.found import Found, objects_of
from pipeline.annotations.outline import joined, polygons
from pipeline.annotations.photos import PhotoFinder, read_bytes
from pipeline.annotations.shapes import Entry, Patch, Shape, Source, box, mention, polygon
from pipeline.annotations.streams import Names, bare
from pipeline.common.files import replace_text
from pipeline.datasets.images import PHOTO_SUFFIXES
from pipeline.datasets.queries import suffix

_LARGEST = 256 << 20  # photos are inside as text
_VERSION = "5.5.0"


def is_labelme(path: Path) -> bool:
    """Whether a JSON file has shapes; not when it cannot be read."""
    try:
        raw = json.loads(read_bytes(path, _LARGEST))
    except (DataError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and isinstance(raw.get("shapes"), list)


def open_source(path: Path, photos: Path | None) -> Source:
    """A file, or a folder of files. Raises DataError."""
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    classes: dict[str, None] = {}
    entries: dict[Path, Entry] = {}
    for file in files:
        shapes, image, size = _parsed(file)
        finder = PhotoFinder(file, [photos] if photos is not None else [file.parent])
        photo = (_beside(file, image) if photos is None else None) or finder.find(image)
        finder.require_all()
        assert photo is not None  # require_all
        if photo in entries:
            raise DataError(f"{path} has two files for the photo {photo}; {file} is the second. Keep one of them.")
        place = f"{file}, {photo.name}"
        drawn = [_shape(shape, place, f"shape {number}") for number, shape in enumerate(shapes, start=1)]
        classes.update(dict.fromkeys(shape.label for shape in drawn))
        entries[photo] = Entry(photo, size, partial(tuple, drawn), exhaustive=False)
    return Source(path, "labelme", tuple(classes), list(entries.values()))


def _beside(file: Path, image: str) -> Path | None:
    """The photo by its path from the file: LabelMe writes "../photos/1.jpg" if it was told to keep them apart."""
    photo = file.parent / image.replace("\\", "/")
    plain = "\0" not in image and not PurePosixPath(image).is_absolute() and suffix(image) in PHOTO_SUFFIXES
    return photo if plain and photo.is_file() else None


def _parsed(path: Path) -> tuple[list[dict[str, Any]], str, tuple[int, int] | None]:
    try:
        raw = json.loads(read_bytes(path, _LARGEST))
        shapes = [{key: value for key, value in shape.items() if key != "flags"} for shape in raw["shapes"]]
        image, height, width = raw["imagePath"], raw.get("imageHeight"), raw.get("imageWidth")
        if not isinstance(image, str) or not image:
            raise ValueError("imagePath is no name")
        size = None if height is None or width is None else (int(height), int(width))
        return shapes, image, size
    except KeyError as error:
        raise DataError(f"{path} is no LabelMe file: it has no {error}.") from error
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DataError(f"{path} is no LabelMe file: {str(error)[:200]}.") from error


def _shape(raw: dict[str, Any], place: str, where: str) -> Shape:
    label, kind, points = raw.get("label"), raw.get("shape_type") or "polygon", raw.get("points")
    if not isinstance(label, str) or not isinstance(points, list):
        raise DataError(f"{place}: {where} has no label or no points.")
    if kind == "polygon":
        return polygon(label, place, where, points)
    try:
        if kind in ("rectangle", "circle", "mask"):
            (left, top), (right, bottom) = ((float(x), float(y)) for x, y in points)
            if kind == "mask":
                return Shape(label, where, partial(_mask, raw.get("mask"), (left, top), place, where))
            if kind == "circle":
                radius = math.dist((left, top), (right, bottom))
                left, top, right, bottom = left - radius, top - radius, left + radius, top + radius
            corners = (min(left, right), min(top, bottom), max(left, right), max(top, bottom))
            return box(label, where, lambda _h, _w: corners)
    except (ValueError, TypeError) as error:
        raise DataError(f"{place}: {where} is a {kind} and needs two points x, y: {str(error)[:80]}.") from error
    return mention(label, where)


def _mask(raw: Any, corner: tuple[float, float], place: str, where: str, height: int, width: int) -> Patch:
    try:
        with Image.open(io.BytesIO(base64.b64decode(raw, validate=True)), formats=("PNG",)) as picture:
            left, top = round(corner[0]), round(corner[1])
            if left < 0 or top < 0 or left + picture.width > width or top + picture.height > height:
                raise ValueError(f"{picture.width} x {picture.height} pixels at ({left}, {top}) leave its photo")
            return top, left, np.asarray(picture.convert("L")) > 0
    except (ValueError, TypeError, OSError, OverflowError, SyntaxError) as error:
        raise DataError(f"{place}: the mask of {where} is broken: {str(error)[:120]}.") from error


class LabelMeWriter:
    """`labelme/NAME.json` for each photo; `imagePath` leads from there to the photo."""

    def __init__(self, out: Path, classes: Sequence[str], root: Path) -> None:
        self._folder = out / "labelme"
        self.files = (self._folder,)
        self._names = Names(root)

    def add(self, found: Found) -> None:
        shapes = []
        group = 0
        for name, found_class in found.classes.items():
            for one in objects_of(found_class):
                parts = polygons(one.mask, one.box[0], one.box[1])
                group += len(parts) > 1
                for rings in parts:
                    shape = {
                        "label": name,
                        "points": joined(rings).tolist(),
                        "shape_type": "polygon",
                        "flags": {},
                        "description": "",
                        "score": one.score,
                    }
                    shapes.append({**bare(shape), "group_id": group if len(parts) > 1 else None})
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {
                "version": _VERSION,
                "flags": {},
                "shapes": shapes,
                "imagePath": Path(os.path.relpath(found.photo, self._folder)).as_posix(),
                "imageData": None,
                "imageHeight": found.height,
                "imageWidth": found.width,
            },
            allow_nan=False,
        )
        replace_text(self._folder / f"{self._names.stem(found.photo)}.json", text)

    def close(self) -> None:
        """Every file is whole already."""

    def discard(self) -> None:
        """What was written stays: files are whole."""
