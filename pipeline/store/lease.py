"""One writer per store in an object store: a lease object that its holder renews and a dead holder loses.

There is no lock that a server drops when its holder dies, so the holder says again and again that it lives. Everything
is decided by conditional writes: of two that take a lease at once one succeeds.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hsnet.errors import StoreError
from pipeline.store.bucket import Bucket

OWNER = "_owner.json"
RENEW_S = 30.0
"""A holder renews its lease so often."""
LEASE_S = 300.0
"""A lease that was not renewed for so long is anybody's."""
_CLOCK = "_owner.clock"
_LARGEST = 1 << 16


@contextmanager
def sole_remote_writer(bucket: Bucket) -> Iterator[str]:
    """Hold a store for writing inside the block; yields a token that `holds` knows.

    Raises:
        StoreError: another process holds it (named), or the server refuses.
    """
    token = uuid.uuid4().hex
    etag = _take(bucket, token)
    stop = threading.Event()
    keeper = threading.Thread(target=_keep, args=(bucket, token, etag, stop), name="lease", daemon=True)
    keeper.start()
    try:
        yield token
    finally:
        stop.set()
        keeper.join()
        with suppress(StoreError):  # left behind it is taken over: this process is dead by then
            if holds(bucket, token):
                bucket.delete([OWNER])


def holds(bucket: Bucket, token: str) -> bool:
    """Whether the holder that was given `token` is still the last one."""
    return _owner(bucket).get("token") == token


def _take(bucket: Bucket, token: str) -> str:
    for _ in range(5):
        etag = bucket.put_if(OWNER, _text(token), None)
        if etag is not None:
            return etag
        entry, owner = bucket.head(OWNER), _owner(bucket)
        if entry is None:
            continue  # given back in this moment
        if owner.get("token") == token:  # ours: the answer to the write was lost
            return entry.etag
        if not _dead(owner) and _age(bucket, entry.modified.timestamp()) < LEASE_S:
            raise StoreError(
                f"{bucket.url} is being written by {_name(owner)}. Wait until it is done, or stop it; then run the "
                f"command again (a holder that is gone loses the store after {LEASE_S / 60:.0f} minutes). "
                f"Nothing was changed."
            )
        etag = bucket.put_if(OWNER, _text(token), entry.etag)
        if etag is not None or holds(bucket, token):
            return etag or (bucket.head(OWNER) or entry).etag
    raise StoreError(f"{bucket.url} is being taken by other processes. Nothing was changed.")


def _keep(bucket: Bucket, token: str, etag: str, stop: threading.Event) -> None:
    """Renew until told to stop, or until somebody else has it: `holds` then says so before anything is committed."""
    while not stop.wait(RENEW_S):
        try:
            renewed = bucket.put_if(OWNER, _text(token), etag)
            if renewed is None:
                entry = bucket.head(OWNER)
                if entry is None or not holds(bucket, token):
                    return
                renewed = entry.etag  # the answer to an earlier write was lost
            etag = renewed
        except StoreError:
            continue  # the next try may succeed before the lease is over


def _age(bucket: Bucket, modified: float) -> float:
    """Seconds since then by the server's own clock: this machine's may be wrong."""
    bucket.put(_CLOCK, b"now")
    entry = bucket.head(_CLOCK)
    bucket.delete([_CLOCK])
    return (entry.modified.timestamp() if entry else time.time()) - modified


def _text(token: str) -> bytes:
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "token": token}
    return json.dumps(
        {**facts, "machine": _machine(), "started": _started(os.getpid()), "renewed": time.time()}
    ).encode()


def _owner(bucket: Bucket) -> dict[str, Any]:
    try:
        owner = json.loads(bucket.get(OWNER, _LARGEST))
    except (FileNotFoundError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    pid, host = owner.get("pid"), str(owner.get("host"))[:100]
    return f"process {pid} on {host!r}" if isinstance(pid, int) else "another process"


def _dead(owner: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is there no more."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or owner.get("machine") != _machine() or not _machine():
        return False
    return _started(pid) != owner.get("started")


def _machine() -> str:
    """Names this boot of this machine and its space of process numbers: hosts in containers often share a name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: only time tells
        return ""


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty if there is none. A number is given again, a time is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
