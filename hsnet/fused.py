"""From features to logits without writing down what the next layer reads once.

Dimension key: B queries, K shots, L layers of one level, C channels, U V support grid, H W query grid.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hsnet.correlation import build_pyramid
from hsnet.model import HSNet


class FusedHSNet(nn.Module):
    """A learner with its correlation: features and masks in, logits out.

    Args:
        model: the learner. Its parameters are shared, not copied: training this trains it.

    `forward` takes levels of the queries, finest first, each (B, L, H, W, C), levels of their supports, each
    (B K, L, U, V, C) with all shots of the first query first, and the support masks (B K, S, S'); it returns logits
    (B K, 2, 2 H, 2 W), those of `model(build_pyramid(query, support, mask))` up to rounding.
    """

    def __init__(self, model: HSNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor) -> Tensor:
        shots = len(support[0]) // len(query[0])
        repeated = [level.repeat_interleave(shots, 0) for level in query]
        return self.model(build_pyramid(repeated, support, mask))
