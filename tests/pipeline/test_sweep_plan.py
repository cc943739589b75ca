"""What a sweep would do: every state a case can be in, told without computing or writing anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsnet.errors import ConfigError
from pipeline.datasets.shapes import Shapes
from pipeline.episodes.protocols import resolve
from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights
from pipeline.loading.source import StoreSource
from pipeline.store.feature_store import FeatureStore
from pipeline.sweep import make_cases, sweep
from pipeline.sweep_plan import plan_sweep

QUICK = {"steps": 2, "batch_size": 2, "validate_every": 2, "validate_episodes": 2, "recipe": "hsnet"}
RULES = resolve(episodes=4)


def open_source(path: str) -> StoreSource:
    return StoreSource(FeatureStore.open(path))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_every_state_of_a_case(tmp_path):
    store, out = str(tmp_path / "s.zarr"), tmp_path / "out"
    extract(
        Shapes(size=64, trn_per_class=2, val_per_class=3),
        load_weights("squeezenet1_1"),
        Path(store),
        image_size=64,
        precision="int8",
    )
    lost = str(tmp_path / "lost.zarr")

    def planned(cases, rules=RULES):
        before = snapshot(tmp_path)
        found = plan_sweep(cases, open_source, out, rules)
        assert snapshot(tmp_path) == before, "nothing is written"
        return [(one.state, one.step, one.steps) for one in found], [one.seconds for one in found], found

    cases = make_cases([store], (0, 1), {}, QUICK, heads=("hsnet", "cosine"))
    states, seconds, _ = planned(cases)
    assert states == [("train", 0, 2)] * 2 + [("test", 0, 0)] * 2
    assert seconds == [None] * 4, "nothing has run that could tell"

    sweep([cases[0], cases[2]], open_source, out, RULES)
    states, seconds, _ = planned(cases)
    assert states == [("done", 2, 2), ("train", 0, 2), ("done", 0, 0), ("test", 0, 0)]
    assert seconds[0] == seconds[2] == 0
    assert seconds[1] > 0, "by the steps of the other fold"
    assert seconds[3] > 0

    assert planned(cases[:1], resolve(episodes=5))[0] == [("test", 2, 2)], "other rules, other rows"
    more = make_cases([store], (0,), {}, {**QUICK, "steps": 5})
    assert planned(more)[0] == [("go on", 2, 5)]
    (other,) = make_cases([store], (0,), {}, {**QUICK, "batch_size": 4})
    states, _, (refused,) = planned([other])
    assert states == [("refused", 0, 2)]
    assert "batch_size" in refused.note
    (odd,) = make_cases([store], (1,), {}, {**QUICK, "levels": "9"})
    assert planned([odd])[2][0].state == "refused"
    (out / "s-fold0" / "resume.safetensors").write_bytes(b"cut off")
    assert "is damaged" in planned(cases[:1])[2][0].note

    states, _, (missing,) = planned(make_cases([lost], (0,), {}, QUICK))
    assert states == [("missing", 0, 2)]
    assert "no feature store" in missing.note
    shifted = make_cases([store], (1,), {}, QUICK, transfer=(lost,))
    assert planned(shifted)[2][0].state == "missing"
    with pytest.raises(ConfigError, match="tests at network size"):
        plan_sweep(cases, open_source, out, resolve("original"))


def test_transfer_is_part_of_being_done(tmp_path):
    store, other, out = str(tmp_path / "s.zarr"), str(tmp_path / "o.zarr"), tmp_path / "out"
    for path, photos in ((store, 3), (other, 4)):
        data = Shapes(size=64, trn_per_class=2, val_per_class=photos)
        extract(data, load_weights("squeezenet1_1"), Path(path), image_size=64, precision="int8")
    sweep(make_cases([store], (0,), {}, QUICK), open_source, out, RULES)
    shifted = make_cases([store], (0,), {}, QUICK, transfer=(other,))
    assert plan_sweep(shifted, open_source, out, RULES)[0].state == "test"
    sweep(shifted, open_source, out, RULES)
    assert plan_sweep(shifted, open_source, out, RULES)[0].state == "done"


def test_a_few_episodes_are_timed_where_nothing_has_run(tmp_path):
    store, out = str(tmp_path / "s.zarr"), tmp_path / "out"
    shapes = Shapes(size=64, trn_per_class=2, val_per_class=3)
    extract(shapes, load_weights("squeezenet1_1"), Path(store), image_size=64, precision="int8")
    slim = {**QUICK, "steps": 10, "channels": 8}
    cases = make_cases([store], (0, 1), {}, slim, heads=("hsnet", "cosine"))
    cases += make_cases([store], (0,), {"steps": (100,)}, {k: v for k, v in slim.items() if k != "steps"})
    before = snapshot(tmp_path)
    found = plan_sweep(cases, open_source, out, RULES, "cpu")
    assert snapshot(tmp_path) == before, "nothing is written"
    assert [one.measured for one in found] == [True, True, False, False, True]
    assert found[0].seconds == found[1].seconds > 0, "measured once"
    assert found[4].seconds > 5 * found[0].seconds - 1
    assert found[2].seconds is None, "of untrained heads only runs tell"
    short = plan_sweep(cases[:1], open_source, out, resolve(episodes=400), "cpu")
    assert short[0].seconds > found[0].seconds, "the test counts"
