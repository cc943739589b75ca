"""What a store keeps of its states on disk: the group's attributes, and for each state its index and its rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from hsnet.errors import ConfigError, DataError, StoreError
from pipeline.common.files import read_json, replace_json, whole_folder
from pipeline.datasets.index import DatasetIndex
from pipeline.features.recipe import STORE_FORMAT, Recipe
from pipeline.store.arrays import ZSTD_LEVEL
from pipeline.store.small_arrays import read_small
from pipeline.store.states import Placement, State, StoreFacts

GROWN_FORMAT = 2
"""Of a store that grew: programs that know only the first format must not take image numbers for rows."""
LARGEST_INDEX = 256 << 20
_INDEX_CONTENT = "JSON, UTF-8: the data set's images, classes and splits"
_ROW_CONTENT = "row of every array that holds image i of the index of the same number"


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
    if version not in (STORE_FORMAT, GROWN_FORMAT):
        raise StoreError(
            f"{root} has store format {version!r}; this version of the program reads formats {STORE_FORMAT} and "
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
        "format": GROWN_FORMAT if grown else STORE_FORMAT,
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
    text = read_small(root, state.index, ["uint8"], LARGEST_INDEX).tobytes()
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
        return Placement(counts, facts.shard_images, read_small(root, state.row, ["int64"], state.images))
    except ValueError as error:
        raise StoreError(f"{root}: array '{state.row}' is damaged: {error}.") from error


def write_state(root: Path, state: State, index: DatasetIndex, rows: NDArray[np.int64] | None = None) -> None:
    """Write the arrays of a state, on disk when this returns. Only the attributes make it count. Raises OSError."""
    text = np.frombuffer(index.to_json().encode(), np.uint8)
    _write_line(root, state.index, text, _INDEX_CONTENT)
    if rows is not None:
        _write_line(root, state.row, rows, _ROW_CONTENT)


def _write_line(root: Path, name: str, values: NDArray[Any], content: str) -> None:
    """Write a one-dimensional array in one chunk, whole or not at all: the attributes do not name it yet."""
    if (root / name).exists():  # of a growth that was cut off
        shutil.rmtree(root / name)
    with whole_folder(root / name) as partial:
        zarr.create_array(
            str(partial),
            data=values,
            chunks=values.shape,
            filters=None,
            compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
            attributes={"content": content},
            config={"write_empty_chunks": True},  # a single image is in row 0, which is what zarr takes for empty
            zarr_format=3,
        )
