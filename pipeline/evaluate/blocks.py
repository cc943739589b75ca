"""What every evaluation does alike: its plan is checked, episodes are cut into blocks, and a runner answers them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, overload

import torch
from torch import Tensor

from hsnet.errors import ConfigError, DataError
from pipeline.common.machine import environment
from pipeline.common.out_of_memory import memory_told
from pipeline.common.runner import Runner, SerialRunner, in_groups
from pipeline.datasets.index import DatasetIndex
from pipeline.episodes.drawing import PlannedTest
from pipeline.episodes.manifest import episodes_in
from pipeline.episodes.protocols import FUSIONS
from pipeline.episodes.stream import Episode
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.heads.scene import require_background
from pipeline.heads.segmenters import Segmenter
from pipeline.loading.feeding import Readable, feed
from pipeline.loading.resident import keep
from pipeline.loading.source import FeatureSource, StoreSource

if TYPE_CHECKING:
    from pipeline.datasets import Dataset

BLOCK = 25
"""Episodes that are planned together; a worker gets several blocks if they are quick."""

TASK_SECONDS = 5.0
"""About how long a worker is busy with the blocks it is given at a time: it reads one while it computes another."""

LESS_MEMORY = "Use --resident off, fewer --shots, a store of a smaller --image-size, or --device cpu."
KEPT = "With --out, what was answered is kept: the same command goes on from there."

READ_AHEAD = 1
"""Groups of episodes read while one is predicted; 0 reads in line."""


@dataclass(frozen=True)
class Drawn:
    """The episodes of one manifest, and what they are tested for."""

    seed: int
    shots: tuple[int, ...]
    """Results wanted: every K up to the episodes' own."""
    manifests: Mapping[int, str]
    """Number of shots -> digest of the episodes with so many supports."""
    made: Mapping[str, Any]
    """How the episodes were drawn."""
    episodes: Sequence[Episode]

    @property
    def manifest(self) -> str:
        """Digest of the episodes with the most supports."""
        return self.manifests[max(self.shots)]


@dataclass(frozen=True)
class Block:
    """Episodes that one worker answers."""

    first: int
    """Number of its first episode."""
    episodes: tuple[Episode, ...]
    shots: tuple[int, ...]
    seed: int
    manifests: Mapping[int, str]

    @property
    def last(self) -> int:
        """Number of the episode after its last one."""
        return self.first + len(self.episodes)

    @property
    def manifest(self) -> str:
        """Digest of its test's episodes with the most supports."""
        return self.manifests[max(self.shots)]


class Blocks(Sequence[Block]):
    """Tests cut into blocks of fixed size, whatever the workers; a block is made when it is asked for.

    Args:
        answered: (manifest, first, last): blocks in these ranges of episodes are left out.
    """

    def __init__(self, tests: Sequence[Drawn], answered: Iterable[tuple[str, int, int]] = ()) -> None:
        self.tests = tests
        done = {(manifest, start) for manifest, first, last in answered for start in range(first, last, BLOCK)}
        self.starts = [
            (number, start)
            for number, test in enumerate(tests)
            for start in range(0, len(test.episodes), BLOCK)
            if (test.manifest, start) not in done
        ]

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, place: int) -> Block: ...

    @overload
    def __getitem__(self, place: slice) -> list[Block]: ...

    def __getitem__(self, place: int | slice) -> Block | list[Block]:
        if isinstance(place, slice):
            return [self._block(*start) for start in self.starts[place]]
        return self._block(*self.starts[place])

    def _block(self, number: int, start: int) -> Block:
        test = self.tests[number]
        return Block(start, tuple(test.episodes[start : start + BLOCK]), test.shots, test.seed, test.manifests)

    @property
    def episodes(self) -> int:
        """Episodes in all blocks."""
        return sum(min(BLOCK, len(self.tests[number].episodes) - start) for number, start in self.starts)


class Loaded(Protocol):
    """Episodes as tensors."""

    def to(self: T, device: str) -> T: ...


T = TypeVar("T")
R = TypeVar("R")
L = TypeVar("L", bound=Loaded)
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class WithMasks(Generic[L]):
    """Episodes as tensors, with what the data set says of their queries at their own size."""

    batch: L
    labels: tuple[Tensor, ...] | None
    """Label map (H, W) int32 of every query, as `Dataset.label` gives it; None: answers are scored at network size."""

    def to(self, device: str) -> WithMasks[L]:
        """All of it on a device."""
        labels = None if self.labels is None else tuple(label.to(device, non_blocking=True) for label in self.labels)
        return WithMasks(self.batch.to(device), labels)


@dataclass(frozen=True)
class ReadWithMasks(Generic[L]):
    """What `WithMasks` is made of: see `pipeline.loading.batch.BatchParts`."""

    reading: Readable[L]
    labels: tuple[Tensor, ...] | None

    def moved(self, move: Callable[[Tensor], Tensor]) -> ReadWithMasks[L]:
        """The same with what `move` makes of each tensor."""
        labels = None if self.labels is None else tuple(move(label) for label in self.labels)
        return ReadWithMasks(self.reading.moved(move), labels)

    def made(self) -> WithMasks[L]:
        """Episodes and masks where the tensors are."""
        return WithMasks(self.reading.made(), self.labels)


def with_masks(
    source: FeatureSource,
    episodes: Sequence[Episode],
    *,
    read: Callable[..., Readable[L]],
    dataset: Dataset | None,
    once: bool = False,
) -> ReadWithMasks[L]:
    """Read episodes, and decode the masks of their queries: on the thread that reads ahead, not beside the head."""
    reading = read(source, episodes, once=once)
    if dataset is None:
        return ReadWithMasks(reading, None)
    decoded = (dataset.label(episode.query).astype("int32") for episode in episodes)
    return ReadWithMasks(reading, tuple(torch.from_numpy(label) for label in decoded))


@dataclass(frozen=True)
class PartRows:
    """Rows of episodes that were answered together, before anybody has looked at their numbers."""

    figures: Tensor
    """(n,) int64 on the device that answered."""
    rows: Callable[[Tensor], Rows]
    """The rows, from the figures on the host; numbers their episodes from 0."""


def index_of(plan: EvaluationPlan) -> DatasetIndex:
    """The lists that are tested on."""
    return plan.source.index if plan.index is None else plan.index


def skipped_in(plan: EvaluationPlan) -> list[int]:
    """Images that no episode may draw."""
    return sorted({*plan.source.skipped, *plan.skipped})


def fusions_of(plan: EvaluationPlan) -> tuple[str, ...]:
    """Ways to combine supports that get rows, in the order of FUSIONS.

    Raises:
        ConfigError: an unknown one; or scores at original size are asked for without the photos' masks.
        DataError: masks of other data.
    """
    source, protocol, dataset = plan.source, plan.protocol, plan.dataset
    if unknown := set(plan.fusions) - set(FUSIONS):
        raise ConfigError(f"fusion must be one of {', '.join(FUSIONS)}, got {', '.join(sorted(unknown))}.")
    if dataset is None and protocol.resolution == "original":
        raise ConfigError(
            "Scores at original size need the photos' own masks, which a store does not hold: give the data set "
            "(--data-root), or --set resolution=network. Nothing was computed."
        )
    if dataset is not None and dataset.index.digest != source.index.digest:
        raise DataError(
            f"The data set is not the one behind the features: {dataset.index.digest}, the store has "
            f"{source.index.digest}. Give the data set that was extracted. Nothing was computed."
        )
    return tuple(name for name in FUSIONS if name in {protocol.fusion, *plan.fusions})


def facts_of(
    plan: EvaluationPlan, index: DatasetIndex, fusions: Sequence[str], tests: Sequence[Drawn]
) -> dict[str, Any]:
    """What was evaluated and how, as it is stored with the rows."""
    source, protocol, method = plan.source, plan.protocol, plan.method
    store = source.store if isinstance(source, StoreSource) else None
    class_ids = index.split(plan.fold, protocol.role).class_ids
    return {
        "data": index.digest,
        "dataset": index.name,
        "fold": plan.fold,
        "role": protocol.role,
        "shots": sorted({k for test in tests for k in test.shots}),
        "seeds": sorted({test.seed for test in tests}),
        "fusions": list(fusions),
        "classes": {str(class_id): index.classes[class_id] for class_id in class_ids},
        "manifests": {
            test.manifests[k]: {"shots": k, "seed": test.seed, **test.made} for test in tests for k in test.shots
        },
        "protocol": protocol.to_dict(),
        "protocol_digest": protocol.digest,
        "ignore": "boundary pixels count for nothing" if index.has_ignore else "no ignore label",
        "store": store.identity if store else "",
        "checkpoint": method.checkpoint,
        "environment": environment(),
        "method": method.facts,
        "recipe": source.recipe.to_dict(),
        # Only where there are some: what is told of other evaluations stays what it was.
        **({"classes_trained_on": list(plan.trained_on)} if plan.trained_on else {}),
        "notes": protocol.departures(
            dataset=index.name, image_size=source.recipe.image_size, has_ignore=index.has_ignore
        ),
        # Where a report may look for photos and head; what they are is said by the digests.
        "paths": {
            "store": store and store.path,
            "checkpoint": method.path and str(method.path),
            "data_root": plan.data_root and str(plan.data_root),
        },
    }


def drawn(planned: PlannedTest, index: DatasetIndex, skipped: Sequence[int]) -> Drawn:
    """A test's episodes, without the names that its manifest has for them. Raises as `episodes_in`."""
    manifest = planned.manifest
    digests = {k: manifest.first(k).digest for k in planned.shots}
    return Drawn(planned.seed, planned.shots, digests, manifest.made, episodes_in(manifest, index, skipped))


def step(block: Block) -> int:
    """Episodes read and predicted together: fewer at many supports, which bounds memory."""
    return max(1, BLOCK // sum(len(supports) for _, supports in block.episodes[0].classes))


def asked_of(shots: Sequence[int], fusions: Sequence[str]) -> tuple[tuple[int, ...], int]:
    """What a segmenter is asked for these numbers of shots and fusions: `joint` and `alone` of `Segmenter.answer`."""
    joint = tuple(k for k in shots if k > 1) if "joint" in fusions else ()
    return joint, max((k for k in shots if set(fusions) != {"joint"}), default=1)


def runs_of(blocks: Sequence[Block]) -> Iterator[list[int]]:
    """Places of blocks that follow each other in one test."""
    run: list[int] = []
    for place, block in enumerate(blocks):
        if run and (block.manifest != blocks[place - 1].manifest or block.first != blocks[place - 1].last):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def answered(
    plan: EvaluationPlan,
    blocks: Blocks,
    read: Callable[..., Readable[L]],
    part_rows: Callable[[Segmenter, L, Sequence[Episode], Block, DatasetIndex], PartRows],
    keep_rows: Callable[[Sequence[Block], Rows], R],
    runner: Runner | None = None,
    on_event: Callable[[int, int], None] | None = None,
    before: int = 0,
) -> Iterator[R]:
    """What is kept of the rows of all blocks, in any order, as it is answered.

    Args:
        read: reads episodes that are answered together, as `pipeline.loading.batch.read_batch`; `part_rows` answers
            them, once they are on the plan's device, without waiting for its numbers; `keep_rows` is called where that
            was done with blocks that follow each other in one test, and what it returns is yielded. All must be
            picklable for Ray.
        runner: where; in this process by default.
        on_event: called with (episodes done, episodes in all).
        before: episodes that were answered by an earlier call, and count as done.

    Raises:
        DataError: the head compares with a support's background, and a support shows none.
        DeviceMemoryError: episodes that are answered together take more memory than there is.
    """
    source, done = plan.source, before
    if (head := plan.method.head) is not None and head.background:
        every = (episode for block in blocks for episode in block.episodes)
        supports = {(image, class_id) for episode in every for class_id, some in episode.classes for image in some}
        require_background(source, supports, str(plan.method.facts["name"]))
    total = before + blocks.episodes
    images = {image for block in blocks for episode in block.episodes for image in episode.photos}
    # Of the plan, workers are sent only what they need: not the source that is open here.
    make_segmenter, make_source = plan.method.make, plan.make_source or (lambda: source)
    resident, device = plan.resident, plan.device

    def make_worker() -> Callable[[Sequence[Block]], tuple[list[R], float]]:
        with memory_told(LESS_MEMORY, KEPT):
            segmenter, source = make_segmenter(), keep(make_source(), images, resident, device)

        def work(blocks: Sequence[Block]) -> tuple[list[R], float]:
            with memory_told(LESS_MEMORY, KEPT):
                rows, seconds = _rows(segmenter, source, blocks, read, part_rows, device)
            kept = [
                keep_rows([blocks[place] for place in run], [row for place in run for row in rows[place]])
                for run in runs_of(blocks)
            ]
            return kept, seconds

        return work

    runner = runner or SerialRunner()
    took = [0.0]
    if on_event:
        on_event(done, total)  # so that the rate shown counts from here
    groups = in_groups(blocks, lambda: took[-1] or None, TASK_SECONDS, runner.workers)
    for group, (kept, seconds) in runner.map(make_worker, groups):
        yield from kept
        took[0] = seconds
        done += sum(len(block.episodes) for block in group)
        if on_event:
            on_event(done, total)


def _rows(
    segmenter: Segmenter,
    source: FeatureSource,
    blocks: Sequence[Block],
    read: Callable[..., Readable[L]],
    part_rows: Callable[[Segmenter, L, Sequence[Episode], Block, DatasetIndex], PartRows],
    device: str,
) -> tuple[list[Rows], float]:
    """(rows of each block, seconds per block); the next episodes are read while these are predicted."""
    started = time.monotonic()
    # Cut alike however blocks are grouped: episodes that are predicted together could tell by their last bits.
    parts = [(place, start) for place, b in enumerate(blocks) for start in range(0, len(b.episodes), step(b))]
    reads = (blocks[place].episodes[start : start + step(blocks[place])] for place, start in parts)
    rows: list[Rows] = [[] for _ in blocks]
    waiting: list[tuple[int, PartRows]] = []
    spent = 0.0
    with closing(feed(source, read, reads, device, READ_AHEAD)) as loaded:
        for (place, start), (episodes, batch) in zip(parts, loaded, strict=True):
            block, began = blocks[place], time.monotonic()
            waiting.append((start, part_rows(segmenter, batch.to(device), episodes, block, source.index)))
            last = start + len(episodes) == len(block.episodes)
            found = _looked_at([part.figures for _, part in waiting]) if last else []
            spent += time.monotonic() - began
            if not last:
                continue
            seconds = spent / len(block.episodes)
            for (first, part), figures in zip(waiting, found, strict=True):
                for row in part.rows(figures):
                    rows[place].append({**row, "episode": block.first + first + row["episode"], "seconds": seconds})
            waiting, spent = [], 0.0
    return rows, (time.monotonic() - started) / len(blocks)


def _looked_at(figures: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Figures of several parts on the host, in one copy: a device works ahead until somebody asks for a number."""
    return torch.cat(list(figures)).cpu().split([len(part) for part in figures])
