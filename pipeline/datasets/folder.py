"""Your own photos and masks. Three layouts, told apart by what is there:

    masks      images/**.jpg with masks/**.png of the same name: class numbers from 1, 0 background, 255 ignored
    classes    <class>/*.jpg with *.png of the same name beside it (or *_mask.png): object from grey value 128 on
    coco       images/** with annotations.json in COCO's instances format

An optional dataset.yaml says more; every key may be left out:

    layout: masks                   # masks, classes or coco
    images: images                  # folder of the photos (masks, coco)
    masks: masks                    # folder of the masks (masks)
    annotations: annotations.json   # file of the annotations (coco)
    classes: {1: cat, 2: dog}       # names by mask value, or a list for 1, 2, ... (masks); which folders (classes)
    folds: 4                        # how many, or the held-out classes of each: [[cat, dog], [cow]]
    val_images: 0.2                 # share of the images kept for tests, or a text file that lists them (masks, coco)
    ignore: true                    # whether 255 in a mask means "ignored" (masks)
    min_object_share: 0.005         # a class that covers less of an image is not listed for it (masks, coco)

Folds by rule: as many as there are classes, but at most 4, in blocks of class order.

Lists of fold f. In the layouts masks and coco an image can show several classes, so that images are kept apart as
in PASCAL-5i: test = test images of the held-out classes, val = test images of the other classes, trn = other images
of the other classes. Test images by rule: for each class, rarest first, the share `val_images` of its images and at
least two, in order of the sha256 of the image id. In the layout classes nothing is shared: test = classes of fold
f, val = those of the next fold (empty with two folds), trn = all others.

Photos are turned as their EXIF tag says, unless the mask was drawn on the stored pixels (`read_photo`). A photo
without a mask and a mask without a photo are left out, with a note.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from hsnet.errors import DataError
from pipeline.datasets.folder_description import Description, read_description
from pipeline.datasets.images import (
    PHOTO_SUFFIXES,
    Size,
    class_label,
    image_size,
    photo_size,
    read_binary_mask,
    read_index_mask,
    read_photo,
    require_same_size,
)
from pipeline.datasets.index import DatasetIndex, Split, small_class_notes
from pipeline.datasets.instances import InstanceMasks
from pipeline.datasets.listing import count_pixels, require_files

MAX_FOLDS = 4

Listed = tuple[tuple[int, ...], ...]
"""Classes that each image is listed for."""


class Folder:
    """Own photos as a `Dataset`.

    Raises:
        DataError: the folder has none of the layouts, or dataset.yaml contradicts it.
    """

    def __init__(self, root: Path) -> None:
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"{root} is not a folder.")
        description = read_description(root / "dataset.yaml")
        layout = description.layout or _layout_of(root, description)
        self._layout: _Layout = _LAYOUTS[layout](root, description)
        self.index = _index(self._layout, description, root)

    def image(self, i: int) -> Image.Image:
        return read_photo(self._layout.photo(i), self._layout.mask_size(i))

    def label(self, i: int) -> np.ndarray:
        label = self._layout.label(i)
        size = (label.shape[0], label.shape[1])
        photo = self._layout.photo(i)
        require_same_size(photo, photo_size(photo, size), self._layout.mask_path(i), size)
        return label.astype(self.index.label_dtype)


class _Layout(Protocol):
    ids: tuple[str, ...]
    classes: dict[int, str]
    listed: Listed
    has_ignore: bool
    shared: bool
    """Whether an image can show several classes."""
    notes: tuple[str, ...]

    def photo(self, i: int) -> Path: ...
    def mask_path(self, i: int) -> Path: ...
    def mask_size(self, i: int) -> Size: ...
    def label(self, i: int) -> np.ndarray: ...


class _Masks:
    """Photos in one folder, class-number masks in another."""

    shared = True

    def __init__(self, root: Path, description: Description) -> None:
        self.photos, self.masks = root / description.images, root / description.masks
        self.has_ignore = description.ignore
        photos = _files(self.photos, PHOTO_SUFFIXES)
        masks = {name.rpartition(".")[0]: name for name in _files(self.masks, (".png",))}
        self.ids = tuple(name for name in photos if name.rpartition(".")[0] in masks)
        self._mask = {name: masks[name.rpartition(".")[0]] for name in self.ids}
        if not self.ids:
            raise DataError(f"No photo in {self.photos} has a mask of its name (.png) in {self.masks}.")
        lonely = sorted(set(masks.values()) - set(self._mask.values()))
        self.notes = (
            *_left_out("photos without a mask", [name for name in photos if name not in self._mask]),
            *_left_out("masks without a photo", lonely),
        )
        counts = count_pixels(lambda i: read_index_mask(self.mask_path(i)), len(self.ids))
        self.classes = self._named(description, (set(values) for values, _ in counts))
        self.listed = tuple(
            tuple(
                value - 1
                for value, pixels in sorted(values.items())
                if value - 1 in self.classes and pixels >= description.min_object_share * total
            )
            for values, total in counts
        )

    def _named(self, description: Description, values_of: Iterable[set[int]]) -> dict[int, str]:
        skipped = {0, 255, 65535} if self.has_ignore else {0}
        if description.classes is not None:
            skipped |= set(description.classes)
            for i, values in enumerate(values_of):
                if values - skipped:
                    raise DataError(
                        f"{self.mask_path(i)}: mask values without a class: {sorted(values - skipped)[:5]}. Correct "
                        f"the mask, or name them under `classes` in dataset.yaml."
                    )
            return {value - 1: name for value, name in description.classes.items()}
        numbers = sorted(set[int]().union(*values_of) - skipped)
        if not numbers:
            raise DataError(
                f"The masks in {self.masks} hold no class number, only 0{' and 255' if self.has_ignore else ''}. Masks "
                f"of one object each belong beside their photos, one folder per class."
            )
        return {value - 1: f"class {value}" for value in numbers}

    def photo(self, i: int) -> Path:
        return self.photos / self.ids[i]

    def mask_path(self, i: int) -> Path:
        return self.masks / self._mask[self.ids[i]]

    def mask_size(self, i: int) -> Size:
        return image_size(self.mask_path(i))

    def label(self, i: int) -> np.ndarray:
        path = self.mask_path(i)
        return class_label(read_index_mask(path), path, self.classes, ignore=self.has_ignore)


class _ClassFolders:
    """One folder per class, masks of one object beside their photos."""

    shared = False
    has_ignore = False

    def __init__(self, root: Path, description: Description) -> None:
        self.root = root
        pairs = {folder: pairs_beside(root, folder) for folder in _folders(root)}
        empty = sorted(folder for folder, listed in pairs.items() if not listed)
        if description.classes is not None:
            names = list(description.classes.values())
            missing = [name for name in names if not pairs.get(name)]
            if missing:
                raise DataError(f"{root}: no folder with photos and masks for the class {missing[0]!r}.")
        else:
            names = [folder for folder in sorted(pairs) if pairs[folder]]
        lonely = [photo for folder in sorted(pairs) if pairs[folder] for photo in _without_mask(root, pairs[folder])]
        self.notes = _left_out("folders without a photo that has a mask", empty) + _left_out(
            "photos without a mask", lonely
        )
        self.classes = dict(enumerate(names))
        self._pairs = [(photo, mask, c) for c, name in self.classes.items() for photo, mask in pairs[name]]
        self.ids = tuple(photo for photo, _, _ in self._pairs)
        self.listed: Listed = tuple((class_id,) for _, _, class_id in self._pairs)

    def photo(self, i: int) -> Path:
        return self.root / self._pairs[i][0]

    def mask_path(self, i: int) -> Path:
        return self.root / self._pairs[i][1]

    def mask_size(self, i: int) -> Size:
        return image_size(self.mask_path(i))

    def label(self, i: int) -> np.ndarray:
        label: np.ndarray = read_binary_mask(self.mask_path(i)) * np.uint16(self._pairs[i][2] + 1)
        return label


class _Coco:
    """Photos with one file of COCO annotations."""

    shared = True
    has_ignore = False

    def __init__(self, root: Path, description: Description) -> None:
        self.photos = root / description.images
        self.instances = InstanceMasks(root / description.annotations)
        self.classes = self.instances.classes
        self.ids = self.instances.files
        if not self.ids:
            raise DataError(f"{self.instances.path} lists no images.")
        require_files(self.ids, self.photos, "photos")
        self.listed = tuple(self.instances.listed_classes(file, description.min_object_share) for file in self.ids)
        self.notes: tuple[str, ...] = ()

    def photo(self, i: int) -> Path:
        return self.photos / self.ids[i]

    def mask_path(self, i: int) -> Path:
        return self.instances.path

    def mask_size(self, i: int) -> Size:
        return self.instances.size(self.ids[i])

    def label(self, i: int) -> np.ndarray:
        return self.instances.label(self.ids[i])


_LAYOUTS: dict[str, Callable[[Path, Description], _Layout]] = {"masks": _Masks, "classes": _ClassFolders, "coco": _Coco}


def _layout_of(root: Path, description: Description) -> str:
    if (root / description.images).is_dir():
        if (root / description.masks).is_dir():
            return "masks"
        if (root / description.annotations).is_file():
            return "coco"
    if any(pairs_beside(root, folder) for folder in _folders(root)):
        return "classes"
    raise DataError(
        f"{root} has none of the known layouts: {description.images}/ with {description.masks}/, "
        f"{description.images}/ with {description.annotations}, or one folder per class with photos and masks (.png) "
        f"of the same names."
    )


def _index(layout: _Layout, description: Description, root: Path) -> DatasetIndex:
    folds = _folds(layout.classes, description, root)
    tests = _test_images(layout, description, root) if layout.shared else frozenset()
    splits = {}
    for fold, novel in enumerate(folds):
        base = tuple(sorted(set(layout.classes) - set(novel)))
        if layout.shared:
            others = frozenset(range(len(layout.ids))) - tests
            splits[fold] = {
                "trn": _split(layout, others, base),
                "val": _split(layout, tests, base),
                "test": _split(layout, tests, novel),
            }
        else:
            everything = range(len(layout.ids))
            chosen = tuple(sorted(set(folds[(fold + 1) % len(folds)]) - set(novel))) if len(folds) > 2 else ()
            splits[fold] = {
                "trn": _split(layout, everything, sorted(set(base) - set(chosen))),
                "val": _split(layout, everything, chosen),
                "test": _split(layout, everything, novel),
            }
    notes = [*layout.notes]
    if not layout.shared and len(folds) < 3:
        notes.append("With two folds no classes are left for choosing a model: 'val' is empty.")
    return DatasetIndex(
        name="folder",
        classes=layout.classes,
        images=layout.ids,
        splits=splits,
        query_order="list",
        has_ignore=layout.has_ignore,
        notes=(*notes, *small_class_notes(splits, layout.classes)),
    )


def _split(layout: _Layout, images: Collection[int], classes: Sequence[int]) -> Split:
    wanted = set(classes)
    entries = tuple((i, c) for i in sorted(images) for c in layout.listed[i] if c in wanted)
    return Split(entries, tuple(classes))


def _folds(classes: dict[int, str], description: Description, root: Path) -> list[tuple[int, ...]]:
    ids, count = sorted(classes), description.folds
    if len(ids) < 2:
        raise DataError(f"{root} has one class, '{classes[ids[0]]}': to train on some and test on others takes two.")
    if isinstance(count, tuple):
        by_name = {name: class_id for class_id, name in classes.items()}
        unknown = [name for fold in count for name in fold if name not in by_name]
        if unknown:
            raise DataError(f"{root}/dataset.yaml: folds name {unknown[0]!r}; classes are {', '.join(by_name)}.")
        folds = [tuple(sorted(by_name[name] for name in fold)) for fold in count]
        if any(len(fold) == len(ids) for fold in folds):
            raise DataError(f"{root}/dataset.yaml: a fold holds out all classes; none is left to train on.")
        return folds
    number = min(MAX_FOLDS, len(ids)) if count is None else count
    if number > len(ids):
        raise DataError(f"{root}/dataset.yaml: {number} folds of {len(ids)} classes leave some without a class.")
    blocks: list[list[int]] = [[] for _ in range(number)]
    for place, class_id in enumerate(ids):
        blocks[place * number // len(ids)].append(class_id)
    return [tuple(block) for block in blocks]


def _test_images(layout: _Layout, description: Description, root: Path) -> frozenset[int]:
    if isinstance(description.val_images, str):
        return _listed_in(root / description.val_images, layout.ids)
    names = [image_id.encode("utf-8", "surrogateescape") for image_id in layout.ids]
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i]).digest())
    images: dict[int, list[int]] = {class_id: [] for class_id in layout.classes}
    for i in order:
        for class_id in layout.listed[i]:
            images[class_id].append(i)
    tests: set[int] = set()
    for class_id in sorted(images, key=lambda c: (len(images[c]), c)):
        wanted = max(2, math.ceil(description.val_images * len(images[class_id])))
        others = [i for i in images[class_id] if i not in tests]
        there = len(images[class_id]) - len(others)
        tests.update(others[: max(0, wanted - there)])
    return frozenset(tests)


def _listed_in(path: Path, ids: Sequence[str]) -> frozenset[int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a list of images: {error}.") from error
    number = {image_id.rpartition(".")[0]: i for i, image_id in enumerate(ids)}
    number |= {image_id: i for i, image_id in enumerate(ids)}
    names = [line.strip() for line in lines if line.strip()]
    unknown = next((name for name in names if name not in number), None)
    if unknown is not None:
        raise DataError(f"{path} lists {unknown[:80]!r}, but there is no such photo with a mask.")
    return frozenset(number[name] for name in names)


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return sorted(path.as_posix() for path in inside if not any(part.startswith(".") for part in path.parts))


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def pairs_beside(root: Path, folder: str) -> list[tuple[str, str]]:
    """(photo, mask), relative to the root, in one of its folders: x.jpg with x.png, or any x.* with x_mask.png."""
    names = {
        path.name
        for path in (root / folder).iterdir()
        if path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".")
    }
    pairs = []
    for name in sorted(names):
        stem, _, suffix = name.rpartition(".")
        beside = f"{stem}.png" if suffix.lower() != "png" else None
        mask = next((m for m in (f"{stem}_mask.png", beside) if m in names), None)
        if mask is not None and not stem.endswith("_mask"):
            pairs.append((f"{folder}/{name}", f"{folder}/{mask}"))
    return pairs


def _without_mask(root: Path, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Photos of a class folder that are in no pair. A PNG alone may be anything, so it is not counted."""
    folder = pairs[0][0].rpartition("/")[0]
    paired = {photo for photo, _ in pairs}
    photos = (
        path
        for path in (root / folder).iterdir()
        if path.suffix.lower() in PHOTO_SUFFIXES and path.suffix.lower() != ".png"
    )
    names = (f"{folder}/{path.name}" for path in photos if not path.name.startswith("."))
    return sorted(name for name in names if name not in paired)


def _left_out(what: str, names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (f"Left out {len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}.",)
