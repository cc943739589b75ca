"""The learner and its backbone trained as one network, from photos: the comparison of Fig. 9.

Dimension key: B batch, L layers of one level, C channels, H W query grid, U V support grid, S image side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hsnet.backbone import FinetunedBackbone
from hsnet.errors import ConfigError
from hsnet.fused import Correlations, FusedHSNet
from hsnet.model import HSNet


class FinetunedHSNet(HSNet):
    """A learner that owns its backbone: parameters, state and copies of it hold those of both.

    Args:
        backbone: what is trained along with the learner.
        learner: arguments of `HSNet`. The learner's initial weights are those of an `HSNet` made with the same seed.

    Source: Min et al. 2021, Sec. 5.3 and Fig. 9. The paper names neither a learning rate of the backbone nor what
    became of its BatchNorm statistics; here they are fixed, see `FinetunedBackbone`.
    """

    def __init__(self, backbone: FinetunedBackbone, **learner: Any) -> None:
        super().__init__(**learner)
        self.backbone = backbone

    def head_state(self) -> dict[str, Tensor]:
        """State of the learner alone, by the names that an `HSNet` has."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}


class FusedFinetunedHSNet(FusedHSNet):
    """`FusedHSNet` from photos, with gradients down to the first layer of the backbone.

    Args:
        model: learner and backbone. Their parameters are shared, not copied.
        arithmetic: of the learner, as in `FusedHSNet`; the backbone is always float32 (or the precision it has).
        both_directions: the batch holds every pair twice, the second half with query and support exchanged: each
            photo goes through the backbone once.

    `forward` takes photos in the place of levels: a single tensor (B, 3, S, S), normalised, for queries and another
    for one support of each; masks and logits as in `FusedHSNet`. Every support position is computed, also on a CPU:
    products of object positions alone keep no gradient of features.
    """

    model: FinetunedHSNet

    def __init__(self, model: FinetunedHSNet, arithmetic: str = "float32", both_directions: bool = False) -> None:
        super().__init__(model, arithmetic, sparse=False)
        self.both_directions = both_directions

    def forward(
        self,
        query: Sequence[Tensor],
        support: Sequence[Tensor],
        mask: Tensor,
        unit: bool = False,
        correlations: Correlations | None = None,
    ) -> Tensor:
        if correlations is not None:
            raise ConfigError("A backbone that is trained makes its own correlations: none can be given.")
        backbone = self.model.backbone
        (queries,), (supports,) = query, support
        count = len(queries)
        if self.both_directions:
            scenes = backbone(queries)
            objects = [level.roll(count // 2, 0) for level in scenes]
        else:
            levels = backbone(torch.cat([queries, supports]))
            scenes, objects = [level[:count] for level in levels], [level[count:] for level in levels]
        return super().forward(scenes, objects, mask, unit)
