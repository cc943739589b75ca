"""How much the choice of support moves the score, told by queries that were seen with several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.scores import bootstrap
from pipeline.scores.bootstrap import Floats, Interval, Part, interval
from pipeline.scores.rows import ScoredEpisodes

LEAST_USES = 5
"""Queries with which a support photo must occur before it is said to be good or bad."""


@dataclass(frozen=True)
class SupportSpread:
    """How much the choice of support moves an episode's IoU, told by queries that were seen with several."""

    queries: int
    """Queries seen with two or more different supports."""
    episodes: int
    within: Interval
    """Standard deviation of IoU between episodes of one query, points: what another support changes."""
    between: float
    """Standard deviation of IoU between all episodes of a class, points: what anything changes."""
    photos: int
    """Support photos that occur with at least LEAST_USES such queries (1-shot only)."""
    best: tuple[Part, ...]
    worst: tuple[Part, ...]
    """IoU with that photo as the support minus the mean of the same queries with other supports, points. The ends of
    many: chance is in them, too."""


def spread_by_support(folds: Sequence[ScoredEpisodes], shots: int, seed: int) -> SupportSpread | None:
    """The spread over all folds; None if no query was seen with two supports."""
    groups: dict[tuple[int, int, str], dict[tuple[str, ...], float]] = {}
    names = {class_id: name for episodes in folds for class_id, name in episodes.names.items()}
    for episodes in folds:
        for class_id, query, supports, value in zip(
            episodes.classes.tolist(), episodes.queries, episodes.supports, episodes.iou.tolist(), strict=True
        ):
            # The same supports again are the same episode again, not another support.
            groups.setdefault((episodes.fold, class_id, query), {})[tuple(sorted(supports))] = value
    several = [np.array(list(group.values())) for group in groups.values() if len(group) > 1]
    if not several:
        return None
    squares = np.array([[((g - g.mean()) ** 2).sum(), len(g) - 1] for g in several])
    samples = np.full(bootstrap.RESAMPLES, _root(squares.sum(0)))
    if len(several) > 1:
        for rows, weights in bootstrap.weights(("support", seed), bootstrap.RESAMPLES, len(several)):
            samples[rows] = _root(weights @ squares)
    by_class: dict[tuple[int, int], list[float]] = {}
    for (fold, class_id, _), group in groups.items():
        by_class.setdefault((fold, class_id), []).extend(group.values())
    spread = [[((np.array(v) - np.mean(v)) ** 2).sum(), len(v) - 1] for v in by_class.values()]
    parts = _photos((names[key[1]], group) for key, group in groups.items()) if shots == 1 else []
    return SupportSpread(
        queries=len(several),
        episodes=sum(map(len, several)),
        within=interval(float(_root(squares.sum(0))), samples),
        between=float(_root(np.sum(spread, axis=0))),
        photos=len(parts),
        best=tuple(reversed(parts[-3:])),
        worst=tuple(parts[:3]),
    )


def _root(totals: Floats) -> Floats:
    """Sum of squares and degrees of freedom (..., 2) -> standard deviation (...)."""
    root: Floats = np.sqrt(totals[..., 0] / np.maximum(totals[..., 1], 1))
    return root


def _photos(groups: Iterable[tuple[str, Mapping[tuple[str, ...], float]]]) -> list[Part]:
    """Support photos with enough uses, from the worst to the best; from (class name, supports -> IoU) of each query."""
    from scipy import stats

    apart: dict[str, list[float]] = {}
    for name, group in groups:
        if len(group) < 2:
            continue
        total = sum(group.values())
        for (photo,), value in group.items():
            others = (total - value) / (len(group) - 1)
            apart.setdefault(f"{name}: {photo}", []).append(value - others)
    parts = []
    for photo, values in apart.items():
        if len(values) >= LEAST_USES:
            mean = float(np.mean(values))
            half = float(stats.t.ppf((1 + bootstrap.LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1))
            half /= len(values) ** 0.5
            parts.append(Part(photo, len(values), Interval(mean, mean - half, mean + half)))
    return sorted(parts, key=lambda part: part.value.value if part.value else 0.0)
