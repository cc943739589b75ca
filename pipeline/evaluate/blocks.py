"""What every evaluation does alike: its plan is checked, episodes are cut into blocks, and a runner answers them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from hsnet.errors import ConfigError, DataError
from pipeline.common.machine import environment
from pipeline.common.runner import Runner, SerialRunner, in_groups, read_ahead
from pipeline.datasets.index import DatasetIndex
from pipeline.episodes.drawing import PlannedTest
from pipeline.episodes.manifest import episodes_in
from pipeline.episodes.protocols import FUSIONS
from pipeline.episodes.stream import Episode
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.heads.scene import require_background
from pipeline.heads.segmenters import Segmenter
from pipeline.loading.resident import keep
from pipeline.loading.source import FeatureSource, StoreSource

BLOCK = 25
"""Episodes that are planned together; a worker gets several blocks if they are quick."""

TASK_SECONDS = 5.0
"""About how long a worker is busy with the blocks it is given at a time: it reads one while it computes another."""

READ_AHEAD = 1
"""Groups of episodes read while one is predicted; 0 reads in line."""


@dataclass(frozen=True)
class Block:
    """Episodes that one worker answers."""

    first: int
    """Number of its first episode."""
    episodes: tuple[Episode, ...]
    shots: tuple[int, ...]
    """Results wanted: every K up to the episodes' own."""
    seed: int
    manifests: dict[int, str]
    """Number of shots -> digest of the episodes with so many supports."""


class Loaded(Protocol):
    """Episodes as tensors."""

    def to(self: T, device: str) -> T: ...


T = TypeVar("T")
L = TypeVar("L", bound=Loaded)
Rows = list[dict[str, Any]]


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
    plan: EvaluationPlan, index: DatasetIndex, fusions: Sequence[str], manifests: Sequence[PlannedTest]
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
        "shots": sorted({k for planned in manifests for k in planned.shots}),
        "seeds": sorted({planned.seed for planned in manifests}),
        "fusions": list(fusions),
        "classes": {str(class_id): index.classes[class_id] for class_id in class_ids},
        "manifests": {
            planned.manifest.first(k).digest: {"shots": k, "seed": planned.seed, **planned.manifest.made}
            for planned in manifests
            for k in planned.shots
        },
        "protocol": protocol.to_dict(),
        "protocol_digest": protocol.digest,
        "ignore": "boundary pixels count for nothing" if index.has_ignore else "no ignore label",
        "store": store.identity if store else "",
        "checkpoint": method.checkpoint,
        "environment": environment(),
        "method": method.facts,
        "recipe": source.recipe.to_dict(),
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


def blocks_of(planned: PlannedTest, index: DatasetIndex, skipped: Sequence[int]) -> list[Block]:
    """A test's episodes in blocks of fixed size, whatever the workers."""
    drawn = episodes_in(planned.manifest, index, skipped)
    digests = {k: planned.manifest.first(k).digest for k in planned.shots}
    return [
        Block(first, tuple(drawn[first : first + BLOCK]), planned.shots, planned.seed, digests)
        for first in range(0, len(drawn), BLOCK)
    ]


def step(block: Block) -> int:
    """Episodes read and predicted together: fewer at many supports, which bounds memory."""
    return max(1, BLOCK // sum(len(supports) for _, supports in block.episodes[0].classes))


def asked_of(shots: Sequence[int], fusions: Sequence[str]) -> tuple[tuple[int, ...], int]:
    """What a segmenter is asked for these numbers of shots and fusions: `joint` and `alone` of `Segmenter.answer`."""
    joint = tuple(k for k in shots if k > 1) if "joint" in fusions else ()
    return joint, max((k for k in shots if set(fusions) != {"joint"}), default=1)


def answered(
    plan: EvaluationPlan,
    blocks: Sequence[Block],
    load: Callable[[FeatureSource, Sequence[Episode]], L],
    part_rows: Callable[[Segmenter, L, Sequence[Episode], Block, DatasetIndex], Rows],
    runner: Runner | None = None,
    on_event: Callable[[int, int], None] | None = None,
) -> Rows:
    """The rows of all blocks, in any order.

    Args:
        load: reads episodes that are answered together; `part_rows` answers them, once they are on the plan's device,
            and numbers its rows' episodes from 0. Both must be picklable for Ray.
        runner: where; in this process by default.
        on_event: called with (episodes done, episodes in all).

    Raises:
        DataError: the head compares with a support's background, and a support shows none.
    """
    source, total = plan.source, sum(len(block.episodes) for block in blocks)
    if (head := plan.method.head) is not None and head.background:
        episodes = [episode for block in blocks for episode in block.episodes]
        supports = {(image, class_id) for episode in episodes for class_id, some in episode.classes for image in some}
        require_background(source, supports, str(plan.method.facts["name"]))
    images = {image for block in blocks for episode in block.episodes for image in episode.photos}
    # Of the plan, workers are sent only what they need: not the source that is open here.
    make_segmenter, make_source = plan.method.make, plan.make_source or (lambda: source)
    resident, device = plan.resident, plan.device

    def make_worker() -> Callable[[Sequence[Block]], tuple[Rows, float]]:
        segmenter, source = make_segmenter(), keep(make_source(), images, resident, device)
        return lambda blocks: _rows(segmenter, source, blocks, load, part_rows, device)

    runner = runner or SerialRunner()
    rows: Rows = []
    done, took = 0, [0.0]
    if on_event:
        on_event(0, total)  # so that the rate shown counts from here
    groups = in_groups(blocks, lambda: took[-1] or None, TASK_SECONDS, runner.workers)
    for group, (group_rows, seconds) in runner.map(make_worker, groups):
        rows += group_rows
        took.append(seconds)
        done += sum(len(block.episodes) for block in group)
        if on_event:
            on_event(done, total)
    return rows


def _rows(
    segmenter: Segmenter,
    source: FeatureSource,
    blocks: Sequence[Block],
    load: Callable[[FeatureSource, Sequence[Episode]], L],
    part_rows: Callable[[Segmenter, L, Sequence[Episode], Block, DatasetIndex], Rows],
    device: str,
) -> tuple[Rows, float]:
    """(rows of the blocks' episodes, seconds per block); the next episodes are read while these are predicted."""
    started = time.monotonic()
    # Cut alike however blocks are grouped: episodes that are predicted together could tell by their last bits.
    parts = [(block, start) for block in blocks for start in range(0, len(block.episodes), step(block))]
    reads = (block.episodes[start : start + step(block)] for block, start in parts)
    rows: Rows = []
    with closing(read_ahead(partial(load, source), reads, READ_AHEAD, "prefetch")) as loaded:
        for (block, start), (episodes, batch) in zip(parts, loaded, strict=True):
            began = time.monotonic()
            part = part_rows(segmenter, batch.to(device), episodes, block, source.index)
            seconds = (time.monotonic() - began) / len(episodes)
            for row in part:
                rows.append({**row, "episode": block.first + start + row["episode"], "seconds": seconds})
    return rows, (time.monotonic() - started) / len(blocks)
