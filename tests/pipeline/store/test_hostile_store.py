"""A store from somebody else: whatever its files say, an error comes before memory is spent, and nothing outside of the
store is read, written or deleted.

Each attack opens a store and reads of it all that can be read, in this process, with the growth of its memory watched;
the worst ones in a process that is not allowed more.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from numcodecs import zstd

from hsnet.errors import HSNetError, StoreError
from pipeline.common.columns import Texts, pack, unpack
from pipeline.datasets.shapes import Shapes
from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights
from pipeline.store.attributes import read_facts
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import marker_file, shard_file, summary_file
from pipeline.store.verify import verify

spec = importlib.util.spec_from_file_location("store_helpers", Path(__file__).with_name("test_feature_store.py"))
helpers = importlib.util.module_from_spec(spec)
sys.modules["store_helpers"] = helpers
spec.loader.exec_module(helpers)

MEMORY = 96 << 20
"""More than any attack on these small stores may take. Each of the bombs stands for gigabytes."""
FILES = ["zarr.json", "level1/zarr.json", "index/zarr.json", "label/zarr.json"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "s.zarr"
    helpers.fill(path)
    return path


@pytest.fixture(scope="module")
def made_coded(tmp_path_factory):
    path = tmp_path_factory.mktemp("coded") / "s.zarr"
    data = Shapes(size=64, trn_per_class=2, val_per_class=2)
    weights = load_weights("squeezenet1_1")
    extract(data, weights, path, image_size=64, precision="int8", shard_images=32, bytes_per_image=40_000)
    return path


@pytest.fixture
def path(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "s.zarr"))


@pytest.fixture
def coded(made_coded, tmp_path):
    return Path(shutil.copytree(made_coded, tmp_path / "coded.zarr"))


def read_everything(path: Path) -> None:
    """All that a command would read of a store."""
    store = FeatureStore.open(path)
    store.info()
    assert store.codec is None or store.codec.level_bytes
    for image in range(len(store.index.images)):
        store.features([image])
        store.labels([image])
        assert all(0 <= side < 1 << 28 for side in store.size(image))


def attack(path: Path) -> HSNetError:
    """The error that comes, which must come before memory is spent."""
    tracemalloc.start()
    try:
        with pytest.raises(HSNetError) as caught:
            read_everything(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY, f"{peak:,} bytes"
    return caught.value


def change(file: Path, **values) -> None:
    helpers.change_json(file, lambda metadata: metadata.update(values))


def inner(metadata):
    return metadata["codecs"][0]["configuration"]


def frame(data: bytes) -> bytes:
    """A chunk of a small array: compressed, summed."""
    packed = zstd.compress(data, 1)
    return packed + google_crc32c.value(packed).to_bytes(4, "little")


def test_without_an_attack_everything_is_read(path, coded):
    read_everything(path)
    read_everything(coded)


# -- metadata --------------------------------------------------------------------------------------------------


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


# -- the index -------------------------------------------------------------------------------------------------


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


# -- bombs: few bytes that unpack to many ----------------------------------------------------------------------

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
    root = Path(__file__).parents[3]
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


def summed(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(4, "little")


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


# -- the fit of coded features ---------------------------------------------------------------------------------


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


def missing(path: Path) -> tuple[int, ...]:
    store = FeatureStore.open(path, require_complete=False)
    store.check_markers()
    return store.missing_shards()


# -- markers ---------------------------------------------------------------------------------------------------


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


# -- data ------------------------------------------------------------------------------------------------------


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
    before = helpers.fingerprints(outside) if outside.is_dir() else outside.read_bytes()
    if place != "_done":
        attack(path)
    if place not in ("index", "level1/c/1/0/0/0/0"):
        store = FeatureStore.open(path, require_complete=False)
        with pytest.raises(StoreError, match="is a link: nothing is written or deleted"), store.writing():
            pass
    assert before == (helpers.fingerprints(outside) if outside.is_dir() else outside.read_bytes())


def test_a_lock_that_is_a_link_is_not_written_through(path, tmp_path):
    (tmp_path / "precious").write_text("precious")
    (path / "_owner.json").symlink_to(tmp_path / "precious")
    with pytest.raises(StoreError, match="cannot be locked"), FeatureStore.open(path).writing():
        pass
    assert (tmp_path / "precious").read_text() == "precious"
