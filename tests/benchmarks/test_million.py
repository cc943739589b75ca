"""The benchmark of very many photos measures what it says, on few."""

import json

import pytest

from benchmarks import million
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import marker_file
from pipeline.store.verify import verify

IMAGES, SHARD = 165, 8


def test_its_store_is_a_whole_one_and_every_step_runs_on_it(tmp_path, capsys):
    path = tmp_path / "s.zarr"
    million.make(path, IMAGES, SHARD)
    store = FeatureStore.open(path)
    assert (store.sealed, store.shards, len(store.index.images)) == (True, 21, IMAGES)
    assert len(store.images_in(20)) == 5
    for step in million.STEPS:
        if step == "missing shards":
            for number in range(1, 21, million.MISSING):
                marker_file(path, number).unlink()
        if step == "grow":
            million.make(tmp_path / "other.zarr", IMAGES, SHARD)
            path = tmp_path / "other.zarr"
        million.play(step, path, IMAGES)
        found = json.loads(capsys.readouterr().out)
        assert found["seconds"] > 0
        assert found["files"] > 5
    assert not verify(FeatureStore.open(path)).damage
    with pytest.raises(AssertionError):
        million.find_missing(path, IMAGES)


def test_the_slope():
    found = ({"seconds": 1.0, "files": 11.0}, {"seconds": 3.0, "files": 11.0})
    assert million.slope((100, 200), found, 1000) == {"seconds": 19.0, "files": 11.0}


def test_sizes_of_shards_are_compared(tmp_path, capsys):
    million.compare_sizes([12], 0.02, tmp_path)
    assert "   12 MB,    2 images: written at" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
