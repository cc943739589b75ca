"""`hsnet sweep`: train and test many configurations over one or more stores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.groups import Failure
from commands.options import (
    ANY_PATH,
    STORE,
    Integers,
    Whole,
    address_option,
    choice_option,
    common_options,
    device_option,
    options,
    resident_option,
    training_recipe_option,
    workers_option,
)
from commands.steps import emit, open_runner, pick_device, stop_on_interrupt, store_source
from commands.sweep_progress import SweepProgress
from commands.terminal import set_up_logging, table
from hsnet.errors import ConfigError, HSNetError
from pipeline.common.text import printable, time_text
from pipeline.episodes.protocols import PROTOCOLS, Protocol
from pipeline.scores.tables import interval_text

if TYPE_CHECKING:
    from pipeline.common.runner import Runner
    from pipeline.loading.source import StoreSource
    from pipeline.sweep import Sweep
    from pipeline.sweep_case import Case, CaseDone
    from pipeline.sweep_file import SweepFile
    from pipeline.sweep_plan import PlannedCase


class Folds(click.ParamType):
    """Fold numbers separated by commas, or the word all."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...] | str:
        if value == "all" or isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() for part in parts):
            self.fail(f"'{value}' is neither a list of folds such as 0,1 nor 'all'", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


@click.command(short_help="Train and test many configurations.")
@click.argument("file", type=ANY_PATH, metavar="[FILE.yaml]", required=False)
@click.option("--store", "stores", type=STORE, metavar="S.zarr", multiple=True, help="May be repeated: backbones.")
@click.option("--folds", type=Folds(), metavar="F,...|all", help="Held out in turn. [default: all]")
@click.option(
    "--head",
    "heads",
    metavar="NAME",
    multiple=True,
    help="May be repeated. Those that need no training, such as cosine, are only tested. [default: hsnet]",
)
@click.option(
    "--vary",
    multiple=True,
    metavar="CHOICE=V1,V2",
    help="Values of a choice of the training or the learner, each with each, such as learning_rate=1e-3,1e-4, seed=0,1 "
    "or kernel=center-pivot,original.",
)
@click.option("--fix", multiple=True, metavar="CHOICE=V", help="A choice that is the same for all.")
@training_recipe_option
@click.option("--steps", type=Whole(), help="Optimiser steps of every case. [default: 10000]")
@click.option("--out", type=ANY_PATH, metavar="DIR", help="For a run directory and rows per case.")
@click.option(
    "--transfer",
    type=STORE,
    metavar="S.zarr",
    multiple=True,
    help="Also test every trained head on this store of other data, on the classes it has not seen. May be repeated.",
)
@click.option(
    "--protocol",
    type=click.Choice(tuple(PROTOCOLS)),
    help="Rules of episodes and scores; docs/evaluation.md has their table. [default: default]",
)
@options(choice_option)
@click.option("--shots", type=Integers(), metavar="K,...", help="Supports per query. [default: the protocol's]")
@click.option("--episodes", type=Whole(), metavar="N", help="Of every test. [default: the protocol's]")
@click.option("--dry-run", is_flag=True, help="Say what is done, what would be done and how long it may take.")
@click.option(
    "--pack",
    type=Whole(),
    default=1,
    show_default=True,
    metavar="N",
    help="Heads trained in one process on the same reading; those that see the same episodes share correlations, too.",
)
@options(workers_option, address_option)
@click.option(
    "--gpus-per-case",
    type=float,
    metavar="SHARE",
    help="Of each case (or pack) with workers, such as 0.25. [default: 1]",
)
@click.option(
    "--cpus-per-case",
    type=float,
    metavar="N",
    help="Likewise; each computes with one thread, so more than 1 only leaves room on a machine. [default: 1]",
)
@options(resident_option, device_option)
@common_options
def sweep(
    file: Path | None,
    dry_run: bool,
    workers: int,
    address: str | None,
    device: str,
    pack: int,
    gpus_per_case: float | None,
    cpus_per_case: float | None,
    resident: str,
    as_json: bool,
    quiet: bool,
    **said: Any,
) -> Any:
    """Train a head for every store, fold and value of the varied choices, test each on its held-out classes, and print
    the means over folds with their intervals.

    FILE.yaml holds all that options can say, and several such grids; an option wins over the file.
    The same command goes on where it was stopped; with more folds or values it does only what is new. With workers,
    as many cases are trained at a time. `hsnet report` and `hsnet analyze` take its rows.

    \b
    Example:
      hsnet sweep --store voc.zarr --vary learning_rate=1e-3,3e-4 --steps 5000 --out sweeps/lr --workers 4
      hsnet sweep experiments/table5.yaml --dry-run
    """
    set_up_logging(quiet)
    from pipeline.sweep import require_sweepable

    wanted = _wanted(file, said)
    rules = wanted.rules()
    require_sweepable(rules)
    if not wanted.out:
        raise ConfigError("A sweep needs a folder for its runs and rows: `out: DIR` in the file, or --out DIR.")
    out = Path(wanted.out)
    places = dict.fromkeys(store for part in wanted.grids() for store in (*part.stores, *part.transfer))
    sources, missing = _open(places)
    if missing and not dry_run:
        raise next(iter(missing.values()))
    folds_of = {store: make().index.folds for store, make in sources.items()}
    cases = wanted.all_cases(folds_of)
    if dry_run:
        return _say_plan(
            cases, sources, missing, out, rules, workers, None if address else pick_device(device), as_json
        )
    device = pick_device(device, address)
    require_shares(workers, address, device, gpus_per_case, cpus_per_case)
    with open_runner(workers, address, device, gpus_per_case, cpus_per_case or 1) as runner:
        result, stopped = _run(cases, sources, out, rules, runner, quiet, device=device, pack=pack, resident=resident)
    return _say(result, len(cases), out, stopped, as_json)


def require_shares(workers: int, address: str | None, device: str, gpus: float | None, cpus: float | None) -> None:
    """Refuse shares that Ray would wait for in vain, or that nobody would look at. Raises ConfigError."""
    for name, share in (("--gpus-per-case", gpus), ("--cpus-per-case", cpus)):
        if share is None:
            continue
        if workers == 0 and address is None:
            raise ConfigError(f"{name} {share:g} shares out machines among workers: give --workers or --address, too.")
        if not share > 0 or share == math.inf or (share > 1 and share != int(share)):
            raise ConfigError(f"{name} must be a share up to 1, or a whole number, got {share:g}. Nothing was trained.")
    if gpus is not None and not device.startswith("cuda"):
        raise ConfigError(f"--gpus-per-case {gpus:g} needs a GPU; the device is {device}. Nothing was trained.")


def _wanted(file: Path | None, said: Mapping[str, Any]) -> SweepFile:
    """The sweep of a file, with what the options say in its place."""
    from pipeline.sweep import parse_axis, parse_fixed
    from pipeline.sweep_file import SweepFile, read_sweep_file

    options = SweepFile(
        stores=tuple(map(str, said["stores"])),
        folds=said["folds"],
        heads=said["heads"],
        steps=said["steps"],
        fix=dict(map(parse_fixed, said["fix"]))
        | ({"recipe": said["training_recipe"]} if said["training_recipe"] else {}),
        vary=dict(map(parse_axis, said["vary"])),
        transfer=tuple(map(str, said["transfer"])),
        out=str(said["out"]) if said["out"] else None,
        protocol=said["protocol"],
        set=dict(said["choices"]),
        shots=said["shots"] or (),
        episodes=said["episodes"],
    )
    if both := set(options.fix) & set(options.vary):
        raise ConfigError(f"{', '.join(sorted(both))} cannot be both varied and fixed.")
    return (read_sweep_file(file) if file else SweepFile()).under(options)


def _open(
    places: Sequence[str] | Mapping[str, Any],
) -> tuple[dict[str, Callable[[], StoreSource]], dict[str, HSNetError]]:
    """What opens each store, and why the others cannot be opened."""
    sources, missing = {}, {}
    for place in places:
        try:
            sources[place] = store_source(STORE.convert(place, None, None))
        except HSNetError as error:
            missing[place] = error
    return sources, missing


def _run(
    cases: Sequence[Case],
    sources: Mapping[str, Callable[[], StoreSource]],
    out: Path,
    rules: Protocol,
    runner: Runner,
    quiet: bool,
    **how: Any,
) -> tuple[Sweep, bool]:
    """The sweep, and whether it was asked to stop."""
    from pipeline.sweep import sweep as stage

    done = 0
    with SweepProgress(len(cases), quiet) as progress, stop_on_interrupt() as stop:

        def show(result: CaseDone) -> None:
            nonlocal done
            done += 1
            said = f"{result.steps} steps{'' if result.trained else ' were there'}" if result.run_dir else "tested"
            if result.error:
                said = _reason(result).splitlines()[0]
            progress.say(f"{printable(result.case.name)}: {printable(said)}")
            progress.done(done)

        result = stage(
            cases,
            lambda store: sources[store](),
            out,
            rules,
            runner=runner,
            on_case=show,
            on_progress=progress.running,
            stop=stop,
            **how,
        )
        return result, stop()


def _reason(failed: CaseDone) -> str:
    """Why a case has no rows: what kind of thing happened, and where to read more."""
    kind = "" if failed.kind in ("refused", "interrupted") else f"{failed.kind}: "
    return f"{kind}{failed.error}{f' (see {failed.log})' if failed.log else ''}"


def _say(result: Sweep, cases: int, out: Path, stopped: bool, as_json: bool) -> Any:
    rows = [
        [
            printable(configuration.name),
            ", ".join(map(str, configuration.folds)),
            f"{score.shots}-shot",
            interval_text(score.miou),
            interval_text(score.fb_iou),
        ]
        for configuration in result.configurations
        for score in configuration.scores
    ]
    head = ["configuration", "folds", "", "mIoU", "FB-IoU"]
    lines = [table(rows, head)] if rows else []
    lines += ["", f"{len(result.cases) - len(result.failed)} of {cases} cases; rows and runs in {printable(out)}."]
    lines += ["In brackets: 95 % intervals over episodes. Another training run would give another score."]
    printed = emit(result, "\n".join(lines), as_json)
    if stopped:
        click.get_current_context().exit(130)
    if result.failed:
        reasons = "\n".join(f"  {failed.case.name}: {_reason(failed)}" for failed in result.failed)
        raise Failure(f"{len(result.failed)} of {cases} cases failed; the others are done:\n{reasons}")
    return printed


def _say_plan(
    cases: Sequence[Case],
    sources: Mapping[str, Callable[[], StoreSource]],
    missing: Mapping[str, HSNetError],
    out: Path,
    rules: Protocol,
    workers: int,
    measure_on: str | None,
    as_json: bool,
) -> Any:
    from pipeline.sweep_plan import STATES, plan_sweep

    def open_source(store: str) -> StoreSource:
        if store in missing:
            raise missing[store]
        return sources[store]()

    planned = plan_sweep(cases, open_source, out, rules, measure_on)
    rows = [
        [
            printable(one.case.name),
            f"{one.state} from {one.step}" if one.state == "go on" else one.state,
            f"{one.steps:,}" if one.steps else "-",
            "?" if one.seconds is None else "-" if one.state == "done" else time_text(one.seconds),
        ]
        for one in planned
    ]
    number = {state: sum(one.state == state for one in planned) for state in STATES}
    amounts = [
        f"{number['train']} to train and test",
        f"{number['go on']} to go on with",
        f"{number['test']} to test only",
        f"{number['done']} done",
        *([f"{number['missing']} that lack a store"] if number["missing"] else []),
        *([f"{number['refused']} that would fail"] if number["refused"] else []),
    ]
    left = sum(one.steps - one.step for one in planned if one.state != "done")
    lines = [table(rows, ["case", "", "steps", "time"]), "", f"{len(planned)} cases: {', '.join(amounts)}."]
    lines.append(f"{left:,} optimiser steps are left. {_time(planned, workers)}")
    for store, error in missing.items():
        lines.append(f"Missing: {printable(store)}. {printable(str(error).splitlines()[0])}")
    for one in planned:
        if one.state == "refused":
            lines.append(f"Would fail: {printable(one.case.name)}: {one.note}")
    lines.append(f"Nothing was done. Runs and rows would lie in {printable(out)}.")
    values = {"cases": planned, "steps_left": left, "missing": sorted(missing), "out": out}
    return emit(values, "\n".join(lines), as_json)


def _time(planned: Sequence[PlannedCase], workers: int) -> str:
    """How long the rest may take, and from what that is known."""
    rest = [one for one in planned if one.state in ("train", "go on", "test")]
    known = [one.seconds for one in rest if one.seconds is not None]
    if not rest and all(one.state == "done" for one in planned):
        return "Nothing is left to do."
    if not known:
        return (
            "How long that takes is not known: nothing of its kind has run in this sweep (`hsnet plan` measures some)."
        )
    by = f" with {workers} workers" if workers > 1 else ""
    timed = sum(one.measured for one in rest)
    of = "by runs of this sweep" if timed < len(known) else "by a few episodes timed now, on one thread"
    if 0 < timed < len(known):
        of = f"by runs of this sweep and, for {timed} cases, a few episodes timed now"
    text = f"About {time_text(sum(known) / max(1, workers))}{by}, {of}, without validations"
    return text + (
        f"; {len(rest) - len(known)} cases are not in it: nothing of their kind has run."
        if len(known) < len(rest)
        else "."
    )
