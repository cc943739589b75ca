"""The fit of a coded store, kept in it as zarr arrays: `codec/level0.layer0.basis` and so on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from hsnet.errors import StoreError
from pipeline.recipe import Recipe
from pipeline.transform import TransformCodec

FOLDER = "codec"
_MOST_VALUES = 4 << 20
"""Of one array: no network read here has layers of more than 2048 channels."""


def write_fit(group: zarr.Group, codec: TransformCodec) -> None:
    """Write a fit into a new store."""
    folder = group.create_group(FOLDER)
    for name, array in codec.arrays().items():
        folder.create_array(
            name, data=array, chunks=array.shape, filters=None, compressors=[ZstdCodec(level=3), Crc32cCodec()]
        )


def read_fit(root: Path, recipe: Recipe) -> TransformCodec | None:
    """The fit of the store at `root`; None if its features are not coded.

    Raises:
        StoreError: it is damaged, or not the one that the recipe names.
    """
    if recipe.coding is None:
        return None
    layers = [shape[0] for shape in recipe.level_shapes()]
    try:
        folder = zarr.open_group(str(root / FOLDER), mode="r", zarr_format=3)
        arrays = {name: _whole(array) for name, array in folder.arrays()}
    except StoreError:
        raise
    except Exception as error:  # zarr's errors on damaged data have no common base
        raise StoreError(f"{root}: the fit of its codec cannot be read: {error!r}.") from error
    codec = TransformCodec.from_arrays(arrays, layers)
    if codec.digest != recipe.coding.fit or codec.level_bytes != recipe.coding.level_bytes:
        raise StoreError(
            f"{root}: the fit in the store ({codec.digest[:15]}, {codec.level_bytes} bytes per position) is not the "
            f"recipe's ({recipe.coding.fit[:15]}, {recipe.coding.level_bytes}). Its features cannot be read; extract "
            f"into a new store."
        )
    return codec


def _whole(array: Any) -> NDArray[Any]:
    if math.prod(array.shape) > _MOST_VALUES or array.dtype not in (np.float32, np.int32):
        raise StoreError(f"The fit of a coded store holds {array.dtype}{array.shape} as '{array.path}'.")
    values: NDArray[Any] = array[...]
    return values
