"""`hsnet weights`: backbone weights from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.groups import OrderedGroup
from commands.options import ANY_PATH, BACKBONE_NAMES, FILE, Backbone, json_option
from commands.steps import emit
from commands.terminal import fact_lines
from pipeline.common.text import printable, size_text


@click.group(cls=OrderedGroup)
def weights() -> None:
    """Bring backbone weights from elsewhere.

    \b
    Example:
      hsnet weights convert model.onnx dinov2.safetensors --backbone timm:vit_small_patch14_dinov2
    """


@weights.command("convert", short_help="A torch, safetensors or ONNX file to the names a backbone needs.")
@click.argument("source", type=FILE, metavar="FILE")
@click.argument("target", type=ANY_PATH, metavar="OUT")
@click.option("--backbone", type=Backbone(), metavar=BACKBONE_NAMES, required=True, help="Whose weights they are.")
@click.option("--half", is_flag=True, help="Write float16: half the bytes, and other weights by their digest.")
@click.option("--source", "origin", default="", help="Where they come from, told to stores. [default: the file's name]")
@click.option("--licence", default="", help="Their licence, told to stores.")
@json_option
def weights_convert(
    source: Path, target: Path, backbone: str, half: bool, origin: str, licence: str, as_json: bool
) -> Any:
    """Write the weights of a backbone that are in FILE (torch, safetensors, ONNX) as OUT, a safetensors file.

    Nothing in FILE is run. Tensors that the backbone does not have, such as heads, are left out; missing ones are
    an error. Use OUT with --weights.

    \b
    Example:
      hsnet weights convert model.onnx dinov2.safetensors --backbone timm:vit_small_patch14_dinov2
    """
    from pipeline.features.convert import convert_weights

    done = convert_weights(source, target, backbone, half, origin, licence)
    facts = {
        "written": f"{printable(done.path)}, {size_text(done.bytes)}",
        "backbone": f"{done.backbone}, {done.tensors} tensors",
        "weights": done.sha256,
        "left out": printable(", ".join(done.left_out[:8])) + (" ..." if len(done.left_out) > 8 else "") or "nothing",
    }
    return emit(done, fact_lines(facts), as_json)
