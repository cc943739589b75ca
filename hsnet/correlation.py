"""Hypercorrelations: every query position against every object position of the support, layer by layer.

Dimension key: B batch, L layers of one level, C channels, U V support grid, H W query grid.

Features come as *levels* (`hsnet.backbone.pack_levels`): one (B, L, H, W, C) tensor per pyramid level, finest
first, any real dtype. Correlations leave as (B, L, U, V, H, W) float32, deepest level first: support positions
before query positions, so that the learner's support side and query side are both views of it. (The published
code has the query first; the values are the same.)

Features may also be *unit* features: unit vectors, or what a projection left of them, which is shorter. Then a
correlation is their inner product as it is. To normalise again what was projected would stretch weak vectors.

`build_hypercorrelation` is the plain reading of the paper. The pipeline runs what equals it: `correlate_rows` on a
CPU, which multiplies only the support positions inside the mask, about one in six for a typical object, and
`correlate_all` on a GPU (both through `hsnet.fused`), which multiplies int8 codes as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hsnet.errors import ShapeError
from hsnet.numerics import code_products

EPS = 1e-5
"""Added to every norm, as the published code does. Eq. 2 has none and would be NaN for a masked-out position."""

_AT_ONCE = 1 << 26
"""Elements of a level's correlations that are computed together in float32 before they are rounded: 268 MB."""


def interpolate_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Support masks at the size of a feature grid.

    Args:
        mask: (B, S, S') masks at network size, 1 inside the object; any dtype.
        grid: (U, V) of the level.

    Returns:
        (B, U, V) float32 in [0, 1].

    Bilinear with aligned corners and no antialiasing, straight from the full mask. Which positions are above
    zero depends on exactly this choice: nearest, area or unaligned interpolation keep other positions, and an
    object a few pixels thin can vanish altogether, as it does in the published code.
    """
    return F.interpolate(mask[:, None].float(), grid, mode="bilinear", align_corners=True)[:, 0]


def build_hypercorrelation(
    query: Tensor, support: Tensor, mask: Tensor, eps: float = EPS, unit: bool = False
) -> Tensor:
    """Correlate every query position with every support position, layer by layer: the plain reading.

    Args:
        query: (B, L, H, W, C) features.
        support: (B, L, U, V, C) features, unmasked.
        mask: (B, U, V) support mask in [0, 1] at the level's grid (`interpolate_mask`).
        eps: added to each norm; the published code's 1e-5 by default, Eq. 2 has 0.
        unit: the features are normalised already; what the mask leaves of a position counts in full.

    Returns:
        (B, L, U, V, H, W) float32 cosine similarities in [0, 1] (float64 for float64 features); a masked-out
        position correlates 0.

    Raises:
        ShapeError: batch, layers or channels of the three do not fit.

    Source: Min et al. 2021, Sec. 4.1, Eq. 1 (masking) and Eq. 2 (cosine, negative values cut to 0).
    """
    _check(query, support, mask)
    query = _real(query)
    if unit:
        support = _real(support) * (mask > 0)[:, None, :, :, None]
    else:
        support = _real(support) * mask[:, None, :, :, None].to(query.dtype)
        query = query / (query.norm(dim=-1, keepdim=True) + eps)
        support = support / (support.norm(dim=-1, keepdim=True) + eps)
    return torch.einsum("bluvc,blhwc->bluvhw", support, query).clamp_(min=0)


@dataclass(frozen=True)
class QueryLevel:
    """One query's level, made ready for several supports."""

    values: Tensor
    """(L, H W, C): unit vectors in float, or int8 codes."""
    factor: Tensor | None
    """(L, 1, H W): what a product with the codes must be multiplied by; None for unit vectors."""
    grid: tuple[int, int]
    """(H, W)."""
    unit: bool
    """Normalised already, and so are its supports."""


def prepare_query(query: Tensor, eps: float = EPS, unit: bool = False) -> QueryLevel:
    """Normalise (L, H, W, C) features of one query once for all its supports.

    int8 codes stay codes where the processor multiplies them exactly and several times faster than floats.
    """
    values, grid = query.flatten(1, 2), (query.shape[1], query.shape[2])
    if unit:
        return QueryLevel(_real(values), None, grid, True)
    real = _real(values)
    factor = 1 / (torch.linalg.vector_norm(real, dim=-1, keepdim=True) + eps)
    if _multiplies_codes(query):
        return QueryLevel(values, factor.transpose(1, 2), grid, False)
    return QueryLevel(real * factor, None, grid, False)


def correlate_rows(
    query: QueryLevel, support: Tensor, mask: Tensor, eps: float = EPS, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Correlate one query with the support positions inside the mask, and with no others.

    Args:
        query: `prepare_query` of the query's level.
        support: (L, U, V, C) features, unmasked.
        mask: (U, V) support mask in [0, 1] at the level's grid.
        out: (n, L, H, W) to write the values into.

    Returns:
        values (n, L, H, W), cosine similarities cut to [0, 1], and positions (n,) int64 on the grid, row by row,
        where the mask is above zero.

    Raises:
        ShapeError: layers or channels of query and support differ.

    The mask scales a whole feature vector, so normalising takes it out again up to eps: what remains is the factor
    m / (m n + eps) on the vector, n its norm.
    """
    for name, axis, other in (("layers", 0, 0), ("channels", 2, 3)):
        if query.values.shape[axis] != support.shape[other]:
            raise ShapeError(
                f"Query and support differ in {name}: {query.values.shape[axis]} and {support.shape[other]}."
            )
    positions = mask.flatten().nonzero()[:, 0]
    chosen = support.flatten(1, 2).index_select(1, positions)  # (L, n, C)
    real = _real(chosen)
    if not query.unit:
        soft = mask.flatten()[positions].to(real.dtype)[None, :, None]
        factor = soft / (soft * torch.linalg.vector_norm(real, dim=-1, keepdim=True) + eps)
    layers, places = query.values.shape[:2]
    values = real.new_empty(len(positions), layers, places) if out is None else out.flatten(2)
    if query.factor is None:
        chosen = real if query.unit else real * factor
    for layer in range(layers if len(positions) else 0):
        scene = query.values[layer].t()
        if query.factor is None:
            torch.mm(chosen[layer], scene, out=values[:, layer])
        else:
            products = torch._int_mm(chosen[layer], scene)
            torch.mul(products, factor[layer], out=values[:, layer])
            values[:, layer] *= query.factor[layer]
    return values.clamp_(min=0).unflatten(2, query.grid), positions


def correlate_all(
    query: Tensor, support: Tensor, mask: Tensor, dtype: torch.dtype, eps: float = EPS, unit: bool = False
) -> Tensor:
    """`build_hypercorrelation` as one product of the whole batch, in a given precision.

    It multiplies every support position, and never asks how many lie inside the mask: on a GPU the answer would cost
    more than the products. There int8 codes are multiplied as codes (`correlate_codes`).

    Args:
        query: (B, L, H, W, C) features.
        support: (B K, L, U, V, C) features, unmasked: K supports of the first query, then those of the second, ...
        mask: (B K, U, V) support masks in [0, 1] at the level's grid.
        dtype: of the products and of the result. Codes are exact in any.

    Returns:
        (B K, L, U, V, H, W) of `dtype`; norms and masks are float32.

    Raises:
        ShapeError: batch, layers or channels of the three do not fit.
    """
    shots = len(support) // max(1, len(query))
    _check(query, support, mask, shots)
    if not unit and keeps_codes(query, support):
        return correlate_codes(query, support, mask, dtype, eps)
    soft = mask[:, None, :, :, None].float()
    if unit:
        objects, scene = support * (soft > 0), query
    else:
        objects, scene = _real(support), _real(query)
        objects = objects * (soft / (soft * torch.linalg.vector_norm(objects, dim=-1, keepdim=True) + eps))
        scene = scene / (torch.linalg.vector_norm(scene, dim=-1, keepdim=True) + eps)
    rows, columns = (side.to(dtype).flatten(2, 3) for side in (objects, scene))
    columns = _for_each_support(columns, shots)
    products = torch.bmm(rows.flatten(0, 1), columns.flatten(0, 1).transpose(1, 2)).clamp_(min=0)
    return products.view(*support.shape[:4], *query.shape[2:4])


def correlate_codes(query: Tensor, support: Tensor, mask: Tensor, dtype: torch.dtype, eps: float = EPS) -> Tensor:
    """`correlate_all` of int8 codes, whose products are exact whatever `dtype` is; norms and masks come afterwards.

    To normalise first and then round to bfloat16 would cost each of the C factors of a cosine 8 bits. The codes have no
    more than 8 bits, so their products (`hsnet.numerics.code_products`) lose nothing, and only the finished cosine is
    rounded to `dtype`. Arguments and result as for `correlate_all`.

    Memory: beside the result, float32 products of `_AT_ONCE` elements, or of one query's supports if that is more.
    """
    shots = len(support) // max(1, len(query))
    _check(query, support, mask, shots)
    soft = mask[:, None, :, :].float().flatten(2)  # (B K, 1, U V)
    layers, places = query.shape[1], (support.shape[2] * support.shape[3], query.shape[2] * query.shape[3])
    result = torch.empty(len(support), layers, *places, dtype=dtype, device=query.device)
    step = max(1, _AT_ONCE // max(1, shots * layers * places[0] * places[1]))
    for first in range(0, len(query), step):
        pairs = slice(first * shots, (first + step) * shots)
        # bfloat16 holds every code, and half the bytes of float32 go through memory.
        scenes = query[first : first + step].flatten(2, 3).to(torch.bfloat16)
        objects = support[pairs].flatten(2, 3).to(torch.bfloat16)
        scene_factor = 1 / (torch.linalg.vector_norm(scenes, dim=-1, dtype=torch.float32) + eps)
        norms = torch.linalg.vector_norm(objects, dim=-1, dtype=torch.float32)
        object_factor = soft[pairs] / (soft[pairs] * norms + eps)
        scenes, scene_factor = (_for_each_support(part, shots) for part in (scenes, scene_factor))
        products = code_products(objects.flatten(0, 1), scenes.flatten(0, 1).transpose(1, 2)).unflatten(0, (-1, layers))
        cosines = products.mul_(object_factor[..., None]).mul_(scene_factor[:, :, None]).clamp_(min=0)
        if len(cosines) == len(support) and dtype == cosines.dtype:
            result = cosines
        else:
            result[pairs] = cosines
    return result.view(*support.shape[:4], *query.shape[2:4])


def build_pyramid(
    query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor, eps: float = EPS, unit: bool = False
) -> list[Tensor]:
    """The hypercorrelation pyramid of a batch of one-shot episodes.

    Args:
        query, support: levels, finest first, each (B, L, H, W, C); any real dtype, any scale per position
            (int8 codes without their scale will do: a cosine ignores it).
        mask: (B, S, S') support masks at network size, 1 inside the object.

    Returns:
        One (B, L, U, V, H, W) float32 tensor per level, deepest first; inside a level layers run shallow to deep.

    Memory: 4 B per element; a ResNet-101 episode at 400 px has 34.1 M elements, 73 % of them in the 50x50 level.
    """
    if len(query) != len(support):
        raise ShapeError(f"The query has {len(query)} levels and the support {len(support)}.")
    if mask.ndim != 3:
        raise ShapeError(f"Support masks must be (B, S, S), got {tuple(mask.shape)}.")
    return [
        build_hypercorrelation(q, s, interpolate_mask(mask, (s.shape[2], s.shape[3])), eps, unit)
        for q, s in zip(reversed(query), reversed(support), strict=True)
    ]


def _real(features: Tensor) -> Tensor:
    """Stored features as numbers to calculate with: float32, or float64 where they are that already."""
    return features if features.dtype == torch.float64 else features.float()


def keeps_codes(query: Tensor, support: Tensor) -> bool:
    """Whether codes are multiplied as they are where all positions are.

    Not on a CPU, which has `correlate_rows` for them, and whose float32 products are as exact.
    """
    return query.dtype == support.dtype == torch.int8 and query.device.type != "cpu"


def _for_each_support(queries: Tensor, shots: int) -> Tensor:
    """(B, ...) of queries to (B K, ...), copied only where there are several supports."""
    return queries if shots == 1 else queries.repeat_interleave(shots, 0)


def _multiplies_codes(features: Tensor) -> bool:
    """Whether int8 products are exact and fast here. Older x86 processors add pairs of them in 16 bits and saturate."""
    return features.dtype == torch.int8 and features.device.type == "cpu" and torch.cpu._is_vnni_supported()


def _check(query: Tensor, support: Tensor, mask: Tensor, shots: int = 1) -> None:
    if query.ndim != 5 or support.ndim != 5:
        raise ShapeError(
            f"Levels must be (B, L, H, W, C), got query {tuple(query.shape)} and support {tuple(support.shape)}."
        )
    for name, axis, times in (("batch size", 0, shots), ("layers", 1, 1), ("channels", 4, 1)):
        if times * query.shape[axis] != support.shape[axis]:
            raise ShapeError(f"Query and support differ in {name}: {query.shape[axis]} and {support.shape[axis]}.")
    wanted = (support.shape[0], *support.shape[2:4])
    if mask.shape != wanted:
        raise ShapeError(f"The mask must be {wanted} like the support grid, got {tuple(mask.shape)}.")
