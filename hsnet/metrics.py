"""Intersections and unions that add up exactly, and the two scores made of them.

Counts are int64: sums from any number of workers, in any order, are the same number. (The published code sums in
float32, which rounds above 2^24 pixels; scores differ by up to 5e-6 points.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hsnet.errors import ShapeError


def count(prediction: Tensor, truth: Tensor, ignore: Tensor | None = None) -> Tensor:
    """Intersection and union of each episode.

    Args:
        prediction, truth: (B, H, W) bool or 0/1.
        ignore: (B, H, W) bool; these pixels belong to neither. None counts every pixel.

    Returns:
        (B, 2, 2) int64: [episode, intersection or union, background or foreground].
    """
    if prediction.shape != truth.shape or prediction.ndim != 3:
        raise ShapeError(
            f"Prediction and truth must both be (B, H, W): {tuple(prediction.shape)}, {tuple(truth.shape)}."
        )
    prediction, truth = prediction.bool(), truth.bool()
    valid = torch.ones_like(truth) if ignore is None else ~ignore.bool()
    background = torch.stack([valid & ~prediction & ~truth, valid & ~(prediction & truth)], dim=1)
    foreground = torch.stack([valid & prediction & truth, valid & (prediction | truth)], dim=1)
    return torch.stack([background, foreground], dim=2).sum(dim=(3, 4))


def sum_by_class(counts: Tensor, classes: Sequence[int], class_ids: Sequence[int]) -> Tensor:
    """Add the counts of a class's episodes.

    Args:
        counts: (N, 2, 2) int64 of `count`.
        classes: N class ids, one per episode.
        class_ids: the classes of the fold; one without an episode keeps zeros.

    Returns:
        (len(class_ids), 2, 2) int64.
    """
    rows = {class_id: row for row, class_id in enumerate(class_ids)}
    totals = torch.zeros(len(rows), 2, 2, dtype=torch.int64)
    if len(classes):
        totals.index_add_(0, torch.tensor([rows[class_id] for class_id in classes]), counts)
    return totals


def class_iou(totals: Tensor) -> Tensor:
    """Foreground IoU per class in percent, (C,) float64, from (C, 2, 2) totals. 0 for a class with no episode."""
    foreground = totals[:, :, 1].double()
    return 100 * foreground[:, 0] / foreground[:, 1].clamp(min=1)


def mean_iou(totals: Tensor) -> float:
    """mIoU in percent: the mean of `class_iou`.

    Classes with no episode count as 0, as in the published evaluation: a low early score may only mean that some
    classes have not come up yet.
    """
    return float(class_iou(totals).mean())


def foreground_background_iou(totals: Tensor) -> float:
    """FB-IoU in percent: classes are summed first, then the IoUs of background and foreground averaged."""
    both = totals.sum(dim=0).double()
    return float(100 * (both[0] / both[1]).mean())
