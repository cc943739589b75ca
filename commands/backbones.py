"""`hsnet backbones`: what there is to choose from."""

from __future__ import annotations

from typing import Any

import click

from commands.options import Backbone, Whole, json_option, options, taps_option
from commands.steps import emit
from commands.terminal import fact_lines, table
from pipeline.common.text import printable, size_text


@click.command(short_help="Networks whose features can be used, and what they cost.")
@click.argument("name", type=Backbone(), required=False, metavar="[NAME]")
@click.option(
    "--image-size", type=Whole(32), default=224, show_default=True, help="Side of the square network input, pixels."
)
@options(taps_option, json_option)
def backbones(name: str | None, image_size: int, taps: str | None, as_json: bool) -> Any:
    """List the built-in networks and the networks of timm's that were tried, or say all of one (timm:NAME).

    Grids, layers and bytes per photo (int8) are those at the image size; nothing is downloaded. What scores they reach
    is in docs/backbones.md.

    \b
    Example:
      hsnet backbones timm:vit_small_patch14_dinov2
    """
    from pipeline.features.backbones import Reading
    from pipeline.features.known_networks import backbone_facts, known_networks
    from pipeline.features.timm_registry import INSTALL, available

    if name is not None:
        network = backbone_facts(name, image_size, Reading(taps))
        levels = zip(network.grids, network.layers, strict=True)
        sizes = {
            "levels": ", ".join(f"{h}x{w} of {n} layers" for (h, w), n in levels),
            "layers": printable(", ".join(network.taps)),
            "bytes": f"{size_text(network.bytes_per_photo)} per photo (int8)",
            "normalisation": network.normalisation,
        }
        facts = {
            "backbone": printable(network.backbone),
            "image size": f"{network.image_size} px",
            **({"does not fit": printable(network.problem)} if network.problem else sizes),
            "weights": printable(network.weights or "none published: --weights FILE"),
            "licence": printable(network.licence or "unknown"),
        }
        return emit(network, fact_lines(facts), as_json)
    if taps is not None:
        raise click.UsageError("--taps are layers of one network: give its NAME, too.")
    networks = known_networks(image_size, with_timm=available())
    rows = [
        [
            network.backbone,
            " ".join(f"{h}x{w}" for h, w in network.grids) or "does not fit",
            " ".join(map(str, network.layers)),
            size_text(network.bytes_per_photo) if network.bytes_per_photo else "",
            _normalisation_text(network.normalisation),
            network.weights,
            network.licence or "unknown",
        ]
        for network in networks
    ]
    text = table(rows, [f"at {image_size} px", "grids", "layers", "per photo", "normalised", "weights from", "licence"])
    notes = [f"{network.backbone}: {network.problem}" for network in networks if network.problem]
    if not available():
        notes.append(f"timm is not installed; with it there are more: {INSTALL}")
    return emit(networks, "\n".join([text, *(("", *map(printable, notes)) if notes else ())]), as_json)


def _normalisation_text(said: str) -> str:
    from pipeline.features.recipe import NORMALISATION

    return "as ImageNet" if said == NORMALISATION else "its own"
