"""A store from somebody else: whatever its files say, an error comes before memory is spent, and nothing outside of the
store is read, written or deleted.

Each attack opens a store and reads of it all that can be read, in this process, with the growth of its memory watched;
the worst ones in a process that is not allowed more.
"""

import json
import os

import pytest
import stores_by_hand as helpers
from attacks import FILES, attack, inner, read_everything

from hsnet.errors import StoreError
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import summary_file


def test_without_an_attack_everything_is_read(path, coded):
    read_everything(path)
    read_everything(coded)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"attributes": {"hsnet_st',
        "[" * 100_000,
        '{"a":' * 100_000,
        " " * (2 << 20),
        '{"attributes": "' + "x" * (1 << 20),
        '{"shape": [' + "9" * 5000 + "]}",
        '{"shape": [1e999], "data_type": "uint8"}',
        '{"shape": NaN, "data_type": "uint8"}',
        '{"a": 1, "a": 2}',
        "\0" * 100,
    ],
    ids=lambda text: text[:12] or "empty",
)
def test_text_that_is_no_metadata(path, file, text):
    (path / file).write_text(text)
    attack(path)


@pytest.mark.parametrize("file", FILES)
def test_bytes_that_are_no_text(path, file):
    (path / file).write_bytes(b'{"attributes": "\xff\xfe\x80"}')
    attack(path)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("target", ["/dev/zero", "outside.json"])
def test_metadata_that_is_a_link_is_not_followed(path, tmp_path, file, target):
    """/dev/zero says that it has no bytes, and never ends."""
    (path / file).rename(tmp_path / "outside.json")
    (path / file).symlink_to(tmp_path / target)
    assert "is a link, a pipe or a device" in (text := str(attack(path))) or "is not a feature store" in text


@pytest.mark.parametrize("file", [*FILES, "_done/000001.json", "_done/summary", "level1/c/1/0/0/0/0", "index/c/0"])
def test_a_pipe_does_not_keep_anybody_waiting(path, file):
    summary_file(path).unlink()  # or else no marker is read
    (path / file).unlink(missing_ok=True)
    os.mkfifo(path / file)
    attack(path)


@pytest.mark.parametrize("array", ["level1", "label"])
@pytest.mark.parametrize(
    "alter",
    [
        lambda m: m["shape"].__setitem__(0, 10**15),
        lambda m: m["shape"].__setitem__(-1, 2**62),
        lambda m: m["shape"].__setitem__(0, -1),
        lambda m: m["shape"].__setitem__(0, 21.0),
        lambda m: m["shape"].__setitem__(0, "21"),
        lambda m: m["shape"].append(1),
        lambda m: m.update(shape=[]),
        lambda m: m.update(shape={"0": 21}),
        lambda m: m.update(data_type="float64"),
        lambda m: m.update(data_type={"name": "fixed_length_utf32", "configuration": {"length_bytes": 2**40}}),
        lambda m: m["chunk_grid"]["configuration"]["chunk_shape"].__setitem__(0, 10**9),
        lambda m: m["chunk_grid"].update(configuration=None),
        lambda m: inner(m)["chunk_shape"].__setitem__(0, 0),
        lambda m: inner(m)["chunk_shape"].__setitem__(0, 2),
        lambda m: inner(m)["codecs"].insert(1, {"name": "gzip", "configuration": {"level": 5}}),
        lambda m: inner(m)["codecs"].insert(1, {"name": "zstd", "configuration": {"level": 1, "checksum": False}}),
        lambda m: inner(m)["codecs"].pop(),
        lambda m: inner(m)["codecs"][0].update(configuration={"endian": "big"}),
        lambda m: inner(m).update(index_location="start"),
        lambda m: inner(m)["index_codecs"].insert(1, {"name": "zstd", "configuration": {"level": 1}}),
        lambda m: m["codecs"].append({"name": "crc32c"}),
        lambda m: m.update(codecs=[m["codecs"][0]] * 1000),
        lambda m: m.update(codecs=[{"configuration": 1}]),
        lambda m: m.update(codecs=3),
        lambda m: m.update(storage_transformers=[{"name": "anything"}]),
        lambda m: m["chunk_key_encoding"].update(configuration={"separator": "/../"}),
        lambda m: m["chunk_key_encoding"].update(name="v2"),
        lambda m: m.update(attributes=["x"] * 200_000),
    ],
)
def test_arrays_that_are_not_what_the_recipe_says(path, array, alter):
    helpers.change_json(path / array / "zarr.json", alter)
    if json.loads((path / array / "zarr.json").read_text())["attributes"]:
        read_everything(path)  # large, but nothing that is used
    else:
        attack(path)
        with pytest.raises(StoreError, match=f"'{array}'"):  # before anything of it is read, by zarr or otherwise
            FeatureStore.open(path, require_complete=False)


@pytest.mark.parametrize(
    "alter",
    [
        lambda a: a["recipe"].update(image_size=10**9),
        lambda a: a["recipe"].update(image_size=4096),
        lambda a: a["recipe"].update(image_size=-64),
        lambda a: a["recipe"].update(image_size=64.0),
        lambda a: a["recipe"].update(taps=["x"] * 100_000),
        lambda a: a["recipe"].update(backbone="../../etc/passwd"),
        lambda a: a["recipe"].update(precision="float64"),
        lambda a: a["recipe"].update(coding={"level_bytes": [1 << 40] * 3}),
        lambda a: a.update(shard_images=10**9),
        lambda a: a.update(shard_images=True),
        lambda a: a.update(format=1e999),
        lambda a: a["dataset"].update(images=10**12),
        lambda a: a["dataset"].update(images=-1),
        lambda a: a["dataset"].update(images=21.0),
        lambda a: a["dataset"].update(index="../index"),
        lambda a: a.update(growth=[a["dataset"]] * 100_000, format=2),
    ],
)
def test_attributes_that_cannot_be_meant(path, alter):
    helpers.change_json(path / "zarr.json", lambda values: alter(values["attributes"]["hsnet_store"]))
    attack(path)


@pytest.mark.parametrize("part", ["basis", "counts", "places", "levels"])
@pytest.mark.parametrize(
    "alter",
    [
        lambda m: m.update(shape=[1 << 40] * len(m["shape"])),
        lambda m: m.update(shape=[-1] * len(m["shape"])),
        lambda m: m.update(shape=[0] * len(m["shape"])),
        lambda m: m.update(shape=[2.5] * len(m["shape"])),
        lambda m: m.update(shape=[10**4000] * len(m["shape"])),
        lambda m: m["shape"].append(1),
        lambda m: m.update(data_type="float64"),
        lambda m: m.update(data_type=["float32"]),
        lambda m: m.update(codecs=[]),
        lambda m: m.update(codecs=3),
        lambda m: m["codecs"].insert(1, {"name": "sharding_indexed"}),
        lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[1 << 30] * len(m["shape"])),
        lambda m: m["chunk_key_encoding"].update(name="v2"),
    ],
)
def test_a_fit_of_hostile_shape(coded, part, alter):
    helpers.change_json(coded / "codec" / f"level1.layer0.{part}" / "zarr.json", alter)
    attack(coded)


def test_a_fit_that_is_elsewhere_or_among_others(coded, tmp_path):
    for number in range(50):
        (coded / "codec" / f"more-{number}").symlink_to("/dev/zero")
    read_everything(coded)  # nobody asks for these
    (coded / "codec").rename(tmp_path / "elsewhere")
    (coded / "codec").symlink_to(tmp_path / "elsewhere")
    assert "outside of the store" in str(attack(coded))
