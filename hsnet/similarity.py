"""What can be read off similarities without a learner: positions as vectors, the best match, object against background.

Dimension key: B images, K supports, L layers of one level, C channels, H W grid, P = H W positions, D channels of all
layers together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hsnet.errors import ShapeError

OBJECT_SHARE = 0.5
"""A position stands for the object if more than this share of its area is object."""

NEAREST = 5
"""Positions whose cosines are averaged: one alone may be a chance."""

NO_OBJECT = -1.0
"""Margin of every position to a support that shows no object: the lowest that a cosine can be, background."""


def cosine_map(deepest: Tensor, object_mask: Tensor) -> Tensor:
    """How much each query position looks like the most similar position of the object.

    Args:
        deepest: (B, L, U, V, H, W) hypercorrelation of the deepest level.
        object_mask: (B, U, V) support mask at that grid; positions above zero are the object.

    Returns:
        (B, H, W) float32 in [0, 1]: mean over the layers, maximum over the object's positions; 0 without an object.
    """
    mean = deepest.mean(dim=1).flatten(1, 2)  # (B, U V, H, W)
    outside = (object_mask <= 0).flatten(1)[:, :, None, None]
    return torch.where(outside, torch.zeros_like(mean), mean).amax(dim=1)


def positions(levels: Sequence[Tensor], unit: bool = False) -> Tensor:
    """Every position of the deepest grid as one vector, so that a product of two is the mean cosine of all layers.

    Args:
        levels: finest first, each (B, L, H, W, C); any real dtype, any scale per position.
        unit: the features are normalised already (what a projection left of unit vectors); they are not stretched.

    Returns:
        (B, P, D) float32 (float64 for float64 features): the layers' unit vectors side by side, divided by the root of
        the number of layers. A vector of zeros stays one.

    Finer levels are resized to the deepest grid, bilinear with aligned corners. As that is linear, the products are the
    finer level's cosines resized on both sides. Measured on training classes against finer grids: docs/heads.md.
    """
    if not levels or any(level.ndim != 5 for level in levels):
        raise ShapeError(f"Levels must be (B, L, H, W, C), got {[tuple(level.shape) for level in levels]}.")
    grid = (levels[-1].shape[2], levels[-1].shape[3])
    layers = sum(level.shape[1] for level in levels)
    parts = []
    for level in levels:
        real = level if level.dtype == torch.float64 else level.float()
        vectors = real if unit else F.normalize(real, dim=-1)
        if (level.shape[2], level.shape[3]) != grid:
            channels_first = vectors.flatten(0, 1).permute(0, 3, 1, 2)
            resized = F.interpolate(channels_first, grid, mode="bilinear", align_corners=True)
            vectors = resized.permute(0, 2, 3, 1).unflatten(0, level.shape[:2])
        parts.append(vectors.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2))
    return torch.cat(parts, 2) / layers**0.5


def object_shares(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, P) float32 in [0, 1]: how much of each position's area is object, of masks (B, S, S') at network size."""
    return F.adaptive_avg_pool2d(masks[:, None].float(), grid).flatten(1)


def clear_positions(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that stand for the object, and those that stand for the background; edges are neither.

    Args:
        shares: (B, P) of `object_shares`.

    Returns:
        Two (B, P) bool. Object: more than `OBJECT_SHARE` of the area; an object too small for that keeps the positions
        with the largest share. Background: no object at all; where there is no such position, those with the smallest
        share below 1. None where the mask is empty, or covers everything.
    """
    most, least = shares.amax(1, keepdim=True), shares.amin(1, keepdim=True)
    inside = (shares > OBJECT_SHARE) | ((shares == most) & (most > 0) & (most <= OBJECT_SHARE))
    outside = (shares == least) & (least < 1)
    # One position cannot stand for both, which it would where all have the same share.
    return inside, outside & ~inside


def nearest(query: Tensor, others: Tensor) -> Tensor:
    """(P,): mean of each query position's `NEAREST` largest cosines to the others (n, D), of all if there are fewer."""
    return (query @ others.T).topk(min(NEAREST, len(others)), 1).values.mean(1)


def contrast(query: Tensor, support: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """How much nearer each query position is to the support's object than to its background.

    Args:
        query: (P, D) `positions`.
        support: (Q, D) `positions`.
        inside, outside: (Q,) bool, the support positions of object and background, as `clear_positions` gives them.

    Returns:
        (P,) in [-2, 2]: mean of the `NEAREST` largest cosines to object positions minus that to background positions;
        cosines are averaged over the layers first. `NO_OBJECT` everywhere if there is no object.

    Raises:
        ShapeError: there is an object and no background.
    """
    if not inside.any():
        return query.new_full(query.shape[:1], NO_OBJECT)
    if not outside.any():
        raise ShapeError("The support's object covers every position: there is no background to compare with.")
    return nearest(query, support[inside]) - nearest(query, support[outside])


def affinity(query: Tensor, temperature: float) -> Tensor:
    """(P, P), rows that sum to 1: how much each query position listens to each other, the softmax of their cosines.

    Args:
        query: (P, D) `positions`.
        temperature: cosines that differ by this much differ by a factor e.
    """
    return torch.softmax(query @ query.T / temperature, 1)
