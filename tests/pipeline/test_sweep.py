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
from pipeline.heads.training import DEFAULT_RECIPE, RECIPES
from pipeline.loading.source import StoreSource
from pipeline.scores.rows import read_results
from pipeline.store.feature_store import FeatureStore
from pipeline.sweep import make_cases, parse_axis, parse_fixed, sweep
from pipeline.sweep_case import run_config

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
    assert cases[0].choices == {**QUICK, "seed": 0, "learning_rate": 1e-3}
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
        ("seed=one", "seed must be a whole number, got 'one'"),
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


def test_values_with_commas_are_separated_by_semicolons():
    assert parse_axis("layers=all;1,3") == ("layers", ("all", "1,3"))
    assert parse_axis("layers=all,deep") == ("layers", ("all", "deep"))
    assert parse_fixed("layers=1,3") == ("layers", "1,3")
    assert parse_fixed("support_mask=no") == ("support_mask", False)
    with pytest.raises(ConfigError, match="--fix seed takes one value"):
        parse_fixed("seed=1,2")
    with pytest.raises(ConfigError, match="did you mean 'kernel'"):
        parse_axis("kernl=original")
    names = [case.name for case in make_cases(["s.zarr"], (0,), {"layers": ("all", "1,3")}, QUICK)]
    assert names == ["s-layers=all-fold0", "s-layers=1,3-fold0"]


def test_learner_choices_reach_the_run_and_are_kept_apart(store, tmp_path):
    cases = make_cases([store], (0,), {"kernel": ("center-pivot", "original")}, QUICK)
    result = run(cases, tmp_path)
    assert not result.failed, result.failed
    published, dense = (config_of(tmp_path / case.name) for case in cases)
    assert "kernel" not in published.learner, "the published choice is left out: old digests hold"
    assert dense.learner["kernel"] == "original"
    assert result.configurations[0].scores[0].fb_iou != result.configurations[1].scores[0].fb_iou
    assert load_checkpoint(tmp_path / cases[1].name).info.learner["kernel"] == "original"


def test_heads_that_need_no_training_are_only_tested(store, tmp_path):
    cases = make_cases([store], (0, 1), {"seed": (0, 1)}, QUICK, heads=("hsnet", "cosine", "untrained"))
    assert [case.name for case in cases if case.head == "cosine"] == [
        f"s-head=cosine-seed={seed}-fold{fold}" for seed in (0, 1) for fold in (0, 1)
    ]
    one = make_cases([store], (0,), {"learning_rate": (1e-3, 0.01)}, QUICK, heads=("hsnet", "cosine"))
    assert [case.name for case in one if case.head == "cosine"] == ["s-head=cosine-fold0"], "no training, no such axis"
    result = run([case for case in cases if case.fold == 0 and case.choices["seed"] == 0], tmp_path)
    assert not result.failed
    assert [done.run_dir is None for done in result.cases] == [False, True, True]
    rows = [read_results(done.rows) for done in result.cases]
    assert len({tuple(one.manifests.values()) for one in rows}) == 1, "the same episodes"
    assert [one.facts["method"]["name"] for one in rows] == ["hsnet", "cosine", "untrained"]
    before = written(tmp_path)
    run([case for case in cases if case.fold == 0 and case.choices["seed"] == 0], tmp_path)
    assert written(tmp_path) == before
    # Rows of another head under a case's name are written anew.
    place = tmp_path / "s-head=cosine-seed=0-fold0.parquet"
    place.write_bytes((tmp_path / "s-head=untrained-seed=0-fold0.parquet").read_bytes())
    run([case for case in cases if case.head == "cosine" and case.name in place.name], tmp_path)
    assert read_results(place).facts["method"]["name"] == "cosine"
    # A head with its own way to combine supports keeps it, and is not tested again for it.
    (contrast,) = make_cases([store], (0,), {}, QUICK, heads=("contrast",))
    run([contrast], tmp_path)
    assert read_results(tmp_path / "s-head=contrast-fold0.parquet").protocol.fusion == "joint"
    before = written(tmp_path)
    run([contrast], tmp_path)
    assert written(tmp_path) == before
    with pytest.raises(ConfigError, match=r"No head 'cosin' for a sweep.*did you mean 'cosine'"):
        make_cases([store], (0,), {}, {}, heads=("cosin",))
    with pytest.raises(ConfigError, match="seed is varied over no value"):
        make_cases([store], (0,), {"seed": ()}, {})


def test_a_run_goes_on_with_the_recipe_it_was_begun_with(store, tmp_path):
    """A sweep of an earlier version trained as published; its folder goes on though the default is another now."""
    (published,) = make_cases([store], (0,), {}, {**QUICK, "recipe": "hsnet"})
    (silent,) = make_cases([store], (0,), {}, QUICK)
    assert published.name == silent.name
    run([published], tmp_path)
    again = run([silent], tmp_path)
    assert [one.trained for one in again.cases] == [False]
    assert not again.failed
    assert run_config(silent, open_source(store), tmp_path / "new").average == RECIPES[DEFAULT_RECIPE]["average"]
    (other,) = make_cases([store], (0,), {}, {**QUICK, "batch_size": 3})
    assert "batch_size" in str(run([other], tmp_path).failed[0].error)
    with pytest.raises(ConfigError, match="stabel"):
        make_cases([store], (0,), {}, {"recipe": "stabel"})


def test_heads_are_tested_on_other_data_too(store, tmp_path):
    """The paper's Table 4: only on stores of the same features, on classes that are new to the head."""
    shapes = Shapes(size=64, trn_per_class=2, val_per_class=4)
    other, odd = str(tmp_path / "other.zarr"), str(tmp_path / "odd.zarr")
    extract(shapes, load_weights("squeezenet1_1"), Path(other), image_size=64, precision="int8")
    extract(shapes, load_weights("squeezenet1_1"), Path(odd), image_size=96, precision="int8")
    cases = make_cases([store], (0,), {}, QUICK, transfer=(other, odd))
    result = run(cases, tmp_path / "out")
    assert not result.failed
    assert list(result.cases[0].transferred) == ["other"]
    rows = read_results(tmp_path / "out" / "s-fold0-on-other.parquet")
    held_out = {shapes.index.classes[c] for c in shapes.index.split(0, "test").class_ids}
    assert set(rows.classes.values()) == held_out
    assert [one.name for one in result.configurations] == ["s", "s-on-other"]
    before = written(tmp_path)
    run(cases, tmp_path / "out")
    assert written(tmp_path) == before
    failed = run(make_cases([store], (0,), {}, QUICK, transfer=(odd,)), tmp_path / "out").failed
    assert "None of the stores to transfer to (odd) has features of the kind" in str(failed[0].error)
