"""What `hsnet analyze` prints: tables for people, Markdown for papers, CSV and JSON for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from commands.terminal import fact_lines, plain, table
from pipeline.common.text import printable
from pipeline.episodes.protocols import POLICIES, Policy

if TYPE_CHECKING:
    from pipeline.analyze import Analysis, Part, Score
    from pipeline.scores.bootstrap import Interval

POLICY_NAMES = {f"{p.resolution}{'' if p.ignore else '-all'}": p for p in POLICIES}
"""What a policy is called on the command line: network, network-all, original, original-all."""

LONGEST = 40
"""Classes shown in a table; with more, the worst and the best."""

COLUMNS = (
    *("set", "kind", "policy", "shots", "fusion", "fusion_against", "fold", "name"),
    *("episodes", "value", "low", "high", "p", "episodes_for_half_point"),
)
"""Of the CSV."""

Table = tuple[str, list[str], list[list[str]]]
"""Title, head, rows."""


def as_values(found: Analysis) -> dict[str, Any]:
    """Everything as JSON values."""

    def files(which: Sequence[Any]) -> list[dict[str, Any]]:
        return [
            {
                "path": one.path,
                "fold": one.fold,
                "store": one.store,
                "checkpoint": one.checkpoint,
                "protocol": one.protocol.to_dict(),
                "manifests": {f"{k}-shot, seed {s}": digest for (k, s), digest in one.manifests.items()},
            }
            for one in which
        ]

    rest = {name: plain(getattr(found, name)) for name in ("unit", "scores", "scores_against", "differences", "notes")}
    return {"files": files(found.files), "against": files(found.against), **rest}


def plain_text(found: Analysis) -> str:
    parts = [fact_lines(_facts(found))]
    for title, head, body in _tables(found):
        parts.append(f"{title}\n{table(body, head)}")
    notes = "\n".join(f"Note: {printable(note)}" for note in found.notes)
    return "\n\n".join([*parts, notes] if notes else parts)


def markdown_text(found: Analysis) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.strip().replace('|', chr(92) + '|') for cell in cells)} |"

    parts = ["\n".join(f"- {name}: {value}" for name, value in _facts(found).items())]
    for title, head, body in _tables(found):
        rule = "|" + "---|" * len(head)
        parts.append("\n".join([f"**{title}**", "", line(head), rule, *map(line, body)]))
    parts += [f"Note: {printable(note)}" for note in found.notes]
    return "\n\n".join(parts)


def _facts(found: Analysis) -> dict[str, str]:
    from pipeline.scores.rows import differences

    first = found.files[0]
    facts = {
        "data set": f"{printable(first.facts['dataset'])} ({first.facts['data'][:15]}), '{first.facts['role']}', folds "
        + ", ".join(map(str, sorted({one.fold for one in found.files}))),
        "scored": _head(found.files),
    }
    if found.against:
        facts["against"] = _head(found.against)
        apart = differences(first, found.against[0])
        if apart:
            facts["they differ in"] = "; ".join(f"{name}: {_short(a)} / {_short(b)}" for name, (a, b) in apart.items())
    facts |= first.protocol.lines()
    facts["scored at"] = "; ".join(dict.fromkeys(str(one.policy) for one in found.scores))
    what = "episodes" if found.unit == "episode" else "query photos"
    facts["intervals"] = f"95 %, 2,000 resamples of {what} within each class"
    return facts


def _short(value: object) -> str:
    text = printable(str(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _head(files: Sequence[Any]) -> str:
    """The method and its checkpoints."""
    method = (files[0].facts.get("method") or {}).get("name", "unknown")
    checkpoints = dict.fromkeys(one.checkpoint for one in files if one.checkpoint)
    shown = ", ".join(digest[:15] for digest in checkpoints)
    names = ", ".join(printable(one.path) for one in files)
    return f"{printable(str(method))}{f' ({shown})' if shown else ''}: {names}"


def _tables(found: Analysis) -> Iterator[Table]:
    label = _labels([*found.scores, *found.differences])
    yield (
        "Scores, percent",
        ["", "mIoU", "FB-IoU", "episodes", "for +-0.5"],
        [
            [label(one), interval_text(one.miou), interval_text(one.fb_iou), f"{one.episodes:,}", _number(one.needed)]
            for one in found.scores
        ],
    )
    if found.differences:
        yield (
            "Difference on the same episodes, points",
            ["", "mIoU", "p", "FB-IoU", "episodes", "for +-0.5"],
            [
                [
                    label(one),
                    interval_text(one.miou),
                    f"{one.p:.4f}",
                    interval_text(one.fb_iou),
                    f"{one.episodes:,}",
                    _number(one.needed),
                ]
                for one in found.differences
            ],
        )
    for made, title in (
        (found.scores, "IoU by class, percent"),
        (found.differences, "Difference by class, points; each interval by itself"),
    ):
        yield from _grid(made, title, "class", _classes)
    yield from _grid(found.scores, "mIoU by the object's share of the squashed photo", "object", _sizes)
    yield from _grid(found.scores, "mIoU by seed", "", _seeds)
    for one in found.scores:
        if one.support:
            title = f"Choice of support, IoU of an episode: {label(one)}"
            yield title, ["", "points", "of"], _support_rows(one)


def _classes(one: Any) -> Sequence[Part]:
    return one.classes


def _sizes(one: Any) -> Sequence[Part]:
    return one.sizes


def _seeds(one: Any) -> Sequence[Part]:
    return one.spread.parts if one.spread else ()


def _grid(made: Sequence[Any], title: str, corner: str, parts_of: Callable[[Any], Sequence[Part]]) -> Iterator[Table]:
    """A table per fold and policy: classes, sizes or seeds down, numbers of shots and fusions across."""
    groups: dict[tuple[int | None, Policy], list[Any]] = {}
    for one in made:
        if parts_of(one):
            groups.setdefault((one.fold, one.policy), []).append(one)
    for (fold, policy), chosen in groups.items():
        label = _labels(chosen)
        columns = [parts_of(one) for one in chosen]
        rows = [
            [printable(part.name), *(interval_text(column[place].value) for column in columns), f"{part.episodes:,}"]
            for place, part in enumerate(columns[0])
        ]
        named = title + (f", {_fold_name(fold)}" if len({one.fold for one in made}) > 1 else "")
        named += f", {_policy_name(policy)}" if len({one.policy for one in made}) > 1 else ""
        if len(rows) > LONGEST:
            order = sorted(range(len(rows)), key=lambda place: _value(columns[0][place]))
            kept = sorted(order[: LONGEST // 2]) + sorted(order[-LONGEST // 2 :])
            named += f"; the {LONGEST // 2} lowest and highest, {len(rows) - len(kept)} more with --csv"
            rows = [rows[place] for place in kept]
        if parts_of is _sizes:
            for row, part in zip(rows, columns[0], strict=True):
                row.append(str(part.classes))
        if parts_of is _seeds:
            spreads = [one.spread for one in chosen]
            rows.append(["standard deviation", *(f"{spread.deviation:.2f}" for spread in spreads), ""])
            rows.append(["expected from one seed", *(f"{spread.expected:.2f}" for spread in spreads), ""])
        head = [corner, *(label(one) for one in chosen), "episodes", *(["classes"] if parts_of is _sizes else [])]
        yield named, head, rows


def _support_rows(one: Score) -> list[list[str]]:
    assert one.support is not None
    found = one.support
    rows = [
        [
            "standard deviation between supports of one query",
            interval_text(found.within),
            f"{found.queries:,} queries, {found.episodes:,} episodes",
        ],
        ["standard deviation between episodes of one class", f"{found.between:.2f}", ""],
    ]
    for title, parts in (("best", found.best), ("worst", found.worst)):
        for part in parts:
            rows.append(
                [
                    f"{title} of {found.photos:,}: {printable(part.name)}",
                    interval_text(part.value, sign=True),
                    f"{part.episodes} queries",
                ]
            )
    return rows


def _labels(made: Sequence[Any]) -> Callable[[Any], str]:
    """What tells scores apart: only what differs between them, and always the number of shots."""
    folds, policies = {one.fold for one in made}, {one.policy for one in made}
    fusions: dict[int, set[tuple[str, str]]] = {}  # of one support, there is mostly one
    for one in made:
        fusions.setdefault(one.shots, set()).add((one.fusion, getattr(one, "fusion_against", one.fusion)))

    def label(one: Any) -> str:
        parts = [f"{one.shots}-shot"]
        against = getattr(one, "fusion_against", one.fusion)
        if len(fusions[one.shots]) > 1 or against != one.fusion:
            parts.append(one.fusion if against == one.fusion else f"{one.fusion} - {against}")
        if len(folds) > 1:
            parts.append(_fold_name(one.fold))
        if len(policies) > 1:
            parts.append(_policy_name(one.policy))
        return ", ".join(parts)

    return label


def _fold_name(fold: int | None) -> str:
    return "mean of folds" if fold is None else f"fold {fold}"


def _policy_name(policy: Policy) -> str:
    return next(name for name, one in POLICY_NAMES.items() if one == policy)


def csv_text(found: Analysis) -> str:
    """One figure a line, with what it is of."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)

    def write(
        which: str, one: Any, kind: str, name: str, n: int, value: Interval | None, p: Any = "", need: Any = ""
    ) -> None:
        where = [which, kind, _policy_name(one.policy), one.shots, one.fusion, getattr(one, "fusion_against", "")]
        numbers = ["", "", ""] if value is None else [value.value, value.low, value.high]
        fold = "mean" if one.fold is None else one.fold
        writer.writerow([*where, fold, name, n, *numbers, p, "" if need is None else need])

    for which, scores in (("rows", found.scores), ("against", found.scores_against)):
        for one in scores:
            write(which, one, "miou", "", one.episodes, one.miou, need=one.needed)
            write(which, one, "fb_iou", "", one.episodes, one.fb_iou)
            spread = one.spread.parts if one.spread else ()
            for kind, parts in (("class_iou", one.classes), ("size_miou", one.sizes), ("seed_miou", spread)):
                for part in parts:
                    write(which, one, kind, printable(part.name), part.episodes, part.value)
            if one.support:
                write(which, one, "support_deviation", "", one.support.episodes, one.support.within)
                for kind, parts in (("support_best", one.support.best), ("support_worst", one.support.worst)):
                    for part in parts:
                        write(which, one, kind, printable(part.name), part.episodes, part.value)
    for apart in found.differences:
        write("difference", apart, "miou", "", apart.episodes, apart.miou, apart.p, apart.needed)
        write("difference", apart, "fb_iou", "", apart.episodes, apart.fb_iou)
        for part in apart.classes:
            write("difference", apart, "class_iou", printable(part.name), part.episodes, part.value)
    return out.getvalue()


def _value(part: Part) -> float:
    return part.value.value if part.value else 0.0


def interval_text(value: Interval | None, sign: bool = False) -> str:
    """ "51.2 [49.8, 52.7]"; a dash where there is nothing."""
    if value is None:
        return "-"
    form = "+.1f" if sign else ".1f"
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
