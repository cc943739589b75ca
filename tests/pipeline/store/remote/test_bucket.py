"""Addresses, requests to a real S3 server, and failures told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsnet.errors import ConfigError, StoreError
from pipeline.store.bucket import Bucket, address, local_path, location


@pytest.mark.parametrize("path", ["voc.zarr", "/data/voc.zarr", Path("voc.zarr"), "a:b", "file:///data/x.zarr"])
def test_paths_are_no_addresses(path):
    assert address(path) is None


@pytest.mark.parametrize("path", ["s3://b/x.zarr", "s3://b/x.zarr/", "s3:///b/x.zarr", Path("s3://b/x.zarr")])
def test_an_address_has_one_spelling_even_out_of_pathlib(path):
    assert address(path) == "s3://b/x.zarr"
    assert location(path) == "s3://b/x.zarr"


def test_a_file_address_is_a_path():
    assert local_path("file:///data/a%20b.zarr") == Path("/data/a b.zarr")
    assert location("x.zarr") == Path.cwd() / "x.zarr"


@pytest.mark.parametrize("path", ["s3://", "s3://bucket", "s3://b//x", "s3://b/../x", "http://h/x.zarr", "s4://b/x"])
def test_what_is_no_address_is_refused(path):
    with pytest.raises(ConfigError, match=r"s3://BUCKET/NAME"):
        address(path)


@pytest.mark.parametrize("path", ["s3://id:hidden@b/x", "s3://b/x?token=hidden", "http://id:hidden@h/x"])
def test_an_address_holds_no_credentials(path):
    with pytest.raises(ConfigError) as caught:
        address(path)
    assert path.startswith("s3://b/x?") or "hidden" not in str(caught.value)


def test_objects_are_written_read_listed_and_deleted(s3, tmp_path):
    bucket = Bucket("s3://bucket/a/x.zarr")
    large = bytes(range(256)) * 40_000  # more than one part
    (tmp_path / "large").write_bytes(large)
    bucket.put("zarr.json", b"{}")
    bucket.put("level0/c/0/0/0/0/0", tmp_path / "large")
    assert s3.objects() == {"a/x.zarr/zarr.json": b"{}", "a/x.zarr/level0/c/0/0/0/0/0": large}
    assert bucket.get("zarr.json", 10) == b"{}"
    assert bucket.get_range("level0/c/0/0/0/0/0", 10, 20) == large[10:20]
    assert bucket.objects()["level0/c/0/0/0/0/0"].size == len(large)
    assert list(bucket.objects("level0")) == ["level0/c/0/0/0/0/0"]
    folders, objects = bucket.children()
    assert (folders, list(objects)) == (["level0"], ["zarr.json"])
    assert bucket.head("nothing") is None
    with pytest.raises(FileNotFoundError):
        bucket.get("nothing", 10)
    with pytest.raises(StoreError, match=r"2 bytes; 1 is the most"):
        bucket.get("zarr.json", 1)
    bucket.delete(["zarr.json", "level0/c/0/0/0/0/0", "nothing"])
    assert s3.objects() == {}


def test_a_conditional_write_happens_once(s3):
    bucket = Bucket("s3://bucket/x")
    first = bucket.put_if("k", b"1", None)
    assert first
    assert bucket.put_if("k", b"2", None) is None
    second = bucket.put_if("k", b"2", first)
    assert second
    assert bucket.put_if("k", b"3", first) is None
    assert bucket.get("k", 10) == b"2"


def test_names_that_lead_out_of_a_store_are_not_listed(s3):
    s3.change("x/index/.hidden", b"")
    s3.change("x/index/zarr.json", b"")
    assert list(Bucket("s3://bucket/x").objects()) == ["index/zarr.json"]
    s3.change("x/index/../../evil", b"")
    with pytest.raises(StoreError, match=r"cannot be listed: .*illegal"):
        Bucket("s3://bucket/x").objects()


@pytest.mark.parametrize("seed", range(3))
def test_random_failures_end_well(s3, seed):
    s3.misbehave(seed)
    bucket = Bucket("s3://bucket/x")
    for number in range(20):
        bucket.put(f"k/{number}", bytes([number]) * 1000)
    assert [bucket.get(f"k/{n}", 1000) for n in range(20)] == [bytes([n]) * 1000 for n in range(20)]
    assert len(bucket.objects("k")) == 20
    bucket.delete([f"k/{number}" for number in range(20)])
    assert s3.objects() == {}
    assert {"error", "refuse", "lose", "cut"} <= set(s3.faults.done)


def failure(action) -> str:
    with pytest.raises(StoreError) as caught:
        action()
    text = str(caught.value)
    assert "testing-secret" not in text
    assert "\n" not in text
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def test_every_refusal_is_one_clear_line(s3, monkeypatch):
    monkeypatch.setattr("pipeline.store.bucket.RETRIES", 1)
    text = failure(lambda: Bucket("s3://nobucket/x").get("k", 1))
    assert "there is no such bucket at http://127.0.0.1" in text
    assert "no such bucket" in failure(lambda: Bucket("s3://nobucket/x").put("k", b""))
    assert "no such bucket" in failure(lambda: Bucket("s3://nobucket/x").objects())
    s3.faults.deny = True
    assert "access denied (403 AccessDenied)" in failure(lambda: Bucket("s3://bucket/x").get("k", 1))
    assert "access denied" in failure(lambda: Bucket("s3://bucket/x").put("k", b""))
    s3.faults.deny = False
    s3.faults.error = 1.0
    monkeypatch.setattr("pipeline.store.bucket.ATTEMPTS", 2)
    assert "SlowDown" in failure(lambda: Bucket("s3://bucket/x").get("k", 1))


def test_a_server_that_is_not_there_is_named(s3, monkeypatch):
    monkeypatch.setattr("pipeline.store.bucket.RETRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hidden@127.0.0.1:9")
    text = failure(lambda: Bucket("s3://bucket/x").get("k", 1))
    assert "http://***@127.0.0.1:9 cannot be reached: nothing listens there" in text
    assert "hidden" not in text
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid")
    assert "its name is unknown" in failure(lambda: Bucket("s3://bucket/x").get("k", 1))
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    assert "AWS_ALLOW_HTTP" in failure(lambda: Bucket("s3://bucket/x").get("k", 1))


def test_no_credentials_are_named(s3, monkeypatch):
    monkeypatch.setattr("pipeline.store.bucket.RETRIES", 0)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    # Where a virtual machine would answer: nobody listens.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    assert "there are no credentials" in failure(lambda: Bucket("s3://bucket/x").get("k", 1))
