"""The tables of the page as plain values: what stands in a cell, what it is sorted by, which bar is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.analyze import Part, Score
from pipeline.common.text import printable
from pipeline.episodes.protocols import FUSIONS, POLICIES
from pipeline.report.published import SOURCE, TITLES, papers_data, published
from pipeline.report.scores import SetDifference, SetScores
from pipeline.scores.bootstrap import Interval

DASH = "–"


@dataclass(frozen=True)
class Cell:
    """What stands in a cell."""

    text: str
    detail: str = ""
    """Small print below, such as the interval; a line each."""
    sort: float | None = None
    """What a number is sorted by; None sorts by the text, the dash last."""
    bar: tuple[float, float, float] | None = None
    """Low end, value and high end of a bar from 0 to 100."""


@dataclass(frozen=True)
class Row:
    cells: tuple[Cell, ...]
    kind: str = ""
    """ "paper" for numbers that are not ours, "mean" for totals."""


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by every column."""

    key: str
    """Unique on the page."""
    caption: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    texts: int = 1
    """The first so many columns are text; the others are numbers."""
    notes: tuple[str, ...] = ()
    folded: bool = False
    """Closed until it is clicked."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """ "text", "number" or "bars" for every column."""
        bars = {place for row in self.rows for place, cell in enumerate(row.cells) if cell.bar}
        return tuple(
            "text" if place < self.texts else "bars" if place in bars else "number" for place in range(len(self.head))
        )


def number(value: float, digits: int = 1) -> str:
    """A number with a proper minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def interval_text(found: Interval, digits: int = 1) -> str:
    return f"[{number(found.low, digits)}, {number(found.high, digits)}]"


def score_cell(found: Interval | None, *, bar: bool = False, missing: str = DASH) -> Cell:
    """A score with its interval; never one without the other."""
    if found is None:
        return Cell(missing)
    drawn = (_clip(found.low), _clip(found.value), _clip(found.high)) if bar else None
    return Cell(number(found.value), interval_text(found), found.value, drawn)


def difference_cell(found: Interval) -> Cell:
    sign = "+" if found.value > 0 else ""
    return Cell(sign + number(found.value), interval_text(found), found.value)


def count_cell(value: int | None) -> Cell:
    return Cell(DASH) if value is None else Cell(f"{value:,}", "", value)


def p_cell(p: float) -> Cell:
    return Cell("< 0.001" if p < 0.001 else f"{p:.3f}", "", p)


def results_tables(sets: Sequence[SetScores]) -> list[Table]:
    """One table per data set in the form of the paper's: method, backbone, shots; folds, mean, FB-IoU."""
    tables = []
    for place, data in enumerate(dict.fromkeys((one.results.dataset, one.results.first.facts["data"]) for one in sets)):
        own = [one for one in sets if (one.results.dataset, one.results.first.facts["data"]) == data]
        paper = papers_data(own[0].results.first)
        folds = sorted({fold for one in own for fold in one.results.folds})
        single = len(folds) == 1
        heads = [f"mIoU, fold {folds[0]}"] if single else [*(f"fold {fold}" for fold in folds), "mean"]
        if paper == "fss":
            heads = ["mIoU"]
        rows = []
        for shots in sorted({k for one in own for k in one.results.shots}):
            cited = {}
            for one in own:
                rows.append(_result_row(one, shots, folds))
                line = published(one.results.first, shots)
                if line is not None:
                    cited[one.results.backbone] = line
            for backbone, line in cited.items():
                cells = [Cell(number(line.folds[fold]), "", line.folds[fold]) for fold in folds if line.folds]
                if not single or not line.folds:
                    whole = set(folds) == {0, 1, 2, 3} or not line.folds
                    cells.append(Cell(number(line.mean), "", line.mean) if whole else Cell(DASH))
                # FB-IoU of the paper is the mean over its four folds: it stands beside that mean only.
                whole = line.fb_iou is not None and set(folds) == {0, 1, 2, 3}
                fb = Cell(number(line.fb_iou), "", line.fb_iou) if whole and line.fb_iou is not None else Cell(DASH)
                head = (Cell("HSNet, the paper’s"), Cell(backbone), Cell(str(shots), "", shots))
                rows.append(Row((*head, *cells, fb, Cell(DASH)), "paper"))
        title = TITLES[paper] if paper else f"{printable(data[0])} (own data)"
        tables.append(
            Table(
                f"results-{place}",
                f"{title}: mIoU and FB-IoU, percent, each with its 95 % interval",
                ("method", "backbone", "shots", *heads, "FB-IoU", "episodes"),
                tuple(row for row in rows if row is not None),
                texts=2,
                notes=_paper_notes(own, paper),
            )
        )
    return tables


def _result_row(one: SetScores, shots: int, folds: Sequence[int]) -> Row | None:
    scores = {score.fold: score for score in one.headline if score.shots == shots}
    if not scores:
        return None
    total = one.totals(list(scores.values()))[0]
    cells = [score_cell(scores[fold].miou) if fold in scores else Cell(DASH) for fold in folds]
    if len(folds) > 1:
        # A mean over some of the folds must not stand beside one over all of them.
        cells.append(score_cell(total.miou) if set(folds) <= scores.keys() else Cell(DASH))
    fb = score_cell(total.fb_iou) if set(folds) <= scores.keys() else Cell(DASH)
    head = (Cell(one.results.label), Cell(one.results.backbone), Cell(str(shots), "", shots))
    return Row((*head, *cells, fb, count_cell(total.episodes)))


def _paper_notes(own: Sequence[SetScores], paper: str | None) -> tuple[str, ...]:
    if paper is None:
        return ("These are not the paper’s data: its tables have no number to compare with.",)
    backbones = sorted({one.results.backbone for one in own})
    if not any(published(one.results.first, shots) for one in own for shots in one.results.shots):
        return (f"The paper’s tables have no number for {', '.join(backbones)} on {TITLES[paper]}.",)
    notes = [f"The paper’s numbers: {SOURCE}. It gives no intervals."]
    for one in own:
        protocol, size = one.results.first.protocol, one.results.first.image_size
        if protocol.draw != "reference" or protocol.changes or size != 400:
            notes.append(
                f"{one.results.label}: scored by protocol {protocol.name} at {size} px, the paper by its own episodes "
                f"at 400 px; a difference may come from that."
            )
    return tuple(notes)


def comparison_table(comparisons: Sequence[SetDifference]) -> Table | None:
    """Paired differences between sets."""
    if not comparisons:
        return None
    rows = []
    for one in comparisons:
        for found in one.differences:
            if found.fold is not None and len(one.first.folds) > 1:
                continue
            rows.append(
                Row(
                    (
                        Cell(f"{one.first.label} − {one.other.label}"),
                        Cell(str(found.shots), "", found.shots),
                        difference_cell(found.miou),
                        p_cell(found.p),
                        difference_cell(found.fb_iou) if found.fb_iou else Cell(DASH),
                        count_cell(found.episodes),
                        count_cell(found.needed),
                    )
                )
            )
    notes = tuple(f"Not paired with {one.other.label}: {printable(one.reason)}" for one in comparisons if one.reason)
    return Table(
        "pairs",
        "Differences on the same episodes, points",
        ("difference", "shots", "mIoU", "p", "FB-IoU", "episodes", "for ±0.5"),
        tuple(rows),
        notes=notes,
    )


def policy_table(sets: Sequence[SetScores]) -> Table:
    """mIoU by which pixels count."""
    rows = []
    for one in sets:
        own = one.results.first.protocol.fusion
        for shots in one.results.shots:
            cells = []
            for policy in POLICIES:
                found = [s for s in one.everything if (s.policy, s.shots, s.fusion) == (policy, shots, own)]
                totals = one.totals(found)
                cells.append(score_cell(totals[0].miou if totals else None, missing="not scored"))
            rows.append(Row((Cell(one.results.label), Cell(str(shots), "", shots), *cells)))
    notes = ["All from the same predictions. “Every pixel” also counts those with the ignore label."]
    if any(len(one.policies) < len(POLICIES) for one in sets):
        notes.append("Not scored: evaluated without the photos’ own masks (--data-root).")
    head = tuple(f"{p.resolution} size, {'without ignored' if p.ignore else 'every pixel'}" for p in POLICIES)
    return Table("policies", "mIoU by which pixels count", ("method", "shots", *head), tuple(rows), notes=tuple(notes))


def fusion_table(sets: Sequence[SetScores]) -> Table | None:
    """mIoU by how several supports are combined; None if only one way was scored."""
    rows = []
    for one in sets:
        if not one.fusions:
            continue
        policy = one.results.first.protocol.policy
        for shots in (k for k in one.results.shots if k > 1):
            cells = []
            for fusion in FUSIONS:
                found = [s for s in one.everything if (s.policy, s.shots, s.fusion) == (policy, shots, fusion)]
                totals = one.totals(found)
                cell = score_cell(totals[0].miou if totals else None)
                apart = [d for d in one.fusions if (d.shots, d.fusion) == (shots, fusion)]
                if apart:
                    best = next((d for d in apart if d.fold is None), apart[0])
                    sign = "+" if best.miou.value > 0 else ""
                    text = f"{sign}{number(best.miou.value)} {interval_text(best.miou)}"
                    p = "p < 0.001" if best.p < 0.001 else f"p = {best.p:.3f}"
                    cell = Cell(cell.text, f"{cell.detail}\n{text}\n{p}", cell.sort)
                cells.append(cell)
            rows.append(Row((Cell(one.results.label), Cell(str(shots), "", shots), *cells)))
    if not rows:
        return None
    names = {"vote": "vote (published)", "logits": "mean logits", "probabilities": "mean probabilities"}
    head = tuple(names.get(name, "one joint pass") for name in FUSIONS)
    return Table(
        "fusions",
        "mIoU by how several supports are combined",
        ("method", "shots", *head),
        tuple(rows),
        notes=("Below a score: its paired difference from the protocol’s own way, with interval and p.",),
    )


def class_tables(one: SetScores, key: str) -> list[Table]:
    """IoU of every class, one table per fold."""
    tables = []
    for fold in one.results.folds:
        by_shots = {s.shots: s.classes for s in one.headline if s.fold == fold}
        names = [(part.name, part.episodes) for part in next(iter(by_shots.values()))]
        rows = [
            Row(
                (
                    Cell(name),
                    *(score_cell(parts[place].value, bar=True, missing="no episode") for parts in by_shots.values()),
                    count_cell(episodes),
                )
            )
            for place, (name, episodes) in enumerate(names)
        ]
        tables.append(
            Table(
                f"classes-{key}-{fold}",
                f"{one.results.label}, fold {fold}: IoU of each class, percent",
                ("class", *(f"{shots}-shot" for shots in by_shots), "episodes"),
                tuple(rows),
                folded=len(rows) > 40,
            )
        )
    return tables


def size_table(one: SetScores, key: str) -> Table | None:
    """mIoU by the object's share of the photo."""
    totals = one.totals(one.headline)
    if not totals or not totals[0].sizes:
        return None
    names = [part.name for part in totals[0].sizes]
    rows = []
    for place, name in enumerate(names):
        parts = [_part(score, name) for score in totals]
        first = totals[0].sizes[place]
        cells = [score_cell(part.value if part else None, bar=True, missing="no episode") for part in parts]
        rows.append(Row((Cell(name, sort=place), *cells, count_cell(first.episodes), count_cell(first.classes))))
    return Table(
        f"sizes-{key}",
        f"{one.results.label}: mIoU by the object’s share of the photo, percent",
        ("share", *(f"{score.shots}-shot" for score in totals), "episodes", "classes"),
        tuple(rows),
    )


def seed_table(sets: Sequence[SetScores]) -> Table | None:
    """What each set of episodes says; None if there is one seed only."""
    rows = []
    for one in sets:
        for score in one.headline:
            if score.spread is None:
                continue
            for part in score.spread.parts:
                rows.append(
                    Row(
                        (
                            Cell(one.results.label),
                            Cell(part.name),
                            Cell(str(score.fold), "", score.fold),
                            Cell(str(score.shots), "", score.shots),
                            score_cell(part.value, bar=True),
                            count_cell(part.episodes),
                        )
                    )
                )
            spread = score.spread
            rows.append(
                Row(
                    (
                        Cell(one.results.label),
                        Cell("standard deviation"),
                        Cell(str(score.fold), "", score.fold),
                        Cell(str(score.shots), "", score.shots),
                        Cell(number(spread.deviation, 2), f"expected {number(spread.expected, 2)}", spread.deviation),
                        count_cell(score.episodes),
                    ),
                    "mean",
                )
            )
    if not rows:
        return None
    return Table(
        "seeds",
        "mIoU of each set of episodes",
        ("method", "episodes of", "fold", "shots", "mIoU", "episodes"),
        tuple(rows),
        texts=2,
        notes=("“Expected” is the deviation that the intervals of single seeds promise.",),
    )


def support_table(sets: Sequence[SetScores]) -> Table | None:
    """How much the choice of the support matters; None where no query was seen with two supports."""
    rows = []
    for one in sets:
        for score in one.totals(one.headline):
            found = score.support
            if found is None:
                continue
            rows.append(
                Row(
                    (
                        Cell(one.results.label),
                        Cell(str(score.shots), "", score.shots),
                        score_cell(found.within),
                        Cell(number(found.between), "", found.between),
                        count_cell(found.queries),
                        count_cell(found.episodes),
                    )
                )
            )
    if not rows:
        return None
    return Table(
        "supports",
        "How much another support changes an episode’s IoU, standard deviation in points",
        ("method", "shots", "same query, other support", "any two episodes of a class", "queries", "episodes"),
        tuple(rows),
        notes=("Told by queries that were seen with several supports.",),
    )


def cost_table(sets: Sequence[SetScores]) -> Table:
    """Seconds per episode, as the rows have them."""
    import numpy as np

    rows = []
    for one in sets:
        seconds: dict[tuple[object, ...], tuple[int, float]] = {}
        for file in one.results.files:
            columns = (file.table[name].to_pylist() for name in ("seed", "episode", "shots", "seconds"))
            for seed, episode, shots, value in zip(*columns, strict=True):
                key = (file.path, seed, episode)
                if key not in seconds or seconds[key][0] < shots:
                    seconds[key] = shots, value
        values = np.array([value for _, value in seconds.values()])
        shots = sorted({k for k, _ in seconds.values()})
        rows.append(
            Row(
                (
                    Cell(one.results.label),
                    Cell(", ".join(map(str, shots)), "", shots[-1]),
                    Cell(f"{np.median(values):.3f}", "", float(np.median(values))),
                    Cell(f"{np.quantile(values, 0.95):.3f}", "", float(np.quantile(values, 0.95))),
                    count_cell(len(values)),
                )
            )
        )
    return Table(
        "seconds",
        "Seconds per episode",
        ("method", "shots", "median", "95th percentile", "episodes"),
        tuple(rows),
        notes=(
            "One pass with all supports gives every smaller number of shots, every policy and every way to combine "
            "supports; reading from the store is not in it.",
        ),
    )


def best_and_worst(one: SetScores) -> list[tuple[str, tuple[Part, ...]]]:
    """Support photos at both ends: (heading, parts); empty where too few were used often enough."""
    found: list[tuple[str, tuple[Part, ...]]] = []
    for score in one.totals(one.headline):
        if score.support and score.support.best:
            found.append(("best", score.support.best))
            found.append(("worst", score.support.worst))
    return found


def set_notes(sets: Sequence[SetScores]) -> list[str]:
    """What a reader of the scores should know, said once where it holds for all sets."""
    found: dict[str, list[str]] = {}
    for one in sets:
        for note in one.notes:
            found.setdefault(note, []).append(one.results.label)
    return [note if len(labels) == len(sets) else f"{', '.join(labels)}: {note}" for note, labels in found.items()]


def _part(score: Score, name: str) -> Part | None:
    return next((part for part in score.sizes if part.name == name), None)


def _clip(value: float) -> float:
    return min(100.0, max(0.0, value))
