"""One case of a sweep: trained where it needs to be, alone or in a pack, tested, and what became of it.

Nothing that happens to a case is raised: out of memory, a bug or a mistake of the user's is a result like another, so
that the other cases are done.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hsnet.errors import CheckpointMismatch, ConfigError, DataError, DeviceMemoryError, HSNetError
from pipeline.common.out_of_memory import lacked_memory
from pipeline.common.runner import Failed, failure, free_gpu
from pipeline.episodes.protocols import Protocol
from pipeline.evaluate.plan import EvaluationPlan, plan_evaluation
from pipeline.evaluate.stage import evaluate_to
from pipeline.heads.catalogue import HEADS, trained
from pipeline.heads.config import RunConfig
from pipeline.heads.learner import LEARNED_HEADS, LEARNER_CHOICES, learner_arguments
from pipeline.heads.run_dir import stored_config
from pipeline.heads.training import DEFAULT_RECIPE, training_choices
from pipeline.loading.source import StoreSource
from pipeline.packed import fit_packed
from pipeline.scores.rows import read_results
from pipeline.sweep_status import Board, Teller
from pipeline.train import Event, FitSummary, StepDone, fit

TRAINED = LEARNED_HEADS
"""Heads of a sweep that are trained, the published one first; the others are those of the catalogue."""

RECIPES = tuple(dict.fromkeys((DEFAULT_RECIPE, "hsnet")))
"""Training recipes of a case that names none: the first, unless its run directory was begun with another of them."""

STEPS = 10_000
"""Of a case that does not say."""

Failure = Literal["refused", "interrupted", "out of memory", "bug", "dead process"]

INTERRUPTED = "interrupted; the same command goes on"


@dataclass(frozen=True)
class Case:
    """One configuration to train, if its head is trained, and to test."""

    name: str
    """Name of its run directory, and with `.parquet` of its rows."""
    configuration: str
    """The name without the fold: cases with one are averaged over folds."""
    store: str
    fold: int
    choices: Mapping[str, Any]
    """Choices of `sweep_choices` that were made."""
    head: str = TRAINED[0]
    transfer: tuple[str, ...] = ()
    """Stores of other data that its head is tested on, too: on the classes that it has not seen."""

    @property
    def is_trained(self) -> bool:
        return self.head in TRAINED


@dataclass(frozen=True)
class CaseDone:
    """What a case came to."""

    case: Case
    run_dir: Path | None
    """None for a head that needs no training."""
    rows: Path | None
    """None if it failed or was interrupted."""
    steps: int
    trained: bool
    """False if an earlier call had finished its training, or it needs none."""
    error: str | None = None
    transferred: Mapping[str, Path] = field(default_factory=dict)
    """Name of another store -> rows of its classes."""
    kind: Failure | None = None
    """Of the error. refused: it cannot work, as the error says; interrupted: the same command goes on; out of memory,
    bug, dead process: as the log says."""
    log: Path | None = None
    """What was raised and where, for the last three kinds."""


def store_name(store: str) -> str:
    """What a store is called in the names of cases.

    >>> store_name("features/voc.zarr")
    'voc'
    """
    return Path(store).name.removesuffix(".zarr")


def run_config(case: Case, source: StoreSource, run_dir: Path) -> RunConfig:
    """The training run of a case.

    Where the case names no training recipe, a run that is in `run_dir` goes on with the recipe that it was begun with.

    Raises:
        ConfigError: a choice is out of range, or the features cannot give what the learner shall use.
    """
    learner = {name: value for name, value in case.choices.items() if name in LEARNER_CHOICES}
    training = {name: value for name, value in case.choices.items() if name not in LEARNER_CHOICES}
    if case.head != TRAINED[0]:
        learner["head"] = case.head
    arguments = learner_arguments(source.recipe, **learner)
    asked = training.pop("recipe", None)
    configs = [
        RunConfig.of(
            source, fold=case.fold, learner=arguments, **{"steps": STEPS, **training_choices(recipe), **training}
        )
        for recipe in ([asked] if asked else RECIPES)
    ]
    if stored := stored_config(run_dir):
        return next((config for config in configs if not stored.differences(config)), configs[0])
    return configs[0]


@dataclass(frozen=True)
class Job:
    """What all cases of a sweep have in common."""

    open_source: Callable[[str], StoreSource]
    out: Path
    protocol: Protocol
    device: str
    resident: str
    board: Board
    stop: Callable[[], bool] | None
    """Where cases run in the process that is asked; elsewhere they look at the board."""
    on_step: Callable[[Case, Event], None] | None

    def stopping(self) -> bool:
        return self.stop() if self.stop else self.board.stop_wanted()


class _Interrupted(Exception):
    """In the middle of a test."""


def run_cases(job: Job, cases: Sequence[Case]) -> tuple[CaseDone, ...]:
    """Train and test cases: one by itself, several as a pack, all on one store. Nothing that goes wrong is raised."""
    fitted: dict[str, FitSummary | Exception] = {}
    try:
        if len(cases) > 1:
            fitted = _packed(job, cases)
        return tuple(_run(job, case, fitted.get(case.name)) for case in cases)
    finally:
        for case in cases:
            job.board.forget(case.name)


def _packed(job: Job, cases: Sequence[Case]) -> dict[str, FitSummary | Exception]:
    """What became of the training of each, by its name."""
    fitted: dict[str, FitSummary | Exception] = {}
    configs: list[tuple[Case, RunConfig]] = []
    try:
        source = job.open_source(cases[0].store)
        for case in cases:
            try:
                configs.append((case, run_config(case, source, job.out / case.name)))
            except HSNetError as error:
                fitted[case.name] = error
        listeners = [_listener(job, case, Teller(job.board, case.name)) for case, _ in configs]
        outcomes = fit_packed(
            [config for _, config in configs],
            source,
            [job.out / case.name for case, _ in configs],
            device=job.device,
            resident=job.resident,
            stop=job.stopping,
            on_event=lambda number, event: listeners[number](event),
        )
    except Exception as error:  # reported with every case, as if each had met it alone
        return {case.name: fitted.get(case.name, error) for case in cases}
    return {**fitted, **{case.name: outcome for (case, _), outcome in zip(configs, outcomes, strict=True)}}


def _run(job: Job, case: Case, fitted: FitSummary | Exception | None) -> CaseDone:
    """Train a case, unless it was `fitted`, and test it."""
    run_dir = job.out / case.name if case.is_trained else None
    log = log_of(job.out, case)
    try:
        if isinstance(fitted, Exception):
            raise fitted
        done = _trained_and_tested(job, case, fitted)
    except _Interrupted:
        return CaseDone(case, run_dir, None, 0, False, INTERRUPTED, kind="interrupted")
    except Exception as error:
        if isinstance(error, HSNetError) and not isinstance(error, DeviceMemoryError):
            return CaseDone(case, run_dir, None, 0, False, str(error), kind="refused")
        if isinstance(error, DeviceMemoryError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # with its traceback; a sweep has its own word on memory
        told = failure(error)
        traceback.clear_frames(error.__traceback__)
        free_gpu()
        kind: Failure = "out of memory" if lacked_memory(error) else "bug"
        return CaseDone(case, run_dir, None, 0, False, told.reason, kind=kind, log=_written(log, told.detail))
    if done.rows is not None:
        log.unlink(missing_ok=True)
    return done


def _trained_and_tested(job: Job, case: Case, fitted: FitSummary | None) -> CaseDone:
    run_dir, rows = job.out / case.name, rows_of(job.out, case)
    source, teller = job.open_source(case.store), Teller(job.board, case.name)

    def tested(done: int, episodes: int) -> None:
        if job.stopping() and done < episodes:
            raise _Interrupted
        teller.tested(done, episodes)

    if not case.is_trained:
        if not is_tested(rows, case, "", source.store.identity, job.protocol):
            _test_untrained(rows, case, source, job.protocol, job.device, tested)
        return CaseDone(case, None, rows, 0, False)
    if fitted is None:
        config = run_config(case, source, run_dir)
        fitted = fit(
            config,
            source,
            run_dir,
            device=job.device,
            resident=job.resident,
            stop=job.stopping,
            on_event=_listener(job, case, teller),
        )
    is_new = fitted.resumed_at < fitted.steps
    if not fitted.finished:
        return CaseDone(case, run_dir, None, fitted.steps, is_new, INTERRUPTED, kind="interrupted")
    method = trained(run_dir, source, job.device)
    if not is_tested(rows, case, method.checkpoint, source.store.identity, job.protocol):
        plan = EvaluationPlan(method=method, source=source, fold=case.fold, protocol=job.protocol, device=job.device)
        evaluate_to(plan, rows, on_event=tested, overwrite=True)
    moved = _transfer(case, job, run_dir, method.checkpoint, tested)
    return CaseDone(case, run_dir, rows, fitted.steps, is_new, None, moved)


def _listener(job: Job, case: Case, teller: Teller) -> Callable[[Event], None]:
    def hear(event: Event) -> None:
        if isinstance(event, StepDone):
            teller.step(event.step, event.steps, event.loss, event.seconds)
        else:
            teller.validated(event.miou)
        if job.on_step:
            job.on_step(case, event)

    return hear


def lost(job: Job, cases: Sequence[Case], why: Failed) -> tuple[CaseDone, ...]:
    """What is reported of cases whose process died, again and again."""
    found = []
    for case in cases:
        job.board.forget(case.name)
        text = "\n".join(filter(None, (why.reason, why.place, why.detail)))
        log, run_dir = _written(log_of(job.out, case), text), job.out / case.name if case.is_trained else None
        found.append(CaseDone(case, run_dir, None, 0, False, why.reason, kind="dead process", log=log))
    return tuple(found)


def _written(log: Path, text: str) -> Path | None:
    """The log of a failure; None where even that cannot be written."""
    try:
        log.write_text(text if text.endswith("\n") else f"{text}\n", encoding="utf-8")
    except OSError:
        return None
    return log


def rows_of(out: Path, case: Case, other: str = "") -> Path:
    """Where a case's rows lie: of its own store, or of another one by name."""
    return out / f"{case.name}{f'-on-{other}' if other else ''}.parquet"


def log_of(out: Path, case: Case) -> Path:
    """Where the traceback of a case that failed lies: beside its rows, for not every case has a run directory."""
    return out / f"{case.name}.log"


def _test_untrained(
    rows: Path,
    case: Case,
    source: StoreSource,
    protocol: Protocol,
    device: str,
    on_event: Callable[[int, int], None],
) -> None:
    """Test a head that needs no training, fitted on the fold's training episodes where it has to be, by the protocol
    with the head's own way to combine supports. Its facts name the case's seed."""
    seed = int(case.choices.get("seed", 0))
    plan = plan_evaluation(
        partial(_same, source), replace(protocol, seeds=(seed,)), head=case.head, fold=case.fold, device=device
    )
    method = replace(plan.method, facts={**plan.method.facts, "seed": seed})
    rules = replace(plan.protocol, seeds=protocol.seeds)
    plan = replace(plan, method=method, protocol=rules, dataset=None)
    evaluate_to(plan, rows, on_event=on_event, overwrite=True)


def _transfer(
    case: Case, job: Job, run_dir: Path, checkpoint: str, on_event: Callable[[int, int], None]
) -> dict[str, Path]:
    """Test a head on other data: on those of the stores whose features are of its kind.

    Raises:
        ConfigError: none is.
    """
    moved: dict[str, Path] = {}
    protocol = job.protocol
    for store in case.transfer:
        source, name = job.open_source(store), store_name(store)
        rows = rows_of(job.out, case, name)
        with suppress(CheckpointMismatch):
            if not is_tested(rows, case, checkpoint, source.store.identity, protocol):
                plan = plan_evaluation(
                    partial(_same, source), protocol, checkpoint=run_dir, transfer=True, device=job.device
                )
                evaluate_to(replace(plan, dataset=None), rows, on_event=on_event, overwrite=True)
            moved[name] = rows
    if case.transfer and not moved:
        raise ConfigError(
            f"None of the stores to transfer to ({', '.join(map(store_name, case.transfer))}) has features of the kind "
            f"that {store_name(case.store)} has. Extract one with the same backbone, weights and image size."
        )
    return moved


def _same(source: StoreSource) -> StoreSource:
    return source


def is_tested(rows: Path, case: Case, checkpoint: str, store: str, protocol: Protocol) -> bool:
    """Whether the rows are those of this head, these features and these rules."""
    if not rows.exists():
        return False
    try:
        results = read_results(rows)
    except DataError:
        return False  # written anew
    if not case.is_trained:
        method = dict(results.facts.get("method") or {})
        if (method.get("name"), method.get("seed")) != (case.head, int(case.choices.get("seed", 0))):
            return False
        if own := HEADS[case.head].fusion:
            protocol = replace(protocol, fusion=own)
    return (
        results.facts.get("checkpoint") == checkpoint
        and results.facts.get("store") == store
        and results.protocol.digest == protocol.digest
    )
