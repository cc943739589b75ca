"""Batches of episodes as tensors, read ahead on a thread."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hsnet.backbone import Backbone
from hsnet.errors import ShapeError
from pipeline.common.runner import read_ahead
from pipeline.episodes.stream import Episode
from pipeline.features.budgeted import TransformCodec
from pipeline.features.forward import levels_of
from pipeline.loading.source import FeatureSource


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
    support_ignore: Tensor | None = None
    """(B K, S, S) bool, `ignore` of the supports."""
    novel: Tensor | None = None
    """(B, S, S) bool, True where the query shows a class that was asked for; None if none was."""
    support_novel: Tensor | None = None
    """(B K, S, S) bool, `novel` of the supports."""

    @property
    def size(self) -> int:
        return len(self.target)

    def to(self, device: str | torch.device) -> EpisodeBatch:
        """The batch on a device. Codes travel as they are, which is the least to send, and are decoded there."""
        move = lambda tensor: tensor.to(device, non_blocking=True)  # noqa: E731
        maybe = lambda tensor: None if tensor is None else move(tensor)  # noqa: E731
        query, support = [move(level) for level in self.query], [move(level) for level in self.support]
        if self.codec is not None:
            codec = self.codec.on(query[0].device)
            query, support = codec.decode(query), codec.decode(support)
        return replace(
            self,
            query=query,
            support=support,
            support_mask=move(self.support_mask),
            target=move(self.target),
            ignore=maybe(self.ignore),
            codec=None,
            support_ignore=maybe(self.support_ignore),
            novel=maybe(self.novel),
            support_novel=maybe(self.support_novel),
        )

    def read_by(self, backbone: Backbone) -> EpisodeBatch:
        """The batch with levels in the place of photos (`pipeline.loading.source.PhotoSource`), without gradients.

        In passes of as many photos as in extraction, so that a store of the same weights holds these very levels.
        """
        (query,), (support,) = self.query, self.support
        with torch.no_grad():
            return replace(self, query=levels_of(backbone, query), support=levels_of(backbone, support))

    def both_directions(self) -> EpisodeBatch:
        """2 B one-shot episodes of B: these, then each with query and support exchanged.

        What was the support's mask is the target of the second half, with the support's own boundary pixels.
        """
        if self.shots != 1:
            raise ShapeError(f"Only one-shot episodes can be exchanged, got {self.shots} shots.")
        ignore = None
        if self.ignore is not None and self.support_ignore is not None:
            ignore = torch.cat([self.ignore, self.support_ignore])
        novel = None
        if self.novel is not None and self.support_novel is not None:
            novel = torch.cat([self.novel, self.support_novel])
        pairs = list(zip(self.query, self.support, strict=True))
        return replace(
            self,
            query=[torch.cat([query, support]) for query, support in pairs],
            support=[torch.cat([support, query]) for query, support in pairs],
            support_mask=torch.cat([self.support_mask, self.target]),
            target=torch.cat([self.target, self.support_mask]),
            ignore=ignore,
            support_ignore=None if ignore is None else ignore.roll(self.size, 0),
            novel=novel,
            support_novel=None if novel is None else novel.roll(self.size, 0),
        )


def load_batch(source: FeatureSource, episodes: Sequence[Episode], novel: Sequence[int] = ()) -> EpisodeBatch:
    """Read what a batch of episodes needs. All must have the same number of shots. Coded features stay coded.

    Args:
        novel: class ids whose pixels shall be marked (`EpisodeBatch.novel`).
    """
    queries = [episode.query for episode in episodes]
    supports = [support for episode in episodes for support in episode.supports]
    shots = len(episodes[0].supports)
    query_labels, support_labels = source.labels(queries), source.labels(supports)
    ids = [episode.class_id + 1 for episode in episodes]
    value = torch.tensor(ids, dtype=query_labels.dtype, device=query_labels.device)
    target = query_labels == value[:, None, None]
    support_mask = support_labels == value.repeat_interleave(shots)[:, None, None]
    boundary = source.index.ignore_label if source.index.has_ignore else None
    return EpisodeBatch(
        query=source.features(queries),
        support=source.features(supports),
        support_mask=support_mask,
        target=target,
        ignore=None if boundary is None else query_labels == boundary,
        shots=shots,
        unit=source.codec is not None,
        codec=source.codec,
        support_ignore=None if boundary is None else support_labels == boundary,
        novel=_shows(query_labels, novel),
        support_novel=_shows(support_labels, novel),
    )


def _shows(labels: Tensor, classes: Sequence[int]) -> Tensor | None:
    """Where label maps show one of some classes; None without a class."""
    if not classes:
        return None
    return torch.isin(labels, torch.tensor(classes, dtype=labels.dtype, device=labels.device) + 1)


def prefetch(
    source: FeatureSource, batches: Iterator[Sequence[Episode]], depth: int = 2, novel: Sequence[int] = ()
) -> Generator[tuple[Sequence[Episode], EpisodeBatch], None, None]:
    """Load batches on a background thread, at most `depth` ahead of the one in use; see `read_ahead`."""
    return read_ahead(partial(load_batch, source, novel=novel), batches, depth, "prefetch")


@dataclass(frozen=True)
class WaysBatch:
    """B episodes of N classes and K shots as tensors: the query is read once for all classes."""

    batch: EpisodeBatch
    """Supports of all classes: those of the first episode's first class, then of its second, ..."""
    truth: Tensor
    """(B, S, S) int64: 0, or n + 1 where the query shows the class at place n of its episode."""
    ways: int

    def to(self, device: str | torch.device) -> WaysBatch:
        """The batch on a device, decoded there."""
        return replace(self, batch=self.batch.to(device), truth=self.truth.to(device, non_blocking=True))

    def of_class(self, place: int) -> EpisodeBatch:
        """The one-way episodes of the classes at a place, 0 to N - 1; once the batch is decoded (`to`)."""
        batch, shots = self.batch, self.batch.shots // self.ways

        def chosen(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (-1, self.ways, shots))[:, place].flatten(0, 1)

        return replace(
            batch,
            support=[chosen(level) for level in batch.support],
            support_mask=chosen(batch.support_mask),
            target=self.truth == place + 1,
            shots=shots,
        )


def load_ways(source: FeatureSource, episodes: Sequence[Episode]) -> WaysBatch:
    """Read what a batch of N-way episodes needs. All must have the same numbers of classes and shots."""
    queries = [episode.query for episode in episodes]
    classes = [[class_id for class_id, _ in episode.classes] for episode in episodes]
    supports = [image for episode in episodes for image in episode.photos[1:]]
    ways, shots = len(classes[0]), len(supports) // len(episodes)
    query_labels, support_labels = source.labels(queries), source.labels(supports)
    ids = torch.tensor(classes, dtype=query_labels.dtype, device=query_labels.device) + 1
    shown = query_labels[:, None] == ids[..., None, None]
    truth = (shown * torch.arange(1, ways + 1, device=shown.device)[:, None, None]).sum(1)
    ignore = query_labels == source.index.ignore_label if source.index.has_ignore else None
    batch = EpisodeBatch(
        query=source.features(queries),
        support=source.features(supports),
        support_mask=support_labels == ids.flatten().repeat_interleave(shots // ways)[:, None, None],
        target=truth > 0,
        ignore=ignore,
        shots=shots,
        unit=source.codec is not None,
        codec=source.codec,
    )
    return WaysBatch(batch, truth, ways)
