"""Reading with several threads, and with few files allowed to be open: the same values."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from fakes import Photos, in_threads

import pipeline.store.shard_file as shard_file
from hsnet.errors import StoreError
from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights
from pipeline.store.feature_store import FeatureStore
from pipeline.store.shard_file import MOST_MAPPED, mapped_files

IMAGES = 24


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A store of 24 shards, so 96 files."""
    path = tmp_path_factory.mktemp("reading") / "s.zarr"
    extract(
        Photos(range(IMAGES)),
        load_weights("squeezenet1_1", "random"),
        path,
        image_size=64,
        precision="int8",
        shard_images=1,
    )
    return path


def content(store, images):
    return [*store.features(images), store.labels(images)]


def test_several_threads_read_the_same(path):
    """One store object, from its first read on; images in orders of their own."""
    expected = content(FeatureStore.open(path), range(IMAGES))
    store, wrong = FeatureStore.open(path), []
    together = threading.Barrier(4, timeout=10)

    def work(seed):
        rng = np.random.default_rng(seed)
        together.wait()
        for _ in range(20):
            images = rng.integers(0, IMAGES, 5)
            try:
                for ours, theirs in zip(content(store, images), expected, strict=True):
                    if not np.array_equal(ours, theirs[images]):
                        wrong.append(images)
                if store.classes_present(int(images[0])) is None:
                    wrong.append(images)
            except Exception as error:
                wrong.append(error)

    in_threads(work)
    assert not wrong


LIMITED = """
import json, os, resource, sys
soft, hard = map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from pipeline.store.feature_store import FeatureStore
stores = [FeatureStore.open(sys.argv[1]) for _ in range(3)]
seen = [int(part.sum()) for _ in range(2) for store in stores
        for part in [*store.features(range(24)), store.labels(range(24))]]
print(json.dumps([seen, len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]))
"""


def read_under(path, soft, hard):
    """(sums of what three open stores give, descriptors held at the end, soft limit at the end)."""
    command = [sys.executable, "-c", LIMITED, str(path), str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_few_files_may_be_open(path):
    """96 files of each of three stores where 64 may be open, and the limit cannot be raised."""
    expected = [int(part.sum()) for part in content(FeatureStore.open(path), range(IMAGES))] * 6
    seen, held, soft = read_under(path, 64, 64)
    assert seen == expected
    assert held < 64
    assert soft == 64


def test_the_limit_is_raised_as_far_as_needed(path):
    seen, held, soft = read_under(path, 64, 4096)
    assert seen == [int(part.sum()) for part in content(FeatureStore.open(path), range(IMAGES))] * 6
    assert soft == 4 * 96
    assert 3 * 96 <= held <= 4 * 96, "every file is mapped once and stays"


@pytest.mark.parametrize(
    ("limits", "files", "most", "raised"),
    [
        ((1024, 1024), 8, 8, None),
        ((1024, 1024), 2900, 256, None),
        ((1024, 1 << 20), 2900, 2900, 11600),
        ((1024, 1 << 20), 100, 100, None),
        ((1024, 4096), 2900, 1024, 4096),
        ((1024, resource.RLIM_INFINITY), 2900, 2900, 11600),
        ((1024, resource.RLIM_INFINITY), 10**6, MOST_MAPPED, 4 * MOST_MAPPED),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 2900, 2900, None),
        ((2, 2), 2900, 1, None),
    ],
)
@pytest.mark.parametrize("refused", [False, True])
def test_how_many_stay_mapped(monkeypatch, limits, files, most, raised, refused):
    asked = []

    def set_limit(which, new):
        asked.append(new)
        if refused:
            raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    found = mapped_files(files)
    assert asked == ([] if raised is None else [(raised, limits[1])])
    assert found == (most if raised is None or not refused else 256)


def test_files_are_given_up_where_no_descriptor_is_left(path, monkeypatch):
    expected, refusals = content(FeatureStore.open(path), range(IMAGES)), []
    store, real = FeatureStore.open(path), shard_file._map

    def scarce(file, chunks):
        held = len(store._readers[0]._shards)
        if held > 10:
            refusals.append(held)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(file, chunks)

    monkeypatch.setattr(shard_file, "_map", scarce)
    for ours, theirs in zip(content(store, range(IMAGES)), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert refusals


def test_too_many_open_files_are_not_taken_for_damage(path, monkeypatch):
    def none_left(file, chunks):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(shard_file, "_map", none_left)
    with pytest.raises(StoreError, match=r"cannot be read: Too many open files.*ulimit -n.*Nothing is wrong"):
        FeatureStore.open(path).labels([3])
    assert Path(path, "_done").is_dir()
