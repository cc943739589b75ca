"""Masks that are picture files: pairs as given, class folders, and one map or one picture per class for each photo.

    folder   CLASS/NAME.jpg with CLASS/NAME.png (or NAME_mask.png): one object, unknown whether other classes are there
    masks    images/**/NAME.jpg with masks/**/NAME.png: class numbers or colours, all classes of a table in one map,
             or with masks/CLASS/**/NAME.png: one object each
    both     _absent/CLASS/NAME.jpg: photos that do not show the class

What counts as the object in a mask of one object: `pipeline.datasets.own_support`. One without an object says that the
class is absent; for a pair it is an error. In a map a class of the table without a pixel is absent, and 255 beside
class numbers up to 90 is a boundary: ignored. masks/classes.json may hold the table, {"classes": {"1": "car"}}, and
the photos whose names differ from their masks', {"photos": {"NAME.png": "sub/photo.jpg"}}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import ConfigError, DataError
from pipeline.annotations.item import IGNORE, Mask
from pipeline.annotations.photos import PhotoFinder, list_photos, read_bytes
from pipeline.annotations.shapes import Entry, Shape, Source
from pipeline.datasets.folder import pairs_beside
from pipeline.datasets.images import open_image, read_index_mask
from pipeline.datasets.own_support import parse_support, read_mask

NAMES = "classes.json"
ABSENT = "_absent"
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_FLAT = 256
"""Colours of a mask that was drawn with flat ones; a photo or JPEG has more."""
_FEW, _DARK, _COVERS = 16, 64, 0.01
"""Colours of a mask without soft edges; brightness below which a hue is noise; share from which a colour counts."""
_HIGHEST_CLASS = 90  # as in own_support: with larger values, 255 is a value like others
_BOUNDARY = (255, 65535)


def open_pairs(pairs: Sequence[str], name: str, classes: Mapping[str, str] | None) -> Source:
    """See `pipeline.annotations.read.read_pairs`."""
    table = None if classes is None else table_of(classes)
    layers: dict[Path, dict[str, Path]] = {}
    shapes: dict[Path, list[Callable[[], list[Shape]]]] = {}
    absent: dict[Path, frozenset[str]] = {}
    photos: dict[Path, Path] = {}
    for text in pairs:
        photo, mask, choice = parse_pair(text)
        key = photo.resolve()
        photos.setdefault(key, photo)
        mine = table if choice is None else {choice: name}
        for target in [name] if mine is None else [one for one in dict.fromkeys(mine.values()) if one != IGNORE]:
            if target in layers.setdefault(key, {}):
                raise DataError(
                    f"{photo} has two masks for '{target}', {layers[key][target]} and {mask}. Keep one, or paint both "
                    f"into one file."
                )
            layers[key][target] = mask
        if mine is None:
            shapes.setdefault(key, []).append(partial(_single, mask, name, must=True))
        else:
            shapes.setdefault(key, []).append(partial(_mapped, mask, mine, must=choice is not None))
        if choice is None and mine is not None:
            absent[key] = absent.get(key, frozenset()) | set(mine.values())
    entries = [
        Entry(
            photo,
            next(iter(layers[key].values()), None),
            partial(_all, shapes[key]),
            exhaustive=False,
            absent=absent.get(key, frozenset()),
        )
        for key, photo in photos.items()
    ]
    names = dict.fromkeys(target for mine in layers.values() for target in mine) | dict.fromkeys(
        [IGNORE] if table and IGNORE in table.values() else []
    )
    return Source(Path("the given pairs"), "pairs", tuple(names), entries)


def parse_pair(text: str) -> tuple[Path, Path, str | None]:
    """Split PHOTO:MASK, PHOTO:MASK:8 or PHOTO:MASK:#ff0000 into two existing files and the choice.

    Raises:
        ConfigError: there is no such split; says which file is missing.
    """
    try:
        return (*parse_support(text), None)
    except ConfigError:
        before, _, choice = text.rpartition(":")
        chosen = choice.strip().lower()
        if ":" not in before or not (_COLOUR.fullmatch(chosen) or re.fullmatch("[0-9]{1,5}", chosen)):
            raise
        return (*parse_support(before), chosen if chosen.startswith("#") else str(int(chosen)))


def open_folder(path: Path) -> Source:
    """Class folders with masks beside the photos. Raises DataError if there is none."""
    folders = class_folders(path)
    if not folders and not (path / ABSENT).is_dir():
        raise DataError(f"{path} has no folder of a class with photos and masks (.png) of the same names.")
    entries, lonely = [], 0
    for folder, pairs in folders.items():
        for photo, mask in pairs:
            entries.append(_one_class(path / photo, {folder: path / mask}))
        used = {file for pair in pairs for file in pair}
        lonely += sum(
            f"{folder}/{file.name}" not in used for file in list_photos(path / folder) if file.parent == path / folder
        )
    negatives = _negatives(path)
    notes = (f"Left out {lonely} pictures that are neither a photo with a mask nor a mask.",) if lonely else ()
    return Source(
        path, "folder", tuple(dict.fromkeys([*folders, *_names_of(negatives)])), [*entries, *negatives], notes
    )


def class_folders(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Folder name -> (photo, mask) in it, relative to `path`, for folders that have any."""
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != ABSENT)
    return {name: pairs for name in names if (pairs := pairs_beside(path, name))}


def open_masks(path: Path, photos: Path | None, classes: Mapping[str, str] | None) -> Source:
    """Masks in a folder of their own. Raises DataError, ConfigError."""
    masks = path / "masks" if (path / "masks").is_dir() else path
    images = photos if photos is not None else (path / "images" if (path / "images").is_dir() else path)
    names, photo_of = _described(masks / NAMES)
    files = [file for file in list_photos(masks) if file.suffix.lower() == ".png"]
    finder = _Masked(masks, images, photo_of)
    wanted = {str(name).lower() for name in classes or ()}
    valued = bool(wanted) and all(name.isdigit() or _COLOUR.fullmatch(name) for name in wanted)
    if names or valued or any(file.parent == masks for file in files):
        table = names if names else table_of(dict.fromkeys(wanted, ""))
        if not table:
            raise _no_table(files[0])
        labels = table if names else {value: value for value in table}
        entries = []
        for file in files:
            photo = finder.find(file.relative_to(masks).as_posix())
            if photo is not None:
                shapes = partial(_mapped, file, labels, must=False)
                entries.append(Entry(photo, file, shapes, exhaustive=False, absent=frozenset(labels.values())))
        found = list(dict.fromkeys(labels.values()))
    else:
        by_photo: dict[Path, dict[str, Path]] = {}
        for file in files:
            folder, _, name = file.relative_to(masks).as_posix().partition("/")
            photo = finder.find(name)
            if photo is not None:
                by_photo.setdefault(photo, {})[unquote(folder)] = file
        entries = [_one_class(photo, layers) for photo, layers in by_photo.items()]
        found = sorted({name for layers in by_photo.values() for name in layers})
    finder.require_all()
    negatives = _negatives(path)
    return Source(path, "masks", tuple(dict.fromkeys([*found, *_names_of(negatives)])), [*entries, *negatives])


def table_of(classes: Mapping[str, str]) -> dict[str, str]:
    """Values ("8") or colours ("#ff0000", any case) -> names. Raises ConfigError if a key is neither, or both occur."""
    table = {str(key).strip().lower(): name for key, name in classes.items()}
    kinds = {"colour" if _COLOUR.fullmatch(key) else "number" if key.isdigit() else key for key in table}
    odd = kinds - {"colour", "number"}
    if odd:
        raise ConfigError(f"'{min(odd)}' is neither a value of a mask (8) nor a colour (#ff0000).")
    if len(kinds) > 1:
        raise ConfigError(f"A mask holds numbers or colours, not both: {', '.join(table)}.")
    return {key if key.startswith("#") else str(int(key)): name for key, name in table.items()}


def colours_of(path: Path) -> list[tuple[str, float]]:
    """Colours of a mask ("#rrggbb") with their shares, the commonest first; transparent pixels are left out."""
    packed = _packed(path)
    colours, counts = np.unique(packed[packed >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(f"#{int(colours[i]):06x}", float(counts[i]) / packed.size) for i in order]


class _Masked:
    """Photos of masks, by the same relative path without suffix, or as classes.json says."""

    def __init__(self, masks: Path, images: Path, photo_of: Mapping[str, str]) -> None:
        self.masks, self.images, self.photo_of = masks, images, photo_of
        self.finder = PhotoFinder(masks, [images])
        self.by_stem: dict[str, list[Path]] = {}
        for photo in list_photos(images):
            if not photo.is_relative_to(masks) or masks == images:
                stem = photo.relative_to(images).with_suffix("").as_posix()
                self.by_stem.setdefault(stem, []).append(photo)

    def find(self, mask: str) -> Path | None:
        """`mask`: path of the mask below the folder that stands for `images`."""
        if mask in self.photo_of:
            return self.finder.find(self.photo_of[mask])
        found = [photo for photo in self.by_stem.get(mask.rpartition(".")[0], []) if photo != self.masks / mask]
        if len(found) > 1:
            raise DataError(f"The mask {mask} in {self.masks} belongs to {found[0]} or {found[1]}: rename one of them.")
        return found[0] if found else self.finder.find(mask.rpartition(".")[0] + ".jpg")

    def require_all(self) -> None:
        self.finder.require_all()


def _described(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(value or colour -> class, mask -> photo) of a classes.json; both empty if there is none."""
    if not path.is_file():
        return {}, {}
    try:
        raw = json.loads(read_bytes(path))
        names, photos = raw.get("classes", {}), raw.get("photos", {})
        if not all(isinstance(text, str) for text in [*names.values(), *photos.values()]):
            raise ValueError("names must be texts")
        return table_of(names), dict(photos)
    except (ValueError, AttributeError, RecursionError, ConfigError) as error:
        raise DataError(f'{path} is no table of classes {{"classes": {{"1": "car"}}}}: {error}.') from error


def _negatives(path: Path) -> list[Entry]:
    folders = sorted(p for p in (path / ABSENT).iterdir() if p.is_dir()) if (path / ABSENT).is_dir() else []
    return [
        Entry(photo, None, tuple, exhaustive=False, absent=frozenset([folder.name]))
        for folder in folders
        for photo in list_photos(folder)
    ]


def _names_of(entries: Iterable[Entry]) -> list[str]:
    return sorted({name for entry in entries for name in entry.absent})


def _one_class(photo: Path, layers: Mapping[str, Path]) -> Entry:
    shapes = [partial(_single, mask, name, must=False) for name, mask in layers.items()]
    size = next(iter(layers.values()))
    return Entry(photo, size, partial(_all, shapes), exhaustive=False, absent=frozenset(layers))


def _all(readers: Iterable[Callable[[], list[Shape]]]) -> list[Shape]:
    return [shape for reader in readers for shape in reader()]


def _single(path: Path, label: str, must: bool) -> list[Shape]:
    """The object of a mask; nothing if it marks none."""
    _require_one_colour(path)
    mask = read_mask(path)
    if not mask.any():
        if must:
            raise DataError(f"The mask {path} marks no object: all its pixels count as background.")
        return []
    return [_shape(label, path, mask)]


def _mapped(path: Path, table: Mapping[str, str], must: bool) -> list[Shape]:
    """What a map of values or colours holds of a table."""
    shapes = []
    values, texts = _values(path, table)
    for text, label in table.items():
        mask = values == (int(text[1:], 16) if text.startswith("#") else int(text))
        if mask.any():
            shapes.append(_shape(label, path, mask))
        elif must:
            raise DataError(f"The mask {path} has no pixel of {text}; it has {texts}.")
    if not next(iter(table)).startswith("#"):
        used = np.unique(values)
        others = used[~np.isin(used, (0, *_BOUNDARY))]
        for boundary in set(used.tolist()) & set(_BOUNDARY) - {int(text) for text in table}:
            if len(others) and others[-1] <= _HIGHEST_CLASS:
                shapes.append(Shape(IGNORE, str(path), _drawn(path, values == boundary), sure=False))
    return shapes


def _values(path: Path, table: Mapping[str, str]) -> tuple[NDArray[np.int64], str]:
    """One number per pixel, and which there are, for messages."""
    if next(iter(table)).startswith("#"):
        colours = colours_of(path)
        if len(colours) > _FLAT:
            raise DataError(
                f"{path} has {len(colours):,} colours: no mask of flat colours. JPEG blurs them; save masks as PNG."
            )
        return _packed(path), _few(colours)
    with open_image(path) as picture:
        coloured = picture.mode not in ("1", "L", "P", "LA") and not picture.mode.startswith("I")
    if coloured and len(_tinted(path)) > 0:
        raise DataError(
            f"{path} is a mask of colours, and a number was asked for. Choose a colour; it has "
            f"{_few(colours_of(path))}."
        )
    values = read_index_mask(path).astype(np.int64)
    return values, ", ".join(map(str, np.unique(values)[:20]))


def _require_one_colour(path: Path) -> None:
    """Raises DataError if a mask of one object has several colours: it would silently become their union."""
    with open_image(path) as picture:
        if picture.mode in ("1", "L", "LA", "P", "PA", "F") or picture.mode.startswith("I"):
            return
    colours = colours_of(path)
    if len(_hues(colours)) < 2:
        return
    flat = len(colours) <= _FLAT and path.suffix.lower() not in (".jpg", ".jpeg")
    hint = f"Say which is the object, as {path}:{_tinted(path)[0]}, or give" if flat else "Save it as PNG, and give"
    raise DataError(f"The mask {path} has several colours: {_few(colours)}. {hint} a table of colours and classes.")


def _hues(colours: Sequence[tuple[str, float]]) -> set[tuple[int, ...]]:
    """Colours that differ by more than their brightness: soft edges have many shades of one. Black is none of them.

    In a mask of few colours, shades that cover something are colours of their own, too (VOC's 128 0 0 and 192 0 0).
    """
    hues: dict[tuple[int, ...], float] = {}
    few = len(colours) <= _FEW
    for colour, share in colours:
        channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        brightest = int(channels.max())
        if brightest < (1 if few else _DARK):
            continue
        hue = tuple(np.rint(channels / brightest * 3).astype(int).tolist())
        shade = (brightest,) if few and share >= _COVERS and len(set(hue)) > 1 else ()
        hues[hue + shade] = hues.get(hue + shade, 0.0) + share
    return set(hues) if few else {hue for hue, share in hues.items() if share >= _COVERS}


def _tinted(path: Path) -> list[str]:
    """Colours that are not grey, the commonest first."""
    return [colour for colour, _ in colours_of(path) if not colour[1:3] == colour[3:5] == colour[5:7]]


def _no_table(path: Path) -> DataError:
    if _tinted(path):
        seen = f"colours {_few(colours_of(path))}"
    else:
        seen = f"values {', '.join(map(str, np.unique(read_index_mask(path))[:20]))}"
    return DataError(
        f"The masks in {path.parent} hold several classes in one map, and nothing says which is which: {path.name} has "
        f'the {seen}. Give a table of classes, or put it there as {NAMES}: {{"classes": {{"1": "car"}}}}.'
    )


def _packed(path: Path) -> NDArray[np.int64]:
    """0xrrggbb per pixel; -1 where it is transparent."""
    with open_image(path) as picture:
        layers = np.asarray(picture.convert("RGBA"), np.int64)
    packed: NDArray[np.int64] = layers[..., 0] << 16 | layers[..., 1] << 8 | layers[..., 2]
    return np.where(layers[..., 3] >= 128, packed, -1)


def _few(colours: Sequence[tuple[str, float]]) -> str:
    texts = [f"{colour} ({share:.1%})" for colour, share in colours[:8]]
    return ", ".join(texts) + (", ..." if len(colours) > 8 else "")


def _shape(label: str, path: Path, mask: Mask) -> Shape:
    return Shape(label, str(path), _drawn(path, mask))


def _drawn(path: Path, mask: Mask) -> Callable[[int, int], tuple[int, int, Mask]]:
    def draw(height: int, width: int) -> tuple[int, int, Mask]:
        if mask.shape != (height, width):
            raise DataError(
                f"{path} is {mask.shape[1]} x {mask.shape[0]} pixels (width x height), the other masks of its photo "
                f"are {width} x {height}."
            )
        return 0, 0, mask

    return draw
