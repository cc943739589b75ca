"""Files that are there whole or not at all: JSON read with distrust, text, Parquet tables."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsnet.errors import DataError, StoreError

if TYPE_CHECKING:  # imported where tables are made or read
    import pyarrow as pa

PARTIAL = ".partial"
"""End of the names of files and folders in the making."""
_LARGEST = 1 << 20


def read_json(path: Path, largest: int = _LARGEST) -> dict[str, Any]:
    """An object from a JSON file of at most so many bytes, 1 MiB if nothing is said.

    Raises:
        StoreError: it cannot be read, is no regular file, too large, not JSON or not an object.
    """
    try:
        facts = path.lstat()
        # A link may lead out of the store, a pipe or a device never ends.
        if not stat.S_ISREG(facts.st_mode):
            raise StoreError(f"{path} is a link, a pipe or a device, not a file of the store. Nothing of it was read.")
        size = facts.st_size
        if size > largest:
            raise StoreError(f"{path} has {size:,} bytes of metadata; {largest:,} is the most that is read.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}. The store is damaged.") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: {error}.") from error
    if not isinstance(values, dict):
        raise StoreError(f"{path} is damaged: it holds {type(values).__name__}, not an object.")
    return values


def replace_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as zarr writes its metadata. Raises OSError; the file is then as it was."""
    replace_text(path, json.dumps(values, indent=2))


def replace_text(path: Path, text: str) -> None:
    """Write a file so that the old or the new text is there whole. Raises OSError; the file is then as it was."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write a file under, which becomes `path` when the block ends well, on disk with its contents by then.

    Before that, and if the block raises, `path` is as it was. What a killed process leaves is `.NAME.partial` beside
    it, in part; the next writer of `path` takes that over. A link at `path` is replaced, not followed.

    Raises:
        OSError: the disk refused.
    """
    partial, descriptor = _temporary(path, folder=False)
    try:
        os.truncate(partial, 0)
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A name to make a folder under, as `whole` for a file; nothing, or an empty folder, may be at `path`.

    Raises:
        OSError: the disk refused, or by the end a folder with something in it is at `path` (ENOTEMPTY or EEXIST).
    """
    partial, descriptor = _temporary(path, folder=True)
    new = partial / path.name
    try:
        if new.exists():
            shutil.rmtree(new)
        yield new
        for folder, _, names in os.walk(new, topdown=False):
            for name in (*names, ""):
                sync(Path(folder, name))
        os.replace(new, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)
    sync(path.parent)


def _temporary(path: Path, folder: bool) -> tuple[Path, int]:
    """A file or folder beside `path` that nobody else writes, and the descriptor that says so as long as it is open.

    Its name is the same each time, so that what a killed process left is found without searching the folder, and it
    is locked (flock), so that the kernel tells the killed from the living. Beside a living writer, whose folder or
    file it would be, the name is one of its own.
    """
    for name in (f".{path.name}", f".{path.name}.{uuid.uuid4().hex}"):
        partial = path.parent / f"{name}{PARTIAL}"
        created = True
        try:
            partial.mkdir() if folder else partial.touch(exist_ok=False)
        except FileExistsError:
            created = False
        descriptor = os.open(partial, (os.O_RDONLY if folder else os.O_RDWR) | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A living writer may have renamed it between our open and our lock.
            if partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat()):
                break
        except BlockingIOError:
            pass
        except OSError:
            if created:  # in a file system without locks: who made it is alone
                break
        os.close(descriptor)
    return partial, descriptor


def clear_partials(folder: Path) -> None:
    """Remove what killed writers left in a folder; a living writer's file is locked and stays."""
    for partial in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()
            finally:
                os.close(descriptor)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk, so that they survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(path: Path) -> None:
    """Find out before hours of work whether a table can be written there. Raises DataError."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the name of a Parquet file. Nothing was computed.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror or error}. Nothing was computed.") from error


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table, whole or not at all. Raises DataError if the place cannot be written."""
    import pyarrow.parquet as pq

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            pq.write_table(table, partial, compression="zstd")
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror or error}. Nothing was left there.") from error


def read_table(path: Path) -> pa.Table:
    """Read a table. Raises DataError if there is none, or it is cut off."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from error
