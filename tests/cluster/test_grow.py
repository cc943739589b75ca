"""A store that grows on Ray: the bytes are those of a growth in one process, whoever is killed."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.datasets.index import DatasetIndex, Split
from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights
from pipeline.store.feature_store import FeatureStore
from pipeline.store.verify import verify

SIZE = 64
SHARD = 4
FIRST, MORE = range(0, 20, 2), range(23)


class Photos:
    """Small random photos, in memory. The process that reads photo `deadly` is killed, the first time only."""

    def __init__(self, numbers, deadly=None, mark: Path | None = None) -> None:
        self.numbers, self.deadly, self.mark = list(numbers), deadly, mark
        entries = tuple((i, number % 2) for i, number in enumerate(self.numbers))
        names = tuple(f"photos/{number:02d}.jpg" for number in self.numbers)
        self.index = DatasetIndex("folder", {0: "cat", 1: "dog"}, names, {0: {"trn": Split(entries)}})

    def image(self, i: int) -> Image.Image:
        number = self.numbers[i]
        if number == self.deadly and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.fromarray(np.random.default_rng(number).integers(0, 256, (60, 50 + number, 3), np.uint8))

    def label(self, i: int) -> np.ndarray:
        label = np.zeros((60, 50 + self.numbers[i]), np.uint8)
        label[10:40, 10:30] = self.numbers[i] % 2 + 1
        return label


def run(photos, path, runner=None):
    weights = load_weights("squeezenet1_1")
    return extract(photos, weights, path, image_size=SIZE, precision="int8", runner=runner, shard_images=SHARD)


def fingerprints(path: Path) -> dict[str, str]:
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A store of the first photos, and the files of one that grew undisturbed in this process."""
    folder = tmp_path_factory.mktemp("quiet")
    run(Photos(FIRST), folder / "first.zarr")
    shutil.copytree(folder / "first.zarr", folder / "s.zarr")
    run(Photos(MORE), folder / "s.zarr")
    return folder / "first.zarr", fingerprints(folder / "s.zarr")


def test_it_grows_on_ray_also_if_a_worker_is_killed(ray_runner, stores, tmp_path):
    path = Path(shutil.copytree(stores[0], tmp_path / "s.zarr"))
    summary = run(Photos(MORE, deadly=13, mark=tmp_path / "died"), path, ray_runner)
    assert (tmp_path / "died").exists()
    assert (summary.written_shards, summary.reused_shards) == (4, 3)
    assert fingerprints(path) == stores[1]


PROGRAM = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("growing", sys.argv[1])
growing = importlib.util.module_from_spec(spec)
sys.modules["growing"] = growing
spec.loader.exec_module(growing)
growing.run(growing.Photos(growing.MORE, deadly=13, mark=Path(sys.argv[3])), sys.argv[2])
"""


def test_killed_while_it_grows_the_store_is_what_it_was_and_is_finished_later(stores, tmp_path):
    path = Path(shutil.copytree(stores[0], tmp_path / "s.zarr"))
    before = fingerprints(path)
    died = subprocess.run(
        [sys.executable, "-c", PROGRAM, __file__, str(path), str(tmp_path / "died")],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    store = FeatureStore.open(path)
    assert store.index == Photos(FIRST).index
    assert verify(store).damage == ()
    assert store.info()["images_to_come"] == len(MORE) - len(FIRST)
    metadata = {"zarr.json", *(f"{name}/zarr.json" for name in ("level0", "level1", "level2", "label"))}
    now = fingerprints(path)
    assert all(now[name] == before[name] for name in set(before) - metadata)
    run(Photos(MORE), path)
    assert fingerprints(path) == stores[1]
