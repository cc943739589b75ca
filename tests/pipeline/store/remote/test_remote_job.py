"""The whole job on a store in a bucket, as a user does it: the same numbers as from a local store."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import cli
from cli import main

URL = "s3://bucket/shapes.zarr"
SMALL = ["--data-option", "size=32", "--data-option", "trn_per_class=3", "--data-option", "val_per_class=4"]
MAKE = ["shapes", *SMALL, "--backbone", "squeezenet1_1", "--image-size", "32"]


def hsnet(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.stdout if code == 0 else result.output


def train_and_evaluate(store: str, folder) -> tuple[dict, list[dict]]:
    size = ["--batch-size", "2", "--validate-every", "2", "--validate-episodes", "4", "--quiet"]
    hsnet("train", "--store", store, "--fold", "0", "--run-dir", folder, "--steps", "2", *size)
    rows = folder / "rows.parquet"
    head = ["--checkpoint", folder, "--store", store, "--fold", "0", "--episodes", "6", "--out", rows, "--json"]
    scores = json.loads(hsnet("evaluate", *head))
    table = pq.read_table(rows)
    given = [name for name in table.column_names if name not in ("seconds", "checkpoint", "store", "manifest")]
    return scores, table.select(given).to_pylist()


def test_extract_train_and_evaluate_from_a_bucket_equal_the_local_ones(s3, tmp_path, monkeypatch):
    local = str(tmp_path / "shapes.zarr")
    plan = json.loads(hsnet("extract", *MAKE, "--store", URL, "--dry-run", "--json"))
    assert plan["bytes_free"] is None
    assert s3.objects() == {}
    assert "into a bucket" in hsnet("extract", *MAKE, "--store", URL, "--dry-run")
    done = json.loads(hsnet("extract", *MAKE, "--store", URL, "--json", "--quiet"))
    assert (done["path"], done["reused_shards"]) == (URL, 0)
    hsnet("extract", *MAKE, "--store", local, "--quiet")
    shutil.rmtree(tmp_path / "cache")
    here, rows = train_and_evaluate(local, tmp_path / "here")
    there, remote_rows = train_and_evaluate(URL, tmp_path / "there")
    assert rows == remote_rows
    assert here["scores"] == there["scores"]
    protocol = json.loads(pq.read_schema(tmp_path / "there" / "rows.parquet").metadata[b"hsnet"])
    assert URL in json.dumps(protocol), "the rows say where the features were"
    assert "testing-" not in json.dumps(protocol)


def test_info_verify_repair_and_compare_take_an_address(s3, tmp_path):
    hsnet("extract", *MAKE, "--store", URL, "--quiet")
    info = json.loads(hsnet("store", "info", URL, "--json"))
    assert (info["path"], info["complete"]) == (URL, True)
    assert f"{URL}: {info['images']} images" in hsnet("store", "verify", URL, "--quiet")
    again = hsnet("store", "verify", URL, "--recompute", "5%", "--dataset", "shapes", *SMALL, "--quiet")
    assert "the same bit for bit" in again
    before = s3.objects()
    key = "shapes.zarr/level2/c/0/0/0/0/0"
    s3.change(key, before[key][:9] + b"????" + before[key][13:])
    assert f"{URL}/level2/c/0/0/0/0/0" in hsnet("store", "verify", URL, "--quiet", code=1)
    hsnet("store", "repair", *MAKE, "--store", URL, "--quiet")
    assert s3.objects() == before
    hsnet("extract", *MAKE, "--store", tmp_path / "exact.zarr", "--precision", "float32", "--quiet")
    compared = json.loads(hsnet("store", "compare", "--store", URL, "--against", tmp_path / "exact.zarr", "--json"))
    assert 0 < np.mean([layer["mean"] for layer in compared["layers"]]) < 0.01
    assert "fits in disk" in hsnet("plan", *MAKE, "--store", URL, "--photos", "1", "--quiet")


def test_errors_are_one_line_and_hold_no_secret(s3, monkeypatch):
    monkeypatch.setattr("pipeline.store.bucket.RETRIES", 1)
    for place, said in [
        ("s3://bucket/none.zarr", "There is no feature store at s3://bucket/none.zarr"),
        ("s3://nobody/none.zarr", "there is no such bucket"),
        ("s3://bucket", "is not an address of the form"),
        ("s3://me:hidden@bucket/x", "Credentials are given by the environment"),
    ]:
        output = hsnet("store", "info", place, code=2 if "none" not in place else 1)
        assert said in " ".join(output.split()).replace("│ ", "")
        assert "hidden" not in output
        assert "testing-secret" not in output
    s3.faults.deny = True
    assert "access denied (403" in hsnet("extract", *MAKE, "--store", URL, "--quiet", code=1)


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_workers_on_ray_open_the_address_themselves(s3, tmp_path, monkeypatch):
    """As a command of its own: a Ray that other tests left running has their environment, without the server's keys."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    command = [sys.executable, str(Path(cli.__file__)), "extract", *MAKE, "--store", URL, "--shard-images", "8"]
    done = subprocess.run([*command, "--workers", "2", "--json", "-q"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written_images"] > 0
    hsnet("extract", *MAKE, "--store", tmp_path / "x.zarr", "--shard-images", "8", "--quiet")
    local = tmp_path / "x.zarr"
    files = {f.relative_to(local).as_posix(): f.read_bytes() for f in local.rglob("*") if f.is_file()}
    assert {key.removeprefix("shapes.zarr/"): data for key, data in s3.objects().items()} == files
