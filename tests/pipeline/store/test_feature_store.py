"""The store's promises: what is read is what was written, and nothing half-written, foreign or damaged is read."""

import errno
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from fakes import fingerprints, plain_user

import pipeline.store.shard_table as table
import pipeline.store.skeleton as skeleton
from hsnet.errors import ConfigError, DataError, StoreError, StoreIncomplete, StoreMismatch
from pipeline.common.columns import unpack
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.features.precision import encode
from pipeline.features.recipe import Recipe
from pipeline.store.arrays import image_nbytes, images_per_shard
from pipeline.store.attributes import read_facts
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import marker_file, shard_file, summary_file

SHA = "sha256:" + "0" * 64
SIZE = 64


def make_index(images: int = 21, name: str = "folder") -> DatasetIndex:
    entries = tuple((i, i % 2) for i in range(images))
    return DatasetIndex(
        name, {0: "cat", 1: "dog"}, tuple(f"a/{i}.jpg" for i in range(images)), {0: {"trn": Split(entries)}}
    )


def make_recipe(precision: str = "int8") -> Recipe:
    return Recipe.of("squeezenet1_1", SHA, SIZE, precision)


def contents(store: FeatureStore, number: int) -> dict:
    """Made-up contents of a shard, the same for every call."""
    rng = np.random.default_rng(number)
    n = len(store.images_in(number))
    features = [rng.normal(size=(n, *shape)).astype(np.float32) for shape in store.recipe.level_shapes()]
    return {
        "levels": encode(features, store.recipe.precision),
        "labels": rng.integers(0, 3, (n, SIZE, SIZE)).astype(np.uint8),
        "sizes": [(100 + i, 200) for i in range(n)],
        "classes": [(i % 2,) for i in range(n)],
    }


def fill(path: Path, precision: str = "int8", shards: range | None = None, images: int = 21) -> FeatureStore:
    store = FeatureStore.create(path, make_recipe(precision), make_index(images), shard_images=8)
    with store.writing():
        for number in shards if shards is not None else range(store.shards):
            store.write_shard(number, **contents(store, number))
    return store


def make_old(path: Path) -> None:
    """Make a store one as the first versions of this program wrote it: format 1 or 2, the index in JSON, no summary."""
    summary_file(path).unlink(missing_ok=True)
    indices = {
        name: FeatureStore.open(path, require_complete=False, index_digest=state.digest).index
        for state in read_facts(path).states
        for name in (state.index_array,)
    }
    values = json.loads((path / "zarr.json").read_text())
    attributes = values["attributes"]["hsnet_store"]
    for state in (attributes["dataset"], *attributes.get("growth", ())):
        state.pop("encoding", None)
    attributes["format"] = 2 if "growth" in attributes else 1
    for name, index in indices.items():
        skeleton.write_vector(path, name, np.frombuffer(index.to_json().encode(), np.uint8), "JSON")
    (path / "zarr.json").write_text(json.dumps(values))


def change_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


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


# -- damage ----------------------------------------------------------------------------------------------------


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


# -- not a store -----------------------------------------------------------------------------------------------


def test_what_is_not_a_store(tmp_path):
    with pytest.raises(StoreError, match="There is no feature store"):
        FeatureStore.open(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("x")
    for name in ("folder", "file"):
        for attempt in (
            lambda path: FeatureStore.open(path),
            lambda path: FeatureStore.create(path, make_recipe(), make_index()),
        ):
            with pytest.raises(StoreError, match=r"is not a feature store.*Nothing was changed"):
                attempt(tmp_path / name)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["thesis.tex"]
    zarr.open_group(str(tmp_path / "group"), mode="w", zarr_format=3)
    with pytest.raises(StoreError, match="hsnet_store"):
        FeatureStore.open(tmp_path / "group")


def test_an_empty_folder_becomes_a_store(tmp_path):
    (tmp_path / "s.zarr").mkdir()
    assert fill(tmp_path / "s.zarr").complete
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]  # no temporary folder left beside it


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: a.update(format=4), "format 4"),
        (lambda a: a.update(format=1), "attributes are damaged.*in columns, in format 1"),
        (lambda a: a.update(format=2), "attributes are damaged"),
        (lambda a: a["dataset"].update(encoding="json"), "attributes are damaged"),
        (lambda a: a.pop("format"), "format None"),
        (lambda a: a.pop("recipe"), "attributes are damaged"),
        (lambda a: a["recipe"].pop("taps"), "attributes are damaged"),
        (lambda a: a["recipe"].update(backbone="vgg99"), "vgg99"),
        (lambda a: a["recipe"].update(image_size=10**9), "10000000"),
        (lambda a: a["recipe"].update(image_size=96), "does not fit"),
        (lambda a: a["recipe"].update(precision="float32"), "does not fit"),
        (lambda a: a.update(shard_images=0), "attributes are damaged"),
        (lambda a: a.update(shard_images="8"), "attributes are damaged"),
        (lambda a: a.update(shard_images=16), "does not fit"),
        (lambda a: a.update(dataset=[]), "attributes are damaged"),
        (lambda a: a["dataset"].update(images=10**12), "index in the store does not belong"),
        (lambda a: a["dataset"].update(digest="sha256:other"), "index in the store does not belong"),
    ],
)
def test_changed_attributes_are_an_error(tmp_path, change, text):
    path = tmp_path / "s.zarr"
    fill(path, shards=range(0))
    change_json(path / "zarr.json", lambda values: change(values["attributes"]["hsnet_store"]))
    with pytest.raises(StoreError, match=text):
        FeatureStore.open(path, require_complete=False)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("shape", lambda m: m["shape"].__setitem__(0, 10**15)),
        ("shape", lambda m: m["shape"].__setitem__(4, 64)),
        ("data_type", lambda m: m.update(data_type="float64")),
        ("shard", lambda m: m["chunk_grid"]["configuration"]["chunk_shape"].__setitem__(0, 10**9)),
        ("chunk", lambda m: m["codecs"][0]["configuration"]["chunk_shape"].__setitem__(0, 2)),
        ("codecs", lambda m: m["codecs"][0]["configuration"]["codecs"].insert(1, {"name": "gzip"})),
        ("codecs", lambda m: m["codecs"][0]["configuration"]["codecs"].pop()),
    ],
)
def test_an_array_that_does_not_fit_the_recipe_is_refused_before_it_is_read(tmp_path, field, change):
    path = tmp_path / "s.zarr"
    fill(path, shards=range(0))
    change_json(path / "level1" / "zarr.json", change)
    with pytest.raises(StoreError, match=rf"array 'level1' does not fit the store's recipe:\n  {field} "):
        FeatureStore.open(path, require_complete=False)


def test_a_huge_or_damaged_index_is_refused(tmp_path):
    path = tmp_path / "s.zarr"
    fill(path, shards=range(0))
    chunk = path / "index" / "c" / "0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1] + b"\0")
    with pytest.raises(StoreError, match="index cannot be read"):
        FeatureStore.open(path, require_complete=False)
    chunk.write_bytes(whole)
    change_json(path / "index" / "zarr.json", lambda m: m.update(shape=[10**12]))
    with pytest.raises(StoreError, match="the most that is read"):
        FeatureStore.open(path, require_complete=False)


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


# -- writing ---------------------------------------------------------------------------------------------------


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
