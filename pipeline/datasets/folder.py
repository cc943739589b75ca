"""Your own photos and masks. Three layouts, told apart by what is there:

    masks      images/**.jpg with masks/**.png of the same name: class numbers from 1, 0 background, 255 ignored
    classes    <class>/*.jpg with *.png of the same name beside it (or *_mask.png): object from grey value 128 on
    coco       images/** with annotations.json in COCO's instances format

An optional dataset.yaml says more; every key may be left out:

    layout: masks                   # masks, classes or coco
    images: images                  # folder of the photos (masks, coco), several, or a pattern (see below)
    masks: masks                    # folder of the masks (masks), as many, or a pattern
    annotations: annotations.json   # file of the annotations (coco)
    classes: {1: cat, 2: dog}       # names by mask value, or a list for 1, 2, ... (masks); which folders (classes)
    folds: 4                        # how many, or the held-out classes of each: [[cat, dog], [cow]]
    val_images: 0.2                 # share of the images kept for tests, or a text file that lists them (masks, coco)
    ignore: true                    # whether 255 in a mask means "ignored" (masks)
    background: 0                   # mask values that are background; none: every pixel is of a class (masks)
    void: [11]                      # further mask values that mean "ignored" (masks)
    colours: {cat: "#ff0000"}       # classes by the colour of their pixels, instead of `classes` (masks)
    groups: "(.*)_exp[0-9]+"        # photos of one thing: what the group holds of the image id, or a .csv file
    min_object_share: 0.005         # a class that covers less of an image is not listed for it (masks, coco)

Several folders, `images: [train, val]` with `masks: [trainannot, valannot]`, are one data set. A pattern such as
`images: "photos/{name}.jpg"` with `masks: "labels/{name}_mask.png"` pairs files by what {name} stands for; with
{class}, "{class}/Imgs/{name}.jpg", each folder of that place is a class (classes).

Photos of one group are never query and support of one episode, and in the layouts masks and coco they are all test
images or none is.

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
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from hsnet.errors import DataError
from pipeline.datasets.folder_description import Description, read_description
from pipeline.datasets.folder_files import (
    CLASS,
    groups_of,
    is_pattern,
    left_out,
    other_files,
    others_note,
    pairs_by_folder,
    pairs_by_pattern,
)
from pipeline.datasets.images import (
    PHOTO_SUFFIXES,
    Size,
    class_label,
    image_size,
    photo_size,
    read_binary_mask,
    read_photo,
    require_same_size,
)
from pipeline.datasets.index import DatasetIndex, Split, small_class_notes
from pipeline.datasets.instances import InstanceMasks
from pipeline.datasets.listing import count_pixels, require_files

MAX_FOLDS = 4
_NO_CLASS = ("background", "void", "ignore", "ignored", "unlabeled", "unlabelled", "unlabel", "none")
"""Names that name lists have for what is no class."""

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
    """Photos in folders, masks of numbers or colours in others."""

    shared = True

    def __init__(self, root: Path, description: Description) -> None:
        self.root, self.values = root, description.mask_values()
        self.has_ignore = self.values.has_ignore
        if is_pattern(description.images):
            found, notes = pairs_by_pattern(root, str(description.images), str(description.masks))
            pairs = [pair for _, pair in found]
        else:
            pairs, notes = pairs_by_folder(root, description.image_folders, description.mask_folders)
        places = [f"{root}/{_places(places)}" for places in (description.images, description.masks)]
        if not pairs:
            raise DataError(f"No photo in {places[0]} has a mask of its name (.png) in {places[1]}.")
        self.ids = tuple(name for name, _, _ in pairs)
        self._files = [(photo, mask) for _, photo, mask in pairs]
        counts = count_pixels(lambda i: self.values.read(self.mask_path(i)), len(self.ids))
        self.classes = self._named(description, [set(values) for values, _ in counts], places[1])
        self.notes = (*notes, *self._meaning(description, counts))
        self.listed = tuple(
            tuple(
                value - 1
                for value, pixels in sorted(values.items())
                if value - 1 in self.classes and pixels >= description.min_object_share * total
            )
            for values, total in counts
        )

    def _named(self, description: Description, values_of: Sequence[set[int]], masks: str) -> dict[int, str]:
        shift = self.values.shift
        if self.values.classes is not None:
            return self.values.classes
        # 255 is a class only where it is not ignored, or where it is the mask value 254.
        skipped = {0, 65535} | ({255} if self.values.ignore and not shift else set())
        if not self.has_ignore:
            skipped = {0}
        if description.classes is not None:
            skipped |= {value + shift for value in description.classes}
            for i, values in enumerate(values_of):
                if values - skipped:
                    odd = [value - shift for value in sorted(values - skipped)[:5]]
                    raise DataError(
                        f"{self.mask_path(i)}: mask values without a class: {odd}. Correct the mask, or name them "
                        f"under `classes` in dataset.yaml (or under `void`, if they mean nothing)."
                    )
            return {value + shift - 1: name for value, name in description.classes.items()}
        numbers = sorted(set[int]().union(*values_of) - skipped)
        if not numbers:
            raise DataError(
                f"The masks in {masks} hold no class number, only 0{' and 255' if self.has_ignore else ''}. Masks "
                f"of one object each belong beside their photos, one folder per class."
            )
        return {value - 1: f"class {value - shift}" for value in numbers}

    def _meaning(self, description: Description, counts: Sequence[tuple[dict[int, int], int]]) -> tuple[str, ...]:
        """What was made of mask values that nobody named, and names that look like another meaning."""
        if description.classes is None and self.values.classes is None and description.background is None:
            share = sum(values.get(0, 0) for values, _ in counts) / max(1, sum(total for _, total in counts))
            names = [number + 1 for number in sorted(self.classes)]
            which = f"{names[0]} to {names[-1]}" if len(names) > 2 else " and ".join(map(str, names))
            return (
                f"No names in dataset.yaml: mask value 0 is taken as background ({100 * share:.0f} % of the pixels), "
                f"{which} as classes{', 255 as ignored' if self.has_ignore else ''}. If 0 is a class, say `background: "
                f"none`; if a value means nothing, `void: {names[-1]}`.",
            )
        first = next(iter(description.classes.items()), None) if description.classes else None
        if first is not None and first[1].casefold().strip("_ ") in _NO_CLASS:
            return (
                f"Mask value {first[0]} is a class named '{first[1]}'. If it is no class, leave it out of "
                f"`classes` and say `background: {first[0]}` or `void: {first[0]}`.",
            )
        return ()

    def photo(self, i: int) -> Path:
        return self.root / self._files[i][0]

    def mask_path(self, i: int) -> Path:
        return self.root / self._files[i][1]

    def mask_size(self, i: int) -> Size:
        return image_size(self.mask_path(i))

    def label(self, i: int) -> np.ndarray:
        path = self.mask_path(i)
        return class_label(self.values.read(path), path, self.classes, ignore=self.has_ignore)


class _ClassFolders:
    """One folder per class, masks of one object beside their photos."""

    shared = False
    has_ignore = False

    def __init__(self, root: Path, description: Description) -> None:
        self.root = root
        pairs, lonely_notes = _class_pairs(root, description)
        empty = sorted(folder for folder, listed in pairs.items() if not listed)
        if description.classes is not None:
            names = list(description.classes.values())
            missing = [name for name in names if not pairs.get(name)]
            if missing:
                raise DataError(f"{root}: no folder with photos and masks for the class {missing[0]!r}.")
        else:
            names = [folder for folder in sorted(pairs) if pairs[folder]]
        self.notes = (*left_out("folder", "without a photo that has a mask", empty), *lonely_notes)
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
        if not isinstance(description.images, str) or is_pattern(description.images):
            raise DataError(f"{root}/dataset.yaml: images of the layout coco must be one folder.")
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
    images, masks = description.images, description.masks
    if is_pattern(images):
        return "classes" if CLASS in str(images) else "masks"
    if all((root / folder).is_dir() for folder in description.image_folders):
        if all((root / folder).is_dir() for folder in description.mask_folders):
            return "masks"
        if (root / description.annotations).is_file():
            return "coco"
    if any(pairs_beside(root, folder) for folder in _folders(root)):
        return "classes"
    deeper = (f"{one}/{two}" for one in _folders(root) for two in _folders(root / one))
    below = next((folder for folder in deeper if pairs_beside(root, folder)), "")
    hint = ""
    if below:
        folder = below.rpartition("/")[2]
        hint = (
            f" Photos with masks are in {below}: dataset.yaml can say so, `images: "
            f"'{{class}}/{folder}/{{name}}.jpg'` and `masks: '{{class}}/{folder}/{{name}}.png'`."
        )
    raise DataError(
        f"{root} has none of the known layouts: {_places(images)}/ with {_places(masks)}/, {_places(images)}/ with "
        f"{description.annotations}, or one folder per class with photos and masks (.png) of the same names.{hint}"
    )


def _places(folders: str | tuple[str, ...]) -> str:
    return folders if isinstance(folders, str) else ", ".join(folders)


def _class_pairs(root: Path, description: Description) -> tuple[dict[str, list[tuple[str, str]]], tuple[str, ...]]:
    """Class -> its (photo, mask), and notes of photos left out."""
    if is_pattern(description.images):
        found, notes = pairs_by_pattern(root, str(description.images), str(description.masks))
        pairs: dict[str, list[tuple[str, str]]] = {}
        for name, (_, photo, mask) in found:
            pairs.setdefault(name, []).append((photo, mask))
        return pairs, notes
    pairs = {folder: pairs_beside(root, folder) for folder in _folders(root)}
    lonely = [photo for folder in sorted(pairs) if pairs[folder] for photo in _without_mask(root, pairs[folder])]
    others: Counter[str] = sum((other_files(root / folder, PHOTO_SUFFIXES) for folder in pairs), Counter())
    return pairs, (*left_out("photo", "without a mask", lonely), *others_note(others))


def _index(layout: _Layout, description: Description, root: Path) -> DatasetIndex:
    folds = _folds(layout.classes, description, root)
    groups, group_notes = groups_of(root, description.groups, layout.ids)
    tests: frozenset[int] = frozenset()
    if layout.shared:
        tests = _test_images(layout, description, root, groups)
        tested = {groups[i] for i in tests} if groups else set()
        if apart := tested & {group for i, group in enumerate(groups) if i not in tests}:
            first = next(layout.ids[i] for i in sorted(tests) if groups[i] in apart)
            group_notes += (
                f"{description.val_images} takes some photos of {len(apart)} groups for tests and leaves others for "
                f"training (first: {first}): scores will be too good.",
            )
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
    notes = [*layout.notes, *group_notes]
    if not layout.shared and len(folds) < 3:
        notes.append("With two folds no classes are left for choosing a model: 'val' is empty.")
    return DatasetIndex(
        name="folder",
        classes=layout.classes,
        images=layout.ids,
        splits=splits,
        query_order="list",
        has_ignore=layout.has_ignore,
        groups=groups,
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


def _test_images(layout: _Layout, description: Description, root: Path, groups: Sequence[int]) -> frozenset[int]:
    if isinstance(description.val_images, str):
        return _listed_in(root / description.val_images, layout.ids)
    names = [image_id.encode("utf-8", "surrogateescape") for image_id in layout.ids]
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i]).digest())
    images: dict[int, list[int]] = {class_id: [] for class_id in layout.classes}
    for i in order:
        for class_id in layout.listed[i]:
            images[class_id].append(i)
    tests: set[int] = set()
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    for class_id in sorted(images, key=lambda c: (len(images[c]), c)):
        wanted = max(2, math.ceil(description.val_images * len(images[class_id])))
        others = [i for i in images[class_id] if i not in tests]
        there = len(images[class_id]) - len(others)
        if not groups:
            tests.update(others[: max(0, wanted - there)])
            continue
        for i in others:  # a group comes whole
            if len(tests.intersection(images[class_id])) >= wanted:
                break
            tests.update(members[groups[i]])
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
