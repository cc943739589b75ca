"""What a store says of itself: its attributes, and the states of its data set: as it was first, and after each growth.

A state is one index (classes, images, lists) and the place of each of its images. Rows are only ever added: the
images of a growth begin at the next shard, in the order of their data set, and keep their rows for good. A store that
never grew has one state, whose image i is row i.

The store is read in its current state. States before it can still be opened by their digest; one after it is a growth
whose images are not all extracted. `pipeline.store.growth` adds states.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from hsnet.errors import ConfigError, DataError, StoreError, StoreMismatch
from pipeline.common.columns import Texts
from pipeline.common.files import read_json, replace_json
from pipeline.datasets.index import DatasetIndex
from pipeline.features.recipe import STORE_FORMAT, Recipe, difference_lines
from pipeline.store.arrays import map_small, read_small
from pipeline.store.shard_file import require_little_endian

GROWN_FORMAT = 2
"""Of a store that grew: programs that know only the first format must not take image numbers for rows."""
SEALED_FORMAT = 3
"""What is written now: programs that know only the first two would write without breaking the seal, and read no
columns."""
LARGEST_INDEX = 256 << 20
"""Bytes of JSON: parsed they take some ten times that in memory."""
LARGEST_COLUMNS = 4 << 30
"""Bytes of an index in columns, which is mapped: an image takes some 50."""
COLUMNS = "columns"


@dataclass(frozen=True)
class DatasetState:
    """A data set that a store holds, or is to hold: the first one, or as it was after a growth."""

    digest: str
    """Digest of its index."""
    images: int
    number: int = 0
    """Number in the names of its arrays; 0 is the first state: `index`, and image i is row i."""
    columns: bool = True
    """Whether its index is a block of columns; before format 3 it was JSON."""

    @property
    def index_array(self) -> str:
        """Name of the array that holds the index."""
        return f"index-{self.number}" if self.number else "index"

    @property
    def rows_array(self) -> str:
        """Name of the array that holds the rows; empty if image i is row i."""
        return f"row-{self.number}" if self.number else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = {"index": self.index_array, "row": self.rows_array} if self.number else {}
        encoding = {"encoding": COLUMNS} if self.columns else {}
        return {"digest": self.digest, "images": self.images, **encoding, **names}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DatasetState:
        """Reads what `to_dict` gave. Raises KeyError, TypeError, ValueError for anything else."""
        index = values.get("index", "index")
        if not re.fullmatch(r"index(-[1-9][0-9]{0,8})?", index):
            raise ValueError(f"no array of an index can be called {index!r}")
        columns = values.get("encoding") == COLUMNS
        state = cls(values["digest"], values["images"], int(index.partition("-")[2] or 0), columns)
        if not (isinstance(state.digest, str) and type(state.images) is int and 1 <= state.images < 1 << 40):
            raise ValueError(f"a data set of {state.images!r} images with digest {state.digest!r}")
        if state.to_dict() != values:
            raise ValueError(f"a state of the data set is {values!r}")
        return state


@dataclass(frozen=True)
class StoreFacts:
    """The attributes of a store, each checked.

    Raises:
        ValueError: they contradict each other.
    """

    recipe: Recipe
    shard_images: int
    states: tuple[DatasetState, ...]
    """States of the data set in the order in which they were added; the number of images never falls."""
    current: int = 0
    """Which of the states readers are given."""
    format: int = SEALED_FORMAT
    """Of the attributes as they were read; what is written has the newest."""

    def __post_init__(self) -> None:
        if type(self.shard_images) is not int or not 1 <= self.shard_images <= 4096:
            raise ValueError(f"{self.shard_images!r} images per shard")
        if len({state.digest for state in self.states}) < len(self.states):
            raise ValueError("the same data set twice")
        numbers = [state.number for state in self.states]
        if numbers[0] != 0 or len(set(numbers)) < len(numbers) or min(self.counts) < 0:
            raise ValueError(f"states of the data set that cannot follow each other: {numbers}, {self.counts}")

    @property
    def identity(self) -> str:
        """Digest that its markers name: of the recipe and the first data set, so that growing leaves them valid."""
        text = f"{json.dumps(self.recipe.identity())}\n{self.states[0].digest}"
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of images that each state added."""
        images = [0, *(state.images for state in self.states)]
        return tuple(after - before for before, after in pairwise(images))

    def find(self, digest: str) -> int | None:
        """Which of the states a data set is; None if it is none."""
        return next((number for number, state in enumerate(self.states) if state.digest == digest), None)

    def rows(self, state: int) -> int:
        """Rows of the arrays in a state, given by its place in `states`."""
        return max(part.stop for part in row_ranges(self.counts[: state + 1], self.shard_images))


class Placement:
    """Where the images of a state are: row of an image, images of a shard.

    Args:
        counts: images that each state added.
        rows: (images,) row of each; None if image i is row i.

    Raises:
        ValueError: the rows are not those that the counts give.
    """

    def __init__(self, counts: Sequence[int], shard_images: int, rows: NDArray[np.int64] | None = None) -> None:
        self.images = sum(counts)
        self.shards = sum(-(-count // shard_images) for count in counts)
        self._shard_images = shard_images
        self.rows, self._order = rows, rows
        if rows is None:
            return
        ranges = [part for part in row_ranges(counts, shard_images) if part]
        wanted = np.concatenate([np.arange(part.start, part.stop) for part in ranges])
        order = np.argsort(rows, kind="stable")
        if rows.shape != (self.images,) or not np.array_equal(rows[order], wanted):
            raise ValueError(f"the rows of {len(rows)} images do not fit growths of {list(counts)} images")
        self._order = order
        # Where the images of each shard begin among all images in the order of their rows.
        self._starts = np.searchsorted(wanted, np.arange(self.shards + 1) * shard_images)

    def row(self, image: int) -> int:
        """Row of an image, in every array."""
        return image if self.rows is None else int(self.rows[image])

    def images_in(self, shard: int) -> Sequence[int]:
        """Image numbers of a shard, in the order of its rows."""
        if self._order is not None:
            return tuple(self._order[self._starts[shard] : self._starts[shard + 1]].tolist())
        return range(shard * self._shard_images, min((shard + 1) * self._shard_images, self.images))


def state_checksum(index: DatasetIndex, placement: Placement) -> int:
    """crc32c of the ids of a state's images and of the row of each: which image a row holds."""
    ids = Texts.of(index.images)
    checksum = 0
    for values in (ids.text, ids.ends, placement.rows):
        if values is not None:
            checksum = google_crc32c.extend(checksum, np.ascontiguousarray(values).view(np.uint8))
    return checksum


def row_ranges(counts: Sequence[int], shard_images: int) -> list[range]:
    """Rows of the images of each growth. Shards are whole files: a growth begins a new one.

    >>> row_ranges([21, 0, 5], 8)
    [range(0, 21), range(0, 0), range(24, 29)]
    """
    ranges, start = [], 0
    for count in counts:
        ranges.append(range(start, start + count) if count else range(0))
        start += -(-count // shard_images) * shard_images
    return ranges


def read_facts(root: Path) -> StoreFacts:
    """The attributes of the store at `root`.

    Raises:
        StoreError: there is no store, it is damaged, of another format, or this machine cannot read stores.
    """
    require_little_endian()
    if not root.exists():
        raise StoreError(f"There is no feature store at {root}. Make one with `hsnet extract ... --store {root}`.")
    if not (root / "zarr.json").is_file():
        raise StoreError(
            f"{root} is not a feature store: it has no zarr.json. Give the path of a store made by `hsnet extract`, "
            f"or a new path to make one. Nothing was changed."
        )
    metadata = read_json(root / "zarr.json")
    attributes = metadata.get("attributes")
    values = attributes.get("hsnet_store") if isinstance(attributes, dict) else None
    if not isinstance(values, dict):
        raise StoreError(
            f"{root} is a zarr {metadata.get('node_type')} but not a feature store: it lacks the attribute "
            f"'hsnet_store'. Nothing was changed."
        )
    version = values.get("format")
    if version not in (STORE_FORMAT, GROWN_FORMAT, SEALED_FORMAT):
        raise StoreError(
            f"{root} has store format {version!r}; this version of the program reads formats {STORE_FORMAT} to "
            f"{SEALED_FORMAT}. Use the version that wrote it, or extract into a new store."
        )
    try:
        dataset = {name: value for name, value in values["dataset"].items() if name != "name"}
        current = DatasetState.from_dict(dataset)
        grown = version == GROWN_FORMAT or (version == SEALED_FORMAT and "growth" in values)
        states = tuple(map(DatasetState.from_dict, values["growth"])) if grown else (current,)
        if version < SEALED_FORMAT and any(state.columns for state in states):
            raise ValueError(f"an index in columns, in format {version}")
        recipe = Recipe.from_dict(values["recipe"])
        return StoreFacts(recipe, values["shard_images"], states, states.index(current), version)
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise StoreError(f"{root}: the store's attributes are damaged: {error!r}") from None


def choose_state(root: Path, facts: StoreFacts, recipe: Recipe | None, digest: str | None) -> int:
    """Which of the states is asked for; None is anything. Raises StoreMismatch if the store holds no such thing."""
    differences = facts.recipe.differences(recipe) if recipe else {}
    state = facts.current if digest is None else facts.find(digest)
    if state is not None and not differences:
        return state
    if state is None:
        differences["data set"] = (facts.states[facts.current].digest, digest)
    raise StoreMismatch(
        f"{root} was extracted with another recipe or from another data set:\n"
        f"{difference_lines(differences)}\n"
        f"Pass the stored values, or extract into a new store (`hsnet extract ... --store PATH`). "
        f"Nothing was changed.",
        differences,
    )


def attributes(facts: StoreFacts, name: str) -> dict[str, Any]:
    """The attribute `hsnet_store`; `name` is the data set's. `read_facts` reads it."""
    grown = len(facts.states) > 1
    return {
        "format": SEALED_FORMAT,
        "recipe": facts.recipe.to_dict(),
        "dataset": {"name": name, **facts.states[facts.current].to_dict()},
        "shard_images": facts.shard_images,
        **({"growth": [state.to_dict() for state in facts.states]} if grown else {}),
    }


def write_facts(root: Path, facts: StoreFacts) -> None:
    """Replace the attributes of a store, whole or not at all. Raises OSError, StoreError."""
    metadata = read_json(root / "zarr.json")
    name = metadata["attributes"]["hsnet_store"]["dataset"]["name"]
    changed = {**metadata["attributes"], "hsnet_store": attributes(facts, name)}
    replace_json(root / "zarr.json", {**metadata, "attributes": changed})


def read_index(root: Path, state: DatasetState) -> DatasetIndex:
    """The index of a state. Raises StoreError if it is damaged or another one."""
    try:
        if state.columns:
            index = DatasetIndex.from_columns(map_small(root, state.index_array, LARGEST_COLUMNS))
        else:
            text = read_small(root, state.index_array, ["uint8"], LARGEST_INDEX).tobytes()
            index = DatasetIndex.from_json(text.decode())
    except (DataError, ValueError) as error:
        raise StoreError(f"{root}: the index is damaged: {error}") from error
    if index.digest != state.digest or len(index.images) != state.images:
        raise StoreError(
            f"{root}: the index in the store does not belong to it: digest {index.digest} of "
            f"{len(index.images)} images, the attributes say {state.digest} of {state.images}."
        )
    return index


def read_placement(root: Path, facts: StoreFacts, number: int) -> Placement:
    """Where the images of a state are; read its index first: it says how many there can be. Raises StoreError."""
    state, counts = facts.states[number], facts.counts[: number + 1]
    if not state.rows_array:
        return Placement(counts, facts.shard_images)
    try:
        return Placement(counts, facts.shard_images, read_small(root, state.rows_array, ["int64"], state.images))
    except ValueError as error:
        raise StoreError(f"{root}: array '{state.rows_array}' is damaged: {error}.") from error
