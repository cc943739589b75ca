"""Every backbone by its name: the recipe of its features, and the network that a recipe names.

Built-in networks come from the table of `hsnet.backbone`, names that begin with "timm:" from timm. Whoever needs a
network opens it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hsnet.backbone import BACKBONES, Backbone, FrozenBackbone, backbone_spec, random_state_dict
from hsnet.errors import ConfigError
from pipeline.features.network import AUTOCAST
from pipeline.features.recipe import LARGEST_IMAGE, TIMM, Recipe, normalisation_text

if TYPE_CHECKING:
    from pipeline.features.weights import Weights

UNKNOWN_WEIGHTS = "sha256:" + "0" * 64
"""In a recipe that is only looked at for its sizes."""


@dataclass(frozen=True)
class Reading:
    """How a network of timm's is read, where it is not by the rule of `pipeline.features.timm_backbone`."""

    taps: str | None = None
    """Layers, commas between them; a slash begins another level."""
    autocast: str = ""
    """Arithmetic of the forward pass: "" (float32), "bfloat16" or "float16"."""


def new_recipe(
    backbone: str,
    weights: Weights | None,
    image_size: int = 400,
    precision: str = "int8",
    reading: Reading = Reading(),
) -> Recipe:
    """The recipe of features of any backbone.

    Args:
        backbone: a key of `hsnet.backbone.BACKBONES`, or "timm:" and a name of timm's.
        weights: its weights; None where the recipe is only looked at for its sizes.
        image_size: side of the square network input, pixels.
        precision: see `Recipe`.
        reading: layers and arithmetic of a network of timm's.

    Raises:
        ConfigError: unknown backbone; it gives no maps, not at this size, or none that a learner could mix; taps or
            autocast of a built-in network; timm is not installed.
    """
    sha256 = UNKNOWN_WEIGHTS if weights is None else weights.sha256
    if not is_timm(backbone):
        if reading != Reading():
            raise ConfigError(
                f"--taps and --autocast are for networks of timm's: what is read of {backbone_spec(backbone).name} is "
                "fixed."
            )
        return Recipe.of(backbone, sha256, image_size, precision)
    if not 1 <= image_size <= LARGEST_IMAGE:
        raise ConfigError(f"Image size must be 1 to {LARGEST_IMAGE} pixels, got {image_size}.")
    if reading.autocast not in AUTOCAST:
        raise ConfigError(f"Unknown autocast '{reading.autocast}'. Choose one of: bfloat16, float16.")
    from pipeline.features.timm_backbone import describe

    taps, network = describe(backbone, image_size, reading.taps, reading.autocast)
    if weights is not None:
        network = replace(network, source=weights.source, licence=weights.licence)
    return Recipe(
        backbone=backbone,
        weights=sha256,
        image_size=image_size,
        precision=precision,
        taps=taps,
        normalisation=normalisation_text(network.mean, network.std),
        network=network,
    )


def same_reading(recipe: Recipe, weights: Weights, precision: str | None = None) -> Recipe:
    """The recipe of features like a recipe's, by the weights at hand: for those who have a store or a checkpoint."""
    precision = precision or ("float32" if recipe.coding else recipe.precision)
    if not is_timm(weights.backbone) or recipe.network is None:
        return Recipe.of(weights.backbone, weights.sha256, recipe.image_size, precision)
    return replace(recipe, backbone=weights.backbone, weights=weights.sha256, precision=precision, coding=None)


def open_backbone(recipe: Recipe, weights: Weights) -> Backbone:
    """The network whose features a recipe describes.

    Raises:
        ConfigError: it is not known, timm is not installed, or it has other layers than the recipe names.
        WeightsError: the weights are of another network.
    """
    if recipe.network is None:
        return FrozenBackbone(recipe.backbone, weights.state_dict)
    from pipeline.features.timm_backbone import TimmBackbone

    return TimmBackbone(recipe, weights.state_dict)


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
