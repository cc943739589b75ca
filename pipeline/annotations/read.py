"""Annotations of any known format, one photo at a time.

    kind         what it is                                            a class of the file that a photo does not mark
    folder       CLASS/photo.jpg with CLASS/photo.png                  unknown
    masks        images/ with masks/: class numbers, colours,          absent (class numbers, colours),
                 or masks/CLASS/NAME.png                               unknown (one mask per class)
    coco         COCO instances JSON                                   absent
    labelstudio  Label Studio's JSON export                            absent, if somebody submitted an annotation
    cvat         "CVAT for images 1.1" XML                             absent, if the photo has any shape
    labelme      LabelMe JSON files                                    unknown
    yolo         data.yaml with labels/*.txt (segments)                absent

What only says that a class is somewhere there (crowds, boxes, points, lines) is never filled in: the class is unknown
in that photo unless it is marked elsewhere in it, and the pixels of a crowd or a box are ignored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from hsnet.errors import ConfigError, DataError
from pipeline.annotations import coco, cvat, labelme, labelstudio, mask_files, yolo
from pipeline.annotations.item import IGNORE, Annotation, Mask
from pipeline.annotations.photos import read_bytes
from pipeline.annotations.shapes import MOST_SHAPES, Entry, Source
from pipeline.common.text import did_you_mean
from pipeline.datasets.images import Size, image_size, photo_size, photo_turn

log = logging.getLogger(__name__)

KINDS = ("folder", "masks", "coco", "labelstudio", "cvat", "labelme", "yolo")


class Annotations(Sequence[Annotation]):
    """The photos of an annotation file or folder; each is drawn when it is asked for, and not kept.

    Args:
        source: the file, opened.
        classes: as in `read_annotations`.

    Raises:
        ConfigError: a class is asked for that the file does not have.
    """

    def __init__(self, source: Source, classes: Mapping[str, str] | None = None) -> None:
        self.path, self.kind, self.notes = source.path, source.kind, source.notes
        self._entries = source.entries
        if classes is None:
            self._table = {name: name for name in source.classes}
        else:
            self._table = {_as_in(source.classes, str(name)): target for name, target in classes.items()}
            unknown = [name for name in self._table if name not in source.classes]
            if unknown:
                there = ", ".join(source.classes[:20]) + (", ..." if len(source.classes) > 20 else "")
                raise ConfigError(
                    f"{source.path} has no class '{unknown[0]}', it has {there or 'none at all'}"
                    f"{did_you_mean(unknown[0], source.classes)}. Nothing was read of its photos."
                )
        self._table.setdefault(IGNORE, IGNORE)
        self.classes = tuple(dict.fromkeys(target for target in self._table.values() if target != IGNORE))
        """Names as they are given, in the order of the file or of what was asked for."""
        self.photos = tuple(entry.photo for entry in source.entries)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, number: int) -> Annotation: ...

    @overload
    def __getitem__(self, number: slice) -> list[Annotation]: ...

    def __getitem__(self, number: int | slice) -> Annotation | list[Annotation]:
        """Draws a photo's masks. Raises DataError: the photo or a shape is broken, or does not fit."""
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        return self._drawn(self._entries[number])

    def _drawn(self, entry: Entry) -> Annotation:
        size, turn = _size_of(entry, self.path)
        shapes = entry.shapes()
        if len(shapes) > MOST_SHAPES:
            raise DataError(
                f"{self.path}: {entry.photo} has {len(shapes):,} shapes; {MOST_SHAPES:,} is the most that is drawn."
            )
        masks: dict[str, Mask] = {}
        doubtful: set[str] = set()
        ignore: Mask = np.zeros(size, bool)
        for shape in shapes:
            target = self._table.get(shape.label)
            if target is None:
                continue
            top, left, mask = shape.draw(*size)
            place = (slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1]))
            if not shape.sure or target == IGNORE:
                ignore[place] |= mask
                doubtful.add(target)
            elif mask.any():
                masks.setdefault(target, np.zeros(size, bool))[place] |= mask
            else:
                log.warning(
                    "%s: %s of '%s' covers no pixel of %s: left out", self.path, shape.where, target, entry.photo
                )
                doubtful.add(target)
        for mask in masks.values():
            ignore &= ~mask
        absent = {target for name, target in self._table.items() if entry.exhaustive or name in entry.absent}
        absent -= {*masks, *doubtful, IGNORE}
        return Annotation(
            entry.photo,
            {name: _turned(masks[name], turn) for name in self.classes if name in masks},
            frozenset(absent),
            _turned(ignore, turn) if ignore.any() else None,
        )


def read_annotations(
    path: Path, *, photos: Path | None = None, kind: str = "auto", classes: Mapping[str, str] | None = None
) -> Annotations:
    """Open an annotation file or folder.

    Args:
        path: the file (JSON, XML, YAML) or folder.
        photos: the folder of the photos; by default that of the file, and `images` in it.
        kind: one of `KINDS`, or "auto": by what is there.
        classes: what to take, and under which names: name in the file -> name to give it; several may get the same
            name, and "(ignore)" says that these pixels are not known. In masks of class numbers the name in the file
            is the number ("8"), in coloured masks the colour ("#ff0000"): there the table is needed, unless a
            classes.json beside the masks is one. None takes all classes by their own names.

    Returns:
        a sequence of `Annotation`, one per photo; what was left out is in its `notes`, and what is found on drawing (a
        clipped outline) goes to the log.

    Raises:
        ConfigError: a class is asked for that is not there; `kind` is none.
        DataError: the file is missing, broken, too large, of no known kind, or names photos that are not there.
    """
    path = Path(path)
    if kind not in (*KINDS, "auto"):
        raise ConfigError(f"kind is '{kind}', must be auto, {', '.join(KINDS)}.")
    if not path.exists():
        raise DataError(f"{path} is missing: give an annotation file or a folder.")
    if photos is not None and not Path(photos).is_dir():
        raise DataError(f"The folder of photos {photos} is missing.")
    source = _open(path, None if photos is None else Path(photos), kind, classes)
    if not source.entries:
        raise DataError(f"{path} ({source.kind}) holds no annotated photo. {' '.join(source.notes)}".strip())
    return Annotations(source, classes)


def read_pairs(pairs: Iterable[str], name: str, classes: Mapping[str, str] | None = None) -> Annotations:
    """Photos with their masks, as given on a command line.

    Args:
        pairs: "PHOTO:MASK", "PHOTO:MASK:8" or "PHOTO:MASK:#ff0000": of a mask of class numbers or colours, which of
            them is the object.
        name: the class that they show.
        classes: number or colour -> name, as in `read_annotations`, for pairs without a choice of their own; then
            `name` is not used for them.

    Raises:
        ConfigError: a text is no such pair.
        DataError: two masks for one photo and class, a coloured mask of several colours without a choice.
    """
    return Annotations(mask_files.open_pairs(list(pairs), name, classes))


def _open(path: Path, photos: Path | None, kind: str, classes: Mapping[str, str] | None) -> Source:
    raw: Any = None
    if kind == "auto":
        kind, path = (_kind_of_folder if path.is_dir() else _kind_of_file)(path)
    elif path.is_dir() and kind in _FILES:
        path = _only_file(path, _FILES[kind])
    if kind in ("json", "labelstudio", "coco"):
        raw = parse_json(path)
        if kind == "json":
            kind = _kind_of_json(raw, path)
    readers: dict[str, Callable[[], Source]] = {
        "folder": lambda: mask_files.open_folder(path),
        "masks": lambda: mask_files.open_masks(path, photos, classes),
        "coco": lambda: coco.open_source(path, photos),
        "labelstudio": lambda: labelstudio.open_source(path, raw, photos),
        "cvat": lambda: cvat.open_source(path, photos),
        "labelme": lambda: labelme.open_source(path, photos),
        "yolo": lambda: yolo.open_source(path, photos),
    }
    return readers[kind]()


_FILES = {"coco": ".json", "labelstudio": ".json", "cvat": ".xml"}


def parse_json(path: Path) -> Any:
    """Whatever a JSON file holds. Raises DataError."""
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}.") from error


def _kind_of_file(path: Path) -> tuple[str, Path]:
    kinds = {".json": "json", ".xml": "cvat", ".yaml": "yolo", ".yml": "yolo"}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        more = " Unpack it first." if path.suffix.lower() in (".zip", ".gz", ".tar", ".7z") else ""
        raise DataError(f"{path} is no annotation file that is known (.json, .xml, .yaml), nor a folder.{more}")
    return kind, path


def _kind_of_folder(path: Path) -> tuple[str, Path]:
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (path / name).is_file() and (path / "labels").is_dir():
            return "yolo", path / name
    if (path / "masks").is_dir() or (path / mask_files.NAMES).is_file():
        return "masks", path
    if mask_files.class_folders(path):
        return "folder", path
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".json", ".xml"))
    if files and all(file.suffix.lower() == ".json" and labelme.is_labelme(file) for file in files):
        return "labelme", path
    if len(files) == 1:
        return _kind_of_file(files[0])
    raise DataError(
        f"{path} is no annotation folder that is known: no class folders with photos and masks, no masks/, no "
        f"data.yaml with labels/, and {len(files)} JSON or XML files where one is needed. Give the file itself."
    )


def _only_file(path: Path, suffix: str) -> Path:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == suffix)
    if len(files) != 1:
        raise DataError(f"{path} holds {len(files)} {suffix} files, one is needed. Give the file itself.")
    return files[0]


def _kind_of_json(raw: Any, path: Path) -> str:
    if isinstance(raw, dict) and "shapes" in raw:
        return "labelme"
    if isinstance(raw, dict) and {"images", "annotations", "categories"} <= set(raw):
        return "coco"
    if isinstance(raw, list) and raw and isinstance(raw[0], dict):
        return "labelstudio"
    raise DataError(
        f"{path} is none of COCO (images, annotations, categories), Label Studio (a list of tasks) and LabelMe "
        f"(shapes)."
    )


def _as_in(names: Sequence[str], name: str) -> str:
    """Colours may be written in capitals."""
    return name.strip().lower() if name not in names and name.strip().lower() in names else name


def _size_of(entry: Entry, source: Path) -> tuple[Size, Image.Transpose | None]:
    """The size that shapes are drawn at, and how masks are turned to lie as viewers show the photo."""
    shown = photo_size(entry.photo)
    stated = image_size(entry.size) if isinstance(entry.size, Path) else entry.size
    if stated is None or stated == shown:
        return shown, None
    stored = image_size(entry.photo)
    if stated == stored:  # drawn by a program that does not follow the EXIF tag
        return stored, photo_turn(entry.photo)
    what = entry.size if isinstance(entry.size, Path) else f"{source}, for {entry.photo.name}"
    raise DataError(
        f"{what}: the annotation is {stated[1]} x {stated[0]} pixels (width x height), but its photo {entry.photo} has "
        f"{shown[1]} x {shown[0]}. Give the photos that were annotated."
    )


def _turned(mask: Mask, turn: Image.Transpose | None) -> Mask:
    if turn is None:
        return mask
    picture = Image.fromarray(mask.astype(np.uint8)).transpose(turn)
    return np.asarray(picture).astype(bool)
