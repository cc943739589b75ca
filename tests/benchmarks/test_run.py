"""The CPU benchmark from end to end, tiny. Nothing here looks at a time."""

from __future__ import annotations

import pytest

from benchmarks import run, timing
from benchmarks.variants import IMAGES, WORKS, Job


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


def test_a_run_on_this_cpu_is_stored_with_all_it_says(stores, tmp_path):
    out = tmp_path / "results.json"
    arguments = [
        "--backbones",
        "resnet50",
        "--work",
        "train2,eval5",
        "--size",
        "64",
        "--repeats",
        "2",
        "--memory",
        "none",
    ]
    assert run.main([*arguments, "--stores", str(stores), "--out", str(out)]) == out
    (stored,) = timing.read(out)["runs"]
    assert {"date", "commit", "machine", "versions", "arguments"} <= set(stored)
    assert {"zarr", "numpy", "torch", "torchvision", "python"} == set(stored["versions"])
    train, evaluate = stored["measurements"]
    assert (train["batch"], train["shots"], evaluate["batch"], evaluate["shots"]) == (2, 1, 1, 5)
    assert train["object_share"] == pytest.approx(0.18, abs=0.01)
    for measured in (train, evaluate):
        ways = measured["variants"]
        assert {"baseline", "exact", "default"} <= set(ways)
        assert all(len(way["wall_each_s"]) == len(way["cpu_each_s"]) == 2 for way in ways.values())
        assert all({"median", "q1", "q3"} == set(way["wall_s"]) for way in ways.values())
        assert ways["baseline"]["ratio"]["of_medians"] == 1
        # The same model on the same inputs, or the comparison means nothing.
        assert ways["exact"]["logits_diff"] < 1e-5
        assert ways["exact"]["loss_diff"] < 1e-5
        assert ways["default"]["logits_diff"] < 2e-2
    assert out.stat().st_size < 20_000


def test_peak_memory_is_of_a_process_of_its_own(stores):
    job = Job("resnet50", "eval1", 64, stores)
    job.store("int8")
    found = run.peak_of(job, "default")
    assert 0 < found["memory_before_bytes"] <= found["peak_bytes"]


def test_unknown_work_is_refused_before_anything_runs():
    with pytest.raises(SystemExit, match="Unknown work: train3"):
        run.main(["--work", "train3"])


@pytest.mark.parametrize("work", WORKS)
def test_episodes_have_the_pictures_they_need(work, tmp_path):
    episodes = Job("resnet50", work, 64, tmp_path).episodes
    assert len(episodes) == WORKS[work].batch
    for episode in episodes:
        assert len(set(episode.supports)) == WORKS[work].shots
        assert episode.query not in episode.supports
        assert max(episode.query, *episode.supports) < IMAGES
