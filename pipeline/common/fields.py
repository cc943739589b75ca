"""Frozen dataclasses from JSON values and from CHOICE=VALUE text, by the declared types of their fields."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hsnet.errors import ConfigError

T = TypeVar("T")
_WORDS = {"true": True, "yes": True, "false": False, "no": False}
_NAMES = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("yes or no", "yes or no"),
}


def from_json(cls: type[T], values: object, what: str, may_lack: Collection[str] | None = None) -> T:
    """A dataclass from an object of JSON: its arrays become tuples, its objects dataclasses by their `from_dict`.

    Args:
        what: name of the object, for errors.
        may_lack: fields that may be missing. None: those with a default.

    Raises:
        ConfigError: an unknown or missing field, or a value of another type (true is no number, 1 is no text).
    """
    kinds, items = get_type_hints(cls), fields(cls)  # type: ignore[arg-type]
    if may_lack is None:
        may_lack = [f.name for f in items if f.default is not MISSING or f.default_factory is not MISSING]
    names = {item.name for item in items}
    if not isinstance(values, Mapping) or not names - set(may_lack) <= set(values) <= names:
        found = ", ".join(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
        raise ConfigError(f"{what} has the fields {', '.join(sorted(names))}; found: {found[:400]}.")
    return cls(**{name: _checked(kinds[name], value, f"{what}: {name}") for name, value in values.items()})


def require_types(value: object, what: str) -> None:
    """Refuse a dataclass with a field of another type than it declares. Raises ConfigError."""
    for name, kind in get_type_hints(type(value)).items():
        _checked(kind, getattr(value, name), f"{what}: {name}")


def typed(kind: Any, value: Any, what: str) -> Any:
    """A value of JSON or YAML as a declared type has it: lists become tuples, a whole number may be a float.

    Raises:
        ConfigError: it is of another type.
    """
    checked = _checked(kind, value, what)
    return float(checked) if _without_none(kind) is float and checked is not None else checked


def read_choice(text: str, kinds: Mapping[str, Any]) -> tuple[str, Any]:
    """ "shots=1,5" -> ("shots", (1, 5)).

    Args:
        kinds: choice -> int, float, bool, str, a tuple of one of them, or one of these or None.

    Raises:
        ConfigError: not of this form, no such choice, or a value of another kind.
    """
    name, equals, value = text.partition("=")
    if not equals or name not in kinds:
        raise ConfigError(f"'{text}' is not CHOICE=VALUE with a choice of {', '.join(kinds)}.")
    kind = _without_none(kinds[name])
    several = get_origin(kind) is tuple
    kind = get_args(kind)[0] if several else kind
    words = value.split(",") if several else [value]
    try:
        read = tuple(_WORDS[word.strip().lower()] if kind is bool else kind(word.strip()) for word in words)
    except (ValueError, KeyError):
        hint = " Put commas between several." if several else ""
        raise ConfigError(f"{name} must be {_NAMES[kind][several]}, got '{value}'.{hint}") from None
    return name, read if several else read[0]


def _without_none(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is UnionType else kind


def _checked(kind: Any, value: Any, what: str) -> Any:
    if value is None and get_origin(kind) is UnionType:
        return None
    kind = _without_none(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_checked(inner[0], item, what) for item in value)
    if origin is Mapping and isinstance(value, Mapping):
        return {key: _checked(inner[1], item, what) for key, item in value.items()}
    if is_dataclass(kind):
        return kind.from_dict(value)  # type: ignore[union-attr]
    raise ConfigError(f"{what} must be {getattr(kind, '__name__', kind)}, got {value!r}.")
