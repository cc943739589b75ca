"""What an extraction would do, said before anything is written."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from pipeline.datasets import Dataset
from pipeline.extract import Planned
from pipeline.recipe import Recipe
from pipeline.store import SHARD_IMAGES, FeatureStore

_CHECKSUM = 32
"""Bytes beside the values of each chunk: checksum and index entry."""


def plan_extraction(dataset: Dataset, recipe: Recipe, path: Path, shard_images: int = SHARD_IMAGES) -> Planned:
    """Images, shards and bytes of the store that `pipeline.extract.extract` would make or finish at `path`.

    `bytes_needed` counts label maps as if they did not compress, so that it is never too little.

    Raises:
        StoreMismatch: the store at `path` holds another recipe or data set.
        StoreError: something that is no store is at `path`.
    """
    images = len(dataset.index.images)
    values = sum(math.prod(shape) for shape in recipe.level_shapes()) * recipe.dtype.itemsize
    labels = recipe.image_size**2 * dataset.index.label_dtype.itemsize
    chunks = len(recipe.level_shapes()) + 1
    shards, missing, to_do = math.ceil(images / shard_images), math.ceil(images / shard_images), images
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        store = FeatureStore.open(path, recipe, require_complete=False, index_digest=dataset.index.digest)
        shards, missing = store.shards, len(store.missing_shards())
        to_do = sum(len(store.shard_range(number)) for number in store.missing_shards())
    folder = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
    return Planned(
        images=images,
        images_done=images - to_do,
        shards=shards,
        shards_done=shards - missing,
        bytes_needed=to_do * (values + labels + chunks * _CHECKSUM),
        bytes_free=shutil.disk_usage(folder).free,
    )
