"""Tables of an analysis: what stands in which cell, whatever shows them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.analyze import SECTIONS, analyze
from pipeline.report.tables import page_cell
from pipeline.scores.bootstrap import Interval
from pipeline.scores.tables import Figure, figures, interval_text, parts_table, tables


def test_cells_are_the_scores_themselves(rows_by_hand, tmp_path):
    file = rows_by_hand.read(tmp_path / "a.parquet", seeds=(0, 1))
    other = rows_by_hand.read(tmp_path / "b.parquet", seeds=(0, 1), draw=1, checkpoint="sha256:bb")
    analysis = analyze([file], [other], fusions=["vote"], sections=SECTIONS)
    scores, differences, classes, _, _, seeds, *supports = tables(analysis)
    assert [row[0] for row in scores.rows] == ["1-shot", "5-shot"]
    assert [row[1:3] for row in scores.rows] == [(score.miou, score.fb_iou) for score in analysis.scores]
    assert [row[2] for row in differences.rows] == [difference.p for difference in analysis.differences]
    assert list(classes.columns) == ["class", "1-shot", "5-shot", "episodes"]
    first, second = (score.classes for score in analysis.scores)
    assert classes.rows == [
        (part.name, part.value, again.value, part.episodes) for part, again in zip(first, second, strict=True)
    ]
    assert [row[0] for number, row in enumerate(seeds.rows) if number not in seeds.marks] == ["seed 0", "seed 1"]
    assert seeds.rows[2][1] == analysis.scores[0].spread.deviation
    assert len(supports) == 2
    kinds = [dict(zip(figures(analysis).columns, row, strict=True))["kind"] for row in figures(analysis).rows]
    assert (kinds.count("miou"), kinds.count("class_iou"), kinds.count("seed_miou")) == (6, 18, 8)


def test_sizes_meet_by_name(rows_by_hand, tmp_path):
    """Files of other episodes may have no vanished object: the other sizes must not move up a row."""
    file = rows_by_hand.read(tmp_path / "a.parquet", n=300, fusions=("vote",))
    one, five = analyze([file], sections=["size"]).scores
    assert one.sizes[0].name.startswith("0 px")
    table = parts_table([one, replace(five, sizes=five.sizes[1:])], "size", "sizes")
    assert table.rows[0][1:3] == (one.sizes[0].value, None)
    assert [row[2] for row in table.rows[1:]] == [part.value for part in five.sizes[1:]]


@pytest.mark.parametrize(
    ("value", "kind", "text", "detail"),
    [
        (Interval(-1.26, -2, 0.5), "difference", "−1.3", "[−2.0, 0.5]"),
        (Interval(1.26, -2, 3), "difference", "+1.3", "[−2.0, 3.0]"),
        (Interval(51.24, 49, 53), "number", "51.2", "[49.0, 53.0]"),
        (None, "number", "–", ""),
        (None, "bars", "no episode", ""),
        (0.0004, "p", "< 0.001", ""),
        (0.25, "p", "0.250", ""),
        (12345, "number", "12,345", ""),
        (64.3, "number", "64.3", ""),
        ("not scored", "number", "not scored", ""),
        (Figure("3 KB", 3000, "each"), "number", "3 KB", "each"),
    ],
)
def test_a_value_on_the_page(value, kind, text, detail):
    cell = page_cell(value, kind)
    assert (cell.text, cell.detail) == (text, detail)
    assert (cell.sort is None) == (value is None or isinstance(value, str))
    assert cell.bar is None


def test_an_interval_has_one_form():
    assert interval_text(Interval(51.24, 49.76, 52.7)) == "51.2 [49.8, 52.7]"
    assert interval_text(Interval(1.2, -0.5, 3), sign=True) == "+1.2 [-0.5, +3.0]"
    assert interval_text(None) == "-"
    assert page_cell(Interval(50, -10, 120), "bars").bar == (0, 50, 100)
