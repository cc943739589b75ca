"""One writer at a time in a bucket, and what happens to the lease of a dead one."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from hsnet.errors import StoreError
from pipeline.store import lease
from pipeline.store.bucket import Bucket
from pipeline.store.lease import OWNER, holds, sole_remote_writer


@pytest.fixture
def bucket(s3) -> Bucket:
    return Bucket("s3://bucket/x.zarr")


def test_the_second_writer_is_refused_and_the_lease_given_back(s3, bucket):
    with sole_remote_writer(bucket) as token:
        assert holds(bucket, token)
        with pytest.raises(StoreError, match=r"is being written by process \d+ on .*Nothing was changed"):
            sole_remote_writer(bucket).__enter__()
        assert holds(bucket, token)
    assert s3.objects() == {}
    assert not holds(bucket, token)
    with sole_remote_writer(bucket):
        pass


def test_nothing_secret_is_in_the_lease(s3, bucket):
    with sole_remote_writer(bucket):
        assert b"testing-" not in s3.objects()["x.zarr/_owner.json"]


def test_a_dead_process_of_this_machine_loses_it_at_once(bucket):
    code = "from pipeline.store.bucket import Bucket; from pipeline.store.lease import sole_remote_writer; import os\n"
    code += "held = sole_remote_writer(Bucket('s3://bucket/x.zarr')); held.__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert bucket.head(OWNER)
    with sole_remote_writer(bucket) as token:
        assert holds(bucket, token)


def test_a_living_process_elsewhere_keeps_it_until_it_is_old(s3, bucket, monkeypatch):
    owner = {"pid": 1, "host": "elsewhere", "token": "t", "machine": "another boot", "started": "1"}
    s3.change("x.zarr/_owner.json", json.dumps(owner).encode())
    with pytest.raises(StoreError, match=r"process 1 on 'elsewhere'"):
        sole_remote_writer(bucket).__enter__()
    assert set(s3.objects()) == {"x.zarr/_owner.json"}
    monkeypatch.setattr(lease, "LEASE_S", -1.0)
    with sole_remote_writer(bucket) as token:
        assert holds(bucket, token)
        assert not holds(bucket, "t")


def test_a_lease_is_renewed_until_another_has_it(s3, bucket, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    with sole_remote_writer(bucket) as token:
        first = bucket.head(OWNER)
        for _ in range(500):
            if bucket.head(OWNER) != first:
                break
            time.sleep(0.01)
        assert bucket.head(OWNER) != first
        assert holds(bucket, token)
        s3.change("x.zarr/_owner.json", b'{"token": "another"}')
        time.sleep(0.1)
        assert not holds(bucket, token)
    assert s3.objects() == {"x.zarr/_owner.json": b'{"token": "another"}'}, "another's lease is not given back"


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{", b'{"pid": "x", "host": 3}'])
def test_a_damaged_lease_is_somebodys(s3, bucket, damaged):
    s3.change("x.zarr/_owner.json", damaged)
    with pytest.raises(StoreError, match=r"written by another process"):
        sole_remote_writer(bucket).__enter__()


@pytest.mark.parametrize("seed", range(4))
def test_it_is_taken_and_given_back_through_random_failures(s3, bucket, seed):
    s3.misbehave(seed)
    for _ in range(5):
        with sole_remote_writer(bucket) as token:
            assert holds(bucket, token)
            with pytest.raises(StoreError, match=r"is being written by process"):
                sole_remote_writer(bucket).__enter__()
    s3.faults.error = s3.faults.refuse = s3.faults.lose = s3.faults.cut = 0
    assert s3.objects() == {}
