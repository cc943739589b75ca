"""Run the backbone again over a sample of a store's images and compare with what is stored.

Checksums say that bytes are those that were written. This says that they are the features of these photos by these
weights: a photo or mask that was changed since, a store made by a faulty machine, or another program is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hsnet.errors import ConfigError, DataError, StoreError
from pipeline.common.philox import Draws
from pipeline.common.runner import Runner, SerialRunner
from pipeline.datasets import Dataset
from pipeline.datasets.images import object_pixels, resize_label
from pipeline.features.backbones import open_backbone
from pipeline.features.budgeted import unit_vectors
from pipeline.features.forward import PhotoNetwork
from pipeline.features.precision import encode
from pipeline.features.recipe import Recipe
from pipeline.features.weights import Weights
from pipeline.store.bucket import location
from pipeline.store.feature_store import FeatureStore

TOLERANCE = 1e-3
"""Largest 1 - cosine of a stored and a recomputed feature vector that is put down to other arithmetic.

Measured on 8 photos, int8, float16 and float32: other summation orders (threads, another convolution library) at most
1.3e-5, weights and pixels rounded to TF32 at most 3.8e-4. On the other side, ImageNet features (SqueezeNet 1.1) of a
photo saved again as JPEG of quality 95: at least 3.4e-2; of one with a changed patch of 8 pixels: 0.6.
"""

CODED_TOLERANCE = 5e-3
"""The same for coded features, where other arithmetic moves a coordinate over the border of two codes, by a whole step.

Measured at 5 budgets: other summation orders at most 8.5e-4, a photo saved again at least 9e-3, another photo 1.
"""

GROUP = 8
"""Images a worker is given at a time."""


@dataclass(frozen=True)
class ImageCheck:
    """One image: stored and recomputed."""

    image: str
    shard: int
    equal: bool
    """Bit for bit, label map and facts included."""
    distance: float
    """Largest 1 - cosine of all positions and layers; 0 if equal."""
    reason: str
    """Why it counts as different; empty if it does not."""


@dataclass(frozen=True)
class Recomputation:
    """What `recompute` found."""

    images: int
    """Size of the sample."""
    share: float
    seed: int
    equal: int
    """Images that are the same bit for bit."""
    close: int
    """Images that are not, but within the tolerance: another processor, library or device."""
    tolerance: float
    largest: float
    """Distance of the worst image that was accepted."""
    different: tuple[ImageCheck, ...]


def recompute(
    store: FeatureStore,
    dataset: Dataset,
    weights: Weights,
    *,
    share: float,
    seed: int = 0,
    runner: Runner | None = None,
    device: str = "cpu",
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> Recomputation:
    """Compare a sample of the stored images with what the data set and the weights give now.

    Args:
        store: with a complete shard at least.
        dataset, weights: what the store was made from.
        share: how many of the images in complete shards, above 0, at most 1; at least one image is taken. A larger
            share of the same seed holds the smaller one.
        on_images: called with (images done, images).

    On the machine, or the kind of machine, and the versions of torch and Pillow that made the store, a CPU gives equal
    bits. Otherwise an image counts as different if a feature vector is further off than the tolerance, or its label
    map, size or classes differ at all.

    Raises:
        StoreMismatch: the store holds another data set, or was made with other weights.
        StoreIncomplete: nothing is there to be compared.
        ConfigError: the share is no share.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"The share of images to recompute must be above 0 and at most 1, got {share}.")
    recipe = replace(store.recipe, backbone=weights.backbone, weights=weights.sha256)
    # Compares both: another data set or other weights say nothing about this store.
    FeatureStore.open(store.place, recipe, require_complete=False, index_digest=dataset.index.digest)
    images = sample(store, share, seed)
    make_worker = partial(_Checker, dataset, weights, location(store.path), recipe, device)
    groups = [tuple(images[first : first + GROUP]) for first in range(0, len(images), GROUP)]
    checks: list[ImageCheck] = []
    for _, group_checks in (runner or SerialRunner()).map(make_worker, groups):
        checks += group_checks
        on_images(len(checks), len(images))
    different = sorted((check for check in checks if check.reason), key=lambda check: (check.shard, check.image))
    accepted = [check for check in checks if not check.reason]
    return Recomputation(
        images=len(images),
        share=share,
        seed=seed,
        equal=sum(check.equal for check in checks),
        close=sum(not check.equal for check in accepted),
        tolerance=_tolerance(recipe),
        largest=max((check.distance for check in accepted), default=0.0),
        different=tuple(different),
    )


def sample(store: FeatureStore, share: float, seed: int = 0) -> list[int]:
    """Numbers of the images to recompute, ascending: the same for the same images, share and seed, on any machine.

    Raises:
        StoreIncomplete: no shard is complete.
    """
    skipped = store.skipped
    missing = set(store.missing_shards())
    there = [
        image
        for shard in range(store.shards)
        if shard not in missing
        for image in store.images_in(shard)
        if image not in skipped
    ]
    if not there:
        store.facts(0)  # says what is missing and what to do about it
        raise StoreError(f"{store.path} holds no image that could be read: nothing can be recomputed.")
    order = np.argsort(Draws(store.index.digest, "recompute", seed).array(len(there)), kind="stable")
    return sorted(there[number] for number in order[: max(1, math.ceil(share * len(there)))])


class _Checker:
    """Recomputes images. Built once per process."""

    def __init__(self, dataset: Dataset, weights: Weights, path: str | Path, recipe: Recipe, device: str) -> None:
        self.dataset = dataset
        self.network = PhotoNetwork(open_backbone(recipe, weights), recipe.image_size, device)
        self.store = FeatureStore.open(path, recipe, require_complete=False, index_digest=dataset.index.digest)

    def __call__(self, images: Sequence[int]) -> list[ImageCheck]:
        return [self._check(image) for image in images]

    def _check(self, image: int) -> ImageCheck:
        store, name = self.store, self.store.index.images[image]
        done = partial(ImageCheck, name, store.shard_of(image))
        try:
            photo, label = self.dataset.image(image), self.dataset.label(image)
        except (DataError, OSError) as error:
            return done(False, 0.0, f"it cannot be read any more: {error}")
        try:
            stored, stored_label = store.features([image]), store.labels([image])[0]
        except StoreError as error:
            return done(False, 0.0, str(error))
        # Alone, as a CPU does it in extraction. A GPU takes several at a time, and then no bits can be expected.
        exact = self.network([photo])
        coded = store.codec.encode(exact, [name]) if store.codec else encode(exact, store.recipe.precision, [name])
        side = (store.recipe.image_size, store.recipe.image_size)
        wrong = []
        facts = (store.size(image), store.classes_present(image))
        fresh = ((photo.height, photo.width), tuple(object_pixels(label, store.index.ignore_label)))
        if facts != fresh:
            wrong.append(f"size and classes were {facts}, are {fresh}")
        pixels_off = int(np.count_nonzero(stored_label != resize_label(label, side)))
        if pixels_off:
            wrong.append(f"{pixels_off} pixels of its label map differ")
        same = all(np.array_equal(before, now) for before, now in zip(stored, coded, strict=True))
        distance = 0.0 if same else self._distance(stored, coded)
        if distance > _tolerance(store.recipe):
            wrong.append(f"its features differ: largest 1 - cosine {distance:.2g}")
        return done(same and not wrong, distance, "; ".join(wrong))

    def _distance(self, stored: Sequence[np.ndarray], fresh: Sequence[np.ndarray]) -> float:
        pairs = zip(self._vectors(stored), self._vectors(fresh), strict=True)
        return max(_largest_distance(before, now) for before, now in pairs)

    def _vectors(self, levels: Sequence[np.ndarray]) -> list[Tensor]:
        tensors = [torch.from_numpy(level) for level in levels]
        return self.store.codec.decode(tensors) if self.store.codec else [tensor.float() for tensor in tensors]


def _largest_distance(first: Tensor, second: Tensor) -> float:
    """Largest 1 - cosine of the vectors of two (..., C): 0 for two zero vectors, 1 for a zero and another vector."""
    both_zero = ~(first.any(-1) | second.any(-1))
    cosine = (unit_vectors(first.flatten(0, -2)).double() * unit_vectors(second.flatten(0, -2)).double()).sum(-1)
    return float((1 - cosine).masked_fill_(both_zero.flatten(), 0).clamp_(min=0).max())


def _tolerance(recipe: Recipe) -> float:
    return CODED_TOLERANCE if recipe.coding else TOLERANCE
