"""The sweep stage: many configurations over one or more stores, each trained where it needs to be, tested and kept.

A case is one store, one fold, one head and one value of every choice that is varied. A trained one has a run directory,
every one has rows of its own; so a sweep that was interrupted, or given more values, does only what is missing, and
everything that reads runs and rows (`hsnet analyze`, `hsnet report`) reads a sweep's.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from hsnet.errors import ConfigError, StoreError
from pipeline.analyze import Score, analyze
from pipeline.common.fields import read_choice
from pipeline.common.lock import sole_writer
from pipeline.common.runner import Runner, SerialRunner
from pipeline.common.text import did_you_mean
from pipeline.episodes.protocols import Protocol
from pipeline.heads.catalogue import HEADS
from pipeline.heads.config import FINETUNING, RunConfig
from pipeline.heads.learner import LEARNER_CHOICES
from pipeline.heads.training import training_choices
from pipeline.loading.source import StoreSource
from pipeline.scores.rows import read_results
from pipeline.sweep_case import TRAINED, Case, CaseDone, Job, lost, rows_of, run_cases, store_name
from pipeline.sweep_status import Board, CaseStatus
from pipeline.train import Event

WATCH_SECONDS = 0.5
"""Seconds between two looks at the cases that run."""

_DRAWN = ("batch_size", "both_directions", "drop_novel_images", "repeat_supports")

log = logging.getLogger(__name__)

_DECIDED = {"fold", "recipe", "data", "skipped", "learner", *FINETUNING}


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
    resident: str = "off",
    pack: int = 1,
    on_case: Callable[[CaseDone], None] | None = None,
    on_progress: Callable[[Sequence[CaseStatus]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[Case, Event], None] | None = None,
) -> Sweep:
    """Train and test every case, and put the results together.

    A case that fails, for whatever reason, is reported with its kind and its log, and the others are done. `out` holds
    a run directory and a file of rows per case.

    Args:
        open_source: opens a store, in any process; must be picklable for Ray.
        protocol: how each best checkpoint is tested.
        runner: with several workers, as many cases (or packs) are trained at a time, each in one process.
        resident: keep the images of training in memory (`pipeline.loading.resident.keep`): "host" once per machine,
            whatever the number of cases, "device" once per case or pack.
        pack: heads trained in one process on the same reading (`pipeline.packed`); 1 trains each by itself.
        on_case: called when a case is done.
        on_progress: called about twice a second, on another thread, with the cases that run.
        stop: asked in this process. When it is True, cases in training are saved after their step, wherever they run,
            and the rest is left for another call.
        on_step: called where a case is trained, with the case and its training events; must be picklable for Ray.

    Raises:
        ConfigError: `protocol` asks for original size, which a sweep does not read masks for, or for several ways; or
            `pack` is below 1.
        StoreError: another sweep runs in `out`, or it cannot be written.
    """
    require_sweepable(protocol)
    if pack < 1:
        raise ConfigError(f"A pack has at least one head, got {pack}. Nothing was trained.")
    runner = runner or SerialRunner()
    here = isinstance(runner, SerialRunner)
    out = out.absolute()  # a worker may have another working directory
    board = Board(out)
    job = Job(open_source, out, protocol, device, resident, board, stop if here else None, on_step)
    packs = make_packs(cases, out, pack, runner.workers)
    done: list[CaseDone] = []
    with ExitStack() as held:
        _hold(out, board, held)
        held.enter_context(_watching(board, [case.name for case in cases], stop, on_progress))
        waiting = itertools.takewhile(lambda _: not stop(), packs)
        for _, results in runner.map(lambda: partial(run_cases, job), waiting, partial(lost, job)):
            for result in results:
                done.append(result)
                if on_case:
                    on_case(result)
    done.sort(key=lambda case_done: cases.index(case_done.case))
    return Sweep(tuple(done), tuple(_configurations(done)))


def _hold(out: Path, board: Board, held: ExitStack) -> None:
    """Be the only sweep in a folder. Raises StoreError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(sole_writer(out))
        held.callback(board.close)
        board.open()
    except OSError as error:
        raise StoreError(f"A sweep cannot write to {out}: {error.strerror or error}. Nothing was trained.") from error


@contextmanager
def _watching(
    board: Board,
    names: Sequence[str],
    stop: Callable[[], bool],
    on_progress: Callable[[Sequence[CaseStatus]], None] | None,
) -> Iterator[None]:
    """Pass on the wish to stop, and what cases tell, while this thread waits for them."""
    ended = threading.Event()

    def watch() -> None:
        asked = False
        while not ended.wait(WATCH_SECONDS):
            if stop() and not asked:
                board.ask_to_stop()
                asked = True
            if on_progress:
                on_progress(board.read(names))

    thread = threading.Thread(target=watch, name="sweep-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def make_packs(cases: Sequence[Case], out: Path, pack: int, workers: int = 1) -> list[tuple[Case, ...]]:
    """Cases that are trained together: of one store, those that see the same episodes beside each other.

    A head that needs no training and a case whose rows are there are by themselves, and so is what is left over; a note
    says so. Cases of fewer packs than `workers` leave some of those idle; a note says that, too.
    """
    if pack == 1:
        return [(case,) for case in cases]
    begun = [case for case in cases if case.is_trained and not rows_of(out, case).exists()]
    packs: list[tuple[Case, ...]] = []
    for store in dict.fromkeys(case.store for case in begun):
        mine = sorted((case for case in begun if case.store == store), key=_seen)
        packs += [tuple(mine[first : first + pack]) for first in range(0, len(mine), pack)]
    alone = [case for case in cases if case not in begun]
    alike = [one[0].name for one in packs if len(one) == 1]
    if untrained := sum(not case.is_trained for case in alone):
        log.info("%d cases need no training and are not packed", untrained)
    if alike:
        log.info("Trained alone, with no other case of its store left to be packed with: %s", ", ".join(alike))
    if len(packs) < min(workers, len(begun)):
        log.info("%d packs for %d workers: a smaller --pack would keep more of them busy", len(packs), workers)
    return [*packs, *((case,) for case in alone)]


def _seen(case: Case) -> tuple[int, int, str]:
    """Sorts cases that see the same episodes together (`pipeline.packed.episodes_seen`)."""
    others = {name: case.choices[name] for name in _DRAWN if name in case.choices}
    return case.fold, int(case.choices.get("seed", 0)), repr(sorted(others.items()))


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
