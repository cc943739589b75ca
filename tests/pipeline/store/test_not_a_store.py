"""Folders that are no store, and attributes, arrays and indices that do not fit."""

import pytest
import zarr
from stores_by_hand import change_json, fill, make_index, make_recipe

from hsnet.errors import StoreError
from pipeline.store.feature_store import FeatureStore


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
