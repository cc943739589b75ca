"""`hsnet review`: what prediction wrote, looked at and corrected."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import ANY_PATH, device_option, options, quiet_option, weights_option
from commands.serve import run, server_options
from commands.steps import pick_device
from commands.terminal import set_up_logging
from pipeline.common.text import printable


@click.command(short_help="Look at predicted masks, correct them, learn from it.")
@click.argument("out", type=ANY_PATH)
@click.option(
    "--bank",
    type=ANY_PATH,
    metavar="BANK",
    help="Where corrections go, and what predicts again; that of `hsnet predict` if nothing is said.",
)
@options(server_options, weights_option, device_option, quiet_option)
def review(
    out: Path,
    bank: Path | None,
    host: str,
    port: int,
    token: str | None,
    names: tuple[str, ...],
    max_mb: int,
    weights: str | None,
    device: str,
    quiet: bool,
) -> None:
    """Review OUT, a folder that `hsnet predict` wrote, on a local page: accept, reject or correct masks, the least sure
    first.

    Corrections go into the bank; photos that nobody has decided on are then predicted again, as `hsnet predict` was
    told to (OUT/predict.json). Decisions are kept in OUT/review.json. Ctrl-C ends it.

    \b
    Example:
      hsnet review masks/
    """
    set_up_logging(quiet)
    from pipeline.serve.server import require_server

    require_server()
    from pipeline.heads.checkpoint import load_checkpoint
    from pipeline.predict.asked import Asked
    from pipeline.predict.prepare import Choices
    from pipeline.predict.writing import Outputs
    from pipeline.review.app import create_app
    from pipeline.review.folder import Reviewed
    from pipeline.review.loop import Loop
    from pipeline.serve.engine import Engine
    from pipeline.serve.guard import Access

    access = Access(host, port, token, names, max_mb << 20)
    reviewed = Reviewed(out)
    asked = Asked.read(out) or Asked.of(Choices(overlapping=reviewed.overlapping))
    if bank is None and asked.bank is not None:
        bank = Path(asked.bank)
    engine = None
    if bank is not None:
        engine = Engine(
            bank,
            asked.choices(weights, pick_device(device, None)),
            Outputs(soft=reviewed.photos[0].soft),
            checkpoint=None if asked.checkpoint is None else load_checkpoint(Path(asked.checkpoint)),
            keep=None if asked.keep_features is None else Path(asked.keep_features),
        )
    loop = Loop(reviewed, engine)
    try:
        run(lambda: create_app(loop, access), access, f"{printable(out)}: {len(reviewed.photos)} photos", loop.start)
    finally:
        loop.stop()
