"""Contrast maps: is a query position more like the support's object, or more like its background?

Dimension key: B queries, K shots, L layers of one level, C channels, U V support grid, H W query grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hsnet.correlation import EPS, correlate_rows, interpolate_mask, keeps_codes, prepare_query
from hsnet.errors import ShapeError
from hsnet.numerics import code_products

MAPS = 3
"""Of every layer: similarity to the object, to the background, and the first minus the second."""

_AT_ONCE = 1 << 26
"""Elements of one layer's cosines that are computed together; those of one pair at least."""


def contrast_maps(
    query: Sequence[Tensor],
    support: Sequence[Tensor],
    mask: Tensor,
    unit: bool = False,
    dtype: torch.dtype | None = None,
    eps: float = EPS,
) -> Tensor:
    """Contrast maps of every layer at the finest query grid.

    Args:
        query: levels of the queries, finest first, each (B, L, H, W, C); any real dtype, int8 codes too.
        support: levels of the supports, each (B K, L, U, V, C), all shots of the first query first.
        mask: (B K, S, S') support masks at network size, 1 inside the object.
        unit: the features are normalised already, see `hsnet.correlation`.
        dtype: of the products where all are multiplied; that of the features, float32 at least, by default.

    Returns:
        (B K, 3 N, H, W) in [-1, 1] for the N layers of all levels, float32 (float64 for float64 features), deepest
        level first, inside a level shallow to deep. Three maps each: the largest cosine to a position of the object,
        the largest to a position of the background, and their difference.

    A position is of the object where the interpolated mask is above zero, as everywhere in HSNet, and of the background
    elsewhere. Where a support has no position of a kind (nothing but object, or no object at all), its similarity to
    that kind is 0; so is a negative one, as in every correlation here.

    On a CPU the rows of each kind are multiplied by themselves, one pair at a time, and codes as codes where that is
    exact (`correlate_rows`). Elsewhere, and where features have gradients, all positions are multiplied, codes as codes
    there too (`hsnet.numerics.code_products`), and then told apart; one layer's cosines of some pairs are written down
    at a time.
    """
    finest = (query[0].shape[2], query[0].shape[3])
    maps = []
    for scenes, objects in zip(reversed(query), reversed(support), strict=True):
        for name, axis in (("layers", 1), ("channels", 4)):
            if scenes.shape[axis] != objects.shape[axis]:
                raise ShapeError(f"Query and support differ in {name}: {scenes.shape[axis]} and {objects.shape[axis]}.")
        inside = interpolate_mask(mask, (objects.shape[2], objects.shape[3])) > 0
        by_rows = mask.device.type == "cpu" and not (scenes.requires_grad or objects.requires_grad)
        if by_rows:
            nearest = _nearest_by_rows(scenes, objects, (inside, ~inside), unit, eps)
        else:
            nearest = _nearest(scenes, objects, (inside, ~inside), unit, dtype, eps)
        to_object, to_background = nearest.unbind(2)
        level = torch.stack([to_object, to_background, to_object - to_background], 2)  # (B K, L, 3, H, W)
        maps.append(F.interpolate(level.flatten(1, 2), finest, mode="bilinear", align_corners=True))
    return torch.cat(maps, 1)


Kinds = tuple[Tensor, Tensor]
"""Object and background positions, (B K, U, V) bool each."""


def _nearest_by_rows(query: Tensor, support: Tensor, kinds: Kinds, unit: bool, eps: float) -> Tensor:
    """(B K, L, 2, H, W): largest cosine to the object, and to the background."""
    shots = len(support) // len(query)
    found = []
    for number, scene in enumerate(query):
        prepared = prepare_query(scene, eps, unit)
        for pair in range(number * shots, (number + 1) * shots):
            for kind in kinds:
                values, _ = correlate_rows(prepared, support[pair], kind[pair].float(), eps)  # (n, L, H, W)
                found.append(values.amax(0) if len(values) else values.new_zeros(values.shape[1:]))
    return torch.stack(found).unflatten(0, (-1, 2)).transpose(1, 2)


def _nearest(query: Tensor, support: Tensor, kinds: Kinds, unit: bool, dtype: torch.dtype | None, eps: float) -> Tensor:
    """`_nearest_by_rows`, by products of all positions in a given precision."""
    shots = len(support) // len(query)
    codes = not unit and keeps_codes(query, support)
    if codes:
        scenes, others = (features.flatten(2, 3).to(torch.bfloat16) for features in (query, support))
        scene_factors, other_factors = (1 / (_norms(features) + eps) for features in (scenes, others))
        exact = torch.float32
    else:
        scenes, others = (_unit_vectors(features, unit, eps) for features in (query, support))
        exact = scenes.dtype
        scenes, others = (features.to(dtype or exact) for features in (scenes, others))
    step = max(1, _AT_ONCE // (scenes.shape[2] * others.shape[2]))
    chunks = []
    for first in range(0, len(support), step):
        pairs = slice(first, first + step)
        numbers = torch.arange(first, min(first + step, len(support)), device=query.device) // shots
        largest = []
        for layer in range(query.shape[1]):
            multiply = code_products if codes else torch.bmm
            cosines = multiply(others[pairs, layer], scenes[numbers, layer].transpose(1, 2))  # (n, U V, H W)
            if codes:
                cosines *= other_factors[pairs, layer, :, None]
            # Positions of the other kind count as 0, and so does a kind without any.
            found = [(cosines * kind[pairs].flatten(1)[:, :, None]).amax(1).clamp(min=0) for kind in kinds]
            # A query position's own norm does not decide which support position is the nearest.
            largest += [one * scene_factors[numbers, layer] for one in found] if codes else found
        chunks.append(torch.stack(largest, 1))
    return torch.cat(chunks).to(exact).unflatten(1, (-1, 2)).unflatten(3, (query.shape[2], query.shape[3]))


def _norms(features: Tensor) -> Tensor:
    return torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32)


def _unit_vectors(features: Tensor, unit: bool, eps: float) -> Tensor:
    """(B, L, H, W, C) to (B, L, H W, C) of length 1."""
    real = features if features.dtype == torch.float64 else features.float()
    if not unit:
        real = real / (torch.linalg.vector_norm(real, dim=-1, keepdim=True) + eps)
    return real.flatten(2, 3)
