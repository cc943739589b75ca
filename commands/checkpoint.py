"""`hsnet checkpoint`: look at checkpoints, import published ones, take finetuned backbones out."""

from __future__ import annotations

import json
from pathlib import Path

import click

from commands.groups import OrderedGroup
from commands.options import ANY_PATH, BACKBONES, FILE, Whole, json_option
from commands.steps import emit
from commands.terminal import fact_lines
from pipeline.common.text import printable


@click.group(cls=OrderedGroup)
def checkpoint() -> None:
    """Look at checkpoints, import published ones, take finetuned backbones out.

    \b
    Example:
      hsnet checkpoint info runs/voc-0
    """


@checkpoint.command("info", short_help="What a checkpoint was trained on.")
@click.argument("path", type=ANY_PATH, metavar="CHECKPOINT")
@json_option
def checkpoint_info(path: Path, as_json: bool) -> None:
    """Show what a checkpoint (or a run directory's best one) was trained on.

    \b
    Example:
      hsnet checkpoint info runs/voc-0
    """
    from pipeline.heads.checkpoint import load_checkpoint

    loaded = load_checkpoint(path)
    info, recipe = loaded.info, loaded.recipe
    scores = ", ".join(f"{name} {value:.1f}" for name, value in (info.scores or {}).items())
    facts = {
        "file": printable(loaded.path),
        "digest": loaded.digest[:15],
        "made by": f"{info.origin}, step {info.step}" if info.config else info.origin,
        "backbone": f"{recipe.backbone}, weights {recipe.weights[:15]}",
        "image size": f"{recipe.image_size} px",
        "precision": f"{recipe.precision} features",
        "parameters": f"{sum(tensor.numel() for tensor in loaded.state.values()):,}",
        "layers": f"{', '.join(map(str, info.learner.get('layers', ())))} per level, deepest first",
    }
    if info.config and info.config.learner:
        facts["learner"] = ", ".join(f"{name} {value}" for name, value in info.config.learner.items())
    if info.config:
        facts |= {"fold": str(info.config.fold), "seed": str(info.config.seed)}
    if info.config and info.averaged:
        facts["weights"] = f"moving average, decay {info.config.average}"
    if info.finetuned:
        facts["backbone's own"] = "finetuned with the head; `hsnet checkpoint backbone` writes its weights"
    if scores:
        facts["validation"] = scores
    result = {**json.loads(info.to_json()), "path": loaded.path, "digest": loaded.digest}
    emit(result, fact_lines(facts), as_json)


@checkpoint.command("import", short_help="Bring in a checkpoint of the published code.")
@click.argument("source", type=FILE, metavar="FILE")
@click.argument("target", type=ANY_PATH, metavar="OUT")
@click.option("--backbone", type=click.Choice(BACKBONES), help="Its network. [default: told from its layers]")
@click.option(
    "--image-size",
    type=Whole(32),
    default=400,
    show_default=True,
    help="Side of the squares it was trained on, pixels.",
)
@json_option
def checkpoint_import(source: Path, target: Path, backbone: str | None, image_size: int, as_json: bool) -> None:
    """Turn a checkpoint of the published code (FILE, a .pt) into one of ours (OUT).

    No code inside the file is run. The backbone inside is not kept; its digest is.

    \b
    Example:
      hsnet checkpoint import best_model.pt pascal-0.safetensors --backbone resnet50
    """
    from pipeline.heads.checkpoint import import_published

    info = import_published(source, target, backbone, image_size)
    emit(
        {**json.loads(info.to_json()), "path": target},
        f"{printable(target)}: head for {info.recipe.backbone} at {info.recipe.image_size} px, "
        f"weights {info.recipe.weights[:15]}",
        as_json,
    )


@checkpoint.command("backbone", short_help="Take the finetuned backbone out of a checkpoint.")
@click.argument("path", type=ANY_PATH, metavar="CHECKPOINT")
@click.argument("target", type=ANY_PATH, metavar="OUT")
@json_option
def checkpoint_backbone(path: Path, target: Path, as_json: bool) -> None:
    """Write the weights of the backbone that was finetuned with a head (OUT, .safetensors).

    `hsnet extract --weights OUT` makes a store of its features, the only ones that the head can be evaluated on.

    \b
    Example:
      hsnet checkpoint backbone runs/finetuned finetuned.safetensors
    """
    from pipeline.heads.checkpoint import load_checkpoint, save_backbone

    loaded = load_checkpoint(path)
    weights = save_backbone(loaded, target)
    emit(
        {"path": target, "backbone": weights.backbone, "sha256": weights.sha256, "checkpoint": loaded.digest},
        f"{printable(target)}: {weights.backbone}, weights {weights.sha256[:15]}, of {printable(loaded.path)}",
        as_json,
    )
