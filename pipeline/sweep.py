"""The sweep stage: many training configurations over one or more stores, each trained, tested and kept.

A case is one store, one fold and one value of every choice that is varied. It has a run directory and rows of its own,
so a sweep that was interrupted, or given more values, does only what is missing; and everything that reads runs and
rows (`hsnet analyze`, `hsnet report`) reads a sweep's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from types import GenericAlias
from typing import Any, get_type_hints

from hsnet.errors import ConfigError, DataError, HSNetError
from pipeline.analyze import Score, analyze
from pipeline.common.fields import read_choice
from pipeline.common.files import write_table
from pipeline.common.runner import Runner, SerialRunner
from pipeline.episodes.protocols import Protocol
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.evaluate.stage import evaluate
from pipeline.heads.catalogue import trained
from pipeline.heads.config import RunConfig
from pipeline.loading.source import StoreSource
from pipeline.scores.rows import read_results
from pipeline.train import Event, fit

_DECIDED = {"fold", "recipe", "data", "skipped", "learner"}


@dataclass(frozen=True)
class Case:
    """One configuration to train and to test."""

    name: str
    """Name of its run directory, and with `.parquet` of its rows."""
    configuration: str
    """The name without the fold: cases with one are averaged over folds."""
    store: str
    fold: int
    choices: Mapping[str, Any]
    """Fields of `RunConfig` that are not at their default."""


@dataclass(frozen=True)
class CaseDone:
    """What a case came to."""

    case: Case
    run_dir: Path
    rows: Path | None
    """None if it failed or was interrupted."""
    steps: int
    trained: bool
    """False if an earlier call had finished its training."""
    error: str | None = None


@dataclass(frozen=True)
class Configuration:
    """A configuration over its folds."""

    name: str
    folds: tuple[int, ...]
    scores: tuple[Score, ...]
    """One per number of shots, by the protocol's own policy and fusion: the mean over the folds, with its interval."""


@dataclass(frozen=True)
class Sweep:
    """All cases, and the table made of them."""

    cases: tuple[CaseDone, ...]
    configurations: tuple[Configuration, ...]

    @property
    def failed(self) -> tuple[CaseDone, ...]:
        """Cases without rows."""
        return tuple(done for done in self.cases if done.rows is None)


def parse_axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """ "learning_rate=1e-3,1e-4" -> ("learning_rate", (0.001, 0.0001)): a field of `RunConfig` and its values.

    Raises:
        ConfigError: no such field, one that the sweep decides, or a value of another type.
    """
    declared = {name: kind for name, kind in get_type_hints(RunConfig).items() if name not in _DECIDED}
    name, values = read_choice(text, {name: GenericAlias(tuple, (kind, ...)) for name, kind in declared.items()})
    return name, tuple(dict.fromkeys(values))


def make_cases(
    stores: Sequence[str], folds: Sequence[int], varied: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any]
) -> list[Case]:
    """Every combination of store, fold and varied values, folds last, so that configurations become whole early.

    Raises:
        ConfigError: nothing to do, two stores of one name, a value out of range, or a choice both varied and fixed.
    """
    if both := set(varied) & set(fixed):
        raise ConfigError(f"{', '.join(sorted(both))} cannot be both varied and fixed.")
    names = [Path(store).name.removesuffix(".zarr") for store in stores]
    if len(set(names)) < len(names):
        raise ConfigError(f"Stores of a sweep need different names, got {', '.join(names)}.")
    defaults = {item.name: item.default for item in fields(RunConfig) if item.default is not MISSING}
    cases = []
    for (name, store), *values in itertools.product(zip(names, stores, strict=True), *varied.values()):
        choices = dict(zip(varied, values, strict=True))
        configuration = "-".join([name, *(f"{choice}={value}" for choice, value in choices.items())])
        settings = {**fixed, **choices}
        for fold in folds:
            # The same words for a default and for leaving it out: then both are the same run.
            kept = {choice: value for choice, value in settings.items() if value != defaults.get(choice)}
            cases.append(Case(f"{configuration}-fold{fold}", configuration, store, fold, kept))
    if not cases:
        raise ConfigError("There is nothing to sweep over: give at least one store and one fold.")
    return cases


def sweep(
    cases: Sequence[Case],
    open_source: Callable[[str], StoreSource],
    out: Path,
    protocol: Protocol,
    *,
    runner: Runner | None = None,
    device: str = "cpu",
    on_case: Callable[[CaseDone], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[Case, Event], None] | None = None,
) -> Sweep:
    """Train and test every case, and put the results together.

    A case that fails is reported, and the others are done. `out` holds a run directory and a file of rows per case.

    Args:
        open_source: opens a store, in any process; must be picklable for Ray.
        protocol: how each best checkpoint is tested.
        runner: with several workers, as many cases are trained at a time, each in one process.
        on_case: called when a case is done.
        stop, on_step: called where a case is trained, so only to be given with a runner that works in this process.
            `stop` is asked before every training step: when it is True the case is saved, and the rest is left for
            another call. `on_step` gets the case and its training events.

    Raises:
        ConfigError: `protocol` asks for original size, which a sweep does not read masks for, or for several ways.
    """
    if protocol.several:
        raise ConfigError(
            f"A sweep tests 1-way episodes whose queries show the class; the protocol has ways {protocol.ways}, absent "
            f"{protocol.absent:g}. Test its checkpoints with `hsnet evaluate --ways`. Nothing was trained."
        )
    if protocol.resolution != "network":
        raise ConfigError(
            "A sweep tests at network size. Test its checkpoints at original size with `hsnet evaluate --data-root`, "
            "or choose another protocol (--protocol, or --set resolution=network). Nothing was trained."
        )
    runner = runner or SerialRunner()
    run = partial(_run_case, open_source, out, protocol, device, stop, on_step)
    done: list[CaseDone] = []
    for case, result in runner.map(lambda: run, cases):
        assert case == result.case
        done.append(result)
        if on_case:
            on_case(result)
        if stop():
            break
    done.sort(key=lambda case_done: cases.index(case_done.case))
    return Sweep(tuple(done), tuple(_configurations(done)))


def _run_case(
    open_source: Callable[[str], StoreSource],
    out: Path,
    protocol: Protocol,
    device: str,
    stop: Callable[[], bool],
    on_step: Callable[[Case, Event], None] | None,
    case: Case,
) -> CaseDone:
    run_dir, rows = out / case.name, out / f"{case.name}.parquet"
    try:
        source = open_source(case.store)
        config = RunConfig.of(source, fold=case.fold, **{"steps": 10_000, **case.choices})
        fitted = fit(config, source, run_dir, device=device, stop=stop, on_event=on_step and partial(on_step, case))
        is_new = fitted.resumed_at < fitted.steps
        if not fitted.finished:
            return CaseDone(case, run_dir, None, fitted.steps, is_new, "interrupted; the same command goes on")
        method = trained(run_dir, source, device)
        if not _tested(rows, method.checkpoint, source.store.identity, protocol):
            plan = EvaluationPlan(method=method, source=source, fold=case.fold, protocol=protocol, device=device)
            write_table(rows, evaluate(plan).rows)
        return CaseDone(case, run_dir, rows, fitted.steps, is_new)
    except HSNetError as error:
        return CaseDone(case, run_dir, None, 0, False, str(error))


def _tested(rows: Path, checkpoint: str, store: str, protocol: Protocol) -> bool:
    """Whether the rows are those of this head, these features and these rules."""
    if not rows.exists():
        return False
    try:
        results = read_results(rows)
    except DataError:
        return False  # written anew
    return (
        results.facts.get("checkpoint") == checkpoint
        and results.facts.get("store") == store
        and results.protocol.digest == protocol.digest
    )


def _configurations(done: Sequence[CaseDone]) -> list[Configuration]:
    """Means over folds, in the order of the cases."""
    folds: dict[str, dict[int, Path]] = {}
    for case_done in done:
        if case_done.rows is not None:
            folds.setdefault(case_done.case.configuration, {})[case_done.case.fold] = case_done.rows
    configurations = []
    for name, rows in folds.items():
        analysis = analyze([read_results(path) for path in rows.values()], sections=())
        scores = [score for score in analysis.scores if len(rows) == 1 or score.fold is None]
        configurations.append(Configuration(name, tuple(rows), tuple(scores)))
    return configurations
