"""The train stage: episodes by counter, steps, validation on episodes that are never tested on.

Step t of a run always sees the same episodes and starts from the same weights, whatever the number of workers, the
micro-batch or how often it was interrupted: a run is its configuration.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hsnet.backbone import FinetunedBackbone
from hsnet.errors import CheckpointError, ConfigError, HSNetError
from hsnet.finetune import FinetunedHSNet, FusedFinetunedHSNet
from hsnet.fused import Correlations, FusedHSNet
from hsnet.loss import episode_losses
from hsnet.metrics import foreground_background_iou, mean_iou, sum_by_class
from hsnet.model import HSNet
from pipeline.common.figures import READ_STEPS, Unread
from pipeline.common.files import clear_partials
from pipeline.common.lock import sole_writer
from pipeline.common.out_of_memory import memory_told
from pipeline.common.process_group import Alone, Ranks
from pipeline.episodes.stream import Episode, EpisodeStream, batch_numbers
from pipeline.features.recipe import difference_lines
from pipeline.heads.config import RunConfig, features_of
from pipeline.heads.contrast import ContrastSegmenter
from pipeline.heads.events import RECENT_STEPS, Baseline, Event, FitSummary, StepDone, Validated
from pipeline.heads.run_dir import Position, RunDir
from pipeline.heads.scene import without_background
from pipeline.heads.segmenters import LearnedSegmenter, Segmenter
from pipeline.heads.training import WeightAverage, less_memory, make_optimiser, rate_at, set_rate
from pipeline.loading.batch import EpisodeBatch, prefetch
from pipeline.loading.feeding import Feed
from pipeline.loading.resident import keep
from pipeline.loading.source import FeatureSource, PhotoSource

log = logging.getLogger(__name__)

SAVE_SECONDS = 60
"""A killed run loses at most about this much work; an interrupted one nothing."""


def fit(
    config: RunConfig,
    source: FeatureSource,
    run_dir: Path,
    *,
    ranks: Ranks | None = None,
    device: str = "cpu",
    micro_batch: int | None = None,
    prefetch_depth: int = 2,
    resident: str = "off",
    read_every: int | None = None,
    baseline: bool = False,
    stop: Callable[[], bool] = lambda: False,
    on_event: Callable[[Event], None] | None = None,
) -> FitSummary:
    """Train a learner, or continue the run that is in `run_dir`.

    Args:
        config: what to learn; must be the one stored in `run_dir` if there is a run, except for `steps`.
        source: features of `config.recipe`; a `PhotoSource` if the backbone is trained too.
        ranks: this process's place in a group; alone by default. The batch is split over the ranks.
        micro_batch: losses per forward pass (see `RunConfig.batch_size`); less needs less memory and gives the same
            steps up to rounding.
        prefetch_depth: micro-batches read ahead on a background thread; 0 reads in line.
        resident: keep the images of the run in memory, see `pipeline.loading.resident.keep`. Changes no step.
        read_every: steps whose losses are read together, and told then; by default each on a CPU and `READ_STEPS` on
            other devices, which would wait. Whatever it is, they are read before a validation and before a save, so
            that weights that are not numbers are never kept. Changes no step.
        baseline: with the first validation of this call, tell a `Baseline` once. Changes no step.
        stop: asked before every step; True on any rank saves and returns, in a group at the next reading.
        on_event: called on rank 0 with every `Event`, in order.

    Raises:
        ConfigError: another run is in `run_dir`; no such fold; a class with one image; features of another recipe.
        StoreError: another process is training in `run_dir`.
        DeviceMemoryError: a step takes more memory than there is; names the option, the run is as it was saved last.
    """
    ranks = ranks or Alone()
    given = config, source, run_dir, ranks, device, micro_batch, on_event, resident, read_every
    kept = f"{run_dir} is as it was saved last, and goes on from there."
    with memory_told(less_memory(config, micro_batch, resident), kept), opened_trainer(*given, baseline) as trainer:
        started = time.monotonic()
        finished = trainer.run_steps(stop, prefetch_depth)
    return trainer.summary(finished, time.monotonic() - started)


@contextmanager
def opened_trainer(
    config: RunConfig,
    source: FeatureSource,
    run_dir: Path,
    ranks: Ranks,
    device: str,
    micro_batch: int | None,
    on_event: Callable[[Event], None] | None,
    resident: str = "off",
    read_every: int | None = None,
    baseline: bool = False,
) -> Iterator[Trainer]:
    """A run where it stands, held for writing inside the block. Arguments and errors are those of `fit`."""
    stream, selection = check_run(config, source)
    torch.manual_seed(config.seed)
    model = make_model(config, source).to(device)
    optimiser = make_optimiser(config, model)
    average = WeightAverage(model, config.average) if config.average else None
    trained = [source.index.classes[class_id] for class_id in source.index.split(config.fold, "trn").class_ids]
    run = RunDir(run_dir, config, write=ranks.rank == 0, classes=trained)
    with ExitStack() as held:
        if ranks.rank == 0:  # two trainings in one folder would undo each other's saves
            held.enter_context(sole_writer(run_dir))
            clear_partials(run_dir)
        source = keep(source, images_of(config, source), resident, device, ranks.rank, ranks.world_size)
        ranks.sum(torch.tensor(0))  # waits: the first rank may still be writing what it was stopped at
        position = run.load(model, optimiser, average.model if average else None)
        if int(ranks.sum(torch.tensor(position.step))) != position.step * ranks.world_size:
            raise CheckpointError(
                f"The workers found different states of the run in {run_dir}. Put --run-dir on a file system that all "
                "machines share. Nothing was changed."
            )
        trainer = Trainer(
            config=config,
            source=source,
            run=run,
            ranks=ranks,
            model=model,
            optimiser=optimiser,
            average=average,
            position=position,
            stream=stream,
            selection=selection,
            device=device,
            micro_batch=max(1, (micro_batch or config.batch_size) // config.directions),
            on_event=on_event,
            read_every=read_every or (1 if device == "cpu" else READ_STEPS),
            baseline_wanted=baseline,
        )
        with trainer:
            yield trainer


def check_run(config: RunConfig, source: FeatureSource) -> tuple[EpisodeStream, EpisodeStream | None]:
    """The training and selection streams of a run, or the error that says why it cannot start. Writes nothing."""
    if differing := config.differences(replace(config, **features_of(source))):
        raise ConfigError(
            "The run is configured for other features than those given:\n"
            f"{difference_lines(differing, 'configured', 'given')}\nNothing was changed."
        )
    if config.finetune_backbone != isinstance(source, PhotoSource):
        raise ConfigError(
            "The backbone is to be trained (finetune_backbone), but the features given are frozen: they were made "
            "before. Train on photos: --features online --finetune-backbone. Nothing was changed."
            if config.finetune_backbone
            else "Photos were given in the place of features, which only a run with finetune_backbone can use. Nothing "
            "was changed."
        )
    return training_stream(config, source), selection_stream(config, source)


def make_model(config: RunConfig, source: FeatureSource) -> HSNet:
    """The untrained learner of a run, with a backbone of its own if that is trained; drawn from torch's generator."""
    if not isinstance(source, PhotoSource):
        return HSNet(**config.learner_arguments)
    backbone = FinetunedBackbone(config.recipe.backbone, source.backbone.weights())
    return FinetunedHSNet(backbone, **config.learner_arguments)


def training_stream(config: RunConfig, source: FeatureSource) -> EpisodeStream:
    """The one-shot training episodes of a run."""
    return EpisodeStream(
        source.index,
        config.fold,
        "trn",
        1,
        config.seed,
        repeat_supports=config.repeat_supports,
        drop_novel=source.classes_present if config.drop_novel_images else None,
        exclude=frozenset(source.skipped),
    )


def selection_stream(config: RunConfig, source: FeatureSource) -> EpisodeStream | None:
    """The episodes a best checkpoint is chosen on; None if it is not to be chosen."""
    if config.select_on == "none":
        return None
    # Seed 0 for every run, so that runs of one fold compare; "test" then is the very stream `evaluate` uses.
    return EpisodeStream(source.index, config.fold, config.select_on, 1, 0, exclude=frozenset(source.skipped))


def images_of(config: RunConfig, source: FeatureSource) -> set[int]:
    """Images that training and validation may draw."""
    roles = {"trn", config.select_on} - {"none"}
    return {image for role in roles for image, _ in source.index.split(config.fold, role).entries}


@dataclass(kw_only=True)
class Trainer:
    """The loop of one rank. A class only because it shares a dozen values between its steps.

    `pipeline.packed` has several make a step in turn: `begin`, `learn` for every part of the batch, `finish`, `book`.
    """

    config: RunConfig
    source: FeatureSource
    run: RunDir
    ranks: Ranks
    model: HSNet
    optimiser: torch.optim.Optimizer
    average: WeightAverage | None
    position: Position
    stream: EpisodeStream
    selection: EpisodeStream | None
    device: str
    micro_batch: int
    """Episodes per forward pass."""
    on_event: Callable[[Event], None] | None
    read_every: int
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    baseline_wanted: bool = False
    baseline: Baseline | None = None

    def __post_init__(self) -> None:
        self.resumed_at = self.made = self.position.step
        self.unread = Unread(self.ranks)
        arithmetic, model = self.config.arithmetic, self.model
        if isinstance(model, FinetunedHSNet):
            self.fused: FusedHSNet = FusedFinetunedHSNet(model, arithmetic, self.config.both_directions)
        else:
            self.fused = FusedHSNet(model, arithmetic)
        self.wrapped = self.ranks.wrap(self.fused)
        self._saved = time.monotonic()
        self._waited = self._stepped = 0.0

    def __enter__(self) -> Trainer:
        if self.ranks.rank == 0:
            from tensorboardX import SummaryWriter

            self.run.trim_metrics(self.position.step)
            folder = str(self.run.path / "tensorboard")
            self.board = SummaryWriter(folder, purge_step=self.position.step + 1)
        return self

    def __exit__(self, *_: object) -> None:
        if self.ranks.rank == 0:
            self.board.close()

    @property
    def novel(self) -> tuple[int, ...]:
        """Classes whose pixels are left out of the loss."""
        return self.source.index.split(self.config.fold, "test").class_ids if self._ignores_novel else ()

    @property
    def _ignores_novel(self) -> bool:
        return self.config.novel_pixels == "ignore"

    @property
    def recent_loss(self) -> float:
        return sum(self.losses) / len(self.losses) if self.losses else float("nan")

    def summary(self, finished: bool, seconds: float) -> FitSummary:
        """What the run came to."""
        position = self.position
        return FitSummary(
            steps=position.step,
            resumed_at=self.resumed_at,
            finished=finished,
            loss=self.recent_loss,
            best_miou=position.best_miou if position.best_step >= 0 else None,
            best_step=position.best_step if position.best_step >= 0 else None,
            baseline_miou=self.baseline.miou if self.baseline else None,
            seconds=seconds,
            run_dir=self.run.path,
            waited_share=self._waited / self._stepped if self._stepped else None,
        )

    def run_steps(self, stop: Callable[[], bool], prefetch_depth: int) -> bool:
        """Steps up to `config.steps`; False if stopped before."""
        remaining = range(self.position.step, self.config.steps)
        parts = (part for step in remaining for part in self.parts(step))
        with closing(prefetch(self.source, parts, prefetch_depth, self.novel, self.device)) as loaded:
            self._saved = time.monotonic()
            wanted = bool(self.ranks.sum(torch.tensor(int(stop()))) > 0)
            for step in remaining:
                if wanted:
                    self.save()
                    return False
                self._step(step, loaded)
                wanted = self.book(stop)
        return True

    def book(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """After a step: read, validate and save when it is time. Whether it is known that a rank wants to stop."""
        config, wanted, alone = self.config, False, self.ranks.world_size == 1
        last = self.made == config.steps
        validate = self.selection is not None and (last or self.made % config.validate_every == 0)
        # The same steps on every rank: they read together.
        if validate or last or self.made % self.read_every == 0:
            wanted = self.read(not alone and stop())
            if validate:
                self._validate()
            if validate or last or time.monotonic() - self._saved > SAVE_SECONDS:
                self.save()
                self._saved = time.monotonic()
        return stop() if alone else wanted

    def read(self, stop: bool = False) -> bool:
        """Tell what the steps since the last reading came to; whether any rank wants to stop.

        Raises:
            HSNetError: a loss or a gradient was not a number, and the weights are not since. The last save has none.
        """
        if not self.unread:
            return stop
        figures, wanted = self.unread.read(stop)
        for each in figures:
            if not each.finite:  # all ranks see the same and stop together
                raise HSNetError(
                    f"Loss or gradient of step {each.step} is not a number. The last save is unharmed; try a lower "
                    f"--lr."
                )
            numbers = batch_numbers(each.step - 1, self.config.episodes_per_step, self.stream.epoch_length)
            loss = each.loss / (len(numbers) * self.config.directions)
            self.position.step = each.step
            self.losses.append(loss)
            if each.step > self.resumed_at + 1:
                self._waited, self._stepped = self._waited + each.waited, self._stepped + each.seconds
            rate = rate_at(self.config, each.step - 1)
            self._report(StepDone(each.step, self.config.steps, loss, each.seconds, each.waited, rate, each.gradient))
        return wanted

    def _mine(self, step: int) -> tuple[list[Episode], int]:
        """This rank's episodes of a step, and how many all ranks have together."""
        numbers = batch_numbers(step, self.config.episodes_per_step, self.stream.epoch_length)
        mine = numbers[self.ranks.rank :: self.ranks.world_size]
        return [self.stream[number] for number in mine], len(numbers)

    def parts(self, step: int) -> Iterator[Sequence[Episode]]:
        mine, _ = self._mine(step)
        # A rank left without an episode by a short last batch still takes part in the gradient average, with
        # weight 0: otherwise the others would wait for it forever.
        mine = mine or [self.stream[batch_numbers(step, self.config.episodes_per_step, self.stream.epoch_length)[0]]]
        for start in range(0, len(mine), self.micro_batch):
            yield mine[start : start + self.micro_batch]

    def _step(self, step: int, loaded: Feed[Sequence[Episode], EpisodeBatch]) -> None:
        started, waited = time.perf_counter(), 0.0
        mine, _ = self._mine(step)
        total = self.begin()
        count = max(1, -(-len(mine) // self.micro_batch))
        for number in range(count):
            _, batch = next(loaded)
            before = time.perf_counter()
            batch = self.placed(batch)
            waited += loaded.waited + time.perf_counter() - before
            total += self.learn(step, batch, sync=number == count - 1)
        self.finish(step, total, lambda: time.perf_counter() - started, waited)

    def placed(self, batch: EpisodeBatch) -> EpisodeBatch:
        """A batch on the device, decoded, in both directions if the run wants them."""
        batch = batch.to(self.device)
        return batch.both_directions() if self.config.both_directions else batch

    def begin(self) -> Tensor:
        """Forget the last step's gradients; a sum of losses to add to."""
        self.optimiser.zero_grad(set_to_none=True)
        kind = torch.float32 if self.device.startswith("mps") else torch.float64  # which it has not
        return torch.zeros((), dtype=kind, device=self.device)

    def learn(
        self, step: int, batch: EpisodeBatch, sync: bool = True, correlations: Correlations | None = None
    ) -> Tensor:
        """Add the gradients of one part of a step's batch (`placed`); returns the sum of its losses.

        `correlations` are those of the batch, if they are there already.
        """
        mine, episodes = self._mine(step)
        terms = episodes * self.config.directions
        # The group averages gradients over ranks; what is wanted is the mean over all losses of the step, also when
        # ranks have unequal shares of a short last batch.
        weight = self.ranks.world_size / terms if mine else 0.0
        with nullcontext() if sync else self.ranks.no_sync(self.wrapped):
            given = {} if correlations is None else {"correlations": correlations}
            logits = self.wrapped(batch.query, batch.support, batch.support_mask, batch.unit, **given)
            novel = batch.novel if self._ignores_novel else None
            losses = episode_losses(logits, batch.target, batch.ignore, self.config.boundary, novel)
            (losses.sum() * weight).backward()
        return losses.detach().sum() if mine else losses.new_zeros(())

    def finish(self, step: int, total: Tensor, seconds: Callable[[], float], waited: float) -> None:
        """Update the weights; `total` is the sum of the step's losses here. Looks at no number (`read` does)."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
        set_rate(self.optimiser, rate_at(self.config, step))
        self.optimiser.step()
        if self.average:
            self.average.update(self.model, step + 1)
        self.made = step + 1
        self.unread.add(self.made, total, norm, seconds(), waited)

    def _validate(self) -> None:
        assert self.selection is not None
        judged = self.average.model if self.average else self.model
        judged.eval()
        numbers = range(self.ranks.rank, self.config.validate_episodes, self.ranks.world_size)
        size = self.config.batch_size
        episodes = [self.selection[number] for number in numbers]
        class_ids = self.selection.class_ids
        segmenters: list[Segmenter] = [LearnedSegmenter(judged, self.config.arithmetic)]
        if self.baseline_wanted and self.baseline is None and self._has_baseline():
            segmenters.append(ContrastSegmenter())
        counted = [[torch.zeros(0, 2, 2, dtype=torch.int64, device=self.device)] for _ in segmenters]
        groups = (episodes[start : start + size] for start in range(0, len(episodes), size))
        for _, batch in prefetch(self.source, groups, 1, device=self.device):
            batch = batch.to(self.device)
            if isinstance(judged, FinetunedHSNet):
                batch = batch.read_by(judged.backbone)
            for counts, segmenter in zip(counted, segmenters, strict=True):
                counts.append(segmenter.answer(batch).count(batch))
        asked = [episode.class_id for episode in episodes]
        totals = [self.ranks.sum(sum_by_class(torch.cat(counts).cpu(), asked, class_ids)) for counts in counted]
        self.model.train()
        (miou, fb_iou), *others = [(mean_iou(total), foreground_background_iou(total)) for total in totals]
        position, better = self.position, miou > self.position.best_miou
        if better:
            position.best_miou, position.best_step = miou, position.step
            position.best_of = self.config.validate_episodes
            if self.ranks.rank == 0:
                self.run.save_best(judged, position.step, {"miou": miou, "fb_iou": fb_iou})
        self._report(Validated(position.step, miou, fb_iou, better))
        if others:
            self.baseline = Baseline(position.step, *others[0])
            if self.ranks.rank == 0 and self.on_event:  # of the run, not of a step: not in its metrics
                self.on_event(self.baseline)

    def _has_baseline(self) -> bool:
        """Whether all supports of the selection show some background, without which `contrast` has no answer."""
        assert self.selection is not None
        episodes = [self.selection[number] for number in range(self.config.validate_episodes)]
        lacking = without_background(
            self.source, {(image, episode.class_id) for episode in episodes for image in episode.supports}
        )
        if lacking:
            self.baseline_wanted = False
            log.info(
                "What head contrast comes to without training is not told: %d supports show nothing but their object, "
                "such as %s", len(lacking), lacking[0],
            )  # fmt: skip
        return not lacking

    def save(self) -> None:
        """Save, after a look at whether the weights are fit to be."""
        self.read()
        if self.ranks.rank == 0:
            self.run.save(self.model, self.optimiser, self.position, self.average.model if self.average else None)

    def _report(self, event: Event) -> None:
        if self.ranks.rank != 0:
            return
        group = "train" if isinstance(event, StepDone) else "val"
        scalars = {name: value for name, value in vars(event).items() if name not in ("step", "steps")}
        self.run.log({"step": event.step, group: scalars})
        for name, value in scalars.items():
            self.board.add_scalar(f"{group}/{name}", float(value), event.step)
        if self.on_event:
            self.on_event(event)
