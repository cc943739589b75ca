"""The sweep stage: many configurations over one or more stores, each trained where it needs to be, tested and kept.

A case is one store, one fold, one head and one value of every choice that is varied. A trained one has a run directory,
every one has rows of its own; so a sweep that was interrupted, or given more values, does only what is missing, and
everything that reads runs and rows (`hsnet analyze`, `hsnet report`) reads a sweep's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from hsnet.errors import CheckpointMismatch, ConfigError, DataError, HSNetError
from pipeline.analyze import Score, analyze
from pipeline.common.fields import read_choice
from pipeline.common.files import write_table
from pipeline.common.runner import Runner, SerialRunner
from pipeline.common.text import did_you_mean
from pipeline.episodes.protocols import Protocol
from pipeline.evaluate.plan import EvaluationPlan, plan_evaluation
from pipeline.evaluate.stage import evaluate
from pipeline.heads.catalogue import HEADS, trained
from pipeline.heads.config import FINETUNING, RunConfig
from pipeline.heads.learner import LEARNED_HEADS, LEARNER_CHOICES, learner_arguments
from pipeline.heads.run_dir import stored_config
from pipeline.heads.training import DEFAULT_RECIPE, training_choices
from pipeline.loading.source import StoreSource
from pipeline.scores.rows import read_results
from pipeline.train import Event, fit

TRAINED = LEARNED_HEADS
"""Heads of a sweep that are trained, the published one first; the others are those of the catalogue."""

RECIPES = tuple(dict.fromkeys((DEFAULT_RECIPE, "hsnet")))
"""Training recipes of a case that names none: the first, unless its run directory was begun with another of them."""

STEPS = 10_000
"""Of a case that does not say."""

_DECIDED = {"fold", "recipe", "data", "skipped", "learner", *FINETUNING}


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


def sweep_choices() -> dict[str, Any]:
    """Name -> type of every choice that can be fixed or varied: of the training (fields of `RunConfig`, and `recipe`,
    the name of a set of them) and of the learner (`pipeline.heads.learner`)."""
    training = {name: kind for name, kind in get_type_hints(RunConfig).items() if name not in _DECIDED}
    learner = {name: kind for name, kind in LEARNER_CHOICES.items() if name != "head"}
    return {"recipe": str, **training, **learner}


def head_names() -> tuple[str, ...]:
    """Heads that a sweep can test."""
    return (*TRAINED, *(name for name in HEADS if name not in TRAINED))


def parse_axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """ "learning_rate=1e-3,1e-4" -> ("learning_rate", (0.001, 0.0001)): a choice and its values.

    Values that hold commas themselves are separated by semicolons: "layers=all;1,3".

    Raises:
        ConfigError: no such choice, one that the sweep decides, no value, or a value of another type.
    """
    kinds = sweep_choices()
    name, equals, values = text.partition("=")
    if not equals or name not in kinds:
        near = did_you_mean(name, kinds)
        raise ConfigError(f"'{text}' is not CHOICE=VALUE with a choice of {', '.join(kinds)}{near}")
    apart = ";" if ";" in values or get_origin(kinds[name]) is tuple else ","
    return name, tuple(dict.fromkeys(read_choice(f"{name}={word}", kinds)[1] for word in values.split(apart)))


def parse_fixed(text: str) -> tuple[str, Any]:
    """ "learning_rate=1e-3" -> ("learning_rate", 0.001), "layers=1,3" -> ("layers", "1,3"). Raises ConfigError."""
    name, _, value = text.partition("=")
    if value and sweep_choices().get(name) is str:
        return name, value
    name, values = parse_axis(text)
    if len(values) > 1:
        raise ConfigError(f"--fix {name} takes one value; use --vary {name}=... for several.")
    return name, values[0]


def make_cases(
    stores: Sequence[str],
    folds: Sequence[int],
    varied: Mapping[str, Sequence[Any]],
    fixed: Mapping[str, Any],
    heads: Sequence[str] = TRAINED[:1],
    transfer: Sequence[str] = (),
) -> list[Case]:
    """Every combination of store, head, fold and varied values, folds last, so that configurations become whole early.

    A head that needs no training is tested once per store, fold and seed, whatever else is varied.

    Raises:
        ConfigError: nothing to do, two stores of one name, no such head, an empty axis, or a choice both varied and
            fixed.
    """
    if both := set(varied) & set(fixed):
        raise ConfigError(f"{', '.join(sorted(both))} cannot be both varied and fixed.")
    if empty := [name for name, values in varied.items() if not values]:
        raise ConfigError(f"{empty[0]} is varied over no value at all. Give it values, or leave it out.")
    known = head_names()
    if odd := [head for head in heads if head not in known]:
        raise ConfigError(f"No head '{odd[0]}' for a sweep: choose of {', '.join(known)}{did_you_mean(odd[0], known)}")
    for recipe in (*varied.get("recipe", ()), *([fixed["recipe"]] if "recipe" in fixed else [])):
        training_choices(recipe)  # refuses one that there is not
    names = [store_name(store) for store in stores]
    if len(set(names)) < len(names):
        raise ConfigError(f"Stores of a sweep need different names, got {', '.join(names)}.")
    cases = []
    for (name, store), head in itertools.product(zip(names, stores, strict=True), dict.fromkeys(heads)):
        is_trained = head in TRAINED
        axes = {axis: values for axis, values in varied.items() if is_trained or axis == "seed"}
        settings = {choice: value for choice, value in fixed.items() if is_trained or choice == "seed"}
        for values in itertools.product(*axes.values()):
            choices = dict(zip(axes, values, strict=True))
            parts = [name, *([] if head == TRAINED[0] else [f"head={head}"])]
            configuration = "-".join([*parts, *(f"{choice}={_word(value)}" for choice, value in choices.items())])
            more = tuple(transfer) if is_trained else ()
            cases += [
                Case(f"{configuration}-fold{fold}", configuration, store, fold, {**settings, **choices}, head, more)
                for fold in folds
            ]
    if not cases:
        raise ConfigError("There is nothing to sweep over: give at least one store, one fold and one head.")
    return cases


def store_name(store: str) -> str:
    """What a store is called in the names of cases.

    >>> store_name("features/voc.zarr")
    'voc'
    """
    return Path(store).name.removesuffix(".zarr")


def _word(value: Any) -> str:
    """A value in the name of a folder."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text.replace("/", "+")


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
    require_sweepable(protocol)
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


def require_sweepable(protocol: Protocol) -> None:
    """Refuse a protocol of several ways, or one that scores at original size. Raises ConfigError."""
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


def _run_case(
    open_source: Callable[[str], StoreSource],
    out: Path,
    protocol: Protocol,
    device: str,
    stop: Callable[[], bool],
    on_step: Callable[[Case, Event], None] | None,
    case: Case,
) -> CaseDone:
    run_dir, rows = out / case.name, rows_of(out, case)
    try:
        source = open_source(case.store)
        if not case.is_trained:
            if not is_tested(rows, case, "", source.store.identity, protocol):
                _test_untrained(rows, case, source, protocol, device)
            return CaseDone(case, None, rows, 0, False)
        config = run_config(case, source, run_dir)
        fitted = fit(config, source, run_dir, device=device, stop=stop, on_event=on_step and partial(on_step, case))
        is_new = fitted.resumed_at < fitted.steps
        if not fitted.finished:
            return CaseDone(case, run_dir, None, fitted.steps, is_new, "interrupted; the same command goes on")
        method = trained(run_dir, source, device)
        if not is_tested(rows, case, method.checkpoint, source.store.identity, protocol):
            plan = EvaluationPlan(method=method, source=source, fold=case.fold, protocol=protocol, device=device)
            write_table(rows, evaluate(plan).rows)
        moved = _transfer(case, open_source, out, run_dir, method.checkpoint, protocol, device)
        return CaseDone(case, run_dir, rows, fitted.steps, is_new, None, moved)
    except HSNetError as error:
        return CaseDone(case, run_dir if case.is_trained else None, None, 0, False, str(error))


def rows_of(out: Path, case: Case, other: str = "") -> Path:
    """Where a case's rows lie: of its own store, or of another one by name."""
    return out / f"{case.name}{f'-on-{other}' if other else ''}.parquet"


def _test_untrained(rows: Path, case: Case, source: StoreSource, protocol: Protocol, device: str) -> None:
    """Test a head that needs no training, fitted on the fold's training episodes where it has to be, by the protocol
    with the head's own way to combine supports. Its facts name the case's seed."""
    seed = int(case.choices.get("seed", 0))
    plan = plan_evaluation(
        partial(_same, source), replace(protocol, seeds=(seed,)), head=case.head, fold=case.fold, device=device
    )
    method = replace(plan.method, facts={**plan.method.facts, "seed": seed})
    rules = replace(plan.protocol, seeds=protocol.seeds)
    write_table(rows, evaluate(replace(plan, method=method, protocol=rules, dataset=None)).rows)


def _transfer(
    case: Case,
    open_source: Callable[[str], StoreSource],
    out: Path,
    run_dir: Path,
    checkpoint: str,
    protocol: Protocol,
    device: str,
) -> dict[str, Path]:
    """Test a head on other data: on those of the stores whose features are of its kind.

    Raises:
        ConfigError: none is.
    """
    moved: dict[str, Path] = {}
    for store in case.transfer:
        source, name = open_source(store), store_name(store)
        rows = rows_of(out, case, name)
        with suppress(CheckpointMismatch):
            if not is_tested(rows, case, checkpoint, source.store.identity, protocol):
                plan = plan_evaluation(
                    partial(_same, source), protocol, checkpoint=run_dir, transfer=True, device=device
                )
                write_table(rows, evaluate(replace(plan, dataset=None)).rows)
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


def _configurations(done: Sequence[CaseDone]) -> list[Configuration]:
    """Means over folds, in the order of the cases; other data after the sweep's own, each fold's classes apart."""
    folds: dict[str, dict[int, Path]] = {}
    moved: list[tuple[str, int, Path]] = []
    for case_done in done:
        case = case_done.case
        if case_done.rows is not None:
            folds.setdefault(case.configuration, {})[case.fold] = case_done.rows
        moved += [(f"{case.configuration}-on-{name}", case.fold, rows) for name, rows in case_done.transferred.items()]
    configurations = []
    for name, rows in [*folds.items(), *((name, {fold: path}) for name, fold, path in moved)]:
        analysis = analyze([read_results(path) for path in rows.values()], sections=())
        scores = [score for score in analysis.scores if len(rows) == 1 or score.fold is None]
        configurations.append(Configuration(name, tuple(rows), tuple(scores)))
    return configurations
