"""dataset.yaml of a folder of own photos, every key checked. What the keys mean: pipeline.datasets.folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from hsnet.errors import DataError
from pipeline.datasets.folder_files import is_pattern
from pipeline.datasets.index import MAX_CLASS_ID, image_id_problem
from pipeline.datasets.listing import MIN_OBJECT_SHARE
from pipeline.datasets.mask_values import MaskValues, colour_code

NONE = "none"
"""`background` of masks in which every pixel is of a class."""
LAYOUTS = ("masks", "classes", "coco")
MAX_BYTES = 1_000_000
MAX_BRACKETS = 200
"""The YAML scanner takes time with the square of their nesting: 5000 took 11 s."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What dataset.yaml says, checked. A key that is not there has its default."""

    layout: str | None = None
    images: str | tuple[str, ...] = "images"
    masks: str | tuple[str, ...] = "masks"
    annotations: str = "annotations.json"
    classes: Mapping[int, str] | None = None
    """Mask value -> name; values of a list count from 1, or from 0 where 0 is not the background."""
    folds: int | tuple[tuple[str, ...], ...] | None = None
    val_images: float | str = 0.2
    ignore: bool = True
    min_object_share: float = MIN_OBJECT_SHARE
    background: tuple[int | str, ...] | None = None
    """Mask values or colours; () where every pixel is of a class; None: 0, or black where there are colours."""
    void: tuple[int | str, ...] = ()
    colours: Mapping[str, int] | None = None
    """Class name -> 0xRRGGBB."""
    groups: str | None = None

    @property
    def image_folders(self) -> tuple[str, ...]:
        """The folders of the photos, where `images` is no pattern."""
        return (self.images,) if isinstance(self.images, str) else self.images

    @property
    def mask_folders(self) -> tuple[str, ...]:
        """The folders of the masks, where `masks` is no pattern."""
        return (self.masks,) if isinstance(self.masks, str) else self.masks

    def mask_values(self) -> MaskValues:
        """How masks are to be read."""
        if self.colours is None:
            numbers = (0,) if self.background is None else self.background
            return MaskValues(_numbers(numbers), _numbers(self.void), None, self.ignore)
        background, void = self.background, _codes(self.void)
        if background is None:  # black, unless it means something else
            background = () if 0 in self.colours.values() or 0 in void else ("#000000",)
        return MaskValues(_codes(background), void, self.colours, False)


def read_description(path: Path) -> Description:
    """The description in a file; all defaults if there is no file.

    Raises:
        DataError: not YAML, an unknown key, or a value that cannot be.
    """
    if not path.is_file():
        return Description()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} has more than {MAX_BYTES} bytes; a description is a few lines.")
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > MAX_BRACKETS:
            raise DataError(f"{path} has more than {MAX_BRACKETS} opening brackets; a description has one per fold.")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise DataError(f"{path} uses aliases (*name), which a description does not need.")
        raw = yaml.safe_load(text)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} is not readable YAML: {error}.") from error
    if raw is None:
        return Description()
    if not isinstance(raw, dict):
        raise DataError(f"{path} must hold 'key: value' lines.")
    known = [f.name for f in fields(Description)]
    odd = [key for key in raw if key not in known]
    if odd:
        raise DataError(f"{path}: unknown key {str(odd[0])[:60]!r}; keys are {', '.join(known)}.")
    description = Description(**{key: _read(path, key, value) for key, value in raw.items()})
    _require_consistent(path, description, raw)
    return description


def _require_consistent(path: Path, description: Description, raw: Mapping[str, object]) -> None:
    """Keys that contradict each other. Raises DataError."""
    background, void, colours = description.background, description.void, description.colours
    if colours is not None and description.classes is not None:
        raise DataError(f"{path}: `colours` names the classes: leave out `classes`.")
    meant = [*(background or ()), *void]
    if any(isinstance(value, int) == (colours is not None) for value in meant):
        wanted = "'#rrggbb', because classes are colours" if colours is not None else "numbers, or name `colours`"
        raise DataError(f"{path}: background and void must be {wanted}; got {', '.join(map(str, meant))}.")
    if both := set(meant) & (set() if background is None else set(background)) & set(void):
        raise DataError(f"{path}: {sorted(map(str, both))[0]} cannot be both background and void.")
    if colours is not None:
        codes = set(colours.values())
        if clash := codes & {*_codes(meant)}:
            raise DataError(f"{path}: #{min(clash):06x} is a class and background or void.")
    if description.classes is not None:
        values = description.mask_values()
        listed = isinstance(raw["classes"], list)
        if listed and values.shift:  # the first of the list is mask value 0
            named = {value - 1: name for value, name in description.classes.items()}
            object.__setattr__(description, "classes", named)
        elif 0 in description.classes and 0 in values.background:
            raise DataError(
                f"{path}: `classes` names the mask value 0, which is the background. Write `background: none` if every "
                f"pixel is of a class, or `background: N` if it is another value; else leave 0 out."
            )
        if clash := set(description.classes) & {*_numbers(meant)}:
            raise DataError(f"{path}: mask value {min(clash)} is a class and background or void.")
    patterns = [is_pattern(folder) for folder in (description.images, description.masks)]
    if patterns[0] != patterns[1] and ("masks" in raw or patterns[0]) and description.layout != "coco":
        raise DataError(f"{path}: images and masks must both be folders, or both be patterns with {{name}}.")
    if len(description.image_folders) != len(description.mask_folders) and description.layout != "coco":
        raise DataError(
            f"{path}: {len(description.image_folders)} folders of images need as many of masks, in the same order; "
            f"got {len(description.mask_folders)}."
        )


def _numbers(values: Sequence[int | str]) -> tuple[int, ...]:
    return tuple(value for value in values if isinstance(value, int))


def _codes(values: Sequence[int | str]) -> tuple[int, ...]:
    return tuple(code for value in values if isinstance(value, str) and (code := colour_code(value)) is not None)


def _read(path: Path, key: str, value: object) -> Any:
    read, wanted = _KEYS[key]
    result = read(value)
    if result is None or (value is None and key != "background"):
        raise DataError(f"{path}: {key} must be {wanted}.")
    return result


def _inside(value: object) -> str | None:
    return None if image_id_problem(value) else str(value)


def _classes(value: object) -> dict[int, str] | None:
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value, 1)) if isinstance(value, list) else []
    )
    names = [name for _, name in items]
    whole = all(type(v) is int and 0 <= v <= MAX_CLASS_ID for v, _ in items)
    return dict(sorted(items)) if items and whole and _are_names(names) and len(set(names)) == len(names) else None


def _places(value: object) -> str | tuple[str, ...] | None:
    if isinstance(value, list):
        paths = [_inside(one) for one in value]
        known = [path for path in paths if path is not None and not is_pattern(path)]
        return tuple(known) if known and len(set(known)) == len(paths) else None
    return _inside(value)


def _values(value: object) -> tuple[int | str, ...] | None:
    """Mask values or colours, one or a list."""
    some = value if isinstance(value, list) else [value]
    good = [
        one
        for one in some
        if (type(one) is int and 0 <= one <= MAX_CLASS_ID + 1)
        or (isinstance(one, str) and colour_code(one) is not None)
    ]
    return tuple(dict.fromkeys(good)) if some and len(good) == len(some) else None


def _background(value: object) -> tuple[int | str, ...] | None:
    return () if value == NONE or value is None else _values(value)


def _colours(value: object) -> dict[str, int] | None:
    if not isinstance(value, dict) or not value or not _are_names(list(value)):
        return None
    codes = {name: colour_code(colour) for name, colour in value.items() if isinstance(colour, str)}
    known = {name: code for name, code in codes.items() if code is not None}
    return known if len(known) == len(value) == len(set(known.values())) else None


def _groups(value: object) -> str | None:
    if not isinstance(value, str) or not value:
        return None
    if value.endswith(".csv"):
        return _inside(value)
    try:
        return value if re.compile(value).groups == 1 else None
    except re.error:
        return None


def _folds(value: object) -> int | tuple[tuple[str, ...], ...] | None:
    if type(value) is int and value >= 2:
        return value
    if isinstance(value, list) and value and all(isinstance(f, list) and f and _are_names(f) for f in value):
        return tuple(tuple(dict.fromkeys(fold)) for fold in value)
    return None


def _val_images(value: object) -> float | str | None:
    return _inside(value) if isinstance(value, str) else _share(value) or None


def _share(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 <= value < 1 else None


def _are_names(names: list[Any]) -> bool:
    return all(isinstance(name, str) and name for name in names)


_PATH = "a path inside the folder, with forward slashes"
_PLACES = f"{_PATH}; a list of them; or a pattern with {{name}} such as 'left/{{name}}_photo.png'"
_KEYS: dict[str, tuple[Callable[[Any], object], str]] = {
    "layout": (lambda value: value if value in LAYOUTS else None, f"one of {', '.join(LAYOUTS)}"),
    "images": (_places, _PLACES),
    "masks": (_places, _PLACES),
    "annotations": (_inside, _PATH),
    "classes": (_classes, "a list of different names, or {mask value: name}"),
    "folds": (_folds, "a number from 2, or a list with the held-out class names of each fold"),
    "val_images": (_val_images, "a share above 0 and below 1, or a text file with one image a line"),
    "ignore": (lambda value: value if isinstance(value, bool) else None, "true or false"),
    "min_object_share": (_share, "a share from 0 to below 1"),
    "background": (_background, "none, a mask value or colour '#rrggbb', or a list of them"),
    "void": (_values, "a mask value or colour '#rrggbb', or a list of them"),
    "colours": (_colours, "{name: '#rrggbb'} with different colours; quote them, YAML takes # for a comment"),
    "groups": (_groups, "a regular expression with one (group), or a .csv file with the columns image and group"),
}
"""Key -> what reads its value, None if it cannot be one, and what it must be."""
