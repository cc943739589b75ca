"""Several classes at once: one label map of N one-way answers, its confusion counts, and the background's score.

Every class answers as if it were alone. The background has a score of its own, b: a class claims a pixel where its
one-way answer, with b taken off its foreground logit, is object. What no class claims is background, what several claim
goes to the one with the largest score. For the mean of logits this is the argmax of (b, margins), the margin of a class
being its foreground minus its background logit. With one class and b = 0 it is the one-way prediction.

The paper has one class per episode; several are usual in the field (e.g. PANet, Wang et al. 2019, argmax over
background and class scores), with heads that learn a score for the background. Here it is one number per head.

Dimension key: B episodes, N classes, H W mask, G scores tried.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hsnet.errors import ShapeError

SCORES = 0.01 * torch.sinh(torch.arange(-200, 201, dtype=torch.float64) * 0.045).float()
"""Scores of the background that are tried: 401, from -40.5 to 40.5, dense around 0, which is one of them."""


def label_map(claims: Tensor, scores: Tensor, order: Tensor) -> Tensor:
    """One class per pixel.

    Args:
        claims: (B, N, H, W) bool, where a class claims the pixel.
        scores: (B, N, H, W), what decides between claims.
        order: (B, N) int64, places 0 to N - 1 in the order in which equal scores are decided: by class id, say, so
            that the place of a class in the episode (the query's comes first) decides nothing.

    Returns:
        (B, H, W) int64: 0 background, n + 1 the class at place n.
    """
    if claims.shape != scores.shape or claims.ndim != 4 or order.shape != claims.shape[:2]:
        raise ShapeError(
            f"Claims and scores must both be (B, N, H, W), the order (B, N): {tuple(claims.shape)}, "
            f"{tuple(scores.shape)}, {tuple(order.shape)}."
        )
    rows = torch.arange(len(order), device=order.device)[:, None]
    ordered = scores.masked_fill(~claims, -torch.inf)[rows, order]
    best = ordered.argmax(1)  # the first of equal ones
    place = order[rows[..., None], best.flatten(1)[:, None]].view_as(best)
    return torch.where(claims.any(1), place + 1, 0)


def confusion(prediction: Tensor, truth: Tensor, classes: int, ignore: Tensor | None = None) -> Tensor:
    """Pixels by true and predicted label.

    Args:
        prediction, truth: (B, H, W) whole numbers from 0 (background) to `classes`.
        ignore: (B, H, W) bool; these pixels are left out.

    Returns:
        (B, classes + 1, classes + 1) int64: [episode, true label, predicted label].
    """
    if prediction.shape != truth.shape or prediction.ndim != 3:
        raise ShapeError(
            f"Prediction and truth must both be (B, H, W): {tuple(prediction.shape)}, {tuple(truth.shape)}."
        )
    labels, size = classes + 1, len(prediction)
    episode = torch.arange(size, device=truth.device)[:, None, None]
    cell = (episode * labels + truth.long()) * labels + prediction.long()
    kept = cell.flatten() if ignore is None else cell[~ignore.bool()]
    return torch.bincount(kept, minlength=size * labels**2).view(size, labels, labels)


def tried_counts(
    margins: Tensor, order: Tensor, truth: Tensor, rows: Tensor, classes: int, ignore: Tensor | None = None
) -> Tensor:
    """Intersections and unions of every class for every score in SCORES, from one look at the margins.

    Args:
        margins: (B, N, H, W) of the classes at their places in the episode.
        order: (B, N), as for `label_map`.
        truth: (B, H, W), 0 or place + 1.
        rows: (B, N) int64, which of `classes` sums the class at a place adds to.
        ignore: (B, H, W) bool; these pixels are left out.

    Returns:
        (G, classes, 2) int64: intersection and union.
    """
    place = label_map(torch.ones_like(margins, dtype=torch.bool), margins, order) - 1
    best = margins.gather(1, place[:, None])[:, 0]
    grid = SCORES.to(best)
    # A margin above the first i scores is object for each of them: strictly above, as a tie is background.
    above = torch.bucketize(best, grid)
    kept = torch.ones_like(truth, dtype=torch.bool) if ignore is None else ~ignore.bool()
    episode = torch.arange(len(rows), device=rows.device)[:, None, None].expand_as(truth)
    predicted = rows[episode, place]

    def summed(chosen: Tensor, row: Tensor) -> Tensor:
        """(G, classes): pixels of the chosen ones that are object at a score."""
        steps = len(grid) + 1
        counts = torch.bincount((row * steps + above)[chosen], minlength=classes * steps).view(classes, steps)
        return counts.flip(1).cumsum(1).flip(1)[:, 1:].T

    inside = summed(kept & (truth == place + 1), predicted)
    found = summed(kept, predicted)
    there = kept & (truth > 0)
    true = torch.bincount(rows[episode, (truth - 1).clamp(min=0)][there], minlength=classes)
    return torch.stack([inside, found + true - inside], 2)


def best_score(counts: Tensor) -> tuple[float, float]:
    """(score of SCORES with the best mIoU, that mIoU in percent) from (G, C, 2) counts; of equal ones the nearest to 0.

    A class without a pixel, true or found, counts as 0, as in `hsnet.metrics.class_iou`.
    """
    counts = counts.double()
    mious = 100 * (counts[..., 0] / counts[..., 1].clamp(min=1)).mean(1)
    best = torch.nonzero(mious >= mious.max() - 1e-9).flatten()
    chosen = int(best[SCORES[best.cpu()].abs().argmin()])
    return float(SCORES[chosen]), float(mious[chosen])
