"""What the arrays of a store must look like, checked before anyone acts on what is on disk; and the small ones read.

Nothing here asks zarr: metadata are plain JSON, compared to the letter. The small arrays (index, rows, fit) are one
chunk each of little-endian values, compressed by zstd (the index is not: it is mapped) and followed by its crc32c.
Shape, length of the file and what it unpacks to are known and compared before memory is taken; zarr would unpack
whatever a few bytes stand for, follow links and ask any file that is named.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import ConfigError, StoreError
from pipeline.common.columns import CRC, map_block
from pipeline.common.files import read_json, replace_json
from pipeline.datasets.index import DatasetIndex
from pipeline.features.budgeted import TransformCodec
from pipeline.features.recipe import Recipe, difference_lines
from pipeline.store.shard_file import read_small_array

ZSTD_LEVEL = 3
SHARD_BYTES = 64_000_000
"""Size of the shards of a new store, if nothing else is said; docs/store.md has what was measured."""
SHARD_IMAGES = 16
"""Images of a shard at least."""
FEWEST_SHARDS = 64
"""There may be more images in a shard where a data set is divided into so many shards all the same."""
MOST_IMAGES = 4096
FIT = "codec"
"""Group of the arrays that hold the fit of coded features: `codec/level0.layer0.basis` and so on."""
_MOST_FIT_VALUES = 4 << 20
"""In one array of a fit: no network read here has layers of more than 2048 channels."""
_KEYS = {"name": "default", "configuration": {"separator": "/"}}
_LITTLE = {"configuration": {"endian": "little"}}


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

    def check(self, root: Path, rows: Collection[int]) -> None:
        """Compare the array's metadata on disk.

        Args:
            rows: how many the array may have: more than one number while a store grows.

        Raises:
            StoreError: names what differs, with both values.
        """
        stored = read_json(root / self.name / "zarr.json")
        try:
            (sharding,) = stored["codecs"]
            inner = sharding["configuration"]
            actual: dict[str, object] = {
                "shape": stored["shape"],
                "data_type": stored["data_type"],
                "shard": stored["chunk_grid"]["configuration"]["chunk_shape"],
                "chunk": inner["chunk_shape"],
                "codecs": [codec["name"] for codec in inner["codecs"]],
            }
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{root}: the metadata of array '{self.name}' is damaged ({error!r}).") from None
        shapes = [[count, *self.image_shape] for count in sorted(rows)]
        wanted: dict[str, object] = {
            "shape": next((shape for shape in shapes if repr(shape) == repr(actual["shape"])), shapes[0]),
            "data_type": self.dtype.name,
            "shard": [self.shard_images, *self.image_shape],
            "chunk": [1, *self.image_shape],
            "codecs": ["bytes", "zstd", "crc32c"] if self.compressed else ["bytes", "crc32c"],
        }
        # By their texts: 21.0 is no number of rows.
        pairs = {key: (actual[key], wanted[key]) for key in wanted if repr(actual[key]) != repr(wanted[key])}
        if pairs:
            raise StoreError(
                f"{root}: array '{self.name}' does not fit the store's recipe:\n{difference_lines(pairs)}\n"
                f"The store was changed by something else. Extract into a new store."
            )
        # Another layout may be fine zarr, but a shard is read in this one only.
        if not self._laid_out(stored):
            raise StoreError(
                f"{root}: array '{self.name}' is not laid out as this program writes it (codecs of the shards and of "
                f"their index, names of the files). The store was changed by something else. Extract into a new store."
            )

    def _laid_out(self, metadata: Mapping[str, Any]) -> bool:
        try:
            (sharding,) = metadata["codecs"]
            inner = sharding["configuration"]
            codecs = [{**codec} for codec in inner["codecs"]]
            if self.compressed:
                codecs[1].pop("configuration", None)  # level: nothing a reader needs
            return (
                codecs == [_bytes_codec(self.dtype), *([{"name": "zstd"}] * self.compressed), {"name": "crc32c"}]
                and sharding["name"] == "sharding_indexed"
                and inner["index_location"] == "end"
                and inner["index_codecs"] == [{"name": "bytes", **_LITTLE}, {"name": "crc32c"}]
                and metadata["chunk_key_encoding"] == _KEYS
                and not metadata.get("storage_transformers")
            )
        except (KeyError, TypeError, ValueError, IndexError):
            return False

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


def images_per_shard(recipe: Recipe, index: DatasetIndex, shard_bytes: int | None = None) -> int:
    """Images in each shard of a new store, at most 4096.

    Args:
        shard_bytes: how large a shard shall be, all its files together. None chooses: `SHARD_BYTES`, but not so many
            images that a small data set has few shards for workers to share and for a killed run to lose. A multiple of
            16: so many images are what a GPU is given at a time.

    Raises:
        ConfigError: it is less than an image takes.
    """
    each = image_nbytes(recipe, index)
    if shard_bytes is None:
        images = min(SHARD_BYTES // each, len(index.images) // FEWEST_SHARDS, MOST_IMAGES)
        return max(images // SHARD_IMAGES, 1) * SHARD_IMAGES
    if shard_bytes < each:
        raise ConfigError(f"A shard of {shard_bytes:,} bytes holds no image: each takes {each:,}. Make shards larger.")
    return min(shard_bytes // each, MOST_IMAGES)


def read_small(root: Path, name: str, dtypes: Collection[str], most: int, dimensions: int = 1) -> NDArray[Any]:
    """A small array at `root / name`.

    Args:
        dtypes: what it may hold.
        most: values it may have at most.

    Raises:
        StoreError: it is damaged, larger, of another type or not laid out as this program writes it.
    """
    shape, values = _small_metadata(root, name, dtypes, most, dimensions, ["bytes", "zstd", "crc32c"])
    path = root.joinpath(name, "c", *["0"] * dimensions)
    try:
        _require_inside(root, path)
        data = read_small_array(path, math.prod(shape) * values.itemsize)
    except (OSError, ValueError, RuntimeError) as error:
        raise StoreError(f"{root}: the {name} cannot be read: {error!r}.") from error
    return data.view(values).reshape(shape)


def map_small(root: Path, name: str, most: int) -> NDArray[np.uint8]:
    """The bytes of a small array of bytes that is not compressed, mapped. Errors as `read_small`."""
    (length,), _ = _small_metadata(root, name, ["uint8"], most, 1, ["bytes", "crc32c"])
    path = root / name / "c" / "0"
    try:
        _require_inside(root, path)
        data = map_block(path, most + CRC)
        if len(data) != length:
            raise ValueError(f"it has {len(data)} bytes, its metadata says {length}")
    except (OSError, ValueError) as error:
        raise StoreError(f"{root}: the {name} cannot be read: {error!r}.") from error
    return data


def _require_inside(root: Path, path: Path) -> None:
    if path.parent.resolve() != root.resolve() / path.parent.relative_to(root):
        raise ValueError(f"its file lies outside of the store, at {path.parent.resolve()}")


def _small_metadata(
    root: Path, name: str, dtypes: Collection[str], most: int, dimensions: int, codecs: list[str]
) -> tuple[list[int], np.dtype]:
    """Shape and type of a small array, each checked. Raises StoreError."""
    stored = read_json(root / name / "zarr.json")
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
    if not _one_chunk(stored, shape, values, codecs):
        raise StoreError(f"{root}: array '{name}' is not laid out as one chunk of {', '.join(codecs)}.")
    return shape, values


def read_fit(root: Path, recipe: Recipe) -> TransformCodec | None:
    """The fit of the store at `root`; None if its features are not coded.

    Raises:
        StoreError: it is damaged, or not the one that the recipe names.
    """
    if recipe.coding is None:
        return None
    layers = [shape[0] for shape in recipe.level_shapes()]
    parts = {"basis": ("float32", 2), "counts": ("int32", 1), "places": ("int32", 1), "levels": ("float32", 2)}
    # By the names that there must be: a folder may hold anything.
    arrays = {
        (name := f"level{level}.layer{layer}.{part}"): read_small(
            root, f"{FIT}/{name}", [dtype], _MOST_FIT_VALUES, dimensions
        )
        for level, count in enumerate(layers)
        for layer in range(count)
        for part, (dtype, dimensions) in parts.items()
    }
    codec = TransformCodec.from_arrays(arrays, layers)
    if codec.digest != recipe.coding.fit or codec.level_bytes != recipe.coding.level_bytes:
        raise StoreError(
            f"{root}: the fit in the store ({codec.digest[:15]}, {codec.level_bytes} bytes per position) is not the "
            f"recipe's ({recipe.coding.fit[:15]}, {recipe.coding.level_bytes}). Its features cannot be read; extract "
            f"into a new store."
        )
    return codec


def _one_chunk(stored: Mapping[str, Any], shape: list[int], dtype: np.dtype, codecs: list[str]) -> bool:
    try:
        return (
            stored["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": shape}}
            and stored["chunk_key_encoding"] == _KEYS
            and [codec["name"] for codec in stored["codecs"]] == codecs
            and stored["codecs"][0] == _bytes_codec(dtype)
            and not stored.get("storage_transformers")
        )
    except (KeyError, TypeError, IndexError):
        return False


def _bytes_codec(dtype: np.dtype) -> dict[str, Any]:
    # Types of one byte have no byte order.
    return {"name": "bytes", **({} if dtype.itemsize == 1 else _LITTLE)}


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits
        return "a number without end"
    return text if len(text) < 80 else text[:77] + "..."
