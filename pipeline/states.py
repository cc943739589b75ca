"""What a store's attributes say, and the states of its data set: as it was first, and after each growth.

A state is one index (classes, images, lists) and the place of each of its images. Rows are only ever added: the
images of a growth begin at the next shard, in the order of their data set, and keep their rows for good. A store that
never grew has one state, whose image i is row i.

The store is read in its current state. States before it can still be opened by their digest; one after it is a growth
whose images are not all extracted. `pipeline.growth` adds states.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from hsnet.errors import ConfigError, DataError, StoreError
from pipeline.datasets.index import DatasetIndex
from pipeline.layout import ZSTD_LEVEL, open_array
from pipeline.metadata import read_json, replace_json, sync_folder
from pipeline.recipe import FORMAT, Recipe

GROWN_FORMAT = 2
"""Of a store that grew: programs that know only the first format must not take image numbers for rows."""
LARGEST_INDEX = 256 << 20
_INDEX_CONTENT = "JSON, UTF-8: the data set's images, classes and splits"
_ROW_CONTENT = "row of every array that holds image i of the index of the same number"


@dataclass(frozen=True)
class State:
    """A data set that the store holds, or is to hold."""

    digest: str
    """Of its index."""
    images: int
    number: int = 0
    """Of its arrays `index-<number>` and `row-<number>`; 0 is the first state: `index`, and image i is row i."""

    @property
    def index(self) -> str:
        """Name of the array that holds the index."""
        return f"index-{self.number}" if self.number else "index"

    @property
    def row(self) -> str:
        """Name of the array that holds the rows; empty if image i is row i."""
        return f"row-{self.number}" if self.number else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = {"index": self.index, "row": self.row} if self.number else {}
        return {"digest": self.digest, "images": self.images, **names}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> State:
        """What `to_dict` gave. Raises KeyError, TypeError, ValueError for anything else."""
        index = values.get("index", "index")
        if not re.fullmatch(r"index(-[1-9][0-9]{0,8})?", index):
            raise ValueError(f"no array of an index can be called {index!r}")
        state = cls(values["digest"], values["images"], int(index.partition("-")[2] or 0))
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
    states: tuple[State, ...]
    """In the order in which they were added; the number of images never falls."""
    current: int = 0
    """Place among the states of the one that readers are given."""

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
        """Of the store, for its markers: the recipe and the first data set, so that growing leaves them valid."""
        text = f"{self.recipe.to_json()}\n{self.states[0].digest}"
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of images that each state added."""
        images = [0, *(state.images for state in self.states)]
        return tuple(after - before for before, after in pairwise(images))

    def find(self, digest: str) -> int | None:
        """Place of a data set among the states."""
        return next((k for k, state in enumerate(self.states) if state.digest == digest), None)

    def rows(self, place: int) -> int:
        """Rows of the arrays in a state."""
        return max(part.stop for part in row_ranges(self.counts[: place + 1], self.shard_images))


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
        self._rows: Sequence[int] = range(self.images)
        self._members: list[tuple[int, ...]] | None = None
        if rows is None:
            return
        wanted = [np.arange(part.start, part.stop) for part in row_ranges(counts, shard_images)]
        order = np.argsort(rows, kind="stable")
        if rows.shape != (self.images,) or not np.array_equal(rows[order], np.concatenate(wanted)):
            raise ValueError(f"the rows of {len(rows)} images do not fit growths of {list(counts)} images")
        self._rows = rows.tolist()
        self._members = [
            tuple(part.tolist())
            for added in np.split(order, np.cumsum(counts)[:-1])
            for part in np.split(added, range(shard_images, len(added), shard_images))
            if len(part)
        ]

    def row(self, image: int) -> int:
        """Row of an image, in every array."""
        return self._rows[image]

    def images_in(self, shard: int) -> Sequence[int]:
        """Image numbers of a shard, in the order of its rows."""
        if self._members is not None:
            return self._members[shard]
        return range(shard * self._shard_images, min((shard + 1) * self._shard_images, self.images))


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


# -- on disk ---------------------------------------------------------------------------------------------------


def read_facts(root: Path) -> StoreFacts:
    """The attributes of the store at `root`.

    Raises:
        StoreError: there is no store, it is damaged, or of another format.
    """
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
    if version not in (FORMAT, GROWN_FORMAT):
        raise StoreError(
            f"{root} has store format {version!r}; this version of the program reads formats {FORMAT} and "
            f"{GROWN_FORMAT}. Use the version that wrote it, or extract into a new store."
        )
    try:
        dataset = {name: value for name, value in values["dataset"].items() if name != "name"}
        current = State.from_dict(dataset)
        states = tuple(map(State.from_dict, values["growth"])) if version == GROWN_FORMAT else (current,)
        return StoreFacts(Recipe.from_dict(values["recipe"]), values["shard_images"], states, states.index(current))
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise StoreError(f"{root}: the store's attributes are damaged: {error!r}") from None


def attributes(facts: StoreFacts, name: str) -> dict[str, Any]:
    """The attribute `hsnet_store`; `name` is the data set's. `read_facts` reads it."""
    grown = len(facts.states) > 1
    return {
        "format": GROWN_FORMAT if grown else FORMAT,
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


def read_index(root: Path, state: State) -> DatasetIndex:
    """The index of a state. Raises StoreError if it is damaged or another one."""
    text = _read_line(root, state.index, "uint8", LARGEST_INDEX).tobytes()
    try:
        index = DatasetIndex.from_json(text.decode())
    except (DataError, ValueError) as error:
        raise StoreError(f"{root}: the index is damaged: {error}") from error
    if index.digest != state.digest or len(index.images) != state.images:
        raise StoreError(
            f"{root}: the index in the store does not belong to it: digest {index.digest} of "
            f"{len(index.images)} images, the attributes say {state.digest} of {state.images}."
        )
    return index


def read_placement(root: Path, facts: StoreFacts, place: int) -> Placement:
    """Where the images of a state are; read its index first: it says how many there can be. Raises StoreError."""
    state, counts = facts.states[place], facts.counts[: place + 1]
    if not state.row:
        return Placement(counts, facts.shard_images)
    try:
        return Placement(counts, facts.shard_images, _read_line(root, state.row, "int64", state.images))
    except ValueError as error:
        raise StoreError(f"{root}: array '{state.row}' is damaged: {error}.") from error


def write_state(root: Path, state: State, index: DatasetIndex, rows: NDArray[np.int64] | None = None) -> None:
    """Write the arrays of a state, on disk when this returns. Only the attributes make it count. Raises OSError."""
    text = np.frombuffer(index.to_json().encode(), np.uint8)
    _write_line(root, state.index, text, _INDEX_CONTENT)
    if rows is not None:
        _write_line(root, state.row, rows, _ROW_CONTENT)


def _read_line(root: Path, name: str, dtype: str, most: int) -> NDArray[Any]:
    """A one-dimensional array, its size known before it is read."""
    metadata = read_json(root / name / "zarr.json")
    shape = metadata.get("shape")
    if not (
        isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and metadata.get("data_type") == dtype
    ):
        raise StoreError(f"{root}: array '{name}' must be a line of {dtype}, its metadata says {shape!r}.")
    if not 0 < shape[0] <= most:
        raise StoreError(f"{root}: array '{name}' claims {shape[0]:,} values; {most:,} is the most that is read.")
    array = open_array(root, name)
    try:
        values: NDArray[Any] = array[:]
    except Exception as error:  # zarr's errors on damaged data have no common base
        raise StoreError(f"{root}: the {name} cannot be read: {error!r}.") from error
    return values


def _write_line(root: Path, name: str, values: NDArray[Any], content: str) -> None:
    """Beside its place, forced to disk, then renamed: a name never stands for half an array."""
    place, partial = root / name, root / f"{name}.partial"
    for leftover in (partial, place):
        if leftover.exists():
            shutil.rmtree(leftover)
    zarr.create_array(
        str(partial),
        data=values,
        chunks=values.shape,
        filters=None,
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
        attributes={"content": content},
        zarr_format=3,
    )
    for path in (path for path in partial.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for folder in (partial / "c", partial):
        sync_folder(folder)
    os.rename(partial, place)
    sync_folder(root)
