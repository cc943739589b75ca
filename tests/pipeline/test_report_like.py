"""Ours in the form of the paper's tables: beside which line, what is said to differ, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fakes import invoke

from hsnet.errors import ConfigError, DataError
from pipeline.datasets.coco import COCO_CLASSES
from pipeline.datasets.pascal import VOC_CLASSES
from pipeline.report.like import like
from pipeline.report.published import NUMBERS, PAPER
from pipeline.scores.rows import METADATA


def rows(rows_by_hand, path: Path, fold=0, backbone="resnet50", dataset="pascal", own=False, **choices) -> Path:
    """Rows of the paper's own classes, of a head whose checkpoint is not at hand."""
    classes = range(fold, 80, 4) if dataset == "coco" else range(5 * fold, 5 * fold + 5)
    names = dict(enumerate(COCO_CLASSES if dataset == "coco" else VOC_CLASSES))
    choices.setdefault("recipe", {"image_size": 400, "backbone": backbone, "precision": "int8", "weights": "sha256:ab"})
    choices.setdefault("method", {"name": "hsnet", "checkpoint": f"sha256:{fold}"})
    table = rows_by_hand.made(fold=fold, classes=classes, checkpoint=f"sha256:{fold}", n=200, **choices)
    said = json.loads(table.schema.metadata[METADATA])
    said |= {
        "dataset": dataset,
        "classes": {c: "own" + names[int(c)] if own else names[int(c)] for c in said["classes"]},
    }
    return rows_by_hand.write(path, table.replace_schema_metadata({METADATA: json.dumps(said)}))


def shown(table) -> list[dict]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_table_1_has_ours_below_the_papers_line_of_the_backbone(rows_by_hand, tmp_path):
    for fold in range(4):
        rows(rows_by_hand, tmp_path / f"s-fold{fold}.parquet", fold)
    made = like("table1", [tmp_path])
    for table, shots in zip(made.tables, (1, 5), strict=True):
        lines = shown(table)
        paper = [line for number, line in enumerate(lines) if number in table.marks]
        assert [line["backbone"] for line in paper] == ["vgg16", "resnet50", "resnet101", "resnet101"]
        known = NUMBERS["pascal", "resnet50", shots]
        assert [paper[1][f"fold {fold}"] for fold in range(4)] == [f"{value:.1f}" for value in known.folds]
        assert (paper[1]["mean"], paper[1]["FB-IoU"]) == (f"{known.mean:.1f}", f"{known.fb_iou:.1f}")
        place = lines.index(paper[1])
        mine = lines[place + 1]
        assert mine[""].startswith("ours, HSNet")
        folds = [mine[f"fold {fold}"] for fold in range(4)]
        assert mine["mean"].value == pytest.approx(np.mean([fold.value for fold in folds]))
        assert mine["mean"].low < mine["mean"].value < mine["mean"].high
        assert lines[1][""] == "ours"
        assert lines[1]["mean"] is None
    assert "HSNet, vgg16: no rows" in made.missing
    assert not any("resnet50" in gap for gap in made.missing)
    (differences,) = made.differences.values()
    text = "\n".join(differences)
    for said in ("protocol's draw: stream, not reference", "stored as int8", "sha256:ab", "training: not known"):
        assert said in text
    assert "image size" not in text
    assert "data:" not in text


def test_what_is_missing_and_what_differs_is_said(rows_by_hand, tmp_path):
    small = {"image_size": 100, "backbone": "resnet50"}
    made = like("table1", [rows(rows_by_hand, tmp_path / "a.parquet", 2, recipe=small, shots=(1,))])
    assert "HSNet, resnet50: folds 0, 1, 3 of ours, HSNet" in made.missing
    assert "HSNet, resnet50: 5-shot of ours, HSNet" in made.missing
    mine = shown(made.tables[0])[3]
    assert mine["fold 2"].value > 0
    assert mine["mean"] is mine["FB-IoU"] is None, "a mean of one fold is none of four"
    (differences,) = made.differences.values()
    assert "image size: 100 px, not 400" in differences
    own = like("table1", [rows(rows_by_hand, tmp_path / "b.parquet", own=True)])
    (differences,) = own.differences.values()
    assert any(text.startswith("data: pascal, 5 classes in fold 0, not those of PASCAL-5i") for text in differences)


def test_other_tables_data_and_other_ablations_are_left_out(rows_by_hand, tmp_path):
    rows(rows_by_hand, tmp_path / "p-fold0.parquet", 0)
    rows(rows_by_hand, tmp_path / "c-fold1.parquet", 1, dataset="coco")
    rows(rows_by_hand, tmp_path / "x-fold0.parquet", 0, method={"name": "cosine", "threshold": 0.5})
    table1, table2 = like("table1", [tmp_path]).tables[0], like("table2", [tmp_path]).tables[0]
    assert [line["backbone"] for line in shown(table1)].count("resnet50") == 3
    assert shown(table1)[-1][""] == "ours, cosine map", "heads that the paper lacks come last"
    assert [line[""] for line in shown(table2)] == ["HSNet, the paper's", "ours, HSNet", "HSNet, the paper's", "ours"]
    assert not like("table3", [tmp_path]).differences


def test_ten_shots_stand_beside_the_line_of_their_data(rows_by_hand, tmp_path):
    rows(rows_by_hand, tmp_path / "p-fold0.parquet", 0, shots=(1, 10))
    rows(rows_by_hand, tmp_path / "c-fold0.parquet", 0, dataset="coco", shots=(10,))
    (table,) = like("tableA1", [tmp_path]).tables
    lines = shown(table)
    assert [line["mIoU"] if isinstance(line["mIoU"], str) else "ours" for line in lines] == [
        "70.6",
        "ours",
        "48.7",
        "ours",
    ]


def test_domain_shift_takes_the_rows_on_other_data_only(rows_by_hand, tmp_path):
    """Each fold has classes of its own there; their mean is that of the folds."""
    for fold in range(2):
        method = {"name": "hsnet", "trained_on": {"data": "sha256:coco", "fold": fold}}
        recipe = {"image_size": 400, "backbone": "resnet101"}
        rows(
            rows_by_hand,
            tmp_path / f"s-fold{fold}-on-p.parquet",
            fold,
            method=method,
            recipe=recipe,
            data=f"sha256:{fold}",
        )
        rows(rows_by_hand, tmp_path / f"s-fold{fold}.parquet", fold, "resnet101", method=method, data="sha256:coco")
    table = like("table4", [tmp_path]).tables[0]
    (mine,) = [line for line in shown(table) if line[""].startswith("ours, ")]
    folds = [mine["fold 0"], mine["fold 1"]]
    assert mine["mean"].value == pytest.approx(np.mean([one.value for one in folds]))
    widths = [one.value - one.low for one in folds]
    assert mine["mean"].value - mine["mean"].low == pytest.approx(np.hypot(*widths) / 2)
    paper = [line for number, line in enumerate(shown(table)) if number in table.marks]
    assert [line["mean"] for line in paper] == [None, "64.1"]
    assert like("table1", [tmp_path / "s-fold0.parquet"]).tables[0].rows[5][0].startswith("ours, HSNet")


def test_what_is_refused(rows_by_hand, tmp_path):
    with pytest.raises(ConfigError, match=r"No table or figure 'tabel1'.*table1, .*did you mean 'table1'\?"):
        like("tabel1", [tmp_path])
    with pytest.raises(DataError, match="holds no rows"):
        like("table1", [tmp_path])
    with pytest.raises(DataError, match="does not exist"):
        like("table1", [tmp_path / "none"])


def test_the_command_prints_text_markdown_and_json(rows_by_hand, tmp_path):
    file = rows(rows_by_hand, tmp_path / "s-fold0.parquet", 0)
    text = invoke("report", file, "--like", "table1")
    assert text.exit_code == 0, text.stderr
    assert "Table 1: PASCAL-5i, 1-shot, percent" in text.stdout
    assert "Missing:\n  HSNet, vgg16: no rows" in text.stdout
    markdown = invoke("report", file, "--like", "table1", "--markdown").stdout
    assert "| HSNet, the paper's | vgg16 | 59.6 | 65.7 |" in markdown
    values = json.loads(invoke("report", file, "--like", "table1", "--json").stdout)
    assert values["name"] == "table1"
    assert values["tables"][0]["rows"][0][:3] == ["HSNet, the paper's", "vgg16", "59.6"]
    for words, said in (
        (("--like", "tabel1"), "did you mean 'table1'"),
        (("--like", "table1", "--out", tmp_path / "p.html"), "writes no page"),
        (("--like", "table1", "--markdown", "--json"), "one of --json and --markdown"),
        (("--out", tmp_path / "p.html", "--markdown"), "--markdown is for --like"),
        ((), "Give --out PAGE.html for a page, or --like NAME"),
    ):
        refused = invoke("report", file, *words)
        assert refused.exit_code in (1, 2)
        assert said in " ".join(refused.stderr.split())
    assert not (tmp_path / "p.html").exists()
    shown = " ".join(invoke("report", "--help").stdout.split())
    assert all(name in shown for name in PAPER)


def test_the_papers_lines_are_ones_the_learner_can_have():
    """Every line's choices are words of the learner; those without are the full model of Tables 1 to 3."""
    from pipeline.features.recipe import Recipe
    from pipeline.heads.learner import learner_arguments

    for name, paper in PAPER.items():
        learners = []
        for line in paper.lines:
            recipe = Recipe.of(line.backbone, "sha256:" + 64 * "0")
            learners.append((line.data, line.backbone, json.dumps(learner_arguments(recipe, **line.choices))))
            assert bool(line.choices) == (learners[-1][2] != "{}"), name
            assert set(line.scores) <= set(paper.shots)
            assert set(line.more) <= set(paper.more)
        assert len(set(learners)) == len(learners), f"{name}: each line another learner"
