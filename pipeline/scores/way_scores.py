"""Scores of N-way episodes with intervals, and paired differences, from rows alone.

A class's IoU sums over all episodes that it is one of the classes of: those whose query shows it, and those where it is
only offered and every pixel given to it is wrong. mIoU is the mean over the fold's classes. FB-IoU knows object and
background only, whichever class. With N = 1 both are those of 1-way rows, intervals included.

Episodes are drawn again within the class that comes first in them (the query's, unless it shows none), as
`pipeline.scores.bootstrap` does for 1-way.

Dimension key: M methods, n episodes, F sums, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import ConfigError, DataError
from pipeline.episodes.protocols import Policy
from pipeline.scores import bootstrap
from pipeline.scores.bootstrap import Interval, Part, interval, p_value
from pipeline.scores.rows import (
    cases_of,
    paired_fusion,
    require_counts,
    require_one_configuration,
    require_same_episodes,
    together_and_apart,
)
from pipeline.scores.way_rows import WayEpisodes, WayResults, way_episodes

ALARM = 0.01
"""Share of a query's pixels from which what is wrongly found is an alarm."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WayFigures:
    """Percent, or points for a difference; None where no episode tells."""

    miou: Interval
    fb_iou: Interval
    confused: Interval | None
    """Object pixels given to another of the classes, of all object pixels."""
    stray_pixels: Interval | None
    """Pixels given to classes that the query does not show, of all pixels of queries that show some but not all."""
    stray_episodes: Interval | None
    """Such episodes in which they are at least ALARM of the query."""
    alarm_pixels: Interval | None
    """Pixels given to any class, of all pixels of queries that show none."""
    alarm_episodes: Interval | None
    """Such episodes in which they are at least ALARM of the query."""


@dataclass(frozen=True)
class WayScore:
    """One number of shots, way to combine them, and policy: of a fold, or the mean over folds."""

    policy: Policy
    shots: int
    fusion: str
    fold: int | None
    """None for the mean over several folds."""
    ways: int
    seeds: tuple[int, ...]
    episodes: int
    partial: int
    """Episodes whose query shows some of the classes, but not all."""
    empty: int
    """Episodes whose query shows none."""
    figures: WayFigures
    classes: tuple[Part, ...]
    """IoU per class; `Part.episodes` are those that the class is one of the N of."""


@dataclass(frozen=True)
class WayDifference:
    """The first set minus the one it is compared against, on the same episodes."""

    policy: Policy
    shots: int
    fusion: str
    fusion_against: str
    fold: int | None
    episodes: int
    figures: WayFigures
    p: float
    """Of the difference in mIoU, two-sided: that swapping the two on any episode would change nothing."""
    classes: tuple[Part, ...]


def score_ways(
    files: Sequence[WayResults],
    *,
    policies: Sequence[Policy] = (),
    fusions: Sequence[str] = (),
    unit: str = "episode",
    seed: int = 0,
) -> list[WayScore]:
    """Scores of one configuration: per policy, number of shots and fusion the mean over several folds, then every fold.

    Args:
        policies, fusions: empty: the protocol's own policy; its own fusion for one shot, all there are for more.
        unit: what is drawn again, "episode" or "query" (all episodes of a query photo together).
        seed: of the resampling.

    Raises:
        DataError: files that do not belong together, or without the policy's counts.
        ConfigError: an unknown fusion or unit.
    """
    require_one_configuration(files)
    policies = list(policies) or [files[0].protocol.policy]
    require_counts(files, policies)
    scores = []
    for policy, shots, fusion in _cases(files, policies, fusions, unit):
        folds = [
            (episodes, _resample(sums(episodes)[None], episodes, unit, seed))
            for fold in sorted({file.fold for file in files})
            if (episodes := way_episodes(files, fold, shots, fusion, policy)) is not None
        ]
        for some in together_and_apart(folds):
            each = [episodes for episodes, _ in some]
            some_shown = [e.shown.any(1) & ~e.shown.all(1) for e in each]
            scores.append(
                WayScore(
                    policy,
                    shots,
                    fusion,
                    each[0].fold if len(some) == 1 else None,
                    files[0].ways,
                    tuple(sorted({int(one) for e in each for one in e.seeds})),
                    sum(map(len, each)),
                    sum(int(mask.sum()) for mask in some_shown),
                    sum(int(e.empty.sum()) for e in each),
                    _figures(some, None),
                    _parts(*some[0], None) if len(some) == 1 else (),
                )
            )
    return scores


def compare_ways(
    files: Sequence[WayResults],
    against: Sequence[WayResults],
    *,
    policies: Sequence[Policy] = (),
    fusions: Sequence[str] = (),
    unit: str = "episode",
    seed: int = 0,
) -> list[WayDifference]:
    """Paired differences, `files` minus `against`; the rest as for `score_ways`.

    Raises:
        DataError: also other episodes, or no number of shots and fusion in both.
    """
    require_one_configuration(files)
    require_one_configuration(against)
    require_same_episodes(files, against)
    policies = list(policies) or [files[0].protocol.policy]
    require_counts((*files, *against), policies)
    differences = []
    for policy, shots, fusion in _cases(files, policies, fusions, unit):
        other = paired_fusion(files, against, (shots, fusion), fusions)
        folds = []
        for fold in sorted({file.fold for file in files}):
            first = way_episodes(files, fold, shots, fusion, policy)
            second = way_episodes(against, fold, shots, other, policy)
            if first is None or second is None:
                continue
            if first.identities != second.identities:
                raise DataError(
                    f"Fold {fold}, {shots}-shot: the digests of the manifests agree, but the episodes of "
                    f"{files[0].path} and {against[0].path} differ. One was changed; evaluate again."
                )
            both = np.stack([sums(first), sums(second)])
            folds.append((first, _resample(both, first, unit, seed), _swapped(both, first, unit, seed)))
        for some in together_and_apart(folds):
            drawn = [(episodes, sampled) for episodes, sampled, _ in some]
            differences.append(
                WayDifference(
                    policy,
                    shots,
                    fusion,
                    other,
                    drawn[0][0].fold if len(some) == 1 else None,
                    sum(len(episodes) for episodes, _ in drawn),
                    _figures(drawn, 1),
                    p_value(
                        float(np.mean([test[0] for _, _, test in some])),
                        np.mean([test[1] for _, _, test in some], axis=0),
                    ),
                    _parts(*drawn[0], 1) if len(some) == 1 else (),
                )
            )
    if not differences:
        raise DataError(
            f"Nothing can be paired: {files[0].path} and {against[0].path} have no number of shots and fusion in "
            f"common. Nothing was computed."
        )
    return differences


def sums(episodes: WayEpisodes) -> NDArray[np.int64]:
    """(n, F): what every episode adds to the sums that figures are ratios of.

    First (intersection, union) of every class; then (intersection, union) of background and of any object; then
    (part, whole) of `confused`, `stray_pixels`, `stray_episodes`, `alarm_pixels` and `alarm_episodes`.
    """
    counts, (n, ways) = episodes.counts, episodes.classes.shape
    column = {class_id: place for place, class_id in enumerate(episodes.class_ids)}
    of_classes = np.zeros((n, len(column), 2), np.int64)
    rows = np.arange(n)
    true, found = counts.sum(2), counts.sum(1)
    for place in range(1, ways + 1):
        columns = np.array([column[int(c)] for c in episodes.classes[:, place - 1]], np.int64)
        inside = counts[:, place, place]
        of_classes[rows, columns, 0] = inside
        of_classes[rows, columns, 1] = true[:, place] + found[:, place] - inside
    everything, background, objects = counts.sum((1, 2)), counts[:, 0, 0], counts[:, 1:, 1:].sum((1, 2))
    right = np.trace(counts[:, 1:, 1:], axis1=1, axis2=2)
    stray = (found[:, 1:] * ~episodes.shown).sum(1)
    some = episodes.shown.any(1) & ~episodes.shown.all(1)
    alarmed = (stray > 0) & (stray >= ALARM * everything)
    pairs = [
        (background, everything - objects),
        (objects, everything - background),
        (objects - right, true[:, 1:].sum(1)),
    ]
    for mask in (some, episodes.empty):
        pairs += [(stray * mask, everything * mask), (alarmed & mask, mask)]
    rest = [np.stack(pair, 1) for pair in pairs]
    return np.concatenate([of_classes.reshape(n, -1), *rest], 1).astype(np.int64)


def _class_iou(totals: Floats, classes: int) -> Floats:
    """(..., F) -> (..., C), percent; 0 where the union is empty, as `hsnet.metrics.class_iou`."""
    own = totals[..., : 2 * classes]
    iou: Floats = 100 * own[..., 0::2] / np.maximum(own[..., 1::2], 1)
    return iou


def _every_figure(totals: Floats, classes: int) -> Floats:
    """(..., F) -> (fields of WayFigures, ...), percent; NaN where nothing tells."""
    rest = totals[..., 2 * classes :]
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = 100 * rest[..., 0::2] / np.where(rest[..., 1::2] > 0, rest[..., 1::2], np.nan)
    miou, fb_iou = _class_iou(totals, classes).mean(-1), rates[..., :2].mean(-1)
    return np.stack([miou, fb_iou, *np.moveaxis(rates[..., 2:], -1, 0)])


Drawn = tuple[Floats, Floats]
"""(M, F) totals and (R, M, F) of resamples."""


def _resample(values: NDArray[np.int64], episodes: WayEpisodes, unit: str, seed: int) -> Drawn:
    """As `pipeline.scores.bootstrap.resample`, for any sums (M, n, F)."""
    totals = values.sum(1).astype(np.float64)
    samples = np.zeros((bootstrap.RESAMPLES, *totals.shape))
    for class_id, units in _strata(values, episodes, unit):
        for rows, drawn in bootstrap.drawn_again(units, seed * 10_000 + episodes.fold, class_id, len(samples)):
            samples[rows] += drawn
    return totals, samples


def _swapped(values: NDArray[np.int64], episodes: WayEpisodes, unit: str, seed: int) -> tuple[float, Floats]:
    """As `pipeline.scores.bootstrap.swapped_differences`: the difference of mIoU, and (swaps,) of swapped ones."""
    classes = len(episodes.class_ids)
    values = values[..., : 2 * classes]
    totals = values.sum(1).astype(np.float64)
    moved = np.zeros((bootstrap.SWAPS, 2 * classes))
    for class_id, units in _strata(values, episodes, unit):
        apart = (units[0] - units[1]).astype(np.float64)
        for rows, signed in bootstrap.swapped_sums(apart, seed * 10_000 + episodes.fold, class_id, len(moved)):
            moved[rows] += signed
    both = totals.sum(0)

    def miou(some: Floats) -> Floats:
        return np.asarray(_class_iou(some, classes).mean(-1))

    return float(miou(totals[0]) - miou(totals[1])), miou((both + moved) / 2) - miou((both - moved) / 2)


def _strata(values: NDArray[np.int64], episodes: WayEpisodes, unit: str) -> list[tuple[int, NDArray[np.int64]]]:
    """(class id, (M, units, F)) of the episodes in which the class comes first."""
    groups = episodes.queries if unit == "query" else None
    first = episodes.classes[:, 0]
    return [
        (int(class_id), bootstrap.units_of(values, first == class_id, groups))
        for class_id in episodes.class_ids
        if (first == class_id).any()
    ]


def _figures(folds: Sequence[tuple[WayEpisodes, Drawn]], minus: int | None) -> WayFigures:
    """The mean over folds, each drawn by itself; of method 0, or of it minus method `minus`."""
    values: list[Floats] = []
    samples: list[Floats] = []
    for episodes, drawn in folds:
        for into, totals in zip((values, samples), drawn, strict=True):
            every = _every_figure(totals, len(episodes.class_ids))
            into.append(every[..., 0] - (0 if minus is None else every[..., minus]))
    mean, drawn_again = np.mean(values, axis=0), np.mean(samples, axis=0)
    intervals = [
        # Resamples without a single episode that tells say nothing: they are left out.
        interval(value, some[np.isfinite(some)]) if np.isfinite(value) else None
        for value, some in zip(mean, drawn_again, strict=True)
    ]
    return WayFigures(**dict(zip([item.name for item in fields(WayFigures)], intervals, strict=True)))  # type: ignore[arg-type]


def _parts(episodes: WayEpisodes, drawn: Drawn, minus: int | None) -> tuple[Part, ...]:
    """One part per class. A class in a single episode could be anything from 0 (a difference: -100) to 100."""
    values, samples = (_class_iou(some, len(episodes.class_ids)) for some in drawn)
    apart = values[0] - (0 if minus is None else values[minus])
    spread = samples[:, 0] - (0 if minus is None else samples[:, minus])
    parts = []
    for column, class_id in enumerate(episodes.class_ids):
        count = int((episodes.classes == class_id).any(1).sum())
        found = interval(apart[column], spread[:, column]) if count else None
        if count == 1:
            found = Interval(float(apart[column]), 0 if minus is None else -100, 100)
        parts.append(Part(episodes.names[class_id], count, found))
    return tuple(parts)


def _cases(
    files: Sequence[WayResults], policies: Sequence[Policy], fusions: Sequence[str], unit: str
) -> list[tuple[Policy, int, str]]:
    if unit not in ("episode", "query"):
        raise ConfigError(f"The unit is episode or query, not {unit}.")
    cases = cases_of(files, fusions)
    return [(policy, *case) for policy in policies for case in cases]
