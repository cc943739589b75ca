"""One writer per store: a lock that the kernel drops when its holder dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hsnet.errors import StoreError

OWNER = "_owner.json"


@contextmanager
def sole_writer(root: Path) -> Iterator[None]:
    """Hold a store for writing inside the block.

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
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
