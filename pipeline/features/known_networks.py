"""What there is to choose from: built-in networks and those of timm's that were tried, with what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hsnet.backbone import BACKBONES
from hsnet.errors import ConfigError, ShapeError
from pipeline.features.backbones import Reading, new_recipe
from pipeline.features.recipe import TIMM
from pipeline.features.weight_names import is_timm
from pipeline.features.weights import PACKAGED, PUBLISHED

TRIED = (
    "resnet10t", "convnext_atto", "efficientnet_b0", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "hiera_tiny_224",
    "vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_base_patch14_dinov2",
    "eva02_tiny_patch14_224", "vit_small_patch16_dinov3",
)  # fmt: skip
"""Names of timm's whose maps were looked at here; scores were measured of fewer (docs/backbones.md)."""


@dataclass(frozen=True)
class BackboneFacts:
    """A backbone at an image size."""

    backbone: str
    image_size: int
    problem: str | None
    """Why it does not work at this size, or at all; None if it does. Then sizes are empty."""
    grids: tuple[tuple[int, int], ...]
    """Grid of every level, finest first."""
    layers: tuple[int, ...]
    """Layers of every level."""
    taps: tuple[str, ...]
    """Names of the layers, level by level."""
    bytes_per_photo: int
    """Bytes of its features as int8."""
    normalisation: str
    weights: str
    """Where the published weights come from; "" if there are none."""
    licence: str
    """Licence of the published weights; "" if unknown."""


def backbone_facts(backbone: str, image_size: int, reading: Reading = Reading()) -> BackboneFacts:  # noqa: B008
    """What a backbone is and costs. Nothing is downloaded.

    Raises:
        ConfigError: no such backbone, or timm is not installed.
    """
    weights, licence = _published(backbone)
    problem, recipe = None, None
    try:
        recipe = new_recipe(backbone, None, image_size, reading=reading)
        recipe.require_trainable()
    except (ConfigError, ShapeError) as error:
        problem, recipe = str(error).removesuffix(" Nothing was written."), None
    shapes = recipe.level_shapes() if recipe else ()
    return BackboneFacts(
        backbone=backbone,
        image_size=image_size,
        problem=problem,
        grids=tuple(shape[1:3] for shape in shapes),
        layers=tuple(shape[0] for shape in shapes),
        taps=recipe.taps if recipe else (),
        bytes_per_photo=sum(math.prod(shape) for shape in shapes),
        normalisation=recipe.normalisation if recipe else "",
        weights=weights,
        licence=licence,
    )


def known_networks(image_size: int, with_timm: bool = True) -> list[BackboneFacts]:
    """Facts of all built-in networks and of those of timm's that were tried."""
    names = [*BACKBONES, *(f"{TIMM}{name}" for name in TRIED if with_timm)]
    return [backbone_facts(name, image_size) for name in names]


def _published(backbone: str) -> tuple[str, str]:
    if is_timm(backbone):
        from pipeline.features.timm_registry import entry

        about = entry(backbone)
        return about.source, about.licence
    if backbone in PACKAGED:
        return "inside this package", "MIT"
    return f"torchvision {PUBLISHED}" if backbone in BACKBONES else "", "BSD-3-Clause" if backbone in BACKBONES else ""
