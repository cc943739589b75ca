"""A store that grows on Ray: the bytes are those of a growth in one process, whoever is killed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fakes
import pytest
from fakes import Photos, fingerprints, first_time

from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights
from pipeline.store.feature_store import FeatureStore
from pipeline.store.verify import verify

SIZE = 64
SHARD = 4
FIRST, MORE = range(0, 20, 2), range(23)


def deadly(died: Path) -> Photos:
    """The process that reads photo 13 is killed, the first time only."""

    def kill(photo):
        if first_time(died):
            os.kill(os.getpid(), signal.SIGKILL)
        return photo

    return Photos(MORE, changes={13: kill})


def run(photos, path, runner=None):
    weights = load_weights("squeezenet1_1")
    return extract(photos, weights, path, image_size=SIZE, precision="int8", runner=runner, shard_images=SHARD)


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
    summary = run(deadly(tmp_path / "died"), path, ray_runner)
    assert (tmp_path / "died").exists()
    assert (summary.written_shards, summary.reused_shards) == (4, 3)
    assert fingerprints(path) == stores[1]


PROGRAM = """
import sys
from pathlib import Path
sys.path += sys.argv[1:3]
import test_grow
test_grow.run(test_grow.deadly(Path(sys.argv[4])), sys.argv[3])
"""


def test_killed_while_it_grows_the_store_is_what_it_was_and_is_finished_later(stores, tmp_path):
    path = Path(shutil.copytree(stores[0], tmp_path / "s.zarr"))
    before = fingerprints(path)
    folders = [str(Path(module).parent) for module in (fakes.__file__, __file__)]
    arguments = [*folders, str(path), str(tmp_path / "died")]
    died = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=Path(__file__).parents[2], check=False)
    assert died.returncode == -signal.SIGKILL
    store = FeatureStore.open(path)
    assert store.index == Photos(FIRST).index
    assert verify(store).damage == ()
    assert store.info()["images_to_come"] == len(MORE) - len(FIRST)
    metadata = {"zarr.json", *(f"{name}/zarr.json" for name in ("level0", "level1", "level2", "label"))}
    now = fingerprints(path)
    assert "_done/summary" not in now, "what is written to is not sealed"
    assert all(now[name] == before[name] for name in set(before) - metadata - {"_done/summary"})
    run(Photos(MORE), path)
    assert fingerprints(path) == stores[1]
