"""The `hsnet` command.

Results go to stdout, logs and progress to stderr. Exit codes: 0 done, 1 an error that the user can mend (one message,
no traceback), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os

import click

from commands.analyze import analyze
from commands.backbones import backbones
from commands.bank import bank
from commands.checkpoint import checkpoint
from commands.demo import demo
from commands.doctor import doctor
from commands.episodes import episodes
from commands.evaluate import evaluate
from commands.extract import extract
from commands.groups import Commands
from commands.heads import heads
from commands.plan import plan
from commands.predict import predict
from commands.prepare import prepare
from commands.report import report
from commands.review import review
from commands.serve import serve
from commands.store import store
from commands.supports import supports
from commands.sweep import sweep
from commands.terminal import set_up_logging
from commands.train import train
from commands.weights import weights

SECTIONS = {
    "Data": (prepare,),
    "Store": (plan, extract, store),
    "Model": (backbones, heads, weights, train, sweep, checkpoint),
    "Use": (episodes, evaluate, analyze, report, supports),
    "Your photos": (bank, predict, review, serve),
    "Machine": (doctor, demo),
}
"""The commands in the order of the pipeline, under the headings of --help."""


def _version() -> str:
    from importlib import metadata

    from pipeline.common.machine import DISTRIBUTION

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "not installed (run from its source folder)"


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"hsnet {_version()}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Version.")
def main() -> None:
    """Few-shot segmentation with HSNet: extract features once, then train, evaluate and predict from them.

    Start with `hsnet demo`; every command explains itself with --help.

    \b
    Example:
      hsnet extract pascal --data-root VOC2012 --backbone resnet50 --store voc.zarr --workers 4
      hsnet train --store voc.zarr --fold 0 --run-dir runs/voc-0
      hsnet evaluate --checkpoint runs/voc-0 --store voc.zarr --fold 0 --shots 1,5
    """
    # Before torch is imported. OpenMP's threads spin while they wait for each other; where other programs hold the
    # cores, that made twelve training steps take 57 s instead of 7 (measured on two cores under load).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    set_up_logging()


main.add_sections(SECTIONS)


if __name__ == "__main__":
    main(prog_name="hsnet")
