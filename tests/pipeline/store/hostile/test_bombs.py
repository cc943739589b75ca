"""Few bytes of a store from somebody else that unpack to many, and files that are huge and empty."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import stores_by_hand as helpers
from attacks import attack, summed
from numcodecs import zstd

from pipeline.store.markers import marker_file, shard_file, summary_file

BOMB = """
import resource, sys
from pathlib import Path
from hsnet.errors import HSNetError
from pipeline.store.feature_store import FeatureStore
from pipeline.store.verify import verify
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv[2]) << 20),) * 2)
try:
    store = FeatureStore.open(sys.argv[1], require_complete=False)
    store.codec
    store.labels([0])
except HSNetError as error:
    print("refused:", error)
"""


def in_little_memory(path: Path, megabytes: int = 400) -> str:
    root = Path(__file__).parents[4]
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(path), str(megabytes)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bomb():
    """2 GB of zeros in some kilobytes, without having them in memory here: frames of 64 MB, and one that says 2 GB."""
    packed = zstd.compress(bytes(64 << 20), 1)
    return packed * 32


def large_frame(megabytes: int) -> bytes:
    """One frame of zeros that says how long it is."""
    return zstd.compress(np.zeros(megabytes << 20, np.uint8), 1)


def test_bombs_are_not_unpacked(path, coded, bomb):
    one = large_frame(600)
    helpers.make_old(path)
    for packed in (bomb, one):
        (path / "index" / "c" / "0").write_bytes(summed(packed))
        assert attack(path)
        (coded / "codec" / "level0.layer0.basis" / "c" / "0" / "0").write_bytes(summed(packed))
        assert attack(coded)
    assert "refused" in in_little_memory(path)
    assert "refused" in in_little_memory(coded)


def test_a_label_map_that_is_a_bomb(path):
    """Its shard is in order, its marker says the right things: only the frame is too large."""
    packed = summed(large_frame(600))
    entries = np.full((8, 2), (1 << 64) - 1, "<u8")
    entries[0] = 0, len(packed)
    file = shard_file(path, "label", 0)
    file.write_bytes(packed + summed(entries.tobytes()))
    marker = json.loads(marker_file(path, 0).read_text())
    marker.pop("crc32")
    marker["files"]["label"]["bytes"] = file.stat().st_size
    marker_file(path, 0).write_text(json.dumps(marker))
    assert "'label'" in str(attack(path))
    assert "refused" in in_little_memory(path)


def test_files_that_are_huge_and_empty(path, coded):
    """A sparse file takes no room on the disk."""
    os.truncate(path / "index" / "c" / "0", 1 << 40)
    os.truncate(coded / "codec" / "level0.layer0.levels" / "c" / "0" / "0", 1 << 40)
    for one in (path, coded):
        attack(one)
        assert "refused" in in_little_memory(one)
    os.truncate(summary_file(path), 1 << 40)
    assert "can be" in str(attack(path))
    summary_file(coded).unlink()
    for file in (path / "zarr.json", marker_file(coded, 0)):
        os.truncate(file, 1 << 40)
    attack(path)
    attack(coded)
