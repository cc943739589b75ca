"""From features to logits without writing down what the next layer reads once.

Dimension key: B queries, K shots, L layers of one level, C channels, U V support grid, H W query grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hsnet.contrast import contrast_maps
from hsnet.conv4d import CenterPivotConv4d
from hsnet.correlation import correlate_all, correlate_rows, interpolate_mask, prepare_query
from hsnet.errors import ConfigError, ShapeError
from hsnet.model import KERNEL, HSNet, require_same_grid, resize_logits
from hsnet.sparse import SparseActivations, convolve, normalise

ARITHMETIC = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Correlations:
    """What a learner reads of a batch before its first weight: the same for all learners of one `reads`."""

    levels: Sequence[SparseActivations | Tensor]
    """Of every level used, deepest first: rows of the object positions, or all as (B K, L, U, V, H, W)."""
    contrast: Tensor | None
    """(B K, M, H, W) contrast maps of learners that see them."""


class FusedHSNet(nn.Module):
    """A learner with its correlation: features and masks in, logits out.

    Args:
        model: the learner. Its parameters are shared, not copied: training this trains it.
        arithmetic: "float32", or "bfloat16" for activations and products of the learner. Norms, statistics of the
            normalisations, parameters and logits stay float32.
        sparse: leave out the support positions outside the object (`hsnet.sparse`), or compute all of them, without
            ever asking which they are. By default the first on a CPU and the second elsewhere. Only centre-pivot
            kernels can leave them out; the others always compute all.

    `forward` takes levels of the queries, finest first, each (B, L, H, W, C), levels of their supports, each
    (B K, L, U, V, C) with all shots of the first query first, and the support masks (B K, S, S'); it returns float32
    logits (B K, 2, 2 H, 2 W), those of `model.answer` up to rounding.
    """

    def __init__(self, model: HSNet, arithmetic: str = "float32", sparse: bool | None = None) -> None:
        super().__init__()
        if arithmetic not in ARITHMETIC:
            raise ConfigError(f"Unknown arithmetic '{arithmetic}'. Choose one of: {', '.join(ARITHMETIC)}.")
        self.model = model
        self.arithmetic = arithmetic
        self.sparse = sparse

    def forward(
        self,
        query: Sequence[Tensor],
        support: Sequence[Tensor],
        mask: Tensor,
        unit: bool = False,
        correlations: Correlations | None = None,
    ) -> Tensor:
        return self.decode(self.encode(query, support, mask, unit, correlations))

    @property
    def reads(self) -> tuple[object, ...]:
        """What `correlate` depends on beside the batch. Learners of one process with the same may share its result."""
        model = self.model
        kinds = self.arithmetic, self._dtype, self.sparse, model.kernel == KERNEL
        return *kinds, model.picked, model.support_mask, model.background

    def correlate(
        self, query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor, unit: bool = False
    ) -> Correlations:
        """All of `encode` that comes before the learner's weights; arguments as for `forward`. Nothing changes it.

        Raises:
            ShapeError: supports and masks cannot be shared evenly by the queries.
        """
        levels, contrast = self._read(query, support, mask, unit)
        return Correlations(list(levels), contrast)

    def encode(
        self,
        query: Sequence[Tensor],
        support: Sequence[Tensor],
        mask: Tensor,
        unit: bool = False,
        correlations: Correlations | None = None,
    ) -> Tensor:
        """What the decoder reads of every support: (B K, C, H, W) float32, contrast maps included.

        `correlations` are those of the same arguments, from this learner or another one with the same `reads`.
        """
        levels: Iterable[SparseActivations | Tensor]
        if correlations is None:
            levels, contrast = self._read(query, support, mask, unit)
        else:
            levels, contrast = correlations.levels, correlations.contrast
        context = self._sparse(levels, len(mask)) if self._leaves_out(mask) else self._dense(levels, mask.device)
        return context if contrast is None else torch.cat([context, contrast.to(context.dtype)], 1)

    def decode(self, context: Tensor) -> Tensor:
        """Logits (n, 2, 2 H, 2 W) float32 of `encode`'s (n, C, H, W)."""
        with self._autocast(context.device):
            return _exact(self.model.decode(context))

    def joint(self, contexts: Tensor) -> Tensor:
        """One answer of all supports: (B, 2, 2 H, 2 W) from contexts (K, B, C, H, W).

        The learner averages over the support grid before it decodes. Here it averages over the grids of all supports,
        as if they were one photo whose parts are too far apart to touch. (Laying them side by side on one grid would
        let convolutions run across the seams, and the answer would depend on the supports' order.)
        """
        return self.decode(contexts.mean(0))

    def _leaves_out(self, mask: Tensor) -> bool:
        """Whether positions outside the object are left out."""
        wanted = mask.device.type == "cpu" if self.sparse is None else self.sparse
        return wanted and self.model.kernel == KERNEL

    def _read(
        self, query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor, unit: bool
    ) -> tuple[Iterator[SparseActivations | Tensor], Tensor | None]:
        """Correlations, each level computed when it is asked for, and contrast maps."""
        queries, pairs = len(query[0]), len(mask)
        if pairs % queries or len(support[0]) != pairs:
            raise ShapeError(
                f"{len(support[0])} supports with {pairs} masks cannot be shared evenly by {queries} queries."
            )
        query, support = self.model.chosen(query), self.model.chosen(support)
        contrast = None
        if self.model.background:
            # As the correlations: in full precision on a CPU, where half of it is no faster.
            on_cpu = mask.device.type == "cpu"
            contrast = contrast_maps(query, support, mask, unit, None if on_cpu else self._dtype)
        return self._levels(query, support, self.model.seen(mask), unit, self._leaves_out(mask)), contrast

    def _levels(
        self, query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor, unit: bool, leave_out: bool
    ) -> Iterator[SparseActivations | Tensor]:
        for scenes, objects in zip(reversed(query), reversed(support), strict=True):
            if leave_out:
                yield _correlate(scenes, objects, mask, unit, ARITHMETIC[self.arithmetic])
            else:
                masks = interpolate_mask(mask, (objects.shape[2], objects.shape[3]))
                yield correlate_all(scenes, objects, masks, self._dtype, unit=unit)

    def _sparse(self, levels: Iterable[Any], pairs: int) -> Tensor:
        squeezed = [_run(block, rows) for block, rows in zip(self.model.squeeze, levels, strict=True)]
        mixed = squeezed[0]
        for mix, finer in zip(self.model.mix, squeezed[1:], strict=True):
            require_same_grid(mixed.grid, finer.grid)
            height, width = finer.values.shape[2:]
            coarse = resize_logits(mixed.values, (height, width))
            mixed = _run(mix, SparseActivations.complete(coarse + finer.values, pairs, finer.grid))
        return _exact(mixed.values).unflatten(0, (pairs, -1)).mean(1)

    def _dense(self, levels: Iterable[Any], device: torch.device) -> Tensor:
        pyramid = list(levels)
        with self._autocast(device):
            return _exact(self.model.squeezed_mean(pyramid))

    @property
    def _dtype(self) -> torch.dtype:
        """Of activations and products: float32 is the parameters' own precision."""
        dtype = ARITHMETIC[self.arithmetic]
        return next(self.model.parameters()).dtype if dtype == torch.float32 else dtype

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.arithmetic == "bfloat16")


def _exact(values: Tensor) -> Tensor:
    return values.float() if values.dtype == torch.bfloat16 else values


def _correlate(query: Tensor, support: Tensor, mask: Tensor, unit: bool, dtype: torch.dtype) -> SparseActivations:
    """The level's correlations at object positions; query (B, L, H, W, C), support (B K, L, U, V, C)."""
    grid = (support.shape[2], support.shape[3])
    masks = interpolate_mask(mask, grid)
    pairs, positions = masks.flatten(1).nonzero().unbind(1)
    starts = [0, *torch.bincount(pairs, minlength=len(masks)).cumsum(0).tolist()]
    exact = query.dtype if query.dtype == torch.float64 else torch.float32
    values = torch.empty(len(pairs), query.shape[1], *query.shape[2:4], dtype=exact, device=query.device)
    shots = len(support) // len(query)
    for number, scene in enumerate(query):
        prepared = prepare_query(scene, unit=unit)
        for pair in range(number * shots, (number + 1) * shots):
            correlate_rows(prepared, support[pair], masks[pair], out=values[starts[pair] : starts[pair + 1]])
    values = values.bfloat16() if dtype == torch.bfloat16 else values
    return SparseActivations(values, pairs, positions, len(masks), grid)


def _run(block: nn.Module, rows: SparseActivations) -> SparseActivations:
    """A squeeze or mix block (`hsnet.model.block`): convolution, normalisation and ReLU, several times."""
    for layer in block.children():
        if isinstance(layer, CenterPivotConv4d):
            rows = convolve(layer, rows)
        elif isinstance(layer, nn.GroupNorm):
            rows = normalise(layer, rows)  # and ReLU
    return rows.completed()
