"""Sources of features: a store, or the backbone on the fly. Training and evaluation see no difference.

And photos themselves, for training that changes the backbone (`PhotoSource`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsnet.backbone import Backbone, FrozenBackbone
from hsnet.errors import ConfigError
from pipeline.common.machine import cores
from pipeline.datasets.images import object_pixels, resize_label
from pipeline.datasets.index import DatasetIndex
from pipeline.features.budgeted import TransformCodec
from pipeline.features.forward import PhotoNetwork
from pipeline.features.recipe import Recipe
from pipeline.store.buffers import Buffers
from pipeline.store.feature_store import FeatureStore

if TYPE_CHECKING:
    from pipeline.datasets import Dataset


class FeatureSource(Protocol):
    """Features and labels by image number."""

    @property
    def index(self) -> DatasetIndex: ...

    @property
    def recipe(self) -> Recipe: ...

    @property
    def skipped(self) -> Collection[int]:
        """Images that could not be read when the features were made; no episode may draw them."""
        ...

    def classes_present(self, image: int) -> Sequence[int]:
        """Class ids in the image's full-size mask."""
        ...

    @property
    def codec(self) -> TransformCodec | None:
        """What reads coded features; None if they are kept as they are."""
        ...

    def features(self, images: Sequence[int]) -> list[Tensor]:
        """Levels, finest first, each (n, L, H, W, C) in the precision they are kept in, or codes for `codec`.

        An image that is asked for several times is read, or computed, once.
        """
        ...

    def labels(self, images: Sequence[int]) -> Tensor:
        """(n, S, S) label maps at network size, see `as_labels`: 0, class id + 1, or the index's ignore label."""
        ...


MOST_READERS = 4
"""Threads that read at a time, at most. Checksums are made by one of them at a time, so more would wait for that."""
CORES_PER_READER = 4


def readers(source: FeatureSource) -> int:
    """Threads that may read of a source at a time: one for every four cores, if it is a store; else one.

    What a store gives is the same by any number. A network that computes features is not called by two threads.
    """
    if _store_of(source) is None:
        return 1
    return max(1, min(MOST_READERS, int(cores()) // CORES_PER_READER))


def pin(source: FeatureSource) -> None:
    """Have a store read into page-locked memory from now on, which a CUDA device copies from by itself.

    Sources of other kinds stay as they are. Only for a CUDA device: see `pipeline.loading.feeding`.
    """
    stored = _store_of(source)
    if stored is not None and not stored.pinned:
        stored.store.memory = Buffers(fresh=_page_locked)
        stored.pinned = True


def _page_locked(nbytes: int) -> NDArray[np.uint8]:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()


def _store_of(source: FeatureSource) -> StoreSource | None:
    while isinstance(source, RelistedSource):
        source = source.source
    return source if isinstance(source, StoreSource) else None


def as_labels(maps: NDArray[np.generic]) -> Tensor:
    """Label maps as they are stored where that is uint8; with more than 254 classes int32, which torch can compare."""
    return torch.from_numpy(maps if maps.dtype == np.uint8 else maps.astype(np.int32))


class StoreSource:
    """Features read from a finished store. Safe in several threads."""

    def __init__(self, store: FeatureStore) -> None:
        self.store, self.pinned = store, False
        self.index, self.recipe, self.skipped = store.index, store.recipe, store.skipped
        self.classes_present = store.classes_present

    @property
    def codec(self) -> TransformCodec | None:
        return self.store.codec

    def features(self, images: Sequence[int]) -> list[Tensor]:
        return [torch.from_numpy(level) for level in self.store.features(images)]

    def labels(self, images: Sequence[int]) -> Tensor:
        return as_labels(self.store.labels(images))


class RelistedSource:
    """A source with other lists: the same images by the same numbers, another index."""

    def __init__(self, source: FeatureSource, index: DatasetIndex) -> None:
        self.source, self.index = source, index
        self.recipe, self.skipped, self.codec = source.recipe, source.skipped, source.codec
        self.classes_present, self.features, self.labels = source.classes_present, source.features, source.labels


class OnlineSource:
    """Features computed when they are asked for: no store, the backbone runs again for every use of an image.

    Photos go through the backbone as they do in extraction, one at a time on a CPU, so that with one torch thread the
    features equal a float32 store's to the bit.
    """

    skipped: Collection[int] = frozenset()
    codec: TransformCodec | None = None

    def __init__(self, dataset: Dataset, backbone: Backbone, recipe: Recipe, device: str = "cpu") -> None:
        if recipe.coding is not None:
            raise ConfigError("Features made on the fly are exact: a recipe of coded features needs their store.")
        self.dataset, self.index, self.recipe = dataset, dataset.index, recipe
        self.network = PhotoNetwork(backbone, recipe.image_size, device)

    def classes_present(self, image: int) -> Sequence[int]:
        return list(object_pixels(self.dataset.label(image), self.index.ignore_label))

    def features(self, images: Sequence[int]) -> list[Tensor]:
        distinct = list(dict.fromkeys(images))
        levels = self._computed(distinct)
        if len(distinct) == len(images):
            return levels
        rows = torch.tensor([distinct.index(image) for image in images])
        return [level.index_select(0, rows.to(level.device)) for level in levels]

    def _computed(self, images: Sequence[int]) -> list[Tensor]:
        return self.network([self.dataset.image(image) for image in images])

    def labels(self, images: Sequence[int]) -> Tensor:
        size = self.recipe.image_size
        maps = {image: resize_label(self.dataset.label(image), (size, size)) for image in dict.fromkeys(images)}
        return as_labels(np.stack([maps[image] for image in images]).astype(self.index.label_dtype))


class PhotoSource(OnlineSource):
    """Photos in the place of features, for a backbone that is trained: whoever trains it makes features of them.

    `features` gives one tensor (n, 3, S, S) float32, normalised as the backbone wants it; batches of episodes hold it
    in the place of levels, until `EpisodeBatch.read_by`. The backbone given is what training begins with, and stays.

    Raises:
        ConfigError: the backbone is not a built-in one.
    """

    def __init__(self, dataset: Dataset, backbone: Backbone, recipe: Recipe, device: str = "cpu") -> None:
        if not isinstance(backbone, FrozenBackbone):
            raise ConfigError(f"Only built-in backbones can be finetuned, not {recipe.backbone}. Nothing was changed.")
        if recipe.autocast:
            raise ConfigError("A finetuned backbone computes in float32: leave out --autocast. Nothing was changed.")
        super().__init__(dataset, backbone, recipe, device)
        self.backbone = backbone

    def _computed(self, images: Sequence[int]) -> list[Tensor]:
        return [torch.from_numpy(np.stack([self.network.pixels(self.dataset.image(image)) for image in images]))]
