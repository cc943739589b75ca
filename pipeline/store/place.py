"""Where a store is: a folder of this machine, or a bucket's mirror."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.common import lock
from pipeline.store.lease import sole_remote_writer
from pipeline.store.mirror import mirror_at


@contextmanager
def sole_writer(root: Path) -> Iterator[str]:
    """Hold a store's folder for writing inside the block; yields a token that `still_owned` knows.

    The folder of an object store's mirror is held by a lease in the bucket (`pipeline.store.lease`); its metadata are
    then as they are there.

    Raises:
        StoreError: another process holds it (named), or the folder cannot be written.
    """
    mirror = mirror_at(root)
    if mirror is None:
        with lock.sole_writer(root) as token:
            yield token
        return
    with sole_remote_writer(mirror.bucket) as token:
        mirror.sync()
        with mirror.writing_metadata():
            yield token


def still_owned(root: Path, token: str) -> bool:
    """Whether the holder that was given `token` is still the last one, see `pipeline.common.lock.still_owned`."""
    mirror = mirror_at(root)
    return lock.still_owned(root, token) if mirror is None else mirror.owned(token)
