"""The evaluate stage, in two loops: predict once and keep a row per episode, then make any table from the rows.

One pass over the episodes gives the counts of every policy (ignored pixels left out or not, network size and, where
the photos' masks are at hand, original size), every smaller number of shots and every way to combine them. Rows do
not depend on the number of workers: episodes come in blocks of fixed size, every block is computed with one torch
thread, and the counts are integers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsnet.errors import ConfigError, DataError
from hsnet.fusion import foreground, fuse
from hsnet.metrics import class_iou, count, foreground_background_iou, mean_iou, sum_by_class
from hsnet.model import resize_logits
from pipeline.common.runner import Runner
from pipeline.datasets.index import DatasetIndex
from pipeline.episodes.drawing import of_protocol
from pipeline.episodes.manifest import MANIFEST_FORMAT
from pipeline.episodes.protocols import Policy, Protocol
from pipeline.episodes.stream import Episode
from pipeline.evaluate.blocks import (
    Block,
    Drawn,
    PartRows,
    Rows,
    WithMasks,
    asked_of,
    drawn,
    facts_of,
    fusions_of,
    index_of,
    skipped_in,
    with_masks,
)
from pipeline.evaluate.keeping import Keeping, Tally, decided_by, keep_answers, same_in_all
from pipeline.evaluate.parts import Part, PartFolder, in_order, part_folder, require_own_rows, write_rows
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.heads.segmenters import Answers, Segmenter
from pipeline.loading.batch import EpisodeBatch, read_batch
from pipeline.scores.bootstrap import Interval, interval, resample
from pipeline.scores.rows import METADATA, count_columns, episode_counts, schema

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.datasets import Dataset

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
class Outcome:
    """The scores of an evaluation whose rows are in a file, or were not wanted."""

    scores: tuple[Scores, ...]
    facts: Mapping[str, Any]
    rows: Path | None


@dataclass(frozen=True)
class Rules:
    """How answers become rows."""

    fold: int
    fusions: tuple[str, ...]
    protocol: Protocol
    dataset: Dataset | None
    """Gives full-size masks; None scores at network size only."""


def evaluate(
    plan: EvaluationPlan, *, runner: Runner | None = None, on_event: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Predict the episodes of a plan and score them; all rows are kept in memory. See `evaluate_to` for many episodes.

    Args:
        runner: where; in this process by default.
        on_event: called with (episodes done, episodes in all).

    Raises:
        ConfigError: no such fold, a class with too few images for K shots, episodes that need a skipped image, or
            a fusion that the segmenter cannot do.
        DataError: a manifest or `dataset` of other data.
    """
    import pyarrow as pa

    work = _Work.of(plan)
    parts = work.run(runner, on_event, in_memory=True)
    table = pa.concat_tables(in_order(parts, work.tests, work.fusions)).cast(work.schema)
    return Evaluation(table.unify_dictionaries().combine_chunks(), work.scores(), work.facts)


def evaluate_to(
    plan: EvaluationPlan,
    out: Path | None,
    *,
    runner: Runner | None = None,
    on_event: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> Outcome:
    """As `evaluate`, with the rows in a file; in memory are 20 bytes per episode and number of shots, and the episodes.

    Workers write parts into `OUT.parts/` (`pipeline.evaluate.parts`), from which the next call with the same plan goes
    on if this one ends early. The rows are those of `evaluate`, in its order, whatever was interrupted; `seconds` are
    as measured.

    Args:
        out: file of rows; None keeps none. Rows of the same test that are there are made anew.
        overwrite: replace whatever is at `out`, parts of another evaluation too; otherwise both are refused.

    Raises:
        ConfigError, DataError: as `evaluate`; there are parts of another evaluation or rows of another test, or the
            disk refuses.
    """
    work = _Work.of(plan)
    if out is None:
        work.run(runner, on_event)
        return Outcome(work.scores(), work.facts, None)
    require_own_rows(out, work.facts, overwrite)
    with part_folder(out, decided_by(plan, work.facts, schema()), replace=overwrite) as folder:
        parts = work.run(runner, on_event, folder)
        scores = work.scores()
        write_rows(out, in_order(parts, work.tests, work.fusions), work.schema)
        folder.remove()
    return Outcome(scores, work.facts, out)


@dataclass(frozen=True)
class _Work:
    """A plan that was looked through: its episodes and what is said of them."""

    plan: EvaluationPlan
    tests: tuple[Drawn, ...]
    fusions: tuple[str, ...]
    facts: Mapping[str, Any]
    tally: Tally

    @classmethod
    def of(cls, plan: EvaluationPlan) -> _Work:
        protocol, index, fusions = plan.protocol, index_of(plan), fusions_of(plan)
        if protocol.several:
            raise ConfigError(
                f"{protocol.ways}-way episodes, {100 * protocol.absent:g} % of them with none of their classes shown, "
                f"are evaluated by pipeline.evaluate.nway (`hsnet evaluate --ways`). Nothing was computed."
            )
        skipped = skipped_in(plan)
        manifests = list(plan.manifests) or of_protocol(protocol, index, plan.fold, skipped)
        for planned in manifests:
            if planned.manifest.format != MANIFEST_FORMAT:
                raise DataError(
                    f"The manifest holds {planned.manifest.ways}-way episodes, {planned.manifest.absent:,} of them "
                    f"with no class shown; the protocol asks for 1-way ones. Give --ways {planned.manifest.ways}, or "
                    f"another manifest. Nothing was computed."
                )
        tests = tuple(drawn(planned, index, skipped) for planned in manifests)
        return cls(plan, tests, fusions, facts_of(plan, index, fusions, tests), Tally(tests))

    @property
    def schema(self) -> pa.Schema:
        return schema().with_metadata({METADATA: json.dumps(self.facts, sort_keys=True)})

    def run(
        self,
        runner: Runner | None,
        on_event: Callable[[int, int], None] | None,
        folder: PartFolder | None = None,
        in_memory: bool = False,
    ) -> list[Part]:
        plan, protocol = self.plan, self.plan.protocol
        rules = Rules(plan.fold, self.fusions, protocol, plan.dataset)
        headline = protocol.policy, protocol.fusion
        keeping = Keeping(schema(), same_in_all(self.facts), folder.writer if folder else None, in_memory, headline)
        return keep_answers(
            plan,
            self.tests,
            partial(with_masks, read=read_batch, dataset=plan.dataset),
            partial(_part_rows, rules=rules),
            keeping,
            folder=folder,
            tally=self.tally,
            runner=runner,
            on_event=on_event,
        )

    def scores(self) -> tuple[Scores, ...]:
        class_ids = index_of(self.plan).split(self.plan.fold, self.plan.protocol.role).class_ids
        return tuple(
            _scores(k, self.tally.classes[k], self.tally.counts[k].reshape(-1, 2, 2).astype(np.int64), class_ids)
            for k in self.facts["shots"]
        )


def score(
    rows: pa.Table, shots: int, class_ids: Sequence[int], policy: Policy = HEADLINE, fusion: str = "vote"
) -> Scores:
    """mIoU, FB-IoU and class IoUs from the rows of one number of shots and one way to combine them."""
    import pyarrow.compute as pc

    chosen = rows.filter(pc.and_(pc.equal(rows["shots"], shots), pc.equal(rows["fusion"], fusion)))
    return _scores(shots, chosen["class_id"].to_numpy(), episode_counts(chosen, policy), class_ids)


def _scores(
    shots: int, classes: NDArray[np.integer[Any]], counts: NDArray[np.int64], class_ids: Sequence[int]
) -> Scores:
    """The same from class ids (n,) and counts (n, 2, 2)."""
    totals = sum_by_class(torch.from_numpy(counts), classes.tolist(), class_ids)
    drawn_again = resample(counts[None], classes.astype(np.int64), class_ids)
    miou, fb_iou = mean_iou(totals), foreground_background_iou(totals)
    return Scores(
        shots,
        len(classes),
        miou,
        interval(miou, drawn_again.miou()[1][:, 0]),
        fb_iou,
        interval(fb_iou, drawn_again.fb_iou()[1][:, 0]),
        dict(zip(class_ids, class_iou(totals).tolist(), strict=True)),
        {class_id: int((classes == class_id).sum()) for class_id in class_ids},
    )


def _part_rows(
    segmenter: Segmenter,
    loaded: WithMasks[EpisodeBatch],
    episodes: Sequence[Episode],
    block: Block,
    index: DatasetIndex,
    rules: Rules,
) -> PartRows:
    """Rows of episodes that are predicted together."""
    batch = loaded.batch
    size = (batch.target.shape[1], batch.target.shape[2])
    answers = segmenter.answer(batch, *asked_of(block.shots, rules.fusions))
    counts: dict[tuple[int, str], dict[Policy, Tensor]] = {}
    originals = originals_of(loaded.labels, episodes, rules, _truth)
    for shots, fusion in itertools.product(block.shots, rules.fusions):
        masks = combined(answers, slice(None), size, shots, fusion, rules)
        counts[shots, fusion] = _counts("network", masks, batch.target, batch.ignore)
        own = []
        for number, (target, ignore) in enumerate(originals):
            size_there = (target.shape[1], target.shape[2])
            mask = combined(answers, slice(number, number + 1), size_there, shots, fusion, rules)
            own.append(_counts("original", mask, target, ignore))
        counts[shots, fusion] |= joined(own)
    pixels = batch.target.flatten(1).sum(1)
    return PartRows(
        torch.cat([pixels, *(four.flatten() for policies in counts.values() for four in policies.values())]),
        partial(_rows, kinds={case: tuple(policies) for case, policies in counts.items()},
                episodes=episodes, block=block, index=index, fold=rules.fold),
    )  # fmt: skip


def _rows(
    figures: Tensor,
    kinds: Mapping[tuple[int, str], Sequence[Policy]],
    episodes: Sequence[Episode],
    block: Block,
    index: DatasetIndex,
    fold: int,
) -> Rows:
    """Rows from the object pixels of every episode, and its four counts of every kind."""
    pixels = figures[: len(episodes)].tolist()
    counts = iter(figures[len(episodes) :].view(-1, len(episodes), 4).tolist())
    by_case = {case: {policy: next(counts) for policy in policies} for case, policies in kinds.items()}
    rows = []
    for number, episode in enumerate(episodes):
        for (shots, fusion), policies in by_case.items():
            columns = {
                name: value
                for policy, fours in policies.items()
                for name, value in zip(count_columns(policy), fours[number], strict=True)
            }
            rows.append(
                {
                    "episode": number,
                    "fold": fold,
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
    """Counts (B, 2, 2) int64 by both policies of a resolution, on their device; masks and target (B, H, W)."""
    everything = count(masks, target)
    kept = everything if ignore is None else count(masks, target, ignore)
    return {Policy(resolution, ignore=True): kept, Policy(resolution, ignore=False): everything}


def joined(counts: Sequence[Mapping[Policy, Tensor]]) -> dict[Policy, Tensor]:
    """Counts of single episodes, (1, ...) each, as those of all of them; nothing of none."""
    return {policy: torch.cat([some[policy] for some in counts]) for policy in (counts[0] if counts else ())}


def originals_of(
    labels: Sequence[Tensor] | None,
    episodes: Sequence[Episode],
    rules: Rules,
    truth: Callable[[Tensor, Episode], Tensor],
) -> list[tuple[Tensor, Tensor | None]]:
    """(truth, ignore) of every query at its own size, each (1, H, W); none where no labels were read."""
    if labels is None or rules.dataset is None:
        return []
    index = rules.dataset.index
    return [
        (truth(label, episode)[None], (label == index.ignore_label)[None] if index.has_ignore else None)
        for label, episode in zip(labels, episodes, strict=True)
    ]


def _truth(label: Tensor, episode: Episode) -> Tensor:
    return label == episode.class_id + 1


def combined(answers: Answers, chosen: slice, size: tuple[int, int], shots: int, fusion: str, rules: Rules) -> Tensor:
    """Masks (b, H, W) of the chosen episodes by their first supports."""
    tau, strict = rules.protocol.tau, rules.protocol.strict
    if fusion == "joint":
        # One support is its own joint answer.
        logits = answers.joint[shots] if shots > 1 else answers.logits[0]
        return foreground(resize_logits(logits[chosen], size), tau, strict)
    return fuse(answers.logits[:shots, chosen], size, fusion, tau, strict, rules.protocol.normalise)
