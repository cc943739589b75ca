"""The evaluate stage, in two loops: predict once and keep a row per episode, then make any table from the rows.

One pass over the episodes gives the counts of every policy (ignored pixels left out or not, network size and, where
the photos' masks are at hand, original size), every smaller number of shots and every way to combine them. Rows do
not depend on the number of workers: episodes come in blocks of fixed size, every block is computed with one torch
thread, and the counts are integers.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hsnet.errors import ConfigError, DataError
from hsnet.fusion import foreground, fuse
from hsnet.metrics import class_iou, count, foreground_background_iou, mean_iou, sum_by_class
from hsnet.model import resize_logits
from pipeline.common.machine import environment
from pipeline.common.runner import Runner, SerialRunner, in_groups
from pipeline.datasets.index import DatasetIndex
from pipeline.episodes.drawing import PlannedTest, of_protocol
from pipeline.episodes.manifest import episodes_in
from pipeline.episodes.protocols import FUSIONS, Policy, Protocol
from pipeline.episodes.stream import Episode
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.heads.segmenters import Answers, Segmenter
from pipeline.loading.batch import EpisodeBatch, prefetch
from pipeline.loading.resident import keep
from pipeline.loading.source import FeatureSource, StoreSource
from pipeline.scores.bootstrap import Interval, interval, resample
from pipeline.scores.rows import METADATA, count_columns, episode_counts, schema

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.datasets import Dataset

BLOCK = 25
"""Episodes that are planned together; a worker gets several blocks if they are quick."""

TASK_SECONDS = 5.0
"""About how long a worker is busy with the blocks it is given at a time: it reads one while it computes another."""

READ_AHEAD = 1
"""Groups of episodes read while one is predicted; 0 reads in line."""

HEADLINE = Policy()
"""The published way to count: at network size, ignored pixels left out."""


@dataclass(frozen=True)
class Scores:
    """Results of one number of shots, in percent, with 95 % intervals (`pipeline.scores.bootstrap`)."""

    shots: int
    episodes: int
    miou: float
    miou_interval: Interval
    fb_iou: float
    fb_iou_interval: Interval
    per_class: Mapping[int, float]
    """Class id -> IoU; a class without an episode counts as 0, as in the published evaluation."""
    episodes_per_class: Mapping[int, int]


@dataclass(frozen=True)
class Evaluation:
    """All rows and the scores made of them."""

    rows: pa.Table
    """See `pipeline.scores.rows`."""
    scores: tuple[Scores, ...]
    """One per number of shots, by the protocol's own policy and fusion, all seeds together."""
    facts: Mapping[str, Any]
    """What was evaluated and how; stored with the rows."""


@dataclass(frozen=True)
class _Block:
    first: int
    """Number of its first episode."""
    episodes: tuple[Episode, ...]
    shots: tuple[int, ...]
    """Results wanted: every K up to the episodes' own."""
    seed: int
    manifests: Mapping[int, str]
    """Number of shots -> digest of the episodes with so many supports."""


@dataclass(frozen=True)
class _Rules:
    """How answers become rows."""

    fold: int
    fusions: tuple[str, ...]
    protocol: Protocol
    dataset: Dataset | None
    """Gives full-size masks; None scores at network size only."""
    device: str


def evaluate(
    plan: EvaluationPlan, *, runner: Runner | None = None, on_event: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Predict the episodes of a plan and score them.

    Args:
        runner: where; in this process by default.
        on_event: called with (episodes done, episodes in all).

    Raises:
        ConfigError: no such fold, a class with too few images for K shots, episodes that need a skipped image, or
            a fusion that the segmenter cannot do.
        DataError: a manifest or `dataset` of other data.
    """
    source, protocol, dataset = plan.source, plan.protocol, plan.dataset
    index = source.index if plan.index is None else plan.index
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
    fusions = tuple(name for name in FUSIONS if name in {protocol.fusion, *plan.fusions})
    rules = _Rules(plan.fold, fusions, protocol, dataset, plan.device)
    skipped = sorted({*source.skipped, *plan.skipped})
    manifests = list(plan.manifests) or of_protocol(protocol, index, plan.fold, skipped)
    blocks = [block for planned in manifests for block in _blocks(planned, index, skipped)]
    total = sum(len(block.episodes) for block in blocks)
    images = {image for block in blocks for episode in block.episodes for image in (episode.query, *episode.supports)}
    # Of the plan, workers are sent only what they need: not the source that is open here.
    make_segmenter, make_source = plan.method.make, plan.make_source or (lambda: source)
    resident, device = plan.resident, plan.device

    def make_worker() -> Callable[[Sequence[_Block]], tuple[list[dict[str, Any]], float]]:
        segmenter, source = make_segmenter(), keep(make_source(), images, resident, device)
        return lambda blocks: _rows(segmenter, source, blocks, rules)

    runner = runner or SerialRunner()
    rows: list[dict[str, Any]] = []
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
    rows.sort(  # blocks come in any order
        key=lambda row: (row["shots"], FUSIONS.index(row["fusion"]), row["seed"], row["episode"])
    )
    facts = _facts(plan, index, fusions, manifests)
    import pyarrow as pa

    same = {"store": facts["store"], "checkpoint": facts["checkpoint"]}
    table = pa.Table.from_pylist([{**row, **same} for row in rows], schema=schema())
    table = table.replace_schema_metadata({METADATA: json.dumps(facts, sort_keys=True)})
    class_ids = index.split(plan.fold, protocol.role).class_ids
    scores = tuple(score(table, k, class_ids, protocol.policy, protocol.fusion) for k in facts["shots"])
    return Evaluation(table, scores, facts)


def _facts(
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


def score(
    rows: pa.Table, shots: int, class_ids: Sequence[int], policy: Policy = HEADLINE, fusion: str = "vote"
) -> Scores:
    """mIoU, FB-IoU and class IoUs from the rows of one number of shots and one way to combine them."""
    import pyarrow.compute as pc

    chosen = rows.filter(pc.and_(pc.equal(rows["shots"], shots), pc.equal(rows["fusion"], fusion)))
    classes, counts = chosen["class_id"].to_pylist(), episode_counts(chosen, policy)
    totals = sum_by_class(torch.from_numpy(counts), classes, class_ids)
    drawn_again = resample(counts[None], classes, class_ids)
    miou, fb_iou = mean_iou(totals), foreground_background_iou(totals)
    return Scores(
        shots,
        len(chosen),
        miou,
        interval(miou, drawn_again.miou()[1][:, 0]),
        fb_iou,
        interval(fb_iou, drawn_again.fb_iou()[1][:, 0]),
        dict(zip(class_ids, class_iou(totals).tolist(), strict=True)),
        {class_id: classes.count(class_id) for class_id in class_ids},
    )


def _blocks(planned: PlannedTest, index: DatasetIndex, skipped: Sequence[int]) -> list[_Block]:
    drawn = episodes_in(planned.manifest, index, skipped)
    digests = {k: planned.manifest.first(k).digest for k in planned.shots}
    return [
        _Block(first, tuple(drawn[first : first + BLOCK]), planned.shots, planned.seed, digests)
        for first in range(0, len(drawn), BLOCK)
    ]


def _rows(
    segmenter: Segmenter, source: FeatureSource, blocks: Sequence[_Block], rules: _Rules
) -> tuple[list[dict[str, Any]], float]:
    """(rows of the blocks' episodes, seconds per block); the next episodes are read while these are predicted."""
    started = time.monotonic()
    # Cut alike however blocks are grouped: episodes that are predicted together could tell by their last bits.
    parts = [(block, start) for block in blocks for start in range(0, len(block.episodes), _step(block))]
    reads = (block.episodes[start : start + _step(block)] for block, start in parts)
    rows: list[dict[str, Any]] = []
    with closing(prefetch(source, reads, READ_AHEAD)) as loaded:
        for (block, start), (episodes, batch) in zip(parts, loaded, strict=True):
            began = time.monotonic()
            part = _part_rows(segmenter, batch.to(rules.device), episodes, block, rules, source.index)
            seconds = (time.monotonic() - began) / len(episodes)
            for row in part:
                rows.append({**row, "episode": block.first + start + row["episode"], "seconds": seconds})
    return rows, (time.monotonic() - started) / len(blocks)


def _part_rows(
    segmenter: Segmenter,
    batch: EpisodeBatch,
    episodes: Sequence[Episode],
    block: _Block,
    rules: _Rules,
    index: DatasetIndex,
) -> list[dict[str, Any]]:
    """Rows of episodes that are predicted together, numbered from 0."""
    size = (batch.target.shape[1], batch.target.shape[2])
    joint = tuple(k for k in block.shots if k > 1) if "joint" in rules.fusions else ()
    answers = segmenter.answer(batch, joint)
    counts = {}
    for shots, fusion in itertools.product(block.shots, rules.fusions):
        masks = _combined(answers, slice(None), size, shots, fusion, rules)
        counts[shots, fusion] = _counts("network", masks, batch.target, batch.ignore)
    pixels = batch.target.flatten(1).sum(1).tolist()
    rows = []
    for number, episode in enumerate(episodes):
        original = _original(episode, rules)
        for (shots, fusion), policies in counts.items():
            values = {policy: four[number] for policy, four in policies.items()}
            if original is not None:
                target, ignore = original
                size = (target.shape[1], target.shape[2])
                mask = _combined(answers, slice(number, number + 1), size, shots, fusion, rules)
                values |= {policy: four[0] for policy, four in _counts("original", mask, target, ignore).items()}
            columns = {
                name: value
                for policy, four in values.items()
                for name, value in zip(count_columns(policy), four.flatten().tolist(), strict=True)
            }
            rows.append(
                {
                    "episode": number,
                    "fold": rules.fold,
                    "seed": block.seed,
                    "shots": shots,
                    "fusion": fusion,
                    "class_id": episode.class_id,
                    "class_name": index.classes[episode.class_id],
                    "query": index.images[episode.query],
                    "supports": [index.images[image] for image in episode.supports[:shots]],
                    "object_pixels": pixels[number],
                    "manifest": block.manifests[shots],
                    **columns,
                }
            )
    return rows


def _counts(resolution: str, masks: Tensor, target: Tensor, ignore: Tensor | None) -> dict[Policy, Tensor]:
    """Counts (B, 2, 2) int64 by both policies of a resolution; masks and target (B, H, W)."""
    everything = count(masks, target).cpu()
    kept = everything if ignore is None else count(masks, target, ignore).cpu()
    return {Policy(resolution, ignore=True): kept, Policy(resolution, ignore=False): everything}


def _combined(answers: Answers, chosen: slice, size: tuple[int, int], shots: int, fusion: str, rules: _Rules) -> Tensor:
    """Masks (b, H, W) of the chosen episodes by their first supports."""
    tau, strict = rules.protocol.tau, rules.protocol.strict
    if fusion == "joint":
        # One support is its own joint answer.
        logits = answers.joint[shots] if shots > 1 else answers.logits[0]
        return foreground(resize_logits(logits[chosen], size), tau, strict)
    return fuse(answers.logits[:shots, chosen], size, fusion, tau, strict, rules.protocol.normalise)


def _original(episode: Episode, rules: _Rules) -> tuple[Tensor, Tensor | None] | None:
    """(target, ignore) of the query at its own size, each (1, H, W) bool."""
    if rules.dataset is None:
        return None
    index = rules.dataset.index
    label = torch.from_numpy(rules.dataset.label(episode.query).astype("int32"))[None].to(rules.device)
    return label == episode.class_id + 1, label == index.ignore_label if index.has_ignore else None


def _step(block: _Block) -> int:
    """Episodes read and predicted together: fewer at many shots, which bounds memory."""
    return max(1, BLOCK // len(block.episodes[0].supports))
