"""Whatever byte of a shard is flipped, it is found and named, and is never read."""

import re

import numpy as np
import pytest
import stores_by_hand as helpers

from hsnet.errors import StoreError
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import marker_file, shard_file
from pipeline.store.verify import verify

ARRAYS = ("level0", "level1", "level2", "label")


@pytest.fixture(scope="module", params=["int8", "float32"])
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "s.zarr"
    helpers.fill(path, request.param)
    return path


def opened(path):
    return FeatureStore.open(path, require_complete=False)


def test_a_whole_store_has_no_damage(path):
    found = verify(opened(path))
    assert (found.damage, found.missing, found.images) == ((), (), 21)
    assert found.bytes == opened(path).nbytes


def everything(store, shard):
    images = list(store.images_in(shard))
    facts = [(store.size(image), store.classes_present(image)) for image in images]
    return [*store.features(images), store.labels(images)], facts, store.skipped


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_anywhere_in_a_shard_is_found_and_never_read(path, seed):
    rng = np.random.default_rng(seed)
    name, shard = [*ARRAYS, ""][seed % 5], int(rng.integers(3))
    file = shard_file(path, name, shard) if name else marker_file(path, shard)
    whole = file.read_bytes()
    # Every third in the last bytes: the shard's index and the checksums.
    place = len(whole) - 1 - int(rng.integers(132)) if seed % 3 == 0 else int(rng.integers(len(whole)))
    damaged = bytearray(whole)
    damaged[place] ^= 1 << int(rng.integers(8))
    right = everything(opened(path), shard)
    try:
        file.write_bytes(damaged)
        found = verify(opened(path))
        if name == "":  # the store is sealed: nobody but `verify` reads markers
            read = everything(opened(path), shard)
            assert all(np.array_equal(a, b) for a, b in zip(read[0], right[0], strict=True))
            assert read[1:] == right[1:]
        else:
            message = None
            try:
                read = everything(opened(path), shard)
            except StoreError as error:
                message = str(error)
            if message is None:  # it was in the entry of an image that the last, short shard does not have
                assert all(np.array_equal(a, b) for a, b in zip(read[0], right[0], strict=True))
            else:
                assert re.search(rf"array '{name}' is damaged at image 'a/\d+\.jpg'", message)
    finally:
        file.write_bytes(whole)
    assert found.damaged_shards == (shard,)
    assert {one.array for one in found.damage} == {name}
    assert {one.file for one in found.damage} == {str(file)}
    assert verify(opened(path)).damage == ()


def test_a_shard_without_a_marker_is_missing_not_damaged(path):
    marker = marker_file(path, 1)
    text = marker.read_bytes()
    marker.unlink()
    try:
        found = verify(opened(path))
    finally:
        marker.write_bytes(text)
    assert (found.damage, found.missing) == ((), (1,))


def test_markers_of_the_first_version_count(tmp_path):
    helpers.fill(tmp_path / "s.zarr")
    for number in range(3):
        helpers.change_json(marker_file(tmp_path / "s.zarr", number), lambda values: values.pop("crc32"))
    assert verify(opened(tmp_path / "s.zarr")).images == 21
