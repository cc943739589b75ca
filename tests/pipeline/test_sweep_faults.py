"""Sweeps whose cases fail, are stopped, are watched, are packed: each fails alone, and nothing changes the others."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from hsnet.errors import ConfigError, StoreError
from pipeline.common.lock import sole_writer
from pipeline.datasets.shapes import Shapes
from pipeline.episodes.protocols import resolve
from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.loading.source import StoreSource
from pipeline.scores.rows import read_results
from pipeline.store.feature_store import FeatureStore
from pipeline.sweep import make_cases, make_packs, sweep
from pipeline.sweep_status import Board, CaseStatus, Teller

QUICK = {"steps": 2, "batch_size": 2, "validate_every": 2, "validate_episodes": 2, "channels": 8}
RULES = resolve(episodes=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("faults") / "s.zarr"
    data = Shapes(size=64, trn_per_class=2, val_per_class=3)
    extract(data, load_weights("squeezenet1_1"), path, image_size=64, precision="int8")
    return str(path)


def open_source(path: str) -> StoreSource:
    return StoreSource(FeatureStore.open(path))


def digests(out: Path, cases) -> list[str]:
    return [load_checkpoint(out / case.name).digest for case in cases]


def test_a_bug_or_a_lack_of_memory_ends_one_case(store, tmp_path):
    cases = make_cases([store], (0,), {"seed": (0, 1, 2)}, QUICK)

    def burst(case, event):
        if case.choices["seed"] == 0:
            raise ZeroDivisionError("a bug")
        if case.choices["seed"] == 1:
            raise MemoryError

    result = sweep(cases, open_source, tmp_path, RULES, on_step=burst)
    assert [done.kind for done in result.cases] == ["bug", "out of memory", None]
    assert [done.error for done in result.failed] == ["ZeroDivisionError: a bug", "MemoryError"]
    assert result.failed[0].log == tmp_path / "s-seed=0-fold0.log"
    assert "in burst" in result.failed[0].log.read_text(), "the traceback"
    assert len(result.configurations) == 1
    again = sweep(cases, open_source, tmp_path, RULES)
    assert not again.failed
    assert not list(tmp_path.glob("*.log")), "the log of what works now is gone"

    def broken(path):
        raise RuntimeError("no store today")

    (cosine,) = make_cases([store], (0,), {}, {}, heads=("cosine",))
    failed = sweep([cosine], broken, tmp_path, RULES).failed[0]
    assert (failed.kind, failed.run_dir) == ("bug", None)
    assert "no store today" in failed.log.read_text()


def test_a_second_sweep_in_a_folder_is_refused(store, tmp_path):
    cases = make_cases([store], (0,), {}, QUICK)
    with sole_writer(tmp_path):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(StoreError, match=r"is being written by process \d+ on .*Wait until it is done"):
            sweep(cases, open_source, tmp_path, RULES)
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="A sweep cannot write to"):
        sweep(cases, open_source, tmp_path / "file", RULES)
    with pytest.raises(ConfigError, match="A pack has at least one head, got 0"):
        sweep(cases, open_source, tmp_path, RULES, pack=0)


def test_a_stop_is_heard_in_a_test_too(store, tmp_path, monkeypatch):
    cases = make_cases([store], (0, 1), {}, {}, heads=("cosine",))
    asked = []
    monkeypatch.setattr(Teller, "tested", lambda *told: asked.append(told))
    result = sweep(cases, open_source, tmp_path, resolve(episodes=60), stop=lambda: len(asked) >= 1)
    assert [done.kind for done in result.cases] == ["interrupted"]
    assert not list(tmp_path.glob("*.parquet"))
    assert not (tmp_path / ".sweep").exists()


def test_an_interrupted_test_goes_on_with_what_was_answered(store, tmp_path, monkeypatch):
    (case,) = make_cases([store], (0,), {}, {}, heads=("cosine",))
    told: list[int] = []
    monkeypatch.setattr(Teller, "tested", lambda teller, done, episodes: told.append(done))

    def run(out, **options):
        told.clear()
        (done,) = sweep([case], open_source, out, resolve(episodes=60), **options).cases
        return done

    assert run(tmp_path, stop=lambda: len(told) >= 1).kind == "interrupted"
    again = run(tmp_path)
    assert told[0] > 0, "goes on"
    assert not list(tmp_path.glob("*.parts"))
    rows = [read_results(done.rows).table.drop_columns(["seconds"]) for done in (again, run(tmp_path / "whole"))]
    assert rows[0].to_pylist() == rows[1].to_pylist()
    # What was answered by other rules is not kept: rows would be overwritten, too.
    again.rows.unlink()
    assert run(tmp_path, stop=lambda: len(told) >= 1).kind == "interrupted"
    assert list(tmp_path.glob("*.parts"))
    told.clear()
    (other,) = sweep([case], open_source, tmp_path, resolve(episodes=50)).cases
    assert told[0] == 0
    assert len(read_results(other.rows).table) == 50


def test_what_cases_tell_while_they_run(store, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sweep_status.TOLD_SECONDS", 0)
    monkeypatch.setattr("pipeline.sweep.WATCH_SECONDS", 0.01)
    seen: list[CaseStatus] = []
    (case,) = make_cases([store], (0,), {}, QUICK)
    slow = lambda case, event: time.sleep(0.1)  # noqa: E731
    sweep([case], open_source, tmp_path, RULES, on_progress=seen.extend, on_step=slow)
    training = [one for one in seen if one.state == "training"]
    assert {(one.name, one.steps) for one in training} == {(case.name, 2)}
    assert training[0].loss > 0
    assert training[0].seconds_left > 0


def test_words_are_few_and_say_what_is_left(tmp_path):
    board, now = Board(tmp_path), [0.0]
    board.open()
    teller = Teller(board, "a", lambda: now[0])
    teller.step(1, 11, 0.5, 2.0)
    (told,) = board.read(["a", "b"])
    assert told == CaseStatus("a", "training", 1, 11, 0.5, None, 20.0)
    teller.validated(40.0)
    teller.validated(30.0)
    now[0] = 1.0
    teller.step(2, 11, 0.3, 2.0)
    assert board.read(["a"]) == [told], "none sooner than two seconds later"
    now[0] = 2.0
    teller.step(3, 11, 0.1, 4.0)
    assert board.read(["a"]) == [CaseStatus("a", "training", 3, 11, pytest.approx(0.3), 40.0, 16.0)]
    teller.tested(0, 100)
    now[0] = 12.0
    teller.tested(50, 100)
    assert board.read(["a"]) == [CaseStatus("a", "testing", 50, 100, None, 40.0, 10.0)]
    now[0] = 20.0
    teller.tested(30, 90)  # another test, that an earlier call began
    now[0] = 22.0
    teller.tested(50, 90)
    assert board.read(["a"]) == [CaseStatus("a", "testing", 50, 90, None, 40.0, 4.0)]
    (board.path / "a.json").write_text("cut o")
    assert board.read(["a"]) == []
    other = Board(tmp_path)
    assert not other.stop_wanted()
    board.ask_to_stop()
    other._looked = -10.0
    assert other.stop_wanted()


def test_a_packed_sweep_equals_one_by_one(store, tmp_path, caplog):
    varied = {"learning_rate": (1e-3, 3e-3, 5.0), "average": (0.0, 0.5)}
    cases = make_cases([store], (0, 1), varied, QUICK)[:6] + make_cases([store], (0,), {}, {}, heads=("cosine",))
    cases.append(make_cases([store], (0,), {"learning_rate": (5.0,)}, QUICK)[0])
    with caplog.at_level(logging.INFO, "pipeline"):
        packed = sweep(cases, open_source, tmp_path / "packed", RULES, pack=3)
    assert "1 cases need no training and are not packed" in caplog.text
    assert [done.case for done in packed.cases] == cases
    assert [done.kind for done in packed.cases] == [None] * 7 + ["refused"]
    alone = sweep(cases, open_source, tmp_path / "alone", RULES)
    assert digests(tmp_path / "packed", cases[:6]) == digests(tmp_path / "alone", cases[:6])
    for mine, theirs in zip(packed.cases[:7], alone.cases, strict=False):
        assert mine.steps == theirs.steps
        rows = [read_results(done.rows).table.drop_columns("seconds") for done in (mine, theirs)]
        assert rows[0].equals(rows[1])
    times = [(tmp_path / "packed" / f"{case.name}.parquet").stat().st_mtime_ns for case in cases[:6]]
    again = sweep(cases[:6], open_source, tmp_path / "packed", RULES, pack=4)
    assert not any(done.trained for done in again.cases)
    assert [(tmp_path / "packed" / f"{case.name}.parquet").stat().st_mtime_ns for case in cases[:6]] == times


def test_who_is_packed_with_whom(tmp_path, caplog):
    cases = make_cases(["a.zarr", "b.zarr"], (0, 1), {"learning_rate": (1e-3, 1e-4), "seed": (0, 1)}, {})
    packs = make_packs(cases, tmp_path, 2)
    assert sorted(case.name for pack in packs for case in pack) == sorted(case.name for case in cases)
    for pack in packs:
        assert len({(case.store, case.fold, case.choices["seed"]) for case in pack}) == 1, "the same episodes"
    (tmp_path / f"{cases[0].name}.parquet").touch()
    with caplog.at_level(logging.INFO, "pipeline"):
        packs = make_packs(cases, tmp_path, 8, workers=4)
    assert (cases[0],) in packs, "it only has to be looked at"
    assert sorted(map(len, packs)) == [1, 7, 8]
    assert "2 packs for 4 workers: a smaller --pack would keep more of them busy" in caplog.text
    make_packs(cases[:1] + cases[-1:], tmp_path, 2)
    assert [len(pack) for pack in make_packs(cases, tmp_path, 1)] == [1] * 16
