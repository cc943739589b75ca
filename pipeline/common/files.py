"""Files that are there whole or not at all: JSON read with distrust, text, Parquet tables."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsnet.errors import DataError, StoreError

if TYPE_CHECKING:  # imported where tables are made or read
    import pyarrow as pa

_LARGEST = 1 << 20


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file of at most 1 MiB.

    Raises:
        StoreError: it cannot be read, is no regular file, too large, not JSON or not an object.
    """
    try:
        facts = path.lstat()
        # A link may lead out of the store, a pipe or a device never ends.
        if not stat.S_ISREG(facts.st_mode):
            raise StoreError(f"{path} is a link, a pipe or a device, not a file of the store. Nothing of it was read.")
        size = facts.st_size
        if size > _LARGEST:
            raise StoreError(f"{path} has {size:,} bytes of metadata; {_LARGEST:,} is the most that is read.")
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
    """Write a file so that the old or the new text is there whole, even through a power cut. Raises OSError."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Force the names in a folder to disk, so that a rename survives a power cut."""
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

    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, part, compression="zstd")
        os.replace(part, path)
    except OSError as error:
        if part.is_file():
            part.unlink()
        raise DataError(f"Cannot write {path}: {error.strerror or error}. Nothing was left there.") from error


def read_table(path: Path) -> pa.Table:
    """Read a table. Raises DataError if there is none, or it is cut off."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from error
