"""Contrast maps: is a query position more like the support's object, or more like its background?

Dimension key: B queries, K shots, L layers of one level, C channels, U V support grid, H W query grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hsnet.correlation import EPS, interpolate_mask
from hsnet.errors import ShapeError

MAPS = 3
"""Of every level: similarity to the object, to the background, and the first minus the second."""

_AT_ONCE = {"cpu": 1, "cuda": 1 << 26}
"""Elements of a matrix of mean cosines that are computed together; at least one pair is."""


def contrast_maps(
    query: Sequence[Tensor],
    support: Sequence[Tensor],
    mask: Tensor,
    unit: bool = False,
    dtype: torch.dtype | None = None,
    eps: float = EPS,
) -> Tensor:
    """Contrast maps of every level at the finest query grid.

    Args:
        query: levels of the queries, finest first, each (B, L, H, W, C); any real dtype, int8 codes too.
        support: levels of the supports, each (B K, L, U, V, C), all shots of the first query first.
        mask: (B K, S, S') support masks at network size, 1 inside the object.
        unit: the features are normalised already, see `hsnet.correlation`.
        dtype: of the products; that of the features, float32 at least, by default.

    Returns:
        (B K, 3 levels, H, W) in [-2, 2], float32 (float64 for float64 features), deepest level first: the largest mean
        cosine to a position of the object, the largest to a position of the background, and their difference.

    The cosines are averaged over the layers of a level before the largest is taken: layers that err in other places
    correct each other. A position is of the object where the interpolated mask is above zero, as everywhere in HSNet,
    and of the background elsewhere. Where a support has no position of a kind (nothing but object, or no object at
    all), its similarity to that kind is 0.

    The mean over layers is one product of the layers' unit vectors laid end to end, so that no correlation of a single
    layer is written down.
    """
    finest = (query[0].shape[2], query[0].shape[3])
    maps = []
    for scenes, objects in zip(reversed(query), reversed(support), strict=True):
        nearest = _nearest(scenes, objects, mask, unit, dtype, eps)
        maps += [nearest, nearest[:, :1] - nearest[:, 1:]]
    resized = [F.interpolate(each, finest, mode="bilinear", align_corners=True) for each in maps]
    return torch.cat(resized, 1)


def _nearest(query: Tensor, support: Tensor, mask: Tensor, unit: bool, dtype: torch.dtype | None, eps: float) -> Tensor:
    """(B K, 2, H, W): largest mean cosine to the object, and to the background."""
    for name, axis in (("layers", 1), ("channels", 4)):
        if query.shape[axis] != support.shape[axis]:
            raise ShapeError(f"Query and support differ in {name}: {query.shape[axis]} and {support.shape[axis]}.")
    shots = len(support) // len(query)
    scenes, others = (_laid_out(features, unit, eps) for features in (query, support))
    exact = scenes.dtype
    scenes, others = (features.to(dtype or exact) for features in (scenes, others))
    inside = interpolate_mask(mask, (support.shape[2], support.shape[3])).flatten(1) > 0  # (B K, U V)
    positions = others.shape[1] * scenes.shape[1]
    step = max(1, _AT_ONCE["cpu" if mask.device.type == "cpu" else "cuda"] // positions)
    found = []
    for first in range(0, len(support), step):
        pairs = slice(first, first + step)
        numbers = torch.arange(first, min(first + step, len(support)), device=mask.device) // shots
        cosines = torch.bmm(others[pairs], scenes[numbers].transpose(1, 2)).to(exact)  # (n, U V, H W)
        kinds = (inside[pairs], ~inside[pairs])
        found.append(torch.stack([_largest(cosines, kind) for kind in kinds], 1))
    return torch.cat(found).unflatten(2, (query.shape[2], query.shape[3])) / query.shape[1]


def _laid_out(features: Tensor, unit: bool, eps: float) -> Tensor:
    """(B, L, H, W, C) to (B, H W, L C): the unit vectors of all layers of a position, one after another."""
    real = features if features.dtype == torch.float64 else features.float()
    if not unit:
        real = real / (torch.linalg.vector_norm(real, dim=-1, keepdim=True) + eps)
    return real.flatten(2, 3).transpose(1, 2).flatten(2)


def _largest(cosines: Tensor, kind: Tensor) -> Tensor:
    """The largest of (n, P, Q) over the positions P of a kind (n, P); 0 where there is none."""
    largest = cosines.masked_fill(~kind[:, :, None], -torch.inf).amax(1)
    return torch.where(kind.any(1)[:, None], largest, torch.zeros_like(largest))
