"""`hsnet train` says how long it waits for data, and what helps where that is long."""

from __future__ import annotations

import json
import time

import pytest
from click.testing import CliRunner

import cli
from commands.train import remedy, waiting
from pipeline.loading.source import OnlineSource

QUICK = ("--steps", "3", "--batch-size", "2", "--select-on", "none", "--device", "cpu")
ONLINE = ("--features", "online", "--dataset", "shapes", "--backbone", "squeezenet1_1", "--weights", "random")


def test_what_is_little_is_not_told():
    assert waiting(None) == waiting(0.0) == waiting(0.09) == ""
    assert waiting(0.125) == ", 12% of the time waiting for data"


def test_what_helps_is_what_is_not_done_yet():
    assert "--resident host" in remedy("store", "off")
    assert "--resident device" in remedy("store", "auto")
    assert "--resident device" in remedy("store", "host")
    assert "--resident host" not in remedy("store", "host")
    assert "--resident" not in remedy("store", "device")
    assert "--bytes-per-image" in remedy("store", "device")
    assert "hsnet extract" in remedy("online", "auto")


@pytest.mark.parametrize("slow", [0.0, 1.0])
def test_a_run_that_waits_says_so(tmp_path, monkeypatch, slow):
    """The network is called by the thread that reads ahead: the steps wait for it where it is slow."""
    features = OnlineSource.features
    monkeypatch.setattr(
        OnlineSource,
        "features",
        lambda self, images: time.sleep(slow) or features(self, images),
    )
    command = ["train", *ONLINE, "--image-size", "64", "--run-dir", str(tmp_path / "run"), *QUICK]
    done = CliRunner().invoke(cli.main, command)
    assert done.exit_code == 0, done.output
    shares = [json.loads(line)["train"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    share = sum(one["waited"] for one in shares[1:]) / sum(one["seconds"] for one in shares[1:])
    assert (f"{share:.0%} of the time waiting for data" in done.stdout) == (share >= 0.1)
    assert ("hsnet extract" in done.stderr) == (share >= 0.25)
    if slow:
        assert share >= 0.25, "the test's own delay"
