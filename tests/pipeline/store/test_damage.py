"""What is damaged, cut off or gone is found, named and can be written again."""

import os

import pytest
from fakes import fingerprints
from stores_by_hand import change_json, contents, fill, make_index, make_recipe

import pipeline.store.shard_table as table
from hsnet.errors import StoreError, StoreIncomplete
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import marker_file, shard_file, summary_file


@pytest.mark.parametrize("array", ["level0", "level2", "label"])
def test_a_flipped_byte_is_found_and_named(tmp_path, array):
    path = tmp_path / "s.zarr"
    store = fill(path)
    file = shard_file(path, array, 1)
    data = bytearray(file.read_bytes())
    data[5] ^= 1  # inside the first chunk: image 8
    file.write_bytes(data)
    store = FeatureStore.open(path)
    read = store.labels if array == "label" else store.features
    read([7, 9])
    with pytest.raises(StoreError, match=rf"array '{array}' is damaged at image 'a/8\.jpg'.*000001\.json"):
        read([8])


@pytest.mark.parametrize("array", ["level1", "label"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "gone"])
def test_a_truncated_or_missing_shard_counts_as_missing_and_can_be_rewritten(tmp_path, array, damage):
    path = tmp_path / "s.zarr"
    fill(path)
    before = fingerprints(path)
    file = shard_file(path, array, 1)
    if damage == "gone":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2 if damage == "truncated" else 0)
    sealed = FeatureStore.open(path)  # nobody looks for the files until they are read
    with pytest.raises(StoreError, match=rf"array '{array}' is damaged at image 'a/8\.jpg'"):
        sealed.labels([8]) if array == "label" else sealed.features([8])
    summary_file(path).unlink()
    with pytest.raises(StoreIncomplete) as caught:
        FeatureStore.open(path)
    assert caught.value.missing == (1,)
    store = FeatureStore.create(path, make_recipe(), make_index(), shard_images=8)
    with store.writing():
        store.write_shard(1, **contents(store, 1))
    assert fingerprints(path) == before


def test_a_shard_that_vanishes_while_open_does_not_read_as_zeros(tmp_path):
    for precision in ("int8", "float32"):
        path = tmp_path / f"{precision}.zarr"
        store = fill(path, precision)
        shard_file(path, "level0", 1).unlink()
        with pytest.raises(StoreError, match=r"level0.*not there"):
            store.features([8])


def test_a_damaged_shard_of_full_length_can_be_rewritten(tmp_path):
    """zarr reads an existing shard before it overwrites it, and would fail here."""
    path = tmp_path / "s.zarr"
    store = fill(path)
    before = fingerprints(path)
    file = shard_file(path, "level0", 0)
    file.write_bytes(bytes(file.stat().st_size))
    with store.writing():
        store.write_shard(0, **contents(store, 0))
    assert fingerprints(path) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_text(""),
        lambda file: file.write_text("[1]"),
        lambda file: file.write_text("[" * 100_000),
        lambda file: file.write_text(file.read_text()[:-20]),
        lambda file: file.write_text(file.read_text().replace("a/9.jpg", "a/8.jpg")),
        lambda file: file.write_text(file.read_text().replace('"sizes": [[', '"sizes": [["x", ')),
        lambda file: file.write_bytes((file.parent / "000000.json").read_bytes()),
        lambda file: file.write_bytes(b"\xff\xfe"),
        lambda file: change_json(file, lambda values: values.update(store="sha256:of another store")),
    ],
)
def test_a_marker_that_is_damaged_or_foreign_does_not_count(tmp_path, damage):
    path = tmp_path / "s.zarr"
    fill(path)
    summary_file(path).unlink()
    damage(marker_file(path, 1))
    store = FeatureStore.open(path, require_complete=False)
    with pytest.raises(StoreIncomplete, match=r"'a/9.jpg' is in shard 1 .* which is missing"):
        store.features([9])
    assert store.missing_shards() == (1,)
    store = FeatureStore.open(path, require_complete=False)
    store.check_markers()
    assert store.missing_shards() == (1,)
    with pytest.raises(StoreIncomplete, match="1 of 3 shards are missing"):
        FeatureStore.open(path)


def test_missing_shards_are_known_by_names_alone(tmp_path, monkeypatch):
    path = tmp_path / "s.zarr"
    fill(path, shards=range(0, 3, 2))
    reads = []
    real = table.read_marker
    monkeypatch.setattr(
        table,
        "read_marker",
        lambda root, number, *rest, **more: reads.append(number) or real(root, number, *rest, **more),
    )
    store = FeatureStore.open(path, require_complete=False)
    assert (store.missing_shards(), reads) == ((1,), [])
    store.features([17])
    store.labels([18])
    assert reads == [2]
