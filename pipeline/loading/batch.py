"""Batches of episodes as tensors: what is read for them, and what is made of it where they are used.

Every photo of a batch is read once, and sent once to a device of its own memory (`once`): the batch is gathered there.
On a CPU, where nothing is sent, photos are read into the places they have in the batch, so that nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Generic, TypeVar

import torch
from torch import Tensor

from hsnet.backbone import Backbone
from hsnet.errors import ShapeError
from pipeline.episodes.stream import Episode
from pipeline.features.budgeted import TransformCodec
from pipeline.features.forward import levels_of
from pipeline.loading.feeding import Feed, feed
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


Rows = slice | Tensor
"""Which of the photos, in order: as they lie, or (n,) int64 rows to be gathered."""
Seen = TypeVar("Seen")
B = TypeVar("B")


@dataclass(frozen=True)
class Photos:
    """n photos as they are read: what is sent to a device."""

    levels: list[Tensor]
    """Finest first, each (n, L, H, W, C); codes, (n, 1, H, W, bytes), if there is a `codec`."""
    labels: Tensor
    """(n, S, S) label maps of the source's own type, uint8 up to 254 classes."""
    codec: TransformCodec | None
    ignore_label: int | None
    """Label of boundary pixels, None if there are none."""


@dataclass(frozen=True)
class Asked:
    """Which of the photos B episodes are made of, and what is asked of them."""

    query: Rows
    support: Rows
    values: Tensor
    """Labels of the classes: (B,), or (B, N) of N-way episodes."""
    shots: int
    """Supports of an episode, of all its classes together."""
    novel: Tensor | None = None
    """(n,) labels whose pixels shall be marked (`EpisodeBatch.novel`)."""


@dataclass(frozen=True)
class BatchParts(Generic[B]):
    """What was read for episodes; `made` is the batch, on the device where the tensors are."""

    photos: Photos
    asked: tuple[Asked, ...]
    make: Callable[[Photos, tuple[Asked, ...]], B]

    def moved(self, move: Callable[[Tensor], Tensor]) -> BatchParts[B]:
        """The same with what `move` makes of each tensor."""

        def rows(chosen: Rows) -> Rows:
            return chosen if isinstance(chosen, slice) else move(chosen)

        photos = self.photos
        return replace(
            self,
            photos=replace(photos, levels=[move(level) for level in photos.levels], labels=move(photos.labels)),
            asked=tuple(
                replace(
                    one,
                    query=rows(one.query),
                    support=rows(one.support),
                    values=move(one.values),
                    novel=None if one.novel is None else move(one.novel),
                )
                for one in self.asked
            ),
        )

    def made(self) -> B:
        """The batch, where the tensors are."""
        return self.make(self.photos, self.asked)


def read_batch(
    source: FeatureSource, episodes: Sequence[Episode], novel: Sequence[int] = (), once: bool = False
) -> BatchParts[EpisodeBatch]:
    """Read what a batch of episodes needs. All must have the same number of shots. Coded features stay coded.

    Args:
        novel: class ids whose pixels shall be marked (`EpisodeBatch.novel`).
        once: hold a photo once that is in several places, to be gathered on the device. Otherwise it lies in all of
            them; it is read once in either case.
    """
    return BatchParts(*_read(source, [(episodes, novel)], once), make=_only)


def read_kinds(
    source: FeatureSource, kinds: Mapping[Seen, tuple[Sequence[Episode], Sequence[int]]], once: bool = False
) -> BatchParts[Mapping[Seen, EpisodeBatch]]:
    """Batches of several kinds by name, from (episodes, novel) as for `read_batch`; they share their photos."""
    return BatchParts(*_read(source, list(kinds.values()), once), make=partial(_named, tuple(kinds)))


def load_batch(source: FeatureSource, episodes: Sequence[Episode], novel: Sequence[int] = ()) -> EpisodeBatch:
    """The batch of `read_batch`, where the source gives it."""
    return read_batch(source, episodes, novel).made()


def _read(
    source: FeatureSource, kinds: Sequence[tuple[Sequence[Episode], Sequence[int]]], once: bool, ways: bool = False
) -> tuple[Photos, tuple[Asked, ...]]:
    """Read the photos of several batches, and say where each of them has its own; `ways`: of all their classes."""
    lists = []
    for episodes, _ in kinds:
        lists.append([episode.query for episode in episodes])
        lists.append([image for episode in episodes for image in (episode.photos[1:] if ways else episode.supports)])
    images, rows = _places(lists, once)
    levels, labels = (source.features(images), source.labels(images)) if images else ([], torch.empty(0))
    index = source.index
    photos = Photos(levels, labels, source.codec, index.ignore_label if index.has_ignore else None)
    asked = []
    for number, (episodes, novel) in enumerate(kinds):
        classes = [[class_id for class_id, _ in e.classes] if ways else e.class_id for e in episodes]
        ids = torch.tensor(classes, dtype=labels.dtype, device=labels.device)
        asked.append(
            Asked(
                query=rows[2 * number],
                support=rows[2 * number + 1],
                values=ids + 1,
                shots=len(lists[2 * number + 1]) // len(episodes),
                novel=torch.tensor(novel, dtype=labels.dtype, device=labels.device) + 1 if novel else None,
            )
        )
    return photos, tuple(asked)


def _places(lists: Sequence[Sequence[int]], once: bool) -> tuple[list[int], list[Rows]]:
    """Images to be read, and the rows of each list among them."""
    every = [image for images in lists for image in images]
    distinct = {image: row for row, image in enumerate(dict.fromkeys(every))}
    if once and len(distinct) < len(every):
        return list(distinct), [torch.tensor([distinct[image] for image in images]) for images in lists]
    ends = list(accumulate(map(len, lists)))
    return every, [slice(end - len(images), end) for end, images in zip(ends, lists, strict=True)]


def _chosen(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _batch(photos: Photos, asked: Asked, truth: Callable[[Tensor], tuple[Tensor, Tensor]]) -> EpisodeBatch:
    """A batch; `truth` makes (target, values of every support) of the queries' labels."""
    query_labels, support_labels = _chosen(photos.labels, asked.query), _chosen(photos.labels, asked.support)
    target, values = truth(query_labels)
    boundary, novel = photos.ignore_label, asked.novel
    return EpisodeBatch(
        query=[_chosen(level, asked.query) for level in photos.levels],
        support=[_chosen(level, asked.support) for level in photos.levels],
        support_mask=support_labels == values[:, None, None],
        target=target,
        ignore=None if boundary is None else query_labels == boundary,
        shots=asked.shots,
        unit=photos.codec is not None,
        codec=photos.codec,
        support_ignore=None if boundary is None else support_labels == boundary,
        novel=None if novel is None else torch.isin(query_labels, novel),
        support_novel=None if novel is None else torch.isin(support_labels, novel),
    )


def _one_way(photos: Photos, asked: Asked) -> EpisodeBatch:
    values = asked.values
    return _batch(
        photos, asked, lambda labels: (labels == values[:, None, None], values.repeat_interleave(asked.shots))
    )


def _only(photos: Photos, asked: tuple[Asked, ...]) -> EpisodeBatch:
    return _one_way(photos, asked[0])


def _named(names: tuple[Seen, ...], photos: Photos, asked: tuple[Asked, ...]) -> Mapping[Seen, EpisodeBatch]:
    return {name: _one_way(photos, one) for name, one in zip(names, asked, strict=True)}


def prefetch(
    source: FeatureSource,
    batches: Iterator[Sequence[Episode]],
    depth: int = 2,
    novel: Sequence[int] = (),
    device: str | torch.device = "cpu",
) -> Feed[Sequence[Episode], EpisodeBatch]:
    """Batches of episodes for a device, at most `depth` read ahead of the one in use; see `feed`."""
    return feed(source, partial(read_batch, novel=novel), batches, device, depth)


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


def read_ways(source: FeatureSource, episodes: Sequence[Episode], once: bool = False) -> BatchParts[WaysBatch]:
    """Read what a batch of N-way episodes needs. All must have the same numbers of classes and shots.

    `once` as for `read_batch`.
    """
    return BatchParts(*_read(source, [(episodes, ())], once, ways=True), make=_several_ways)


def load_ways(source: FeatureSource, episodes: Sequence[Episode]) -> WaysBatch:
    """The batch of `read_ways`, where the source gives it."""
    return read_ways(source, episodes).made()


def _several_ways(photos: Photos, asked: tuple[Asked, ...]) -> WaysBatch:
    (one,) = asked
    values, ways = one.values, one.values.shape[1]
    labels = _chosen(photos.labels, one.query)
    shown = labels[:, None] == values[..., None, None]
    truth = (shown * torch.arange(1, ways + 1, device=shown.device)[:, None, None]).sum(1)
    each = values.flatten().repeat_interleave(one.shots // ways)
    return WaysBatch(_batch(photos, one, lambda _: (truth > 0, each)), truth, ways)
