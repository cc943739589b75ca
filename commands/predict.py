"""`hsnet predict`: masks of new photos."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.groups import Failure, on_interrupt
from commands.options import (
    ANY_PATH,
    Backbone,
    Whole,
    address_option,
    common_options,
    device_option,
    options,
    weights_option,
    workers_option,
)
from commands.steps import allow_mixed, emit, pick_device, require_ray, stop_on_interrupt
from commands.terminal import Progress, set_up_logging
from pipeline.common.text import printable, time_text
from pipeline.episodes.protocols import FUSIONS

if TYPE_CHECKING:
    from pipeline.annotations.write import Writer
    from pipeline.bank.check import ClassCheck
    from pipeline.predict.stage import PredictSummary
    from pipeline.predict.writing import Work

LISTED = 1000
"""With more photos there is no line for each on the screen, only in the file of results."""

STORE_BYTES = 512 << 20
"""Photos at network size and masks wait here for their next stage."""


PHOTO_HEADS = ("auto", "contrast", "tune", "hsnet")
"""Heads for photos; compared with `pipeline.bank.heads` by a test."""

OWN_FORMATS = ("masks", "overlay", "soft")
"""Pictures of every photo; masks always are written."""

TOOLS = ("coco", "yolo", "labelme", "labelstudio", "cvat", "geojson", "csv")
"""Formats of other tools; compared with `pipeline.annotations.write` by a test."""

FORMATS = (*OWN_FORMATS, *TOOLS)


class Formats(click.ParamType):
    """Names of outputs, separated by commas."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(name.strip() for name in str(value).split(",")))
        odd = [name for name in names if name not in FORMATS]
        if odd:
            self.fail(f"'{odd[0]}' is none of {', '.join(FORMATS)}", param, ctx)
        return names


@click.command(short_help="Masks of new photos from a few examples.")
@click.option(
    "--support",
    "supports",
    multiple=True,
    metavar="PHOTO:MASK",
    help="A photo and the mask of the object in it. May be repeated: more shots.",
)
@click.option("--bank", "bank_path", type=ANY_PATH, metavar="BANK", help="Annotated photos of `hsnet bank` instead.")
@click.option(
    "--class", "classes", multiple=True, metavar="NAME", help="A class of the bank, instead of all. May be repeated."
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
    "--head",
    type=click.Choice(PHOTO_HEADS),
    default="auto",
    show_default=True,
    help="What answers. auto: the one that does best on annotated photos left out in turn.",
)
@click.option("--checkpoint", "checkpoint_path", type=ANY_PATH, metavar="C", help="A trained head: checkpoint or run.")
@click.option("--backbone", type=Backbone(), help="Network, instead of the bank's, the checkpoint's or the packaged.")
@click.option("--image-size", type=Whole(32), help="Side of the square that a photo or tile is squashed to, pixels.")
@click.option(
    "--tile", type=Whole(32), metavar="PX", help="Read photos in overlapping tiles of this side: for small objects."
)
@click.option(
    "--fusion",
    type=click.Choice(FUSIONS),
    help="How a checkpoint's answers to several supports make one mask; vote, as published, if nothing is said.",
)
@click.option(
    "--tau",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    show_default=True,
    help="From where on a pixel is object; higher marks less. With vote, a share of the most votes that any pixel of "
    "this photo has, so one support of five suffices where no pixel has more; else a probability.",
)
@click.option("--no-refine", is_flag=True, help="Masks as coarse as the head's grid, not along the photo's edges.")
@click.option(
    "--least-score",
    type=click.FloatRange(0, 1),
    default=0.2,
    show_default=True,
    help="A class that is surer to be absent than this is not marked; known with annotated photos without it.",
)
@click.option("--overlapping", is_flag=True, help="A pixel may be of several classes: a mask for each.")
@click.option(
    "--format",
    "formats",
    type=Formats(),
    default="masks,overlay",
    show_default=True,
    help=f"What to write, commas between them: {', '.join(FORMATS)}.",
)
@click.option("--keep-features", type=ANY_PATH, metavar="DIR", help="Keep the photos' features there.")
@click.option("--watch", is_flag=True, help="Go on with photos as they come, until Ctrl-C.")
@click.option("--no-overlay", is_flag=True, help="The same as --format without overlay.")
@options(weights_option, workers_option, address_option, device_option)
@common_options
def predict(
    supports: tuple[str, ...],
    bank_path: Path | None,
    queries: tuple[Path, ...],
    recursive: bool,
    out: Path,
    checkpoint_path: Path | None,
    formats: tuple[str, ...],
    keep_features: Path | None,
    watch: bool,
    no_overlay: bool,
    no_refine: bool,
    workers: int,
    address: str | None,
    device: str,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> Any:
    """Find objects in new photos, learned from a few annotated ones: a mask (PNG) and an overlay of each. No training.

    The annotated photos are --support pairs (one kind of object) or a bank (`hsnet bank`: several classes, photos
    without them). In a support's mask everything that is not 0 is object; with soft edges, 128 and above. A photo that
    cannot be read is reported, the others are done, and the exit code is 1. Masks that are there, made with the same
    heads, annotated photos and settings, are kept: the same command goes on after an interruption.

    \b
    Example:
      hsnet predict --support cup1.jpg:cup1.png --support cup2.jpg:cup2.png --query photos/ --out masks/
    """
    set_up_logging(quiet)
    on_interrupt("The masks written so far are whole: give the same command again to go on.")
    from pipeline.bank.folder import Bank
    from pipeline.datasets.own_support import parse_support
    from pipeline.datasets.queries import list_queries
    from pipeline.heads.checkpoint import load_checkpoint
    from pipeline.predict import stage
    from pipeline.predict.asked import Asked
    from pipeline.predict.prepare import Choices, prepare
    from pipeline.predict.watching import new_tasks
    from pipeline.predict.writing import Outputs

    if choices["classes"] and bank_path is None:
        raise click.UsageError("--class is a class of a bank: give --bank, too.")
    pairs = [parse_support(text) for text in supports]
    on_ray = workers > 0 or address is not None
    if on_ray and (watch or keep_features is not None):
        raise click.UsageError("--watch and --keep-features work in this process: leave --workers and --address out.")
    # A worker on another machine has another working directory.
    places = [query.absolute() for query in queries] if on_ray else list(queries)
    photos = list_queries(places, recursive, out, watched=watch)
    chosen = pick_device(device, address)
    outputs = Outputs("overlay" in formats and not no_overlay, "soft" in formats)
    started = time.monotonic()
    asked = Choices(**choices, refine=not no_refine, device="cpu" if on_ray else chosen)
    prepared = prepare(
        asked,
        bank=None if bank_path is None else Bank(bank_path),
        supports=pairs,
        checkpoint=None if checkpoint_path is None else load_checkpoint(checkpoint_path),
        outputs=outputs,
        keep=keep_features,
    )
    fitting = time.monotonic() - started
    work = dataclasses.replace(prepared.work, device=chosen)
    out = out.absolute() if on_ray else out
    with (
        _pipe(workers, address, chosen) as pipe,
        Progress("predict", "photos", quiet) as progress,
        _tools(formats, out, work, places) as writer,
        stop_on_interrupt() if watch else contextlib.nullcontext() as stopped,
    ):
        coming = None
        if stopped is not None:  # a photo is not held back until another one comes
            pipe = partial(pipe, ahead=0)
            coming = new_tasks(
                lambda: list_queries(places, recursive, out, watched=True), out, outputs.overlay, stopped
            )
        summary = stage.predict(
            work,
            photos,
            out,
            asked=Asked.of(asked, bank_path, checkpoint_path, keep_features),
            supports=prepared.supports,
            pipe=pipe,
            coming=coming,
            on_event=progress.update,
            on_result=None if writer is None else lambda result: writer.add(work.found(result)),
        )
    checks = [one.expected for one in work.answering.classes if one.expected is not None]
    few = summary.photos <= LISTED
    for name, notes in prepared.notes.items():  # before those of the run
        summary = dataclasses.replace(summary, notes={**summary.notes, name: (*notes, *summary.notes.get(name, ()))})
    report = dataclasses.asdict(summary) | {"expected": checks, "fitting_s": fitting}
    report |= {"written": summary.written, "failed": summary.failed} if few else {}
    result = emit(report, "\n".join(_lines(summary, work, fitting, out, few)), as_json)
    if summary.unusable:
        names = ", ".join(printable(path) for path, _ in summary.failed[:LISTED])
        raise Failure(f"{summary.unusable} of {summary.photos} photos could not be used: {names}")
    return result


@contextlib.contextmanager
def _tools(formats: tuple[str, ...], out: Path, work: Work, places: Sequence[Path]) -> Iterator[Writer | None]:
    """What writes formats of other tools; None if none was asked for."""
    from pipeline.annotations.write import Writer

    wanted = [name for name in formats if name in TOOLS]
    if not wanted:
        yield None
        return
    folders = [place if place.is_dir() else place.parent for place in places]
    root = Path(os.path.commonpath([folder.absolute() for folder in folders]))
    with Writer(wanted, out, work.answering.names, root, overlapping=work.answering.overlapping) as writer:
        yield writer


def _lines(summary: PredictSummary, work: Work, fitting: float, out: Path, few: bool) -> Iterator[str]:
    """What is told of a call: a line per photo if they are few, what is expected of the masks, and the sums."""
    several = len(work.answering.classes) > 1
    for item in summary.written if few else ():
        shares = (
            ", ".join(f"{name} {100 * said.share:.1f} %" for name, said in item.classes.items() if said.share)
            if several
            else f"{100 * item.object_share:.1f} %"
        )
        yield f"{printable(item.mask)}  {printable(shares) or 'nothing'} of {printable(item.query)}"
    for one in work.answering.classes:
        yield expected_line(one.name if several else "", one.fitted.name, one.expected)
        for note in summary.notes.get(one.name, ()):
            yield printable(f"  note: {note.text} {note.remedy}")
    there = f", {summary.kept} of them there before" if summary.kept else ""
    done = summary.photos - summary.unusable
    yield (
        f"{done} of {summary.photos} photos{there}, {summary.shots}-shot by {work.reading.text}, "
        f"{time_text(fitting)} to fit and {time_text(summary.seconds)} to predict: results in {printable(out)}"
    )
    if not few:
        yield f"A line per photo: {printable(summary.results)}"


def expected_line(name: str, head: str, check: ClassCheck | None) -> str:
    """What is to be expected of a class's masks, in a line."""
    start = f"{printable(name)}: " if name else ""
    if check is None or check.best is None:
        return (
            f"{start}head {head}; not checked: that takes two annotated photos and --head auto, or `hsnet bank check`"
        )
    best = check.best
    return (
        f"{start}head {head}; expected IoU {100 * best.pooled:.0f} [{100 * best.low:.0f}, {100 * best.high:.0f}] by "
        f"leaving out each of {len(check.photos)} annotated photos"
    )


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
