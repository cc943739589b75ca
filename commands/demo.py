"""`hsnet demo`: the whole job once."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from commands.groups import on_interrupt
from commands.options import ANY_PATH, BACKBONE_NAMES, Backbone, Whole, json_option, options, weights_option
from commands.steps import emit, open_runner
from commands.terminal import table
from pipeline.common.text import printable, time_text


@click.command(short_help="The whole job once, on generated pictures.")
@click.option("--out", type=ANY_PATH, default=Path("demo-output"), show_default=True, help="Folder for all of it.")
@click.option("--workers", type=Whole(0), default=2, show_default=True, help="Ray workers; 0 needs no Ray.")
@click.option(
    "--backbone", type=Backbone(), metavar=BACKBONE_NAMES, default="squeezenet1_1", show_default=True, help="Network."
)
@options(weights_option)
@click.option("--image-size", type=Whole(32), help="Side of the square network input, pixels. [default: 96]")
@json_option
@click.pass_context
def demo(
    ctx: click.Context,
    out: Path,
    workers: int,
    backbone: str,
    weights: str | None,
    image_size: int | None,
    as_json: bool,
) -> Any:
    """Do the whole job once on generated pictures: extract, train, evaluate, predict. A few minutes.

    Prints every command it runs, as you would type it. Running it again goes on with what is there.

    \b
    Example:
      hsnet demo --out demo-output
    """
    from pipeline.demo import demo as stage

    program = ctx.find_root().command

    def run(arguments: Sequence[str]) -> Any:
        click.secho(f"\n$ hsnet {shlex.join(arguments)}", bold=True, err=True)
        with contextlib.redirect_stdout(sys.stderr):
            result = program.main(list(arguments), prog_name="hsnet", standalone_mode=False)
        if isinstance(result, int):  # the exit code of a command that stopped by itself
            ctx.exit(result)
        return result

    on_interrupt("Run the demo again to go on.")
    with open_runner(workers, None, "cpu"):  # one Ray for all commands: they use the one that is running
        summary = stage(out, run, workers, backbone, weights, image_size)
    rows = [
        ["untrained head", f"{summary.untrained_miou:.1f}"],
        ["cosine map, best threshold", f"{summary.cosine_miou:.1f}"],
        ["trained head", f"{summary.trained_miou:.1f}"],
        ["trained head, 5 supports", f"{summary.trained_miou_5_shot:.1f}"],
    ]
    text = (
        f"\n{table(rows, [f'{summary.episodes} episodes of held-out classes', 'mIoU'])}\n\n"
        f"mIoU before training {summary.untrained_miou:.1f}, after {summary.trained_miou:.1f}, "
        f"in {time_text(summary.seconds)}.\n"
        f"Pictures: {printable(summary.sheet)}   masks and overlays: {printable(summary.masks)}"
    )
    return emit(summary, text, as_json)
