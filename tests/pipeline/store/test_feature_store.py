"""The store's promises: what is read is what was written, and nothing foreign is read."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from fakes import fingerprints
from stores_by_hand import SHA, SIZE, contents, fill, make_index, make_old, make_recipe

import pipeline.store.skeleton as skeleton
from hsnet.errors import ConfigError, StoreError, StoreIncomplete, StoreMismatch
from pipeline.common.columns import unpack
from pipeline.datasets.index import DatasetIndex
from pipeline.features.recipe import Recipe
from pipeline.store.arrays import image_nbytes, images_per_shard
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import marker_file, shard_file

# -- reading back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_reads_back_what_was_written(tmp_path, precision):
    fill(tmp_path / "s.zarr", precision)
    store = FeatureStore.open(tmp_path / "s.zarr", make_recipe(precision), index_digest=make_index().digest)
    assert store.complete
    assert store.index == make_index()
    wanted = [20, 3, 20, 9]
    features, labels = store.features(wanted), store.labels(wanted)
    for row, image in enumerate(wanted):
        number, offset = divmod(image, 8)
        written = contents(store, number)
        for level, array in enumerate(features):
            assert array.dtype == store.recipe.dtype
            np.testing.assert_array_equal(array[row], written["levels"][level][offset])
        np.testing.assert_array_equal(labels[row], written["labels"][offset])
        assert store.size(image) == written["sizes"][offset]
        assert store.classes_present(image) == written["classes"][offset]


def test_reads_into_given_buffers(tmp_path):
    store = fill(tmp_path / "s.zarr")
    buffers = store.features([0, 1])
    first = [buffer.copy() for buffer in buffers]
    again = store.features([5, 0], out=buffers)
    assert all(a is b for a, b in zip(again, buffers, strict=True))
    for now, before in zip(again, first, strict=True):
        np.testing.assert_array_equal(now[1], before[0])
    for wrong in (buffers, [np.zeros((6, *buffer.shape[1:]), buffer.dtype)[::2] for buffer in buffers]):
        with pytest.raises(ValueError, match="another shape, type or order"):
            store.features([0, 1, 2], out=wrong)


def test_plain_zarr_reads_it(tmp_path):
    store = fill(tmp_path / "s.zarr")
    group = zarr.open_group(str(tmp_path / "s.zarr"), mode="r")
    np.testing.assert_array_equal(group["level1"][9], store.features([9])[1][0])
    np.testing.assert_array_equal(group["label"][9], store.labels([9])[0])
    facts, columns = unpack(group["index"][:])
    assert facts["classes"] == {"0": "cat", "1": "dog"}
    assert columns["images"].tobytes()[columns["images.ends"][8] : columns["images.ends"][9]] == b"a/9.jpg"
    assert group.attrs["hsnet_store"]["recipe"]["backbone"] == "squeezenet1_1"
    assert group["level0"].dtype == np.int8
    assert group["level0"].metadata.dimension_names == ("image", "layer", "row", "column", "channel")


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_bytes_are_those_that_zarr_would_write(tmp_path, precision):
    ours = fill(tmp_path / "ours.zarr", precision)
    fill(tmp_path / "zarr.zarr", precision, range(0))
    group = zarr.open_group(str(tmp_path / "zarr.zarr"), mode="r+")
    for number in range(ours.shards):
        written = contents(ours, number)
        for name, values in zip(("level0", "level1", "level2"), written["levels"], strict=True):
            group[name][8 * number : 8 * number + len(values)] = values
        group["label"][8 * number : 8 * number + len(values)] = written["labels"]
    markers = {"_done/summary", *(f"_done/{number:06d}.json" for number in range(ours.shards))}
    there = fingerprints(tmp_path / "ours.zarr")
    assert {name: there[name] for name in there.keys() - markers} == fingerprints(tmp_path / "zarr.zarr")


def test_readers_do_not_load_zarr(tmp_path):
    fill(tmp_path / "s.zarr")
    code = "import sys; from pipeline.store.feature_store import FeatureStore\n"
    code += "FeatureStore.open(sys.argv[1]).features([3]); assert 'zarr' not in sys.modules"
    root = Path(skeleton.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s.zarr")], cwd=root, check=True)


def test_a_big_endian_machine_is_told_so(tmp_path, monkeypatch):
    fill(tmp_path / "s.zarr")
    monkeypatch.setattr(sys, "byteorder", "big")
    for attempt in (
        lambda: FeatureStore.open(tmp_path / "s.zarr"),
        lambda: FeatureStore.create(tmp_path / "new.zarr", make_recipe(), make_index()),
    ):
        with pytest.raises(StoreError, match="this one is big-endian"):
            attempt()
    assert not (tmp_path / "new.zarr").exists()


def test_survives_pickling(tmp_path):
    store = fill(tmp_path / "s.zarr")
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.features([4])[0], store.features([4])[0])


def test_info_tells_sizes(tmp_path):
    info = fill(tmp_path / "s.zarr", shards=range(2)).info()
    assert json.loads(json.dumps(info)) == info
    assert (info["images"], info["images_done"], info["shards"], info["shards_missing"]) == (21, 16, 3, 1)
    files = [
        shard_file(tmp_path / "s.zarr", name, k) for name in ("level0", "level1", "level2", "label") for k in (0, 1)
    ]
    assert info["bytes"] == sum(file.stat().st_size for file in files)


def test_the_last_short_shard_and_a_single_image(tmp_path):
    store = fill(tmp_path / "s.zarr", images=1)
    assert store.shards == 1
    assert store.features([0])[0].shape == (1, 2, 15, 15, 128)


# -- another recipe, half a store ------------------------------------------------------------------------------


def test_another_recipe_is_refused_with_both_values(tmp_path):
    path = tmp_path / "s.zarr"
    fill(path, "int8")
    before = fingerprints(path)
    other = Recipe.of("squeezenet1_1", "sha256:" + "1" * 64, SIZE, "float32")
    for attempt in (
        lambda: FeatureStore.open(path, other),
        lambda: FeatureStore.create(path, other, make_index()),
    ):
        with pytest.raises(StoreMismatch) as caught:
            attempt()
        assert caught.value.differences["precision"] == ("int8", "float32")
        assert set(caught.value.differences) == {"precision", "weights"}
        for text in ("'int8'", "'float32'", "sha256:000", "sha256:111", "Nothing was changed"):
            assert text in str(caught.value)
    assert fingerprints(path) == before


def test_another_data_set_is_refused(tmp_path):
    fill(tmp_path / "s.zarr")
    with pytest.raises(StoreMismatch) as caught:
        FeatureStore.create(tmp_path / "s.zarr", make_recipe(), make_index(22))
    assert caught.value.differences["data set"] == (make_index().digest, make_index(22).digest)


def test_half_a_store_is_not_complete(tmp_path):
    path = tmp_path / "s.zarr"
    fill(path, shards=range(1))
    with pytest.raises(StoreIncomplete, match=r"2 of 3 shards are missing .*'a/8\.jpg'.*hsnet extract") as caught:
        FeatureStore.open(path)
    assert caught.value.missing == (1, 2)
    store = FeatureStore.open(path, require_complete=False)
    assert store.missing_shards() == (1, 2)
    assert store.features([7])[0].any()
    for read in (store.features, store.labels):
        with pytest.raises(StoreIncomplete, match=r"'a/8\.jpg' is in shard 1"):
            read([7, 8])
    with pytest.raises(StoreIncomplete):
        store.size(8)


def test_writing_what_is_missing_completes_it_with_the_same_bytes(tmp_path):
    fill(tmp_path / "once.zarr")
    fill(tmp_path / "twice.zarr", shards=range(1, 2))
    store = FeatureStore.create(tmp_path / "twice.zarr", make_recipe(), make_index(), shard_images=99)
    assert store.shard_images == 8  # an existing store keeps its own
    assert store.missing_shards() == (0, 2)
    with store.writing():
        for number in store.missing_shards():
            store.write_shard(number, **contents(store, number))
    assert fingerprints(tmp_path / "twice.zarr") == fingerprints(tmp_path / "once.zarr")


def test_an_image_number_beyond_the_index(tmp_path):
    store = fill(tmp_path / "s.zarr")
    for image in (-1, 21):
        with pytest.raises(StoreError, match=f"images 0 to 20, asked for {image}"):
            store.features([image])


# -- skipped images --------------------------------------------------------------------------------------------


def test_skipped_images_are_remembered_and_never_read(tmp_path):
    path = tmp_path / "s.zarr"
    store = FeatureStore.create(path, make_recipe(), make_index(), shard_images=8)
    with store.writing():
        for number in range(3):
            skipped = {10: "truncated file"} if number == 1 else {}
            store.write_shard(number, **contents(store, number), skipped=skipped)
    store = FeatureStore.open(path)
    assert store.skipped == {10: "truncated file"}
    assert store.info()["skipped"] == {"a/10.jpg": "truncated file"}
    store.features([9, 11])
    with pytest.raises(StoreError, match=r"'a/10\.jpg' has no features .*truncated file"):
        store.features([9, 10])


def test_an_old_store_opens_reads_and_keeps_its_bytes(tmp_path):
    path = tmp_path / "s.zarr"
    fill(path)
    new = FeatureStore.open(path)
    make_old(path)
    before = fingerprints(path)
    old = FeatureStore.open(path, make_recipe(), index_digest=make_index().digest)
    assert not old.sealed
    assert old.index == new.index == make_index()
    assert [level.tobytes() for level in old.features([20, 3])] == [level.tobytes() for level in new.features([20, 3])]
    assert old.info() == {**new.info(), "sealed": False, "format": 1}
    assert fingerprints(path) == before
    marker_file(path, 1).unlink()
    with pytest.raises(StoreIncomplete, match="1 of 3"):
        FeatureStore.open(path)


@pytest.mark.parametrize(
    ("images", "size", "shard_bytes", "wanted"),
    [
        (21, 64, None, 16),  # few photos: as many shards as can be
        (10_000, 64, None, 144),  # a 64th of them, in sixteens
        (300_000, 64, None, 592),  # 64 MB
        (300_000, 32, None, 3136),
        (21, 64, 10**9, 4096),
        (21, 64, 1_000_000, 9),
    ],
)
def test_how_many_images_make_a_shard(images, size, shard_bytes, wanted):
    recipe = Recipe.of("squeezenet1_1", SHA, size, "int8")
    names = tuple(map(str, range(images)))
    index = DatasetIndex("folder", {0: "cat"}, names, {})
    assert images_per_shard(recipe, index, shard_bytes) == wanted
    if images == 300_000:
        assert 64e6 - 16 * image_nbytes(recipe, index) < wanted * image_nbytes(recipe, index) <= 64e6
    if shard_bytes is not None:
        assert wanted * image_nbytes(recipe, index) <= shard_bytes
        with pytest.raises(ConfigError, match="holds no image: each takes"):
            images_per_shard(recipe, index, 100)
