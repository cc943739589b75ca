"""`hsnet sweep`: train and test many configurations over one store."""

from __future__ import annotations

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
    protocol_option,
    training_recipe_option,
    workers_option,
)
from commands.steps import emit, open_runner, pick_device, stop_on_interrupt, store_source
from commands.terminal import Progress, set_up_logging, table
from hsnet.errors import ConfigError
from pipeline.common.text import printable
from pipeline.scores.tables import interval_text

if TYPE_CHECKING:
    pass


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
@click.option(
    "--store", "stores", type=STORE, metavar="S.zarr", multiple=True, required=True, help="May be repeated: backbones."
)
@click.option("--folds", type=Folds(), default="all", show_default=True, metavar="F,...|all", help="Held out in turn.")
@click.option(
    "--vary",
    multiple=True,
    metavar="CHOICE=V1,V2",
    help="Values of a training choice, each with each, such as learning_rate=1e-3,1e-4 or seed=0,1.",
)
@click.option("--fix", multiple=True, metavar="CHOICE=V", help="A training choice that is the same for all.")
@training_recipe_option
@click.option("--steps", type=Whole(), default=10_000, show_default=True, help="Optimiser steps of every case.")
@click.option("--out", type=ANY_PATH, metavar="DIR", required=True, help="For a run directory and rows per case.")
@options(protocol_option, choice_option)
@click.option("--shots", type=Integers(), metavar="K,...", help="Supports per query. [default: the protocol's]")
@click.option("--episodes", type=Whole(), metavar="N", help="Of every test. [default: the protocol's]")
@options(workers_option, address_option, device_option)
@common_options
def sweep(
    stores: tuple[str | Path, ...],
    folds: tuple[int, ...] | str,
    vary: tuple[str, ...],
    fix: tuple[str, ...],
    steps: int,
    out: Path,
    protocol: str,
    choices: tuple[tuple[str, Any], ...],
    workers: int,
    address: str | None,
    device: str,
    training_recipe: str | None,
    as_json: bool,
    quiet: bool,
    **tested: Any,
) -> Any:
    """Train a head for every store, fold and value of the varied choices, test each on its held-out classes, and print
    the means over folds with their intervals.

    The same command goes on where it was stopped; with more folds or values it does only what is new. With workers,
    as many cases are trained at a time. `hsnet report` and `hsnet analyze` take its rows.

    \b
    Example:
      hsnet sweep --store voc.zarr --vary learning_rate=1e-3,3e-4 --steps 5000 --out sweeps/lr --workers 4
    """
    set_up_logging(quiet)
    from pipeline.episodes.protocols import resolve
    from pipeline.heads.training import training_choices
    from pipeline.sweep import Case, CaseDone, make_cases, parse_axis
    from pipeline.sweep import sweep as stage
    from pipeline.train import Event, StepDone

    rules = resolve(protocol, **dict(choices) | {name: value for name, value in tested.items() if value})
    device = pick_device(device, address)
    sources = {str(store): store_source(store) for store in stores}
    there = [set(make().index.folds) for make in sources.values()]
    wanted = sorted(set.intersection(*there)) if isinstance(folds, str) else folds
    if missing := [fold for fold in wanted if not all(fold in known for known in there)]:
        raise ConfigError(f"Not every store has fold {missing[0]}; folds of all: {sorted(set.intersection(*there))}.")
    fixed = {name: _single(name, values) for name, values in map(parse_axis, fix)}
    varied = dict(map(parse_axis, vary))
    chosen = training_choices(training_recipe)
    by_recipe = {name: value for name, value in chosen.items() if name not in varied}
    cases = make_cases(list(sources), wanted, varied, {**by_recipe, "steps": steps, **fixed})
    in_this_process = workers == 0 and address is None
    with (
        open_runner(workers, address, device) as runner,
        Progress("sweep", "cases", quiet) as progress,
        stop_on_interrupt(at_once=not in_this_process) as stop,
    ):
        done = 0

        def show(result: CaseDone) -> None:
            nonlocal done
            done += 1
            said = f"{result.steps} steps{'' if result.trained else ' were there'}"
            if result.error:
                said = result.error.splitlines()[0]
            progress.say(f"{printable(result.case.name)}: {printable(said)}")
            progress.update(done, len(cases))

        def step(case: Case, event: Event) -> None:
            if isinstance(event, StepDone):
                progress.update(done, len(cases), f"{printable(case.name)}, step {event.step}/{event.steps}")

        listening: dict[str, Any] = {"stop": stop, "on_step": step} if in_this_process else {}
        progress.update(0, len(cases))
        result = stage(
            cases,
            lambda store: sources[store](),
            out,
            rules,
            runner=runner,
            device=device,
            on_case=show,
            **listening,
        )
        stopped = stop()
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
    lines += ["", f"{len(result.cases) - len(result.failed)} of {len(cases)} cases; rows and runs in {printable(out)}."]
    lines += ["In brackets: 95 % intervals over episodes. Another training run would give another score."]
    printed = emit(result, "\n".join(lines), as_json)
    if stopped:
        click.get_current_context().exit(130)
    if result.failed:
        reasons = "\n".join(f"  {failed.case.name}: {failed.error}" for failed in result.failed)
        raise Failure(f"{len(result.failed)} of {len(cases)} cases failed; the others are done:\n{reasons}")
    return printed


def _single(name: str, values: tuple[Any, ...]) -> Any:
    if len(values) > 1:
        raise ConfigError(f"--fix {name} takes one value; use --vary {name}=... for several.")
    return values[0]
