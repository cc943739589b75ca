"""The tables of the page as plain values, and how a value looks there: digits, small print, sorting, the bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.common.text import printable
from pipeline.episodes.protocols import FUSIONS, POLICIES
from pipeline.report.published import SOURCE, TITLES, papers_data, published
from pipeline.report.scores import SetDifference, SetScores
from pipeline.scores.bootstrap import Interval, Part
from pipeline.scores.tables import (
    DIFFERENCE,
    Figure,
    Table,
    Value,
    columns,
    difference_values,
    interval_text,
    parts_table,
)

DASH = "–"


@dataclass(frozen=True)
class PageCell:
    """How a value looks on the page."""

    text: str
    detail: str = ""
    """Small print below, such as the interval; a line each."""
    sort: float | None = None
    """What a number is sorted by; None sorts by the text, the dash last."""
    bar: tuple[float, float, float] | None = None
    """Low end, value and high end of a bar from 0 to 100."""


def page_cell(value: Value, kind: str = "number") -> PageCell:
    """A value in a column of that `pipeline.scores.tables.Kind`; no score without its interval."""
    if value is None:
        return PageCell("no episode" if kind == "bars" else DASH)
    if isinstance(value, str):
        return PageCell(value)
    if isinstance(value, Figure):
        return PageCell(value.text, value.detail, value.sort)
    if isinstance(value, Interval):
        text, _, detail = interval_text(value).replace("-", "−").partition(" ")
        sign = "+" if kind == "difference" and value.value > 0 else ""
        low, middle, high = (min(100.0, max(0.0, end)) for end in (value.low, value.value, value.high))
        return PageCell(sign + text, detail, value.value, (low, middle, high) if kind == "bars" else None)
    if kind == "p":
        return PageCell("< 0.001" if value < 0.001 else f"{value:.3f}", sort=value)
    return PageCell(f"{value:,}" if isinstance(value, int) else f"{value:.1f}".replace("-", "−"), sort=value)


def results_tables(sets: Sequence[SetScores]) -> list[Table]:
    """One table per data set in the form of the paper's: method, backbone, shots; folds, mean, FB-IoU."""
    by_data: dict[tuple[str, str], list[SetScores]] = {}
    for scores in sets:
        by_data.setdefault((scores.results.dataset, scores.results.first.facts["data"]), []).append(scores)
    tables = []
    for number, ((dataset, _), same_data) in enumerate(by_data.items()):
        paper = papers_data(same_data[0].results.first)
        folds = sorted({fold for scores in same_data for fold in scores.results.folds})
        heads = [f"fold {fold}" for fold in folds] + ["mean"]
        if len(folds) == 1:
            heads = ["mIoU" if paper == "fss" else f"mIoU, fold {folds[0]}"]
        rows: list[tuple[Value, ...]] = []
        marks = {}
        for shots in sorted({k for scores in same_data for k in scores.results.shots}):
            cited = {}
            for scores in same_data:
                rows += _result_row(scores, shots, folds)
                line = published(scores.results.first, shots)
                if line is not None:
                    cited[scores.results.backbone] = line
            for backbone, line in cited.items():
                marks[len(rows)] = "paper"
                # The paper's means, of FB-IoU too, are over its four folds: they stand beside such means only.
                every = folds == [0, 1, 2, 3]
                values: list[Value] = [line.folds[fold] for fold in folds if line.folds]
                if len(folds) > 1 or not line.folds:
                    values.append(line.mean if every or not line.folds else None)
                rows.append(("HSNet, the paper’s", backbone, shots, *values, line.fb_iou if every else None, None))
        title = TITLES[paper] if paper else f"{printable(dataset)} (own data)"
        tables.append(
            Table(
                f"{title}: mIoU and FB-IoU, percent, each with its 95 % interval",
                columns("method", "backbone", "shots", *heads, "FB-IoU", "episodes", texts=2),
                rows,
                key=f"results-{number}",
                marks=marks,
                notes=_paper_notes(same_data, paper),
            )
        )
    return tables


def _result_row(scores: SetScores, shots: int, folds: Sequence[int]) -> list[tuple[Value, ...]]:
    """The row of a set, or none if it has no such number of shots."""
    by_fold = {score.fold: score for score in scores.headline if score.shots == shots}
    if not by_fold:
        return []
    total = scores.totals(list(by_fold.values()))[0]
    values: list[Value] = [by_fold[fold].miou if fold in by_fold else None for fold in folds]
    # A mean over some of the folds must not stand beside one over all of them.
    every = set(folds) <= by_fold.keys()
    if len(folds) > 1:
        values.append(total.miou if every else None)
    fb_iou = total.fb_iou if every else None
    return [(scores.results.label, scores.results.backbone, shots, *values, fb_iou, total.episodes)]


def _paper_notes(sets: Sequence[SetScores], paper: str | None) -> tuple[str, ...]:
    if paper is None:
        return ("These are not the paper’s data: its tables have no number to compare with.",)
    results = [scores.results for scores in sets]
    if not any(published(these.first, shots) for these in results for shots in these.shots):
        backbones = sorted({these.backbone for these in results})
        return (f"The paper’s tables have no number for {', '.join(backbones)} on {TITLES[paper]}.",)
    notes = [f"The paper’s numbers: {SOURCE}. It gives no intervals."]
    for these in results:
        protocol, size = these.first.protocol, these.first.image_size
        if protocol.draw != "reference" or protocol.changes or size != 400:
            notes.append(
                f"{these.label}: scored by protocol {protocol.name} at {size} px, the paper by its own episodes at "
                f"400 px; a difference may come from that."
            )
    return tuple(notes)


def difference_table(apart: Sequence[SetDifference]) -> Table | None:
    """Paired differences between sets."""
    if not apart:
        return None
    rows = [
        (f"{pair.first.label} − {pair.other.label}", difference.shots, *difference_values(difference))
        for pair in apart
        for difference in pair.differences
        if difference.fold is None or len(pair.first.folds) == 1
    ]
    return Table(
        "Differences on the same episodes, points",
        columns("difference", "shots") | DIFFERENCE,
        rows,
        key="pairs",
        notes=[f"Not paired with {pair.other.label}: {printable(pair.reason)}" for pair in apart if pair.reason],
    )


def policy_table(sets: Sequence[SetScores]) -> Table:
    """mIoU by which pixels count."""
    rows: list[tuple[Value, ...]] = []
    for scores in sets:
        usual = scores.results.first.protocol.fusion
        for shots in scores.results.shots:
            totals = [scores.total(policy, shots, usual) for policy in POLICIES]
            values = (total.miou if total else "not scored" for total in totals)
            rows.append((scores.results.label, shots, *values))
    notes = ["All from the same predictions. “Every pixel” also counts those with the ignore label."]
    if any(len(scores.policies) < len(POLICIES) for scores in sets):
        notes.append("Not scored: evaluated without the photos’ own masks (--data-root).")
    heads = (f"{p.resolution} size, {'without ignored' if p.ignore else 'every pixel'}" for p in POLICIES)
    return Table("mIoU by which pixels count", columns("method", "shots", *heads), rows, key="policies", notes=notes)


def fusion_table(sets: Sequence[SetScores]) -> Table | None:
    """mIoU by how several supports are combined; None if only one way was scored."""
    rows = [
        (scores.results.label, shots, *(_fusion_value(scores, shots, fusion) for fusion in FUSIONS))
        for scores in sets
        for shots in scores.results.shots
        if scores.fusions and shots > 1
    ]
    if not rows:
        return None
    names = {"vote": "vote (published)", "logits": "mean logits", "probabilities": "mean probabilities"}
    heads = (names.get(name, "one joint pass") for name in FUSIONS)
    return Table(
        "mIoU by how several supports are combined",
        columns("method", "shots", *heads),
        rows,
        key="fusions",
        notes=("Below a score: its paired difference from the protocol’s own way, with interval and p.",),
    )


def _fusion_value(scores: SetScores, shots: int, fusion: str) -> Value:
    """A score, with its difference from the protocol's own way below it."""
    total = scores.total(scores.results.first.protocol.policy, shots, fusion)
    apart = [d for d in scores.fusions if (d.shots, d.fusion) == (shots, fusion)]
    if not total or not apart:
        return total.miou if total else None
    whole = next((d for d in apart if d.fold is None), apart[0])
    score, points, p = page_cell(total.miou), page_cell(whole.miou, "difference"), page_cell(whole.p, "p").text
    p = f"p {p}" if p.startswith("<") else f"p = {p}"
    return Figure(score.text, total.miou.value, f"{score.detail}\n{points.text} {points.detail}\n{p}")


def class_tables(scores: SetScores, key: str) -> list[Table]:
    """IoU of every class, one table per fold."""
    return [
        parts_table(
            [score for score in scores.headline if score.fold == fold],
            "class",
            f"{scores.results.label}, fold {fold}: IoU of each class, percent",
            key=f"classes-{key}-{fold}",
        )
        for fold in scores.results.folds
    ]


def size_table(scores: SetScores, key: str) -> Table | None:
    """mIoU by the object's share of the photo."""
    totals = [replace(score, fold=None) for score in scores.totals(scores.headline)]
    if not totals or not totals[0].sizes:
        return None
    title = f"{scores.results.label}: mIoU by the object’s share of the photo, percent"
    return parts_table(totals, "size", title, corner="share", key=f"sizes-{key}")


def seed_table(sets: Sequence[SetScores]) -> Table | None:
    """What each set of episodes says; None if there is one seed only."""
    rows: list[tuple[Value, ...]] = []
    marks = {}
    for scores in sets:
        for score in scores.headline:
            if score.spread is None:
                continue
            where = (score.fold, score.shots)
            for part in score.spread.parts:
                rows.append((scores.results.label, part.name, *where, part.value, part.episodes))
            marks[len(rows)] = "mean"
            deviation, expected = score.spread.deviation, score.spread.expected
            figure = Figure(f"{deviation:.2f}", deviation, f"expected {expected:.2f}")
            rows.append((scores.results.label, "standard deviation", *where, figure, score.episodes))
    if not rows:
        return None
    return Table(
        "mIoU of each set of episodes",
        columns("method", "episodes of", "fold", "shots", "mIoU", "episodes", texts=2) | {"mIoU": "bars"},
        rows,
        key="seeds",
        marks=marks,
        notes=("“Expected” is the deviation that the intervals of single seeds promise.",),
    )


def support_table(sets: Sequence[SetScores]) -> Table | None:
    """How much the choice of the support matters; None where no query was seen with two supports."""
    rows = [
        (scores.results.label, score.shots, spread.within, spread.between, spread.queries, spread.episodes)
        for scores in sets
        for score in scores.totals(scores.headline)
        if (spread := score.support)
    ]
    if not rows:
        return None
    return Table(
        "How much another support changes an episode’s IoU, standard deviation in points",
        columns("method", "shots", "same query, other support", "any two episodes of a class", "queries", "episodes"),
        rows,
        key="supports",
        notes=("Told by queries that were seen with several supports.",),
    )


def cost_table(sets: Sequence[SetScores]) -> Table:
    """Seconds per episode, as the rows have them."""
    import numpy as np

    rows: list[tuple[Value, ...]] = []
    for scores in sets:
        seconds: dict[tuple[object, ...], tuple[int, float]] = {}  # of the most shots of every episode
        for file in scores.results.files:
            names = ("seed", "episode", "shots", "seconds")
            for seed, episode, shots, value in zip(*(file.table[name].to_pylist() for name in names), strict=True):
                key = (file.path, seed, episode)
                if key not in seconds or seconds[key][0] < shots:
                    seconds[key] = shots, value
        values = np.array([value for _, value in seconds.values()])
        measured = sorted({k for k, _ in seconds.values()})
        rows.append(
            (
                scores.results.label,
                Figure(", ".join(map(str, measured)), measured[-1]),
                *(Figure(f"{v:.3f}", v) for v in (float(np.median(values)), float(np.quantile(values, 0.95)))),
                len(values),
            )
        )
    return Table(
        "Seconds per episode",
        columns("method", "shots", "median", "95th percentile", "episodes"),
        rows,
        key="seconds",
        notes=(
            "One pass with all supports gives every smaller number of shots, every policy and every way to combine "
            "supports; reading from the store is not in it.",
        ),
    )


def best_and_worst(scores: SetScores) -> list[tuple[str, tuple[Part, ...]]]:
    """Support photos at both ends: (heading, parts); empty where too few were used often enough."""
    ends: list[tuple[str, tuple[Part, ...]]] = []
    for score in scores.totals(scores.headline):
        if score.support and score.support.best:
            ends += [("best", score.support.best), ("worst", score.support.worst)]
    return ends


def set_notes(sets: Sequence[SetScores]) -> list[str]:
    """What a reader of the scores should know, said once where it holds for all sets."""
    labels: dict[str, list[str]] = {}
    for scores in sets:
        for note in scores.notes:
            labels.setdefault(note, []).append(scores.results.label)
    return [note if len(who) == len(sets) else f"{', '.join(who)}: {note}" for note, who in labels.items()]
