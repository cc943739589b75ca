"""`hsnet review`: what prediction wrote, looked at and corrected."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import ANY_PATH, device_option, options, quiet_option, weights_option
from commands.serve import head_option, run, server_options
from commands.steps import pick_device
from commands.terminal import set_up_logging
from pipeline.common.text import printable


@click.command(short_help="Look at predicted masks, correct them, learn from it.")
@click.argument("out", type=ANY_PATH)
@click.option("--bank", type=ANY_PATH, metavar="BANK", help="Where corrections go, and what predicts again.")
@options(server_options, weights_option, head_option)
@click.option(
    "--tau",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    show_default=True,
    help="As it was given to `hsnet predict`.",
)
@click.option("--no-refine", is_flag=True, help="As it was given to `hsnet predict`.")
@options(device_option, quiet_option)
def review(
    out: Path,
    bank: Path | None,
    host: str,
    port: int,
    token: str | None,
    names: tuple[str, ...],
    max_mb: int,
    weights: str | None,
    head: str,
    tau: float,
    no_refine: bool,
    device: str,
    quiet: bool,
) -> None:
    """Review OUT, a folder that `hsnet predict` wrote, on a local page: accept, reject or correct masks, the least sure
    first.

    Corrections go into --bank; photos that nobody has decided on are then predicted again. Decisions are kept in
    OUT/review.json. Ctrl-C ends it.

    \b
    Example:
      hsnet review masks/ --bank cups.bank
    """
    set_up_logging(quiet)
    from pipeline.serve.server import require_server

    require_server()
    from pipeline.predict.prepare import Choices
    from pipeline.predict.writing import Outputs
    from pipeline.review.app import create_app
    from pipeline.review.folder import Reviewed
    from pipeline.review.loop import Loop
    from pipeline.serve.engine import Engine
    from pipeline.serve.guard import Access

    access = Access(host, port, token, names, max_mb << 20)
    reviewed = Reviewed(out)
    engine = None
    if bank is not None:
        choices = Choices(
            head=head,
            weights=weights,
            tau=tau,
            refine=not no_refine,
            overlapping=reviewed.overlapping,
            device=pick_device(device, None),
        )
        engine = Engine(bank, choices, Outputs(soft=reviewed.photos[0].soft))
    loop = Loop(reviewed, engine)
    try:
        run(lambda: create_app(loop, access), access, f"{printable(out)}: {len(reviewed.photos)} photos", loop.start)
    finally:
        loop.stop()
