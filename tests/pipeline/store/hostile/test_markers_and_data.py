"""Markers, shards and folders of a store from somebody else."""

from pathlib import Path

import numpy as np
import pytest
import stores_by_hand as helpers
from attacks import attack, summed
from fakes import fingerprints

from hsnet.errors import StoreError
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import marker_file, shard_file, summary_file
from pipeline.store.verify import verify


def missing(path: Path) -> tuple[int, ...]:
    store = FeatureStore.open(path, require_complete=False)
    store.check_markers()
    return store.missing_shards()


@pytest.mark.parametrize(
    "alter",
    [
        lambda m: m.update(sizes=[[10**9, 10**9]] * 8),
        lambda m: m.update(sizes=[[-1, -1]] * 8),
        lambda m: m.update(sizes=[[float("inf"), 1]] * 8),
        lambda m: m.update(sizes=[[float("nan"), 1]] * 8),
        lambda m: m.update(sizes=[10**4000] * 8),
        lambda m: m.update(classes=[[float("inf")]] * 8),
        lambda m: m.update(images=[["a/8.jpg"]] * 8),
        lambda m: m.update(skipped={"/etc/passwd": "x"}),
        lambda m: m.update(skipped=[1]),
        lambda m: m.update(files={"../../level0": {"bytes": 1, "crc32": "0"}}),
        lambda m: m.update(files={name: {"bytes": 1e999, "crc32": "0"} for name in m["files"]}),
        lambda m: m.update(shard="1" * 5000),
    ],
)
def test_markers_that_cannot_be_meant_do_not_count(path, alter):
    def changed(marker):
        marker.pop("crc32")
        alter(marker)

    summary_file(path).unlink()
    helpers.change_json(marker_file(path, 1), changed)
    assert missing(path) == (1,)
    attack(path)


@pytest.mark.parametrize("target", ["/dev/zero", "outside.json"])
def test_a_marker_that_is_a_link_does_not_count(path, tmp_path, target):
    summary_file(path).unlink()
    marker_file(path, 0).rename(tmp_path / "outside.json")
    marker_file(path, 0).symlink_to(tmp_path / target)
    assert 0 in missing(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_numbers_are_not_read(tmp_path, value):
    path = tmp_path / "s.zarr"
    store = helpers.fill(path, "float32", range(0))
    with store.writing():
        for number in range(store.shards):
            contents = helpers.contents(store, number)
            contents["levels"][1][2, 0, 3, 3, 100] = value  # no writer of this program would
            store.write_shard(number, **contents)
    assert "NaN or infinity" in str(attack(path))
    assert len(verify(FeatureStore.open(path)).damage) == 3


@pytest.mark.parametrize("entry", [(0, 1 << 62), (1 << 62, 100), ((1 << 64) - 2, 1 << 63), (0, 0), (0, 3)])
def test_an_index_of_a_shard_that_points_anywhere(path, entry):
    file = shard_file(path, "level1", 1)
    data = file.read_bytes()
    entries = np.frombuffer(data[-132:-4], "<u8").reshape(8, 2).copy()
    entries[0] = entry
    file.write_bytes(data[:-132] + summed(entries.tobytes()))
    assert "array 'level1' is damaged at image 'a/8.jpg'" in str(attack(path))


@pytest.mark.parametrize("place", ["level1/c/1/0/0/0/0", "level1/c/1", "level1/c", "level1", "label", "_done", "index"])
def test_folders_and_files_that_lead_out_of_the_store(path, tmp_path, place):
    """Nothing is read through a link but metadata that is checked, and nothing is written or deleted."""
    outside = tmp_path / "outside"
    (path / place).rename(outside)
    (path / place).symlink_to(outside)
    if outside.is_dir():
        (outside / "precious.partial").write_text("precious")
    before = fingerprints(outside) if outside.is_dir() else outside.read_bytes()
    if place != "_done":
        attack(path)
    if place not in ("index", "level1/c/1/0/0/0/0"):
        store = FeatureStore.open(path, require_complete=False)
        with pytest.raises(StoreError, match="is a link: nothing is written or deleted"), store.writing():
            pass
    assert before == (fingerprints(outside) if outside.is_dir() else outside.read_bytes())


def test_a_lock_that_is_a_link_is_not_written_through(path, tmp_path):
    (tmp_path / "precious").write_text("precious")
    (path / "_owner.json").symlink_to(tmp_path / "precious")
    with pytest.raises(StoreError, match="cannot be locked"), FeatureStore.open(path).writing():
        pass
    assert (tmp_path / "precious").read_text() == "precious"
