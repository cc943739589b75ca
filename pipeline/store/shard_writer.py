"""Write a whole shard under a store's folder: its array files first, its marker last."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hsnet.errors import StoreError
from pipeline.common.files import sync
from pipeline.store.arrays import ZSTD_LEVEL, ArrayLayout
from pipeline.store.markers import ShardFacts, remove_shard, shard_file, write_marker
from pipeline.store.shard_file import write_shard_file


def write_whole_shard(
    root: Path, layouts: Sequence[ArrayLayout], arrays: Sequence[NDArray[Any]], facts: ShardFacts
) -> ShardFacts:
    """Write the files of a shard and commit it; whatever was there of it is deleted first.

    Args:
        arrays: (n, ...) the shard's images, one per layout.
        facts: what its marker is to say, but for the files.

    Returns:
        The facts with the files.

    Raises:
        StoreError: the disk refused (full, read-only); says how much was needed and is free. The shard then counts as
            missing, all others are as they were.
    """
    number, names = facts.number, tuple(layout.name for layout in layouts)
    try:
        remove_shard(root, number, names)
        files = {}
        for layout, values in zip(layouts, arrays, strict=True):
            path = shard_file(root, layout.name, number)
            level = ZSTD_LEVEL if layout.compressed else None
            files[layout.name] = write_shard_file(path, values, layout.shard_images, level)
        for name in names:
            sync(shard_file(root, name, number).parent)
        facts = replace(facts, files=files)
        write_marker(root, facts)
    except OSError as error:
        needed, free = sum(array.nbytes for array in arrays), shutil.disk_usage(root).free
        advice = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Mend the cause"
        with suppress(OSError):  # In a read-only folder it stays; without a marker it counts for nothing.
            remove_shard(root, number, names)
        raise StoreError(
            f"Shard {number} of {root} could not be written: {error}. It takes {needed:,} bytes, {free:,} are "
            f"free there. {advice} and run the same `hsnet extract` again: complete shards are kept."
        ) from error
    return facts
