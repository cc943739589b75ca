"""Sweeps as YAML files: read, every key, type and name checked, and laid under what a command line says.

    out: sweeps/kernels
    stores: [pascal-resnet101.zarr]
    folds: [0, 1, 2, 3]            # or all
    heads: [hsnet, cosine]         # those that need no training are only tested
    seeds: [0, 1]
    steps: 20000
    fix: {batch_size: 20, recipe: hsnet}
    vary:
      kernel: [center-pivot, original, separable]
    protocol: hsnet
    set: {ignore: yes}             # other choices than the protocol's
    shots: [1, 5]
    episodes: 1000
    transfer: [voc.zarr]           # heads are also tested here, on the classes they have not seen
    parts:                         # what is not one grid: each is laid over the keys above, and all are done
      - vary: {support_mask: [no]}

Paths are relative to the working directory, as those of options are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_origin, get_type_hints

import yaml

from hsnet.errors import ConfigError
from pipeline.common.fields import typed
from pipeline.common.text import did_you_mean
from pipeline.episodes.protocols import PROTOCOLS, Protocol, resolve
from pipeline.heads.training import RECIPES
from pipeline.sweep import head_names, make_cases, sweep_choices
from pipeline.sweep_case import STEPS, TRAINED, Case

MAX_BYTES = 100_000
MAX_BRACKETS = 500
"""The YAML scanner takes time with the square of their nesting."""

ALL = "all"
"""Instead of a list of folds: those that all stores have."""

_ALSO = {"seeds": "seed", "steps": "steps"}
"""Keys of their own, and the choices that stand for them in `fix` and `vary`."""

_WANTED: dict[Any, str] = {int: "a whole number", float: "a number", bool: "yes or no", str: "text"}


@dataclass(frozen=True, kw_only=True)
class SweepPart:
    """One grid of cases. None or empty: not said."""

    stores: tuple[str, ...] = ()
    folds: tuple[int, ...] | str | None = None
    heads: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    steps: int | None = None
    fix: Mapping[str, Any] = field(default_factory=dict)
    """Choice -> value, the same for all cases."""
    vary: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Choice -> values, each with each."""
    transfer: tuple[str, ...] = ()

    def over(self, below: SweepPart) -> SweepPart:
        """This part, with what it does not say from the one below; a choice said here is no longer as it was there,
        whether it was fixed or varied."""
        chosen = {*self.fix, *self.vary}
        said = chosen | {choice for name, choice in _ALSO.items() if getattr(self, name)}
        mine = {name: getattr(self, name) for name in ("stores", "folds", "heads", "seeds", "steps", "transfer")}
        return SweepPart(
            **{
                name: value if value or _ALSO.get(name) in chosen else getattr(below, name)
                for name, value in mine.items()
            },
            fix={name: value for name, value in below.fix.items() if name not in said} | dict(self.fix),
            vary={name: values for name, values in below.vary.items() if name not in said} | dict(self.vary),
        )

    def cases(self, folds: Sequence[int]) -> list[Case]:
        """Its cases, with these folds where it says all of them. Raises ConfigError as `make_cases`."""
        wanted = folds if self.folds in (None, ALL) else self.folds
        assert isinstance(wanted, Sequence)
        vary, fix = dict(self.vary), dict(self.fix)
        for name, choice in _ALSO.items():
            if getattr(self, name) and choice in {**vary, **fix}:
                raise ConfigError(
                    f"`{name}` says {_text(getattr(self, name))}, and {choice} stands under `fix` or `vary`, too: "
                    f"{_text({**vary, **fix}[choice])}. Say it once. Nothing was done."
                )
        if self.seeds:
            vary["seed"] = self.seeds
        if "steps" not in vary:
            fix.setdefault("steps", self.steps or STEPS)
        return make_cases(self.stores, [int(f) for f in wanted], vary, fix, self.heads or TRAINED[:1], self.transfer)


@dataclass(frozen=True, kw_only=True)
class SweepFile(SweepPart):
    """A whole sweep."""

    out: str | None = None
    protocol: str | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    """Choices of the protocol that are other than its own."""
    shots: tuple[int, ...] = ()
    episodes: int | None = None
    parts: tuple[SweepPart, ...] = ()

    def grids(self) -> list[SweepPart]:
        """Its parts, each with what stands above them; itself where it has none."""
        return [part.over(self) for part in self.parts] or [self]

    def under(self, said: SweepFile) -> SweepFile:
        """This file, with what a command line said in its place, in every part."""
        top = said.over(self)
        return SweepFile(
            **vars(top),
            out=said.out or self.out,
            protocol=said.protocol or self.protocol,
            set={**self.set, **said.set},
            shots=said.shots or self.shots,
            episodes=said.episodes or self.episodes,
            parts=tuple(said.over(part) for part in self.parts),
        )

    def rules(self) -> Protocol:
        """The protocol. Raises ConfigError: a choice is out of range."""
        chosen = dict(self.set)
        if self.shots:
            chosen["shots"] = self.shots
        if self.episodes:
            chosen["episodes"] = self.episodes
        return resolve(self.protocol or "default", **chosen)

    def all_cases(self, folds_of: Mapping[str, Sequence[int]]) -> list[Case]:
        """Cases of all parts, each once.

        Args:
            folds_of: store -> its folds, of those that are there.

        Raises:
            ConfigError: as `make_cases`; a fold that a store does not have; "all" folds of a store that is not there;
                two parts that give one name to different cases.
        """
        found: dict[str, Case] = {}
        for part in self.grids():
            if not part.stores:
                raise ConfigError("A sweep needs a store: `stores: [S.zarr]` in the file, or --store S.zarr.")
            there = [set(folds_of[store]) for store in part.stores if store in folds_of]
            shared = sorted(set.intersection(*there)) if there else []
            if part.folds in (None, ALL):
                if lacking := [store for store in part.stores if store not in folds_of]:
                    raise ConfigError(
                        f"'all' folds cannot be told without the stores: {lacking[0]} is not there. Extract it, or "
                        f"name the folds."
                    )
            elif missing := [fold for fold in part.folds or () if there and int(fold) not in shared]:
                raise ConfigError(f"Not every store has fold {missing[0]}; folds of all: {shared}.")
            for case in part.cases(shared):
                if found.setdefault(case.name, case) != case:
                    raise ConfigError(
                        f"Two parts of the sweep both have a case '{case.name}', with other choices: "
                        f"{_text(found[case.name].choices)} and {_text(case.choices)}. Vary what differs (also with "
                        f"one value) instead of fixing it: then it is in the name."
                    )
        return list(found.values())


def read_sweep_file(path: Path) -> SweepFile:
    """Read a sweep file.

    Raises:
        ConfigError: not there or not YAML; an unknown key, choice, head, protocol or recipe (names the line and the
            nearest one there is), an empty list, or a value of another type. Nothing has been done then.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES:,} bytes; a sweep is a few lines.")
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > MAX_BRACKETS:
            raise ConfigError(f"{path} has more than {MAX_BRACKETS} opening brackets; a sweep has a few.")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _Loader)):
            raise ConfigError(f"{path} uses aliases (*name), which a sweep does not need: it has parts.")
        node = yaml.compose(text, _Loader)
        reader = _Reader(path)
        return reader.sweep(node)
    except OSError as error:
        raise ConfigError(f"Cannot read the sweep file {path}: {error.strerror}.") from error
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}.") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-3 is a number, as in YAML 1.2, and 2026-01-01 is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Reader:
    """Makes a `SweepFile` of the nodes of a file: every error has its line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.choices = sweep_choices()

    def sweep(self, node: yaml.Node | None) -> SweepFile:
        return self._part(SweepFile, node, "A sweep file")

    def _part(self, kind: type[Any], node: yaml.Node | None, what: str) -> Any:
        if kind is SweepPart and isinstance(node, yaml.MappingNode) and not node.value:
            return kind()  # all that stands above
        known = [item.name for item in fields(kind)]
        values: dict[str, Any] = {}
        for key, value in self._items(node, what):
            if key.value not in known:
                self._fail(key, f"unknown key '{key.value}'; {what.lower()} has {', '.join(known)}", key.value, known)
            values[key.value] = self._value(key.value, value)
        return kind(**values)

    def _value(self, name: str, node: yaml.Node) -> Any:
        if name == "parts":
            return tuple(self._part(SweepPart, one, "A part") for one in self._list(node, name))
        if name in ("fix", "vary"):
            return {key.value: self._choice(name, key, value) for key, value in self._items(node, name)}
        if name == "set":
            return {key.value: self._rule(key, value) for key, value in self._items(node, name)}
        if name == "folds" and isinstance(node, yaml.ScalarNode) and node.value == ALL:
            return ALL
        if name in ("folds", "seeds", "stores", "heads", "shots", "transfer"):
            of = str if name in ("stores", "heads", "transfer") else int
            items = [self._plain(one) for one in self._list(node, name)]
            least = 1 if name == "shots" else 0
            wanted = "a list of names" if of is str else f"a list of whole numbers from {least}"
            wanted += ", or the word all" if name == "folds" else ""
            if any(type(item) is not of or (isinstance(item, int) and item < least) for item in items):
                self._fail(node, f"{name} must be {wanted}, got {_text(items)}")
            if name == "heads":
                for one, item in zip(self._list(node, name), items, strict=True):
                    self._one_of(one, "head", item, head_names())
            return tuple(dict.fromkeys(items))
        value = self._plain(node)
        if name in ("steps", "episodes"):
            if type(value) is not int or value < 1:
                self._fail(node, f"{name} must be a whole number from 1, got {_text(value)}")
        elif type(value) is not str or not value:
            self._fail(node, f"{name} must be text, got {_text(value)}")
        if name == "protocol":
            self._one_of(node, "protocol", value, PROTOCOLS)
        return value

    def _choice(self, group: str, key: yaml.ScalarNode, node: yaml.Node) -> Any:
        """The value of a choice that is fixed, or the values of one that is varied."""
        name = key.value
        if name not in self.choices:
            where = {"head": "; heads stand under `heads`", "fold": "; folds stand under `folds`"}.get(name, "")
            self._fail(
                key,
                f"'{name}' is no choice of a sweep{where}; {group} takes {', '.join(self.choices)}",
                name,
                self.choices,
            )
        if group == "fix":
            return self._typed(name, node)
        return tuple(dict.fromkeys(self._typed(name, one) for one in self._list(node, f"vary: {name}")))

    def _typed(self, name: str, node: yaml.Node) -> Any:
        kind, value = self.choices[name], self._plain(node)
        if kind is str and isinstance(value, int | list) and not isinstance(value, bool):
            # Layers by number: [1, 3] is "1,3", as it is on a command line.
            value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if get_origin(kind) is tuple and isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        try:
            read = typed(kind, value, name)
        except ConfigError:
            self._fail(node, f"{name} must be {_WANTED.get(kind, 'a list of numbers')}, got {_text(value)}")
        if name == "recipe":
            self._one_of(node, "training recipe", read, RECIPES)
        return read

    def _rule(self, key: yaml.ScalarNode, node: yaml.Node) -> Any:
        """The value of a choice of the protocol."""
        name, kinds = key.value, get_type_hints(Protocol)
        known = [choice for choice in kinds if choice != "name"]
        if name not in known:
            self._fail(key, f"a protocol has no choice '{name}': it has {', '.join(known)}", name, known)
        value, kind = self._plain(node), kinds[name]
        try:
            return typed(kind, [value] if get_origin(kind) is tuple and type(value) is int else value, name)
        except ConfigError:
            wanted = "a list of whole numbers" if get_origin(kind) is tuple else _WANTED.get(kind, "a whole number")
            self._fail(node, f"{name} must be {wanted}, got {_text(value)}")

    def _items(self, node: yaml.Node | None, what: str) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
        """Keys and values of a mapping, each key once; at least one."""
        if not isinstance(node, yaml.MappingNode) or not node.value:
            self._fail(node, f"{what} must hold 'key: value' lines")
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._fail(key, f"a key of {what} must be a word")
            if key.value in seen:
                self._fail(key, f"'{key.value}' stands here twice: which of the two is meant cannot be told")
            seen.add(key.value)
        return list(node.value)

    def _list(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            self._fail(node, f"{what} must be a list, such as [a, b]; got {_text(self._plain(node))}")
        if not node.value:
            self._fail(node, f"{what} is an empty list: nothing would be done. Give it values, or leave it out")
        return list(node.value)

    def _one_of(self, node: yaml.Node, what: str, value: str, known: Any) -> None:
        if value not in known:
            self._fail(node, f"no {what} '{value}': choose of {', '.join(known)}", value, known)

    def _plain(self, node: yaml.Node) -> Any:
        """A value without any of the loader's own classes."""
        if isinstance(node, yaml.MappingNode):
            self._fail(node, "a mapping cannot stand here")
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(one) for one in node.value]
        loader = _Loader("")
        try:
            return loader.construct_object(node)
        finally:
            loader.dispose()

    def _fail(self, node: yaml.Node | None, said: str, name: str = "", known: Any = ()) -> NoReturn:
        line = f", line {node.start_mark.line + 1}" if node is not None else ""
        near = did_you_mean(name, known) if name else ""
        raise ConfigError(f"{self.path}{line}: {said}{near or '.'} Nothing was done.")


def _text(value: object) -> str:
    """A value as the file would have it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_text(item)}" for name, item in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return "nothing" if value is None else repr(value)
