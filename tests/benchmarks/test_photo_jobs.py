"""The benchmarks of jobs from photos, at a size that takes seconds: their figures can be made again."""

from __future__ import annotations

import re

import pytest

from benchmarks import refine, tiles, trust

JOBS = ("--data", "made=shapes:.", "--classes", "2", "--queries", "2")
SMALL = "squeezenet1_1:64"


def cells(text: str) -> list[list[str]]:
    """Rows of the first table, without its heading."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len({len(row) for row in rows}) == 1
    return rows[1:]


def test_ways_to_bring_an_answer_to_the_photos_resolution(capsys, tmp_path):
    refine.main([*JOBS, "--backbone", SMALL, "--tuned-on", "1", "--sheet", str(tmp_path / "sheet.png")])
    rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows] == list(refine.WAYS)
    assert all(0 < float(value) <= 100 for row in rows for value in row[1:2])
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_what_notes_are_worth(capsys):
    trust.main([*JOBS, "--backbone", SMALL])
    shown = capsys.readouterr().out
    assert len(cells(shown)) == 2
    assert re.search(r"sureness, photos: -?[01]\.\d\d", shown)


@pytest.mark.parametrize("largest", [1.0, 0.0])
def test_tiles_against_whole_photos(largest, capsys):
    tiles.main([*JOBS, "--backbone", SMALL, "--tile", "64", "--largest", str(largest)])
    shown = capsys.readouterr().out
    assert len(cells(shown)) == (2 if largest else 0), "only small objects"
    assert ("the check chose right" in shown) == bool(largest)
