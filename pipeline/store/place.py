"""Where a store is, told from a path or an address: a folder (`local_place`) or a bucket with its mirror (`mirror`)."""

from __future__ import annotations

from pathlib import Path

from pipeline.store.bucket import address, local_path
from pipeline.store.local_place import Place
from pipeline.store.mirror import Mirror


def place_of(path: str | Path | Place) -> Place:
    """The place of a path or an address; one that is given stays the same. Raises ConfigError, StoreError."""
    if isinstance(path, Place):
        return path
    url = address(path)
    if url is None:
        return Place(local_path(path))
    return Mirror(url)
