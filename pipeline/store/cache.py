"""The folder of the mirrors of all stores in buckets, and which of their shards make room for others."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hsnet.errors import ConfigError
from pipeline.store.markers import shard_file

CACHE = "HSNET_CACHE"
CACHE_BYTES = "HSNET_CACHE_BYTES"
_KEPT_FREE = 1 << 30
"""Bytes of the cache's disk that are left free where no bound is given."""
_TOTAL = ".total"
_SPARE = 20
"""One part in so many of the bound may be removed beyond what must be."""


@dataclass(frozen=True, order=True)
class CachedShard:
    """A shard with files in the cache; in the order of last use."""

    used: float
    """Seconds since 1970."""
    nbytes: int
    folder: Path
    """Folder of its store's mirror."""
    number: int


def cache_folder() -> Path:
    """Where mirrors are: HSNET_CACHE, or ~/.cache/hsnet."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "hsnet")


def cache_bytes() -> int | None:
    """HSNET_CACHE_BYTES, such as 20GB; None if there is no bound. Raises ConfigError."""
    text = os.environ.get(CACHE_BYTES, "").strip()
    if not text:
        return None
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text)
    if not parts:
        raise ConfigError(f"{CACHE_BYTES} is '{text}', not a size such as 500MB or 20GB.")
    return int(float(parts[1]) * 1000 ** " kMGT".index(parts[2] or " "))


def cached_shards(cache: Path) -> list[CachedShard]:
    """All shards that are here, of all stores, the longest unused first."""
    shards = []
    for folder in cache.iterdir():
        sizes: dict[int, int] = {}
        for chunks in (folder / "store").glob("l*/c"):
            for name in (entry.name for entry in os.scandir(chunks) if entry.name.isdecimal()):
                with suppress(OSError):
                    size = shard_file(folder / "store", chunks.parent.name, int(name)).stat().st_size
                    sizes[int(name)] = sizes.get(int(name), 0) + size
        for number, size in sizes.items():
            with suppress(OSError):
                shards.append(CachedShard(use_lock(folder, number).stat().st_mtime, size, folder, number))
    return sorted(shards)


def make_room(cache: Path, needed: int) -> None:
    """Remove the shards that were not used for the longest, of any store, until `needed` bytes more may come.

    How much is here is counted up with every call, in a file that one process of the machine holds at a time, and never
    down: files that went otherwise, or never came, are noticed when the bound seems to be reached, and only then is the
    cache looked through. Some more is removed then than must be, so that this is seldom.
    """
    bound = cache_bytes()
    with locked(cache / _TOTAL):
        if bound is None:
            disk = shutil.disk_usage(cache)
            excess = needed + _KEPT_FREE - disk.free
            if excess > 0:
                _evict(cached_shards(cache), excess, disk.total // _SPARE)
            return
        total = _counted(cache)
        if total is None or total + needed > bound:
            shards = cached_shards(cache)
            total = sum(shard.nbytes for shard in shards)
            if total + needed > bound:
                total -= _evict(shards, total + needed - bound, bound // _SPARE)
        (cache / _TOTAL).write_text(str(total + needed), encoding="ascii")


def _counted(cache: Path) -> int | None:
    """Bytes here, or more than are; None if nobody has counted."""
    try:
        return int((cache / _TOTAL).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _evict(shards: Iterable[CachedShard], needed: int, spare: int) -> int:
    """Remove shards that nobody uses, in the order given; returns the bytes that were freed."""
    freed = 0
    for shard in shards:
        if freed >= needed and freed + shard.nbytes > needed + spare:
            break
        with locked(use_lock(shard.folder, shard.number), wait=False) as unused:
            if not unused:
                continue
            for chunks in (shard.folder / "store").glob("l*/c"):
                shard_file(shard.folder / "store", chunks.parent.name, shard.number).unlink(missing_ok=True)
        freed += shard.nbytes
    return freed


def use_lock(folder: Path, number: int) -> Path:
    """File that users of a shard lock, of a mirror's folder; its time says when the shard was last used."""
    return folder / "locks" / f"{number:06d}.use"


@contextmanager
def locked(path: Path, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold a file's lock, which the kernel drops when the process dies; False if it is held and not waited for."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)
