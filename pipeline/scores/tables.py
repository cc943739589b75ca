"""The tables of an analysis as plain values, made here once and shown as text, Markdown, CSV or HTML elsewhere.

Nothing heavy is imported: `hsnet --help` comes by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from pipeline.episodes.protocols import Policy
    from pipeline.scores.analysis import Analysis, Difference, Score
    from pipeline.scores.bootstrap import Interval, Part
    from pipeline.scores.support_spread import SupportSpread

Value: TypeAlias = "str | int | float | Interval | Figure | None"
"""What stands in a cell: text, a count, a number, a score with its interval, or nothing."""

Kind = Literal["text", "number", "bars", "difference", "p"]
"""What stands in a column: "bars" are scores from 0 to 100 to be drawn, "difference" are points with their sign."""

By = Literal["class", "size", "seed"]

LONGEST = 40
"""Rows of a table that are shown as they are."""

DIFFERENCE: dict[str, Kind] = {
    "mIoU": "difference",
    "p": "p",
    "FB-IoU": "difference",
    "episodes": "number",
    "needed for +-0.5": "number",
}
"""Columns of `difference_values`."""

FIGURES = (
    *("set", "kind", "policy", "shots", "fusion", "fusion_against", "fold", "name"),
    *("episodes", "value", "low", "high", "p", "episodes_for_half_point"),
)
"""Columns of `figures`."""


@dataclass(frozen=True)
class Figure:
    """A number that is written in a way of its own."""

    text: str
    sort: float
    """What it is sorted by."""
    detail: str = ""
    """Small print below; a line each."""


@dataclass(frozen=True)
class Table:
    """A table of plain values."""

    title: str
    columns: Mapping[str, Kind]
    """Heading -> what stands below it."""
    rows: Sequence[Sequence[Value]]
    key: str = ""
    """Its name on a page of several."""
    marks: Mapping[int, str] = field(default_factory=dict)
    """Number of a row that is not like the others -> "paper" for numbers that are not ours, "mean" for totals."""
    notes: Sequence[str] = ()
    long: bool = False
    """More rows than most want to see: cut in a terminal, closed on a page until it is clicked."""


def columns(*names: str, texts: int = 1) -> dict[str, Kind]:
    """Columns of which the first `texts` hold text, the others numbers."""
    return {name: "text" if number < texts else "number" for number, name in enumerate(names)}


def interval_text(value: Interval | None, sign: bool = False) -> str:
    """ "51.2 [49.8, 52.7]"; a dash where there is nothing."""
    if value is None:
        return "-"
    form = "+.1f" if sign else ".1f"
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"


def policy_name(policy: Policy) -> str:
    """What a policy is called on the command line: network, network-all, original, original-all."""
    return f"{policy.resolution}{'' if policy.ignore else '-all'}"


def tables(analysis: Analysis) -> Iterator[Table]:
    """All that was analyzed, for people."""
    label = labels([*analysis.scores, *analysis.differences])
    rows: list[Sequence[Value]] = [(label(s), s.miou, s.fb_iou, s.episodes, s.needed) for s in analysis.scores]
    yield Table("Scores, percent", columns("", "mIoU", "FB-IoU", "episodes", "needed for +-0.5"), rows)
    if analysis.differences:
        rows = [(label(difference), *difference_values(difference)) for difference in analysis.differences]
        yield Table("Difference on the same episodes, points", {"": "text", **DIFFERENCE}, rows)
    yield from _parts_tables(analysis.scores, "class", "IoU by class, percent")
    yield from _parts_tables(analysis.differences, "class", "Difference by class, points; each interval by itself")
    yield from _parts_tables(analysis.scores, "size", "mIoU by the object's share of the squashed photo")
    yield from _parts_tables(analysis.scores, "seed", "mIoU by seed")
    for score in analysis.scores:
        if score.support:
            yield _support_table(score.support, f"Choice of support, IoU of an episode: {label(score)}")


def difference_values(difference: Difference) -> tuple[Value, ...]:
    """A difference in the columns of DIFFERENCE."""
    return difference.miou, difference.p, difference.fb_iou, difference.episodes, difference.needed


def labels(scores: Sequence[Score | Difference]) -> Callable[[Score | Difference], str]:
    """What tells scores apart: only what differs between them, and always the number of shots."""
    folds, policies = {score.fold for score in scores}, {score.policy for score in scores}
    fusions: dict[int, set[tuple[str, str]]] = {}  # of one support, there is mostly one
    for score in scores:
        fusions.setdefault(score.shots, set()).add((score.fusion, _fusion_against(score)))

    def label(score: Score | Difference) -> str:
        parts, against = [f"{score.shots}-shot"], _fusion_against(score)
        if len(fusions[score.shots]) > 1 or against != score.fusion:
            parts.append(score.fusion if against == score.fusion else f"{score.fusion} - {against}")
        if len(folds) > 1:
            parts.append(_fold_name(score.fold))
        if len(policies) > 1:
            parts.append(policy_name(score.policy))
        return ", ".join(parts)

    return label


def parts_table(scores: Sequence[Any], by: By, title: str, corner: str | None = None, **shown: Any) -> Table:
    """Classes, sizes of objects or seeds down, scores across.

    Args:
        scores: of `Score` or `Difference`, with such parts.
        corner: heading of the first column.
        shown: what else a `Table` has.
    """
    label = labels(scores)
    each = [_parts(score, by) for score in scores]
    heads: dict[str, Kind] = {
        {"class": "class", "size": "object", "seed": ""}[by] if corner is None else corner: "text",
        **{label(score): "bars" for score in scores},
        "episodes": "number",
        **({"classes": "number"} if by == "size" else {}),
    }
    rows: list[tuple[Value, ...]] = []
    marks = {}
    for number, part in enumerate(each[0]):
        values = (_value_like(parts, number, part.name) for parts in each)
        # Sizes are sorted by size, not by name.
        name = Figure(part.name, number) if by == "size" else part.name
        rows.append((name, *values, part.episodes, *([part.classes] if by == "size" else [])))
    long = len(rows) > LONGEST
    if by == "seed":
        marks = {len(rows): "mean", len(rows) + 1: "mean"}
        rows.append(("standard deviation", *(score.spread.deviation for score in scores), ""))
        rows.append(("expected from one seed", *(score.spread.expected for score in scores), ""))
    return Table(title, heads, rows, marks=marks, long=long, **shown)


def _parts(score: Any, by: By) -> Sequence[Part]:
    if by == "seed":
        return score.spread.parts if score.spread else ()
    parts: Sequence[Part] = score.classes if by == "class" else score.sizes
    return parts


def _value_like(parts: Sequence[Part], number: int, name: str) -> Interval | None:
    """The value of the part of that name: at that number, unless some size has no object here."""
    if number < len(parts) and parts[number].name == name:
        return parts[number].value
    return next((part.value for part in parts if part.name == name), None)


def _parts_tables(scores: Sequence[Score | Difference], by: By, title: str) -> Iterator[Table]:
    """A table per fold and policy."""
    groups: dict[tuple[int | None, Policy], list[Score | Difference]] = {}
    for score in scores:
        if _parts(score, by):
            groups.setdefault((score.fold, score.policy), []).append(score)
    for (fold, policy), chosen in groups.items():
        which = f", {_fold_name(fold)}" if len({score.fold for score in scores}) > 1 else ""
        which += f", {policy_name(policy)}" if len({score.policy for score in scores}) > 1 else ""
        yield parts_table(chosen, by, title + which)


def _support_table(spread: SupportSpread, title: str) -> Table:
    rows: list[tuple[Value, ...]] = [
        (
            "standard deviation between supports of one query",
            spread.within,
            f"{spread.queries:,} queries, {spread.episodes:,} episodes",
        ),
        ("standard deviation between episodes of one class", spread.between, ""),
    ]
    for which, parts in (("best", spread.best), ("worst", spread.worst)):
        for part in parts:
            value = interval_text(part.value, sign=True)
            rows.append((f"{which} of {spread.photos:,}: {part.name}", value, f"{part.episodes} queries"))
    return Table(title, columns("", "points", "of"), rows)


def figures(analysis: Analysis) -> Table:
    """All figures for other programs: one a row, in full, with what it is of."""
    rows: list[tuple[Value, ...]] = []

    def add(which: str, kind: str, score: Score | Difference, value: Interval | None, **more: Value) -> None:
        fold = "mean" if score.fold is None else score.fold
        against = getattr(score, "fusion_against", None)
        where = (which, kind, policy_name(score.policy), score.shots, score.fusion, against, fold, more.get("name"))
        numbers = (value.value, value.low, value.high) if value else (None, None, None)
        rows.append((*where, more.get("n", score.episodes), *numbers, more.get("p"), more.get("needed")))

    def add_parts(which: str, kind: str, score: Score | Difference, parts: Sequence[Part]) -> None:
        for part in parts:
            add(which, kind, score, part.value, name=part.name, n=part.episodes)

    for which, scores in (("rows", analysis.scores), ("against", analysis.scores_against)):
        for score in scores:
            add(which, "miou", score, score.miou, needed=score.needed)
            add(which, "fb_iou", score, score.fb_iou)
            add_parts(which, "class_iou", score, score.classes)
            add_parts(which, "size_miou", score, score.sizes)
            add_parts(which, "seed_miou", score, _parts(score, "seed"))
            if spread := score.support:
                add(which, "support_deviation", score, spread.within, n=spread.episodes)
                add_parts(which, "support_best", score, spread.best)
                add_parts(which, "support_worst", score, spread.worst)
    for difference in analysis.differences:
        add("difference", "miou", difference, difference.miou, p=difference.p, needed=difference.needed)
        add("difference", "fb_iou", difference, difference.fb_iou)
        add_parts("difference", "class_iou", difference, difference.classes)
    return Table("All figures", columns(*FIGURES), rows)


def _fusion_against(score: Score | Difference) -> str:
    return getattr(score, "fusion_against", score.fusion)


def _fold_name(fold: int | None) -> str:
    return "mean of folds" if fold is None else f"fold {fold}"
