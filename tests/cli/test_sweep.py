"""`hsnet sweep`: from the command line to files that the other commands read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import invoke

from pipeline.heads.training import DEFAULT_RECIPE, PUBLISHED, RECIPES

SHAPES = ("shapes", "--data-option", "size=64", "--data-option", "trn_per_class=2", "--data-option", "val_per_class=3")
FIX = ("--fix", "batch_size=2", "--fix", "validate_every=1", "--fix", "validate_episodes=2", "--steps", "2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "s.zarr"
    made = invoke("extract", *SHAPES, "--backbone", "squeezenet1_1", "--image-size", "64", "--store", path)
    assert made.exit_code == 0, made.output
    return path


def test_a_sweep_prints_means_over_folds_and_goes_on(store: Path, tmp_path: Path) -> None:
    words = ("sweep", "--store", store, "--folds", "0,1", *FIX, "--episodes", "8", "--out", tmp_path / "out")
    first = invoke(*words)
    assert first.exit_code == 0, first.output
    line = next(line for line in first.stdout.splitlines() if line.startswith("s "))
    assert line.split()[1:3] == ["0,", "1"]
    assert "2 of 2 cases" in first.stdout
    again = invoke(*words, "--vary", "seed=0", "--json")
    assert again.exit_code == 0, again.output
    result = json.loads(again.stdout)
    assert len(result["cases"]) == 2
    shown = invoke("analyze", *(tmp_path / "out").glob("s-fold*.parquet"), "--json")
    assert shown.exit_code == 0, shown.output
    assert invoke("checkpoint", "info", tmp_path / "out" / "s-fold0").exit_code == 0


def test_what_a_sweep_refuses(store: Path, tmp_path: Path) -> None:
    words = ("sweep", "--store", store, *FIX, "--episodes", "8", "--out", tmp_path / "out")
    for more, said in (
        (("--folds", "0,9"), "Not every store has fold 9"),
        (("--vary", "speed=1"), "'speed=1' is not CHOICE=VALUE"),
        (("--fix", "seed=1,2"), "--fix seed takes one value"),
        (("--protocol", "original"), "A sweep tests at network size"),
        (("--gpus-per-case", "0.25"), "shares out machines among workers: give --workers or --address"),
        (("--gpus-per-case", "0.25", "--workers", "2", "--device", "cpu"), "needs a GPU; the device is cpu"),
        (("--cpus-per-case", "1.5", "--workers", "2"), "must be a share up to 1, or a whole number, got 1.5"),
        (("--cpus-per-case", "nan", "--workers", "2"), "must be a share up to 1, or a whole number, got nan"),
        (("--cpus-per-case", "-1", "--workers", "2"), "must be a share up to 1, or a whole number, got -1"),
    ):
        refused = invoke(*words, *more)
        assert refused.exit_code == 1
        assert said in refused.stderr
    assert invoke(*words, "--folds", "first").exit_code == 2
    assert invoke(*words, "--pack", "0").exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_failed_case_is_reported_and_the_exit_code_says_so(store: Path, tmp_path: Path) -> None:
    words = ("sweep", "--store", store, "--folds", "0", *FIX, "--episodes", "8", "--out", tmp_path)
    result = invoke(*words, "--vary", "learning_rate=0.001,7")
    assert result.exit_code == 1
    assert "1 of 2 cases failed; the others are done" in result.stderr
    assert "learning_rate must be between 0 and 1, got 7.0" in result.stderr
    assert "s-learning_rate=0.001" in result.stdout


def test_cases_are_trained_by_the_recipe_unless_a_choice_is_given(store: Path, tmp_path: Path) -> None:
    def stored(*more: object) -> list[dict[str, object]]:
        out = tmp_path / str(len(more))
        given = ("sweep", "--store", store, "--folds", "0", *FIX, "--episodes", "4", "--out", out, *more)
        done = invoke(*given)
        assert done.exit_code == 0, done.output
        files = sorted(out.glob("*/config.json"))
        return [{name: json.loads(file.read_text())[name] for name in PUBLISHED} for file in files]

    assert stored() == [dict(RECIPES[DEFAULT_RECIPE])]
    chosen = stored("--recipe", "hsnet", "--vary", "average=0.0,0.5", "--fix", "clip=3")
    assert chosen == [{**PUBLISHED, "average": average, "clip": 3.0} for average in (0.0, 0.5)]


def test_a_file_and_options_over_it(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"stores: [{store}]\nfolds: [0]\nsteps: 2\nepisodes: 4\nheads: [hsnet, cosine]\nout: {tmp_path / 'out'}\n"
        "fix: {batch_size: 2, validate_every: 1, validate_episodes: 2, recipe: hsnet}\n"
    )
    dry = invoke("sweep", file, "--dry-run", "--steps", "3")
    assert dry.exit_code == 0, dry.stderr
    assert "2 cases: 1 to train and test, 0 to go on with, 1 to test only, 0 done." in dry.stdout
    assert "3 optimiser steps are left." in dry.stdout
    assert not (tmp_path / "out").exists()
    first = invoke("sweep", file)
    assert first.exit_code == 0, first.stderr
    assert "s-head=cosine" in first.stdout
    assert "s-head=cosine-fold0: tested" in first.stderr
    after = invoke("sweep", file, "--dry-run")
    assert "Nothing is left to do." in after.stdout
    more = json.loads(invoke("sweep", file, "--dry-run", "--json", "--folds", "0,1", "--episodes", "5").stdout)
    assert [case["state"] for case in more["cases"]] == ["test", "train", "test", "test"]
    assert more["steps_left"] == 2
    assert all(case["seconds"] > 0 for case in more["cases"])


def test_what_is_refused_before_anything_is_done(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    out = tmp_path / "out"
    for text, words, said in (
        ("vry: {seed: [1]}", ("--out", out), "line 1: unknown key 'vry'"),
        (f"stores: [{store}]", (), "A sweep needs a folder"),
        (f"out: {out}", (), "A sweep needs a store"),
        (f"stores: [{tmp_path / 'none.zarr'}]\nfolds: [0]", ("--out", out), "There is no feature store"),
        (f"stores: [{tmp_path / 'none.zarr'}]", ("--out", out, "--dry-run"), "'all' folds cannot be told"),
        (f"stores: [{store}]\nfolds: [9]", ("--out", out), "Not every store has fold 9"),
        (f"stores: [{store}]", ("--out", out, "--head", "cosin"), "did you mean 'cosine'"),
        (f"stores: [{store}]", ("--out", out, "--fix", "seed=1", "--vary", "seed=2"), "both varied and fixed"),
        (f"stores: [{store}]", ("--out", out, "--protocol", "original", "--dry-run"), "tests at network size"),
    ):
        file.write_text(text + "\n")
        refused = invoke("sweep", file, *words)
        assert refused.exit_code == 1, refused.stdout
        assert said in refused.stderr
        assert "Traceback" not in refused.stderr
    assert not out.exists()


def test_a_pack_and_a_folder_that_is_taken(store: Path, tmp_path: Path) -> None:
    from pipeline.common.lock import sole_writer

    out = tmp_path / "out"
    words = ("sweep", "--store", store, "--folds", "0", *FIX, "--episodes", "4", "--out", out, "--resident", "host")
    out.mkdir()
    with sole_writer(out):
        refused = invoke(*words)
    assert refused.exit_code == 1
    assert "is being written by process" in refused.stderr
    packed = invoke(*words, "--vary", "learning_rate=1e-3,1e-4,7", "--pack", "3")
    assert packed.exit_code == 1
    assert "2 of 3 cases" in packed.stdout
    assert "s-learning_rate=7.0-fold0: learning_rate must be between 0 and 1" in packed.stderr
    assert "s-learning_rate=0.001-fold0: 2 steps" in packed.stderr
    alone = invoke(*words, "--vary", "learning_rate=1e-3,1e-4")
    assert "s-learning_rate=0.001-fold0: 2 steps were there" in alone.stderr


def test_the_table_of_what_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    from commands.sweep_progress import SweepProgress, status_cells
    from pipeline.sweep_status import CaseStatus

    training = CaseStatus("a[b]-fold0", "training", 1200, 5000, 0.25, None, 75.3)
    testing = CaseStatus("b-fold0", "testing", 20, 100, None, 41.5, None)
    assert status_cells(training) == ("a[b]-fold0", "training", "1,200/5,000", "0.2500", "-", "1:15")
    assert status_cells(testing) == ("b-fold0", "testing", "20/100", "-", "41.50", "?")
    with SweepProgress(8) as progress:
        progress.running([training, testing])
        progress.done(1)
    assert "sweep: 1/8 cases" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    with SweepProgress(8) as progress:
        progress.running([training, testing])
        progress.say("c-fold0: 5000 steps")
    shown = capsys.readouterr().err
    assert "a[b]-fold0" in shown
    assert "0 of 8 cases done, 2 running" in shown
    assert "1,200/5,000" in shown
    assert "c-fold0: 5000 steps" in shown
