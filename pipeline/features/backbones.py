"""Every backbone by its name: the recipe of its features, and the network that a recipe names.

Built-in networks come from the table of `hsnet.backbone`, names that begin with "timm:" from timm. Whoever needs a
network opens it here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hsnet.backbone import Backbone, FrozenBackbone, backbone_spec
from hsnet.errors import ConfigError, ImageSizeError
from pipeline.features.network import AUTOCAST
from pipeline.features.recipe import LARGEST_IMAGE, UNKNOWN, Recipe, normalisation_text
from pipeline.features.weight_names import is_timm
from pipeline.features.weights import Weights

PUBLISHED_SIZE = 400
"""Side of the square network input of the published code, pixels."""
_TRIES = 4


@dataclass(frozen=True)
class Reading:
    """How a network is read: its arithmetic; layers, if not those of `pipeline.features.timm_backbone`'s rule."""

    taps: str | None = None
    """Layers of a network of timm's, commas between them; a slash begins another level."""
    autocast: str = ""
    """Arithmetic of the forward pass: "" (float32), "bfloat16" or "float16"."""


def new_recipe(
    backbone: str,
    weights: Weights | None,
    image_size: int = PUBLISHED_SIZE,
    precision: str = "int8",
    reading: Reading = Reading(),
) -> Recipe:
    """The recipe of features of any backbone.

    Args:
        backbone: a key of `hsnet.backbone.BACKBONES`, or "timm:" and a name of timm's.
        weights: its weights; None where the recipe is only looked at for its sizes.
        image_size: side of the square network input, pixels.
        precision: see `Recipe`.
        reading: arithmetic, and layers of a network of timm's.

    Raises:
        ConfigError: unknown backbone; it gives no maps, not at this size, or none that a learner could mix; taps of
            a built-in network; timm is not installed.
    """
    sha256 = UNKNOWN if weights is None else weights.sha256
    if not is_timm(backbone):
        if reading.taps is not None:
            raise ConfigError(
                f"--taps is for networks of timm's: what is read of {backbone_spec(backbone).name} is fixed."
            )
        _require_autocast(reading)
        return replace(Recipe.of(backbone, sha256, image_size, precision), autocast=reading.autocast)
    if not 1 <= image_size <= LARGEST_IMAGE:
        raise ConfigError(f"Image size must be 1 to {LARGEST_IMAGE} pixels, got {image_size}.")
    _require_autocast(reading)
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


def _require_autocast(reading: Reading) -> None:
    if reading.autocast not in AUTOCAST:
        raise ConfigError(f"Unknown autocast '{reading.autocast}'. Choose one of: bfloat16, float16.")


def default_image_size(backbone: str, reading: Reading = Reading()) -> tuple[int, str]:
    """The image size to take where none is asked for: the published 400 px, or the nearest that the backbone can be
    read at, the smaller of two.

    Returns:
        The side of the square in pixels, and why it is not 400; "" where it is.

    Raises:
        ConfigError: as `new_recipe`, for whatever is not the size's fault.
    """
    size, why = PUBLISHED_SIZE, ""
    for _ in range(_TRIES):
        try:
            new_recipe(backbone, None, size, "float32", reading).require_trainable()
        except ImageSizeError as error:
            if not error.nearest:
                raise
            why = why or str(error)
            size = min(error.nearest, key=lambda near: (abs(near - PUBLISHED_SIZE), near))
        else:
            return size, why
    raise ConfigError(f"{why} No image size was found that {backbone} can be read at: give --image-size.")


def same_reading(recipe: Recipe, weights: Weights, precision: str | None = None) -> Recipe:
    """The recipe of features like a recipe's, by the weights at hand: for those who have a store or a checkpoint."""
    precision = precision or ("float32" if recipe.coding else recipe.precision)
    if not is_timm(weights.backbone) or recipe.network is None:
        own = Recipe.of(weights.backbone, weights.sha256, recipe.image_size, precision)
        return replace(own, autocast=recipe.autocast)
    return replace(recipe, backbone=weights.backbone, weights=weights.sha256, precision=precision, coding=None)


def open_backbone(recipe: Recipe, weights: Weights) -> Backbone:
    """The network whose features a recipe describes.

    Raises:
        ConfigError: it is not known, timm is not installed, or it has other layers than the recipe names.
        WeightsError: the weights are of another network.
    """
    if recipe.network is None:
        autocast = {"": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[recipe.autocast]
        return FrozenBackbone(recipe.backbone, weights.state_dict, autocast)
    from pipeline.features.timm_backbone import TimmBackbone

    return TimmBackbone(recipe, weights.state_dict)
