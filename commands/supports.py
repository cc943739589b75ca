"""`hsnet supports`: which photos make good supports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.groups import on_interrupt
from commands.options import (
    ANY_PATH,
    Whole,
    address_option,
    arithmetic_option,
    common_options,
    device_option,
    options,
    seed_option,
    store_option,
    workers_option,
)
from commands.steps import emit, open_runner, pick_arithmetic, pick_device, store_source
from commands.terminal import Progress, set_up_logging, table
from pipeline.common.text import printable


@click.command(short_help="Which photos make good supports.")
@click.option("--checkpoint", "checkpoint_path", type=ANY_PATH, metavar="C", required=True, help="Checkpoint or run.")
@store_option
@click.option("--fold", type=Whole(0), help="Of the classes. [default: the one the checkpoint was trained for, or 0]")
@click.option("--class", "classes", multiple=True, metavar="NAME", help="Only this class. May be repeated.")
@click.option("--candidates", type=Whole(), default=20, show_default=True, help="Supports tried per class.")
@click.option("--queries", type=Whole(), default=20, show_default=True, help="Queries each is tried on.")
@click.option("--out", type=ANY_PATH, metavar="PAIRS.parquet", help="Write the counts of every pair.")
@options(seed_option, arithmetic_option, workers_option, address_option, device_option)
@common_options
def supports(
    checkpoint_path: Path,
    store: str | Path,
    fold: int | None,
    out: Path | None,
    arithmetic: str,
    workers: int,
    address: str | None,
    device: str,
    as_json: bool,
    quiet: bool,
    **drawn: Any,
) -> Any:
    """Try many supports on the same queries: how much the choice matters per class, and which support to take.

    The gain of the suggested support is measured on queries that it was not chosen on.

    \b
    Example:
      hsnet supports --checkpoint runs/mine --store mine.zarr --class cup
    """
    set_up_logging(quiet)
    on_interrupt("No result was written.")
    from pipeline.common.files import require_writable, write_table
    from pipeline.heads.catalogue import trained
    from pipeline.supports import choose_supports

    if out is not None:
        require_writable(out)
    device = pick_device(device, address)
    make_source = store_source(store)
    source = make_source()
    method = trained(checkpoint_path, source, device, pick_arithmetic(arithmetic, device, address))
    fold = (method.held_out or 0) if fold is None else fold
    with open_runner(workers, address, device) as runner, Progress("supports", "queries", quiet) as progress:
        choice = choose_supports(
            method.make,
            make_source,
            source.index,
            fold=fold,
            skipped=tuple(source.skipped),
            runner=runner,
            device=device,
            on_event=progress.update,
            **drawn,
        )
    lines = [
        [
            printable(scores.name),
            f"{scores.mean:.1f}",
            f"{scores.spread:.1f}",
            f"{scores.supports[0].iou:.1f}  {printable(scores.supports[0].image)}",
            f"{scores.supports[-1].iou:.1f}  {printable(scores.supports[-1].image)}",
            "-" if scores.gain is None else f"{scores.gain:+.1f}",
        ]
        for scores in choice.classes
    ]
    head = ["class", "mean IoU", "spread", "best support", "worst support", "gain"]
    text = (
        f"{table(lines, head)}\n\n"
        f"up to {drawn['candidates']} supports on up to {drawn['queries']} queries a class. spread: "
        f"standard deviation over supports. gain: of the best support over the mean one, on queries it was not chosen "
        f"on."
    )
    result = emit({"fold": fold, "classes": choice.classes, "pairs": out}, text, as_json)
    if out is not None:
        write_table(out, choice.table())
    return result
