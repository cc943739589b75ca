"""Several heads trained in one process on one store: photos are read once for all of them, and heads that see the same
episodes share the correlations.

A head of a pack is the run that `pipeline.train.fit` makes: its own folder, optimiser, average, resume file and step
count. Packing changes who reads and correlates, never what a step sees: one thread of a CPU gives the same bits, and a
run may go on packed or alone as it likes.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from hsnet.errors import ConfigError
from hsnet.fused import Correlations
from pipeline.common.process_group import Alone
from pipeline.episodes.stream import Episode
from pipeline.heads.config import RunConfig
from pipeline.loading.batch import BatchParts, EpisodeBatch, read_kinds
from pipeline.loading.feeding import Feed, feed
from pipeline.loading.resident import keep
from pipeline.loading.source import FeatureSource
from pipeline.train import Event, FitSummary, Trainer, check_run, images_of, opened_trainer

Seen = tuple[object, ...]
"""What decides the episodes of a step: heads with the same see the same photos."""
Loaded = Mapping[Seen, EpisodeBatch]
Plan = tuple[bool, Mapping[Seen, Sequence[Episode]]]
"""Parts of a step's batches that are read together, and whether they are its last."""


def episodes_seen(config: RunConfig) -> Seen:
    """Two runs on one store with the same value see the same episodes at the same step.

    The initial weights have the seed of the episodes, so heads of different seeds never do.
    """
    drawn = config.fold, config.seed, config.repeat_supports, config.drop_novel_images
    return *drawn, config.batch_size, config.both_directions


def fit_packed(
    configs: Sequence[RunConfig],
    source: FeatureSource,
    run_dirs: Sequence[Path],
    *,
    device: str = "cpu",
    micro_batch: int | None = None,
    prefetch_depth: int = 2,
    resident: str = "off",
    stop: Callable[[], bool] = lambda: False,
    on_event: Callable[[int, Event], None] | None = None,
) -> list[FitSummary | Exception]:
    """Train several heads, or go on with those that are in `run_dirs`, step by step side by side.

    Step t is made by every head that has not made it yet, so a head that was stopped early catches up alone. A head
    that fails leaves the others, which go on. What a head's step waits for, and the reading and correlating it shares,
    is told in equal parts.

    Args:
        configs: what to learn, each for `source`. They may differ in anything else; those of equal `episodes_seen`
            share batches, and of them those that correlate the same (`hsnet.fused.FusedHSNet.reads`) share that too.
        source: features of all of them.
        run_dirs: one for each.
        micro_batch, device, prefetch_depth: as in `pipeline.train.fit`; the parts read ahead are those of all heads.
        resident: as there; one copy for all heads.
        stop: asked before every step; True saves all heads.
        on_event: called with the number of a head and its event.

    Returns:
        For each head what it came to, or the error that ended it; in a failed head's folder is its last save.

    Raises:
        ConfigError: not as many folders as configurations, or one folder twice. Nothing was trained.
    """
    if len(configs) != len(run_dirs):
        raise ConfigError(f"{len(configs)} heads need as many run directories, got {len(run_dirs)}.")
    if len({path.resolve() for path in run_dirs}) < len(run_dirs):
        raise ConfigError("Two heads of a pack cannot be trained in one run directory. Nothing was changed.")
    outcomes: dict[int, FitSummary | Exception] = {}
    started = time.monotonic()
    with ExitStack() as held:
        fitting = {}
        for number, config in enumerate(configs):
            try:
                check_run(config, source)
                fitting[number] = config
            except Exception as error:
                outcomes[number] = error
        images = {image for config in fitting.values() for image in images_of(config, source)}
        shared = keep(source, images, resident, device)
        trainers: dict[int, Trainer] = {}
        for number, config in fitting.items():
            tell = partial(on_event, number) if on_event else None
            try:
                trainers[number] = held.enter_context(
                    opened_trainer(config, shared, run_dirs[number], Alone(), device, micro_batch, tell)
                )
            except Exception as error:
                outcomes[number] = error
        pack = _Pack(trainers, shared, outcomes)
        finished = pack.run(stop, prefetch_depth)
        for number, trainer in pack.living.items():
            outcomes[number] = trainer.summary(
                finished or trainer.position.step >= trainer.config.steps, time.monotonic() - started
            )
    return [outcomes[number] for number in range(len(configs))]


@dataclass
class _Pack:
    """Trainers that make their steps together."""

    living: dict[int, Trainer]
    source: FeatureSource
    failed: dict[int, FitSummary | Exception]
    """Filled with the errors of heads that are no longer among the living."""

    def run(self, stop: Callable[[], bool], prefetch_depth: int) -> bool:
        """All steps; False if stopped before the last one."""
        steps = range(
            min((trainer.position.step for trainer in self.living.values()), default=0),
            max((trainer.config.steps for trainer in self.living.values()), default=0),
        )
        plans = (plan for step in steps for plan in self._plans(step))
        novel = {episodes_seen(head.config): head.novel for head in self.living.values() if head.novel}
        device = next((head.device for head in self.living.values()), "cpu")
        with closing(feed(self.source, partial(_read, novel=novel), plans, device, prefetch_depth)) as loaded:
            for step in steps:
                if stop():
                    for number, trainer in list(self.living.items()):
                        self._attempt(number, trainer.save)
                    return False
                # As many parts as were planned, also if heads have failed since.
                self._step(step, loaded)
                if not self.living:
                    break
        return True

    def _active(self, step: int) -> dict[int, Trainer]:
        """Heads that make a step: those that have not made it, and go so far."""
        return {
            number: trainer
            for number, trainer in self.living.items()
            if trainer.resumed_at <= step < trainer.config.steps
        }

    def _plans(self, step: int) -> Iterator[Plan]:
        """Parts of a step's batches, one of every kind at a time, and whether it is the step's last."""
        kinds = {episodes_seen(trainer.config): trainer for trainer in self._active(step).values()}
        # A step that nobody is left to make has one empty part, so that those who read know where it ends.
        every = list(zip_longest(*(trainer.parts(step) for trainer in kinds.values()))) or [()]
        for number, parts in enumerate(every):
            plan = {seen: part for seen, part in zip(kinds, parts, strict=True) if part is not None}
            yield number == len(every) - 1, plan

    def _step(self, step: int, loaded: Feed[Plan, Loaded]) -> None:
        heads = self._active(step)
        totals = {number: trainer.begin() for number, trainer in heads.items()}
        spent = dict.fromkeys(heads, 0.0)
        waited = shared = 0.0
        last = False
        while not last:
            before = time.perf_counter()
            (last, _), batches = next(loaded)
            waited += loaded.waited
            shared += time.perf_counter() - before - loaded.waited
            for seen, batch in batches.items():
                before = time.perf_counter()
                mine = [number for number in heads if episodes_seen(heads[number].config) == seen]
                mine = [number for number in mine if number in self.living]
                if not mine:
                    continue
                placed = heads[mine[0]].placed(batch)
                shared += time.perf_counter() - before
                while mine:  # those that correlate alike, one kind after the other
                    reads = heads[mine[0]].fused.reads
                    alike = [number for number in mine if heads[number].fused.reads == reads]
                    mine = [number for number in mine if number not in alike]
                    before = time.perf_counter()
                    correlations = self._correlate(heads[alike[0]], placed) if len(alike) > 1 else None
                    shared += time.perf_counter() - before
                    for number in alike:
                        before = time.perf_counter()
                        learn = partial(_learn, heads[number], step, placed, correlations, totals[number])
                        self._attempt(number, learn)
                        spent[number] += time.perf_counter() - before
        for number, trainer in heads.items():
            if number in self.living:
                seconds = spent[number] + (waited + shared) / len(heads)
                self._attempt(number, partial(_finish, trainer, step, totals[number], seconds, waited / len(heads)))

    def _correlate(self, trainer: Trainer, batch: EpisodeBatch) -> Correlations:
        with torch.no_grad():
            return trainer.fused.correlate(batch.query, batch.support, batch.support_mask, batch.unit)

    def _attempt(self, number: int, work: Callable[[], None]) -> None:
        """Do something of one head; if it fails, the head leaves."""
        try:
            work()
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold what the others may need the memory for
            self.failed[number] = error
            self.living.pop(number).optimiser.zero_grad(set_to_none=True)


def _learn(trainer: Trainer, step: int, batch: EpisodeBatch, correlations: Correlations | None, total: Tensor) -> None:
    total += trainer.learn(step, batch, correlations=correlations)


def _finish(trainer: Trainer, step: int, total: Tensor, seconds: float, waited: float) -> None:
    before = time.perf_counter()
    trainer.finish(step, total, lambda: seconds + time.perf_counter() - before, waited)
    trainer.book()


def _read(
    source: FeatureSource, plan: Plan, novel: Mapping[Seen, Sequence[int]], once: bool
) -> BatchParts[Mapping[Seen, EpisodeBatch]]:
    """Batches of a plan; a photo that is in several is read once. Marks the `novel` classes where a head wants that."""
    _, kinds = plan
    wanted = {seen: (episodes, novel.get(seen, ())) for seen, episodes in kinds.items()}
    return read_kinds(source, wanted, once=once or len(kinds) > 1)
