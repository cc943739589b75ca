"""dataset.yaml of a folder of own photos, every key checked. What the keys mean: pipeline.datasets.folder."""

from __future__ import annotations

from collections.abc import Mapping
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
    return Description(**{key: _CHECKS[key](path, key, value) for key, value in raw.items()})


def _layout(path: Path, key: str, value: object) -> str:
    if value not in LAYOUTS:
        raise _wrong(path, key, f"one of {', '.join(LAYOUTS)}")
    return str(value)


def _inside(path: Path, key: str, value: object) -> str:
    if image_id_problem(value):
        raise _wrong(path, key, "a path inside the folder, with forward slashes")
    return str(value)


def _classes(path: Path, key: str, value: object) -> dict[int, str]:
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value, 1)) if isinstance(value, list) else []
    )
    names = [name for _, name in items]
    whole = all(type(v) is int and 1 <= v <= MAX_CLASS_ID + 1 for v, _ in items)
    if not items or not whole or not _are_names(names) or len(set(names)) != len(names):
        raise _wrong(path, key, "a list of different names, or {mask value from 1: name}")
    return dict(sorted(items))


def _folds(path: Path, key: str, value: object) -> int | tuple[tuple[str, ...], ...]:
    if type(value) is int and value >= 2:
        return value
    if isinstance(value, list) and value and all(isinstance(f, list) and f and _are_names(f) for f in value):
        return tuple(tuple(dict.fromkeys(fold)) for fold in value)
    raise _wrong(path, key, "a number from 2, or a list with the held-out class names of each fold")


def _val_images(path: Path, key: str, value: object) -> float | str:
    if isinstance(value, str):
        return _inside(path, key, value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1:
        return float(value)
    raise _wrong(path, key, "a share above 0 and below 1, or a text file with one image a line")


def _yes_no(path: Path, key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong(path, key, "true or false")
    return value


def _share(path: Path, key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise _wrong(path, key, "a share from 0 to below 1")
    return float(value)


def _are_names(names: list[Any]) -> bool:
    return all(isinstance(name, str) and name for name in names)


def _wrong(path: Path, key: str, wanted: str) -> DataError:
    return DataError(f"{path}: {key} must be {wanted}.")


_CHECKS: dict[str, Any] = {
    "layout": _layout,
    "images": _inside,
    "masks": _inside,
    "annotations": _inside,
    "classes": _classes,
    "folds": _folds,
    "val_images": _val_images,
    "ignore": _yes_no,
    "min_object_share": _share,
}
