"""The report page: its figures are those of the rows, names are text, and what is missing is said."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pytest

from hsnet.errors import CheckpointError, ConfigError, DataError
from pipeline.analyze import Analysis
from pipeline.analyze import analyze as stage
from pipeline.common.machine import environment
from pipeline.episodes.protocols import POLICIES
from pipeline.report.inputs import read_inputs, read_run
from pipeline.report.plots import learning_curves, smoothed
from pipeline.report.published import NUMBERS, papers_data, published
from pipeline.report.stage import report
from pipeline.scores.rows import METADATA, count_columns, read_results

HOSTILE = '<script>alert("x")</script>', '"><img src=x onerror=alert(1)>', "a" * 300, "$x_{y}$ & \\frac"


def one(found):
    return f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]".replace("-", "−")


def analyze(paths, against=(), **choices) -> Analysis:
    return stage([read_results(path) for path in paths], [read_results(path) for path in against], **choices)


@pytest.fixture
def page(report_inputs, tmp_path):
    """Makes a page of the paths and reads it; without a gallery unless asked."""

    def make(*paths, **choices):
        page.made = report(paths, tmp_path / "page.html", **{"gallery": 0, **choices})
        return report_inputs.read(page.made.path)

    return make


def renamed(table, names, **facts):
    """The table with other class names, other facts."""
    said = json.loads(table.schema.metadata[METADATA])
    said["classes"] = {c: names[int(c)] for c in said["classes"]}
    place = table.column_names.index("class_name")
    column = pa.array([names[c] for c in table["class_id"].to_pylist()], pa.string())
    changed = table.set_column(place, table.schema.field("class_name"), column)
    return changed.replace_schema_metadata({METADATA: json.dumps({**said, **facts})})


def miou_of(table, shots, fusion, policy, classes):
    """mIoU by hand: the mean over classes of summed intersections over summed unions."""
    rows = [r for r in table.to_pylist() if (r["shots"], r["fusion"]) == (shots, fusion)]
    _, inside, _, union = count_columns(policy)
    return np.mean([
        100 * sum(r[inside] for r in rows if r["class_id"] == c) / sum(r[union] for r in rows if r["class_id"] == c)
        for c in classes
    ])  # fmt: skip


def test_every_figure_is_that_of_the_rows(page, rows_by_hand, tmp_path):
    table = rows_by_hand.made(seeds=(0, 1))
    file = rows_by_hand.write(tmp_path / "r.parquet", table)
    shown = page(file)
    found = {(s.shots, s.fusion, s.policy): s for s in analyze([file], policies=POLICIES).scores}
    for place, k in enumerate((1, 5)):
        score = found[k, "vote", POLICIES[0]]
        assert score.miou.value == pytest.approx(miou_of(table, k, "vote", POLICIES[0], (0, 1, 2)))
        assert shown.column("results-0", "mIoU, fold 0")[place] == one(score.miou)
        assert shown.column("results-0", "FB-IoU")[place] == one(score.fb_iou)
        row = shown.tables["policies"][1 + place]
        assert row[2:] == [one(found[k, "vote", policy].miou) for policy in POLICIES]
        assert row[2].startswith(f"{miou_of(table, k, 'vote', POLICIES[0], (0, 1, 2)):.1f} ")
        classes = next(s for s in analyze([file]).scores if (s.shots, s.fusion) == (k, "vote")).classes
        assert shown.column("classes-0-0", f"{k}-shot") == [one(part.value) for part in classes]
    assert shown.column("results-0", "episodes") == ["120", "120"]
    (fusions,) = shown.tables["fusions"][1:]
    assert fusions[2] == one(found[5, "vote", POLICIES[0]].miou)
    apart = analyze([file], fusions=["logits"], fusion_against="vote").differences
    apart = next(d for d in apart if d.shots == 5)
    sign = "+" if apart.miou.value > 0 else ""
    assert fusions[3].startswith(f"{one(found[5, 'logits', POLICIES[0]].miou)} {sign}{one(apart.miou)} p ")
    assert fusions[4:] == ["–", "–"]
    sizes = analyze([file], sections=["size"]).scores[0].sizes
    assert shown.column("sizes-0", "1-shot") == [one(part.value) if part.value else "no episode" for part in sizes]
    assert len([name for name in shown.column("seeds", "episodes of") if name.startswith("seed")]) == 4


def test_no_mean_without_its_interval(page, rows_by_hand, tmp_path):
    shown = page(rows_by_hand.write(tmp_path / "r.parquet"))
    names = [
        name for name in shown.tables if name.split("-")[0] in ("results", "classes", "policies", "fusions", "sizes")
    ]
    assert len(names) == 5
    cells = [cell for name in names for row in shown.tables[name][1:] for cell in row[1:]]
    scores = [cell for cell in cells if re.match(r"\d+\.\d", cell)]
    assert len(scores) > 20
    assert all(re.match(r"\d+\.\d \[−?\d+\.\d, \d+\.\d\]", cell) for cell in scores)


def test_sets_are_kept_apart_and_paired(page, rows_by_hand, tmp_path):
    """Two folds of one configuration are one line with a mean; another head is another line, and a difference."""
    folds = [rows_by_hand.write(tmp_path / f"f{f}.parquet", fold=f, classes=(3 * f, 3 * f + 1)) for f in (0, 1)]
    other = rows_by_hand.write(
        tmp_path / "o.parquet", classes=(0, 1), method={"name": "cosine", "threshold": 0.5}, checkpoint="", quality=0.3
    )
    shown = page(*folds, other)
    head, first, second, *_ = shown.tables["results-0"]
    assert head[3:6] == ["fold 0", "fold 1", "mean"]
    assert (first[0], second[0]) == ("HSNet", "cosine map")
    scores = [s for s in analyze(folds).scores if (s.shots, s.fusion) == (1, "vote")]
    assert first[3:6] == [one(next(s for s in scores if s.fold == f).miou) for f in (0, 1, None)]
    assert second[4:7] == ["–", "–", "–"], "a mean over one fold does not stand beside one over two"
    # The first rows have a fold that the other lacks: that is said, not passed over.
    assert "Not paired with cosine map" in shown.text
    shown = page(folds[0], other)
    wanted = analyze([folds[0]], [other], fusions=["vote"]).differences[0]
    assert shown.tables["pairs"][1][:3] == ["HSNet − cosine map", "1", f"+{one(wanted.miou)}"]


def test_rows_made_elsewhere_say_so(page, rows_by_hand, tmp_path):
    table = rows_by_hand.made()
    here = environment()
    names = {0: "a", 1: "b", 2: "c"}
    same = renamed(table, names, environment=here)
    assert "were made with other" not in page(rows_by_hand.write(tmp_path / "same.parquet", same)).text
    other = renamed(table, names, environment={**here, "torch": "1.2.3<b>", "numpy": "4.5"})
    shown = page(rows_by_hand.write(tmp_path / "other.parquet", other)).text
    assert "were made with other" in shown
    assert "1.2.3<b>" in shown, "as text"


def test_the_same_rows_twice_are_refused(rows_by_hand, tmp_path):
    file = rows_by_hand.write(tmp_path / "r.parquet")
    with pytest.raises(DataError, match="would count twice"):
        report([file, file], tmp_path / "p.html", gallery=0)
    assert not (tmp_path / "p.html").exists()


def test_each_rows_file_is_read_once(page, rows_by_hand, tmp_path, monkeypatch):
    """Scores, ways to combine supports and differences from other rows are all made of what was read at first."""
    import pyarrow.parquet as pq

    fold = [rows_by_hand.write(tmp_path / f"f{f}.parquet", fold=f, classes=(3 * f, 3 * f + 1)) for f in (0, 1)]
    other = [
        rows_by_hand.write(tmp_path / f"o{f}.parquet", fold=f, classes=(3 * f, 3 * f + 1), method={"name": "cosine"})
        for f in (0, 1)
    ]
    reads, read_table = [], pq.read_table
    monkeypatch.setattr(pq, "read_table", lambda path, *given: reads.append(path) or read_table(path, *given))
    shown = page(*fold, *other)
    assert len(shown.tables["pairs"]) == 3
    assert "fusions" in shown.tables
    assert sorted(reads) == sorted([*fold, *other])


def test_two_heads_of_one_fold_are_two_lines(page, rows_by_hand, tmp_path):
    files = [rows_by_hand.write(tmp_path / f"{n}.parquet", checkpoint=f"sha256:{n}", draw=n) for n in (1, 2)]
    shown = page(*files)
    assert shown.column("results-0", "method")[:2] == ["HSNet (1.parquet)", "HSNet (2.parquet)"]
    assert len(shown.tables["pairs"]) == 3


def test_names_are_text(page, rows_by_hand, tmp_path):
    names = dict(enumerate(HOSTILE[:3]))
    table = renamed(rows_by_hand.made(), names, dataset=HOSTILE[3], notes=[HOSTILE[0]], method={"name": HOSTILE[1]})
    file = rows_by_hand.write(tmp_path / 'it\'s "<b>" & $x$.parquet', table)
    shown = page(file, title=HOSTILE[0])
    assert len(shown.scripts) == 1
    assert "alert" not in shown.scripts[0]
    assert not [tag for tag, attributes in shown.tags if tag == "b" and attributes]
    assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on")]
    assert not shown.images
    assert shown.column("classes-0-0", "class") == list(HOSTILE[:3])
    assert shown.column("results-0", "method")[0] == HOSTILE[1]
    assert HOSTILE[0] in shown.text
    assert HOSTILE[3] in shown.text


def test_the_page_asks_for_nothing(page, rows_by_hand, tmp_path):
    shown = page(rows_by_hand.write(tmp_path / "r.parquet"))
    addresses = [
        value for _, attributes in shown.tags for name, value in attributes.items()
        if name in ("src", "href", "action", "data", "xlink:href", "srcset") and value
    ]  # fmt: skip
    assert addresses
    assert all(value.startswith(("data:", "#")) for value in addresses)
    (policy,) = (a["content"] for tag, a in shown.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none';")
    assert len(shown.ids) == len(set(shown.ids))
    text = (tmp_path / "page.html").read_text()
    inside = set(re.findall(r'(?:href="#|url\(#|aria-labelledby=")([\w-]+)', text))
    assert inside <= set(shown.ids)


def run_dir(path, lines=(), **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"fold": 0, "batch_size": 4, "seed": 1, "recipe": {}, **config}))
    (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return path


def test_runs(page, tmp_path):
    train = [json.dumps({"step": s, "train": {"loss": 1 / s, "seconds": 0.5}}) for s in range(1, 101)]
    val = [json.dumps({"step": s, "val": {"miou": 40 + s / 10}}) for s in (50, 100)]
    first = run_dir(tmp_path / "validated", [*train, *val])
    second = run_dir(tmp_path / "not-validated", [*train[:9], '{"step": 10, "train": {"lo'])
    shown = page(first, second)
    assert shown.column("runs", "best validation mIoU") == ["50.0 at step 100", "not validated"]
    assert shown.column("runs", "steps") == ["100", "9"]
    assert shown.column("runs", "median step") == ["0.50 s", "0.50 s"]
    assert "Without validation: not-validated." in shown.text
    assert "results-0" not in shown.tables
    titles = [attributes for tag, attributes in shown.tags if tag == "svg"]
    assert len(titles) == 1
    assert titles[0]["role"] == "img"


def test_a_run_without_validation_has_one_panel(tmp_path):
    train = [json.dumps({"step": s, "train": {"loss": 0.5}}) for s in range(1, 9)]
    drawn = learning_curves([read_run(run_dir(tmp_path / "r", train))])
    assert "training loss" in drawn
    assert "validation" not in drawn
    assert "<text" in drawn
    empty = learning_curves([read_run(run_dir(tmp_path / "e"))])
    assert "no step was written down" in empty


def test_hostile_run_names_in_a_plot(tmp_path):
    runs = [
        read_run(run_dir(tmp_path / name.replace("/", "_"), ['{"step": 1, "train": {"loss": 1}}']))
        for name in (*(text[:80] for text in HOSTILE), "_hidden", "日本")
    ]
    drawn = learning_curves(runs)
    assert "<script>alert" not in drawn
    assert "<img" not in drawn
    assert "hidden" in drawn
    assert "日本" in drawn
    assert drawn.count("$x_{y}$ &amp; ") == 2, "in the title and in the legend, not as mathematics"


def test_smoothing_keeps_means():
    steps, means = smoothed(range(1, 101), [3.0] * 100)
    assert means == pytest.approx([3.0] * len(means))
    assert (steps[0], steps[-1]) == (1.5, 99.5)


@pytest.mark.parametrize(
    ("name", "content", "error", "text"),
    [
        ("gone.parquet", None, DataError, "does not exist"),
        ("rows.parquet", b"PAR1", DataError, "no readable Parquet file"),
        ("empty", {}, DataError, "without config.json"),
        ("run", {"config.json": "{"}, CheckpointError, "cannot be read"),
        ("run", {"config.json": "[]"}, CheckpointError, "does not describe a run"),
    ],
)
def test_bad_inputs(tmp_path, name, content, error, text):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
        for file, value in content.items():
            (path / file).write_text(value)
    with pytest.raises(error, match=text):
        report([path], tmp_path / "p.html")
    assert not (tmp_path / "p.html").exists()


def test_nothing_to_report(tmp_path):
    with pytest.raises(ConfigError, match="needs rows"):
        read_inputs([])


def test_the_page_must_be_writable(rows_by_hand, tmp_path):
    file = rows_by_hand.write(tmp_path / "r.parquet")
    with pytest.raises(DataError, match="is a folder"):
        report([file], tmp_path, gallery=0)
    with pytest.raises(DataError, match="Cannot write"):
        report([file], file / "page.html", gallery=0)


# -- the paper's numbers ---------------------------------------------------------------------------------------


def test_the_papers_means_are_those_of_its_folds():
    for (data, _, _), line in NUMBERS.items():
        if line.folds:
            assert np.mean(line.folds) == pytest.approx(line.mean, abs=0.051)
            assert line.fb_iou is not None
        assert bool(line.folds) == (data != "fss")


def pascal(rows_by_hand, path, fold=0, backbone="resnet50", names=None, **facts):
    from pipeline.datasets.pascal import VOC_CLASSES

    classes = range(5 * fold, 5 * fold + 5)
    table = rows_by_hand.made(fold=fold, classes=classes, recipe={"image_size": 100, "backbone": backbone})
    return rows_by_hand.write(path, renamed(table, names or dict(enumerate(VOC_CLASSES)), dataset="pascal", **facts))


def test_the_papers_numbers_stand_beside_ours(page, rows_by_hand, tmp_path):
    files = [pascal(rows_by_hand, tmp_path / f"{fold}.parquet", fold) for fold in range(4)]
    shown = page(*files)
    lines = [row for row in shown.tables["results-0"] if "paper" in row[0]]
    assert [line[1:] for line in lines] == [
        ["resnet50", "1", "64.3", "70.7", "60.3", "60.5", "64.0", "76.7", "–"],
        ["resnet50", "5", "70.3", "73.2", "67.4", "67.1", "69.5", "80.6", "–"],
    ]
    assert "ICCV 2021" in shown.text
    assert "protocol default at 100 px" in shown.text
    some = [row for row in page(files[2]).tables["results-0"] if "paper" in row[0]]
    assert some[0][3:] == ["60.3", "–", "–"], "FB-IoU is of all folds"
    some = [row for row in page(*files[:2]).tables["results-0"] if "paper" in row[0]]
    assert some[0][3:] == ["64.3", "70.7", "–", "–", "–"], "a mean of four folds is not one of two"


def test_no_paper_for_other_data_or_backbones(page, rows_by_hand, tmp_path):
    own = dict(enumerate(f"garment {i}" for i in range(20)))
    shown = page(pascal(rows_by_hand, tmp_path / "o.parquet", names=own))
    assert "paper" not in str(shown.tables["results-0"])
    assert "not the paper’s data" in shown.text
    shown = page(pascal(rows_by_hand, tmp_path / "b.parquet", backbone="squeezenet1_1"))
    assert "paper" not in str(shown.tables["results-0"])
    assert "no number for squeezenet1_1 on PASCAL-5i" in shown.text
    validation = read_results(pascal(rows_by_hand, tmp_path / "v.parquet", role="val"))
    assert papers_data(validation) is None
    assert published(validation, 1) is None
