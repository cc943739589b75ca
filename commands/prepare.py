"""`hsnet prepare`: masks of data sets that do not come with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from commands.groups import OrderedGroup, on_interrupt
from commands.options import ANY_PATH, json_option, options, quiet_option
from commands.steps import emit
from commands.terminal import Progress, set_up_logging
from pipeline.common.text import printable, time_text


@click.group(cls=OrderedGroup)
def prepare() -> None:
    """Make the masks of data sets that do not come with them.

    \b
    Example:
      hsnet prepare voc --voc VOCdevkit/VOC2012 --sbd benchmark_RELEASE
    """


counts_option = click.option(
    "--counts",
    type=click.Choice(("warn", "fail")),
    default="warn",
    show_default=True,
    help="What other numbers of images than the published data set's do.",
)


@prepare.command("voc", short_help="SegmentationClassAug from VOC2012 and SBD.")
@click.option("--voc", type=ANY_PATH, metavar="DIR", required=True, help="VOC2012, or the folder that holds it.")
@click.option(
    "--sbd", type=ANY_PATH, metavar="DIR", required=True, help="SBD: benchmark_RELEASE, or its dataset folder."
)
@click.option("--out", type=ANY_PATH, metavar="DIR", help="Tree to write into. [default: VOC2012 itself]")
@options(counts_option, json_option, quiet_option)
def prepare_voc(voc: Path, sbd: Path, out: Path | None, counts: str, as_json: bool, quiet: bool) -> Any:
    """Make SegmentationClassAug from VOC2012 and SBD's .mat files: 10,582 + 1,449 masks.

    Running it again writes only what is missing.

    \b
    Example:
      hsnet prepare voc --voc VOCdevkit/VOC2012 --sbd benchmark_RELEASE
    """
    from pipeline.prepare import prepare_voc as stage

    return _prepare(partial(stage, voc, sbd, out, counts=counts), as_json, quiet)


@prepare.command("coco", short_help="Class-number masks from COCO's instances JSON.")
@click.argument("annotations", type=ANY_PATH, metavar="INSTANCES.json")
@click.option("--photos", type=ANY_PATH, metavar="DIR", required=True, help="Folder of its photos.")
@click.option("--out", type=ANY_PATH, metavar="DIR", required=True, help="Folder for the masks.")
@options(counts_option, json_option, quiet_option)
def prepare_coco(annotations: Path, photos: Path, out: Path, counts: str, as_json: bool, quiet: bool) -> Any:
    """Draw class-number masks from COCO's instances JSON; once for train2014 and once for val2014.

    Running it again writes only what is missing.

    \b
    Example:
      hsnet prepare coco instances_train2014.json --photos train2014 --out annotations/train2014
    """
    from pipeline.prepare import prepare_coco as stage

    return _prepare(partial(stage, annotations, photos, out, counts=counts), as_json, quiet)


def _prepare(stage: Callable[..., Any], as_json: bool, quiet: bool) -> Any:
    set_up_logging(quiet)
    on_interrupt("Masks that are there are whole: run the same command again to go on.")
    with Progress("prepare", "masks", quiet) as progress:
        summary = stage(on_event=progress.update)
    lines = [
        f"{printable(summary.masks)}: {summary.written} masks written, {summary.kept} were there, "
        f"{time_text(summary.seconds)}"
    ]
    lines += [f"{name}: {count} (published: {wanted})" for name, (count, wanted) in summary.counts.items()]
    lines += [f"Note: {note}" for note in summary.notes]
    return emit(summary, "\n".join(lines), as_json)
