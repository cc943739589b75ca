"""Commands on much: several checkpoints in one evaluation, one that goes on, prediction resumed, plans for machines."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fakes import invoke, machine, printed
from PIL import Image

from pipeline.datasets.shapes import Shapes

SHAPES = ("shapes", "--data-option", "size=64", "--data-option", "trn_per_class=3", "--data-option", "val_per_class=4")
BACKBONE = ("--backbone", "squeezenet1_1", "--image-size", "64")
TRAIN = ("--steps", "2", "--batch-size", "4", "--validate-every", "2", "--validate-episodes", "5")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, a run of folds 0 and 1, and a photo with its mask."""
    folder = tmp_path_factory.mktemp("job")
    machine("extract", *SHAPES, *BACKBONE, "--store", folder / "s.zarr")
    for fold in (0, 1):
        machine("train", "--store", folder / "s.zarr", "--fold", fold, "--run-dir", folder / f"run{fold}", *TRAIN)
    data = Shapes(size=90)
    first = data.index.split(0, "test").by_class[0][0]
    data.image(first).save(folder / "a.jpg")
    Image.fromarray((data.label(first) == 1).astype("uint8")).save(folder / "a.png")
    return folder


def test_several_checkpoints_are_tested_in_one_call(job: Path, tmp_path: Path) -> None:
    runs = ("--checkpoint", job / "run0", "--checkpoint", job / "run1" / "best.safetensors")
    rules = ("--store", job / "s.zarr", "--episodes", "30")
    shown = printed("evaluate", *runs, *rules, "--out", tmp_path / "all")
    assert [line.split()[:2] for line in shown.splitlines() if "run" in line] == [
        [str(job / "run0"), "0"],
        [str(job / "run1" / "best.safetensors"), "1"],
    ]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["run0.parquet", "run1.parquet"]
    for fold in (0, 1):
        run = ("--checkpoint", job / f"run{fold}")
        machine("evaluate", *run, *rules, "--out", tmp_path / "one.parquet", "--overwrite")
        one, of_all = (
            pq.read_table(path).drop_columns(["seconds"])
            for path in (tmp_path / "one.parquet", tmp_path / "all" / f"run{fold}.parquet")
        )
        assert one.to_pylist() == of_all.to_pylist()
    (tmp_path / "file").touch()
    refused = invoke("evaluate", *runs, *rules, "--out", tmp_path / "file")
    assert refused.exit_code == 2
    assert "go into a folder" in refused.output
    both = machine("evaluate", *runs, "--checkpoint", job / "run0", *rules, "--out", tmp_path / "more")
    assert [Path(one["rows"]).name for one in both["checkpoints"]] == ["run0.parquet", "run1.parquet", "run0-2.parquet"]


def test_parts_of_another_evaluation_are_refused(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    folder = Path(f"{out}.parts")
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({"fold": 7}))
    (folder / "x.parquet").touch()
    refused = invoke("evaluate", "--checkpoint", job / "run0", "--store", job / "s.zarr", "--out", out)
    assert refused.exit_code == 1
    assert "holds parts of another evaluation" in refused.output
    assert "Traceback" not in refused.output
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "x.parquet"]
    assert not out.exists()


def test_prediction_goes_on_and_makes_masks_only(job: Path, tmp_path: Path) -> None:
    ask = ("predict", "--checkpoint", job / "run0", "--support", f"{job / 'a.jpg'}:{job / 'a.png'}", "--no-overlay")
    ask = (*ask, "--query", job / "a.jpg", "--out", tmp_path)
    first, again = machine(*ask), machine(*ask)
    assert (first["kept"], again["kept"], again["unusable"]) == (0, 1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_mask.png", "predict.json", "results.jsonl"]
    assert "1 of 1 photos, 1 of them there before" in printed(*ask)


def test_a_plan_for_other_machines(tmp_path: Path) -> None:
    ask = ("plan", *SHAPES, *BACKBONE, "--store", tmp_path / "s.zarr", "--photos", "1")
    told = machine(*ask, "--nodes", "4", "--gpus", "8", "--bandwidth", "2", "--images", "1000000")
    assert told["break_even"]["fly_seconds"] > 0
    assert told["scaling"]["site"]["bandwidth"] == 2e9
    assert set(told["scaling"]["stages"]) == {"extract", "train", "sweep", "evaluate"}
    text = printed(*ask, "--nodes", "4", "--gpus", "8")
    assert "break-even" in text
    assert "(an estimate)" in text
    assert "bound by" in text
    for wrong in (("--gpus", "8"), ("--nodes", "1", "--speedup", "3")):
        assert invoke(*ask, *wrong).exit_code == 2
