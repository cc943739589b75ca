"""`hsnet train` says how long it waits for data, and what helps where that is long."""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner

import cli
from commands import terminal
from commands.train import remedy, waiting
from pipeline import train

QUICK = ("--steps", "1", "--batch-size", "2", "--select-on", "none", "--device", "cpu")
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


@pytest.mark.parametrize("share", [0.05, 0.4])
def test_a_run_that_waits_says_so(tmp_path, monkeypatch, share):
    """A run of one step is trained; what part of it was waiting is the test's, as no machine waits to order."""
    told, notes = [], []

    def fit(*given, on_event, **named):
        def event(one):
            on_event(one)
            for step in (2, 3):
                on_event(dataclasses.replace(one, step=step, seconds=2.0, waited=2.0 * share))

        told.append(before(*given, on_event=event, **named))
        return dataclasses.replace(told[0], waited_share=share)

    before, update = train.fit, terminal.Progress.update
    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(
        terminal.Progress, "update", lambda self, *given: notes.append(given[-1]) or update(self, *given)
    )
    command = ["train", *ONLINE, "--image-size", "64", "--run-dir", str(tmp_path / "run"), *QUICK]
    done = CliRunner().invoke(cli.main, command)
    assert done.exit_code == 0, done.output
    assert told[0].waited_share is None, "one step"
    much = share >= 0.1
    assert done.stdout.strip().endswith(
        f", {share:.0%} of the time waiting for data" if much else f"{told[0].loss:.3f}"
    )
    assert ("hsnet extract" in done.stderr) == (share == 0.4)
    assert "waiting" not in notes[0], "nothing is read ahead of the first step"
    assert ("waiting" in notes[-1]) == much
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["train"]["waited"] >= 0
