"""Names and shapes of every backbone's weights: which there must be, which no tap needs, and random ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hsnet.backbone import BACKBONES, FrozenBackbone, backbone_spec, random_state_dict
from hsnet.errors import ConfigError
from pipeline.features.recipe import TIMM


def is_timm(backbone: str) -> bool:
    return backbone.startswith(TIMM)


def require_known(backbone: str) -> None:
    """Raise ConfigError unless there is a backbone of this name."""
    if is_timm(backbone):
        from pipeline.features.timm_registry import entry

        entry(backbone)
    elif backbone not in BACKBONES:
        raise ConfigError(
            f"Unknown backbone '{backbone}'. Choose one of: {', '.join(BACKBONES)}, or {TIMM}NAME for timm's."
        )


def head_names(backbone: str) -> tuple[str, ...]:
    """Beginnings of the names of weights that no tap needs."""
    if is_timm(backbone):
        from pipeline.features.timm_registry import entry

        return tuple(f"{part}." for part in entry(backbone).classifier)
    return (f"{backbone_spec(backbone).head}.",)


def wanted_names(backbone: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a backbone, without its head.

    Raises:
        ConfigError: unknown backbone, or timm is not installed.
    """
    require_known(backbone)
    if is_timm(backbone):
        from pipeline.features.timm_registry import wanted_names as of_timm

        return of_timm(backbone)
    return {
        name: tuple(value.shape)
        for name, value in random_state_dict(backbone, 0).items()
        if not name.startswith(head_names(backbone)) and not name.endswith("num_batches_tracked")
    }


def check_names(backbone: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise WeightsError unless tensors have the names and shapes of the network's weights."""
    if is_timm(backbone):
        from pipeline.features.timm_registry import check_names as check

        return check(backbone, tensors)
    with torch.device("meta"):  # compares names and shapes before anything is allocated for them
        FrozenBackbone(backbone, {name: value.to("meta") for name, value in tensors.items()})
    return None


def random_weights(backbone: str, seed: int) -> dict[str, Tensor]:
    """Weights of a freshly initialised network."""
    if is_timm(backbone):
        from pipeline.features.timm_registry import random_state_dict as of_timm

        return of_timm(backbone, seed)
    return random_state_dict(backbone, seed)
