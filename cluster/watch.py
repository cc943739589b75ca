"""Say that the head of a cluster is gone: Ray itself is silent for a minute and then ends the process."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.probe import trouble

log = logging.getLogger(__name__)

EVERY_S = 5.0
"""Seconds between two looks."""
_RAYS_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"


def patience_s() -> float:
    """How long a head may be gone: a little less than until Ray ends the process."""
    return max(EVERY_S, float(os.environ.get(_RAYS_PATIENCE, "60")) - 10)


def _end(message: str) -> None:
    """End this process: every call of Ray's in it hangs, so no error could be raised where somebody waits."""
    sys.stderr.write(f"Error: {message}\n")
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def head_watched(
    host: str, port: int, every_s: float = EVERY_S, patience: float | None = None, end: Callable[[str], None] = _end
) -> Iterator[None]:
    """Look after the head at an address while the block runs, on a thread.

    When it does not answer, that is said; after `patience` seconds (`patience_s`) of it, `end` is called with what to
    tell the user. Files are safe: each is written whole, and locks end with the process.
    """
    limit = patience_s() if patience is None else patience
    done = threading.Event()

    def watch() -> None:
        gone: float | None = None
        while not done.wait(every_s):
            reason = trouble(host, port, every_s)
            if reason is None or done.is_set():
                gone = None
                continue
            if gone is None:
                gone = time.monotonic()
                log.warning("The cluster's head does not answer (%s): waiting for it up to %d s", reason, limit)
            if time.monotonic() - gone > limit:
                end(
                    f"The head of the cluster at {host}:{port} was lost: {reason}. What was finished is kept; the same "
                    "command goes on from there, on this cluster or another."
                )
                return

    thread = threading.Thread(target=watch, name="head-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
