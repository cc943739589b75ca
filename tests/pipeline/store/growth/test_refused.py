"""What is no growth is refused, and damage of a grown store is an error."""

import json
import os
import shutil
from collections import namedtuple

import google_crc32c
import numpy as np
import pytest
import zarr
from fakes import CLASSES, Photos
from growing import FIRST, MORE, SIZE, data_files, run
from numcodecs import zstd

from hsnet.errors import DataError, StoreError, StoreIncomplete, StoreMismatch
from pipeline.extract.plan import plan_extraction
from pipeline.extract.stage import extract
from pipeline.store.attributes import read_facts
from pipeline.store.feature_store import FeatureStore
from pipeline.store.growth import grow
from pipeline.store.skeleton import write_vector as _write_line

MANY = {**CLASSES, **{n: f"class {n}" for n in range(2, 260)}}


@pytest.mark.parametrize(
    ("photos", "field", "text"),
    [
        (Photos(MORE[1:]), "image in the data set", "stored 'photos/0.jpg', wanted 'not there'"),
        (Photos(MORE[3:]), "image in the data set", "stored 'photos/0.jpg and 1 more', wanted 'not there'"),
        (Photos(MORE, classes={0: "cat", 1: "horse"}), "class 1", "stored 'dog', wanted 'horse'"),
        (Photos(MORE, classes={0: "cat"}, lists=1), "class 1", "stored 'dog', wanted 'not there'"),
        (Photos(MORE, classes=MANY), "label type", "stored 'uint8', wanted 'uint16'"),
        (Photos(MORE, classes=MANY), "ignore label", "stored 255, wanted 65535"),
        (Photos(MORE, has_ignore=True), "ignore label in use", "stored False, wanted True"),
        (Photos(MORE, name="pascal"), "data set", "stored 'folder', wanted 'pascal'"),
    ],
)
def test_a_data_set_that_has_not_only_grown_is_refused(path, squeezenet, photos, field, text):
    before = data_files(path), (path / "zarr.json").read_bytes()
    with pytest.raises(StoreMismatch, match=rf"(?s){field} +{text}.*Put back.*Nothing was changed") as caught:
        run(photos, squeezenet, path)
    assert field in caught.value.differences
    assert photos.read == []
    assert (data_files(path), (path / "zarr.json").read_bytes()) == before


def test_a_store_does_not_shrink_to_what_it_was(grown, squeezenet):
    with pytest.raises(StoreMismatch, match=r"photos/1.jpg and 12 more"):
        run(Photos(FIRST), squeezenet, grown)


def test_another_recipe_is_named_with_the_other_data_set(path, squeezenet):
    with pytest.raises(StoreMismatch, match=r"(?s)precision.*data set"):
        extract(Photos(MORE), squeezenet, path, image_size=SIZE, precision="float32")
    assert read_facts(path).states[1:] == ()


def test_only_a_growth_is_planned_and_nothing_is_written(path, squeezenet):
    recipe = FeatureStore.open(path).recipe
    assert plan_extraction(Photos(FIRST), recipe, path).plan.grown is None
    plan = plan_extraction(Photos(MORE), recipe, path).plan
    assert (plan.images, plan.images_done, plan.shards, plan.shards_done) == (23, 10, 7, 3)
    each = plan.bytes_needed / 13
    assert read_facts(path).states[1:] == ()
    with pytest.raises(DataError):
        run(Photos(MORE, broken=[15]), squeezenet, path)
    assert plan_extraction(Photos(MORE), recipe, path).plan.bytes_needed == pytest.approx(each * 9)


def test_too_small_a_disk_is_told_before_the_store_is_touched(path, squeezenet, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(StoreError, match=r"bytes more for 13 images; 1,000 are free"):
        run(Photos(MORE), squeezenet, path)
    assert read_facts(path).states[1:] == ()


def test_a_disk_that_refuses_is_told(path, squeezenet, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StoreError, match=r"cannot be made ready for more images: .*No space left.*Mend the cause"):
            run(Photos(MORE), squeezenet, path)
    assert FeatureStore.open(path).index == Photos(FIRST).index
    run(Photos(MORE), squeezenet, path)


def test_a_store_that_is_being_written_does_not_grow(path, squeezenet):
    recipe = FeatureStore.open(path).recipe
    with FeatureStore.open(path).writing(), pytest.raises(StoreError, match="is being written by"):
        grow(path, recipe, Photos(MORE).index)
    assert read_facts(path).states[1:] == ()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: a.pop("growth"), "attributes are damaged"),
        (lambda a: a.update(format=1), "damaged|does not belong"),
        (lambda a: a.update(growth={}), "attributes are damaged"),
        (lambda a: a["growth"].pop(), "attributes are damaged"),
        (lambda a: a["growth"].reverse(), "attributes are damaged"),
        (lambda a: a["growth"].append(a["growth"][0]), "attributes are damaged"),
        (lambda a: a["growth"][0].update(images=10**12), "attributes are damaged"),
        (lambda a: a["growth"][0].update(images=11), "does not fit|rows"),
        (lambda a: a["growth"][0].update(digest=a["dataset"]["digest"]), "attributes are damaged"),
        (lambda a: a["growth"][1].update(index="../index-1"), "attributes are damaged"),
        (lambda a: a["dataset"].update(row="../row-1"), "attributes are damaged"),
        (lambda a: a["dataset"].update(images=24), "attributes are damaged"),
        (lambda a: [s.update(images=24) for s in (a["growth"][1], a["dataset"])], "does not belong"),
        (lambda a: [s.update(index="index-7", row="row-7") for s in (a["growth"][1], a["dataset"])], "cannot be read"),
    ],
)
def test_changed_attributes_of_a_grown_store_are_an_error(grown, change, text):
    values = json.loads((grown / "zarr.json").read_text())
    facts = values["attributes"]["hsnet_store"]
    change(facts)
    (grown / "zarr.json").write_text(json.dumps(values))
    with pytest.raises(StoreError, match=text):
        FeatureStore.open(grown)


@pytest.mark.parametrize(
    "rows",
    [
        lambda rows: rows[::-1].copy() * 0,
        lambda rows: rows + 1,
        lambda rows: rows[:-1].copy(),
        lambda rows: np.concatenate([rows, [99]]),
        lambda rows: np.where(rows == 12, 10, rows),
        lambda rows: rows.astype(np.int32),
        lambda rows: -rows,
    ],
)
def test_changed_rows_are_an_error(grown, rows):
    stored = zarr.open_array(str(grown / "row-1"), mode="r")[:]
    _write_line(grown, "row-1", rows(stored), "")
    with pytest.raises(StoreError, match="'row-1'"):
        FeatureStore.open(grown)


def test_rows_of_other_images_make_their_shards_missing(grown):
    """A mapping that is possible but another: markers name their images, so that nothing is mistaken."""
    stored = zarr.open_array(str(grown / "row-1"), mode="r")[:]
    stored[[0, 2]] = stored[[2, 0]]
    _write_line(grown, "row-1", stored, "")
    with pytest.raises(StoreIncomplete):
        FeatureStore.open(grown)


@pytest.mark.parametrize("name", ["index", "index-1", "row-1"])
def test_an_array_that_would_unpack_to_more_than_it_says_is_refused_before_it_is(grown, name):
    digest = Photos(FIRST).index.digest if name == "index" else None
    file = grown / name / "c" / "0"
    whole = file.read_bytes()
    bomb = zstd.compress(bytes(1 << 24), 3)
    for text in (bomb + google_crc32c.value(bomb).to_bytes(4, "little"), whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(text)
        with pytest.raises(StoreError, match=f"the {name} cannot be read"):
            FeatureStore.open(grown, index_digest=digest)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(StoreError, match=f"the {name} cannot be read"):
        FeatureStore.open(grown, index_digest=digest)
    file.unlink()
    file.write_bytes(whole)
    metadata = grown / name / "zarr.json"
    values = json.loads(metadata.read_text())
    values["chunk_grid"]["configuration"]["chunk_shape"] = [10**12]
    metadata.write_text(json.dumps(values))
    with pytest.raises(StoreError, match=f"'{name}' is not laid out as"):
        FeatureStore.open(grown, index_digest=digest)


@pytest.mark.parametrize("rows", [10, 11, 13, 10**15])
def test_arrays_of_another_length_are_still_refused(grown, rows):
    file = grown / "level1" / "zarr.json"
    values = json.loads(file.read_text())
    values["shape"][0] = rows
    file.write_text(json.dumps(values))
    with pytest.raises(StoreError, match="does not fit"):
        FeatureStore.open(grown)
