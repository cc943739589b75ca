"""The fit of a coded store, kept in it as zarr arrays: `codec/level0.layer0.basis` and so on."""

from __future__ import annotations

from pathlib import Path

import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from hsnet.errors import StoreError
from pipeline.features.budgeted import TransformCodec
from pipeline.features.recipe import Recipe
from pipeline.store.small_arrays import read_small

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
    # By the names that there must be: a folder may hold anything.
    arrays = {
        name: read_small(root, f"{FOLDER}/{name}", dtypes, _MOST_VALUES, dimensions)
        for level, count in enumerate(layers)
        for row in range(count)
        for name, dtypes, dimensions in _parts(f"level{level}.layer{row}")
    }
    codec = TransformCodec.from_arrays(arrays, layers)
    if codec.digest != recipe.coding.fit or codec.level_bytes != recipe.coding.level_bytes:
        raise StoreError(
            f"{root}: the fit in the store ({codec.digest[:15]}, {codec.level_bytes} bytes per position) is not the "
            f"recipe's ({recipe.coding.fit[:15]}, {recipe.coding.level_bytes}). Its features cannot be read; extract "
            f"into a new store."
        )
    return codec


def _parts(layer: str) -> list[tuple[str, list[str], int]]:
    kinds = {"basis": ("float32", 2), "counts": ("int32", 1), "places": ("int32", 1), "levels": ("float32", 2)}
    return [(f"{layer}.{part}", [dtype], dimensions) for part, (dtype, dimensions) in kinds.items()]
