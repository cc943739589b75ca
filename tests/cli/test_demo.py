"""The demo, made small: every command of the main job runs and its pictures are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import cli
import commands.demo

DEMO = ("demo", "--workers", "0", "--image-size", "64")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 2, "BATCH_SIZE": 2, "EPISODES": 5, "PHOTO_SIZE": 80}.items():
        monkeypatch.setattr(commands.demo, name, value)
    options = ("size=64", "trn_per_class=2", "val_per_class=6")
    monkeypatch.setattr(commands.demo, "DATA_OPTIONS", tuple(part for o in options for part in ("--data-option", o)))


@pytest.mark.usefixtures("small")
def test_demo(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.main, [*DEMO, "--out", str(tmp_path / "d"), "--json"])
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    typed = [line.split()[2] for line in done.stderr.splitlines() if line.startswith("$ hsnet ")]
    assert typed == ["extract", "evaluate", "evaluate", "train", "evaluate", "predict", "predict"]
    assert {"untrained_miou", "cosine_miou", "trained_miou", "trained_miou_5_shot"} <= set(summary)
    with Image.open(summary["sheet"]) as sheet:
        assert sheet.width > 5 * 180, "support, query, truth, prediction, errors"
    assert len(list(Path(summary["masks"]).glob("*/*_mask.png"))) == 6

    again = CliRunner().invoke(cli.main, [*DEMO, "--out", str(tmp_path / "d")])
    assert again.exit_code == 0, again.stderr
    assert "mIoU before training" in again.stdout
    assert "$ hsnet" not in again.stdout, "what the commands print goes to stderr; the result is on stdout"


@pytest.mark.usefixtures("small")
def test_demo_stops_with_the_first_command_that_fails(tmp_path: Path) -> None:
    (tmp_path / "shapes.zarr").mkdir()
    (tmp_path / "shapes.zarr" / "notes.txt").write_text("something else")
    done = CliRunner().invoke(cli.main, [*DEMO, "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.count("Error: ") == 1
    assert "$ hsnet evaluate" not in done.stderr
    assert (tmp_path / "shapes.zarr" / "notes.txt").read_text() == "something else"
