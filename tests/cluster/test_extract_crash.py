"""Extraction on Ray, and everything that can die while it works. Afterwards the bytes are those of a quiet run."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.runner import RayRunner
from hsnet.errors import DataError, StoreError
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.extract import extract
from pipeline.store import FeatureStore
from pipeline.weights import load_weights

SIZE = 64
SHARD = 4
COUNT = 18  # five shards, the last one short


class Photos:
    """Small random photos, in memory."""

    def __init__(self) -> None:
        entries = tuple((i, i % 2) for i in range(COUNT))
        names = tuple(f"photos/{i}.jpg" for i in range(COUNT))
        self.index = DatasetIndex("folder", {0: "cat", 1: "dog"}, names, {0: {"trn": Split(entries)}})

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 50 + i, 3), np.uint8))

    def label(self, i: int) -> np.ndarray:
        label = np.zeros((60, 50 + i), np.uint8)
        label[10:40, 10:30] = i % 2 + 1
        return label


class Deadly(Photos):
    """Kills the process that reads photo 9, the first time only."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = marker

    def image(self, i: int) -> Image.Image:
        if i == 9:
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().image(i)


class Broken(Photos):
    """Photo 9 cannot be read."""

    def image(self, i: int) -> Image.Image:
        if i == 9:
            raise DataError("/data/photos/9.jpg is truncated.")
        return super().image(i)


def run(photos, path, runner=None, **options):
    weights = load_weights("squeezenet1_1")
    return extract(photos, weights, "squeezenet1_1", SIZE, "int8", path, runner, shard_images=SHARD, **options)


def fingerprints(path: Path) -> dict[str, str]:
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> dict[str, str]:
    """Files of an undisturbed run in this process."""
    path = tmp_path_factory.mktemp("quiet") / "s.zarr"
    run(Photos(), path)
    return fingerprints(path)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_bytes_for_any_number_of_workers(ray_runner, quiet, tmp_path, workers):
    events = []
    summary = run(Photos(), tmp_path / "s.zarr", RayRunner(workers), on_event=events.append)
    assert fingerprints(tmp_path / "s.zarr") == quiet
    assert (summary.written_shards, summary.images) == (5, COUNT)
    assert sorted(event.shard for event in events[1:]) == [0, 1, 2, 3, 4]


def test_a_relative_path_means_the_same_to_every_worker(ray_runner, quiet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(Photos(), "s.zarr", ray_runner)
    assert fingerprints(tmp_path / "s.zarr") == quiet


def test_a_worker_that_is_killed_costs_nothing_but_time(ray_runner, quiet, tmp_path):
    run(Deadly(tmp_path / "died"), tmp_path / "s.zarr", ray_runner)
    assert (tmp_path / "died").exists()
    assert fingerprints(tmp_path / "s.zarr") == quiet


def test_an_unreadable_photo_is_named_and_mended_later(ray_runner, quiet, tmp_path):
    with pytest.raises(DataError, match=r"'photos/9\.jpg'.*/data/photos/9\.jpg is truncated") as caught:
        run(Broken(), tmp_path / "s.zarr", ray_runner)
    assert type(caught.value) is DataError
    run(Photos(), tmp_path / "s.zarr", ray_runner)
    assert fingerprints(tmp_path / "s.zarr") == quiet


def test_an_unreadable_photo_is_left_out_alike_here_and_there(ray_runner, tmp_path):
    here = run(Broken(), tmp_path / "here.zarr", on_error="skip")
    there = run(Broken(), tmp_path / "there.zarr", ray_runner, on_error="skip")
    assert here.skipped == there.skipped == ("photos/9.jpg",)
    assert fingerprints(tmp_path / "here.zarr") == fingerprints(tmp_path / "there.zarr")


# -- the whole program dies ------------------------------------------------------------------------------------

PROGRAM = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("crash", sys.argv[1])
crash = importlib.util.module_from_spec(spec)
sys.modules["crash"] = crash
spec.loader.exec_module(crash)
import pipeline.store as store_module

moment, path = sys.argv[2], sys.argv[3]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
write, marker, calls = store_module._write_array, store_module.write_marker, []

def dying_write(root, layout, *arguments):
    calls.append(layout.name)
    if moment == "between arrays" and len(calls) == 6:
        die()
    if moment == "in an array" and len(calls) == 6:
        real = os.replace
        os.replace = lambda *a: die()       # the shard is written beside its place, but not yet renamed
    return write(root, layout, *arguments)

def dying_marker(root, facts):
    if moment == "before the marker" and facts.number == 1:
        die()
    if moment == "in the marker" and facts.number == 1:
        os.replace = lambda *a: die()
    marker(root, facts)
    if moment == "after the marker" and facts.number == 1:
        die()

store_module._write_array, store_module.write_marker = dying_write, dying_marker
crash.run(crash.Photos(), path)
"""


@pytest.mark.parametrize(
    "moment", ["in an array", "between arrays", "before the marker", "in the marker", "after the marker"]
)
def test_a_program_killed_at_any_moment_of_a_shard_is_finished_by_running_again(quiet, tmp_path, moment):
    path = tmp_path / "s.zarr"
    arguments = [sys.executable, "-c", PROGRAM, __file__, moment, str(path)]
    died = subprocess.run(arguments, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    leftovers = list(path.rglob("*.partial"))
    assert bool(leftovers) == (moment in ("in an array", "in the marker"))
    done = 2 if moment == "after the marker" else 1
    assert FeatureStore.open(path, require_complete=False).missing_shards() == tuple(range(done, 5))
    summary = run(Photos(), path)
    assert (summary.reused_shards, summary.written_shards) == (done, 5 - done)
    assert fingerprints(path) == quiet


DRIVER = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("crash", sys.argv[1])
crash = importlib.util.module_from_spec(spec)
sys.modules["crash"] = crash
spec.loader.exec_module(crash)
from ray import cloudpickle
from cluster.session import session
cloudpickle.register_pickle_by_value(crash)

class Slow(crash.Photos):
    def image(self, i):
        time.sleep(0.2)
        return super().image(i)

with session("local", num_cpus=2, num_gpus=0, object_store_bytes=100 << 20):
    crash.run(Slow(), sys.argv[2], crash.RayRunner(2))
"""


def test_a_killed_driver_on_ray_is_finished_by_running_again(quiet, tmp_path):
    path = tmp_path / "s.zarr"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, __file__, str(path)], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 60
        while not list(path.glob("_done/*.json")):
            assert driver.poll() is None, "the driver ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(StoreError, match=rf"process {driver.pid} on .*Nothing was changed"):
            run(Photos(), path)  # a second one while the first works
    finally:
        driver.kill()
        driver.wait()
    left = FeatureStore.open(path, require_complete=False).missing_shards()
    assert left
    summary = run(Photos(), path)
    assert summary.written_shards <= len(left)
    assert fingerprints(path) == quiet
