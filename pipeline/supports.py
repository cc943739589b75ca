"""How much the choice of the support matters: every query of a class under many supports, and which one to take.

Features come from a store, so one more support costs a correlation and no backbone. A score is the IoU of summed
counts, as everywhere. The best of many supports looks better than it is, because it was chosen for its score; what it
is worth is therefore told by queries that it was not chosen on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import ConfigError
from hsnet.metrics import count
from pipeline.common.philox import philox
from pipeline.common.runner import Runner, SerialRunner
from pipeline.datasets.index import DatasetIndex
from pipeline.episodes.stream import Episode
from pipeline.heads.segmenters import Segmenter
from pipeline.loading.batch import load_batch
from pipeline.loading.source import FeatureSource

if TYPE_CHECKING:
    import pyarrow as pa

SUPPORTS_AT_ONCE = 10
"""Supports of one query in a batch, which bounds memory: 20 MB of ResNet-50 features each at 400 px."""


@dataclass(frozen=True)
class SupportScore:
    """What one photo is worth as a support."""

    image: str
    iou: float
    """Percent, over all queries of its class but itself."""


@dataclass(frozen=True)
class ClassChoice:
    """What the choice of the support does to one class. IoUs are in percent."""

    class_id: int
    name: str
    queries: int
    supports: tuple[SupportScore, ...]
    """Best first."""
    mean: float
    """Mean IoU over the supports: what a support drawn at random is worth."""
    spread: float
    """Standard deviation of the IoU over the supports."""
    suggested: str
    """The support to take: the best over all queries."""
    gain: float | None
    """Points over the mean, on queries that were not chosen on: the best support of one half of the queries, scored on
    the other half, and the other way round. None with fewer than four queries."""


@dataclass(frozen=True)
class SupportChoice:
    """All classes, and the counts behind them."""

    classes: tuple[ClassChoice, ...]
    pairs: tuple[Mapping[str, Any], ...]
    """One row per (class, query, support): `class_id`, `query`, `support`, `intersection`, `union` (object pixels at
    network size, ignored ones left out)."""

    def table(self) -> pa.Table:
        """The pairs as an Arrow table."""
        import pyarrow as pa

        return pa.Table.from_pylist(list(self.pairs))


def choose_supports(
    make_segmenter: Callable[[], Segmenter],
    make_source: Callable[[], FeatureSource],
    index: DatasetIndex,
    *,
    fold: int,
    role: str = "test",
    classes: Sequence[str] = (),
    candidates: int = 20,
    queries: int = 20,
    seed: int = 0,
    skipped: Sequence[int] = (),
    runner: Runner | None = None,
    device: str = "cpu",
    on_event: Callable[[int, int], None] | None = None,
) -> SupportChoice:
    """Predict every query of a class with every candidate support.

    Args:
        make_segmenter, make_source: called once per worker process; must be picklable for Ray.
        classes: names; all of the fold's by default.
        candidates, queries: photos drawn per class, all of a class that has fewer. A photo can be both, but is
            never its own support.
        seed: which photos are drawn.
        skipped: images that must not be drawn.
        on_event: called with (queries done, queries in all).

    Raises:
        ConfigError: no such fold or class, or no class with two photos.
    """
    split = index.split(fold, role)
    names = {index.classes[class_id]: class_id for class_id in split.class_ids}
    if unknown := [name for name in classes if name not in names]:
        raise ConfigError(f"Fold {fold} has no class '{unknown[0]}' to test; its classes: {', '.join(names)}.")
    if min(candidates, queries) < 1:
        raise ConfigError(f"There must be at least 1 candidate and 1 query, got {candidates} and {queries}.")
    left_out = set(skipped)
    work: list[Episode] = []  # a query with all its candidates, not the shots of one task
    for class_id in sorted(names[name] for name in (classes or names)):
        images = [image for image in dict.fromkeys(split.by_class[class_id]) if image not in left_out]
        drawn = _shuffled(images, index.digest, fold, role, seed, class_id)
        # From both ends: no photo is both as long as there are enough.
        supports = drawn[:candidates]
        for query in drawn[::-1][:queries]:
            mates = index.mates(query)
            if others := tuple(image for image in supports if image not in mates):
                work.append(Episode(query, others, class_id))
    if not work:
        raise ConfigError(f"No class of fold {fold} has two photos: there is nothing to choose.")

    def make_worker() -> Callable[[Episode], list[list[int]]]:
        segmenter, source = make_segmenter(), make_source()
        return lambda pairs: _counts(segmenter, source, pairs, device)

    counts: dict[tuple[int, int, int], tuple[int, int]] = {}
    if on_event:
        on_event(0, len(work))
    for done, (pairs, totals) in enumerate((runner or SerialRunner()).map(make_worker, work), 1):
        for support, (intersection, union) in zip(pairs.supports, totals, strict=True):
            counts[pairs.class_id, pairs.query, support] = intersection, union
        if on_event:
            on_event(done, len(work))
    tested = sorted({pairs.class_id for pairs in work})
    return SupportChoice(
        tuple(_summary(index, class_id, counts) for class_id in tested),
        tuple(
            {
                "class_id": class_id,
                "query": index.images[query],
                "support": index.images[support],
                "intersection": value[0],
                "union": value[1],
            }
            for (class_id, query, support), value in sorted(counts.items())
        ),
    )


def _shuffled(images: Sequence[int], *key: object) -> list[int]:
    order = np.argsort(philox(*key, "support choice").random_raw(len(images)), kind="stable")
    return [images[i] for i in order]


def _counts(segmenter: Segmenter, source: FeatureSource, work: Episode, device: str) -> list[list[int]]:
    """[intersection, union] of the query under every support."""
    totals: list[list[int]] = []
    for first in range(0, len(work.supports), SUPPORTS_AT_ONCE):
        supports = work.supports[first : first + SUPPORTS_AT_ONCE]
        batch = load_batch(source, [Episode(work.query, supports, work.class_id)]).to(device)
        size = (batch.target.shape[1], batch.target.shape[2])
        masks = segmenter.answer(batch).masks(size)[:, 0]
        ignore = None if batch.ignore is None else batch.ignore.expand_as(masks)
        totals += count(masks, batch.target.expand_as(masks), ignore)[:, :, 1].cpu().tolist()
    return totals


def _summary(index: DatasetIndex, class_id: int, counts: Mapping[tuple[int, int, int], tuple[int, int]]) -> ClassChoice:
    of_class = {(query, support): value for (c, query, support), value in counts.items() if c == class_id}
    queries, supports = (sorted({key[side] for key in of_class}) for side in (0, 1))
    table = np.zeros((len(queries), len(supports), 2), np.int64)  # a photo adds nothing as its own support
    for (query, support), value in of_class.items():
        table[queries.index(query), supports.index(support)] = value
    scores = _iou(table)
    order = np.argsort(-scores, kind="stable")
    return ClassChoice(
        class_id,
        index.classes[class_id],
        len(queries),
        tuple(SupportScore(index.images[supports[i]], float(scores[i])) for i in order),
        float(scores.mean()),
        float(scores.std()),
        index.images[supports[order[0]]],
        _gain(table),
    )


def _gain(table: NDArray[np.int64]) -> float | None:
    """Cross-validated gain of the best support over the mean support, points; see `ClassChoice.gain`."""
    if len(table) < 4:
        return None
    gains = []
    for chosen_on in (0, 1):
        best = int(_iou(table[chosen_on::2]).argmax())
        tested = _iou(table[1 - chosen_on :: 2])
        gains.append(tested[best] - tested.mean())
    return float(np.mean(gains))


def _iou(table: NDArray[np.int64]) -> NDArray[np.float64]:
    """Percent per support, from (queries, supports, intersection and union)."""
    totals = table.sum(axis=0)
    return np.asarray(100 * totals[:, 0] / np.maximum(totals[:, 1], 1), np.float64)
