"""The timing core: order, statistics, files. No test looks at how long anything takes."""

from __future__ import annotations

import doctest
import json

import pytest

from benchmarks import timing


def test_examples():
    assert not doctest.testmod(timing).failed


def test_ways_alternate_and_each_is_first_in_turn():
    seen = []
    runs = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = timing.alternate(runs, repeats=3, warmup=1)
    assert [len(times[name].wall) for name in "abc"] == [3, 3, 3]
    rounds = ["".join(seen[start : start + 3]) for start in range(0, 12, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert {one[0] for one in rounds[1:]} == {"a", "b", "c"}


def test_a_budget_leaves_three_repeats(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    times = timing.alternate({"a": lambda: None}, repeats=50, budget=1)
    assert len(times["a"].wall) == timing.LEAST_REPEATS
    assert times["a"].wall == (1.0, 1.0, 1.0)


def test_the_device_is_waited_for_on_both_sides():
    seen = []
    timing.alternate({"a": lambda: seen.append("run")}, 1, 0, synchronise=lambda: seen.append("wait"))
    assert seen == ["wait", "run", "wait"]


def test_statistics():
    assert timing.summary([4.0, 1.0, 2.0, 3.0, 100.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert timing.summary([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0}
    found = timing.ratio([10.0, 20.0, 30.0], [1.0, 4.0, 10.0])
    assert found == {"of_medians": 5.0, "q1": 4.0, "q3": 7.5}


def test_memory_forgets_a_peak():
    waste = bytearray(80_000_000)
    waste[::4096] = b"x" * len(waste[::4096])
    del waste
    assert timing.memory()[1] >= 80_000_000
    timing.forget_peak()
    now, most = timing.memory()
    assert 0 < now <= most * 1.01


def test_results_are_added_and_the_newest_counts(tmp_path):
    path = tmp_path / "deep" / "results.json"
    one = {"device": "cpu", "backbone": "vgg16", "work": "train1", "image_size": 400, "value": 1 / 3}
    timing.record({"date": "2030-01-02", "commit": "a"}, one, path)
    timing.record({"date": "2030-01-02", "commit": "a"}, {**one, "work": "eval1"}, path)
    timing.record({"date": "2030-01-01", "commit": "b"}, {**one, "value": 7}, path)
    stored = json.loads(path.read_text())
    assert [len(run["measurements"]) for run in stored["runs"]] == [2, 1]
    newest = timing.newest([path])
    assert len(newest) == 2
    assert newest["cpu", "vgg16", "train1", 400]["value"] == 0.3333
    assert newest["cpu", "vgg16", "train1", 400]["run"] == {"date": "2030-01-02", "commit": "a"}


def test_a_file_of_another_schema_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"schema": 99, "runs": []}')
    with pytest.raises(SystemExit, match="99"):
        timing.read(tmp_path / "x.json")


def test_a_run_says_where_and_when_it_was():
    run = timing.describe_run("cpu", {"repeats": 2, "out": None}, "numpy")
    assert set(run) == {"date", "commit", "machine", "versions", "arguments"}
    assert run["machine"]["threads"] >= 1
    assert run["machine"]["cpu"]
    assert set(run["versions"]) == {"python", "torch", "torchvision", "numpy"}
    assert run["arguments"] == {"repeats": 2}
