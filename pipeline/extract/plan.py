"""What an extraction will do, known before anything is written: to the run itself and to `hsnet extract --dry-run`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from hsnet.errors import DataError
from pipeline.datasets import Dataset
from pipeline.features.fitting import nominal_recipe
from pipeline.features.recipe import CODED, Recipe
from pipeline.features.weights import Weights
from pipeline.store.arrays import image_nbytes, images_per_shard
from pipeline.store.attributes import read_facts
from pipeline.store.feature_store import FeatureStore
from pipeline.store.growth import Grown, growth
from pipeline.store.local_place import Place
from pipeline.store.place import place_of


@dataclass(frozen=True)
class ExtractionPlan:
    """What there is and what is to be done."""

    images: int
    images_done: int
    """Images in shards that an earlier run completed and that stay."""
    shards: int
    shards_done: int
    bytes_needed: int
    """Bytes of what is missing, at most: label maps count as if they did not compress."""
    bytes_free: int | None
    """Bytes free on the store's disk; None for a bucket, which takes nobody knows how much."""
    grown: Grown | None = None
    """What the data set has more than the one that the store was finished for."""


@dataclass(frozen=True)
class Start:
    """What an extraction starts from."""

    recipe: Recipe
    """What is to be stored. With a budget and no store yet its fit is unknown, and its size about right."""
    store: FeatureStore | None
    """The store that is there, if the data set has grown its state of before; None where one is to be made."""
    plan: ExtractionPlan


def plan_extraction(
    dataset: Dataset,
    exact: Recipe,
    path: str | Path | Place,
    *,
    bytes_per_image: int | None = None,
    shard_images: int | None = None,
    shard_bytes: int | None = None,
    damaged: Collection[int] = (),
    weights: Callable[[], Weights] | None = None,
) -> Start:
    """Look what is at `path` and what it takes to make the data set's store of it. Writes nothing.

    Args:
        exact: what to store without a budget.
        bytes_per_image, shard_images, shard_bytes, damaged: as for `extract`.
        weights: gives those that `exact` does not know yet. They may have to be downloaded, and are needed only where
            there is a store to be compared with.

    Raises:
        StoreMismatch: the store holds another recipe, or a data set that has not only grown.
        StoreError: something else is there, or it cannot be read.
        ConfigError, ShapeError, WeightsError: an argument cannot work.
    """
    index, place = dataset.index, place_of(path)
    if place.is_free():
        recipe = exact if bytes_per_image is None else nominal_recipe(exact, bytes_per_image)
        recipe.require_trainable()
        shards = -(-len(index.images) // (shard_images or images_per_shard(recipe, index, shard_bytes)))
        nbytes = len(index.images) * image_nbytes(recipe, index)
        return Start(recipe, None, ExtractionPlan(len(index.images), 0, shards, 0, nbytes, place.bytes_free))
    place.sync()
    with place.named():
        facts = read_facts(place.root)
        recipe = exact if weights is None else replace(exact, weights=weights().sha256)
        fit = facts.recipe.coding
        if bytes_per_image is not None and fit is not None:
            recipe = replace(recipe, precision=CODED, coding=replace(fit, bytes_per_image=bytes_per_image))
        elif bytes_per_image is not None:
            recipe = nominal_recipe(recipe, bytes_per_image)
        recipe.require_trainable()
        grown = growth(place, recipe, index)
    begun = grown is None or facts.find(index.digest) is not None
    state = index.digest if begun else None
    store = FeatureStore.open(place, recipe, require_complete=False, index_digest=state)
    plan = replace(plan_store(store, mended_shards(store, dataset) | set(damaged)), grown=grown)
    if grown is not None and not begun:
        plan = replace(
            plan,
            images=len(index.images),
            shards=plan.shards + -(-grown.images_new // store.shard_images),
            bytes_needed=plan.bytes_needed + grown.images_new * image_nbytes(recipe, index),
        )
    return Start(recipe, store, plan)


def plan_store(store: FeatureStore, anew: Collection[int] = ()) -> ExtractionPlan:
    """What finishing a store takes if the shards `anew` are made again."""
    missing = {*store.missing_shards(), *anew}
    to_do = sum(len(store.images_in(number)) for number in missing)
    return ExtractionPlan(
        images=len(store.index.images),
        images_done=len(store.index.images) - to_do,
        shards=store.shards,
        shards_done=store.shards - len(missing),
        bytes_needed=to_do * image_nbytes(store.recipe, store.index),
        bytes_free=store.place.bytes_free,
    )


def mended_shards(store: FeatureStore, dataset: Dataset) -> set[int]:
    """Shards of a store with a skipped image that can be read by now."""
    mended = set()
    for image in store.skipped:
        number = dataset.index.images.index(store.index.images[image])  # another one after the data set has grown
        try:
            dataset.image(number), dataset.label(number)
        except (DataError, OSError):
            continue
        mended.add(store.shard_of(image))
    return mended
