"""A finetuned backbone from the command line: trained on photos, taken out, extracted with, evaluated."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fakes import invoke, machine

SHAPES = ("shapes", "--data-option", "size=64", "--data-option", "trn_per_class=2", "--data-option", "val_per_class=3")
BACKBONE = ("--backbone", "squeezenet1_1", "--image-size", "64")
ONLINE = ("--features", "online", "--dataset", *SHAPES, *BACKBONE, "--batch-size", "4")
QUICK = ("--steps", "2", "--validate-every", "1", "--validate-episodes", "4")
FINETUNE = (*ONLINE, *QUICK, "--finetune-backbone", "--backbone-lr", "1e-4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a frozen and a finetuned run of the same episodes."""
    folder = tmp_path_factory.mktemp("runs")
    machine("train", *ONLINE, *QUICK, "--run-dir", folder / "frozen")
    done = machine("train", *FINETUNE, "--run-dir", folder / "finetuned")
    assert (done["steps"], done["finished"]) == (2, True)
    return folder


def test_a_finetuned_head_is_evaluated_on_features_of_its_own_backbone(runs: Path, tmp_path: Path) -> None:
    run, file = runs / "finetuned", tmp_path / "backbone.safetensors"
    machine("extract", *SHAPES, *BACKBONE, "--precision", "float32", "--store", tmp_path / "original.zarr")
    evaluate = ("evaluate", "--checkpoint", run, "--episodes", "4", "--shots", "1", "--out", tmp_path / "rows.parquet")
    refused = invoke(*evaluate, "--store", tmp_path / "original.zarr")
    assert refused.exit_code == 1
    assert "hsnet checkpoint backbone" in refused.stderr
    assert not (tmp_path / "rows.parquet").exists()

    shown = machine("checkpoint", "info", run)
    assert shown["finetuned"] is True
    assert "finetuned with the head" in invoke("checkpoint", "info", run).stdout
    written = machine("checkpoint", "backbone", run, file)
    assert written["sha256"] == shown["recipe"]["weights"] != shown["config"]["recipe"]["weights"]
    own = ("--weights", file, "--precision", "float32", "--store", tmp_path / "own.zarr")
    machine("extract", *SHAPES, *BACKBONE, *own)
    machine(*evaluate, "--store", tmp_path / "own.zarr")
    assert len(pq.read_table(tmp_path / "rows.parquet")) == 4


def test_predict_takes_the_backbone_from_the_checkpoint(runs: Path, tmp_path: Path) -> None:
    from PIL import Image

    from pipeline.datasets.shapes import Shapes

    data = Shapes(size=90)
    for name, image in zip("ab", data.index.split(0, "test").by_class[0], strict=False):
        data.image(image).save(tmp_path / f"{name}.jpg")
        Image.fromarray((data.label(image) == 1).astype("uint8")).save(tmp_path / f"{name}.png")
    given = ("--support", f"{tmp_path / 'a.jpg'}:{tmp_path / 'a.png'}", "--query", tmp_path / "b.jpg")
    predict = ("predict", "--checkpoint", runs / "finetuned", *given, "--out")
    assert machine(*predict, tmp_path / "own")["shots"] == 1
    file = tmp_path / "backbone.safetensors"
    machine("checkpoint", "backbone", runs / "finetuned", file)
    machine(*predict, tmp_path / "file", "--weights", file)
    own, given_file = ((tmp_path / side / "b_mask.png").read_bytes() for side in ("own", "file"))
    assert own == given_file
    other = invoke(*predict, tmp_path / "other", "--weights", "random:1")
    assert other.exit_code == 1
    assert "was trained on other features" in other.stderr


def test_both_curves_are_in_one_plot(runs: Path, tmp_path: Path) -> None:
    """Figure 9: one drawing, a line per run in the loss and in the validation panel, and what tells the runs apart."""
    page = tmp_path / "curves.html"
    machine("report", runs / "frozen", runs / "finetuned", "--out", page)
    text = page.read_text()
    assert text.count("Learning curves: frozen, finetuned") == 1
    plot = text[text.index('aria-labelledby="plot-curves-title"') :]
    plot = plot[: plot.index("</svg>")]
    assert "validation mIoU" in plot
    assert "training loss" in plot
    assert plot.count("var(--series-1)") >= 2
    assert plot.count("var(--series-2)") >= 2
    table = text[text.index("Training runs") :]
    assert "finetuned, 0.0001" in table
    assert "frozen</td>" in table


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--store", "s.zarr", "--finetune-backbone"),
            "--finetune-backbone cannot train on s.zarr: its features are froz",
        ),
        ((*ONLINE, "--backbone-lr", "1e-4"), "backbone_lr is 0.0001, but the backbone is not trained"),
    ],
)
def test_refusals_leave_nothing(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    refused = invoke("train", *options, "--run-dir", tmp_path / "run")
    assert refused.exit_code == 1, refused.stderr
    assert said in refused.stderr
    assert "Nothing was changed" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_frozen_head_holds_no_backbone(runs: Path, tmp_path: Path) -> None:
    refused = invoke("checkpoint", "backbone", runs / "frozen", tmp_path / "out.safetensors")
    assert refused.exit_code == 1
    assert "holds no backbone: it was frozen" in refused.stderr
    assert not (tmp_path / "out.safetensors").exists()
