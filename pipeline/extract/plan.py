"""What an extraction will do, said before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.datasets.index import DatasetIndex
from pipeline.features.recipe import Recipe
from pipeline.store.arrays import image_nbytes
from pipeline.store.feature_store import SHARD_IMAGES, FeatureStore
from pipeline.store.growth import Grown, growth
from pipeline.store.place import Place, place_of


@dataclass(frozen=True)
class Planned:
    """What there is and what is to be done."""

    images: int
    images_done: int
    """Images in shards that an earlier run completed."""
    shards: int
    shards_done: int
    bytes_needed: int
    """For what is missing, at most: label maps count as if they did not compress."""
    bytes_free: int | None
    """On the store's disk; nobody knows how much a bucket takes."""
    grown: Grown | None = None
    """What the data set has more than the one that the store was finished for."""


def plan_store(store: FeatureStore) -> Planned:
    """What finishing a store takes."""
    missing = store.missing_shards()
    to_do = sum(len(store.images_in(number)) for number in missing)
    return Planned(
        images=len(store.index.images),
        images_done=len(store.index.images) - to_do,
        shards=store.shards,
        shards_done=store.shards - len(missing),
        bytes_needed=to_do * image_nbytes(store.recipe, store.index),
        bytes_free=store.place.bytes_free,
    )


def plan_growth(path: str | Path | Place, recipe: Recipe, index: DatasetIndex) -> Planned | None:
    """What it takes to bring a store to a data set that has grown; None if it has not. Writes nothing.

    Raises:
        StoreMismatch: the data set has not only grown.
        StoreError: the store cannot be read.
    """
    place = place_of(path)
    place.sync()
    grown = growth(place, recipe, index)
    if grown is None:
        return None
    current = FeatureStore.open(place, require_complete=False)
    if any(state.digest == index.digest for state in current.states):  # begun by an earlier run
        begun = FeatureStore.open(place, require_complete=False, index_digest=index.digest)
        return replace(plan_store(begun), grown=grown)
    there = plan_store(current)
    return replace(
        there,
        images=len(index.images),
        shards=there.shards + -(-grown.images_new // current.shard_images),
        bytes_needed=there.bytes_needed + grown.images_new * image_nbytes(recipe, index),
        grown=grown,
    )


def plan_new(
    index: DatasetIndex, recipe: Recipe, path: str | Path | Place, shard_images: int = SHARD_IMAGES
) -> Planned:
    """What making a new store at `path` takes. Nothing has to be known of the weights but their network.

    Raises:
        ConfigError, ShapeError: the image size cannot work.
    """
    recipe.require_trainable()
    images = len(index.images)
    return Planned(
        images=images,
        images_done=0,
        shards=-(-images // shard_images),
        shards_done=0,
        bytes_needed=images * image_nbytes(recipe, index),
        bytes_free=place_of(path).bytes_free,
    )
