"""A store in a bucket: the same bytes as on a disk, whatever fails on the way."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fakes
import numpy as np
import pytest
from fakes import Photos
from PIL import Image

import pipeline.store.cache as cache_module
import pipeline.store.mirror as mirror_module
from hsnet.errors import StoreError, StoreIncomplete, StoreMismatch
from pipeline.store.bucket import Bucket
from pipeline.store.cache import cached_shards, make_room
from pipeline.store.feature_store import FeatureStore
from pipeline.store.place import place_of
from pipeline.store.verify import verify

URL = "s3://bucket/a/x.zarr"


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def objects(s3) -> dict[str, bytes]:
    return {key.removeprefix("a/x.zarr/"): data for key, data in s3.objects().items()}


def contents(store) -> list[np.ndarray]:
    images = range(len(store.index.images))
    return [*store.features(images), store.labels(images)]


def same(one, other) -> None:
    for a, b in zip(contents(one), contents(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def local(photos, run, tmp_path) -> Path:
    run(photos, tmp_path / "x.zarr")
    photos.read.clear()
    return tmp_path / "x.zarr"


def forget_cache(monkeypatch, tmp_path) -> None:
    """As if on another machine."""
    monkeypatch.setenv("HSNET_CACHE", str(tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"))


def test_objects_are_the_files_of_a_local_store(s3, photos, run, local, tmp_path, monkeypatch):
    summary = run(photos, URL)
    assert (summary.path, summary.written_shards, summary.written_images) == (URL, 3, 11)
    assert objects(s3) == files(local)
    forget_cache(monkeypatch, tmp_path)
    store = FeatureStore.open(URL)
    same(store, FeatureStore.open(local))
    assert store.info() | {"path": ""} == FeatureStore.open(local).info() | {"path": ""}
    assert store.info()["path"] == URL
    photos.read.clear()
    assert run(photos, f"{URL}/").written_shards == 0
    assert photos.read == []


def test_only_what_is_read_is_fetched_and_only_once(s3, photos, run, tmp_path, monkeypatch):
    run(photos, URL)
    forget_cache(monkeypatch, tmp_path)
    store = FeatureStore.open(URL)
    s3.seen.clear()
    store.labels([0, 1, 5])
    assert sorted(s3.seen) == ["GET /bucket/a/x.zarr/label/c/0/0/0", "GET /bucket/a/x.zarr/label/c/1/0/0"]
    s3.seen.clear()
    store.labels([0, 1, 5])
    again = FeatureStore.open(URL)
    again.labels([0, 1, 5])
    assert not [one for one in s3.seen if ("/c/" in one and "index" not in one) or "_done/0" in one], "no marker either"


def test_threads_that_want_the_same_shards_fetch_them_once(s3, photos, run, tmp_path, monkeypatch):
    run(photos, URL)
    expected = [part.tobytes() for part in all_of(FeatureStore.open(URL))]
    forget_cache(monkeypatch, tmp_path)
    store = FeatureStore.open(URL)
    s3.seen.clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: [part.tobytes() for part in all_of(store)], range(8)))
    assert all(one == expected for one in found)
    fetched = [one for one in s3.seen if "/c/" in one]
    assert len(fetched) == len(set(fetched)) == 3 * 4


def all_of(store):
    return [*store.features(range(11)), store.labels(range(11))]


def test_opening_a_sealed_store_asks_for_two_objects(s3, photos, run, tmp_path, monkeypatch):
    run(photos, URL)
    forget_cache(monkeypatch, tmp_path)
    s3.seen.clear()
    assert FeatureStore.open(URL).sealed
    assert not [one for one in s3.seen if "_done/0" in one], "no marker"
    s3.seen.clear()
    store = FeatureStore.open(URL)
    assert sorted(s3.seen) == ["GET /bucket/a/x.zarr/zarr.json", "HEAD /bucket/a/x.zarr/_done/summary"]
    assert store.info()["complete"]
    assert len(s3.seen) == 2


def test_a_worker_that_opens_an_unfinished_store_lists_no_markers(s3, photos, run, tmp_path, monkeypatch):
    run(photos, URL)
    store = FeatureStore.open(URL)
    with store.writing():
        store.drop([1])
    forget_cache(monkeypatch, tmp_path)
    listed, objects = [], Bucket.objects
    monkeypatch.setattr(Bucket, "objects", lambda self, prefix="": listed.append(prefix) or objects(self, prefix))
    store = FeatureStore.open(URL, require_complete=False)
    assert (store.is_done(0), store.is_done(1)) == (True, False)
    assert listed == ["index"]
    assert store.missing_shards() == (1,)
    assert listed == ["index", "_done"]


def test_processes_that_wait_for_one_that_looks_do_not_look_again(s3, photos, run):
    run(photos, URL)
    mirror = mirror_module.Mirror(URL)
    threads = [threading.Thread(target=mirror_module.Mirror(URL).sync) for _ in range(6)]
    with mirror._lock("sync"):
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        s3.seen.clear()
    for thread in threads:
        thread.join()
    assert s3.seen.count("GET /bucket/a/x.zarr/zarr.json") == 1


def test_cached_shards_survive_a_growth_and_go_when_the_summary_says_something_else(
    s3, photos, run, local, tmp_path, monkeypatch
):
    run(photos, URL)
    writer = os.environ["HSNET_CACHE"]
    forget_cache(monkeypatch, tmp_path)
    reader = os.environ["HSNET_CACHE"]
    contents(FeatureStore.open(URL))
    monkeypatch.setenv("HSNET_CACHE", writer)
    run(Photos(range(15)), URL)
    monkeypatch.setenv("HSNET_CACHE", reader)
    s3.seen.clear()
    store = FeatureStore.open(URL)
    store.features(range(8))
    assert not [one for one in s3.seen if "/level" in one and "/c/" in one], "shards 0 and 1 are those of before"
    # Another store of the same images comes to the address, by other means, with other bytes in shard 1.
    monkeypatch.setenv("HSNET_CACHE", writer)
    store = FeatureStore.open(URL)
    levels, labels = store.features(range(4, 8)), store.labels(range(4, 8))
    with store.writing() as token:
        store.write_shard(1, [level // 2 for level in levels], labels, [(9, 9)] * 4, [[0]] * 4, token=token)
    monkeypatch.setenv("HSNET_CACHE", reader)
    s3.seen.clear()
    again = FeatureStore.open(URL)
    assert again.sealed
    np.testing.assert_array_equal(again.features([4])[0][0], levels[0][0] // 2)
    assert again.size(5) == (9, 9)
    again.features([0])
    fetched = {one.split("/c/")[1].split("/")[0] for one in s3.seen if "/level" in one and "/c/" in one}
    assert fetched == {"1"}


def test_the_cache_is_looked_through_only_when_it_seems_full(s3, photos, run, tmp_path, monkeypatch, local):
    one = sum(size for size, _ in FeatureStore.open(local).facts(0).files.values())
    run(photos, URL)
    forget_cache(monkeypatch, tmp_path)
    monkeypatch.setenv("HSNET_CACHE_BYTES", str(10 * one))
    looked, real = [], cache_module.cached_shards
    monkeypatch.setattr(cache_module, "cached_shards", lambda cache: looked.append(cache) or real(cache))
    store = FeatureStore.open(URL)
    for image in range(11):
        store.features([image])
        store.labels([image])
    assert len(looked) == 1, "nobody had counted before"
    # Counted too high, as after a killed download: looked through, and counted right.
    cache = Path(os.environ["HSNET_CACHE"])
    (cache / ".total").write_text(str(10 * one))
    shutil.rmtree(next(path for path in cache.iterdir() if path.is_dir()) / "store" / "level0" / "c")
    store = FeatureStore.open(URL)
    store.features([0])
    assert len(looked) == 2
    assert int((cache / ".total").read_text()) == sum(shard.nbytes for shard in real(cache))
    (cache / ".total").write_text("half a num")
    store.features([5])
    assert len(looked) == 3


def test_a_store_can_be_handed_to_another_process(s3, photos, run):
    run(photos, URL)
    store = FeatureStore.open(URL)
    copy = pickle.loads(pickle.dumps(store))
    assert copy.path == URL
    same(store, copy)


def test_a_process_that_looks_leaves_alone_what_another_of_the_machine_is_just_writing(
    s3, photos, run, local, monkeypatch
):
    """Workers share the folder: one that opens the store must not clear away a shard that has no marker there yet."""
    put = Bucket.put

    def looked_at(self, key, data):
        if key.startswith("level0/c"):
            looking = mirror_module.Mirror(URL)
            looking.sync()
            looking.fetch_marker(0)
        put(self, key, data)

    monkeypatch.setattr(Bucket, "put", looked_at)
    run(photos, URL)
    assert objects(s3) == files(local)


@pytest.mark.parametrize("seed", range(3))
def test_random_failures_and_slowness_end_well(s3, photos, run, local, seed, tmp_path, monkeypatch):
    s3.misbehave(seed)
    run(photos, URL)
    forget_cache(monkeypatch, tmp_path)
    store = FeatureStore.open(URL)
    same(store, FeatureStore.open(local))
    assert verify(store).damage == ()
    assert {"error", "refuse", "lose", "cut", "slow"} <= set(s3.faults.done)
    s3.faults = type(s3.faults)()
    assert objects(s3) == files(local)


@pytest.mark.parametrize("stop", [1, 5, 8, 14])
def test_a_broken_upload_is_gone_on_with(s3, photos, run, local, monkeypatch, stop):
    """The upload number `stop` fails for good: nothing counts that is not whole, and the next run finishes."""
    put, done = Bucket.put, []

    def failing(self, key, data):
        if "/c/" in key or "_done" in key:
            done.append(key)
            if len(done) == stop:
                raise StoreError("the line is cut")
        put(self, key, data)

    monkeypatch.setattr(Bucket, "put", failing)
    with pytest.raises(StoreError, match="the line is cut"):
        run(photos, URL)
    monkeypatch.setattr(Bucket, "put", put)
    there = {key for key in objects(s3) if key.startswith("_done")}
    assert len(there) == (stop - 1) // 5
    run(photos, URL)
    assert objects(s3) == files(local)


@pytest.mark.parametrize("after", ["label/c/1/0/0", "_done/000001.json"])
def test_a_killed_extraction_is_gone_on_with(s3, photos, run, local, after, tmp_path):
    """SIGKILL before an object of the second shard is written."""
    code = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
from pipeline.store import bucket
from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights
sys.path.append({str(Path(fakes.__file__).parent)!r})
from fakes import Photos
put = bucket.Bucket.put
def killed(self, key, data):
    if key == {after!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, key, data)
bucket.Bucket.put = killed
weights = load_weights("squeezenet1_1")
extract(Photos(range(11)), weights, {URL!r}, image_size=32, precision="int8", shard_images=4)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert "_done/000000.json" in objects(s3)
    assert "_done/000001.json" not in objects(s3)
    with pytest.raises(StoreIncomplete, match=rf"2 of 3 shards .*--store {URL}"):
        FeatureStore.open(URL)
    summary = run(photos, URL)
    assert (summary.written_shards, summary.reused_shards) == (2, 1)
    assert sorted(photos.read) == list(range(4, 11))
    assert objects(s3) == files(local)


def test_a_flipped_byte_is_found_named_and_mended(s3, photos, run, local, tmp_path, monkeypatch):
    run(photos, URL)
    key = "a/x.zarr/level1/c/1/0/0/0/0"
    right = s3.objects()[key]
    s3.change(key, right[:100] + bytes([right[100] ^ 1]) + right[101:])
    found = verify(FeatureStore.open(URL))  # what is in the cache is right: the bucket is what is verified
    assert [(one.shard, one.array) for one in found.damage] == [(1, "level1")]
    assert found.path == URL
    assert found.damage[0].file == f"{URL}/level1/c/1/0/0/0/0"
    forget_cache(monkeypatch, tmp_path)
    store = FeatureStore.open(URL)
    store.features([0])
    with pytest.raises(StoreError, match=rf"{URL}: array 'level1' is damaged in shard 1 .*CRC-32 .*Nothing of it"):
        store.features([0, 4])
    assert run(photos, URL, damaged=found.damaged_shards).written_shards == 1
    assert objects(s3) == files(local)
    same(FeatureStore.open(URL), FeatureStore.open(local))


def test_a_download_that_arrives_damaged_is_repeated(s3, photos, run, tmp_path, monkeypatch):
    run(photos, URL)
    forget_cache(monkeypatch, tmp_path)
    read, times = Bucket.get_range, []

    def flipping(self, key, start, end):
        data = bytearray(read(self, key, start, end))
        times.append(key)
        if len(times) == 1:
            data[7] ^= 1
        return bytes(data)

    monkeypatch.setattr(Bucket, "get_range", flipping)
    FeatureStore.open(URL).labels([0])
    assert len(times) == 2


def test_a_damaged_copy_in_the_cache_is_fetched_again(s3, photos, run, local):
    run(photos, URL)
    path = place_of(URL).root / "level0/c/0/0/0/0/0"
    path.write_bytes(path.read_bytes()[:50] + b"????" + path.read_bytes()[54:])
    same(FeatureStore.open(URL), FeatureStore.open(local))


@pytest.mark.parametrize("key", ["level0/c/2/0/0/0/0", "label/c/2/0/0", "_done/000002.json"])
def test_a_deleted_object_is_named_and_made_again(s3, photos, run, local, key, tmp_path, monkeypatch):
    run(photos, URL)
    s3.delete(f"a/x.zarr/{key}")
    forget_cache(monkeypatch, tmp_path)
    if key.startswith("_done"):
        same(FeatureStore.open(URL), FeatureStore.open(local))  # sealed: no marker is read, nor listed
    else:
        with pytest.raises(StoreError, match=r"shard 2 .*it is not there"):
            contents(FeatureStore.open(URL))
    assert run(photos, URL).written_shards == 1
    assert objects(s3) == files(local)


def test_another_store_at_the_address_never_gets_the_old_ones_shards(s3, photos, run, local, tmp_path, monkeypatch):
    run(photos, URL)
    before = FeatureStore.open(URL)
    contents(before)
    # Another machine replaces it, by one whose last image differs: same recipe, same data set, other bytes.
    other, cache = Photos(range(11)), os.environ["HSNET_CACHE"]
    other.image = lambda i, image=other.image: image(i).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    run(other, tmp_path / "other.zarr")
    for key in list(s3.objects()):
        s3.delete(key)
    forget_cache(monkeypatch, tmp_path)
    run(other, URL)
    monkeypatch.setenv("HSNET_CACHE", cache)
    after = FeatureStore.open(URL)
    same(after, FeatureStore.open(tmp_path / "other.zarr"))
    with pytest.raises(AssertionError):
        same(after, FeatureStore.open(local))


def test_a_second_writer_is_refused_and_another_recipe_too(s3, photos, run):
    run(photos, URL)
    store = FeatureStore.open(URL)
    with store.writing(), pytest.raises(StoreError, match=rf"{URL} is being written by process {os.getpid()} on"):
        run(photos, URL)
    with pytest.raises(StoreMismatch, match=rf"{URL} was extracted with another recipe"):
        run(photos, URL, precision="float16")
    assert not [key for key in s3.objects() if "_owner" in key]


def test_a_writer_that_lost_the_store_commits_nothing(s3, photos, run, monkeypatch):
    run(photos, URL)
    store = FeatureStore.open(URL)
    levels, labels = store.features(range(4)), store.labels(range(4))
    with store.writing() as token:
        s3.change("a/x.zarr/_owner.json", b'{"token": "another"}')
        with pytest.raises(StoreError, match="is being written by another run now"):
            store.write_shard(0, levels, labels, [(1, 1)] * 4, [[0]] * 4, token=token)
    assert "a/x.zarr/_done/000000.json" not in s3.objects()


def test_the_cache_keeps_its_bound_and_what_was_used_last(s3, photos, run, tmp_path, monkeypatch, local):
    one = sum(FeatureStore.open(local).facts(0).files[name][0] for name in ("level0", "level1", "level2"))
    monkeypatch.setenv("HSNET_CACHE_BYTES", str(2 * one + 5000))
    run(photos, URL)
    cache = tmp_path / "cache"

    def cached() -> set[int]:
        return {shard.number for shard in cached_shards(cache)}

    assert len(cached()) <= 2, "shards that are uploaded need not stay"
    store = FeatureStore.open(URL)
    for image, left in [(0, None), (4, {0, 1}), (0, {0, 1}), (8, {0, 2}), (4, {1, 2})]:
        store.features([image])
        assert left is None or cached() == left
    assert sum(shard.nbytes for shard in cached_shards(cache)) <= 2 * one + 5000
    same(store, FeatureStore.open(local))  # all at once: more than the bound, none of it evicted in use


def test_a_shard_in_use_is_not_evicted(s3, photos, run, tmp_path, monkeypatch):
    run(photos, URL)
    store, cache = FeatureStore.open(URL), tmp_path / "cache"
    monkeypatch.setenv("HSNET_CACHE_BYTES", "1")
    with store.place.present(store.facts(0).stored(["level0"])):
        make_room(cache, 1)
        assert {shard.number for shard in cached_shards(cache)} == {0}
    make_room(cache, 1)
    assert cached_shards(cache) == []


def test_a_store_in_a_bucket_grows(s3, photos, run, local, tmp_path, monkeypatch):
    run(photos, URL)
    before = objects(s3)
    more = Photos(range(15))
    run(more, local)
    reader = FeatureStore.open(URL)
    summary = run(more, URL)
    assert (summary.images, summary.written_images) == (15, 4)
    assert objects(s3) == files(local)
    assert {key for key in before if before[key] != objects(s3)[key]} == {
        "zarr.json", "label/zarr.json", "level0/zarr.json", "level1/zarr.json", "level2/zarr.json", "_done/summary",
    }  # fmt: skip
    assert len(contents(reader)[0]) == 11
    forget_cache(monkeypatch, tmp_path)
    same(FeatureStore.open(URL), FeatureStore.open(local))


def test_nothing_there_and_something_else_there_are_told_apart(s3, photos, run):
    with pytest.raises(StoreError, match=rf"There is no feature store at {URL}"):
        FeatureStore.open(URL)
    s3.change("a/x.zarr/letters/anna.txt", b"dear")
    for action in (lambda: FeatureStore.open(URL), lambda: run(photos, URL)):
        with pytest.raises(StoreError, match=r"is not a feature store: it has no zarr.json, but 'letters'"):
            action()
    assert set(s3.objects()) == {"a/x.zarr/letters/anna.txt"}


def test_damaged_metadata_name_the_address(s3, photos, run):
    run(photos, URL)
    s3.change("a/x.zarr/zarr.json", b"{")
    with pytest.raises(StoreError, match=rf"{URL}/zarr.json is damaged") as caught:
        FeatureStore.open(URL)
    assert "cache" not in str(caught.value)


class Cut:
    """Metadata are uploaded up to the object number `most`, then the line is cut."""

    def __init__(self, monkeypatch) -> None:
        self.most, self.sent = 10**9, 0
        put, cut = Bucket.put, self

        def cutting(self, key, data):
            if "/c/" not in key.removeprefix("index") and "_done" not in key:
                if cut.sent == cut.most:
                    raise StoreError("the line is cut")
                cut.sent += 1
            put(self, key, data)

        monkeypatch.setattr(Bucket, "put", cutting)

    def after(self, most: int) -> None:
        self.most, self.sent = most, 0


def test_a_creation_that_breaks_leaves_no_store(s3, photos, run, local, monkeypatch):
    """Cut after one object more each time: what is there is not sent again."""
    cut, breaks = Cut(monkeypatch), 0
    cut.after(4)
    with pytest.raises(StoreError, match="the line is cut"):
        run(photos, URL, precision="float16")  # remains of another recipe do not matter
    while "zarr.json" not in objects(s3):
        cut.after(1)
        with pytest.raises(StoreError, match="There is no feature store"):
            FeatureStore.open(URL)
        try:
            run(photos, URL)
        except StoreError as error:
            if "the line is cut" not in str(error):
                raise
            breaks += 1
    assert breaks >= 3
    assert objects(s3) == files(local)


def test_a_growth_that_breaks_leaves_the_old_store_to_readers(s3, photos, run, local, tmp_path, monkeypatch):
    run(photos, URL)
    before = contents(FeatureStore.open(URL))
    more, cut, breaks = Photos(range(15)), Cut(monkeypatch), 0
    cache = os.environ["HSNET_CACHE"]
    while True:
        cut.after(1)
        try:
            run(more, URL)
            break
        except StoreError as error:
            if "the line is cut" not in str(error):
                raise
            breaks += 1
        monkeypatch.setenv("HSNET_CACHE", str(tmp_path / f"reader-{breaks}"))
        for mine, theirs in zip(contents(FeatureStore.open(URL)), before, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        monkeypatch.setenv("HSNET_CACHE", cache)
    assert breaks >= 6
    run(more, local)
    same(FeatureStore.open(URL), FeatureStore.open(local))
