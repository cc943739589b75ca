"""From features to logits without writing down what the next layer reads once.

Dimension key: B queries, K shots, L layers of one level, C channels, U V support grid, H W query grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hsnet.contrast import contrast_maps
from hsnet.conv4d import CenterPivotConv4d
from hsnet.correlation import correlate_all, correlate_rows, interpolate_mask, prepare_query
from hsnet.errors import ConfigError, ShapeError
from hsnet.model import KERNEL, HSNet, require_same_grid, resize_logits
from hsnet.sparse import SparseActivations, convolve, normalise

ARITHMETIC = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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

    def forward(self, query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor, unit: bool = False) -> Tensor:
        return self.decode(self.encode(query, support, mask, unit))

    def encode(self, query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor, unit: bool = False) -> Tensor:
        """What the decoder reads of every support: (B K, C, H, W) float32, contrast maps included."""
        queries, pairs = len(query[0]), len(mask)
        if pairs % queries or len(support[0]) != pairs:
            raise ShapeError(
                f"{len(support[0])} supports with {pairs} masks cannot be shared evenly by {queries} queries."
            )
        query, support = self.model.chosen(query), self.model.chosen(support)
        on_cpu = mask.device.type == "cpu"
        sparse = self.model.kernel == KERNEL and (on_cpu if self.sparse is None else self.sparse)
        context = (self._sparse if sparse else self._dense)(query, support, self.model.seen(mask), unit)
        if not self.model.background:
            return context
        # As the correlations: in full precision on a CPU, where half of it is no faster.
        maps = contrast_maps(query, support, mask, unit, None if on_cpu else self._dtype)
        return torch.cat([context, maps.to(context.dtype)], 1)

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

    def _sparse(self, query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor, unit: bool) -> Tensor:
        pairs = len(mask)
        squeezed = [
            _run(block, _correlate(scenes, objects, mask, unit, ARITHMETIC[self.arithmetic]))
            for block, scenes, objects in zip(self.model.squeeze, reversed(query), reversed(support), strict=True)
        ]
        mixed = squeezed[0]
        for mix, finer in zip(self.model.mix, squeezed[1:], strict=True):
            require_same_grid(mixed.grid, finer.grid)
            height, width = finer.values.shape[2:]
            coarse = resize_logits(mixed.values, (height, width))
            mixed = _run(mix, SparseActivations.complete(coarse + finer.values, pairs, finer.grid))
        return _exact(mixed.values).unflatten(0, (pairs, -1)).mean(1)

    def _dense(self, query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor, unit: bool) -> Tensor:
        shots, dtype = len(mask) // len(query[0]), self._dtype
        pyramid = []
        for scenes, objects in zip(reversed(query), reversed(support), strict=True):
            masks = interpolate_mask(mask, (objects.shape[2], objects.shape[3]))
            pyramid.append(correlate_all(scenes.repeat_interleave(shots, 0), objects, masks, dtype, unit=unit))
        with self._autocast(mask.device):
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
