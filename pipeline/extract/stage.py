"""Run a frozen backbone once over every image of a data set and store its features.

Work is planned in shards (a fixed run of images). A worker makes a whole shard and writes it itself
(`pipeline.extract.worker`), so features never travel between processes; what is complete is skipped, so running again
finishes what is missing. The bytes do not depend on how many workers there are: the images of a forward pass are
always the same ones, and torch runs with one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hsnet.errors import ConfigError, DataError, StoreError
from pipeline.common.runner import Runner, SerialRunner, in_groups
from pipeline.datasets import Dataset
from pipeline.extract.plan import Planned, plan_growth, plan_new, plan_store
from pipeline.extract.worker import ShardDone, ShardWorker
from pipeline.features.fitting import Fitting, fit_codec, nominal_recipe, sample_size
from pipeline.features.recipe import CODED, Recipe
from pipeline.features.weights import Weights
from pipeline.store.attributes import read_facts
from pipeline.store.bucket import location
from pipeline.store.feature_store import SHARD_IMAGES, FeatureStore
from pipeline.store.growth import grow, make_current
from pipeline.store.place import Place, place_of

ON_ERROR = ("fail", "skip")


TASK_SECONDS = 30.0
"""About how long a worker is busy with the shards it is given at a time: it writes one while it computes the next."""

Event = Fitting | Planned | ShardDone


@dataclass(frozen=True)
class ExtractSummary:
    """What one call of `extract` did; the store as it is now."""

    path: str
    images: int
    """Images in the store, with the skipped ones."""
    skipped: tuple[str, ...]
    """Ids of images that could not be read, whenever that was."""
    written_shards: int
    reused_shards: int
    written_images: int
    bytes: int
    """Bytes of the whole store."""
    seconds: float
    images_per_s: float
    """Images written by this call per second of wall clock; 0 if there was nothing to do."""


def extract(
    dataset: Dataset,
    weights: Weights,
    backbone: str,
    image_size: int,
    precision: str,
    path: str | Path,
    runner: Runner | None = None,
    on_error: str = "fail",
    shard_images: int = SHARD_IMAGES,
    on_event: Callable[[Event], None] | None = None,
    device: str = "cpu",
    bytes_per_image: int | None = None,
    damaged: Collection[int] = (),
) -> ExtractSummary:
    """Make the feature store of a data set, finish the one at `path`, or add the images that the data set has more.

    Readers of a store that grows are given its earlier state until all new images are in it (`pipeline.store.growth`).

    Args:
        dataset: images and label maps; pickled to the workers of another process.
        weights: of `backbone`.
        image_size: side of the square network input, pixels.
        precision: float32, float16 or int8; see `pipeline.features.precision.encode`. Means nothing with a budget.
        runner: where the work is done; None is this process.
        on_error: what to do with an image that cannot be read: "fail" stops with its name, "skip" records it in the
            store, where it is never drawn for an episode.
        shard_images: images per shard of a new store.
        on_event: called here with `Planned`, then with `ShardDone` for each shard; before both with `Fitting` when a
            codec is to be fitted.
        device: where the backbone runs. Features of different kinds of devices differ in their last bits.
        bytes_per_image: budget of an image's features, kept by the budgeted codec (`pipeline.features.budgeted`), which
            is fitted first; an existing store keeps its fit.
        damaged: shards to delete and make anew, once it is known that this call can make them.

    Raises:
        DataError: an image cannot be read and on_error is "fail". Complete shards stay.
        StoreMismatch: the store at `path` holds another recipe, or a data set of which something is gone or means
            something else now. Nothing is changed.
        StoreError: something else is at `path`, another process is writing it, or the disk is too small or full.
        ConfigError, ShapeError, WeightsError: an argument cannot work.
    """
    if on_error not in ON_ERROR:
        raise ConfigError(f"on_error is '{on_error}'; choose one of: {', '.join(ON_ERROR)}.")
    if weights.backbone != backbone:
        raise ConfigError(f"These are weights of {weights.backbone}, but the backbone is {backbone}.")
    start = time.monotonic()
    emit = on_event or (lambda event: None)
    place = place_of(path)
    there = place.exists()
    recipe = wanted_recipe(Recipe.of(backbone, weights.sha256, image_size, precision), bytes_per_image, place)
    recipe.require_trainable()
    if not there and place.is_free():  # before anything is made
        _require_space(path, plan_new(dataset.index, recipe, place, shard_images))
    growing = plan_growth(place, recipe, dataset.index) if there else None
    if growing is not None:
        _require_space(path, growing)
        grow(place, recipe, dataset.index)
    codec = None
    if bytes_per_image is not None and not there:
        emit(Fitting(sample_size(recipe, dataset.index)))
        codec, recipe = fit_codec(dataset, weights, recipe, bytes_per_image, device, on_error == "skip")
    store = FeatureStore.create(place, recipe, dataset.index, shard_images, codec)
    reports: list[ShardDone] = []
    with store.writing() as token:
        store.drop(_mended_shards(store, dataset) | set(damaged))
        missing = store.missing_shards()
        plan = replace(plan_store(store), grown=None if growing is None else growing.grown)
        emit(plan)
        _require_space(path, plan)
        make_worker = partial(ShardWorker, dataset, weights, location(path), token, recipe, on_error, device)
        runner = runner or SerialRunner()
        tasks = in_groups(missing, lambda: reports[-1].seconds if reports else None, TASK_SECONDS, runner.workers)
        for _, made in runner.map(make_worker, tasks):
            for report in made:
                reports.append(report)
                emit(report)
        store.refresh()
        if store.complete:
            make_current(place, store.index.digest)
    if not store.complete:
        raise StoreError(
            f"{path}: shards {store.missing_shards()[:5]} were reported as written but are not there. "
            f"Do all workers see this folder at the same path? Use a path on a shared file system."
        )
    seconds = time.monotonic() - start
    images = sum(report.images for report in reports)
    return ExtractSummary(
        path=store.path,
        images=len(store.index.images),
        skipped=tuple(store.index.images[i] for i in store.skipped),
        written_shards=len(reports),
        reused_shards=store.shards - len(missing),
        written_images=images,
        bytes=store.nbytes,
        seconds=seconds,
        images_per_s=images / seconds if images else 0.0,
    )


def wanted_recipe(exact: Recipe, bytes_per_image: int | None, path: str | Path | Place) -> Recipe:
    """The recipe of a store to be made or finished: with a budget it takes the fit that is in the store at `path`.

    Where there is no store yet, its fit is unknown and its size about right.

    Raises:
        ConfigError: the budget cannot work.
        StoreError: what is at `path` cannot be read.
    """
    if bytes_per_image is None:
        return exact
    place, stored = place_of(path), None
    if place.exists():
        place.sync()
        with place.named():
            stored = read_facts(place.root).recipe.coding
    if stored is None:
        return nominal_recipe(exact, bytes_per_image)
    return replace(exact, precision=CODED, coding=replace(stored, bytes_per_image=bytes_per_image))


def _require_space(path: str | Path, plan: Planned) -> None:
    if plan.bytes_free is not None and plan.bytes_needed > plan.bytes_free:
        raise StoreError(
            f"{path} needs {plan.bytes_needed:,} bytes more for {plan.images - plan.images_done:,} images; "
            f"{plan.bytes_free:,} are free there. Free some space, or choose another place, a smaller precision "
            f"(int8 takes a quarter of float32) or image size. No features were written."
        )


def _mended_shards(store: FeatureStore, dataset: Dataset) -> set[int]:
    """Shards with a skipped image that can be read by now."""
    mended = set()
    for image in store.skipped:
        try:
            dataset.image(image), dataset.label(image)
        except (DataError, OSError):
            continue
        mended.add(store.shard_of(image))
    return mended
