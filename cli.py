"""The `hsnet` command: parse options, call one stage, print its result. No logic of its own.

Results go to stdout, logs and progress to stderr. Everything heavy is imported inside the commands, so that help
appears at once. Exit codes: 0 done, 1 an error that the user can mend (one message, no traceback), 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hsnet.errors import ConfigError, HSNetError
from pipeline.terminal import (
    Progress,
    fact_lines,
    plain,
    printable,
    set_up_logging,
    size_text,
    table,
    time_text,
)

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.datasets import Dataset
    from pipeline.features import FeatureSource
    from pipeline.methods import Method
    from pipeline.runner import Runner
    from pipeline.train import FitSummary

DISTRIBUTION = "hsnet-pipeline"

# Spelt out, because the tables they come from import torch; tests compare them.
BACKBONES = ("vgg16", "resnet50", "resnet101", "squeezenet1_1")
DATASETS = ("pascal", "coco", "fss", "folder", "shapes")
PRECISIONS = ("int8", "float16", "float32")

SECTIONS = (
    ("Data", ("prepare",)),
    ("Store", ("plan", "extract", "store")),
    ("Model", ("train", "checkpoint")),
    ("Use", ("evaluate", "predict")),
    ("Machine", ("doctor", "demo")),
)
"""The commands in the order of the pipeline, under the headings of --help."""

F = TypeVar("F", bound=Callable[..., Any])


# ---------------------------------------------------------------------------------------------- errors and help


class Failure(click.ClickException):
    """An error that the user can mend: printed as `Error: ...` on stderr, exit code 1."""


class OrderedGroup(click.Group):
    """Lists its commands in the order they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class Commands(OrderedGroup):
    """The top group: commands under headings, and every foreseen error as one message."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, click.Command]]] = {}
        for heading, names in SECTIONS:
            for name in names:
                command = self.commands[name]
                if isinstance(command, click.Group):
                    rows.setdefault(heading, []).extend((f"{name} {sub}", c) for sub, c in command.commands.items())
                else:
                    rows.setdefault(heading, []).append((name, command))
        width = max(len(name) for row in rows.values() for name, _ in row)
        room = formatter.width - width - 6
        for heading, row in rows.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), c.get_short_help_str(room)) for name, c in row])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HSNetError as error:
            raise Failure(str(error)) from error
        except KeyboardInterrupt:
            click.echo(f"\nInterrupted. {ctx.meta.get('resume', 'Nothing was left half done.')}", err=True)
            ctx.exit(130)
        except OSError as error:
            message = _disk_trouble(error)
            if message is None:
                raise
            raise Failure(message) from error
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which must not be imported for its name
                raise
            raise Failure(
                f"The GPU ran out of memory ({str(error).splitlines()[0]}). Use a smaller --batch-size with "
                "--micro-batch, or --device cpu."
            ) from error


def _disk_trouble(error: OSError) -> str | None:
    """A message for the troubles with disks that no stage can foresee, None for other errors."""
    place = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"No space left on the disk{place}. Make room and run the same command again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"Not allowed to read or write{place} ({error.strerror}). Give another path or change its permissions."
    return None


def on_interrupt(hint: str) -> None:
    """What the running command will say about going on if it is interrupted."""
    click.get_current_context().meta["resume"] = hint


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "not installed (run from its source folder)"


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"hsnet {_version()}")
        ctx.exit()


# ---------------------------------------------------------------------------------------------- options, once each


class Device(click.ParamType):
    """auto, cpu, or a GPU that torch can name."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in ("auto", "cpu", "cuda", "mps") and not (value[:5] == "cuda:" and value[5:].isdecimal()):
            self.fail(f"'{value}' is none of auto, cpu, cuda, cuda:N, mps", param, ctx)
        return str(value)


class Whole(click.ParamType):
    """A whole number that is not too small."""

    name = "n"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:
            self.fail(f"'{value}' is not a whole number", param, ctx)
        if number < self.least:
            self.fail(f"{number} is less than {self.least}", param, ctx)
        return number


class Bytes(click.ParamType):
    """A number of bytes with its unit, such as 2MB or 60 GB; powers of 1000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?B?)", str(value).strip())
        if not found:
            self.fail(f"'{value}' is not a size such as 500KB, 2MB or 60GB", param, ctx)
        scale = " KMGT".index(found[2].upper().rstrip("B") or " ")
        number = int(float(found[1]) * 1000**scale)
        if number < 1:
            self.fail(f"'{value}' is less than a byte", param, ctx)
        return number


class Integers(click.ParamType):
    """Positive whole numbers, separated by commas."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"'{value}' is not a list of positive whole numbers such as 1,5", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


class Episodes(click.ParamType):
    """A positive whole number, or the word reference."""

    name = "episodes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value != "reference" and not (str(value).isdecimal() and int(value) > 0):
            self.fail(f"'{value}' is neither a positive whole number nor 'reference'", param, ctx)
        return value if value == "reference" else int(value)


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
ANY_PATH = click.Path(path_type=Path)

dataset_argument = click.argument("dataset", type=click.Choice(DATASETS))
data_root_option = click.option(
    "--data-root", type=ANY_PATH, metavar="DIR", help="Folder of the data set. Not needed for shapes."
)
splits_option = click.option(
    "--splits", type=ANY_PATH, metavar="DIR", help="Folder of the published code's split files. [default: by rule]"
)
data_option = click.option(
    "--data-option",
    "data_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the data set's reader, such as trn_per_class=30 for shapes. May be repeated.",
)
backbone_option = click.option(
    "--backbone", type=click.Choice(BACKBONES), required=True, help="Network whose features are used."
)
weights_option = click.option(
    "--weights",
    metavar="FILE|random",
    help="Backbone weights: .safetensors or torch state dict, or random. [default: ImageNet]",
)
image_size_option = click.option(
    "--image-size",
    type=Whole(32),
    default=400,
    show_default=True,
    help="Side of the square that photos are squashed to, pixels.",
)
store_option = click.option(
    "--store", type=ANY_PATH, metavar="S.zarr", required=True, help="Feature store made by `hsnet extract`."
)
fold_option = click.option(
    "--fold", type=Whole(0), default=0, show_default=True, help="Fold whose classes are held out."
)
precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="int8",
    show_default=True,
    help="Of stored values; float32 is exact and takes four times the space of int8.",
)
bytes_option = click.option(
    "--bytes-per-image",
    type=Bytes(),
    metavar="SIZE",
    help="Instead of --precision: a budget for the features of an image, such as 2MB.",
)
arithmetic_option = click.option(
    "--arithmetic",
    type=click.Choice(("float32", "bfloat16")),
    default="float32",
    show_default=True,
    help="Precision of the head's activations; bfloat16 is faster where the processor has it.",
)
seed_option = click.option("--seed", type=Whole(0), default=0, show_default=True, help="Same seed, same episodes.")
workers_option = click.option(
    "--workers",
    type=Whole(0),
    default=0,
    show_default=True,
    help="Ray workers; 0 works in this process without Ray.",
)
address_option = click.option(
    "--address",
    metavar="ADDRESS",
    help="Ray cluster to work on: host:port or auto. [default: a local Ray of its own]",
)
device_option = click.option(
    "--device", type=Device(), default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress, no notes; warnings and errors only.")


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Apply several option decorators, in the order in which help shall list them."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


common_options = options(json_option, quiet_option)


# ---------------------------------------------------------------------------------------------- shared steps


def emit(result: Any, text: str, as_json: bool) -> Any:
    """Print a result on stdout, as JSON for machines or as text for people; returns it as JSON values."""
    values = plain(result)
    click.echo(json.dumps(values, indent=2, allow_nan=False) if as_json else text)
    return values


def open_data(name: str, root: Path | None, splits: Path | None, given: Sequence[str], quiet: bool) -> Dataset:
    """The data set of the options, its notes printed."""
    from pipeline.datasets import open_dataset

    # Absolute, because a worker on another machine has another working directory.
    root, splits = root and root.absolute(), splits and splits.absolute()
    dataset = open_dataset(name, root, splits, **parse_data_options(given))
    for note in () if quiet else dataset.index.notes:
        click.echo(f"Note: {note}", err=True)
    return dataset


def parse_data_options(given: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts as keyword arguments; numbers become int or float."""
    parsed: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"--data-option '{text}' is not of the form KEY=VALUE")
        parsed[key] = _number(value)
    return parsed


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def pick_device(name: str, address: str | None = None) -> str:
    """'auto' becomes the best there is; a device that is not there is an error.

    A cluster's machines may have what this one lacks: with an address, only 'auto' looks at this machine.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and address is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name[5:] or 0) >= count:
            raise ConfigError(f"--device {name}: torch sees {count} GPUs here; `hsnet doctor` says why. Use cpu.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: not available on this machine. Use cpu.")
    return name


@contextlib.contextmanager
def open_runner(workers: int, address: str | None, device: str) -> Iterator[Runner]:
    """Where a stage's work is done: in this process, or on Ray; with an address alone, on all of its CPUs."""
    if workers == 0 and address is None:
        from pipeline.runner import SerialRunner

        yield SerialRunner()
        return
    _require_ray(workers, address, device)
    from cluster.runner import RayRunner
    from cluster.session import cpus, session

    with session(address or "local", num_cpus=max(workers, os.cpu_count() or 1)):
        yield RayRunner(workers or cpus(), gpus=1 if device.startswith("cuda") else 0)


def _require_ray(workers: int, address: str | None, device: str) -> None:
    """Refuse what Ray would take without a word and then not get done."""
    cores = os.cpu_count() or 1
    if address is None and workers > max(8, 4 * cores):
        raise ConfigError(f"--workers {workers} is far more than this machine's {cores} cores can carry. Use {cores}.")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device} cannot be chosen on Ray, which hands out the GPUs. Use cpu or cuda.")


def store_source(path: Path) -> Callable[[], FeatureSource]:
    """Opens a finished store; to be called once in every process that reads it."""
    from pipeline.features import StoreSource
    from pipeline.store import FeatureStore

    place = path.absolute()  # a worker may have another working directory
    return lambda: StoreSource(FeatureStore.open(place))


def online_source(
    data: Dataset, backbone: str, weights: str | None, image_size: int, device: str
) -> Callable[[], FeatureSource]:
    """Runs the backbone whenever features are asked for."""
    from hsnet.backbone import FrozenBackbone
    from pipeline.features import OnlineSource
    from pipeline.recipe import Recipe
    from pipeline.weights import load_weights

    loaded = load_weights(backbone, weights)
    recipe = Recipe.of(backbone, loaded.sha256, image_size, "float32")
    return lambda: OnlineSource(data, FrozenBackbone(backbone, loaded.state_dict), recipe, device)


def fit_somewhere(
    config: RunConfig,
    source: FeatureSource,
    make_source: Callable[[], FeatureSource],
    run_dir: Path,
    workers: int,
    address: str | None,
    device: str,
    micro_batch: int | None,
    resident: str,
    stop: Callable[[], bool],
    on_event: Callable[[Any], None],
) -> FitSummary:
    """Train in this process, or on Ray's workers."""
    if workers == 0 and address is None:
        from pipeline.train import fit

        return fit(
            config,
            source,
            run_dir,
            device=device,
            micro_batch=micro_batch,
            resident=resident,
            stop=stop,
            on_event=on_event,
        )
    _require_ray(workers, address, device)
    from cluster.train import fit_on_ray

    return fit_on_ray(
        config,
        make_source,
        run_dir,
        workers=workers,
        address=address,
        device=device,
        micro_batch=micro_batch,
        resident=resident,
        stop=stop,
        on_event=on_event,
    )


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """A function that tells whether Ctrl-C (or a scheduler's SIGTERM) has come. The second Ctrl-C stops at once."""
    asked = False

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        click.echo("\nStopping after this step; the run is being saved. Ctrl-C again stops at once.", err=True)

    on_interrupt("The run goes on from its last save: give the same command again.")
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------- the commands


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


@main.group(cls=OrderedGroup)
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

    set_up_logging(quiet)
    on_interrupt("Masks that are there are whole: run the same command again to go on.")
    with Progress("prepare", "masks", quiet) as progress:
        summary = stage(voc, sbd, out, counts=counts, on_event=lambda event: progress.update(event.done, event.total))
    return emit(summary, _prepared_text(summary), as_json)


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

    set_up_logging(quiet)
    on_interrupt("Masks that are there are whole: run the same command again to go on.")
    with Progress("prepare", "masks", quiet) as progress:
        summary = stage(
            annotations, photos, out, counts=counts, on_event=lambda event: progress.update(event.done, event.total)
        )
    return emit(summary, _prepared_text(summary), as_json)


def _prepared_text(summary: Any) -> str:
    lines = [
        f"{printable(summary.masks)}: {summary.written} masks written, {summary.kept} were there, "
        f"{time_text(summary.seconds)}"
    ]
    lines += [f"{name}: {found} (published: {wanted})" for name, (found, wanted) in summary.counts.items()]
    return "\n".join([*lines, *(f"Note: {note}" for note in summary.notes)])


@main.command(short_help="Run the backbone once over all photos; keep features.")
@dataset_argument
@options(data_root_option, splits_option, data_option)
@options(backbone_option, weights_option, image_size_option)
@click.option("--store", type=ANY_PATH, metavar="S.zarr", required=True, help="Store to make, or to finish.")
@options(precision_option, bytes_option)
@click.option("--budget", type=Bytes(), metavar="SIZE", help="The same for all images together, such as 60GB.")
@options(workers_option, address_option, device_option)
@click.option(
    "--on-error",
    type=click.Choice(("fail", "skip")),
    default="fail",
    show_default=True,
    help="What an unreadable image does: stop, or be left out of all episodes.",
)
@click.option(
    "--shard-images",
    type=Whole(),
    default=16,
    show_default=True,
    help="Images per shard of a new store.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done and how large it gets; write nothing.")
@common_options
def extract(**options: Any) -> Any:
    """Run the frozen backbone once over all photos of DATASET and keep its features.

    Running it again finishes what is missing and skips the rest. One store serves every fold, shot and seed.

    \b
    Example:
      hsnet extract pascal --data-root VOC2012 --backbone resnet50 --store voc.zarr --workers 4
    """
    return _extract(**options)


def _extract(
    dataset: str,
    data_root: Path | None,
    splits: Path | None,
    data_options: tuple[str, ...],
    backbone: str,
    weights: str | None,
    image_size: int,
    store: Path,
    precision: str,
    bytes_per_image: int | None,
    budget: int | None,
    workers: int,
    address: str | None,
    device: str,
    on_error: str,
    shard_images: int,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    damaged: Collection[int] = (),
) -> Any:
    set_up_logging(quiet)
    on_interrupt("Finished shards are kept: run the same command again to go on.")
    given = click.get_current_context().get_parameter_source("precision")
    chosen = [given == click.core.ParameterSource.COMMANDLINE, bytes_per_image is not None, budget is not None]
    if sum(chosen) > 1:
        raise click.UsageError("Give one of --precision, --bytes-per-image and --budget.")
    from pipeline.extract import extract as stage
    from pipeline.fitting import Fitting
    from pipeline.plan import Planned
    from pipeline.weights import load_weights

    data = open_data(dataset, data_root, splits, data_options, quiet)
    if budget is not None:
        bytes_per_image = budget // max(1, len(data.index.images))
    if dry_run:
        plan = _plan_extraction(data, backbone, weights, image_size, precision, bytes_per_image, store, shard_images)
        return emit(plan, f"{_plan_text(plan)} Nothing was written.", as_json)
    loaded = load_weights(backbone, weights)
    device = pick_device(device, address)
    with open_runner(workers, address, device) as runner, Progress("extract", "images", quiet) as progress:
        done = total = 0

        def show(event: Any) -> None:
            nonlocal done, total
            if isinstance(event, Fitting):
                progress.say(f"Fitting the codec to {event.images} training photos.")
                return
            if isinstance(event, Planned):
                done, total = event.images_done, event.images
                progress.say(_plan_text(event))
            else:
                done += event.images
            progress.update(done, total)

        summary = stage(
            data,
            loaded,
            backbone,
            image_size,
            precision,
            store,
            runner,
            on_error,
            shard_images,
            show,
            device,
            bytes_per_image,
            damaged,
        )
    lines = [
        f"{printable(summary.path)}: {summary.images} images, {size_text(summary.bytes)} "
        f"({size_text(summary.bytes / summary.images)} per image)",
        f"{summary.written_images} images in {time_text(summary.seconds)} ({summary.images_per_s:.1f} images/s), "
        f"{summary.reused_shards} of {summary.reused_shards + summary.written_shards} shards were there",
    ]
    if summary.skipped:
        lines.append(f"{len(summary.skipped)} unreadable images left out: {', '.join(summary.skipped[:5])}")
    return emit(summary, "\n".join(lines), as_json)


def _plan_extraction(
    data: Dataset,
    backbone: str,
    weights: str | None,
    image_size: int,
    precision: str,
    bytes_per_image: int | None,
    path: Path,
    shard_images: int,
) -> Any:
    """The plan of a store; weights, which may have to be downloaded, are looked at only to compare a store with."""
    from pipeline.extract import wanted_recipe
    from pipeline.plan import plan_new, plan_store
    from pipeline.recipe import Recipe
    from pipeline.store import FeatureStore
    from pipeline.weights import load_weights

    if path.exists():
        exact = Recipe.of(backbone, load_weights(backbone, weights).sha256, image_size, precision)
        recipe = wanted_recipe(exact, bytes_per_image, path)
        return plan_store(FeatureStore.open(path, recipe, require_complete=False, index_digest=data.index.digest))
    unknown = Recipe.of(backbone, "sha256:" + "0" * 64, image_size, precision)
    return plan_new(data.index, wanted_recipe(unknown, bytes_per_image, path), path, shard_images)


def _plan_text(plan: Any) -> str:
    there = f" ({plan.images_done} of them are there)" if plan.images_done else ""
    return (
        f"{plan.images} images in {plan.shards} shards{there}; "
        f"up to {size_text(plan.bytes_needed)} to write, {size_text(plan.bytes_free)} free."
    )


@main.group(cls=OrderedGroup)
def store() -> None:
    """Look at feature stores.

    \b
    Example:
      hsnet store info voc.zarr
    """


@store.command("info", short_help="What a store holds and what is missing.")
@click.argument("path", type=ANY_PATH, metavar="S.zarr")
@json_option
def store_info(path: Path, as_json: bool) -> None:
    """Show what a store holds and what is missing.

    \b
    Example:
      hsnet store info voc.zarr
    """
    from pipeline.store import FeatureStore

    info = FeatureStore.open(path, require_complete=False).info()
    recipe, each = info["recipe"], info["bytes_per_image"]
    done = "complete" if info["complete"] else f"{info['shards_missing']} missing: run the same extract again"
    facts = {
        "data set": f"{info['dataset']}, {info['images']} images, {info['classes']} classes",
        "folds": ", ".join(map(str, info["folds"])),
        "backbone": f"{recipe['backbone']}, weights {recipe['weights'][:15]}",
        "image size": f"{recipe['image_size']} px",
        "precision": recipe["precision"] + _coding_text(recipe.get("coding")),
        "levels": "  ".join("x".join(map(str, level)) for level in info["levels"]),
        "shards": f"{info['shards']} of {info['shard_images']} images, {done}",
        "bytes": size_text(info["bytes"]) + (f", {size_text(each)} per image" if each else ""),
        "skipped": f"{len(info['skipped'])} unreadable images",
    }
    emit(info, fact_lines(facts), as_json)


@store.command("verify", short_help="Read everything and name what is damaged.")
@click.argument("path", type=ANY_PATH, metavar="S.zarr")
@common_options
@click.pass_context
def store_verify(ctx: click.Context, path: Path, as_json: bool, quiet: bool) -> None:
    """Read every chunk of a store, compare all checksums and name what is damaged. Exit code 1 if anything is.

    \b
    Example:
      hsnet store verify voc.zarr
    """
    set_up_logging(quiet)
    found = _verify(path, quiet)
    lines = [
        f"{printable(found.path)}: {found.images} images, {size_text(found.bytes)} read; "
        + (f"{len(found.damaged_shards)} of {found.shards} shards are damaged" if found.damage else "no damage")
        + (f"; {len(found.missing)} shards are missing" if found.missing else "")
    ]
    for one in found.damage[:20]:
        what = f"array '{one.array}'" if one.array else "marker"
        image = f", image '{printable(one.image)}'" if one.image else ""
        lines.append(f"shard {one.shard}, {what}{image}: {printable(one.reason)} ({printable(one.file)})")
    if len(found.damage) > 20:
        lines.append(f"... and {len(found.damage) - 20} more; --json lists all.")
    if found.damage:
        lines.append("Mend it with `hsnet store repair` and the options of the `hsnet extract` that made it.")
    emit(found, "\n".join(lines), as_json)
    if found.damage:
        ctx.exit(1)


@store.command(
    "repair",
    short_help="Extract damaged and missing shards anew.",
    params=[option for option in extract.params if option.name != "dry_run"],
)
def store_repair(**options: Any) -> Any:
    """Verify a store, delete what is damaged and extract it anew. Takes the options of the `hsnet extract` that
    made the store; whole shards stay as they are.

    \b
    Example:
      hsnet store repair pascal --data-root VOC2012 --backbone resnet50 --store voc.zarr
    """
    set_up_logging(options["quiet"])
    found = _verify(options["store"], options["quiet"])
    return _extract(**options, dry_run=False, damaged=found.damaged_shards)


def _verify(path: Path, quiet: bool) -> Any:
    from pipeline.store import FeatureStore
    from pipeline.verify import verify

    opened = FeatureStore.open(path, require_complete=False)
    with Progress("verify", "shards", quiet) as progress:
        return verify(opened, progress.update)


@store.command("compare", short_help="What a store's codec costs: correlations and mIoU.")
@click.option("--store", "path", type=ANY_PATH, metavar="A.zarr", required=True, help="Store whose codec is judged.")
@click.option("--against", type=ANY_PATH, metavar="B.zarr", help="Store of the same photos in another precision.")
@click.option("--dataset", type=click.Choice(DATASETS), help="Instead of --against: exact features, made on the fly.")
@options(data_root_option, splits_option, data_option, weights_option)
@click.option("--pairs", type=Whole(), default=32, show_default=True, help="Pairs of photos that are correlated.")
@click.option("--checkpoint", "checkpoint_path", type=ANY_PATH, metavar="C", help="Also compare this head's mIoU.")
@click.option("--fold", type=Whole(0), help="Of the episodes. [default: the one the checkpoint was trained for, or 0]")
@click.option("--shots", type=Whole(), default=1, show_default=True, help="Supports per query.")
@click.option("--episodes", type=Whole(), default=1000, show_default=True, help="The same for both.")
@options(seed_option, workers_option, address_option, device_option)
@common_options
def store_compare(
    path: Path,
    against: Path | None,
    dataset: str | None,
    data_root: Path | None,
    splits: Path | None,
    data_options: tuple[str, ...],
    weights: str | None,
    pairs: int,
    checkpoint_path: Path | None,
    fold: int | None,
    shots: int,
    episodes: int,
    seed: int,
    workers: int,
    address: str | None,
    device: str,
    as_json: bool,
    quiet: bool,
) -> Any:
    """Say what a store's codec costs: errors of correlations, bytes, rates, and with a head its mIoU on both.

    Intervals of mIoU are 95 %, from episodes drawn again within their class. No store is changed.

    \b
    Example:
      hsnet store compare --store voc-2mb.zarr --against voc.zarr --checkpoint runs/voc-0
    """
    set_up_logging(quiet)
    if (against is None) == (dataset is None):
        raise click.UsageError("Give --against B.zarr, or --dataset for exact features made on the fly.")
    from pipeline.compare import compare, compare_scores

    device = pick_device(device, address)
    make_source = store_source(path)
    source = make_source()
    if against is not None:
        make_against = store_source(against)
    else:
        data = open_data(str(dataset), data_root, splits, data_options, quiet)
        make_against = online_source(data, source.recipe.backbone, weights, source.recipe.image_size, device)
    score = None
    if checkpoint_path is not None:
        with open_runner(workers, address, device) as runner, Progress("compare", "episodes", quiet) as progress:
            score = compare_scores(
                checkpoint_path,
                make_source,
                make_against,
                fold=fold,
                shots=shots,
                episodes=episodes,
                seed=seed,
                runner=runner,
                device=device,
                on_event=progress.update,
            )
    result = compare(source, make_against(), pairs=pairs, seed=seed, score=score)
    return emit(result, _comparison_text(result), as_json)


def _comparison_text(result: Any) -> str:
    rows = [
        [f"level {e.level}, layer {e.layer}", *(f"{x:.4f}" for x in (e.mean, e.p99, e.largest, e.spread))]
        for e in result.layers
    ]
    sizes = [size_text(n) if n else "not stored" for n in (result.bytes_per_image, result.bytes_per_image_against)]
    facts = {
        "features": f"{sizes[0]} per image, against {sizes[1]}",
        "encoding": f"{result.encode_per_s:.1f} images/s" if result.encode_per_s else "nothing exact to encode",
        "decoding": f"{result.decode_per_s:.1f} images/s",
    }
    if result.score:
        score = result.score
        facts |= {
            "mIoU": f"{score.miou}, against {score.miou_against}",
            "difference": f"{score.difference} points on the same {score.episodes} {score.shots}-shot episodes",
        }
    head = ["error of correlations", "mean", "p99", "largest", "their spread"]
    return f"{table(rows, head)}\n\n{fact_lines(facts)}"


def _coding_text(coding: Mapping[str, Any] | None) -> str:
    if coding is None:
        return ""
    return f", {size_text(coding['bytes_per_image'])} per image asked for, fitted on {coding['images']} training photos"


@main.command(short_help="Bytes and seconds a data set will take; writes nothing.")
@dataset_argument
@options(data_root_option, splits_option, data_option)
@options(backbone_option, weights_option, image_size_option, precision_option, bytes_option)
@click.option(
    "--store", type=ANY_PATH, metavar="S.zarr", default=Path("store.zarr"), help="Where it would lie. [default: here]"
)
@click.option("--photos", type=Whole(), default=4, show_default=True, help="How many to measure with.")
@options(workers_option, device_option, json_option, quiet_option)
def plan(
    dataset: str,
    data_root: Path | None,
    splits: Path | None,
    data_options: tuple[str, ...],
    backbone: str,
    weights: str | None,
    image_size: int,
    precision: str,
    bytes_per_image: int | None,
    store: Path,
    photos: int,
    workers: int,
    device: str,
    as_json: bool,
    quiet: bool,
) -> Any:
    """Say what DATASET will take: bytes of its store, seconds of extraction, training and evaluation, and what fits.

    A few of its own photos are measured on this machine; nothing stays on the disk.

    \b
    Example:
      hsnet plan pascal --data-root VOC2012 --backbone resnet50 --workers 4
    """
    set_up_logging(quiet)
    from pipeline.forecast import BATCH, forecast
    from pipeline.weights import load_weights

    data = open_data(dataset, data_root, splits, data_options, quiet)
    folder = next(place for place in store.absolute().parents if place.is_dir())
    found = forecast(
        data,
        load_weights(backbone, weights),
        image_size,
        precision,
        bytes_per_image,
        folder=folder,
        workers=workers,
        device=pick_device(device, None),
        sample=photos,
    )
    each = ", ".join(f"{name} {1000 * value:.0f}" for name, value in found.seconds_per_image.items())
    room = {"disk": found.disk_free, "memory": found.memory_free, "device": found.device_free}
    facts = {
        "store": f"{found.images} images of at most {size_text(found.bytes_per_image)}: {size_text(found.bytes)}",
        **{
            f"fits in {place}": f"{'yes' if fits else 'no'}, {size_text(room[place] or 0)} may be filled"
            for place, fits in found.fits.items()
        },
        "per photo": f"{each} ms, mean of {found.measured_images}",
        "extract": f"{time_text(found.extract_seconds)} with {max(1, workers)} worker{'s' if workers > 1 else ''}",
        "train": f"{time_text(found.train_seconds_per_step)} a step of {BATCH} episodes",
        "evaluate": f"{time_text(1000 * found.evaluate_seconds_per_episode)} for 1,000 1-shot episodes on one worker",
    }
    return emit({**dataclasses.asdict(found), "fits": found.fits}, fact_lines(facts), as_json)


@main.command(short_help="Train a head on a store's features, or go on with it.")
@click.option("--store", type=ANY_PATH, metavar="S.zarr", help="Feature store made by `hsnet extract`.")
@fold_option
@click.option("--run-dir", type=ANY_PATH, metavar="DIR", required=True, help="Where the run is kept; goes on if there.")
@click.option("--steps", type=Whole(), help="Optimiser steps. [default: 10000]")
@click.option("--epochs", type=Whole(), help="Instead of --steps: passes over the training list.")
@click.option("--batch-size", type=Whole(), default=20, show_default=True, help="Episodes per step, in all.")
@click.option("--micro-batch", type=Whole(), help="Episodes per forward pass; less takes less memory.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Adam's learning rate.")
@seed_option
@click.option("--validate-every", type=Whole(), default=500, show_default=True, help="Steps in between.")
@click.option("--validate-episodes", type=Whole(), default=200, show_default=True, help="Episodes of each.")
@click.option(
    "--select-on",
    type=click.Choice(("val", "test", "none")),
    default="val",
    show_default=True,
    help="Episodes the best checkpoint is chosen on; test is the published habit.",
)
@click.option("--drop-novel-images", is_flag=True, help="Leave out training images that show a held-out class.")
@click.option(
    "--boundary",
    type=click.Choice(("background", "ignore")),
    default="background",
    show_default=True,
    help="What boundary pixels are in the loss: background as in the published code, ignore as in the paper.",
)
@click.option(
    "--resident",
    type=click.Choice(("off", "auto", "host", "device")),
    default="auto",
    show_default=True,
    help="Keep the fold's images in memory: of the device that trains, or read once into the host's cache, which all "
    "workers share. auto: on a GPU with room for them.",
)
@options(arithmetic_option, workers_option, address_option, device_option)
@click.option(
    "--features",
    type=click.Choice(("store", "online")),
    default="store",
    show_default=True,
    help="online runs the backbone on the fly: no store, but --dataset and --backbone.",
)
@click.option("--dataset", type=click.Choice(DATASETS), help="With --features online: the data set.")
@options(data_root_option, splits_option, data_option)
@click.option("--backbone", type=click.Choice(BACKBONES), help="With --features online: the network.")
@options(weights_option, image_size_option)
@common_options
def train(
    store: Path | None,
    fold: int,
    run_dir: Path,
    steps: int | None,
    epochs: int | None,
    batch_size: int,
    micro_batch: int | None,
    lr: float,
    seed: int,
    validate_every: int,
    validate_episodes: int,
    select_on: str,
    drop_novel_images: bool,
    boundary: str,
    resident: str,
    arithmetic: str,
    workers: int,
    address: str | None,
    device: str,
    features: str,
    dataset: str | None,
    data_root: Path | None,
    splits: Path | None,
    data_options: tuple[str, ...],
    backbone: str | None,
    weights: str | None,
    image_size: int,
    as_json: bool,
    quiet: bool,
) -> Any:
    """Train a head on a store's features; a run that was interrupted goes on where it stopped.

    Ctrl-C saves and stops. The fold's classes are held out: they are never trained on.

    \b
    Example:
      hsnet train --store voc.zarr --fold 0 --run-dir runs/voc-0 --steps 20000 --workers 2
    """
    set_up_logging(quiet)
    if steps and epochs:
        raise click.UsageError("Give --steps or --epochs, not both.")
    if features == "store" and store is None:
        raise click.UsageError("Give --store S.zarr, or --features online with --dataset and --backbone.")
    if features == "online" and (dataset is None or backbone is None):
        raise click.UsageError("--features online needs --dataset and --backbone.")
    from pipeline.config import RunConfig, skipped_digest
    from pipeline.train import Validated, steps_per_epoch, training_stream

    device = pick_device(device, address)
    if store is not None and features == "store":
        make_source = store_source(store)
    else:
        assert dataset is not None
        assert backbone is not None
        data = open_data(dataset, data_root, splits, data_options, quiet)
        make_source = online_source(data, backbone, weights, image_size, device)
    source = make_source()
    config = RunConfig(
        fold=fold,
        recipe=source.recipe,
        data=source.index.digest,
        skipped=skipped_digest([source.index.images[image] for image in source.skipped]),
        steps=steps or 10_000,
        batch_size=batch_size,
        learning_rate=lr,
        seed=seed,
        drop_novel_images=drop_novel_images,
        boundary=boundary,
        arithmetic=arithmetic,
        select_on=select_on,
        validate_every=validate_every,
        validate_episodes=validate_episodes,
    )
    if epochs:
        per_epoch = steps_per_epoch(batch_size, training_stream(config, source).epoch_length)
        config = dataclasses.replace(config, steps=epochs * per_epoch)

    with Progress("train", "steps", quiet) as progress, stop_on_interrupt() as stop:
        smooth = None

        def show(event: Any) -> None:
            nonlocal smooth
            if isinstance(event, Validated):
                best = ", the best so far" if event.is_best else ""
                progress.say(f"step {event.step}: validation mIoU {event.miou:.1f}, FB-IoU {event.fb_iou:.1f}{best}")
            else:
                smooth = event.loss if smooth is None else 0.95 * smooth + 0.05 * event.loss
                progress.update(event.step, event.steps, f"loss {smooth:.3f}")

        summary = fit_somewhere(
            config, source, make_source, run_dir, workers, address, device, micro_batch, resident, stop, show
        )
    loss = f", loss {summary.loss:.3f}" if summary.loss == summary.loss else ""
    done = f"{summary.steps} of {max(summary.steps, config.steps)} steps"
    lines = [f"{printable(run_dir)}: {done}, {time_text(summary.seconds)}{loss}"]
    if summary.best_miou is not None:
        lines.append(f"best validation mIoU {summary.best_miou:.1f} at step {summary.best_step}")
    result = emit(summary, "\n".join(lines), as_json)
    if not summary.finished:
        click.echo("Interrupted. The run is saved: give the same command again to go on.", err=True)
        click.get_current_context().exit(130)
    return result


@main.group(cls=OrderedGroup)
def checkpoint() -> None:
    """Look at checkpoints, and import published ones.

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
    from pipeline.checkpoint import load_checkpoint

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
    if info.config:
        facts |= {"fold": str(info.config.fold), "seed": str(info.config.seed)}
    if scores:
        facts["validation"] = scores
    result = {**json.loads(info.to_json()), "path": loaded.path, "digest": loaded.digest}
    emit(result, fact_lines(facts), as_json)


@checkpoint.command("import", short_help="Bring in a checkpoint of the published code.")
@click.argument("source", type=FILE, metavar="FILE")
@click.argument("target", type=ANY_PATH, metavar="OUT")
@click.option("--backbone", type=click.Choice(BACKBONES), help="Its network. [default: told from its layers]")
@image_size_option
@json_option
def checkpoint_import(source: Path, target: Path, backbone: str | None, image_size: int, as_json: bool) -> None:
    """Turn a checkpoint of the published code (FILE, a .pt) into one of ours (OUT).

    No code inside the file is run. The backbone inside is not kept; its digest is.

    \b
    Example:
      hsnet checkpoint import best_model.pt pascal-0.safetensors --backbone resnet50
    """
    from pipeline.checkpoint import import_published

    info = import_published(source, target, backbone, image_size)
    emit(
        {**json.loads(info.to_json()), "path": target},
        f"{printable(target)}: head for {info.recipe.backbone} at {info.recipe.image_size} px, "
        f"weights {info.recipe.weights[:15]}",
        as_json,
    )


@main.command(short_help="mIoU and FB-IoU on held-out classes.")
@click.option("--checkpoint", "checkpoint_path", type=ANY_PATH, metavar="C", help="Checkpoint, or a run: its best.")
@click.option(
    "--baseline",
    type=click.Choice(("cosine", "location", "untrained")),
    help="Instead of a checkpoint: a cosine map cut at a threshold fitted on training episodes; one mask for all "
    "queries, where training objects usually are; or an untrained head.",
)
@store_option
@click.option(
    "--fold",
    type=Whole(0),
    help="Fold whose classes are held out. [default: the one the checkpoint was trained for, or 0]",
)
@click.option("--shots", type=Integers(), default="1", show_default=True, metavar="K,...", help="Supports per query.")
@click.option(
    "--episodes",
    type=Episodes(),
    default="1000",
    show_default=True,
    metavar="N|reference",
    help="How many; or the published code's own 1,000.",
)
@click.option(
    "--distinct-supports", is_flag=True, help="No support twice in an episode; the published code lets them repeat."
)
@seed_option
@click.option("--out", type=ANY_PATH, metavar="ROWS.parquet", help="Write one row per episode.")
@options(arithmetic_option, workers_option, address_option, device_option)
@common_options
def evaluate(
    checkpoint_path: Path | None,
    baseline: str | None,
    store: Path,
    fold: int | None,
    shots: tuple[int, ...],
    episodes: Any,
    distinct_supports: bool,
    seed: int,
    out: Path | None,
    arithmetic: str,
    workers: int,
    address: str | None,
    device: str,
    as_json: bool,
    quiet: bool,
) -> Any:
    """Score a checkpoint on episodes of the fold's held-out classes: mIoU, FB-IoU and IoU per class.

    The same rows come out for any number of workers.

    \b
    Example:
      hsnet evaluate --checkpoint runs/voc-0 --store voc.zarr --fold 0 --shots 1,5 --out rows.parquet
    """
    set_up_logging(quiet)
    on_interrupt("No result was written.")
    if episodes == "reference" and distinct_supports:
        raise click.UsageError("The reference episodes let supports repeat: leave out --distinct-supports.")
    if (checkpoint_path is None) == (baseline is None):
        raise click.UsageError("Give --checkpoint C or --baseline cosine|location|untrained, one of them.")
    from pipeline import methods
    from pipeline.evaluate import evaluate as stage
    from pipeline.evaluate import require_writable, write_rows

    if out is not None:
        require_writable(out)

    device = pick_device(device, address)
    make_source = store_source(store)
    source = make_source()
    if checkpoint_path is not None:
        method = methods.trained(checkpoint_path, source, device, arithmetic)
        fold = _tested_fold(method, source, fold)
    elif baseline == "untrained":
        fold, method = fold or 0, methods.untrained(source, seed, device)
    else:
        click.echo(f"Fitting the {baseline} baseline on training episodes", err=True) if not quiet else None
        fold = fold or 0
        method = (methods.cosine if baseline == "cosine" else methods.location)(source, fold, seed)
    with open_runner(workers, address, device) as runner, Progress("evaluate", "episodes", quiet) as progress:
        result = stage(
            method.make,
            make_source,
            source.index,
            fold=fold,
            shots=shots,
            episodes=episodes,
            seed=seed,
            repeat_supports=not distinct_supports,
            skipped=tuple(source.skipped),
            runner=runner,
            device=device,
            protocol={"method": method.facts, "recipe": source.recipe.to_dict()},
            on_event=progress.update,
        )
    classes = source.index.classes
    named = [
        {
            **plain(scores),
            "per_class": {classes[c]: value for c, value in scores.per_class.items()},
            "episodes_per_class": {classes[c]: n for c, n in scores.episodes_per_class.items()},
        }
        for scores in result.scores
    ]
    report = {"scores": named, "protocol": result.protocol, "rows": out}
    printed = emit(report, _scores_text(result.scores, classes), as_json)
    if out is not None:  # after the table: a disk that is full by now does not cost it
        write_rows(out, result.rows)
    without = sum(count == 0 for count in result.scores[0].episodes_per_class.values())
    if without and not quiet:
        click.echo(f"Note: {without} classes had no episode and count as 0. Use more --episodes.", err=True)
    return printed


def _tested_fold(method: Method, source: FeatureSource, fold: int | None) -> int:
    """The fold to test a trained head on: its own unless another is asked for. Warns if it knows the classes."""
    from pipeline.methods import classes_seen

    trained_on = method.facts["trained_on"]
    if fold is None:
        fold = trained_on["fold"] if trained_on else 0
    seen = [source.index.classes[class_id] for class_id in classes_seen(method, source, fold)]
    if seen:
        click.echo(
            f"Warning: the head was trained on {len(seen)} of the classes tested here ({', '.join(seen[:5])}): it held "
            f"out fold {trained_on['fold']}, not fold {fold}. This is no few-shot result.",
            err=True,
        )
    return fold


def _scores_text(all_scores: Sequence[Any], classes: Mapping[int, str]) -> str:
    head = ["", *(f"{scores.shots}-shot" for scores in all_scores)]
    rows = [
        ["mIoU", *(f"{scores.miou:.1f}" for scores in all_scores)],
        ["FB-IoU", *(f"{scores.fb_iou:.1f}" for scores in all_scores)],
        ["episodes", *(str(scores.episodes) for scores in all_scores)],
    ]
    for c in all_scores[0].per_class:
        rows.append([f"  {classes[c]}", *(f"{scores.per_class[c]:.1f}" for scores in all_scores)])
    return table(rows, head)


@main.command(short_help="Masks of new photos from a few examples.")
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
    from pipeline.checkpoint import load_checkpoint
    from pipeline.support import parse_support
    from pipeline.weights import load_weights

    pairs = [parse_support(text) for text in supports]
    loaded = load_checkpoint(checkpoint_path)
    photos = stage.list_queries(queries)
    with Progress("predict", "photos", quiet) as progress:
        summary = stage.predict(
            loaded,
            load_weights(loaded.recipe.backbone, weights),
            pairs,
            photos,
            out,
            device=pick_device(device),
            on_event=progress.update,
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


@main.command(short_help="What works on this machine and what will not.")
@click.option("--path", type=ANY_PATH, default=Path(), help="Where stores will be written. [default: here]")
@json_option
def doctor(path: Path, as_json: bool) -> None:
    """Say what works on this machine and what will not: versions, devices, memory, disk, weights.

    Exit code 1 if the main job cannot run here. Nothing is changed, started or downloaded.

    \b
    Example:
      hsnet doctor
    """
    from pipeline import doctor as stage

    findings = stage.examine(path)
    marks = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        mark, colour = marks[finding.status]
        lines.append(f"{click.style(mark, fg=colour)}  {finding.name.ljust(width)}  {finding.detail}")
        if finding.todo and finding.status != "ok":
            lines.append(f"{' ' * (width + 8)}-> {finding.todo}")
    verdict = {"ok": "All is well.", "warn": "The main job runs here.", "fail": "The main job will not run here."}
    worst = stage.worst(findings)
    emit({"status": worst, "findings": findings}, "\n".join([*lines, "", verdict[worst]]), as_json)
    if worst == "fail":
        click.get_current_context().exit(1)


@main.command(short_help="The whole job once, on generated pictures.")
@click.option("--out", type=ANY_PATH, default=Path("demo-output"), show_default=True, help="Folder for all of it.")
@click.option("--workers", type=Whole(0), default=2, show_default=True, help="Ray workers; 0 needs no Ray.")
@json_option
@click.pass_context
def demo(ctx: click.Context, out: Path, workers: int, as_json: bool) -> Any:
    """Do the whole job once on generated pictures: extract, train, evaluate, predict. A few minutes.

    Prints every command it runs, as you would type it. Running it again goes on with what is there.

    \b
    Example:
      hsnet demo --out demo-output
    """
    from pipeline.demo import demo as stage

    def run(arguments: Sequence[str]) -> Any:
        click.secho(f"\n$ hsnet {shlex.join(arguments)}", bold=True, err=True)
        with contextlib.redirect_stdout(sys.stderr):
            result = main.main(list(arguments), prog_name="hsnet", standalone_mode=False)
        if isinstance(result, int):  # the exit code of a command that stopped by itself
            ctx.exit(result)
        return result

    on_interrupt("Run the demo again to go on.")
    with open_runner(workers, None, "cpu"):  # one Ray for all commands: they use the one that is running
        summary = stage(out, run, workers)
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


if __name__ == "__main__":
    main(prog_name="hsnet")
