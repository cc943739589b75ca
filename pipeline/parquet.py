"""Parquet files that are there whole or not at all, with errors that name the place."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hsnet.errors import DataError

if TYPE_CHECKING:  # imported where tables are made or read
    import pyarrow as pa


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
