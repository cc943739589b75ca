"""A sweep on Ray: cases side by side, the same scores as one after the other."""

import functools
from pathlib import Path

from pipeline.datasets.shapes import Shapes
from pipeline.episodes.protocols import resolve
from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights
from pipeline.loading.source import StoreSource
from pipeline.store.feature_store import FeatureStore
from pipeline.sweep import make_cases, sweep

QUICK = {"steps": 2, "batch_size": 2, "validate_every": 1, "validate_episodes": 2}


def open_source(path: str) -> StoreSource:
    return StoreSource(FeatureStore.open(path))


def test_cases_side_by_side_equal_cases_one_after_the_other(tmp_path: Path, ray_runner) -> None:
    store = tmp_path / "s.zarr"
    data = Shapes(size=64, trn_per_class=2, val_per_class=3)
    extract(data, load_weights("squeezenet1_1"), store, image_size=64, precision="int8")
    cases = make_cases([str(store)], (0, 1), {"seed": (0, 1)}, QUICK)
    run = functools.partial(sweep, cases, open_source, protocol=resolve(episodes=10))
    together = run(out=tmp_path / "ray", runner=ray_runner)
    assert not together.failed
    assert [one.case for one in together.cases] == cases
    apart = run(out=tmp_path / "here")
    for mine, theirs in zip(together.configurations, apart.configurations, strict=True):
        assert mine.scores[0].miou == theirs.scores[0].miou
