"""From features to logits without writing down what the next layer reads once.

Dimension key: B queries, K shots, L layers of one level, C channels, U V support grid, H W query grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hsnet.conv4d import CenterPivotConv4d
from hsnet.correlation import QueryLevel, correlate_all, correlate_rows, interpolate_mask, prepare_query
from hsnet.errors import ConfigError, ShapeError
from hsnet.model import HSNet, require_same_grid, resize_logits
from hsnet.rows import Rows, convolve, normalise

ARITHMETIC = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FusedHSNet(nn.Module):
    """A learner with its correlation: features and masks in, logits out.

    Args:
        model: the learner. Its parameters are shared, not copied: training this trains it.
        arithmetic: "float32", or "bfloat16" for activations and products of the learner. Norms, statistics of the
            normalisations, parameters and logits stay float32.
        pairwise: compute pair by pair, positions outside the object left out; or the whole batch at once. By default
            the first on a CPU and the second elsewhere.

    `forward` takes levels of the queries, finest first, each (B, L, H, W, C), levels of their supports, each
    (B K, L, U, V, C) with all shots of the first query first, and the support masks (B K, S, S'); it returns float32
    logits (B K, 2, 2 H, 2 W), those of `model(build_pyramid(query, support, mask, unit=unit))` up to rounding.

    Computed pair by pair, a result does not depend on what else is in the batch.
    """

    def __init__(self, model: HSNet, arithmetic: str = "float32", pairwise: bool | None = None) -> None:
        super().__init__()
        if arithmetic not in ARITHMETIC:
            raise ConfigError(f"Unknown arithmetic '{arithmetic}'. Choose one of: {', '.join(ARITHMETIC)}.")
        self.model = model
        self.arithmetic = arithmetic
        self.pairwise = pairwise

    def forward(self, query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor, unit: bool = False) -> Tensor:
        queries, pairs = len(query[0]), len(mask)
        if pairs % queries or len(support[0]) != pairs:
            raise ShapeError(
                f"{len(support[0])} supports with {pairs} masks cannot be shared evenly by {queries} queries."
            )
        shots = pairs // queries
        if not (mask.device.type == "cpu" if self.pairwise is None else self.pairwise):
            return self._batch([level.repeat_interleave(shots, 0) for level in query], support, mask, unit)
        masks = [interpolate_mask(mask, (level.shape[2], level.shape[3])) for level in support]
        logits = []
        for number in range(queries):
            scene = [prepare_query(level[number], unit=unit) for level in query]
            for pair in range(number * shots, (number + 1) * shots):
                logits.append(self._pair(scene, [level[pair] for level in support], [level[pair] for level in masks]))
        return torch.stack(logits)

    def _batch(self, query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor, unit: bool) -> Tensor:
        dtype = ARITHMETIC[self.arithmetic]
        if dtype == torch.float32:
            dtype = next(self.model.parameters()).dtype
        pyramid = [
            correlate_all(q, s, interpolate_mask(mask, (s.shape[2], s.shape[3])), dtype, unit=unit)
            for q, s in zip(reversed(query), reversed(support), strict=True)
        ]
        with self._autocast(mask.device):
            return _exact(self.model(pyramid))

    def _pair(self, query: Sequence[QueryLevel], support: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """Logits (2, 2 H, 2 W) of one query and one support; levels finest first."""
        squeezed = [
            _run(block, _correlate(scene, objects, mask, self.arithmetic))
            for block, scene, objects, mask in zip(
                self.model.squeeze, reversed(query), reversed(support), reversed(masks), strict=True
            )
        ]
        mixed = squeezed[0]
        for mix, finer in zip(self.model.mix, squeezed[1:], strict=True):
            require_same_grid(mixed.grid, finer.grid)
            height, width = finer.values.shape[2:]
            coarse = resize_logits(mixed.values, (height, width))
            mixed = _run(mix, Rows(coarse + finer.values, finer.positions, finer.grid))
        with self._autocast(mixed.values.device):
            return _exact(self.model.decode(_exact(mixed.values).mean(0, keepdim=True))[0])

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.arithmetic == "bfloat16")


def _exact(values: Tensor) -> Tensor:
    return values.float() if values.dtype == torch.bfloat16 else values


def _correlate(query: QueryLevel, support: Tensor, mask: Tensor, arithmetic: str) -> Rows:
    values, positions = correlate_rows(query, support, mask)
    if arithmetic == "bfloat16":
        values = values.bfloat16()
    return Rows(values, positions, (mask.shape[0], mask.shape[1]))


def _run(block: nn.Module, rows: Rows) -> Rows:
    """A squeeze or mix block (`hsnet.model.block`): convolution, normalisation and ReLU, several times."""
    for layer in block.children():
        if isinstance(layer, CenterPivotConv4d):
            rows = convolve(layer, rows)
        elif isinstance(layer, nn.GroupNorm):
            rows = normalise(layer, rows)  # and ReLU
    return rows.written()
