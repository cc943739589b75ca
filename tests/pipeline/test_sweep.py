"""Sweeps: every combination once, resumed where it stopped, means over folds as `analyze` makes them."""

from pathlib import Path

import pytest

from hsnet.errors import ConfigError
from pipeline.analyze import analyze
from pipeline.datasets.shapes import Shapes
from pipeline.episodes.protocols import resolve
from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.heads.config import RunConfig
from pipeline.heads.run_dir import RunDir
from pipeline.loading.source import StoreSource
from pipeline.scores.rows import read_results
from pipeline.store.feature_store import FeatureStore
from pipeline.sweep import make_cases, parse_axis, sweep

QUICK = {"steps": 2, "batch_size": 2, "validate_every": 1, "validate_episodes": 2}
RULES = resolve(episodes=12, shots=(1, 2))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("sweep") / "s.zarr"
    data = Shapes(size=64, trn_per_class=2, val_per_class=3)
    extract(data, load_weights("squeezenet1_1"), path, image_size=64, precision="int8")
    return str(path)


def open_source(path: str) -> StoreSource:
    return StoreSource(FeatureStore.open(path))


def run(cases, out: Path, **options):
    return sweep(cases, open_source, out, RULES, **options)


def written(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} | {
        path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")
    }


def test_every_combination_is_a_case(store):
    cases = make_cases([store], (0, 2), {"seed": (0, 1), "learning_rate": (1e-3, 0.01)}, QUICK)
    assert len(cases) == 8
    assert len({case.name for case in cases}) == 8
    assert cases[0].name == "s-seed=0-learning_rate=0.001-fold0"
    assert cases[1].configuration == cases[0].configuration
    assert cases[0].choices == QUICK, "defaults are not written down: they are the same run without"
    assert cases[-1].choices == {**QUICK, "seed": 1, "learning_rate": 0.01}


def test_a_sweep_trains_tests_and_averages_over_folds(store, tmp_path):
    cases = make_cases([store], (0, 1), {"seed": (0, 1)}, QUICK)
    seen = []
    result = run(cases, tmp_path, on_case=seen.append)
    assert [one.case for one in result.cases] == cases
    assert seen == list(result.cases)
    assert not result.failed
    assert [one.name for one in result.configurations] == ["s-seed=0", "s-seed=1"]
    for one in result.configurations:
        assert one.folds == (0, 1)
        assert [score.shots for score in one.scores] == [1, 2]
        files = [tmp_path / f"{one.name}-fold{fold}.parquet" for fold in (0, 1)]
        (mean,) = (
            score
            for score in analyze([read_results(file) for file in files]).scores
            if score.fold is None and score.shots == 1
        )
        assert one.scores[0].miou == mean.miou
    config = RunDir(tmp_path / "s-seed=1-fold0", config_of(tmp_path / "s-seed=1-fold0"), write=False).config
    assert (config.seed, config.fold, config.steps) == (1, 0, 2)


def config_of(path: Path) -> RunConfig:
    import json

    return RunConfig.from_dict(json.loads((path / "config.json").read_text()))


def test_only_what_is_missing_is_done_again(store, tmp_path):
    cases = make_cases([store], (0,), {"seed": (0, 1)}, QUICK)
    run(cases[:1], tmp_path)
    before = written(tmp_path)
    result = run(cases, tmp_path)
    assert [one.trained for one in result.cases] == [False, True]
    after = written(tmp_path)
    assert {name: after[name] for name in before} == before
    rows = tmp_path / "s-seed=0-fold0.parquet"
    rows.write_bytes(b"cut off")
    run(cases, tmp_path)
    assert analyze([read_results(rows)]).scores, "rows that cannot be read are made again"
    rows.write_bytes((tmp_path / "s-seed=1-fold0.parquet").read_bytes())
    run(cases, tmp_path)
    assert read_results(rows).facts["checkpoint"] == load_checkpoint(tmp_path / "s-seed=0-fold0").digest
    changed = sweep(cases[:1], open_source, tmp_path, resolve(episodes=5))
    assert changed.configurations[0].scores[0].episodes == 5, "other rules, other rows"


def test_a_case_that_cannot_work_does_not_stop_the_others(store, tmp_path):
    cases = make_cases([store], (0,), {"learning_rate": (5.0, 1e-3)}, QUICK)
    result = run(cases, tmp_path)
    assert [one.case.choices.get("learning_rate") for one in result.failed] == [5.0]
    assert "learning_rate must be between 0 and 1, got 5.0" in str(result.failed[0].error)
    assert len(result.configurations) == 1


def test_an_interrupted_sweep_goes_on(store, tmp_path):
    cases = make_cases([store], (0, 1), {}, QUICK)
    steps = []
    result = run(cases, tmp_path, stop=lambda: len(steps) >= 1, on_step=lambda case, event: steps.append(case.name))
    assert len(result.cases) == 1
    assert "interrupted" in str(result.cases[0].error)
    whole = run(cases, tmp_path)
    assert not whole.failed
    other = run(cases, tmp_path / "other")
    assert [one.scores[0].miou for one in whole.configurations] == [one.scores[0].miou for one in other.configurations]


def test_choices_are_read_as_their_fields(store):
    assert parse_axis("learning_rate=1e-3,0.01") == ("learning_rate", (0.001, 0.01))
    assert parse_axis("seed=0,1,1") == ("seed", (0, 1))
    assert parse_axis("drop_novel_images=yes,no") == ("drop_novel_images", (True, False))
    assert parse_axis("boundary=background,ignore") == ("boundary", ("background", "ignore"))
    for text, said in (
        ("fold=0", "is not CHOICE=VALUE"),
        ("seed", "is not CHOICE=VALUE"),
        ("seed=one", "seed must be whole numbers, got 'one'"),
        ("drop_novel_images=maybe", "must be yes or no"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_axis(text)
    with pytest.raises(ConfigError, match="both varied and fixed"):
        make_cases([store], (0,), {"seed": (0,)}, {"seed": 1})
    with pytest.raises(ConfigError, match="different names"):
        make_cases([store, store], (0,), {}, {})
    with pytest.raises(ConfigError, match="nothing to sweep over"):
        make_cases([], (0,), {}, {})
    with pytest.raises(ConfigError, match="tests at network size"):
        sweep(make_cases([store], (0,), {}, QUICK), open_source, Path("unused"), resolve("original"))
    for several in ({"ways": 2}, {"absent": 0.5}):
        with pytest.raises(ConfigError, match="A sweep tests 1-way episodes"):
            sweep(make_cases([store], (0,), {}, QUICK), open_source, Path("unused"), resolve(**several))
