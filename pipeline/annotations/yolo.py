"""YOLO segmentation: data.yaml with the names, and a text file of polygons per photo.

    data.yaml           names: [car, road] or {0: car, 1: road}
    labels/**/NAME.txt  a line per object: class number, then x y x y ... in shares of width and height, 0 to 1
    images/**/NAME.jpg  the photo of that name

An empty file says that the photo shows none of the classes; a photo without a file is left out, with a note. A line of
four numbers after the class is a box: ignored, not filled. Written is a line for each connected part of an object
(exact: `outline`; which parts belong together is lost), and links to the photos in images/.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from hsnet.errors import DataError
from pipeline.annotations.found import Found, objects_of
from pipeline.annotations.outline import joined, polygons
from pipeline.annotations.photos import PhotoFinder, list_photos, read_bytes
from pipeline.annotations.shapes import Entry, Shape, Source, box, scaled_polygon
from pipeline.annotations.streams import Names
from pipeline.common.files import replace_text

_YAML, _TEXT = 1 << 20, 64 << 20
_BOX, _LEAST = 4, 6
"""Numbers after the class: of a box, of the smallest polygon."""


def open_source(path: Path, photos: Path | None) -> Source:
    """`path` is data.yaml or its folder. Raises DataError: broken, or labels without their photo. Names the place."""
    if path.is_dir():
        named = [path / name for name in ("data.yaml", "data.yml", "dataset.yaml") if (path / name).is_file()]
        if not named:
            raise DataError(f"{path} has no data.yaml.")
        path = named[0]
    names = _names(path)
    labels, images = path.parent / "labels", photos if photos is not None else path.parent / "images"
    files = sorted(labels.rglob("*.txt"))
    if not files:
        raise DataError(f"{labels} holds no label files (*.txt).")
    there = list_photos(images)
    by_stem: dict[str, list[Path]] = {}
    for one in there:
        by_stem.setdefault(one.relative_to(images).with_suffix("").as_posix(), []).append(one)
    finder = PhotoFinder(path, [images], lambda name: os.path.splitext(name)[0])
    entries: dict[Path, Entry] = {}
    boxes = 0
    for file in files:
        stem = file.relative_to(labels).as_posix().removesuffix(".txt")
        found = by_stem.get(stem, [])
        photo: Path | None = found[0] if len(found) == 1 else finder.find(f"{stem}.jpg")
        shapes = _shapes(file, names)
        boxes += sum(not shape.sure for shape in shapes)
        if photo is not None:
            entries[photo] = Entry(photo, None, partial(tuple, shapes))
    finder.require_all()
    notes = []
    if len(there) > len(entries):
        notes.append(f"Left out {len(there) - len(entries)} photos without a label file: not known what they show.")
    if boxes:
        notes.append(f"{boxes} lines are boxes: ignored, not filled.")
    return Source(path, "yolo", tuple(dict.fromkeys(names.values())), list(entries.values()), tuple(notes))


def _names(path: Path) -> dict[int, str]:
    try:
        raw: Any = yaml.safe_load(read_bytes(path, _YAML))
        names = raw["names"]
        listed = dict(enumerate(names)) if isinstance(names, list) else dict(names)
        if not listed or not all(type(k) is int and isinstance(name, (str, int)) for k, name in listed.items()):
            raise ValueError("names must be a list, or a table of numbers and names")
        return {number: str(name) for number, name in listed.items()}
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no data.yaml with the names of the classes: {str(error)[:200]}.") from error


def _shapes(file: Path, names: dict[int, str]) -> list[Shape]:
    try:
        lines = read_bytes(file, _TEXT).decode("ascii").splitlines()
    except ValueError as error:
        raise DataError(f"{file} is no label file: {error}.") from error
    return [_shape(line, names, str(file), f"line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _shape(line: str, names: dict[int, str], place: str, where: str) -> Shape:
    try:
        first, *rest = line.split()
        number, values = int(first), [float(word) for word in rest]
    except ValueError as error:
        raise DataError(f"{place}: {where} is no class number with coordinates: {str(error)[:80]}.") from error
    if number not in names:
        known = ", ".join(f"{k} {name}" for k, name in list(names.items())[:10])
        raise DataError(f"{place}: {where} has class {number}; data.yaml names {known}.")
    label = names[number]
    if len(values) == _BOX:
        x, y, w, h = values
        corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        return box(
            label, where, lambda height, width: [s * (height if i % 2 else width) for i, s in enumerate(corners)]
        )
    if len(values) < _LEAST or len(values) % 2:
        raise DataError(
            f"{place}: {where} has {len(values)} numbers after the class; pairs x y of three points or more."
        )
    return scaled_polygon(label, place, where, list(zip(values[::2], values[1::2], strict=True)), 1)


class YoloWriter:
    """`yolo/` with data.yaml, labels/NAME.txt and images/NAME.jpg, a link to the photo; classes are numbered from 0."""

    def __init__(self, out: Path, classes: Sequence[str], root: Path) -> None:
        self._folder = out / "yolo"
        self.files = (self._folder,)
        self._names = Names(root)
        self._numbers = {name: number for number, name in enumerate(classes)}
        (self._folder / "labels").mkdir(parents=True, exist_ok=True)
        (self._folder / "images").mkdir(exist_ok=True)
        content = {"train": "images", "val": "images", "names": dict(enumerate(classes))}
        replace_text(self._folder / "data.yaml", yaml.safe_dump(content, allow_unicode=True, sort_keys=False))

    def add(self, found: Found) -> None:
        lines = []
        for name, found_class in found.classes.items():
            for one in objects_of(found_class):
                for rings in polygons(one.mask, one.box[0], one.box[1]):
                    shares = joined(rings) / (found.width, found.height)
                    numbers = " ".join(f"{share:.7g}" for share in shares.ravel().tolist())
                    lines.append(f"{self._numbers[name]} {numbers}\n")
        stem = self._names.stem(found.photo)
        link = self._folder / "images" / f"{stem}{found.photo.suffix}"
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.abspath(found.photo))
        replace_text(self._folder / "labels" / f"{stem}.txt", "".join(lines))

    def close(self) -> None:
        """Every file is whole already."""

    def discard(self) -> None:
        """What was written stays: files are whole."""
