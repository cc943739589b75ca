"""Write the metadata of a store anew when it is lost or damaged, so that its shards need not be extracted again.

All of it follows from the recipe, the data set and the number of images per shard; the markers of the shards name the
first two by their digest, and so prove that what is written is what was there.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hsnet.errors import StoreError, StoreMismatch
from pipeline.common.files import read_json, sync
from pipeline.common.lock import sole_writer
from pipeline.datasets.index import DatasetIndex
from pipeline.features.budgeted import TransformCodec
from pipeline.features.recipe import Recipe
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import break_seal, marker_file, read_marker, shard_file
from pipeline.store.place import place_of
from pipeline.store.summary import SummaryDamaged

_LOOKED_AT = 64
"""Shards that are asked what store they belong to."""


def restore_metadata(
    path: str | Path, recipe: Recipe, index: DatasetIndex, codec: TransformCodec | None = None
) -> tuple[str, ...]:
    """Replace the damaged metadata of the store at `path`; shards and markers stay as they are.

    Args:
        recipe, index: those of the `hsnet extract` that made it.
        codec: the fit, where features are coded.

    Returns:
        Names of the files that were written, relative to the store.

    Raises:
        StoreError: no shard proves that a store of this recipe and data set is there (one that grew cannot be restored
            so, its markers name the first data set), it leads outside of itself by a link, or the disk refused.
    """
    root = Path(path)
    levels = len(recipe.stored_shapes())
    names = (*(f"level{level}" for level in range(levels)), "label")
    try:
        with (
            sole_writer(root),
            tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.", suffix=".partial") as folder,
        ):
            for shard_images in _possible_sizes(root, recipe, index):
                new = FeatureStore.create(Path(folder) / str(shard_images), recipe, index, shard_images, codec)
                for number in range(min(new.shards, _LOOKED_AT)):
                    images = tuple(index.images[image] for image in new.images_in(number))
                    if read_marker(root, number, new.identity, images, names) is not None:
                        break_seal(root)
                        return tuple(_replace(new.root, root))
    except OSError as error:
        raise StoreError(f"The metadata of {root} cannot be restored: {error}.") from error
    raise StoreError(
        f"The metadata of {root} cannot be restored: no shard in it says that it was made from this data set by this "
        f"recipe. Give the options of the `hsnet extract` that made it, or extract into a new store. Nothing was "
        f"changed."
    )


def _possible_sizes(root: Path, recipe: Recipe, index: DatasetIndex) -> Iterator[int]:
    """Images per shard, as the length of a shard's file and the number of images in its marker tell them."""
    chunk = math.prod(recipe.stored_shapes()[0]) * recipe.dtype.itemsize + 4
    seen = set()
    for number in range(min(len(index.images), _LOOKED_AT)):
        try:
            count = len(read_json(marker_file(root, number))["images"])
            size = shard_file(root, "level0", number).lstat().st_size
        except (StoreError, OSError, KeyError, TypeError):
            continue
        room, odd = divmod(size - 4 - count * chunk, 16)  # an entry of the shard's index takes 16 bytes
        if not odd and 1 <= count <= room <= 4096 and room not in seen:
            seen.add(room)
            yield room


def _replace(new: Path, root: Path) -> Iterator[str]:
    for source in sorted(file for file in new.rglob("*") if file.is_file()):
        name = source.relative_to(new)
        target = root / name
        if target.is_file() and not target.is_symlink() and target.read_bytes() == source.read_bytes():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(root.resolve()):
            raise StoreError(f"{target} leads outside of the store by a link. Nothing more was written.")
        os.replace(source, target)
        sync(target.parent)
        yield str(name)


def needs_restoring(path: str | Path) -> StoreError | None:
    """Why a store that is there cannot be opened; None if it can, or if nothing like a store is there."""
    if not (Path(path) / "_done").is_dir():
        return None
    try:
        FeatureStore.open(path, require_complete=False)
    except StoreMismatch:
        return None
    except StoreError as error:
        return error
    return None


def drop_damaged_summary(path: str | Path) -> str | None:
    """Remove the summary of a store's markers if it cannot be used; says why it could not, None if it can.

    Raises:
        StoreError: the store is being written, or the disk or the server refuses.
    """
    place = place_of(path)
    try:
        if place.exists():
            FeatureStore.open(place, require_complete=False)
    except SummaryDamaged as error:
        with place.sole_writer():
            try:
                place.break_seal()
            except OSError as refused:
                raise StoreError(f"{place.path}: its summary cannot be removed: {refused}.") from refused
        return str(error)
    except StoreError:
        return None  # damaged otherwise: `needs_restoring` says how
    return None
