"""The small JSON files of a store: read with distrust, replaced whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsnet.errors import StoreError

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
