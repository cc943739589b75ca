"""One writer per store or run directory: a lock that the kernel drops when its holder dies."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hsnet.errors import StoreError

OWNER = "_owner.json"

PATIENCE_S = 100.0
"""How long the lock of a holder that may be dead is waited for: a file server keeps that of a lost machine for its
lease, 90 s on most."""

log = logging.getLogger(__name__)


@contextmanager
def sole_writer(root: Path, patience_s: float = PATIENCE_S) -> Iterator[str]:
    """Hold a folder for writing inside the block; yields a token that `still_owned` knows.

    The lock is an flock on `_owner.json`, not the file's existence: a killed holder needs no cleaning up, and two
    processes cannot both decide that a left-over file is stale. The file's text names the holder for the error
    message. It is removed on the way out.

    Args:
        patience_s: how long to wait, saying so, for a holder that is not a living process of this machine: on another
            one it may be dead, with a file server that does not know it yet.

    Raises:
        StoreError: another process holds it (named), or the folder cannot be written.
    """
    path = root / OWNER
    try:
        descriptor = _wait_for(path, patience_s)
    except BlockingIOError:
        raise StoreError(
            f"{root} is being written by {_holder(path)}. Wait until it is done, or stop it; "
            f"then run the command again. Nothing was changed."
        ) from None
    except OSError as error:
        raise StoreError(f"{root} cannot be locked for writing: {error}. Nothing was changed.") from error
    try:
        os.ftruncate(descriptor, 0)
        token = uuid.uuid4().hex
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "token": token}
        os.write(descriptor, json.dumps(owner).encode())
        yield token
    finally:
        with suppress(OSError):  # in a folder that became read-only it stays, and bars nobody
            path.unlink()
        os.close(descriptor)


def still_owned(root: Path, token: str) -> bool:
    """Tell whether the holder that was given `token` is still the last one.

    For its helper processes, which may outlive it by seconds when it is killed: they must not write into what the
    next holder is making.
    """
    return _owner(root / OWNER).get("token") == token


def _wait_for(path: Path, patience_s: float) -> int:
    """The lock; raises BlockingIOError where a living process holds it, or patience ends."""
    deadline, told = time.monotonic() + patience_s, False
    while True:
        try:
            return _lock(path)
        except BlockingIOError:
            if time.monotonic() >= deadline or _lives_here(_owner(path)):
                raise
        if not told:
            told = True
            log.warning(
                "%s is locked by %s. If that machine was lost, its lock ends by itself: waiting up to %d s",
                path.parent,
                _holder(path),
                patience_s,
            )
        time.sleep(min(0.5, patience_s / 10))


def _lives_here(owner: dict[str, object]) -> bool:
    """Whether a holder is a process of this machine that lives."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(int(str(owner["pid"])), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have unlinked the file between our open and our lock; then we hold nothing.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(path: Path) -> str:
    owner = _owner(path)
    return f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= set(owner) else "another process"


def _owner(path: Path) -> dict[str, object]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}
