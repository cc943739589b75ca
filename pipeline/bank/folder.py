"""A bank on disk: annotated photos with their masks and kept features, to be used again, added to and corrected.

BANK/
├── bank.json              format, the reading of the features, the classes in their order
└── photos/ID/             ID: the first 16 hex digits of the photo file's sha256
    ├── item.json          what is known of the photo; names the files beside it
    ├── photo.jpg          the photo's own bytes, under the suffix it came with
    ├── mask-DIGEST.png    1 bit a pixel, one per class; of the photo's size as viewers show it
    └── features-DIGEST.safetensors   the network's levels as float16, DIGEST of the reading; made when first needed

Whatever is added is whole before `item.json`, replaced at once, names it: a killed writer leaves the bank as it was.
One process writes at a time; readers need no lock.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError

from hsnet.errors import ConfigError, DataError, HSNetError
from pipeline.annotations.item import Annotation
from pipeline.bank.heads import Example
from pipeline.bank.reading import Features, Reader, Reading, load_levels, save_levels
from pipeline.common.fields import from_json
from pipeline.common.files import read_json, replace_json, whole, whole_folder
from pipeline.common.lock import sole_writer
from pipeline.datasets.images import read_image, read_photo
from pipeline.features.recipe import Recipe

log = logging.getLogger(__name__)

FORMAT = 1
BANK, ITEM, PHOTOS = "bank.json", "item.json", "photos"
LONGEST_NAME = 100
"""Characters of a class's name."""


@dataclass(frozen=True)
class Item:
    """What is known of one photo of a bank; file names are of files beside it."""

    name: str
    """Of the photo file that was added."""
    file: str
    height: int
    width: int
    """Pixels, as viewers show the photo."""
    masks: Mapping[str, str] = field(default_factory=dict)
    """Class -> file of its mask."""
    absent: tuple[str, ...] = ()
    """Classes known not to be in the photo."""
    ignore: str | None = None
    """File of the pixels of which nothing is known."""

    def __post_init__(self) -> None:
        files = [self.file, *self.masks.values(), *([] if self.ignore is None else [self.ignore])]
        if not all(re.fullmatch(r"[\w-]+\.[a-z0-9]+", file, re.ASCII) for file in files):
            raise DataError(f"An item of a bank names files that no bank writes: {', '.join(map(repr, files))}.")


@dataclass(frozen=True)
class BankPhoto:
    """A photo in a bank."""

    folder: Path
    item: Item

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def path(self) -> Path:
        """The photo file."""
        return self.folder / self.item.file

    def read(self) -> Image.Image:
        """RGB, turned as viewers show it. Raises DataError."""
        return read_photo(self.path)

    def mask(self, name: str) -> NDArray[np.bool_] | None:
        """(H, W) of a class; None if it is not marked here. Raises DataError if the file is damaged."""
        file = self.item.masks.get(name)
        return None if file is None else self._layer(file)

    def ignore(self) -> NDArray[np.bool_] | None:
        """(H, W), true where nothing is known; None if something is known everywhere."""
        return None if self.item.ignore is None else self._layer(self.item.ignore)

    def _layer(self, file: str) -> NDArray[np.bool_]:
        layer = np.asarray(read_image(self.folder / file))[..., 0] > 0
        if layer.shape != (self.item.height, self.item.width):
            raise DataError(
                f"{self.folder / file} has {layer.shape[1]} x {layer.shape[0]} pixels, its photo {self.item.width} x "
                f"{self.item.height}. Remove the photo from the bank and add it again."
            )
        return layer

    def knows(self, name: str) -> bool:
        """Whether it is known if the class is in the photo."""
        return name in self.item.masks or name in self.item.absent

    def features(self, reader: Reader) -> Features:
        """Those of the reader's reading: kept ones, or made now and kept."""
        path = self.folder / f"features-{reader.reading.digest}.safetensors"
        size = (self.item.height, self.item.width)
        tiles = reader.reading.plan(size)
        device = reader.network.device
        if not path.exists():
            levels = [level.half() for level in reader.read(self.read()).levels]
            try:
                save_levels(path, levels)
            except OSError as error:
                log.warning("Features of %s cannot be kept: %s", self.item.name, error)
                return Features(size, tiles, [level.float() for level in levels])
        try:
            found = [level.float().to(device) for level in load_levels(path)]
            shapes = [tuple(level.shape[1:]) for level in found]
            wanted = [tuple(shape) for shape in reader.reading.recipe.level_shapes()]
            if shapes != wanted or any(len(level) != len(tiles) for level in found):
                raise ValueError(f"levels {shapes} of {len(found[0])} tiles instead of {wanted} of {len(tiles)}")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}). Delete it: it is made again.") from error
        return Features(size, tiles, found)


@dataclass(frozen=True)
class Added:
    """What adding a photo did."""

    photo: BankPhoto
    new: bool
    """Whether the photo was not in the bank before."""
    changed: tuple[str, ...]
    """Classes whose knowledge is new or another than before."""


class Bank:
    """An open bank.

    Raises:
        DataError: there is none, or it is damaged.
        ConfigError: it was made by a later version.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        if not (root / BANK).is_file():
            raise DataError(f"{root} is no bank: it holds no {BANK}. `hsnet bank new {root}` makes one.")
        values = read_json(root / BANK)
        if values.get("format") != FORMAT:
            raise ConfigError(f"{root} is a bank of format {values.get('format')!r}; this version reads {FORMAT}.")
        try:
            self.reading = Reading(Recipe.from_dict(values["recipe"]), _tile(values["tile"]))
            self.classes: tuple[str, ...] = tuple(map(_class_name, values["classes"]))
        except (HSNetError, KeyError, TypeError) as error:
            raise DataError(f"{root / BANK} is damaged: {error}") from error

    @classmethod
    def create(cls, root: Path, reading: Reading) -> Bank:
        """Make an empty bank.

        Raises:
            DataError: something is at `root` already.
        """
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise DataError(f"{root} is there already and not empty. Choose another name. Nothing was written.")
        root.parent.mkdir(parents=True, exist_ok=True)

        def fill(folder: Path) -> None:
            (folder / PHOTOS).mkdir()
            replace_json(folder / BANK, _header(reading, ()))

        _new_folder(root, fill)
        return cls(root)

    @cached_property
    def _photos(self) -> Path:
        return self.root / PHOTOS

    def photos(self) -> tuple[BankPhoto, ...]:
        """All photos, by their names. Raises DataError for one that is damaged."""
        found = []
        for folder in sorted(path for path in self._photos.iterdir() if re.fullmatch(r"[0-9a-f]{16}", path.name)):
            try:
                found.append(BankPhoto(folder, from_json(Item, read_json(folder / ITEM), f"{folder / ITEM}")))
            except HSNetError as error:
                raise DataError(f"{folder} is damaged: {error} Delete this folder and add the photo again.") from error
        return tuple(sorted(found, key=lambda photo: (photo.item.name, photo.id)))

    def find(self, name: str) -> BankPhoto:
        """The photo of an id, or of a file name that only one photo has. Raises DataError."""
        found = [photo for photo in self.photos() if name in (photo.id, photo.item.name)]
        if len(found) != 1:
            what = "no photo" if not found else f"{len(found)} photos: {', '.join(photo.id for photo in found)}"
            raise DataError(f"'{name}' names {what} of {self.root}. Give an id of `hsnet bank show`.")
        return found[0]

    def of_class(self, name: str) -> tuple[list[BankPhoto], list[BankPhoto]]:
        """Photos that show a class, and photos known not to.

        Raises:
            DataError: no such class.
        """
        if name not in self.classes:
            raise DataError(f"{self.root} has no class '{name}'. It has {', '.join(self.classes) or 'none yet'}.")
        photos = self.photos()
        return (
            [photo for photo in photos if name in photo.item.masks],
            [photo for photo in photos if name in photo.item.absent],
        )

    def examples(self, name: str, reader: Reader) -> tuple[list[BankPhoto], list[Example]]:
        """Photos of which it is known whether they show a class, those that do first, and the same as examples."""
        shown, absent = self.of_class(name)
        photos = [*shown, *absent]
        return photos, [Example(photo.features(reader), photo.mask(name), photo.ignore()) for photo in photos]

    def add(self, annotation: Annotation, *, replace_masks: bool = False) -> Added:
        """Add a photo, or what is newly known of one that is there.

        Args:
            annotation: a mask of every class that was marked, and what is known to be absent.
            replace_masks: whether a class may get another mask than it has.

        Raises:
            DataError: the photo cannot be read; a mask has another size; a class has another mask already.
            StoreError: another process writes the bank.
        """
        data = _read_bytes(annotation.photo)
        photo = read_photo(annotation.photo)
        size = (photo.height, photo.width)
        if annotation.size not in (None, size):
            raise DataError(f"{annotation.photo} has {size[1]} x {size[0]} pixels, its masks have {annotation.size}.")
        names = [*map(_class_name, [*annotation.masks, *sorted(annotation.absent)])]
        folder = self._photos / hashlib.sha256(data).hexdigest()[:16]
        with self._writing():
            old = BankPhoto(folder, from_json(Item, read_json(folder / ITEM), str(folder))) if folder.exists() else None
            layers = {name: _png(mask) for name, mask in annotation.masks.items()}
            changed = self._changed(old, layers, annotation, replace_masks)
            masks = {} if old is None else dict(old.item.masks)
            masks = {name: file for name, file in masks.items() if name not in annotation.absent}
            masks |= {name: f"mask-{_digest(layer)}.png" for name, layer in layers.items()}
            known = set(annotation.absent) | (set() if old is None else set(old.item.absent))
            files = {masks[name]: layer for name, layer in layers.items()}
            ignore = None if old is None else old.item.ignore
            if annotation.ignore is not None and annotation.ignore.any():
                layer = _png(annotation.ignore)
                ignore = f"ignore-{_digest(layer)}.png"
                files[ignore] = layer
            name = annotation.photo.name if old is None else old.item.name
            file = f"photo{_suffix(annotation.photo)}" if old is None else old.item.file
            item = Item(name, file, *size, masks, tuple(sorted(known - set(masks))), ignore)
            if old is None:
                _new_folder(folder, lambda partial: _write(partial, {file: data, **files}, item))
            else:
                _write(folder, files, item)
                self._clear(folder, item)
            new = [one for one in dict.fromkeys(names) if one not in self.classes]
            if new:
                self._rewrite((*self.classes, *new))
        return Added(BankPhoto(folder, item), old is None, changed)

    def _changed(
        self, old: BankPhoto | None, layers: Mapping[str, bytes], annotation: Annotation, replace_masks: bool
    ) -> tuple[str, ...]:
        changed = []
        for name in (*layers, *sorted(annotation.absent)):
            if old is None or not old.knows(name):
                changed.append(name)
                continue
            file = old.item.masks.get(name)
            same = file == f"mask-{_digest(layers[name])}.png" if name in layers else file is None
            if not same and not replace_masks:
                said = "a mask" if file else "the word that it is absent"
                raise DataError(
                    f"{old.item.name} is in {self.root} with {said} of '{name}', and another one was given. Use "
                    f"--replace to take the new one. Nothing of this photo was changed."
                )
            if not same:
                changed.append(name)
        return tuple(changed)

    def forget(self, name: str, classes: Sequence[str] = ()) -> BankPhoto:
        """Remove a photo, or only what is known of some classes on it.

        Raises:
            DataError: no such photo, or nothing is known of the class there.
        """
        with self._writing():
            photo = self.find(name)
            odd = [one for one in classes if not photo.knows(one)]
            if odd:
                raise DataError(f"Nothing is known of '{odd[0]}' on {photo.item.name}. Nothing was changed.")
            masks = {one: file for one, file in photo.item.masks.items() if one not in classes}
            absent = tuple(one for one in photo.item.absent if one not in classes)
            if classes and (masks or absent):
                item = replace(photo.item, masks=masks, absent=absent)
                _write(photo.folder, {}, item)
                self._clear(photo.folder, item)
            else:
                gone = photo.folder.with_name(f".{photo.id}.gone")
                os.replace(photo.folder, gone)
                shutil.rmtree(gone)
            used = {one for left in self.photos() for one in (*left.item.masks, *left.item.absent)}
            if used != set(self.classes):
                self._rewrite(tuple(one for one in self.classes if one in used))
        return photo

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with sole_writer(self.root):
            self.classes = Bank(self.root).classes  # another process may have added some
            for left in self._photos.glob(".*.gone"):
                shutil.rmtree(left)
            yield

    def _rewrite(self, classes: tuple[str, ...]) -> None:
        replace_json(self.root / BANK, _header(self.reading, classes))
        self.classes = classes

    def _clear(self, folder: Path, item: Item) -> None:
        """Delete masks that nothing names any more."""
        used = {*item.masks.values(), item.ignore}
        for path in folder.glob("*.png"):
            if path.name not in used and path.name != item.file:
                path.unlink()


def _header(reading: Reading, classes: Sequence[str]) -> dict[str, object]:
    return {"format": FORMAT, "recipe": reading.recipe.to_dict(), "tile": reading.tile, "classes": list(classes)}


def _new_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that is there with all that fills it, or not at all."""
    with whole_folder(path) as partial:
        partial.mkdir()
        fill(partial)


def _write(folder: Path, files: Mapping[str, bytes], item: Item) -> None:
    for name, data in files.items():
        with whole(folder / name) as partial:
            partial.write_bytes(data)
    replace_json(folder / ITEM, json.loads(json.dumps(asdict(item))))


def _png(mask: NDArray[np.bool_]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.asarray(mask, bool)).save(data, "PNG", optimize=True)
    return data.getvalue()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else ".img"


def _class_name(name: object) -> str:
    if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
        raise DataError(f"A class needs a name of 1 to {LONGEST_NAME} printable characters, got {name!r}.")
    return name


def _tile(value: object) -> int | None:
    if value is not None and (type(value) is not int or not 1 <= value <= 1 << 16):
        raise DataError(f"a tile has 1 to 65,536 pixels a side, got {value!r}")
    return value
