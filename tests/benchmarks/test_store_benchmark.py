"""The benchmark of the store runs and says what it promises; no time is asserted."""

from benchmarks import timing
from benchmarks.store import main


def test_a_short_run(tmp_path, capsys):
    arguments = ["--precisions", "int8", "--backbone", "squeezenet1_1", "--size", "64", "--images", "6"]
    out = main([*arguments, "--repeats", "2", "--scratch", str(tmp_path), "--out", str(tmp_path / "r.json")])
    (run,) = timing.read(out)["runs"]
    (one,) = run["measurements"]
    assert one["work"] == "read int8"
    assert {"store", "zarr", "mapped file", "labels", "store, a batch"} <= set(one["ms_per_image"])
    assert "of the mapped file" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]  # no store is left behind
