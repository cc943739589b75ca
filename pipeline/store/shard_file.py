"""Read and write shard files: a verified copy of a chunk from the mapped file, and back.

zarr takes milliseconds and two or three copies for a chunk; here one copy is made. Two layouts of a chunk are known:
plain little-endian values, and values compressed by zstd, each followed by its crc32c. `pipeline.store.arrays` refuses
any other before it gets here. zarr reads the same files, and would write the same bytes.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import stat
import sys
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from hsnet.errors import StoreError
from pipeline.common.files import whole

MOST_MAPPED = 1 << 14
"""Files mapped at a time, at most: the kernel allows a process 65,530 maps, libraries included."""
SHARE_OF_FILES = 4
"""A store takes one in so many of the files that the process may have open: several may be open, and other things."""

_PIECE = 1 << 20
"""Bytes copied, then summed while they are still in the processor's cache. Below about 1 MB the C library's copy reads
the destination first, which takes twice as long for images larger than the cache."""

_POPULATE_READ = getattr(mmap, "MADV_POPULATE_READ", 22)
"""Linux 5.14: bring pages in, and report a disk's failure as an error instead of a signal that ends the process."""

_ABSENT = (1 << 64) - 1
_CRC = 4


def mapped_files(files: int) -> int:
    """How many of a store's files may stay mapped; each takes a descriptor.

    That is all of them where the limit of open files allows it (`ulimit -n`, often 1,024). The soft limit is raised for
    that, as far as needed and as the hard one lets it: nothing here waits for files by `select`, which is what the soft
    limit protects. Where it cannot be raised, a quarter of the limit is taken, and the files take turns.
    """
    wanted = min(files, MOST_MAPPED)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    needed = SHARE_OF_FILES * wanted if hard == resource.RLIM_INFINITY else min(hard, SHARE_OF_FILES * wanted)
    if soft < needed:
        with suppress(ValueError, OSError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
            soft = needed
    return max(1, min(wanted, soft // SHARE_OF_FILES))


class OpenShards:
    """Shard files that are mapped, the least recently used given up first. Safe in several threads.

    Where the process has no descriptor left, files are given up before another is mapped.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: OrderedDict[str, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str, chunks: int) -> _Shard:
        """The shard that lies at `path` now: one that was replaced or changed since it was mapped is mapped again.

        `path` is absolute and leads over no link.
        While a file is mapped its inode number is not given to another, so comparing it cannot be fooled.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: it is a link, is not a shard of so many chunks, or its index is damaged.
        """
        identity = _identity(os.stat(path))
        with self._lock:
            shard = self._open.get(path)
            if shard is not None and shard.identity == identity:
                self._open.move_to_end(path)
                return shard
        shard = self._map(path, chunks)
        with self._lock:
            self._open[path] = shard
            self._open.move_to_end(path)
            while len(self._open) > self._most:
                self._open.popitem(last=False)  # unmapped when its last reader is done
        return shard

    def _map(self, path: str, chunks: int) -> _Shard:
        while True:
            try:
                return _map(path, chunks)
            except OSError as error:
                with self._lock:
                    if error.errno != errno.EMFILE or not self._open:
                        raise
                    for _ in range(-(-len(self._open) // 2)):
                        self._open.popitem(last=False)

    def __len__(self) -> int:
        return len(self._open)


@dataclass(frozen=True)
class _Shard:
    identity: tuple[int, ...]
    mapped: mmap.mmap
    data: NDArray[np.uint8]
    """All bytes of the file before its index."""
    entries: list[list[int]]
    """(offset, bytes) of every chunk."""


class ChunkReader:
    """Reads one array of a store, one image (inner chunk) at a time."""

    def __init__(self, file: Callable[[int], Path], shard_images: int, compressed: bool, shards: OpenShards) -> None:
        self._file = file
        self._paths: dict[int, str] = {}
        self._shard_images = shard_images
        self._compressed = compressed
        self._shards = shards
        self._finite: dict[int, int] = {}

    def read(self, image: int, out: NDArray[Any]) -> None:
        """Fill `out`, the C-ordered array of one image.

        Raises:
            ValueError, OSError, RuntimeError: the chunk is absent or damaged, or holds NaN or infinity. What `out`
                holds then must not be used.
        """
        number, row = divmod(image, self._shard_images)
        path = self._paths.get(number) or self._paths.setdefault(number, str(self._file(number)))
        shard = self._shards.get(path, self._shard_images)
        start, length = shard.entries[row]
        if start == length == _ABSENT:
            raise ValueError("the chunk is not there")
        expected = out.nbytes + _CRC
        fits = length <= expected + expected // 128 + 1024 if self._compressed else length == expected
        if not fits or length <= _CRC or start + length > len(shard.data):
            raise ValueError(f"the shard's index places {length} bytes at {start}, a chunk has {expected}")
        _populate(shard.mapped, start, length)
        stored = int.from_bytes(shard.data[start + length - _CRC : start + length].tobytes(), "little")
        chunk = shard.data[start : start + length - _CRC]
        values = out.reshape(-1)
        if self._compressed:
            if google_crc32c.value(chunk) != stored:
                raise ValueError("its checksum does not match")
            _expand(chunk, values.view(np.uint8))
            return
        unknown = values.dtype.kind == "f" and self._finite.get(image) != stored
        checksum, finite = _copy(chunk, values.view(np.uint8), values.dtype if unknown else None)
        if checksum != stored:
            raise ValueError("its checksum does not match")
        if not finite:
            raise ValueError("it holds NaN or infinity")
        if unknown:
            self._finite[image] = stored


def read_small_array(path: Path, nbytes: int) -> NDArray[np.uint8]:
    """The bytes of an array in one chunk: compressed by zstd, then its crc32c.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError, RuntimeError: it is damaged, or unpacks to another size; memory is taken only after that is known.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        most = nbytes + nbytes // 128 + 1024 + _CRC
        if not stat.S_ISREG(status.st_mode) or not _CRC < status.st_size <= most:
            raise ValueError(f"{path} is no file of at most {most} bytes")
        data = np.frombuffer(file.read(status.st_size), np.uint8)
    if google_crc32c.value(data[:-_CRC]) != int.from_bytes(data[-_CRC:].tobytes(), "little"):
        raise ValueError("its checksum does not match")
    _require_length(data[:-_CRC], nbytes)
    out = np.empty(nbytes, np.uint8)
    _expand(data[:-_CRC], out)
    return out


def write_shard_file(path: Path, values: NDArray[Any], shard_images: int, level: int | None) -> tuple[int, str]:
    """Write a whole shard as zarr would, to the byte; it is there whole or not at all.

    Args:
        values: (n, ...) the shard's images, n at most `shard_images`.
        level: of zstd; None does not compress.

    Returns:
        (bytes, CRC-32 as 8 hex digits) of the file.

    Raises:
        OSError: the disk refused. Nothing is at `path` then that was not there before.
    """
    values = np.ascontiguousarray(values)
    entries = np.full((shard_images, 2), _ABSENT, "<u8")
    path.parent.mkdir(parents=True, exist_ok=True)
    size = checksum = 0
    with whole(path) as partial, partial.open("wb") as file:

        def write(data: Any) -> None:
            nonlocal size, checksum
            file.write(data)
            checksum = zlib.crc32(data, checksum)
            size += len(data)

        for row, image in enumerate(values):
            flat = image.reshape(-1).view(np.uint8)
            chunk = flat if level is None else np.frombuffer(zstd.compress(flat, level, False), np.uint8)
            entries[row] = size, len(chunk) + _CRC
            write(chunk)
            write(google_crc32c.value(chunk).to_bytes(_CRC, "little"))
        index = entries.tobytes()
        write(index)
        write(google_crc32c.value(index).to_bytes(_CRC, "little"))
    return size, f"{checksum:08x}"


def require_little_endian() -> None:
    """Raises StoreError on a machine that cannot read or write shards: values are copied as they lie in the file."""
    if sys.byteorder != "little":
        raise StoreError(
            "Feature stores hold little-endian values and are read and written on little-endian machines only (x86-64, "
            "ARM64 and nearly all others); this one is big-endian. Nothing was read or written."
        )


def _map(path: str, chunks: int) -> _Shard:
    if os.path.realpath(path) != path:
        raise ValueError(f"the file lies outside of the store, at {os.path.realpath(path)}")
    # Not waiting: opening a pipe would, for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        footer = 16 * chunks + _CRC
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a file")
        if status.st_size < footer:
            raise ValueError(f"the file has {status.st_size} bytes, its index alone takes {footer}")
        index = os.pread(descriptor, footer, status.st_size - footer)
        if google_crc32c.value(index[:-_CRC]) != int.from_bytes(index[-_CRC:], "little"):
            raise ValueError("the checksum of the shard's index does not match")
        mapped = mmap.mmap(descriptor, status.st_size, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    data = np.frombuffer(mapped, np.uint8, status.st_size - footer)
    entries = np.frombuffer(index[:-_CRC], "<u8").reshape(chunks, 2).tolist()
    return _Shard(_identity(status), mapped, data, entries)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _populate(mapped: mmap.mmap, start: int, length: int) -> None:
    first = start - start % mmap.PAGESIZE
    try:
        mapped.madvise(_POPULATE_READ, first, start + length - first)
    except OSError as error:
        if error.errno != errno.EINVAL:  # an older kernel: pages come in when they are touched
            raise


def _copy(chunk: NDArray[np.uint8], out: NDArray[np.uint8], floats: np.dtype | None) -> tuple[int, bool]:
    """Copy; returns the crc32c of what arrived, and whether all of it is finite if it is `floats`."""
    checksum, finite = 0, True
    for start in range(0, len(out), _PIECE):
        piece = out[start : start + _PIECE]
        piece[:] = chunk[start : start + _PIECE]
        checksum = google_crc32c.extend(checksum, piece)
        if floats is not None:
            finite = finite and _all_finite(piece.view(floats))
    return checksum, finite


def _all_finite(values: NDArray[Any]) -> bool:
    """Twice as fast as numpy.isfinite: as integers, numbers of one sign are in order and infinity ends them."""
    bits = np.dtype(f"u{values.itemsize}"), np.dtype(f"i{values.itemsize}")
    infinity = int(np.array(np.inf, values.dtype).view(bits[0]))
    sign = 1 << (8 * values.itemsize - 1)
    return int(values.view(bits[1]).max()) < infinity and int(values.view(bits[0]).max()) < infinity + sign


def _expand(chunk: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    _require_length(chunk, len(out))
    zstd.decompress(chunk, out)


def _require_length(chunk: NDArray[np.uint8], nbytes: int) -> None:
    # A frame says how long its content is. Asked before anything is unpacked: a few bytes may stand for gigabytes.
    length = _content_length(chunk[:18].tobytes())
    if length != nbytes:
        raise ValueError(f"it unpacks to {length} bytes, a chunk has {nbytes}")


def _content_length(frame: bytes) -> int | None:
    """What the header of a zstd frame (RFC 8878, 3.1.1.1) says; None if it does not."""
    if frame[:4] != b"\x28\xb5\x2f\xfd" or len(frame) < 6:
        return None
    descriptor = frame[4]
    single, dictionary = descriptor >> 5 & 1, (0, 1, 2, 4)[descriptor & 3]
    size = (single, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single) + dictionary
    if not size or len(frame) < start + size:
        return None
    return int.from_bytes(frame[start : start + size], "little") + (256 if size == 2 else 0)
