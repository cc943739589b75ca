"""Make a store without shards: its group, its arrays and the small ones among them (index, rows, fit), by zarr.

This is all that zarr does here, and nothing that reads imports it. What it writes says how shards are laid out, so that
any zarr 3 tool reads them; the shards themselves are written by `pipeline.store.shard_file`.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from pipeline.common.files import whole_folder
from pipeline.datasets.index import DatasetIndex
from pipeline.features.budgeted import TransformCodec
from pipeline.features.recipe import Recipe
from pipeline.store.arrays import FIT, ZSTD_LEVEL, ArrayLayout, array_layouts
from pipeline.store.attributes import DatasetState, StoreFacts, attributes
from pipeline.store.markers import MARKERS
from pipeline.store.shard_file import require_little_endian

# Few threads per process: many processes of this program share a machine, and zarr's default is up to 32.
zarr.config.set({"threading.max_workers": 2, "async.concurrency": 4})

_AXES = ("image", "layer", "row", "column", "channel")
_INDEX_CONTENT = "block of columns (docs/store.md): the data set's images, classes and splits"
_ROWS_CONTENT = "row of every array that holds image i of the index of the same number"


def build_skeleton(
    root: Path, recipe: Recipe, index: DatasetIndex, shard_images: int, codec: TransformCodec | None
) -> None:
    """Make the whole skeleton or nothing: a store is never there with half its metadata.

    Args:
        codec: the fit of coded features.

    Raises:
        OSError: the disk refused. Nothing is at `root` then.
        ConfigError, ShapeError: the recipe is impossible; nothing is written.
        StoreError: this machine cannot write stores.
    """
    require_little_endian()
    layouts = array_layouts(recipe, index.label_dtype, shard_images)
    root.parent.mkdir(parents=True, exist_ok=True)
    state = DatasetState(index.digest, len(index.images))
    facts = StoreFacts(recipe, shard_images, (state,))
    stored: dict[str, Any] = {"hsnet_store": attributes(facts, index.name)}
    try:
        with whole_folder(root) as new:
            group = zarr.open_group(str(new), mode="w-", zarr_format=3, attributes=stored)
            write_state(new, state, index)
            for layout in layouts:
                _create_array(group, layout, state.images)
            if codec is not None:
                _write_fit(group, codec)
            (new / MARKERS).mkdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Another process made it in the meantime. The caller opens that one, and compares recipes.


def write_state(root: Path, state: DatasetState, index: DatasetIndex, rows: NDArray[np.int64] | None = None) -> None:
    """Write the arrays of a state, on disk when this returns. Only the attributes make it count. Raises OSError."""
    write_vector(root, state.index_array, index.to_columns(), _INDEX_CONTENT, compressed=False)
    if rows is not None:
        write_vector(root, state.rows_array, rows, _ROWS_CONTENT)


def write_vector(root: Path, name: str, values: NDArray[Any], content: str, compressed: bool = True) -> None:
    """Write a small array, whole or not at all: the attributes do not name it yet.

    Args:
        values: (n,).
        content: what it is, for readers of its attributes.
    """
    if (root / name).exists():  # of a growth that was cut off
        shutil.rmtree(root / name)
    with whole_folder(root / name) as partial:
        zarr.create_array(
            str(partial),
            data=values,
            chunks=values.shape,
            filters=None,
            compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()] if compressed else [Crc32cCodec()],
            attributes={"content": content},
            config={"write_empty_chunks": True},  # a single image is in row 0, which is what zarr takes for empty
            zarr_format=3,
        )


def _create_array(group: zarr.Group, layout: ArrayLayout, rows: int) -> None:
    # Every inner chunk carries a checksum: zarr protects only the shard's index by itself. Empty chunks are written, so
    # that a chunk which is absent was never written.
    checksum = Crc32cCodec()
    group.create_array(
        layout.name,
        shape=(rows, *layout.image_shape),
        chunks=(1, *layout.image_shape),
        shards=(layout.shard_images, *layout.image_shape),
        dtype=layout.dtype,
        filters=None,
        compressors=[ZstdCodec(level=ZSTD_LEVEL), checksum] if layout.compressed else [checksum],
        fill_value=layout.fill,
        dimension_names=_AXES if not layout.compressed else ("image", "row", "column"),
        config={"write_empty_chunks": True, "order": "C"},
    )


def _write_fit(group: zarr.Group, codec: TransformCodec) -> None:
    folder = group.create_group(FIT)
    for name, array in codec.arrays().items():
        folder.create_array(
            name, data=array, chunks=array.shape, filters=None, compressors=[ZstdCodec(level=3), Crc32cCodec()]
        )
