"""Where features come from: a store, or the backbone on the fly. Training and evaluation see no difference.

Also the step from episodes to tensors: `load_batch`.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from hsnet.backbone import FrozenBackbone
from hsnet.errors import ConfigError
from pipeline.datasets.images import network_image, resize_label
from pipeline.datasets.index import DatasetIndex
from pipeline.episodes.stream import Episode
from pipeline.recipe import Recipe
from pipeline.shard_worker import BATCH
from pipeline.store import FeatureStore
from pipeline.transform import TransformCodec

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
        """Levels, finest first, each (n, L, H, W, C) in the precision they are kept in, or codes for `codec`."""
        ...

    def labels(self, images: Sequence[int]) -> Tensor:
        """(n, S, S) int32 label maps at network size: 0, class id + 1, or the index's ignore label."""
        ...


class StoreSource:
    """Features read from a finished store."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    @property
    def index(self) -> DatasetIndex:
        return self.store.index

    @property
    def recipe(self) -> Recipe:
        return self.store.recipe

    @property
    def skipped(self) -> Collection[int]:
        return self.store.skipped

    @property
    def codec(self) -> TransformCodec | None:
        return self.store.codec

    def classes_present(self, image: int) -> Sequence[int]:
        return self.store.classes_present(image)

    def features(self, images: Sequence[int]) -> list[Tensor]:
        return [torch.from_numpy(level) for level in self.store.features(images)]

    def labels(self, images: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.store.labels(images).astype(np.int32))


class OnlineSource:
    """Features computed when they are asked for: no store, the backbone runs again for every use of an image.

    Photos go through the backbone as they do in extraction, one at a time on a CPU, so that with one torch thread the
    features equal a float32 store's to the bit.
    """

    skipped: Collection[int] = frozenset()
    codec: TransformCodec | None = None

    def __init__(self, dataset: Dataset, backbone: FrozenBackbone, recipe: Recipe, device: str = "cpu") -> None:
        if recipe.coding is not None:
            raise ConfigError("Features made on the fly are exact: a recipe of coded features needs their store.")
        self.dataset = dataset
        self.backbone = backbone.to(device)
        # With its number: "cuda" alone means another GPU on another thread, and batches are read ahead on one.
        self.device = next(self.backbone.parameters()).device
        self.batch = BATCH["cpu" if self.device.type == "cpu" else "cuda"]
        self._recipe = recipe

    @property
    def index(self) -> DatasetIndex:
        return self.dataset.index

    @property
    def recipe(self) -> Recipe:
        return self._recipe

    def classes_present(self, image: int) -> Sequence[int]:
        values = np.unique(self.dataset.label(image))
        return [int(v) - 1 for v in values if v not in (0, self.index.ignore_label)]

    def features(self, images: Sequence[int]) -> list[Tensor]:
        size = self.recipe.image_size
        photos = torch.from_numpy(np.stack([network_image(self.dataset.image(i), size) for i in images]))
        parts = [self.backbone(part.to(self.device)) for part in photos.split(self.batch)]
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    def labels(self, images: Sequence[int]) -> Tensor:
        size = self.recipe.image_size
        maps = [resize_label(self.dataset.label(i), (size, size)) for i in images]
        return torch.from_numpy(np.stack(maps).astype(np.int32))


@dataclass(frozen=True)
class EpisodeBatch:
    """B episodes of K shots as tensors. S is the network's image size."""

    query: list[Tensor]
    """Levels of the queries, finest first, each (B, L, H, W, C); codes, (B, 1, H, W, bytes), if there is a `codec`."""
    support: list[Tensor]
    """Levels of the supports, each (B K, L, U, V, C): all shots of the first episode, then of the second, ..."""
    support_mask: Tensor
    """(B K, S, S) bool, True inside the object."""
    target: Tensor
    """(B, S, S) bool, True where the query shows the class."""
    ignore: Tensor | None
    """(B, S, S) bool, True on boundary pixels; None for data sets without an ignore label."""
    shots: int
    unit: bool = False
    """The features are coordinates of unit vectors: their correlation is the inner product, without normalising."""
    codec: TransformCodec | None = None
    """What the levels are still coded with; `to` decodes them."""

    @property
    def size(self) -> int:
        return len(self.target)

    def to(self, device: str | torch.device) -> EpisodeBatch:
        """The batch on a device. Codes travel as they are, which is the least to send, and are decoded there."""
        move = lambda tensor: tensor.to(device, non_blocking=True)  # noqa: E731
        query, support = [move(level) for level in self.query], [move(level) for level in self.support]
        if self.codec is not None:
            codec = self.codec.on(query[0].device)
            query, support = codec.decode(query), codec.decode(support)
        return EpisodeBatch(
            query,
            support,
            move(self.support_mask),
            move(self.target),
            None if self.ignore is None else move(self.ignore),
            self.shots,
            self.unit,
        )


def load_batch(source: FeatureSource, episodes: Sequence[Episode]) -> EpisodeBatch:
    """Read what a batch of episodes needs. All must have the same number of shots. Coded features stay coded."""
    queries = [episode.query for episode in episodes]
    supports = [support for episode in episodes for support in episode.supports]
    shots = len(episodes[0].supports)
    query_labels, support_labels = source.labels(queries), source.labels(supports)
    ids = [episode.class_id + 1 for episode in episodes]
    value = torch.tensor(ids, dtype=query_labels.dtype, device=query_labels.device)
    target = query_labels == value[:, None, None]
    support_mask = support_labels == value.repeat_interleave(shots)[:, None, None]
    ignore = query_labels == source.index.ignore_label if source.index.has_ignore else None
    codec = source.codec
    return EpisodeBatch(
        source.features(queries),
        source.features(supports),
        support_mask,
        target,
        ignore,
        shots,
        codec is not None,
        codec,
    )


def prefetch(
    source: FeatureSource, batches: Iterator[Sequence[Episode]], depth: int = 2
) -> Generator[tuple[Sequence[Episode], EpisodeBatch], None, None]:
    """Load batches on a background thread, at most `depth` ahead of the one in use; 0 loads them when asked for.

    Order is kept, and an error is raised at the batch it belongs to. Close it if it is not read to its end.
    """
    if depth == 0:
        for episodes in batches:
            yield episodes, load_batch(source, episodes)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting: list[tuple[Sequence[Episode], Future[EpisodeBatch]]] = []
        try:
            for episodes in batches:
                waiting.append((episodes, pool.submit(load_batch, source, episodes)))
                if len(waiting) > depth:
                    first, loaded = waiting.pop(0)
                    yield first, loaded.result()
            while waiting:
                first, loaded = waiting.pop(0)
                yield first, loaded.result()
        finally:
            for _, future in waiting:
                future.cancel()
