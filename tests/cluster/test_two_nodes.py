"""The commands on a cluster of two nodes whose workers do not have this project: the results of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import fingerprints, machine
from PIL import Image

from benchmarks.two_nodes import Nodes, driver
from pipeline.common.files import read_table
from pipeline.datasets.shapes import Shapes

SHAPES = ("shapes", "--data-option", "size=64", "--data-option", "trn_per_class=3", "--data-option", "val_per_class=4")
BACKBONE = ("--backbone", "squeezenet1_1", "--image-size", 64, "--shard-images", 4)
RUN = ("--fold", 0, "--steps", 4, "--batch-size", 4, "--validate-every", 2, "--validate-episodes", 6)
SWEEP = ("--fix", "batch_size=2", "--fix", "validate_every=1", "--fix", "validate_episodes=2", "--steps", "2")

LOOK = """
import json, sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(address=sys.argv[1], log_to_driver=False)

def look():
    import importlib.util
    names = ["cli", "commands", "cluster", "pipeline", "hsnet", "torch", "zarr"]
    return [name for name in names if importlib.util.find_spec(name)]

for node in ray.nodes():
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    print(json.dumps([node["NodeID"], ray.get(ray.remote(look).options(scheduling_strategy=there).remote())]))
"""


def on(nodes: Nodes, *words: object, code: int = 0) -> tuple[Any, str]:
    """JSON that a command prints when it works on the cluster, and what it says on the way."""
    process = driver(nodes, *words, "--json")
    printed, said = process.communicate(timeout=240)
    assert process.returncode == code, said
    assert "Traceback" not in said
    return json.loads(printed) if printed else None, said


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in one process."""
    path = tmp_path_factory.mktemp("alone") / "s.zarr"
    machine("extract", *SHAPES, *BACKBONE, "--store", path, "-q")
    return path


@pytest.fixture(scope="module")
def run(store: Path) -> Path:
    """Trained in one process."""
    path = store.parent / "run"
    machine("train", "--store", store, *RUN, "--run-dir", path, "-q")
    return path


def test_the_workers_do_not_find_the_project(two_nodes: Nodes) -> None:
    """Otherwise the tests below prove nothing."""
    root = Path(__file__).resolve().parents[2]  # the driver's folder is on the workers' path, too
    done = subprocess.run(
        [sys.executable, "-c", LOOK, two_nodes.address],
        cwd=root,
        env={"PATH": "/usr/bin", "HOME": "/tmp", "PYTHONPATH": str(root), **two_nodes.environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    seen = dict(map(json.loads, done.stdout.splitlines()))
    assert seen == {node: ["torch", "zarr"] for node in two_nodes.ids}, done.stderr


def test_extract(two_nodes: Nodes, store: Path, tmp_path: Path) -> None:
    made, _ = on(two_nodes, "extract", *SHAPES, *BACKBONE, "--store", tmp_path / "s.zarr")
    assert made["written_shards"] == made["written_images"] // 4 > 10
    assert fingerprints(tmp_path / "s.zarr") == fingerprints(store)


def test_train_two_ranks(two_nodes: Nodes, store: Path, run: Path, tmp_path: Path) -> None:
    result, said = on(two_nodes, "train", "--store", store, *RUN, "--run-dir", tmp_path / "run", "--workers", 2)
    assert (result["steps"], result["finished"]) == (4, True)
    # Sums in another order differ by 1e-7, which Adam's division can blow up in weights of no influence.
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(run), rtol=0, atol=2e-4)
    assert "2 workers on 2 nodes" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def losses(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["train"]["loss"] for line in lines if "train" in line]


def test_evaluate(two_nodes: Nodes, store: Path, run: Path, tmp_path: Path) -> None:
    words = ("evaluate", "--checkpoint", run, "--store", store, "--shots", "1,2", "--episodes", 60, "--out")
    alone = machine(*words, tmp_path / "alone.parquet", "-q")
    there, _ = on(two_nodes, *words, tmp_path / "there.parquet")
    assert there["scores"] == alone["scores"]
    alone_rows, rows = (read_table(tmp_path / f"{name}.parquet") for name in ("alone", "there"))
    assert rows.drop_columns(["seconds"]).equals(alone_rows.drop_columns(["seconds"]))


def test_sweep(two_nodes: Nodes, store: Path, tmp_path: Path) -> None:
    words = ("sweep", "--store", store, "--folds", "0,1", *SWEEP, "--episodes", 8, "--vary", "seed=0,1", "--out")
    alone = machine(*words, tmp_path / "alone", "-q")
    there, _ = on(two_nodes, *words, tmp_path / "there")
    assert [one["name"] for one in there["configurations"]] == [one["name"] for one in alone["configurations"]]
    for mine, theirs in zip(there["configurations"], alone["configurations"], strict=True):
        assert mine["scores"][0]["miou"] == theirs["scores"][0]["miou"]
    assert not list((tmp_path / "there").rglob("*part*"))


def test_supports(two_nodes: Nodes, store: Path, run: Path) -> None:
    words = ("supports", "--checkpoint", run, "--store", store, "--candidates", 3, "--queries", 4)
    assert on(two_nodes, *words)[0] == machine(*words, "-q")


def test_predict(two_nodes: Nodes, run: Path, tmp_path: Path) -> None:
    data, photos = Shapes(size=64), tmp_path / "photos"
    photos.mkdir()
    images = data.index.split(0, "test").by_class[0]
    for number in range(4):
        data.image(images[number]).save(photos / f"{number}.png")
    Image.fromarray((data.label(images[0]) == 1).astype(np.uint8) * np.uint8(255)).save(tmp_path / "mask.png")
    words = ("predict", "--checkpoint", run, "--support", f"{photos / '0.png'}:{tmp_path / 'mask.png'}")
    words += ("--query", photos, "--out")
    machine(*words, tmp_path / "alone", "-q")
    there, _ = on(two_nodes, *words, tmp_path / "there")
    assert (there["photos"], there["unusable"]) == (4, 0)
    for path in sorted((tmp_path / "alone").glob("*_mask.png")):
        np.testing.assert_array_equal(Image.open(path), Image.open(tmp_path / "there" / path.name))


def test_doctor_looks_at_every_node(two_nodes: Nodes, store: Path, tmp_path: Path) -> None:
    told, _ = on(two_nodes, "doctor", "--store", store, "--run-dir", tmp_path / "none")
    names = {finding["name"] for finding in told["findings"]}
    assert {name.split()[1] for name in names} == {node[:8] for node in two_nodes.ids}
    for name in names:
        about = [finding["detail"] for finding in told["findings"] if finding["name"] == name]
        assert "2 CPUs, 0 GPUs, memory" in about[0]
        assert about[1].startswith("the versions of this machine: Python 3")
        assert about[2:] == [f"--store {store}: folder", f"--run-dir {tmp_path / 'none'}: nothing"]
