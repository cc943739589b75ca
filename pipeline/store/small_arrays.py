"""Read the small arrays of a store (index, rows, fit) without zarr, trusting nothing of what their files say.

Each is one chunk of little-endian values, compressed by zstd and followed by its crc32c. Its shape, its file's length
and what it unpacks to are known and compared before memory is taken; zarr would unpack whatever a few bytes stand for,
follow links and ask any file that is named.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import StoreError
from pipeline.common.files import read_json
from pipeline.store.shard_file import read_small_array

_KEYS = {"name": "default", "configuration": {"separator": "/"}}


def read_small(root: Path, name: str, dtypes: Collection[str], most: int, dimensions: int = 1) -> NDArray[Any]:
    """An array at `root / name`.

    Args:
        dtypes: what it may hold.
        most: values it may have at most.

    Raises:
        StoreError: it is damaged, larger, of another type or not laid out as this program writes it.
    """
    folder = root / name
    stored = read_json(folder / "zarr.json")
    shape, dtype = stored.get("shape"), stored.get("data_type")
    if not (isinstance(shape, list) and len(shape) == dimensions and all(type(side) is int for side in shape)):
        raise StoreError(
            f"{root}: array '{name}' must have {dimensions} dimensions, its metadata says {_short(shape)}."
        )
    if dtype not in dtypes:
        raise StoreError(f"{root}: array '{name}' must hold {' or '.join(dtypes)}, its metadata says {_short(dtype)}.")
    # Sides first: the product of numbers with thousands of digits takes its time.
    if not all(0 < side <= most for side in shape) or math.prod(shape) > most:
        raise StoreError(f"{root}: array '{name}' claims the shape {_short(shape)}; {most:,} is the most that is read.")
    values = np.dtype(dtype)
    if not _one_chunk(stored, shape, values):
        raise StoreError(f"{root}: array '{name}' is not laid out as one chunk of bytes, zstd and crc32c.")
    path = folder.joinpath("c", *["0"] * dimensions)
    try:
        if path.parent.resolve() != root.resolve() / path.parent.relative_to(root):
            raise ValueError(f"its file lies outside of the store, at {path.parent.resolve()}")
        data = read_small_array(path, math.prod(shape) * values.itemsize)
    except (OSError, ValueError, RuntimeError) as error:
        raise StoreError(f"{root}: the {name} cannot be read: {error!r}.") from error
    return data.view(values).reshape(shape)


def _one_chunk(stored: dict[str, Any], shape: list[int], dtype: np.dtype) -> bool:
    order = {} if dtype.itemsize == 1 else {"configuration": {"endian": "little"}}
    try:
        names = [codec["name"] for codec in stored["codecs"]]
        return (
            sys.byteorder == "little"
            and stored["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": shape}}
            and stored["chunk_key_encoding"] == _KEYS
            and names == ["bytes", "zstd", "crc32c"]
            and {**stored["codecs"][0]} == {"name": "bytes", **order}
            and not stored.get("storage_transformers")
        )
    except (KeyError, TypeError, IndexError):
        return False


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits
        return "a number without end"
    return text if len(text) < 80 else text[:77] + "..."
