"""`hsnet analyze`: tables, Markdown, CSV and JSON of the same figures; and real rows of `hsnet evaluate`."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from pipeline.analyze import analyze
from pipeline.scores.rows import read_results

SHAPES = ("shapes", "--data-option", "size=64", "--data-option", "trn_per_class=2", "--data-option", "val_per_class=5")


def invoke(*args: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


@pytest.fixture
def pair(rows_by_hand, tmp_path) -> tuple[Path, Path]:
    """Rows of two heads on the same episodes, two seeds."""
    return (
        rows_by_hand.write(tmp_path / "a.parquet", quality=0.58, seeds=(0, 1)),
        rows_by_hand.write(tmp_path / "b.parquet", seeds=(0, 1), draw=1, checkpoint="sha256:bb"),
    )


def test_no_mean_without_its_interval(pair):
    text = invoke("analyze", pair[0], "--against", pair[1], "--by", "all", "--policy", "all")
    shown = analyze([read_results(pair[0])]).scores[0].miou
    assert f"{shown.value:.1f} [{shown.low:.1f}, {shown.high:.1f}]" in text
    for title in ("Scores, percent", "Difference on the same", "IoU by class", "mIoU by the object's share", "by seed"):
        assert title in text
    assert "Choice of support" in text
    scores = text.split("Scores, percent")[1].split("Choice of support")[0]
    for line in scores.splitlines():
        if "standard deviation" not in line and "expected from" not in line:
            # A decimal number outside an interval is a p value or a mean that has one behind it.
            bare = re.sub(r"[-+]?\d+\.\d \[[^\]]*\]|\b[01]\.\d{4}\b|\+-0\.5", "", line)
            assert not re.search(r"\d\.\d", bare), line


def test_one_line_per_score_and_only_what_differs_is_named(pair):
    text = invoke("analyze", pair[0], "--by", "total", "--fusion", "vote")
    assert re.search(r"^1-shot +\d", text, re.MULTILINE)
    assert re.search(r"^5-shot +\d", text, re.MULTILINE)
    assert "class0" not in text
    assert "network size, ignored pixels left out" in text
    text = invoke("analyze", pair[0], "--policy", "original-all", "--policy", "network")
    assert "1-shot, original-all" in text
    assert "5-shot, vote, original-all" in text
    assert "original size, every pixel; network size, ignored pixels left out" in text


def test_json_csv_and_markdown_say_the_same(pair):
    arguments = ("analyze", pair[0], "--against", pair[1], "--by", "all")
    values = json.loads(invoke(*arguments, "--json"))
    rows = list(csv.DictReader(io.StringIO(invoke(*arguments, "--csv"))))
    text = invoke(*arguments, "--markdown")
    for score in values["scores"]:
        (row,) = [
            row
            for row in rows
            if (row["set"], row["kind"], row["fusion"]) == ("rows", "miou", score["fusion"])
            and int(row["shots"]) == score["shots"]
        ]
        for name in ("value", "low", "high"):
            assert float(row[name]) == score["miou"][name]
        assert f"| {score['miou']['value']:.1f} [{score['miou']['low']:.1f}, {score['miou']['high']:.1f}] |" in text
    assert {row["set"] for row in rows} == {"rows", "against", "difference"}
    assert {row["kind"] for row in rows} >= {
        "miou",
        "fb_iou",
        "class_iou",
        "size_miou",
        "seed_miou",
        "support_deviation",
    }
    (file,) = values["files"]
    assert file["protocol"]["digest"].startswith("sha256:")
    assert len(file["manifests"]) == 4
    assert all(0 < difference["p"] <= 1 for difference in values["differences"])


def test_one_form_at_a_time(pair):
    assert "Choose one of" in invoke("analyze", pair[0], "--csv", "--json", code=2)
    invoke("analyze", code=2)


def test_rows_of_other_episodes_are_refused(rows_by_hand, pair, tmp_path):
    odd = rows_by_hand.write(tmp_path / "c.parquet", images=9, seeds=(0, 1))
    error = invoke("analyze", pair[0], "--against", odd, code=1)
    assert "different manifests" in error
    assert error.count("sha256:") == 2
    error = invoke("analyze", pair[0], pair[1], code=1)
    assert "different heads" in error
    (tmp_path / "d.parquet").write_bytes(pair[0].read_bytes()[:-9])
    assert "no readable Parquet file" in invoke("analyze", tmp_path / "d.parquet", code=1)
    assert "no readable Parquet file" in invoke("analyze", tmp_path / "nothing.parquet", code=1)


def test_what_two_sets_differ_in_is_named(rows_by_hand, pair, tmp_path):
    other = rows_by_hand.write(tmp_path / "c.parquet", seeds=(0, 1), store="sha256:other", draw=3)
    assert "they differ in  store: sha256:store / sha256:other" in invoke("analyze", pair[0], "--against", other)


def test_ways_to_combine_supports_are_compared_in_one_file(pair):
    text = invoke("analyze", pair[0], "--against-fusion", "vote", "--fusion", "logits", "--by", "total")
    assert re.search(r"Difference[\s\S]*5-shot, logits - vote +-?\d", text)


def test_many_classes_are_cut_in_the_table_not_in_the_csv(rows_by_hand, tmp_path):
    file = rows_by_hand.write(tmp_path / "r.parquet", classes=tuple(range(60)), n=120, shots=(1,), fusions=("vote",))
    text = invoke("analyze", file)
    assert "the 20 lowest and highest, 20 more with --csv" in text
    assert text.count("\nclass") == 41
    assert invoke("analyze", file, "--csv").count("class_iou") == 60


def test_names_from_a_file_cannot_move_the_cursor(rows_by_hand, tmp_path):
    table = rows_by_hand.made(n=9)
    key = b"hsnet"
    facts = table.schema.metadata[key].replace(b"class1", b"\\u001b[2Jevil")
    file = rows_by_hand.write(tmp_path / "r.parquet", table.replace_schema_metadata({key: facts}))
    for form in ((), ("--csv",), ("--markdown",)):
        assert "\x1b" not in invoke("analyze", file, "--by", "all", *form)


def test_from_episodes_to_a_paired_test(tmp_path):
    """Real rows: two heads on the episodes of one manifest, scored, compared, headline with headline."""
    store, episodes = tmp_path / "s.zarr", tmp_path / "m.parquet"
    invoke("extract", *SHAPES, "--backbone", "squeezenet1_1", "--image-size", "64", "--store", store, "--quiet")
    invoke("episodes", "make", "--store", store, "--episodes", "24", "--shots", "2", "--out", episodes)
    scores = {}
    for name in ("contrast", "untrained"):
        out = tmp_path / f"{name}.parquet"
        told = invoke(
            *("evaluate", "--head", name, "--store", store, "--manifest", episodes, "--shots", "1,2"),
            *("--out", out, "--json", "--quiet"),
        )
        scores[name] = [score["miou"] for score in json.loads(told)["scores"]]
    files = [tmp_path / f"{name}.parquet" for name in scores]
    found = json.loads(invoke("analyze", files[0], "--against", files[1], "--json", "--by", "all"))
    assert [score["miou"]["value"] for score in found["scores"]] == pytest.approx(scores["contrast"], rel=1e-12)
    assert [score["miou"]["value"] for score in found["scores_against"]] == pytest.approx(
        scores["untrained"], rel=1e-12
    )
    for difference, one, other in zip(found["differences"], scores["contrast"], scores["untrained"], strict=True):
        assert difference["miou"]["value"] == pytest.approx(one - other, abs=1e-9)
