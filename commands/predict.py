"""`hsnet predict`: masks of new photos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.groups import Failure, on_interrupt
from commands.options import ANY_PATH, common_options, device_option, options, weights_option
from commands.steps import emit, pick_device
from commands.terminal import Progress, set_up_logging
from pipeline.common.text import printable, time_text
from pipeline.episodes.protocols import FUSIONS


@click.command(short_help="Masks of new photos from a few examples.")
@click.option("--checkpoint", "checkpoint_path", type=ANY_PATH, metavar="C", required=True, help="Checkpoint or run.")
@click.option(
    "--support",
    "supports",
    multiple=True,
    required=True,
    metavar="PHOTO:MASK",
    help="A photo and the mask of the object in it. May be repeated: more shots.",
)
@click.option(
    "--query",
    "queries",
    type=ANY_PATH,
    multiple=True,
    required=True,
    metavar="FILE|DIR",
    help="A photo, or a folder of photos. May be repeated.",
)
@click.option("--out", type=ANY_PATH, metavar="DIR", required=True, help="Where masks and overlays are written.")
@click.option(
    "--fusion",
    type=click.Choice(FUSIONS),
    default="vote",
    show_default=True,
    help="How several supports make one mask: the published vote, the mean of what each says, or one joint answer.",
)
@click.option(
    "--tau",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    show_default=True,
    help="Share of votes, or probability, from which a pixel is object: higher marks less.",
)
@options(weights_option, device_option)
@common_options
def predict(
    checkpoint_path: Path,
    supports: tuple[str, ...],
    queries: tuple[Path, ...],
    out: Path,
    weights: str | None,
    device: str,
    as_json: bool,
    quiet: bool,
    **fused: Any,
) -> Any:
    """Find the supports' object in new photos: a mask (PNG) and an overlay of each. No store is needed.

    In a mask everything that is not 0 is object; with soft edges, 128 and above. A photo that cannot be read is
    reported, the others are done, and the exit code is 1.

    \b
    Example:
      hsnet predict --checkpoint runs/voc-0 --support cup.jpg:cup.png --query photos/ --out masks/
    """
    set_up_logging(quiet)
    on_interrupt("The masks written so far are whole.")
    from pipeline import predict as stage
    from pipeline.datasets.own_support import parse_support
    from pipeline.features.weights import load_weights
    from pipeline.heads.checkpoint import load_checkpoint

    pairs = [parse_support(text) for text in supports]
    loaded = load_checkpoint(checkpoint_path)
    own = weights is None and loaded.info.finetuned
    photos = stage.list_queries(queries)
    with Progress("predict", "photos", quiet) as progress:
        summary = stage.predict(
            loaded,
            loaded.backbone_weights() if own else load_weights(loaded.recipe.backbone, weights),
            pairs,
            photos,
            out,
            device=pick_device(device),
            on_event=progress.update,
            **fused,
        )
    lines = [
        f"{printable(item.mask)}  {100 * item.object_share:.1f} % of {printable(item.query)}"
        for item in summary.written
    ]
    lines.append(
        f"{len(summary.written)} of {len(photos)} photos, {summary.shots}-shot, {time_text(summary.seconds)}: "
        f"masks and overlays in {printable(out)}"
    )
    result = emit(summary, "\n".join(lines), as_json)
    if summary.failed:
        names = ", ".join(printable(path) for path, _ in summary.failed)
        raise Failure(f"{len(summary.failed)} of {len(photos)} photos could not be used: {names}")
    return result
