"""Read everything a store holds and say what is damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hsnet.errors import StoreError
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import marker_file, shard_file, sum_file
from pipeline.store.recompute import Recomputation

THREADS = min(8, os.cpu_count() or 1)
"""Shards read at a time. Copies and both checksums let go of Python's lock: two threads read 1.7 to 1.9 times as much
as one (2.1 to 3.7 GB/s from the page cache, two cores)."""


@dataclass(frozen=True)
class Damage:
    """One damaged file, or one damaged image in it."""

    shard: int
    array: str
    """Name of the array; empty if the marker is what cannot be used."""
    image: str
    """Image id; empty if no image of the file is affected, or no single one."""
    file: str
    reason: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    path: str
    shards: int
    missing: tuple[int, ...]
    """Shards that were never finished: no damage. `hsnet extract` makes them."""
    images: int
    """Images read."""
    bytes: int
    """Bytes read."""
    damage: tuple[Damage, ...]
    recomputed: Recomputation | None = None
    """Of `pipeline.store.recompute`, if it was asked for."""

    @property
    def damaged_shards(self) -> tuple[int, ...]:
        """Their numbers, ascending."""
        return tuple(sorted({one.shard for one in self.damage}))


def verify(
    store: FeatureStore,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
    threads: int = THREADS,
) -> Verification:
    """Compare every shard file with its marker's CRC-32, and every chunk with its crc32c.

    Args:
        on_shard: called with (shards done, shards) after each.
        threads: shards read at a time.

    A shard with a marker that cannot be used is damaged; one without any is missing.
    """
    damage: list[Damage] = []
    images = nbytes = 0
    missing = []
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        try:
            for number, found in enumerate(pool.map(lambda number: _look_at(store, number), range(store.shards))):
                if found is None:
                    missing.append(number)
                else:
                    damage += found
                if store.is_done(number):
                    images += len(store.images_in(number))
                    nbytes += store.facts(number).nbytes
                on_shard(number + 1, store.shards)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # interrupted: do not read the rest first
            raise
    return Verification(store.path, store.shards, tuple(missing), images, nbytes, tuple(damage))


def _look_at(store: FeatureStore, number: int) -> list[Damage] | None:
    """What is wrong with a shard; None if there is none."""
    if store.is_done(number):
        return _verify_shard(store, number)
    marker = marker_file(store.root, number)
    if not marker.exists():
        return None
    reason = "the marker is damaged, or an array file is absent or of another length"
    return [Damage(number, "", "", store.shown(marker), reason)]


def _verify_shard(store: FeatureStore, number: int) -> list[Damage]:
    facts = store.facts(number)
    found: list[Damage] = []
    for name, (size, checksum) in facts.files.items():
        file = shard_file(store.root, name, number)
        before = len(found)
        try:
            store.fetch_anew(number, name)
        except StoreError as error:
            found.append(Damage(number, name, "", store.shown(file), str(error)))
            continue
        for image in store.images_in(number):
            if store.index.images[image] in facts.skipped:
                continue
            try:
                store.read_chunk(name, image)
            except StoreError as error:
                found.append(
                    Damage(number, name, store.index.images[image], store.shown(file), str(error.__cause__ or error))
                )
        # What came from a bucket was compared as it came, and may be evicted by now.
        if len(found) == before and not store.remote and (reason := _difference(file, size, checksum)):
            found.append(Damage(number, name, "", store.shown(file), reason))
    return found


def _difference(file: Path, size: int, checksum: str) -> str:
    try:
        actual = sum_file(file)
    except OSError as error:
        return str(error)
    if actual == (size, checksum):
        return ""
    return f"it has {actual[0]} bytes and CRC-32 {actual[1]}, its marker says {size} and {checksum}"
