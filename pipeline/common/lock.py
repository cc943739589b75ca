"""One writer per store or run directory: a lock that the kernel drops when its holder dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hsnet.errors import StoreError

OWNER = "_owner.json"


@contextmanager
def sole_writer(root: Path) -> Iterator[str]:
    """Hold a folder for writing inside the block; yields a token that `still_owned` knows.

    The lock is an flock on `_owner.json`, not the file's existence: a killed holder needs no cleaning up, and two
    processes cannot both decide that a left-over file is stale. The file's text names the holder for the error
    message. It is removed on the way out.

    Raises:
        StoreError: another process holds it (named), or the folder cannot be written.
    """
    path = root / OWNER
    try:
        descriptor = _lock(path)
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
