"""How far a score could have been off: bootstrap intervals of mIoU, and of the difference of two on the same episodes.

Episodes are drawn again within their class, since mIoU gives every class the same weight and the number of episodes
per class is the test's, not chance's. Nothing is said about other classes, other folds or other training runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import ConfigError
from pipeline.draws import philox

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A value with the interval it may lie in; percent, or points for a difference."""

    value: float
    low: float
    high: float
    level: float = LEVEL

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def miou_interval(
    counts: NDArray[np.int64], classes: Sequence[int], class_ids: Sequence[int], seed: int = 0
) -> Interval:
    """mIoU with its 95 % interval.

    Args:
        counts: (n, 2) intersection and union of each episode's foreground.
        classes: n class ids.
        class_ids: the classes of the test; one without an episode counts as 0.
    """
    values, samples = resampled_miou(counts[None], classes, class_ids, seed)
    return interval(values[0], samples[:, 0])


def paired_difference(
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    classes: Sequence[int],
    class_ids: Sequence[int],
    seed: int = 0,
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
    counts: NDArray[np.int64],
    classes: Sequence[int],
    class_ids: Sequence[int],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """mIoU of M methods on the same n episodes, and on episodes drawn again within each class.

    Args:
        counts: (M, n, 2) intersection and union.

    Returns:
        (M,) and (resamples, M), percent.
    """
    if counts.ndim != 3 or counts.shape[1:] != (len(classes), 2):
        raise ConfigError(f"Counts must be (methods, {len(classes)}, 2), got {counts.shape}.")
    chosen = np.asarray(classes)
    values = np.zeros(len(counts))
    samples = np.zeros((resamples, len(counts)))
    for class_id in class_ids:
        own = counts[:, chosen == class_id]
        n = own.shape[1]
        if n == 0:
            continue
        values += _iou(own.sum(1))
        draws = philox("bootstrap", seed, int(class_id)).random_raw(resamples * n) >> np.uint64(32)
        picked = ((draws * np.uint64(n)) >> np.uint64(32)).astype(np.int64).reshape(resamples, n)
        samples += _iou(own[:, picked].sum(2)).T
    return values / len(class_ids), samples / len(class_ids)


def _iou(totals: NDArray[np.int64]) -> NDArray[np.float64]:
    """(..., 2) -> (...) percent."""
    iou: NDArray[np.float64] = 100 * totals[..., 0] / np.maximum(totals[..., 1], 1)
    return iou


def interval(value: float, samples: NDArray[np.float64]) -> Interval:
    """A value with the middle 95 % of what resamples gave."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))
