"""Where a store is: in a folder of this machine, or in a bucket, of which a folder of this machine is the mirror.

Everything else works on the files under `root` and says here when it needs files, has changed some or wants to write.
Who may write a store is decided here, too: one process, which holds `sole_writer`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.common import lock
from pipeline.store.markers import ShardFacts, StoredFile, break_seal, remove_shard

ROOT = "zarr.json"


class Place:
    """A folder of this machine: its files are the store. `pipeline.store.mirror.Mirror` is the place of a bucket's.

    Every method may raise StoreError: another process writes the store, or a disk or a server refuses.
    """

    remote = False
    """Whether the store is in an object store, and only mirrored on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = str(root)
        """What people and other processes call it."""

    def exists(self) -> bool:
        """Whether a store, finished or not, is there."""
        return (self.root / ROOT).is_file()

    def is_free(self) -> bool:
        """Whether nothing is there yet, or an empty folder."""
        return not self.root.exists() or (self.root.is_dir() and not any(self.root.iterdir()))

    @property
    def bytes_free(self) -> int | None:
        """Bytes that may still be written there; None if nobody knows."""
        root = self.root.absolute()
        return shutil.disk_usage(next(folder for folder in (root, *root.parents) if folder.exists())).free

    def create(self, build: Callable[[Path], None]) -> None:
        """Have a store's skeleton built where there is none; what else is there is left alone. Raises OSError, too."""
        if self.is_free():
            build(self.root)

    def sync(self) -> None:
        """Bring metadata under `root` up to date."""

    def sync_markers(self) -> None:
        """Bring all markers under `root` up to date."""

    def fetch_marker(self, number: int) -> None:
        """Bring one marker up to date."""

    @contextmanager
    def present(self, files: Iterable[StoredFile]) -> Iterator[None]:
        """Inside the block these shard files are under `root`."""
        yield

    def fetch_anew(self, files: Collection[StoredFile]) -> None:
        """Have files under `root` that are certainly those of the store."""

    @contextmanager
    def sole_writer(self) -> Iterator[str]:
        """Hold the store for writing inside the block; yields a token that `still_owned` knows."""
        with lock.sole_writer(self.root) as token:
            yield token

    def still_owned(self, token: str) -> bool:
        """Whether the writer that was given `token` is still the last one, see `pipeline.common.lock.still_owned`."""
        return lock.still_owned(self.root, token)

    def publish(self) -> None:
        """Metadata under `root` were changed."""

    @contextmanager
    def writing_shard(self, number: int, nbytes: int) -> Iterator[None]:
        """Inside the block a shard of so many bytes is written under `root`; it ends with `commit`."""
        yield

    def commit(self, facts: ShardFacts, token: str | None) -> None:
        """A shard is written, its marker too. A `token` that is no longer the last writer's must not commit."""

    def absent(self, files: Iterable[StoredFile]) -> set[int]:
        """Shards with a marker under `root` of which a file is not in the store."""
        return set()  # markers are read beside the files

    def break_seal(self) -> None:
        """Remove the summary of all markers, before anything is changed. Raises OSError, too."""
        break_seal(self.root)

    def publish_seal(self) -> None:
        """The summary under `root` was written."""

    def remove_shard(self, number: int, arrays: tuple[str, ...]) -> None:
        """Delete what there is of a shard, its marker first."""
        remove_shard(self.root, number, arrays)

    def remove_arrays(self, names: Iterable[str]) -> None:
        """Delete small arrays; one that is not there is no error."""
        for name in names:
            shutil.rmtree(self.root / name, ignore_errors=True)

    def shown(self, file: Path) -> str:
        """A file under `root` for people."""
        return str(file)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors raised inside the block call the store by its name."""
        yield
