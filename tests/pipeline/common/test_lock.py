"""A lock of a holder that may be dead is waited for; one of a living process of this machine is an error at once."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hsnet.errors import StoreError
from pipeline.common.lock import OWNER, sole_writer

HOLD = """
import fcntl, json, os, sys, time
from pathlib import Path
file = Path(sys.argv[1]).open("w")
fcntl.flock(file, fcntl.LOCK_EX)
json.dump({"pid": int(sys.argv[2]) or os.getpid(), "host": sys.argv[3], "token": "t"}, file)
file.flush()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[str, int], subprocess.Popen]]:
    """A process that holds the lock, and says it is another process, or on another machine."""
    started = []

    def start(host: str, pid: int = 0) -> subprocess.Popen:
        words = [sys.executable, "-c", HOLD, str(tmp_path / OWNER), str(pid), host]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_living_process_of_this_machine_is_an_error_at_once(tmp_path, hold):
    holder = hold(socket.gethostname())
    began = time.monotonic()
    with pytest.raises(StoreError, match=f"is being written by process {holder.pid} on"), sole_writer(tmp_path):
        pass
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("dead", ["another machine", "a process that is gone"])
def test_a_holder_that_may_be_dead_is_waited_for_and_named(tmp_path, hold, caplog, dead):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    holder = hold("elsewhere", 7) if dead == "another machine" else hold(socket.gethostname(), gone.pid)
    caplog.set_level(logging.WARNING)
    killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1.5); os.kill({holder.pid}, 9)"])
    began = time.monotonic()
    with sole_writer(tmp_path, patience_s=30):
        assert time.monotonic() - began > 1
        assert json.loads((tmp_path / OWNER).read_text())["host"] == socket.gethostname()
    killer.wait()
    assert "waiting up to 30 s" in caplog.text
    assert caplog.text.count("is locked by") == 1


def test_patience_ends(tmp_path, hold):
    hold("elsewhere", 7)
    began = time.monotonic()
    with (
        pytest.raises(StoreError, match="is being written by process 7 on elsewhere"),
        sole_writer(tmp_path, patience_s=0.5),
    ):
        pass
    assert 0.4 < time.monotonic() - began < 10
