"""The data-set index of a store from somebody else."""

import json
from pathlib import Path

import numpy as np
import pytest
import stores_by_hand as helpers
from attacks import attack, frame, summed

from hsnet.errors import HSNetError
from pipeline.common.columns import Texts, pack, unpack
from pipeline.store.attributes import read_facts
from pipeline.store.feature_store import FeatureStore
from pipeline.store.verify import verify


def write_index(path: Path, text: bytes, shape: int | None = None) -> None:
    """Another index in a store of format 1, the attributes left as they are."""
    if read_facts(path).format != 1:
        helpers.make_old(path)
    length = len(text) if shape is None else shape
    helpers.change_json(
        path / "index" / "zarr.json",
        lambda m: (m.update(shape=[length]), m["chunk_grid"]["configuration"].update(chunk_shape=[length])),
    )
    (path / "index" / "c" / "0").write_bytes(frame(text))


def index_with(path: Path, **values) -> bytes:
    there = json.loads(FeatureStore.open(path, require_complete=False).index.to_json())
    return json.dumps({**there, **values}).encode()


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (["../up.jpg"], "leaves the data root"),
        (["/etc/passwd"], "leaves the data root"),
        (["a/../../x"], "leaves the data root"),
        (["a\0b"], "zero byte"),
        (["a"] * 21, "twice"),
        ([1], "images"),
        ("abc", "images"),
        ([f"{i}.jpg" for i in range(200_000)], "does not belong"),
    ],
)
def test_an_index_that_names_what_it_should_not(path, images, problem):
    write_index(path, index_with(path, images=images))
    assert problem in str(attack(path))


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b"\xff\xfe", b"9" * 5000, b'{"a": 1, "a": 2}', b"null", b'{"images": [1e999]}'],
)
def test_an_index_that_is_none(path, text):
    write_index(path, text)
    attack(path)


def test_many_images_and_no_data(tmp_path):
    """Nothing but an index: it opens, and whatever is asked for is missing."""
    path = tmp_path / "s.zarr"
    store = FeatureStore.create(path, helpers.make_recipe(), helpers.make_index(100_000), shard_images=400)
    assert len(store.missing_shards()) == store.shards == 250
    with pytest.raises(HSNetError, match="250 of 250 shards are missing"):
        FeatureStore.open(path)


@pytest.mark.parametrize("shape", [10**12, 1 << 28, 0, -5])
def test_an_index_that_claims_to_be_large(path, shape):
    write_index(path, b"{}", shape)
    attack(path)


def write_columns(path: Path, change) -> None:
    """Another index in columns, with a checksum that is right, the attributes left as they are."""
    file = path / "index" / "c" / "0"
    facts, columns = unpack(np.frombuffer(file.read_bytes()[:-4], np.uint8))
    change(facts, columns)
    write_block(path, pack(facts, columns).tobytes())


def write_block(path: Path, data: bytes) -> None:
    helpers.change_json(
        path / "index" / "zarr.json",
        lambda m: (m.update(shape=[len(data)]), m["chunk_grid"]["configuration"].update(chunk_shape=[len(data)])),
    )
    (path / "index" / "c" / "0").write_bytes(summed(data))


def texts(*ids: str):
    def change(facts, columns):
        made = Texts.of(ids)
        columns.update({"images": made.text, "images.ends": made.ends})

    return change


def column(name: str, values, dtype: str | None = None):
    return lambda _, columns: columns.update({name: np.array(values, dtype or columns[name].dtype)})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (texts("../up.jpg"), "leaves the data root"),
        (texts("b/1", "/etc/passwd", "b/2"), "leaves the data root"),
        (texts("b/1", "a/../../x"), "leaves the data root"),
        (texts("b/1", "a\0b"), "zero byte"),
        (texts("b/1", ""), "not a text"),
        (texts("C:/x"), "leaves the data root"),
        (texts(*(f"{i}.jpg" for i in range(200_000))), "does not belong"),
        (column("images", [0xFF] * 150), "damaged"),
        (column("images.ends", [-5] + [150] * 20), "damaged"),
        (column("images.ends", [1 << 62] * 21), "damaged"),
        (column("images.ends", [1] * 21, "uint8"), "must be int64"),
        (column("0.trn.images", [21] * 21), "image number 21"),
        (column("0.trn.images", [-1] * 21), "image number -1"),
        (column("0.trn.images", [0] * 20), "damaged"),
        (column("0.trn.classes", [9] * 21), "class 9"),
        (column("0.trn.classes", [-1] * 21, "int32"), "must be uint16"),
        (lambda facts, _: facts.update(classes=[]), "classes is a list"),
        (lambda facts, _: facts.update(digest="x"), "digest"),
        (lambda facts, _: facts.update(digest="sha256:" + "1" * 64), "does not belong"),
        (lambda facts, _: facts.update(declared={"0": {"up": []}}), "damaged"),
        (lambda facts, _: facts.update(declared={"0": []}), "must be an object"),
        (lambda facts, _: facts.update(name=3), "name"),
        (lambda facts, _: facts.update(format=2), "format"),
        (lambda facts, _: facts.update(more=2), "unknown fields"),
        (lambda facts, _: facts.pop("notes"), "missing"),
    ],
)
def test_columns_that_cannot_be_meant(path, change, problem):
    write_columns(path, change)
    assert problem in str(attack(path))


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"\0" * 8,
        b"\xff" * 100,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (8).to_bytes(8, "little") + b"[" * 8,
        (16).to_bytes(8, "little") + b'{"facts":1}     ',
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (40).to_bytes(8, "little") + b'{"facts":{},"columns":{"images":["x"]}} ',
        (56).to_bytes(8, "little") + b'{"facts":{},"columns":{"images":["uint8",0,999999999]}} '[:56].ljust(56),
        (56).to_bytes(8, "little") + b'{"facts":{},"columns":{"images":["object",0,1]}}'.ljust(56),
        (56).to_bytes(8, "little") + b'{"facts":{},"columns":{"images":["uint8",-8,1]}}'.ljust(56),
    ],
)
def test_blocks_that_are_none(path, data):
    write_block(path, data)
    assert "the columns of the data-set index are damaged" in str(attack(path)).lower()


def test_other_images_or_lists_under_the_same_digest(path):
    """Their checksum is right. Images are compared with the summary and with the markers, all of it by `verify`."""
    write_columns(path, texts(*(f"a/{i}.jpg" for i in reversed(range(21)))))
    assert "3 of 3 shards are missing" in str(attack(path))
    write_columns(path, texts(*(f"a/{i}.jpg" for i in range(21))))
    assert not verify(FeatureStore.open(path)).index
    write_columns(path, column("0.trn.classes", [0] * 21))
    assert "but it is sha256:" in verify(FeatureStore.open(path)).index


def test_an_index_in_chunks_that_are_larger_than_it(path):
    helpers.change_json(
        path / "index" / "zarr.json", lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[1 << 40])
    )
    attack(path)
