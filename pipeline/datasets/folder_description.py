"""dataset.yaml of a folder of own photos, every key checked. What the keys mean: pipeline.datasets.folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from hsnet.errors import DataError
from pipeline.datasets.index import MAX_CLASS_ID, image_id_problem
from pipeline.datasets.listing import MIN_OBJECT_SHARE

LAYOUTS = ("masks", "classes", "coco")
MAX_BYTES = 1_000_000
MAX_BRACKETS = 200
"""The YAML scanner takes time with the square of their nesting: 5000 took 11 s."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What dataset.yaml says, checked. A key that is not there has its default."""

    layout: str | None = None
    images: str = "images"
    masks: str = "masks"
    annotations: str = "annotations.json"
    classes: Mapping[int, str] | None = None
    """Mask value -> name; values of a list count from 1."""
    folds: int | tuple[tuple[str, ...], ...] | None = None
    val_images: float | str = 0.2
    ignore: bool = True
    min_object_share: float = MIN_OBJECT_SHARE


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
    return Description(**{key: _read(path, key, value) for key, value in raw.items()})


def _read(path: Path, key: str, value: object) -> Any:
    read, wanted = _KEYS[key]
    result = read(value)
    if result is None:
        raise DataError(f"{path}: {key} must be {wanted}.")
    return result


def _inside(value: object) -> str | None:
    return None if image_id_problem(value) else str(value)


def _classes(value: object) -> dict[int, str] | None:
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value, 1)) if isinstance(value, list) else []
    )
    names = [name for _, name in items]
    whole = all(type(v) is int and 1 <= v <= MAX_CLASS_ID + 1 for v, _ in items)
    return dict(sorted(items)) if items and whole and _are_names(names) and len(set(names)) == len(names) else None


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
_KEYS: dict[str, tuple[Callable[[Any], object], str]] = {
    "layout": (lambda value: value if value in LAYOUTS else None, f"one of {', '.join(LAYOUTS)}"),
    "images": (_inside, _PATH),
    "masks": (_inside, _PATH),
    "annotations": (_inside, _PATH),
    "classes": (_classes, "a list of different names, or {mask value from 1: name}"),
    "folds": (_folds, "a number from 2, or a list with the held-out class names of each fold"),
    "val_images": (_val_images, "a share above 0 and below 1, or a text file with one image a line"),
    "ignore": (lambda value: value if isinstance(value, bool) else None, "true or false"),
    "min_object_share": (_share, "a share from 0 to below 1"),
}
"""Key -> what reads its value, None if it cannot be one, and what it must be."""
