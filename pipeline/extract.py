"""Run a frozen backbone once over every image of a data set and store its features.

Work is planned in shards (a fixed run of images). A worker makes a whole shard and writes it itself, so features
never travel between processes; what is complete is skipped, so running again finishes what is missing. The bytes do
not depend on how many workers there are: the images of a forward pass are always the same ones, and torch runs with
one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hsnet.backbone import FrozenBackbone
from hsnet.errors import ConfigError, DataError, StoreError
from pipeline.codec import encode
from pipeline.datasets import Dataset
from pipeline.datasets.images import Size, network_image, object_pixels, resize_label, same_aspect
from pipeline.ownership import still_owned
from pipeline.plan import Planned, plan_new, plan_store
from pipeline.recipe import Recipe
from pipeline.runner import Runner, SerialRunner
from pipeline.store import SHARD_IMAGES, FeatureStore
from pipeline.weights import Weights

BATCH = {"cpu": 1, "cuda": 16}
"""Images per forward pass. Not an option: another number changes last bits (8e-6 of SqueezeNet at 64 px).

On a CPU one image at a time is also the fastest at real sizes (400 px, one thread, seconds per image alone and in a
batch of four: SqueezeNet 0.065 and 0.090, ResNet-50 0.36 and 0.46), and a photo's features then depend on no other.
"""

ON_ERROR = ("fail", "skip")


@dataclass(frozen=True)
class ShardDone:
    """One shard is on disk."""

    shard: int
    images: int
    skipped: tuple[str, ...]
    """Ids of images that could not be read."""
    nbytes: int
    seconds: float
    """Time one worker took."""


Event = Planned | ShardDone


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
) -> ExtractSummary:
    """Make the feature store of a data set, or finish the one at `path`.

    Args:
        dataset: images and label maps; pickled to the workers of another process.
        weights: of `backbone`.
        image_size: side of the square network input, pixels.
        precision: float32, float16 or int8; see `pipeline.codec.encode`.
        runner: where the work is done; None is this process.
        on_error: what to do with an image that cannot be read: "fail" stops with its name, "skip" records it in the
            store, where it is never drawn for an episode.
        shard_images: images per shard of a new store.
        on_event: called here with `Planned`, then with `ShardDone` for each shard.
        device: where the backbone runs. Features of different kinds of devices differ in their last bits.

    Raises:
        DataError: an image cannot be read and on_error is "fail". Complete shards stay.
        StoreMismatch: the store at `path` holds another recipe or data set. Nothing is changed.
        StoreError: something else is at `path`, another process is writing it, or the disk is too small or full.
        ConfigError, ShapeError, WeightsError: an argument cannot work.
    """
    if on_error not in ON_ERROR:
        raise ConfigError(f"on_error is '{on_error}'; choose one of: {', '.join(ON_ERROR)}.")
    if weights.backbone != backbone:
        raise ConfigError(f"These are weights of {weights.backbone}, but the backbone is {backbone}.")
    start = time.monotonic()
    emit = on_event or (lambda event: None)
    recipe = Recipe.of(backbone, weights.sha256, image_size, precision)
    recipe.require_trainable()
    if not Path(path).exists():  # before anything is made
        _require_space(path, plan_new(dataset.index, recipe, Path(path), shard_images))
    store = FeatureStore.create(path, recipe, dataset.index, shard_images)
    reports = []
    with store.writing() as token:
        store.drop(_mended_shards(store, dataset))
        missing = store.missing_shards()
        plan = plan_store(store)
        emit(plan)
        _require_space(path, plan)
        make_worker = partial(_ShardWorker, dataset, weights, Path(path).absolute(), token, recipe, on_error, device)
        for _, report in (runner or SerialRunner()).map(make_worker, missing):
            reports.append(report)
            emit(report)
        store.refresh()
    if not store.complete:
        raise StoreError(
            f"{path}: shards {store.missing_shards()[:5]} were reported as written but are not there. "
            f"Do all workers see this folder at the same path? Use a path on a shared file system."
        )
    seconds = time.monotonic() - start
    images = sum(report.images for report in reports)
    return ExtractSummary(
        path=str(path),
        images=len(store.index.images),
        skipped=tuple(store.index.images[i] for i in store.skipped),
        written_shards=len(reports),
        reused_shards=store.shards - len(missing),
        written_images=images,
        bytes=store.nbytes,
        seconds=seconds,
        images_per_s=images / seconds if images else 0.0,
    )


def _require_space(path: str | Path, plan: Planned) -> None:
    if plan.bytes_needed > plan.bytes_free:
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
        mended.add(image // store.shard_images)
    return mended


class _ShardWorker:
    """Makes one shard per call. Built once per process, because the backbone and the store take time to load."""

    def __init__(
        self, dataset: Dataset, weights: Weights, path: Path, token: str, recipe: Recipe, on_error: str, device: str
    ) -> None:
        self.dataset = dataset
        self.token = token
        self.skip_errors = on_error == "skip"
        self.device = torch.device(device)
        self.batch = BATCH["cpu" if self.device.type == "cpu" else "cuda"]
        self.backbone = FrozenBackbone(recipe.backbone, weights.state_dict).to(self.device)
        self.store = FeatureStore.open(
            path, recipe, require_complete=False, index_digest=dataset.index.digest, writable=True
        )

    def __call__(self, shard: int) -> ShardDone:
        """Make a shard; a repeated call finds it done and only reports it."""
        start = time.monotonic()
        images = self.store.shard_range(shard)
        if not self.store.is_done(shard):
            self._write(shard, images)
        facts = self.store.facts(shard)
        return ShardDone(shard, len(images), tuple(facts.skipped), facts.nbytes, time.monotonic() - start)

    def _write(self, shard: int, images: range) -> None:
        index, recipe = self.store.index, self.store.recipe
        size, n = recipe.image_size, len(images)
        levels = [np.zeros((n, *shape), recipe.dtype) for shape in recipe.level_shapes()]
        labels = np.zeros((n, size, size), index.label_dtype)
        sizes = [(0, 0)] * n
        classes: list[tuple[int, ...]] = [()] * n
        skipped: dict[int, str] = {}
        for first in range(0, n, self.batch):
            rows = range(first, min(first + self.batch, n))
            # A skipped image leaves its place in the batch black, so that its neighbours' bits stay as they are.
            batch = np.zeros((len(rows), 3, size, size), np.float32)
            for row in rows:
                try:
                    pixels, label, sizes[row] = self._read(images[row])
                except DataError as error:
                    if not self.skip_errors:
                        raise
                    skipped[images[row]] = str(error)[:500]
                    continue
                batch[row - first] = pixels
                labels[row] = resize_label(label, (size, size))
                classes[row] = tuple(object_pixels(label, index.ignore_label))
            features = self.backbone(torch.from_numpy(batch).to(self.device))
            names = [index.images[images[row]] for row in rows]
            for level, encoded in zip(levels, encode(features, recipe.precision, names), strict=True):
                for row in rows:
                    if images[row] not in skipped:
                        level[row] = encoded[row - first]
        if not still_owned(self.store.root, self.token):
            raise StoreError(f"{self.store.root} is being written by another run now. This one stopped.")
        self.store.write_shard(shard, levels, labels, sizes, classes, skipped)

    def _read(self, image: int) -> tuple[np.ndarray, np.ndarray, Size]:
        """(network input, label map, photo's size) of an image; every failure is a DataError that names the image."""
        name = self.store.index.images[image]
        try:
            photo = self.dataset.image(image)
            label = self.dataset.label(image)
            if (
                not same_aspect((photo.height, photo.width), (label.shape[0], label.shape[1]))
                or label.dtype != self.store.index.label_dtype
            ):
                raise DataError(
                    f"its label map is {label.dtype}{label.shape}, the photo {photo.height} x {photo.width} "
                    f"(height x width)"
                )
            return network_image(photo, self.store.recipe.image_size), label, (photo.height, photo.width)
        except (DataError, OSError) as error:
            raise DataError(
                f"Image '{name}' of {self.store.index.name} cannot be used: {str(error).rstrip('.')}. Mend or remove "
                f"it and run the same command again, or leave such images out with `--on-error skip`. Complete "
                f"shards are kept."
            ) from error
