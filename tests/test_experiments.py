"""experiments/: every sweep file is one that runs, fits its table of the paper, and shares what others have trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import invoke

import cli
from pipeline.report.like import like
from pipeline.report.published import PAPER, PROTOCOLS
from pipeline.sweep_file import SweepFile, read_sweep_file

FILES = sorted((Path(cli.__file__).parent / "experiments").glob("*.yaml"))
TINY = ("--fix", "batch_size=2", "--fix", "validate_every=2", "--fix", "validate_episodes=2", "--folds", "0")
SHAPES = ("shapes", "--data-option", "size=64", "--data-option", "trn_per_class=2", "--data-option", "val_per_class=3")


def cases_of(file: SweepFile):
    return file.all_cases({})


def test_every_table_and_figure_has_a_file():
    assert [path.stem for path in FILES] == sorted(PAPER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_dry_run_says_what_is_missing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shown = invoke("sweep", path, "--dry-run")
    assert shown.exit_code == 0, shown.stderr
    file = read_sweep_file(path)
    stores = {store for part in file.grids() for store in (*part.stores, *part.transfer)}
    for store in stores:
        assert f"Missing: {store}. There is no feature store at" in shown.stdout
    assert f"{len(cases_of(file))} cases" in shown.stdout
    assert "Nothing was done." in shown.stdout
    assert not list(tmp_path.iterdir())
    refused = invoke("sweep", path)
    assert refused.exit_code == 1
    assert "There is no feature store" in refused.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_trains_what_its_table_shows(path: Path):
    file, paper = read_sweep_file(path), PAPER[path.stem]
    rules = file.rules()
    cases = cases_of(file)
    assert set(paper.shots) <= set(rules.shots)
    assert {rules.name} == {PROTOCOLS[line.data] for line in paper.lines}
    for line in paper.lines:
        store = f"stores/{paper.trained_on or line.data}-{line.backbone}.zarr"
        folds = [
            case.fold
            for case in cases
            if case.store == store and {k: v for k, v in case.choices.items() if k in LEARNER} == dict(line.choices)
        ]
        assert folds == ([0] if line.data == "fss" else [0, 1, 2, 3]), line
    for case in cases:
        assert case.choices["recipe"] == "hsnet", "as published"
        assert case.choices["batch_size"] == (40 if "coco" in case.store else 20)


LEARNER = ("kernel", "layers", "levels", "depth", "support_mask")


def test_what_two_files_need_is_trained_once_and_tested_alike():
    seen: dict[str, tuple] = {}
    shared = 0
    for path in FILES:
        file = read_sweep_file(path)
        assert file.out == "sweeps/paper"
        for case in cases_of(file):
            what = (case.store, case.fold, dict(case.choices), file.rules().digest)
            shared += case.name in seen
            assert seen.setdefault(case.name, what) == what, f"{path.name}: {case.name}"
    assert shared > 20


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experiments") / "shapes.zarr"
    made = invoke("extract", *SHAPES, "--backbone", "squeezenet1_1", "--image-size", "64", "--store", path)
    assert made.exit_code == 0, made.output
    return path


@pytest.mark.slow
def test_ablations_run_in_two_steps_and_come_out_in_the_papers_form(store: Path, tmp_path: Path):
    """Table 5 and Figure 8 as their files have them, but on generated shapes, in one folder: the full model once."""
    experiments = FILES[0].parent
    rules = ("--protocol", "default", "--shots", "1", "--episodes", "4", "--steps", "2", "--out", tmp_path, *TINY)
    for name in ("table5", "fig8"):
        done = invoke("sweep", experiments / f"{name}.yaml", "--store", store, *rules, "--quiet")
        assert done.exit_code == 0, done.stderr
    runs = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    ablations = [*(f"shapes-depth={depth}-fold0" for depth in (1, 2, 4)), "shapes-fold0"]
    assert runs == [*ablations, "shapes-kernel=original-fold0", "shapes-kernel=separable-fold0"]
    made = like("table5", [tmp_path])
    (one_shot, _) = made.tables
    values = [dict(zip(one_shot.columns, row, strict=True)) for row in one_shot.rows]
    ours = [row for number, row in enumerate(values) if number not in one_shot.marks]
    assert [row["parameters"] for row in ours] == ["11.1 M", "4.3 M", "2.6 M"], "as many as the paper says, about"
    assert all(row["mean"] is None for row in ours), "one fold is no mean of four"
    assert ours[0]["fold 0"].value >= 0
    printed = invoke("report", tmp_path, "--like", "fig8", "--markdown")
    assert printed.exit_code == 0, printed.stderr
    assert printed.stdout.count("ours, HSNet") >= 4
    assert "steps: 2, not about 200,000" in printed.stdout
    again = invoke("sweep", experiments / "fig8.yaml", "--store", store, *rules, "--dry-run", "--json")
    assert {case["state"] for case in json.loads(again.stdout)["cases"]} == {"done"}
