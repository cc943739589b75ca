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
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hsnet.errors import ConfigError, HSNetError

if TYPE_CHECKING:
    from pipeline.datasets import Dataset

DISTRIBUTION = "hsnet-pipeline"

# Spelt out, because the tables they come from import torch; tests compare them.
BACKBONES = ("vgg16", "resnet50", "resnet101", "squeezenet1_1")
DATASETS = ("pascal", "coco", "fss", "folder", "shapes")
PRECISIONS = ("int8", "float16", "float32")

SECTIONS = (
    ("Data", ("prepare",)),
    ("Store", ("extract", "store")),
    ("Model", ("train", "checkpoint")),
    ("Use", ("evaluate", "predict")),
    ("Machine", ("doctor", "demo")),
)
"""The commands in the order of the pipeline, under the headings of --help."""

PLAIN_PROGRESS_S = 5.0
"""Seconds between two progress lines when stderr is not a terminal."""

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
    help="An option of the data set's reader, such as images_per_class=20 for shapes. May be repeated.",
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
    type=click.IntRange(32, 2048),
    default=400,
    show_default=True,
    help="Side of the square that photos are squashed to, pixels.",
)
store_option = click.option(
    "--store", type=ANY_PATH, metavar="S.zarr", required=True, help="Feature store made by `hsnet extract`."
)
fold_option = click.option(
    "--fold", type=click.IntRange(0), default=0, show_default=True, help="Fold whose classes are held out."
)
seed_option = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same episodes."
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(0),
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
cluster_options = options(workers_option, address_option)


# ---------------------------------------------------------------------------------------------- output


def emit(result: Any, text: str, as_json: bool) -> None:
    """Print a result on stdout: as JSON for machines, as text for people."""
    click.echo(json.dumps(plain(result), indent=2, allow_nan=False) if as_json else text)


def plain(value: Any) -> Any:
    """Anything a stage returns, as what JSON can hold. NaN and infinity become null: JSON has neither."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return printable(value)
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def printable(path: Path | str) -> str:
    """A path that is safe to print: control characters and bytes that are no text are shown as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size_text(nbytes: float) -> str:
    """1536 -> '1.5 KB' (powers of 1000, as disks are sold)."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def time_text(seconds: float) -> str:
    """75.3 -> '1:15'; below ten seconds with one decimal, '4.2 s'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Columns of text; the first to the left, the others to the right."""
    every = [list(head), *map(list, rows)] if head else [list(row) for row in rows]
    widths = [max(len(row[column]) for row in every) for column in range(len(every[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in every
    ]
    if head:
        lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


class Progress:
    """A bar on a terminal, a plain line every few seconds elsewhere; on stderr in any case.

    `update(done, total, note)` may be called as often as you like.
    """

    def __init__(self, what: str, unit: str, quiet: bool = False) -> None:
        self.what, self.unit, self.quiet = what, unit, quiet
        self._started = self._last = time.monotonic()
        self._first: int | None = None
        self._shown = -1
        self._state: tuple[int, int | None, str] = (0, None, "")
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[facts]}"),
                console=Console(stderr=True),
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=None, facts="starting")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        elif not self.quiet and self._state[0] != self._shown:
            self._print_line()

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Show that `done` of `total` units are done. The rate counts what was done since the first call."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._started, self._last = done, now, now
        self._state = (done, total, note)
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, facts=self._facts())
        elif not self.quiet and now - self._last >= PLAIN_PROGRESS_S:
            self._print_line()
            self._last = now

    def _facts(self) -> str:
        done, total, note = self._state
        seconds = time.monotonic() - self._started
        new = done - (self._first or 0)
        facts = [f"{done}/{total} {self.unit}" if total else f"{done} {self.unit}"]
        if new > 0 and seconds > 0.5:
            facts.append(f"{new / seconds:.1f} {self.unit}/s")
            if total and done < total:
                facts.append(f"{time_text((total - done) * seconds / new)} left")
        return ", ".join([*facts, note] if note else facts)

    def _print_line(self) -> None:
        self._shown = self._state[0]
        click.echo(f"{self.what}: {self._facts()}", err=True)


@contextlib.contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Send whatever is written to stdout inside the block to stderr: Ray reports its events on stdout.

    Both Python's stream and the process's descriptor 1, which child processes inherit.
    """
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # no stdout at all
        kept = None
    try:
        if kept is not None:
            os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


class _Lines(logging.Formatter):
    """`Warning: text` for warnings and worse, the bare text for notes."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno < logging.WARNING else f"{record.levelname.capitalize()}: {text}"


def set_up_logging(quiet: bool = False) -> None:
    """Our own notes and warnings as lines on stderr; other packages' from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for room in ("cli", "cluster", "hsnet", "pipeline"):
        logging.getLogger(room).setLevel(logging.WARNING if quiet else logging.INFO)


# ---------------------------------------------------------------------------------------------- shared steps


def open_data(name: str, root: Path | None, splits: Path | None, given: Sequence[str]) -> Dataset:
    """The data set of the options, its notes printed."""
    from pipeline.datasets import open_dataset

    dataset = open_dataset(name, root, splits, **parse_data_options(given))
    for note in dataset.index.notes:
        click.echo(f"Note: {note}", err=True)
    return dataset


def parse_data_options(given: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts as keyword arguments; whole numbers become int."""
    parsed: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"--data-option '{text}' is not of the form KEY=VALUE")
        parsed[key] = int(value) if value.lstrip("-").isdecimal() else value
    return parsed


def pick_device(name: str) -> str:
    """'auto' becomes the best there is; a device that is not there is an error."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name[5:] or 0) >= count:
            raise ConfigError(f"--device {name}: torch sees {count} GPUs here; `hsnet doctor` says why. Use cpu.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: not available on this machine. Use cpu.")
    return name


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
    set_up_logging()


@main.command()
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

    with stdout_kept_clean():
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


if __name__ == "__main__":
    main(prog_name="hsnet")
