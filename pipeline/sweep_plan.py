"""What a sweep would do, told before anything is trained: what is there already, and how long the rest may take.

Nothing is written. Seconds come from the sweep's own runs and rows, as the machine was then; for what nothing of its
kind has run, a few episodes are timed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open

from hsnet.errors import CheckpointError, DataError, HSNetError
from hsnet.fused import FusedHSNet
from hsnet.loss import episode_losses
from hsnet.model import HSNet
from pipeline.common.runner import one_torch_thread
from pipeline.episodes.protocols import Protocol
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.heads.config import RunConfig
from pipeline.heads.run_dir import CONFIG, RESUME, RunDir, read_metrics
from pipeline.heads.segmenters import LearnedSegmenter
from pipeline.loading.batch import EpisodeBatch, load_batch
from pipeline.loading.source import StoreSource
from pipeline.scores.rows import read_results
from pipeline.sweep import require_sweepable
from pipeline.sweep_case import STEPS, Case, is_tested, rows_of, run_config, store_name
from pipeline.train import training_stream

State = Literal["done", "test", "go on", "train", "missing", "refused"]
STATES: tuple[State, ...] = get_args(State)

_TIMED = 2
"""Episodes that are timed where no run tells seconds."""

RECENT = 200
"""Steps of a run whose median tells its rate: the last ones, after warming up."""


@dataclass(frozen=True)
class PlannedCase:
    """What a sweep would do about one case."""

    case: Case
    state: State
    """done: nothing; test: only test; go on, train: train from `step`, then test; missing: its store is not there;
    refused: it would fail, as `note` says."""
    step: int
    """Optimiser steps that are done."""
    steps: int
    """Optimiser steps in all; 0 for a head that needs no training."""
    seconds: float | None
    """What is left may take, without validations; None where nothing tells."""
    note: str = ""
    measured: bool = False
    """Whether the seconds come from episodes timed for the plan, and not from runs."""


def plan_sweep(
    cases: Sequence[Case],
    open_source: Callable[[str], StoreSource],
    out: Path,
    protocol: Protocol,
    measure_on: str | None = None,
) -> list[PlannedCase]:
    """What `pipeline.sweep.sweep` would do with the same arguments.

    Args:
        open_source: opens a store; one that cannot be opened makes its cases "missing".
        measure_on: a device to time `_TIMED` episodes on, once for all cases that cost the same, where no run tells the
            seconds of a trained head; None leaves them unknown.

    Raises:
        ConfigError: `protocol` asks for original size.
    """
    require_sweepable(protocol)
    sources: dict[str, StoreSource | HSNetError] = {}
    for store in dict.fromkeys(store for case in cases for store in (case.store, *case.transfer)):
        try:
            sources[store] = open_source(store)
        except HSNetError as error:
            sources[store] = error
    rates = _Rates(cases, out)
    timed = _Timed(measure_on)
    return [_planned(case, sources, rates, timed, out, protocol) for case in cases]


def _planned(
    case: Case,
    sources: dict[str, StoreSource | HSNetError],
    rates: _Rates,
    timed: _Timed,
    out: Path,
    protocol: Protocol,
) -> PlannedCase:
    wanted = int(case.choices.get("steps", STEPS)) if case.is_trained else 0
    for store in (case.store, *case.transfer):
        if isinstance(error := sources[store], HSNetError):
            return PlannedCase(case, "missing", 0, wanted, None, str(error).splitlines()[0])
    source = sources[case.store]
    assert isinstance(source, StoreSource)
    episodes = protocol.episodes * len(protocol.seeds)
    if not case.is_trained:
        if is_tested(rows_of(out, case), case, "", source.store.identity, protocol):
            return PlannedCase(case, "done", 0, 0, 0.0)
        return PlannedCase(case, "test", 0, 0, rates.test(case, episodes))
    run_dir = out / case.name
    try:
        config = run_config(case, source, run_dir)
        RunDir(run_dir, config, write=False)  # refuses a run of another configuration
        step = _steps_done(run_dir)
        checkpoint = load_checkpoint(run_dir).digest if step >= config.steps else ""
    except HSNetError as error:
        return PlannedCase(case, "refused", 0, wanted, None, str(error))
    if checkpoint:
        places = [(rows_of(out, case), source)]
        for store in case.transfer:
            other = sources[store]
            assert isinstance(other, StoreSource)
            if rows_of(out, case, store_name(store)).exists():
                places.append((rows_of(out, case, store_name(store)), other))
        if all(is_tested(rows, case, checkpoint, one.store.identity, protocol) for rows, one in places) and len(
            places
        ) > bool(case.transfer):
            return PlannedCase(case, "done", step, config.steps, 0.0)
        return PlannedCase(case, "test", step, config.steps, rates.test(case, episodes))
    per_step, test, measured = rates.training(case), rates.test(case, episodes), False
    if per_step is None and timed.device is not None:
        per_step, per_answer = timed.seconds(config, source)
        measured, test = True, test if test is not None else episodes * max(protocol.shots) * per_answer
    seconds = None if per_step is None else per_step * (config.steps - step) + (test or 0.0)
    return PlannedCase(case, "go on" if step else "train", step, config.steps, seconds, measured=measured)


def _steps_done(run_dir: Path) -> int:
    """The step that a run would go on from; 0 where none was saved.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = run_dir / RESUME
    if not (run_dir / CONFIG).is_file() or not file.is_file():
        return 0
    try:
        with safe_open(file, "pt") as tensors:
            return int(json.loads(tensors.metadata()["progress"])["step"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Nothing was changed; delete it to start anew.") from None


class _Rates:
    """Seconds per step and per test episode that the sweep's runs and rows tell: of the same configuration where one
    of its folds has begun, else of other cases on the same store."""

    def __init__(self, cases: Sequence[Case], out: Path) -> None:
        self._steps: dict[tuple[str, ...], list[float]] = {}
        self._episodes: dict[tuple[str, ...], list[float]] = {}
        for case in cases:
            if case.is_trained and (seconds := _step_seconds(out / case.name)):
                for key in _keys(case):
                    self._steps.setdefault(key, []).append(seconds)
            if seconds := _episode_seconds(rows_of(out, case)):
                for key in _keys(case):
                    self._episodes.setdefault(key, []).append(seconds)

    def training(self, case: Case) -> float | None:
        """Seconds of a step."""
        return next((median(self._steps[key]) for key in _keys(case) if key in self._steps), None)

    def test(self, case: Case, episodes: int) -> float | None:
        """Seconds of a test."""
        found = next((median(self._episodes[key]) for key in _keys(case) if key in self._episodes), None)
        return None if found is None else episodes * found


class _Timed:
    """Seconds of a step, and of a one-shot answer, measured on the first training episodes."""

    def __init__(self, device: str | None) -> None:
        self.device = device
        self._known: dict[str, tuple[float, float]] = {}

    def seconds(self, config: RunConfig, source: StoreSource) -> tuple[float, float]:
        """Of a step of the run, and of one support of a test episode."""
        costs = config.learner, config.arithmetic, config.both_directions, source.store.identity
        key = repr(costs)
        if key not in self._known:
            with one_torch_thread():
                self._known[key] = self._measure(config, source)
        training, answer = self._known[key]
        return training * config.episodes_per_step, answer

    def _measure(self, config: RunConfig, source: StoreSource) -> tuple[float, float]:
        stream = training_stream(config, source)
        model = HSNet(**config.learner_arguments).to(self.device)
        learner, segmenter = FusedHSNet(model, config.arithmetic), LearnedSegmenter(model, config.arithmetic)

        def batch() -> EpisodeBatch:
            assert self.device is not None
            return load_batch(source, [stream[number] for number in range(_TIMED)]).to(self.device)

        def step() -> None:
            drawn = batch().both_directions() if config.both_directions else batch()
            logits = learner(drawn.query, drawn.support, drawn.support_mask, drawn.unit)
            episode_losses(logits, drawn.target, drawn.ignore, config.boundary).mean().backward()

        def answer() -> None:
            drawn = batch()
            segmenter.answer(drawn).count(drawn).cpu()

        taken = []
        for work in (step, answer):
            work()  # to warm up
            began = time.perf_counter()
            work()
            if str(self.device).startswith("cuda"):
                torch.cuda.synchronize()
            taken.append((time.perf_counter() - began) / _TIMED)
        return taken[0], taken[1]


def _keys(case: Case) -> tuple[tuple[str, ...], ...]:
    return (case.configuration,), (case.store, case.head)


def _step_seconds(run_dir: Path) -> float:
    """Median of a run's last steps; 0 where it did not say."""
    try:
        lines = [line.get("train") for line in read_metrics(run_dir)]
    except CheckpointError:
        return 0.0
    seconds = [line["seconds"] for line in lines if isinstance(line, dict) and isinstance(line.get("seconds"), float)]
    return median(seconds[-RECENT:]) if seconds else 0.0


def _episode_seconds(rows: Path) -> float:
    """Mean of the rows of the most shots, of which one pass gives all others; 0 where there are none."""
    if not rows.exists():
        return 0.0
    try:
        results = read_results(rows)
    except DataError:
        return 0.0
    shots, seconds = (results.table[name].to_numpy() for name in ("shots", "seconds"))
    return float(seconds[shots == shots.max()].mean())
