"""Dataclasses from JSON and from CHOICE=VALUE text: what is meant comes through, anything else is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from hsnet.errors import ConfigError
from pipeline.common.fields import from_json, read_choice, require_types


@dataclass(frozen=True)
class Inner:
    names: tuple[str, ...]

    @classmethod
    def from_dict(cls, values: object) -> Inner:
        return from_json(cls, values, "The inner one")


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner
    share: float = 0.5
    exact: bool = False
    size: int | None = None
    scores: Mapping[str, float] | None = None
    free: Mapping[str, Any] = field(default_factory=dict)


WHOLE = Outer(3, Inner(("a", "b")), 1, True, 32, {"miou": 2.5}, {"layers": [1, {"deep": None}]})


def test_what_json_made_of_it_comes_back():
    assert from_json(Outer, json.loads(json.dumps(asdict(WHOLE))), "A thing") == WHOLE
    assert from_json(Outer, {"count": 3, "inner": {"names": []}}, "A thing") == Outer(3, Inner(()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": "3"}, r"^A thing: count must be int, got '3'\.$"),
        ({"count": True}, "count must be int, got True"),
        ({"count": 3.0}, "count must be int, got 3.0"),
        ({"count": None}, "count must be int, got None"),
        ({"share": "x"}, "share must be float, got 'x'"),
        ({"share": False}, "share must be float, got False"),
        ({"exact": 1}, "exact must be bool, got 1"),
        ({"size": "32"}, "size must be int, got '32'"),
        ({"scores": {"miou": "2"}}, "scores must be float, got '2'"),
        ({"scores": [1]}, "scores must be .*Mapping.*, got "),
        ({"inner": {"names": "ab"}}, "The inner one: names must be tuple.*, got 'ab'"),
        ({"inner": {"names": [1]}}, "The inner one: names must be str, got 1"),
        ({"inner": None}, "The inner one has the fields names; found: NoneType"),
        ({"colour": "blue"}, r"A thing has the fields count, exact, .*; found: count, .*colour"),
    ],
)
def test_anything_else_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        from_json(Outer, {**asdict(WHOLE), **change}, "A thing")


def test_fields_that_may_be_missing():
    values = {name: value for name, value in asdict(WHOLE).items() if name not in ("size", "free")}
    assert from_json(Outer, values, "A thing", may_lack=("size", "free")).size is None
    for may_lack in ((), ("size",)):
        with pytest.raises(ConfigError, match="A thing has the fields"):
            from_json(Outer, values, "A thing", may_lack)
    for values in ([], None, "{}", {"inner": {"names": []}}):
        with pytest.raises(ConfigError, match="A thing has the fields"):
            from_json(Outer, values, "A thing")


def test_types_of_one_made_by_hand():
    require_types(WHOLE, "A thing")
    with pytest.raises(ConfigError, match="A thing: count must be int, got '3'"):
        require_types(Outer("3", WHOLE.inner), "A thing")


KINDS = {
    "shots": tuple[int, ...],
    "exact": bool,
    "share": float,
    "size": int | None,
    "name": str,
    "many": tuple[bool, ...],
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("shots=1, 5", (1, 5)),
        ("exact=No", False),
        ("share=1e-3", 1e-3),
        ("size=32", 32),
        ("name=a,b=c", "a,b=c"),
        ("many=yes,false", (True, False)),
    ],
)
def test_choices_as_text(text, value):
    assert read_choice(text, KINDS) == (text.partition("=")[0], value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shots", "'shots' is not CHOICE=VALUE with a choice of shots, exact"),
        ("shot=1", "'shot=1' is not CHOICE=VALUE"),
        ("shots=1;5", "shots must be whole numbers, got '1;5'. Put commas between several."),
        ("exact=maybe", "exact must be yes or no, got 'maybe'"),
        ("share=", "share must be a number, got ''"),
        ("size=1,2", "size must be a whole number, got '1,2'"),
    ],
)
def test_choices_that_cannot_be_read(text, message):
    with pytest.raises(ConfigError, match=message):
        read_choice(text, KINDS)
