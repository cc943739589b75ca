"""The evaluate stage for episodes of several classes, and for queries that show none of them.

Every class of an episode is answered as in a 1-way evaluation, by the head as it is; `hsnet.ways` makes one label map
of the answers. It needs one number, the background's score: by default 0 for one class, so that 1-way is as it is, and
for several the score with the best mIoU on N-way one-shot episodes of the *training* classes, drawn by the same rules.
The cost is N one-way answers per episode, and the fit's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hsnet.errors import ConfigError
from hsnet.model import resize_logits
from hsnet.ways import best_score, confusion, label_map, tried_counts
from pipeline.common.files import read_table
from pipeline.common.runner import Runner
from pipeline.datasets.index import DatasetIndex
from pipeline.episodes.drawing import PlannedTest, make, of_protocol
from pipeline.episodes.protocols import Policy
from pipeline.episodes.stream import Episode
from pipeline.evaluate.blocks import (
    Block,
    Blocks,
    PartRows,
    Rows,
    WithMasks,
    answered,
    asked_of,
    drawn,
    facts_of,
    fusions_of,
    index_of,
    skipped_in,
    with_masks,
)
from pipeline.evaluate.keeping import Keeping, decided_by, keep_answers, same_in_all
from pipeline.evaluate.parts import Part, PartFolder, in_order, part_folder, require_own_rows, write_rows
from pipeline.evaluate.plan import EvaluationPlan, require_ways
from pipeline.evaluate.stage import Rules, combined, joined, originals_of
from pipeline.heads.segmenters import Answers, Segmenter
from pipeline.loading.batch import WaysBatch, read_ways
from pipeline.scores.rows import METADATA
from pipeline.scores.way_rows import counts_column, of_table, schema
from pipeline.scores.way_scores import WayScore, score_ways

if TYPE_CHECKING:
    import pyarrow as pa

FITTED_ON = 100
"""Episodes of training classes that the background's score is fitted on."""


@dataclass(frozen=True)
class Background:
    """The background's score and where it comes from."""

    score: float
    fit: Mapping[str, Any] | None = None
    """What it was fitted on, with the mIoU there; None if it was given."""


@dataclass(frozen=True)
class WaysEvaluation:
    """All rows and the scores made of them."""

    rows: pa.Table
    """See `pipeline.scores.way_rows`."""
    scores: tuple[WayScore, ...]
    """One per number of shots, by the protocol's own policy and fusion, all seeds together."""
    facts: Mapping[str, Any]
    background: Background


def evaluate_ways(
    plan: EvaluationPlan,
    *,
    background: float | str | None = None,
    runner: Runner | None = None,
    on_event: Callable[[int, int], None] | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> WaysEvaluation:
    """Predict the N-way episodes of a plan and score them.

    Args:
        plan: its protocol says how many `ways`, and the share of queries that show none (`absent`).
        background: the background's score, on the scale of the head's margins (foreground minus background logit);
            "fit" fits it (`fit_background`). None: 0 for one class, "fit" for several.
        runner, on_event: as for `pipeline.evaluate.stage.evaluate`; the fit's episodes count too.
        out, overwrite: a file of rows, made by parts as by `pipeline.evaluate.stage.evaluate_to`; scores are made of it
            then.

    Raises:
        ConfigError: more ways than the fold has classes, or than its training classes for a fit; and what `evaluate`
            refuses.
        DataError: a manifest of other ways or other data.
    """
    protocol, index, fusions = plan.protocol, index_of(plan), fusions_of(plan)
    if isinstance(background, str) and background != "fit":
        raise ConfigError(f"background must be a number or 'fit', got '{background}'.")
    skipped = skipped_in(plan)
    manifests = list(plan.manifests) or of_protocol(protocol, index, plan.fold, skipped)
    for planned in manifests:
        require_ways(planned.manifest, protocol.ways)
    tests = [drawn(planned, index, skipped) for planned in manifests]
    fitting = protocol.ways > 1 if background is None else background == "fit"
    extra = FITTED_ON if fitting else 0
    total = extra + sum(len(test.episodes) for test in tests)
    if fitting:
        chosen = fit_background(plan, runner=runner, on_event=on_event and (lambda done, _: on_event(done, total)))
    else:
        chosen = Background(float(background or 0.0))
    rules = Rules(plan.fold, fusions, protocol, plan.dataset)
    make_rows = partial(_part_rows, rules=rules, background=chosen.score)
    event = on_event and (lambda done, _: on_event(extra + done, total))
    facts = {
        **facts_of(plan, index, fusions, tests),
        "ways": protocol.ways,
        "background": {"score": chosen.score, "fit": chosen.fit},
    }
    columns = schema().with_metadata({METADATA: json.dumps(facts, sort_keys=True)})

    read = partial(with_masks, read=read_ways, dataset=plan.dataset)

    def run(folder: PartFolder | None) -> list[Part]:
        keeping = Keeping(schema(), same_in_all(facts), folder.writer if folder else None, True, None)
        return keep_answers(
            plan, tests, read, make_rows, keeping, folder=folder, runner=runner, on_event=event
        )  # fmt: skip

    if out is None:
        import pyarrow as pa

        table = pa.concat_tables(in_order(run(None), tests, fusions)).cast(columns)
        table = table.unify_dictionaries().combine_chunks()
    else:
        require_own_rows(out, facts, overwrite)
        with part_folder(out, decided_by(plan, facts, schema())) as folder:
            write_rows(out, in_order(run(folder), tests, fusions), columns)
            folder.remove()
        table = read_table(out)
    results = of_table(None, table, facts)
    scores = score_ways([results], policies=[protocol.policy], fusions=[protocol.fusion])
    return WaysEvaluation(table, tuple(scores), facts, chosen)


def fit_background(
    plan: EvaluationPlan,
    *,
    episodes: int = FITTED_ON,
    runner: Runner | None = None,
    on_event: Callable[[int, int], None] | None = None,
) -> Background:
    """The background's score with the best mIoU on one-shot N-way episodes of the fold's *training* classes.

    The episodes have the protocol's ways and its share of queries that show none; of `hsnet.ways.SCORES` all are tried.
    Nothing of the test classes is looked at. With one support all ways to combine supports agree, so one score serves
    them all, and every number of shots.

    Raises:
        ConfigError: the fold has fewer training classes than the protocol's ways.
    """
    protocol, index, skipped = plan.protocol, index_of(plan), skipped_in(plan)
    choices = {"role": "trn", "ways": protocol.ways, "absent": protocol.absent, "episodes": episodes}
    seed = protocol.seeds[0]
    try:
        manifest = make(index, plan.fold, 1, seed=seed, skipped=skipped, **choices)
    except ConfigError as error:
        raise ConfigError(
            f"The background's score cannot be fitted on the training classes: {error} Or give it: --background 0."
        ) from error
    class_ids = sorted({class_id for row in manifest.rows for class_id, _ in row.classes})
    blocks = Blocks([drawn(PlannedTest((1,), seed, manifest), index, skipped)])
    made = partial(_fit_rows, places={class_id: place for place, class_id in enumerate(class_ids)})
    counted = answered(replace(plan, dataset=None), blocks, read_ways, made, _summed, runner, on_event)
    counts = torch.stack(list(counted)).sum(0)
    score, miou = best_score(counts)
    return Background(score, {**choices, "fold": plan.fold, "seed": seed, "manifest": manifest.digest, "miou": miou})


def _fit_rows(
    segmenter: Segmenter,
    batch: WaysBatch,
    episodes: Sequence[Episode],
    block: Block,
    index: DatasetIndex,
    places: Mapping[int, int],
) -> PartRows:
    size = (batch.truth.shape[1], batch.truth.shape[2])
    answers = [segmenter.answer(batch.of_class(place)) for place in range(batch.ways)]
    margins = torch.stack([_margin(answer.logits[0], size) for answer in answers], 1)
    device = margins.device
    rows = torch.tensor([[places[c] for c, _ in episode.classes] for episode in episodes], device=device)
    counts = tried_counts(margins, _order(episodes, device), batch.truth, rows, len(places), batch.batch.ignore)
    return PartRows(counts.flatten(), partial(_fit_row, shape=counts.shape))


def _fit_row(figures: Tensor, shape: torch.Size) -> Rows:
    return [{"episode": 0, "counts": figures.view(shape)}]


def _summed(blocks: Sequence[Block], rows: Rows) -> Tensor:
    return torch.stack([row["counts"] for row in rows]).sum(0)


def _part_rows(
    segmenter: Segmenter,
    loaded: WithMasks[WaysBatch],
    episodes: Sequence[Episode],
    block: Block,
    index: DatasetIndex,
    rules: Rules,
    background: float,
) -> PartRows:
    """Rows of episodes that are predicted together."""
    batch = loaded.batch
    size = (batch.truth.shape[1], batch.truth.shape[2])
    asked = asked_of(block.shots, rules.fusions)
    answers = [_lowered(segmenter.answer(batch.of_class(place), *asked), background) for place in range(batch.ways)]
    order = _order(episodes, batch.truth.device)
    ways, ignore = batch.ways, batch.batch.ignore
    counts: dict[tuple[int, str], dict[Policy, Tensor]] = {}
    originals = originals_of(loaded.labels, episodes, rules, _truth)
    for case in ((shots, fusion) for shots in block.shots for fusion in rules.fusions):
        labels = _labels(answers, slice(None), size, case, order, rules)
        counts[case] = _counts("network", labels, batch.truth, ways, ignore)
        there = []
        for number, (truth, left_out) in enumerate(originals):
            own = slice(number, number + 1)
            labels = _labels(answers, own, (truth.shape[1], truth.shape[2]), case, order[own], rules)
            there.append(_counts("original", labels, truth, ways, left_out))
        counts[case] |= joined(there)
    pixels = torch.stack([(batch.truth == place + 1).flatten(1).sum(1) for place in range(ways)], 1)
    return PartRows(
        torch.cat([pixels.flatten(), *(cells.flatten() for some in counts.values() for cells in some.values())]),
        partial(_rows, kinds={case: tuple(policies) for case, policies in counts.items()}, ways=ways,
                episodes=episodes, block=block, index=index, fold=rules.fold),
    )  # fmt: skip


def _rows(
    figures: Tensor,
    kinds: Mapping[tuple[int, str], Sequence[Policy]],
    ways: int,
    episodes: Sequence[Episode],
    block: Block,
    index: DatasetIndex,
    fold: int,
) -> Rows:
    """Rows from the object pixels of every episode and class, and its confusions of every kind."""
    size = len(episodes)
    pixels = figures[: size * ways].view(size, ways).tolist()
    confusions = iter(figures[size * ways :].view(-1, size, (ways + 1) ** 2).tolist())
    by_case = {case: {policy: next(confusions) for policy in policies} for case, policies in kinds.items()}
    rows = []
    for number, episode in enumerate(episodes):
        classes = [class_id for class_id, _ in episode.classes]
        for (shots, fusion), values in by_case.items():
            rows.append(
                {
                    "episode": number,
                    "fold": fold,
                    "seed": block.seed,
                    "shots": shots,
                    "fusion": fusion,
                    "classes": classes,
                    "class_names": [index.classes[class_id] for class_id in classes],
                    "query": index.images[episode.query],
                    "supports": [[index.images[image] for image in some[:shots]] for _, some in episode.classes],
                    "absent": episode.absent,
                    "object_pixels": pixels[number],
                    "manifest": block.manifests[shots],
                    **{counts_column(policy): cells[number] for policy, cells in values.items()},
                }
            )
    return rows


def _labels(
    answers: Sequence[Answers],
    chosen: slice,
    size: tuple[int, int],
    case: tuple[int, str],
    order: Tensor,
    rules: Rules,
) -> Tensor:
    """(b, H, W) label maps of the chosen episodes by their first supports; what wins is the mean answer's score."""
    shots, fusion = case
    claims = torch.stack([combined(one, chosen, size, shots, fusion, rules) for one in answers], 1)
    if len(answers) == 1:
        return claims[:, 0].long()
    scores = []
    for one in answers:
        logits = one.logits[:shots, chosen]
        if fusion == "joint" and shots > 1:
            scores.append(_margin(one.joint[shots][chosen], size))
        elif fusion == "probabilities":
            shares = resize_logits(logits.flatten(0, 1), size).softmax(1)[:, 1]
            scores.append(shares.unflatten(0, logits.shape[:2]).mean(0))
        else:
            scores.append(_margin(logits.mean(0), size))
    return label_map(claims, torch.stack(scores, 1), order)


def _margin(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W): foreground minus background logit."""
    resized = resize_logits(logits, size)
    return resized[:, 1] - resized[:, 0]


def _lowered(answers: Answers, background: float) -> Answers:
    """The answers of a class that must beat a background of that score."""
    if background == 0:
        return answers
    # Channel 2 of (K, B, 2, h, w) and of (B, 2, h, w), counted from the end.
    cost = torch.tensor([0.0, background], device=answers.logits.device)[:, None, None]
    return Answers(answers.logits - cost, {k: logits - cost for k, logits in answers.joint.items()})


def _order(episodes: Sequence[Episode], device: torch.device) -> Tensor:
    """(B, N) places in the order of their class ids: where scores are equal, the query's class has no advantage."""
    ids = torch.tensor([[class_id for class_id, _ in episode.classes] for episode in episodes], device=device)
    return ids.argsort(1)


def _counts(resolution: str, labels: Tensor, truth: Tensor, ways: int, ignore: Tensor | None) -> dict[Policy, Tensor]:
    everything = confusion(labels, truth, ways)
    kept = everything if ignore is None else confusion(labels, truth, ways, ignore)
    return {Policy(resolution, ignore=True): kept, Policy(resolution, ignore=False): everything}


def _truth(label: Tensor, episode: Episode) -> Tensor:
    """0, or n + 1 where a label map shows the class at place n of the episode."""
    truth = torch.zeros_like(label, dtype=torch.int64)
    for place, (class_id, _) in enumerate(episode.classes):
        truth.masked_fill_(label == class_id + 1, place + 1)
    return truth
