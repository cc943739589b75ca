"""What `hsnet analyze` prints: the tables of an analysis as text, Markdown and CSV, and everything as JSON values."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from commands.terminal import fact_lines, plain, table
from pipeline.common.text import printable
from pipeline.episodes.protocols import POLICIES
from pipeline.scores.tables import LONGEST, Figure, Table, Value, figures, interval_text, policy_name, tables

if TYPE_CHECKING:
    from pipeline.scores.analysis import Analysis

POLICY_NAMES = {policy_name(policy): policy for policy in POLICIES}


def as_values(analysis: Analysis) -> dict[str, Any]:
    """Everything as JSON values."""

    def files(which: Sequence[Any]) -> list[dict[str, Any]]:
        return [
            {
                "path": file.path,
                "fold": file.fold,
                "store": file.store,
                "checkpoint": file.checkpoint,
                "protocol": file.protocol.to_dict(),
                "manifests": {f"{k}-shot, seed {s}": digest for (k, s), digest in file.manifests.items()},
            }
            for file in which
        ]

    rest = {
        name: plain(getattr(analysis, name)) for name in ("unit", "scores", "scores_against", "differences", "notes")
    }
    return {"files": files(analysis.files), "against": files(analysis.against), **rest}


def plain_table(of: Table) -> str:
    """A table for a terminal."""
    title, head, body = _lines(of)
    return f"{title}\n{table(body, head)}"


def markdown_table(of: Table) -> str:
    """A table as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.strip().replace('|', chr(92) + '|') for cell in cells)} |"

    title, head, body = _lines(of)
    return "\n".join([f"**{title}**", "", line(head), "|" + "---|" * len(head), *map(line, body)])


def plain_text(analysis: Analysis) -> str:
    parts = [fact_lines(_facts(analysis)), *map(plain_table, tables(analysis))]
    notes = "\n".join(f"Note: {printable(note)}" for note in analysis.notes)
    return "\n\n".join([*parts, notes] if notes else parts)


def markdown_text(analysis: Analysis) -> str:
    parts = ["\n".join(f"- {name}: {value}" for name, value in _facts(analysis).items())]
    parts += map(markdown_table, tables(analysis))
    parts += [f"Note: {printable(note)}" for note in analysis.notes]
    return "\n\n".join(parts)


def csv_text(analysis: Analysis) -> str:
    """One figure a line, with what it is of."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    every = figures(analysis)
    writer.writerow(every.columns)
    writer.writerows([printable(value) if isinstance(value, str) else value for value in row] for row in every.rows)
    return out.getvalue()


def _facts(analysis: Analysis) -> dict[str, str]:
    from pipeline.scores.rows import differences

    first = analysis.files[0]
    facts = {
        "data set": f"{printable(first.facts['dataset'])} ({first.facts['data'][:15]}), '{first.facts['role']}', folds "
        + ", ".join(map(str, sorted({file.fold for file in analysis.files}))),
        "scored": _head(analysis.files),
    }
    if analysis.against:
        facts["against"] = _head(analysis.against)
        apart = differences(first, analysis.against[0])
        if apart:
            facts["they differ in"] = "; ".join(f"{name}: {_short(a)} / {_short(b)}" for name, (a, b) in apart.items())
    facts |= first.protocol.lines()
    facts["scored at"] = "; ".join(dict.fromkeys(str(score.policy) for score in analysis.scores))
    what = "episodes" if analysis.unit == "episode" else "query photos"
    facts["intervals"] = f"95 %, 2,000 resamples of {what} within each class"
    return facts


def _short(value: object) -> str:
    text = printable(str(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _head(files: Sequence[Any]) -> str:
    """The method and its checkpoints."""
    method = (files[0].facts.get("method") or {}).get("name", "unknown")
    checkpoints = dict.fromkeys(file.checkpoint for file in files if file.checkpoint)
    shown = ", ".join(digest[:15] for digest in checkpoints)
    names = ", ".join(printable(file.path) for file in files)
    return f"{printable(str(method))}{f' ({shown})' if shown else ''}: {names}"


def _cell(value: Value, kind: str) -> str:
    from pipeline.scores.bootstrap import Interval

    if value is None or isinstance(value, Interval):
        return interval_text(value)
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Figure):
        return printable(value.text)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if kind == "p" else f"{value:.2f}"


def _lines(table: Table) -> tuple[str, list[str], list[list[str]]]:
    """Title, head and cells; of many rows the lowest and highest."""
    title, rows = table.title, list(table.rows)
    if table.long:
        several = [row for number, row in enumerate(rows) if number not in table.marks]
        order = sorted(range(len(several)), key=lambda number: _low(several[number][1]))
        kept = [*sorted(order[: LONGEST // 2]), *sorted(order[-LONGEST // 2 :])]
        title += f"; the {LONGEST // 2} lowest and highest, {len(several) - len(kept)} more with --csv"
        rows = [several[number] for number in kept] + [rows[number] for number in table.marks]
    kinds = table.columns.values()
    cells = [[_cell(value, kind) for value, kind in zip(row, kinds, strict=True)] for row in rows]
    return title, list(table.columns), cells


def _low(value: Value) -> float:
    """What a row is sorted by; nothing counts as 0."""
    return getattr(value, "value", 0.0)
