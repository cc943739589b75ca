"""Writing: what is refused before anything is touched, disks that refuse, two writers."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from fakes import fingerprints, plain_user
from stores_by_hand import SIZE, contents, fill, make_index, make_recipe

import pipeline.store.skeleton as skeleton
from hsnet.errors import ConfigError, DataError, StoreError
from pipeline.datasets.index import DatasetIndex
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import shard_file


def test_wrong_shapes_and_types_are_refused_before_anything_is_touched(tmp_path):
    store = fill(tmp_path / "s.zarr")
    before = fingerprints(store.root)
    good = contents(store, 0)
    for bad in (
        {**good, "levels": good["levels"][:2]},
        {**good, "levels": [level.astype(np.float32) for level in good["levels"]]},
        {**good, "levels": [level[:7] for level in good["levels"]]},
        {**good, "labels": good["labels"].astype(np.uint16)},
        {**good, "sizes": good["sizes"][:3]},
    ):
        with pytest.raises(StoreError, match="Nothing was written"):
            store.write_shard(0, **bad)
    assert fingerprints(store.root) == before


def test_a_full_disk_leaves_the_shard_missing_and_the_rest_whole(tmp_path, monkeypatch):
    path = tmp_path / "s.zarr"
    store = fill(path, shards=range(1))
    before = fingerprints(path)
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    needed = sum(level.nbytes for level in contents(store, 1)["levels"]) + 8 * SIZE * SIZE
    with pytest.raises(StoreError, match=rf"No space left.* takes {needed:,} bytes, [\d,]+ are free.* again") as caught:
        fill(path, shards=range(1, 2))
    assert isinstance(caught.value.__cause__, OSError)
    assert fingerprints(path) == before
    monkeypatch.undo()
    fill(path, shards=range(1, 3))
    fill(tmp_path / "undisturbed.zarr")
    assert fingerprints(path) == fingerprints(tmp_path / "undisturbed.zarr")


def test_leftovers_of_killed_writers_are_swept(tmp_path):
    path = tmp_path / "s.zarr"
    store = fill(path, shards=range(0, 3, 2))
    before = fingerprints(path)
    shard_file(path, "level0", 1).parent.mkdir(parents=True)
    for leftover in (shard_file(path, "level0", 1).parent / "0.abc.partial", path / "_done" / "000001.77.partial"):
        leftover.write_text("half")
    with store.writing():
        pass
    assert fingerprints(path) == before


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="Cannot make the store"):
        FeatureStore.create(tmp_path / "file" / "s.zarr", make_recipe(), make_index())


@pytest.fixture
def read_only_store():
    with tempfile.TemporaryDirectory() as folder:  # tmp_path's parents are closed to other users
        os.chmod(folder, 0o755)
        path = Path(folder) / "s.zarr"
        fill(path, shards=range(1))
        for part in (path, path / "_done", *(path / name / "c" for name in ("level0", "level1", "level2", "label"))):
            os.chmod(part, 0o555)
        with plain_user():
            yield path
        for part in (path, *path.rglob("*")):
            os.chmod(part, 0o755)


def test_a_read_only_folder(read_only_store):
    before = fingerprints(read_only_store)
    store = FeatureStore.create(read_only_store, make_recipe(), make_index(), shard_images=8)
    with pytest.raises(StoreError, match=r"cannot be locked.*Permission denied.*Nothing was changed"), store.writing():
        pass
    with pytest.raises(StoreError, match=r"could not be written: .*Permission denied"):
        store.write_shard(1, **contents(store, 1))
    assert FeatureStore.open(read_only_store, require_complete=False).features([0])[0].any()
    assert fingerprints(read_only_store) == before


def test_arguments_that_cannot_work(tmp_path):
    with pytest.raises(ConfigError, match="Images per shard"):
        FeatureStore.create(tmp_path / "s.zarr", make_recipe(), make_index(), shard_images=0)
    empty = DatasetIndex("folder", {0: "cat"}, (), {0: {}})
    with pytest.raises(DataError, match="no images"):
        FeatureStore.create(tmp_path / "s.zarr", make_recipe(), empty)
    assert list(tmp_path.iterdir()) == []


# -- two writers -----------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from pipeline.store.local_place import Place
with Place(Path(sys.argv[1])).sole_writer():
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen:
    root = Path(skeleton.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_until_the_first_is_gone_even_by_kill(tmp_path):
    store = fill(tmp_path / "s.zarr")
    before = fingerprints(store.root)
    process = hold(store.root)
    try:
        with pytest.raises(StoreError, match=rf"process {process.pid} on .*Nothing was changed"), store.writing():
            pass
    finally:
        process.kill()
        process.communicate()
    assert (store.root / "_owner.json").exists()  # the dead holder's file bars nobody
    with store.writing():
        pass
    assert fingerprints(store.root) == before


def test_two_processes_that_create_the_same_store_get_one(tmp_path):
    """Both see no store, both build one; the loser of the rename opens the winner's."""
    path, real = tmp_path / "s.zarr", skeleton.build_skeleton

    def slow(*arguments):
        skeleton.build_skeleton = real
        fill(path)
        real(*arguments)

    skeleton.build_skeleton = slow
    try:
        store = FeatureStore.create(path, make_recipe(), make_index(), shard_images=8)
    finally:
        skeleton.build_skeleton = real
    assert store.complete
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]
