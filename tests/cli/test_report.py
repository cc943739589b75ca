"""`hsnet report`: what is printed, where, and what the options reach."""

from __future__ import annotations

import json

from click.testing import CliRunner

import cli
from pipeline.report import stage
from pipeline.report.origins import Origins

OPTIONS = ("--data-option", "size=64", "--data-option", "trn_per_class=2", "--data-option", "val_per_class=5")


def test_a_page_of_rows_and_a_run(tiny_report, report_inputs, tmp_path):
    out = tmp_path / "sub" / "page.html"
    stdout, _ = report_inputs.hsnet(
        "report", tiny_report.rows, tiny_report.untrained, tiny_report.run, *OPTIONS, "--gallery", "4", "--out", out,
        "--json", "-q",
    )  # fmt: skip
    made = json.loads(stdout)
    assert made["path"] == str(out)
    assert made["bytes"] == out.stat().st_size < 400_000
    assert (made["sets"], made["runs"]) == (["HSNet", "HSNet, untrained"], ["run"])
    assert (made["episodes_shown"], made["left_out"]) == (4, [])
    page = report_inputs.read(out)
    assert len(page.images) == 4 * 5
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in page.images)
    assert page.column("pairs", "difference") == ["HSNet − HSNet, untrained"] * 2
    assert page.column("stores", "store") == ["s.zarr"]
    assert float(page.column("stores", "smaller by")[0].rstrip("×")) > 1
    assert page.column("runs", "steps") == ["2"]
    assert "8 predictions" not in page.text
    assert "All 4 predictions were made again" in page.text


def test_what_is_left_out_is_on_stderr(tiny_report, report_inputs, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    stdout, stderr = report_inputs.hsnet(
        "report", tiny_report.rows, "--store", tmp_path / "elsewhere", "--out", tmp_path / "page.html"
    )
    assert "left out" in stdout
    assert "Warning: Left out of the report: Gallery: " in stderr
    assert "Warning: Left out of the report: Store of HSNet: " in stderr
    assert "is not a feature store" in stderr
    assert not report_inputs.read(tmp_path / "page.html").images


def test_options_reach_the_stage(monkeypatch, tmp_path):
    """By their right names."""
    seen = {}

    def fake(paths, out, **given):
        seen.update(given, paths=paths, out=out)
        return stage.ReportSummary(out, 1, (), (), 0, ())

    monkeypatch.setattr(stage, "report", fake)
    out = tmp_path / "p.html"
    words = (
        f"report a b --out {out} --title T --gallery 8 --gallery-shots 5 --store s.zarr --checkpoint c --data-root d "
        "--splits e --data-option size=64 --resample query --seed 3 --device cpu"
    )
    done = CliRunner().invoke(cli.main, words.split())
    assert done.exit_code == 0, done.output
    origins = seen.pop("origins")
    assert [str(part) for part in (origins.store, origins.checkpoint, origins.data_root, origins.splits)] == [
        "s.zarr", "c", "d", "e",
    ]  # fmt: skip
    assert origins.data_options == (("size", 64),)
    assert callable(seen.pop("on_event"))
    assert [str(path) for path in seen.pop("paths")] == ["a", "b"]
    assert seen == {
        "out": out,
        "title": "T",
        "gallery": 8,
        "gallery_shots": 5,
        "unit": "query",
        "seed": 3,
        "device": "cpu",
    }
    assert Origins() == Origins(None, None, None, None, ())


def test_mistakes(report_inputs, tmp_path):
    _, stderr = report_inputs.hsnet("report", tmp_path / "no.parquet", "--out", tmp_path / "p.html", code=1)
    assert stderr.count("Error: ") == 1
    assert "does not exist" in stderr
    report_inputs.hsnet("report", "--out", tmp_path / "p.html", code=2)
    report_inputs.hsnet("report", tmp_path, code=2)
