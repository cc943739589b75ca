"""Both benchmark programs from end to end, tiny. Nothing here looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys

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


def test_the_gpu_script_runs_from_a_checkout_with_torch_alone(tmp_path):
    """On a CPU, tiny, with everything hidden that a machine with torch and torchvision need not have."""
    out = tmp_path / "gpu.json"
    code = """
import runpy, sys
hidden = set("ray zarr numcodecs click rich safetensors pyarrow yaml pycocotools scipy tensorboardX".split())
hidden |= {"pipeline", "cluster", "commands", "cli"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *args):
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, *args)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    script = timing.ROOT / "benchmarks" / "gpu" / "run.py"
    options = {
        "device": "cpu",
        "size": 64,
        "backbones": "resnet50",
        "work": "train,eval5",
        "peak-tflops": 1,
        "out": out,
    }
    arguments = ["--quick", *(f"--{name}={value}" for name, value in options.items())]
    command = [sys.executable, "-c", code, str(script), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "say nothing about a GPU" in done.stdout
    train, evaluate = json.loads(out.read_text())["runs"][0]["measurements"]
    assert (train["work"], evaluate["work"], evaluate["shots"]) == ("train2", "eval5x1", 5)
    for measured in (train, evaluate):
        exact = measured["variants"]["exact"]
        assert exact["logits_diff"] < 2e-2
        assert exact["episodes_per_s"] > 0
        assert 0 < exact["share_of_peak"] < 1
        assert measured["multiply_adds_per_episode"] > 0
        assert measured["peak_tflops"] == 1


def test_without_a_gpu_the_gpu_script_says_how_to_try_it():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = timing.ROOT / "benchmarks" / "gpu" / "run.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--device cpu" in done.stderr
