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
        """(M,) and (R, M), percent; as `hsnet.metrics.mean_iou`."""
        values, samples = self.class_iou()
        return values.mean(-1), samples.mean(-1)

    def fb_iou(self) -> tuple[Floats, Floats]:
        """(M,) and (R, M), percent; as `hsnet.metrics.foreground_background_iou`, NaN where a union is empty."""
        return _fb_iou(self.totals), _fb_iou(self.samples)

    def class_iou(self) -> tuple[Floats, Floats]:
        """(M, C) and (R, M, C), percent; as `hsnet.metrics.class_iou`."""
        return _iou(self.totals[..., 1]), _iou(self.samples[..., 1])


def _iou(totals: Floats) -> Floats:
    """(..., 2) intersection and union -> (...) percent; 0 where the union is empty. In numpy: torch takes longer to
    import than an analysis takes."""
    iou: Floats = 100 * totals[..., 0] / np.maximum(totals[..., 1], 1)
    return iou


def _fb_iou(totals: Floats) -> Floats:
    """(..., C, 2, 2) -> (...) percent."""
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
    for column, class_id in enumerate(class_ids):
        of_class = units_of(counts, chosen == class_id, groups)
        units[column] = of_class.shape[1]
        totals[:, column] = of_class.sum(1)
        for rows, drawn in drawn_again(of_class, seed, int(class_id), resamples):
            samples[rows, :, column] = drawn
    return Resampled(totals, samples, units)


def units_of(counts: Counts, mask: NDArray[np.bool_], groups: Sequence[object] | None) -> Counts:
    """(M, units, ...) of the episodes in the mask, from any sums (M, n, ...) of n episodes: those with one key are one
    unit, added up. Without keys each is its own."""
    counts = counts[:, mask]
    if groups is None:
        return counts
    numbers: dict[object, int] = {}
    units = [numbers.setdefault(group, len(numbers)) for group, taken in zip(groups, mask, strict=True) if taken]
    summed = np.zeros((len(numbers), len(counts), *counts.shape[2:]), np.int64)
    np.add.at(summed, np.array(units, np.int64), counts.swapaxes(0, 1))
    return summed.swapaxes(0, 1)


def drawn_again(units: Counts, seed: int, class_id: int, resamples: int) -> Iterator[tuple[slice, Floats]]:
    """Sums over the units (M, n, ...) of a class as often as they are drawn again: blocks (rows, (rows, M, ...)) of all
    resamples; the sum as it is, for all of them, where there is one unit or none."""
    n = units.shape[1]
    if n < 2:
        yield slice(resamples), units.sum(1, dtype=np.float64)[None]
        return
    flat = units.swapaxes(0, 1).reshape(n, -1).astype(np.float64)
    for rows, drawn_often in weights(("bootstrap", seed, class_id), resamples, n):
        drawn = (drawn_often @ flat) * (n / (n - 1))
        yield rows, drawn.reshape(-1, len(units), *units.shape[2:])


def weights(key: tuple[object, ...], resamples: int, n: int) -> Iterator[tuple[slice, Floats]]:
    """How often each of n units is drawn, n - 1 draws in all: blocks (rows, (rows, n)) of all resamples."""
    stream, step = philox(*key), max(1, _CHUNK // n)
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        draws = stream.random_raw(rows * (n - 1)) >> np.uint64(32)
        picked = ((draws * np.uint64(n)) >> np.uint64(32)).astype(np.int64)
        picked += np.repeat(np.arange(rows) * n, n - 1)
        drawn_often = np.bincount(picked, minlength=rows * n).reshape(rows, n).astype(np.float64)
        yield slice(first, first + rows), drawn_often


def interval(value: float, samples: Floats) -> Interval:
    """A value with the middle 95 % of what resamples gave."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


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
    real, swapped = 0.0, np.zeros(swaps)
    for class_id in class_ids:
        pair = units_of(counts, chosen == class_id, groups)[..., 1].astype(np.float64)  # (2, n, 2): the foreground
        if not pair.shape[1]:
            continue
        real += float(_iou(pair[0].sum(0)) - _iou(pair[1].sum(0)))
        both = pair.sum(0).sum(0)
        for rows, moved in swapped_sums(pair[0] - pair[1], seed, int(class_id), swaps):
            swapped[rows] += _iou((both + moved) / 2) - _iou((both - moved) / 2)
    return real / len(class_ids), swapped / len(class_ids)


def swapped_sums(apart: Floats, seed: int, class_id: int, swaps: int) -> Iterator[tuple[slice, Floats]]:
    """Sums of a class's differences (n, ...), each with a sign by a coin: blocks (rows, (rows, ...)) of all swaps."""
    n = len(apart)
    stream, step = philox("swap", seed, class_id), max(1, _CHUNK // n)
    for first in range(0, swaps, step):
        rows = min(step, swaps - first)
        coins = (stream.random_raw(rows * n) >> np.uint64(63)).astype(np.float64).reshape(rows, n)
        yield slice(first, first + rows), (2 * coins - 1) @ apart


def p_value(real: float, swapped: Floats) -> float:
    """Two-sided: the share of swapped differences at least as large as the real one, which counts as one of them."""
    at_least = np.abs(swapped) >= abs(real) - 1e-9
    return float((1 + at_least.sum()) / (1 + len(swapped)))


def episodes_for(interval: Interval, episodes: int, half_width: float = 0.5) -> int | None:
    """About how many episodes would give an interval of plus and minus `half_width` points.

    An interval shrinks with the root of the number of episodes, the shares of the classes being kept. None where
    nothing varied: too few episodes to tell.
    """
    if not interval.half_width > 0:
        return None
    return math.ceil(episodes * (interval.half_width / half_width) ** 2)
