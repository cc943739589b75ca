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
from typing import Any

from hsnet.errors import ConfigError, DataError, HSNetError
from pipeline.analyze import Score, analyze
from pipeline.common.files import write_table
from pipeline.common.runner import Runner, SerialRunner
from pipeline.episodes.protocols import Protocol
from pipeline.evaluate import evaluate
from pipeline.heads import methods
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.heads.config import RunConfig, skipped_digest
from pipeline.loading.source import StoreSource
from pipeline.scores.rows import read_results
from pipeline.train import fit

_DECIDED = {"fold", "recipe", "data", "skipped", "learner"}


@dataclass(frozen=True)
class Case:
    """One configuration to train and to test."""

    name: str
    """Of its run directory, and with `.parquet` of its rows."""
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


def parse_choice(text: str) -> tuple[str, tuple[Any, ...]]:
    """ "learning_rate=1e-3,1e-4" -> ("learning_rate", (0.001, 0.0001)): a field of `RunConfig` and its values.

    Raises:
        ConfigError: no such field, one that the sweep decides, or a value of another type.
    """
    kinds = {
        item.name: str(item.type)
        for item in fields(RunConfig)
        if item.name not in _DECIDED and str(item.type) in ("int", "float", "str", "bool")
    }
    name, equals, values = text.partition("=")
    if not equals or name not in kinds:
        raise ConfigError(f"'{text}' is not CHOICE=VALUE with a choice of {', '.join(kinds)}.")
    words = {"true": True, "yes": True, "false": False, "no": False}
    readers: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": float,
        "str": str,
        "bool": lambda word: words[word.lower()],
    }
    try:
        return name, tuple(dict.fromkeys(readers[kinds[name]](value.strip()) for value in values.split(",")))
    except (ValueError, KeyError):
        wanted = {"int": "whole numbers", "float": "numbers", "bool": "yes or no"}[kinds[name]]
        raise ConfigError(f"{name} must be {wanted}, got '{values}'.") from None


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
    stop: Callable[[], bool] = lambda: False,
    on_case: Callable[[CaseDone], None] | None = None,
    on_step: Callable[[Case, Any], None] | None = None,
) -> Sweep:
    """Train and test every case, and put the results together.

    A case that fails is reported, and the others are done. `out` holds a run directory and a file of rows per case.

    Args:
        open_source: opens a store, in any process; must be picklable for Ray.
        protocol: how each best checkpoint is tested.
        runner: with several workers, as many cases are trained at a time, each in one process.
        stop: asked before every training step; the case is saved, and the rest is left for another call. Not heard by
            workers on Ray.
        on_case: called when a case is done. on_step: with the case and a training event, in this process only.

    Raises:
        ConfigError: `protocol` asks for original size, which a sweep does not read masks for.
    """
    if protocol.resolution != "network":
        raise ConfigError(
            "A sweep tests at network size. Test its checkpoints at original size with `hsnet evaluate --data-root`, "
            "or choose another protocol (--protocol, or --set resolution=network). Nothing was trained."
        )
    runner = runner or SerialRunner()
    alone = isinstance(runner, SerialRunner)
    listener = on_step if alone else None
    make_worker = partial(_worker, open_source, out, protocol, device, stop if alone else _never, listener)
    done: list[CaseDone] = []
    for case, result in runner.map(make_worker, cases):
        assert case == result.case
        done.append(result)
        if on_case:
            on_case(result)
        if alone and stop():
            break
    order = {case.name: place for place, case in enumerate(cases)}
    done.sort(key=lambda one: order[one.case.name])
    return Sweep(tuple(done), tuple(_configurations(done)))


def _never() -> bool:
    return False


def _worker(
    open_source: Callable[[str], StoreSource],
    out: Path,
    protocol: Protocol,
    device: str,
    stop: Callable[[], bool],
    on_step: Callable[[Case, Any], None] | None,
) -> Callable[[Case], CaseDone]:
    def run(case: Case) -> CaseDone:
        run_dir = out / case.name
        try:
            return _run_case(case, open_source(case.store), run_dir, protocol, device, stop, on_step)
        except HSNetError as error:
            return CaseDone(case, run_dir, None, 0, False, str(error))

    return run


def _run_case(
    case: Case,
    source: StoreSource,
    run_dir: Path,
    protocol: Protocol,
    device: str,
    stop: Callable[[], bool],
    on_step: Callable[[Case, Any], None] | None,
) -> CaseDone:
    config = RunConfig(
        **{
            "fold": case.fold,
            "recipe": source.recipe,
            "data": source.index.digest,
            "skipped": skipped_digest([source.index.images[image] for image in source.skipped]),
            "steps": 10_000,
            **case.choices,
        }
    )
    fitted = fit(config, source, run_dir, device=device, stop=stop, on_event=on_step and partial(on_step, case))
    trained = fitted.resumed_at < fitted.steps
    if not fitted.finished:
        return CaseDone(case, run_dir, None, fitted.steps, trained, "interrupted; the same command goes on")
    rows = run_dir.with_name(f"{case.name}.parquet")
    checkpoint = load_checkpoint(run_dir)
    if not _tested(rows, checkpoint.digest, source.store.identity, protocol):
        method = methods.trained(run_dir, source, device)
        result = evaluate(
            method.make,
            lambda: source,
            source.index,
            fold=case.fold,
            protocol=protocol,
            skipped=tuple(source.skipped),
            device=device,
            store=source.store.identity,
            checkpoint=checkpoint.digest,
            facts={
                "method": method.facts,
                "recipe": source.recipe.to_dict(),
                "paths": {"store": source.store.path, "checkpoint": str(run_dir.absolute()), "data_root": None},
            },
        )
        write_table(rows, result.rows)
    return CaseDone(case, run_dir, rows, fitted.steps, trained)


def _tested(rows: Path, checkpoint: str, store: str, protocol: Protocol) -> bool:
    """Whether the rows are those of this head, these features and these rules."""
    if not rows.exists():
        return False
    try:
        found = read_results(rows)
    except DataError:
        return False  # written anew
    return (
        found.facts.get("checkpoint") == checkpoint
        and found.facts.get("store") == store
        and found.protocol.digest == protocol.digest
    )


def _configurations(done: Sequence[CaseDone]) -> list[Configuration]:
    """Means over folds, in the order of the cases."""
    groups: dict[str, list[CaseDone]] = {}
    for one in done:
        if one.rows is not None:
            groups.setdefault(one.case.configuration, []).append(one)
    found = []
    for name, cases in groups.items():
        analysis = analyze([read_results(one.rows) for one in cases if one.rows is not None], sections=())
        scores = [score for score in analysis.scores if len(cases) == 1 or score.fold is None]
        found.append(Configuration(name, tuple(one.case.fold for one in cases), tuple(scores)))
    return found
