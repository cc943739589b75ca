"""What is killed in the middle of a command on two nodes; `python -m benchmarks.faults` does it at random moments.

The promise: the command goes on by itself, or ends with a clear error and the same command goes on; equal results.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import fingerprints, machine

from benchmarks.faults import Stage, finish, start
from benchmarks.two_nodes import Nodes, until

pytestmark = pytest.mark.ray

SHAPES = ("shapes", "--data-option", "size=64", "--data-option", "trn_per_class=6", "--data-option", "val_per_class=4")
BACKBONE = ("--backbone", "squeezenet1_1", "--image-size", 64, "--shard-images", 2)


@pytest.fixture(scope="module")
def mortal() -> Iterator[Nodes]:
    """Two nodes, of which the second is killed and another one added."""
    with Nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "s.zarr"
    machine("extract", *SHAPES, *BACKBONE, "--store", path, "-q")
    return path


def test_extraction_goes_on_when_a_worker_and_then_its_node_are_killed(mortal, store, tmp_path) -> None:
    path = tmp_path / "s.zarr"
    process, said, printed = start(mortal, ["extract", *map(str, (*SHAPES, *BACKBONE, "--store", path))])
    until(lambda: list(path.glob("_done/*.json")) or process.poll() is not None, 120, "the first shard")
    working = [pid for pid, name in mortal.workers(1).items() if "_run" in name]
    for pid in working[:1]:
        os.kill(pid, signal.SIGKILL)
    mortal.kill(1)
    ran = finish(process, said, printed, 0, 0)
    assert ran.code == 0, ran.said
    assert "Traceback" not in ran.said
    assert fingerprints(path) == fingerprints(store)
    mortal.add(2)


def test_training_goes_on_with_the_ranks_that_fit_when_a_node_is_killed(mortal, store, tmp_path) -> None:
    """The result is that of an undisturbed run, and what a killed command had left beside it is gone afterwards."""
    run = tmp_path / "run"
    (tmp_path / ".run.ray-0123abcd" / "train").mkdir(parents=True)
    words = ["train", "--store", str(store), "--steps", "12", "--batch-size", "2"]
    words += ["--validate-every", "2", "--validate-episodes", "2", "--run-dir"]
    process, said, printed = start(mortal, [*words, str(run), "--workers", "1:2"])
    saved = run / "resume.safetensors"
    until(lambda: saved.exists() or process.poll() is not None, 240, "the first save")
    (run / ".best.safetensors.partial").write_bytes(b"cut off")
    mortal.kill(len(mortal.ids) - 1)
    ran = finish(process, said, printed, 0, 0)
    assert ran.code == 0, ran.said
    assert "Traceback" not in ran.said
    assert "The group: 2 workers on 2 nodes" in ran.said
    assert "The cluster lost" in ran.said
    assert "The group: 1 worker on 1 node" in ran.said
    train, quiet = Stage("train", tmp_path), tmp_path / "quiet"
    assert list(train.result(tmp_path, "")) == list(range(1, 13)), "every step once"
    assert not train.left(tmp_path)
    machine(*words, quiet / "run", "-q")
    assert train.same(train.result(tmp_path, ""), train.result(quiet, ""))
