"""What the arrays of a store must look like: made so, and checked before anyone acts on what is on disk."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from hsnet.errors import StoreError
from pipeline.common.files import read_json, replace_json
from pipeline.datasets.index import DatasetIndex
from pipeline.features.recipe import Recipe, difference_lines
from pipeline.store.shard_file import laid_out

ZSTD_LEVEL = 3
_AXES = ("image", "layer", "row", "column", "channel")


@dataclass(frozen=True)
class ArrayLayout:
    """One array but for its number of rows. Everything follows from the recipe, so a stored array can be checked."""

    name: str
    image_shape: tuple[int, ...]
    shard_images: int
    dtype: np.dtype
    compressed: bool

    @property
    def fill(self) -> int | float:
        """A value no image begins with, so that data which is not there cannot pass for zeros."""
        if self.dtype.kind == "f":
            return math.nan
        return int(np.iinfo(self.dtype).min if self.dtype.kind == "i" else np.iinfo(self.dtype).max)

    def create(self, group: zarr.Group, rows: int) -> None:
        """Make the array, without data."""
        # Every inner chunk carries a checksum: zarr protects only the shard's index by itself. Empty chunks are
        # written, so that a chunk which is absent was never written.
        checksum = Crc32cCodec()
        group.create_array(
            self.name,
            shape=(rows, *self.image_shape),
            chunks=(1, *self.image_shape),
            shards=(self.shard_images, *self.image_shape),
            dtype=self.dtype,
            filters=None,
            compressors=[ZstdCodec(level=ZSTD_LEVEL), checksum] if self.compressed else [checksum],
            fill_value=self.fill,
            dimension_names=_AXES if not self.compressed else ("image", "row", "column"),
            config={"write_empty_chunks": True, "order": "C"},
        )

    def check(self, root: Path, rows: Collection[int]) -> dict[str, Any]:
        """Compare the array's metadata on disk, before zarr or anyone else acts on it, and return it.

        Args:
            rows: how many the array may have: more than one number while a store grows.

        Raises:
            StoreError: names what differs, with both values.
        """
        stored = read_json(root / self.name / "zarr.json")
        try:
            (sharding,) = stored["codecs"]
            inner = sharding["configuration"]
            found: dict[str, object] = {
                "shape": stored["shape"],
                "data_type": stored["data_type"],
                "shard": stored["chunk_grid"]["configuration"]["chunk_shape"],
                "chunk": inner["chunk_shape"],
                "codecs": [codec["name"] for codec in inner["codecs"]],
            }
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{root}: the metadata of array '{self.name}' is damaged ({error!r}).") from None
        shapes: list[object] = [[count, *self.image_shape] for count in sorted(rows)]
        wanted: dict[str, object] = {
            "shape": found["shape"] if found["shape"] in shapes else shapes[0],
            "data_type": self.dtype.name,
            "shard": [self.shard_images, *self.image_shape],
            "chunk": [1, *self.image_shape],
            "codecs": ["bytes", "zstd", "crc32c"] if self.compressed else ["bytes", "crc32c"],
        }
        if found != wanted:
            pairs = {key: (found[key], wanted[key]) for key in wanted if found[key] != wanted[key]}
            raise StoreError(
                f"{root}: array '{self.name}' does not fit the store's recipe:\n{difference_lines(pairs)}\n"
                f"The store was changed by something else. Extract into a new store."
            )
        # Another layout may be fine zarr, but zarr unpacks whatever it is told to.
        if not laid_out(stored, self.compressed):
            raise StoreError(
                f"{root}: array '{self.name}' is not laid out as this program writes it (codecs of the shards and of "
                f"their index, names of the files). The store was changed by something else. Extract into a new store."
            )
        return stored

    def resize(self, root: Path, rows: int) -> None:
        """Give the array another number of rows. No data is touched. Raises OSError, StoreError."""
        path = root / self.name / "zarr.json"
        stored = read_json(path)
        shape = [rows, *self.image_shape]
        if stored.get("shape") != shape:
            replace_json(path, {**stored, "shape": shape})


def array_layouts(recipe: Recipe, label_dtype: np.dtype, shard_images: int) -> list[ArrayLayout]:
    """All arrays of a store: its levels, finest first, then its label maps. Raises ConfigError, ShapeError."""
    levels = [
        ArrayLayout(f"level{k}", shape, shard_images, recipe.dtype, compressed=False)
        for k, shape in enumerate(recipe.stored_shapes())
    ]
    size = recipe.image_size
    return [*levels, ArrayLayout("label", (size, size), shard_images, np.dtype(label_dtype), compressed=True)]


def image_nbytes(recipe: Recipe, index: DatasetIndex) -> int:
    """Bytes an image takes at most: features exactly, its label map as if it did not compress."""
    per_chunk = 32  # checksum, place in the shard's index
    layouts = array_layouts(recipe, index.label_dtype, 1)
    return sum(math.prod(layout.image_shape) * layout.dtype.itemsize + per_chunk for layout in layouts)


def open_array(root: Path, name: str, writable: bool = False) -> Any:
    """An array by zarr. Raises StoreError."""
    try:
        return zarr.open_array(str(root / name), mode="r+" if writable else "r", zarr_format=3)
    except Exception as error:  # zarr's errors on damaged metadata have no common base
        raise StoreError(f"{root}: array '{name}' cannot be opened: {error!r}.") from error


def calm_zarr() -> None:
    """Few threads per process: many processes of this program share a machine, and zarr's default is up to 32."""
    zarr.config.set({"threading.max_workers": 2, "async.concurrency": 4})
