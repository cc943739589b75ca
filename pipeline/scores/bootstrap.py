"""How far a score could have been off: bootstrap intervals of mIoU and FB-IoU, and the paired test of two methods.

Units (episodes, or all episodes of a query photo together) are drawn again within their class, since mIoU gives every
class the same weight and the number of episodes per class is the test's, not chance's. Scores are ratios of sums, so a
resample is one vector of weights, and all resamples of a class are one matrix product. Nothing is said about other
classes, other folds or other training runs.

Dimension key: M methods, n units, C classes, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import ConfigError
from pipeline.common.philox import philox

RESAMPLES = 2000
SWAPS = 4999
"""Random swaps of the paired test: the smallest p is 1 / 5000."""
LEVEL = 0.95
_CHUNK = 4_000_000
"""Elements of a block of weights: 32 MB."""

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with the interval it may lie in; percent, or points for a difference."""

    value: float
    low: float
    high: float
    level: float = LEVEL

    @property
    def half_width(self) -> float:
        """Half of its length."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Part:
    """A score of some of the episodes: a class, a size, a seed."""

    name: str
    episodes: int
    value: Interval | None
    """None where there is no episode: a class then counts as 0, a size is left out."""
    classes: int = 1
    """Classes with an episode, the mean being over them."""


@dataclass(frozen=True)
class Resampled:
    """Sums per class, as counted and as they came out when units were drawn again."""

    totals: Floats
    """(M, C, 2, 2): [method, class, intersection or union, background or foreground]; whole numbers."""
    samples: Floats
    """(R, M, C, 2, 2)."""
    units: NDArray[np.int64]
    """(C,) units drawn from; a class with none keeps zeros and counts as IoU 0, one with a single unit cannot vary."""

    def miou(self) -> tuple[Floats, Floats]:
        """(M,) and (R, M), percent."""
        return miou_of(self.totals), miou_of(self.samples)

    def fb_iou(self) -> tuple[Floats, Floats]:
        """(M,) and (R, M), percent."""
        return fb_iou_of(self.totals), fb_iou_of(self.samples)

    def class_iou(self) -> tuple[Floats, Floats]:
        """(M, C) and (R, M, C), percent."""
        return class_iou_of(self.totals), class_iou_of(self.samples)


def class_iou_of(totals: Floats) -> Floats:
    """(..., C, 2, 2) -> (..., C) foreground IoU, percent; as `hsnet.metrics.class_iou`."""
    iou: Floats = 100 * totals[..., 0, 1] / np.maximum(totals[..., 1, 1], 1)
    return iou


def miou_of(totals: Floats) -> Floats:
    """(..., C, 2, 2) -> (...); as `hsnet.metrics.mean_iou`."""
    mean: Floats = class_iou_of(totals).mean(-1)
    return mean


def fb_iou_of(totals: Floats) -> Floats:
    """(..., C, 2, 2) -> (...); as `hsnet.metrics.foreground_background_iou`, NaN where a union is empty."""
    both = totals.sum(-3)
    unions = np.where(both[..., 1, :] > 0, both[..., 1, :], np.nan)
    fb: Floats = 100 * (both[..., 0, :] / unions).mean(-1)
    return fb


def resample(
    counts: Counts,
    classes: Sequence[int] | NDArray[np.int64],
    class_ids: Sequence[int],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    groups: Sequence[object] | None = None,
) -> Resampled:
    """Draw units again within each class.

    From n units of a class n - 1 are drawn and weighed n / (n - 1): drawing n would make intervals too narrow by
    sqrt((n - 1) / n), a tenth where a class has five episodes (the rescaled bootstrap of Rao and Wu).

    Args:
        counts: (M, n, 2, 2) of the same n episodes by M methods, as `hsnet.metrics.count` gives them.
        classes: n class ids.
        class_ids: the classes of the test; one without an episode counts as 0.
        groups: n keys; episodes of a class with one key (such as the query photo) are one unit. None: each is its own.

    Raises:
        ConfigError: shapes that do not fit, or an episode of a class that is not tested.
    """
    counts = np.asarray(counts)
    chosen = np.asarray(classes)
    if counts.ndim != 4 or counts.shape[1:] != (len(chosen), 2, 2):
        raise ConfigError(f"Counts must be (methods, {len(chosen)}, 2, 2), got {counts.shape}.")
    odd = set(chosen.tolist()) - set(class_ids)
    if odd:
        raise ConfigError(f"Episodes of class {min(odd)}, which is not among the {len(class_ids)} classes of the test.")
    methods = len(counts)
    totals = np.zeros((methods, len(class_ids), 2, 2))
    samples = np.zeros((resamples, methods, len(class_ids), 2, 2))
    units = np.zeros(len(class_ids), np.int64)
    for place, class_id in enumerate(class_ids):
        mask = chosen == class_id
        if not mask.any():
            continue
        own = _units(counts[:, mask], None if groups is None else [g for g, m in zip(groups, mask, strict=True) if m])
        n = units[place] = own.shape[1]
        totals[:, place] = own.sum(1)
        if n == 1:
            samples[:, :, place] = totals[:, place]
            continue
        flat = own.transpose(1, 0, 2, 3).reshape(n, -1).astype(np.float64)
        for rows, drawn_often in weights(("bootstrap", seed, int(class_id)), resamples, n):
            drawn = (drawn_often @ flat) * (n / (n - 1))
            samples[rows, :, place] = drawn.reshape(-1, methods, 2, 2)
    return Resampled(totals, samples, units)


def _units(counts: Counts, groups: Sequence[object] | None) -> Counts:
    """(M, n, 2, 2) added up over episodes with one key."""
    if groups is None:
        return counts
    numbers: dict[object, int] = {}
    places = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    summed = np.zeros((len(counts), len(numbers), 2, 2), np.int64)
    for method, own in enumerate(counts):
        np.add.at(summed[method], places, own)
    return summed


def weights(key: tuple[object, ...], resamples: int, n: int) -> Iterator[tuple[slice, Floats]]:
    """How often each of n units is drawn, n - 1 draws in all: blocks (rows, (rows, n)) of all resamples."""
    stream, step = philox(*key), max(1, _CHUNK // n)
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        draws = stream.random_raw(rows * (n - 1)) >> np.uint64(32)
        picked = ((draws * np.uint64(n)) >> np.uint64(32)).astype(np.int64)
        picked += np.repeat(np.arange(rows) * n, n - 1)
        weights = np.bincount(picked, minlength=rows * n).reshape(rows, n).astype(np.float64)
        yield slice(first, first + rows), weights


def interval(value: float, samples: Floats) -> Interval:
    """A value with the middle 95 % of what resamples gave."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def foreground(counts: Counts) -> Counts:
    """(..., n, 2) intersections and unions of the foreground as (..., n, 2, 2) with an empty background."""
    whole: Counts = np.stack([np.zeros_like(counts), counts], axis=-1)
    return whole


def miou_interval(counts: Counts, classes: Sequence[int], class_ids: Sequence[int], seed: int = 0) -> Interval:
    """mIoU with its 95 % interval.

    Args:
        counts: (n, 2) intersection and union of each episode's foreground.
        classes: n class ids.
        class_ids: the classes of the test; one without an episode counts as 0.
    """
    values, samples = resampled_miou(counts[None], classes, class_ids, seed)
    return interval(values[0], samples[:, 0])


def paired_difference(
    first: Counts, second: Counts, classes: Sequence[int], class_ids: Sequence[int], seed: int = 0
) -> Interval:
    """mIoU of `first` minus mIoU of `second` on the same episodes, in points, with its 95 % interval.

    Both are scored on the same episodes of each resample, so what is hard for both cancels.

    Raises:
        ConfigError: they are not of the same episodes, as far as their number tells.
    """
    if first.shape != second.shape:
        raise ConfigError(f"A paired difference needs the same episodes: {len(first)} and {len(second)} were given.")
    values, samples = resampled_miou(np.stack([first, second]), classes, class_ids, seed)
    return interval(values[0] - values[1], samples[:, 0] - samples[:, 1])


def resampled_miou(
    counts: Counts, classes: Sequence[int], class_ids: Sequence[int], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[Floats, Floats]:
    """mIoU of M methods on the same n episodes, and on episodes drawn again within each class.

    Args:
        counts: (M, n, 2) intersection and union.

    Returns:
        (M,) and (resamples, M), percent.
    """
    if counts.ndim != 3 or counts.shape[1:] != (len(classes), 2):
        raise ConfigError(f"Counts must be (methods, {len(classes)}, 2), got {counts.shape}.")
    return resample(foreground(counts), classes, class_ids, seed=seed, resamples=resamples).miou()


def swapped_differences(
    counts: Counts,
    classes: Sequence[int] | NDArray[np.int64],
    class_ids: Sequence[int],
    *,
    seed: int = 0,
    swaps: int = SWAPS,
    groups: Sequence[object] | None = None,
) -> tuple[float, Floats]:
    """mIoU of the first method minus that of the second, and what it is when the two are swapped by a coin per unit.

    If the two methods are equally good on every unit, a swap changes nothing but chance: the real difference is then
    one of the swapped ones.

    Args:
        counts: (2, n, 2, 2); the rest as for `resample`.

    Returns:
        The difference, and (swaps,) of swapped ones; points.
    """
    if len(counts) != 2:
        raise ConfigError(f"A paired test is of two methods, got {len(counts)}.")
    chosen = np.asarray(classes)
    real, found = 0.0, np.zeros(swaps)
    for class_id in class_ids:
        mask = chosen == class_id
        if not mask.any():
            continue
        own = _units(counts[:, mask], None if groups is None else [g for g, m in zip(groups, mask, strict=True) if m])
        pair = own[..., 1].astype(np.float64)  # (2, n, 2): the foreground
        real += float(_ratio(pair[0].sum(0)) - _ratio(pair[1].sum(0)))
        both, apart = pair.sum(0).sum(0), pair[0] - pair[1]
        n = own.shape[1]
        stream, step = philox("swap", seed, int(class_id)), max(1, _CHUNK // n)
        for first in range(0, swaps, step):
            rows = min(step, swaps - first)
            coins = (stream.random_raw(rows * n) >> np.uint64(63)).astype(np.float64).reshape(rows, n)
            moved = (2 * coins - 1) @ apart
            found[first : first + rows] += _ratio((both + moved) / 2) - _ratio((both - moved) / 2)
    return real / len(class_ids), found / len(class_ids)


def p_value(real: float, swapped: Floats) -> float:
    """Two-sided: the share of swapped differences at least as large as the real one, which counts as one of them."""
    at_least = np.abs(swapped) >= abs(real) - 1e-9
    return float((1 + at_least.sum()) / (1 + len(swapped)))


def _ratio(totals: Floats) -> Floats:
    """(..., 2) -> (...) percent."""
    ratio: Floats = 100 * totals[..., 0] / np.maximum(totals[..., 1], 1)
    return ratio


def episodes_for(found: Interval, episodes: int, half_width: float = 0.5) -> int | None:
    """About how many episodes would give an interval of plus and minus `half_width` points.

    An interval shrinks with the root of the number of episodes, the shares of the classes being kept. None where
    nothing varied: too few episodes to tell.
    """
    if not found.half_width > 0:
        return None
    return math.ceil(episodes * (found.half_width / half_width) ** 2)
