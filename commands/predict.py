"""`hsnet predict`: masks of new photos."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from commands.groups import Failure, on_interrupt
from commands.options import (
    ANY_PATH,
    address_option,
    common_options,
    device_option,
    options,
    weights_option,
    workers_option,
)
from commands.steps import allow_mixed, emit, pick_device, require_ray
from commands.terminal import Progress, set_up_logging
from pipeline.common.text import printable, time_text
from pipeline.episodes.protocols import FUSIONS

LISTED = 1000
"""With more photos there is no line for each on the screen, only in the file of results."""

STORE_BYTES = 512 << 20
"""Photos at network size and masks wait here for their next stage."""


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
@click.option("--recursive", is_flag=True, help="Take photos of subfolders, too; outputs are named SUBFOLDER-NAME.")
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
    help="From where on a pixel is object; higher marks less. With vote, a share of the most votes that any pixel of "
    "this photo has, so one support of five suffices where no pixel has more; else a probability.",
)
@click.option("--no-overlay", is_flag=True, help="Masks only.")
@options(weights_option, workers_option, address_option, device_option)
@common_options
def predict(
    checkpoint_path: Path,
    supports: tuple[str, ...],
    queries: tuple[Path, ...],
    recursive: bool,
    out: Path,
    no_overlay: bool,
    weights: str | None,
    workers: int,
    address: str | None,
    device: str,
    as_json: bool,
    quiet: bool,
    **fused: Any,
) -> Any:
    """Find the supports' object in new photos: a mask (PNG) and an overlay of each. No store is needed.

    In a mask everything that is not 0 is object; with soft edges, 128 and above. A photo that cannot be read is
    reported, the others are done, and the exit code is 1. Masks that are there, made with the same head, supports and
    settings, are kept: the same command goes on after an interruption.

    \b
    Example:
      hsnet predict --checkpoint runs/voc-0 --support cup.jpg:cup.png --query photos/ --out masks/
    """
    set_up_logging(quiet)
    on_interrupt("The masks written so far are whole: give the same command again to go on.")
    from pipeline.datasets.own_support import parse_support
    from pipeline.datasets.queries import list_queries
    from pipeline.features.weights import load_weights
    from pipeline.heads.checkpoint import load_checkpoint
    from pipeline.predict import stage

    pairs = [parse_support(text) for text in supports]
    loaded = load_checkpoint(checkpoint_path)
    own = weights is None and loaded.info.finetuned
    on_ray = workers > 0 or address is not None
    # A worker on another machine has another working directory.
    photos = list_queries([query.absolute() for query in queries] if on_ray else queries, recursive, out)
    chosen = pick_device(device, address)
    with _pipe(workers, address, chosen) as pipe, Progress("predict", "photos", quiet) as progress:
        summary = stage.predict(
            loaded,
            loaded.backbone_weights() if own else load_weights(loaded.recipe.backbone, weights),
            pairs,
            photos,
            out.absolute() if on_ray else out,
            overlay=not no_overlay,
            device=chosen,
            pipe=pipe,
            on_event=progress.update,
            **fused,
        )
    few = len(photos) <= LISTED
    done = summary.photos - summary.unusable
    lines = [
        f"{printable(item.mask)}  {100 * item.object_share:.1f} % of {printable(item.query)}"
        for item in (summary.written if few else ())
    ]
    there = f", {summary.kept} of them there before" if summary.kept else ""
    lines.append(
        f"{done} of {len(photos)} photos{there}, {summary.shots}-shot, {time_text(summary.seconds)}: "
        f"masks{'' if no_overlay else ' and overlays'} in {printable(out)}"
    )
    if not few:
        lines.append(f"A line per photo: {printable(summary.results)}")
    report = dataclasses.asdict(summary) | ({"written": summary.written, "failed": summary.failed} if few else {})
    result = emit(report, "\n".join(lines), as_json)
    if summary.unusable:
        names = ", ".join(printable(path) for path, _ in summary.failed[:LISTED])
        raise Failure(f"{summary.unusable} of {len(photos)} photos could not be used: {names}")
    return result


@contextlib.contextmanager
def _pipe(workers: int, address: str | None, device: str) -> Iterator[Any]:
    """What does the work: this process, or a pipeline on Ray."""
    from pipeline.predict.stage import in_process

    if workers == 0 and address is None:
        yield in_process
        return
    require_ray(workers, address, device)
    from cluster.nodes import total
    from cluster.predict import RayPipe
    from cluster.session import session

    # Beside the models at least one CPU decodes and encodes.
    cpus = max(workers + 1, os.cpu_count() or 1)
    with session(address or "local", num_cpus=cpus, object_store_bytes=STORE_BYTES, allow_mixed=allow_mixed()):
        yield RayPipe(workers or max(1, total("CPU") // 2), gpus=1 if device.startswith("cuda") else 0)
