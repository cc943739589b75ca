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

from hsnet.errors import ConfigError, StoreError
from pipeline.common.runner import Runner, SerialRunner, in_groups
from pipeline.datasets import Dataset
from pipeline.extract.plan import ExtractionPlan, mended_shards, plan_extraction, plan_store
from pipeline.extract.worker import ShardDone, ShardWorker
from pipeline.features.backbones import Reading, new_recipe
from pipeline.features.fitting import Fitting, fit_codec, sample_size
from pipeline.features.weights import Weights
from pipeline.store.arrays import images_per_shard
from pipeline.store.bucket import location
from pipeline.store.feature_store import FeatureStore
from pipeline.store.growth import grow, make_current
from pipeline.store.place import place_of

ON_ERROR = ("fail", "skip")

TASK_SECONDS = 30.0
"""About how long a worker is busy with the shards it is given at a time: it writes one while it computes the next."""

Event = Fitting | ExtractionPlan | ShardDone


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
    path: str | Path,
    *,
    image_size: int,
    precision: str,
    reading: Reading = Reading(),  # noqa: B008  (frozen)
    bytes_per_image: int | None = None,
    shard_images: int | None = None,
    shard_bytes: int | None = None,
    on_error: str = "fail",
    damaged: Collection[int] = (),
    runner: Runner | None = None,
    device: str = "cpu",
    on_event: Callable[[Event], None] | None = None,
) -> ExtractSummary:
    """Make the feature store of a data set, finish the one at `path`, or add the images that the data set has more.

    Readers of a store that grows are given its earlier state until all new images are in it (`pipeline.store.growth`).

    Args:
        dataset: images and label maps; pickled to the workers of another process.
        weights: of the backbone to run.
        image_size: side of the square network input, pixels.
        precision: float32, float16 or int8; see `pipeline.features.precision.encode`. Means nothing with a budget.
        reading: layers and arithmetic of a network of timm's.
        bytes_per_image: budget of an image's features, kept by the budgeted codec (`pipeline.features.budgeted`), which
            is fitted first; an existing store keeps its fit.
        shard_images: images per shard of a new store.
        shard_bytes: or bytes per shard; with neither `pipeline.store.arrays.images_per_shard` chooses. A store that is
            there keeps its own.
        on_error: what to do with an image that cannot be read: "fail" stops with its name, "skip" records it in the
            store, where it is never drawn for an episode.
        damaged: shards to delete and make anew, once it is known that this call can make them.
        runner: where the work is done; None is this process.
        device: where the backbone runs. Features of different kinds of devices differ in their last bits.
        on_event: called here with `ExtractionPlan`, then with `ShardDone` for each shard; before both with `Fitting`
            when a codec is to be fitted.

    Raises:
        DataError: an image cannot be read and on_error is "fail". Complete shards stay.
        StoreMismatch: the store at `path` holds another recipe, or a data set of which something is gone or means
            something else now. Nothing is changed.
        StoreError: something else is at `path`, another process is writing it, or the disk is too small or full.
        ConfigError, ShapeError, WeightsError: an argument cannot work.
    """
    if on_error not in ON_ERROR:
        raise ConfigError(f"on_error is '{on_error}'; choose one of: {', '.join(ON_ERROR)}.")
    began = time.monotonic()
    emit = on_event or (lambda event: None)
    exact = new_recipe(weights.backbone, weights, image_size, precision, reading)
    place = place_of(path)
    start = plan_extraction(
        dataset,
        exact,
        place,
        bytes_per_image=bytes_per_image,
        shard_images=shard_images,
        shard_bytes=shard_bytes,
        damaged=damaged,
    )
    store, recipe, codec = start.store, start.recipe, None
    if store is None or start.plan.grown is not None:
        _require_space(path, start.plan)  # before anything is made
        if store is not None:
            grow(place, recipe, dataset.index)
        elif bytes_per_image is not None:
            emit(Fitting(sample_size(recipe, dataset.index)))
            codec, recipe = fit_codec(dataset, weights, recipe, bytes_per_image, device, on_error == "skip")
        each = shard_images or images_per_shard(recipe, dataset.index, shard_bytes)
        store = FeatureStore.create(place, recipe, dataset.index, each, codec)
    reports: list[ShardDone] = []
    with store.writing() as token:
        store.drop(mended_shards(store, dataset) | set(damaged))
        missing = store.missing_shards()
        plan = replace(plan_store(store), grown=start.plan.grown)
        emit(plan)
        _require_space(path, plan)
        make_worker = partial(
            ShardWorker, dataset, weights, location(path), recipe, token=token, on_error=on_error, device=device
        )
        runner = runner or SerialRunner()
        tasks = in_groups(missing, lambda: reports[-1].seconds if reports else None, TASK_SECONDS, runner.workers)
        for _, finished in runner.map(make_worker, tasks):
            for report in finished:
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
    seconds = time.monotonic() - began
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


def _require_space(path: str | Path, plan: ExtractionPlan) -> None:
    if plan.bytes_free is not None and plan.bytes_needed > plan.bytes_free:
        raise StoreError(
            f"{path} needs {plan.bytes_needed:,} bytes more for {plan.images - plan.images_done:,} images; "
            f"{plan.bytes_free:,} are free there. Free some space, or choose another place, a smaller precision "
            f"(int8 takes a quarter of float32) or image size. No features were written."
        )
