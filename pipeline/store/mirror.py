"""A store in an object store, mirrored in a folder of this machine, so that all else works on local files.

    HSNET_CACHE/<name>-<digest of the address>/
      store/       metadata and markers, as they were at the last opening; shard files, as far as they were asked for
      etags.json   which version of every object the metadata and markers are
      locks/       files that processes of this machine lock; the time of a shard's says when it was last used
      partial/     downloads in the making

The bucket is the truth. What is trusted here: a shard file stands only beside the marker that it was checked against
(bytes and CRC-32); another marker comes, and the shard's files go first. Writing is the same turned around: files are
written here as on any disk, then uploaded, the marker last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hsnet.errors import ConfigError, HSNetError, StoreError
from pipeline.store.bucket import Bucket, Entry, address, local_path
from pipeline.store.lease import OWNER, holds
from pipeline.store.markers import MARKERS, marker_file, shard_file, sum_file

CACHE = "HSNET_CACHE"
CACHE_BYTES = "HSNET_CACHE_BYTES"
ROOT = "zarr.json"
TRIES = 3
"""Downloads of a shard file that arrives damaged, before it is taken for damaged there."""
PIECE = 16 << 20
"""Bytes of one request."""
PARALLEL = 8
"""Requests at a time of one process."""
_LARGEST = 256 << 20
_ABANDONED_S = 3600.0
_KEPT_FREE = 1 << 30
"""Bytes of the cache's disk that are left free where no bound is given."""
_ARRAY = re.compile(r"level\d{1,2}|label")
_METADATA = re.compile(rf"index(-\d{{1,9}})?|row-\d{{1,9}}|codec|{MARKERS}")
_DATA = re.compile(rf"({_ARRAY.pattern})/c/(\d{{1,9}})/[0/]+")
_MARKER = re.compile(rf"{MARKERS}/(\d{{6,9}})\.json")


@dataclass(frozen=True)
class Wanted:
    """One shard file, and what its marker says of it."""

    array: str
    number: int
    size: int
    checksum: str
    """CRC-32, 8 hex digits."""


class Mirror:
    """The local folder of one address. Safe in several threads and processes.

    Raises:
        StoreError: the bucket refuses or cannot be reached, or the cache's disk does.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.bucket = Bucket(url)
        name = hashlib.sha256(f"{url}\n{self.bucket.endpoint}".encode()).hexdigest()[:16]
        # Resolved: files are read only where they are without any link.
        self.folder = cache_folder().resolve() / f"{url.rpartition('/')[2][:60]}-{name}"
        self.root = self.folder / "store"
        try:
            for part in (self.root, self.folder / "locks", self.folder / "partial"):
                part.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be used as a cache: {error}. Set {CACHE} to a folder.") from None
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="mirror")
        self._sweep()

    # -- metadata and markers ----------------------------------------------------------------------------------

    def sync(self) -> bool:
        """Bring metadata and markers here as they are in the bucket now; whether there is a store."""
        with self._lock("sync"):
            # The root is read first: what it names was uploaded before it.
            root = self._fetch(ROOT)
            if root is None:
                with self._lock("metadata", wait=False) as free:
                    if free:
                        (self.root / ROOT).unlink(missing_ok=True)
                return False
            found = self._list()
            known = self._etags()
            # While a process of this machine writes, its metadata here may be ahead of the bucket's.
            with self._lock("metadata", wait=False) as free:
                changed = [key for key, entry in found.items() if not self._current(key, entry, known)]
                changed = [key for key in changed if key != ROOT and (free or _MARKER.fullmatch(key))]
                for key, data in zip(changed, self._pool.map(self._fetch, changed), strict=True):
                    if data is not None:
                        self._place(key, data)
                if free or not (self.root / ROOT).exists():
                    self._place(ROOT, root)
            for path in (self.root / MARKERS).glob("*.json"):
                if f"{MARKERS}/{path.name}" not in found:
                    self._forget(int(path.stem))
            self._write_etags({key: entry.etag for key, entry in found.items() if (self.root / key).is_file()})
        return True

    def fetch_marker(self, number: int) -> None:
        """Bring one marker here as it is in the bucket now, or remove it here if it is not there."""
        key = f"{MARKERS}/{marker_file(self.root, number).name}"
        data = self._fetch(key)
        with self._lock("sync"):
            if data is None:
                self._forget(number)
            elif not self._holds(key, data):
                self._place(key, data)

    def foreign(self) -> list[str]:
        """Names at the address that no store has, some of them."""
        folders, objects = self.bucket.children()
        names = [name for name in (*folders, *objects) if name != ROOT and not name.startswith("_owner.")]
        return [name for name in names if not _ARRAY.fullmatch(name) and not _METADATA.fullmatch(name)]

    def clear(self) -> None:
        """Empty the folder of metadata, markers and shards. The bucket is not touched."""
        with self._lock("sync"):
            old = self.folder / "partial" / f"{os.getpid()}-{uuid.uuid4().hex}"
            os.rename(self.root, old)
            self.root.mkdir(mode=0o700)
            (self.folder / "etags.json").unlink(missing_ok=True)
            shutil.rmtree(old)

    def require_free(self) -> None:
        """Raises StoreError if something else than a store, or than remains of one, is at the address."""
        names = self.foreign()
        if names:
            raise StoreError(
                f"{self.url} is not a feature store: it has no {ROOT}, but '{names[0]}'. Give the address of a store "
                f"made by `hsnet extract`, or a new one to make one. Nothing was changed."
            )

    def named(self, text: str) -> str:
        """A text that names the address where it names the local folder."""
        return text.replace(str(self.root), self.url)

    @contextmanager
    def writing_metadata(self) -> Iterator[None]:
        """Keep other processes of this machine from replacing the metadata here by the bucket's."""
        with self._lock("metadata"):
            yield

    def publish(self) -> None:
        """Upload the metadata that changed here, the group's own last: nothing counts before it is there."""
        with self._lock("sync"):
            known, there = self._etags(), self._list()
            keys = sorted(
                path.relative_to(self.root).as_posix()
                for path in self.root.rglob("*")
                if path.is_file() and not path.name.endswith(".partial")
            )
            keys = [key for key in keys if not _DATA.fullmatch(key) and not _MARKER.fullmatch(key) and key != OWNER]
            changed = [key for key in keys if key not in there or not self._current(key, there[key], known)]
            for key in sorted(changed, key=lambda key: key == ROOT):
                self.bucket.put(key, (self.root / key).read_bytes())

    def _list(self) -> dict[str, Entry]:
        """Metadata and markers in the bucket, without their sizes counting: shards are not listed."""
        folders, found = self.bucket.children()
        for folder in folders:
            if _ARRAY.fullmatch(folder):
                entry = self.bucket.head(f"{folder}/zarr.json")
                found |= {f"{folder}/zarr.json": entry} if entry else {}
            elif _METADATA.fullmatch(folder):
                found |= {
                    key: entry for key, entry in self.bucket.objects(folder).items() if key.startswith(f"{folder}/")
                }
        return {key: entry for key, entry in found.items() if key == ROOT or "/" in key}

    def _fetch(self, key: str) -> bytes | None:
        try:
            return self.bucket.get(key, _LARGEST)
        except FileNotFoundError:
            return None

    def _current(self, key: str, entry: Entry, known: Mapping[str, list[object]]) -> bool:
        """Whether the file here is the object there: as it was placed, of a version that is still the one."""
        try:
            data = (self.root / key).read_bytes()
        except OSError:
            return False
        # The etag of a small object usually is its MD5; nothing depends on it.
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return entry.etag.strip('"') == digest or known.get(key) == [entry.etag, zlib.crc32(data)]

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return (self.root / key).read_bytes() == data
        except OSError:
            return False

    def _place(self, key: str, data: bytes) -> None:
        """Put an object's bytes in their place, whole; a shard's files go before another marker comes."""
        if found := _MARKER.fullmatch(key):
            self._forget(int(found[1]))
        path, partial = self.root / key, self._partial()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError as error:
            raise self._disk(error) from None

    def _forget(self, number: int) -> None:
        """Remove a marker here, after the files that it vouched for."""
        if marker_file(self.root, number).exists() or self._files(number):
            with self._lock(f"{number:06d}.fetch"):
                for path in self._files(number):
                    path.unlink(missing_ok=True)
                marker_file(self.root, number).unlink(missing_ok=True)

    def _files(self, number: int) -> list[Path]:
        """Shard files that are here."""
        arrays = [path.name for path in self.root.iterdir() if _ARRAY.fullmatch(path.name)]
        return [path for array in arrays if (path := shard_file(self.root, array, number)).is_file()]

    def _etags(self) -> dict[str, list[object]]:
        try:
            values = json.loads((self.folder / "etags.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def _write_etags(self, etags: Mapping[str, str]) -> None:
        known = {key: [etag, zlib.crc32((self.root / key).read_bytes())] for key, etag in etags.items()}
        partial = self._partial()
        partial.write_text(json.dumps(known), encoding="utf-8")
        os.replace(partial, self.folder / "etags.json")

    # -- reading shards ----------------------------------------------------------------------------------------

    @contextmanager
    def present(self, wanted: Collection[Wanted]) -> Iterator[None]:
        """Inside the block these shard files are here, whole, and are not evicted.

        Raises:
            StoreError: one is not in the bucket, or arrives damaged every time: names it.
        """
        with ExitStack() as stack:
            for number in sorted({one.number for one in wanted}):
                stack.enter_context(self._use(number))
            missing: dict[int, list[Wanted]] = {}
            for one in wanted:
                if not self._here(one):
                    missing.setdefault(one.number, []).append(one)
            if missing:
                self._download(missing)
            yield

    def discard(self, wanted: Iterable[Wanted]) -> None:
        """Throw shard files away: what is read next comes from the bucket."""
        for one in wanted:
            with self._lock(f"{one.number:06d}.fetch"):
                shard_file(self.root, one.array, one.number).unlink(missing_ok=True)

    def _here(self, one: Wanted) -> bool:
        try:
            return shard_file(self.root, one.array, one.number).stat().st_size == one.size
        except OSError:
            return False

    def _download(self, missing: Mapping[int, Sequence[Wanted]]) -> None:
        """Fetch files, the pieces of all of them at once. Each shard is locked: processes do not fetch it twice.

        Locks are taken in the order of the shards, and who holds one waits for nothing else.
        """
        with ExitStack() as stack:
            for number in sorted(missing):
                stack.enter_context(self._lock(f"{number:06d}.fetch"))
            files = [one for part in missing.values() for one in part if not self._here(one)]
            self._make_room(sum(one.size for one in files))
            for attempt in range(TRIES):
                files = self._try(files, last=attempt + 1 == TRIES)

    def _try(self, files: Sequence[Wanted], last: bool) -> list[Wanted]:
        """One download of each; those that arrived damaged."""
        partials = [self._partial() for _ in files]
        damaged = []
        try:
            with ExitStack() as stack:
                pieces = []
                for one, partial in zip(files, partials, strict=True):
                    file = stack.enter_context(partial.open("wb"))
                    starts = range(0, one.size, PIECE)
                    pieces.append([self._pool.submit(self._piece, one, start, file.fileno()) for start in starts])
                try:
                    for part in pieces:
                        for future in part:
                            future.result()
                finally:  # nobody may write into a file that is closed
                    for part in pieces:
                        for future in part:
                            future.cancel() or future.exception()
            for one, partial in zip(files, partials, strict=True):
                found = sum_file(partial)
                if found == (one.size, one.checksum):
                    path = shard_file(self.root, one.array, one.number)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(partial, path)
                elif last:
                    raise self.damage(one, f"it has {found[0]} bytes and CRC-32 {found[1]}, its marker says")
                else:
                    damaged.append(one)
        except OSError as error:
            raise self._disk(error) from None
        finally:
            for partial in partials:
                partial.unlink(missing_ok=True)
        return damaged

    def _piece(self, one: Wanted, start: int, descriptor: int) -> None:
        try:
            data = self.bucket.get_range(self.key(one), start, min(start + PIECE, one.size))
        except FileNotFoundError:
            raise self.damage(one, "it is not there, its marker says") from None
        os.pwrite(descriptor, data, start)

    def key(self, one: Wanted) -> str:
        """Name of a shard file's object."""
        return shard_file(self.root, one.array, one.number).relative_to(self.root).as_posix()

    def damage(self, one: Wanted, what: str) -> StoreError:
        """The error of an object that is not what its marker says."""
        return StoreError(
            f"{self.url}: array '{one.array}' is damaged in shard {one.number} (object {self.key(one)}): {what} "
            f"{one.size} bytes and CRC-32 {one.checksum}. Nothing of it was used. `hsnet store repair` makes this "
            f"shard anew."
        )

    # -- writing shards ----------------------------------------------------------------------------------------

    @contextmanager
    def remaking(self, number: int, nbytes: int) -> Iterator[None]:
        """A shard is written here inside the block: its marker in the bucket goes first, nothing of it is evicted."""
        self._make_room(nbytes)
        with self._use(number):
            self.bucket.delete([f"{MARKERS}/{marker_file(self.root, number).name}"])
            yield

    def upload(self, number: int, files: Iterable[Wanted], token: str | None = None) -> None:
        """Upload a shard that is written here, its marker last.

        Args:
            token: of the store's writer; who is it no more must not commit.

        Raises:
            StoreError: the bucket refuses, or another writer has the store. The shard then counts as missing.
        """
        for done in [self._pool.submit(self.bucket.put, self.key(one), self._path(one)) for one in files]:
            done.result()
        if token is not None and not self.owned(token):
            raise StoreError(f"{self.url} is being written by another run now. This one stopped.")
        marker = marker_file(self.root, number)
        self.bucket.put(f"{MARKERS}/{marker.name}", marker.read_bytes())

    def remove(self, number: int, arrays: Iterable[str]) -> None:
        """Delete what there is of a shard in the bucket, its marker first."""
        self.bucket.delete([f"{MARKERS}/{marker_file(self.root, number).name}"])
        self.bucket.delete([self.key(Wanted(array, number, 0, "")) for array in arrays])

    def absent(self, wanted: Iterable[Wanted]) -> set[int]:
        """Shards whose objects are not there, or of another length than their marker says."""
        wanted = list(wanted)
        arrays = sorted({one.array for one in wanted})
        found = {key: entry for array in arrays for key, entry in self.bucket.objects(f"{array}/c").items()}
        return {one.number for one in wanted if (key := self.key(one)) not in found or found[key].size != one.size}

    def owned(self, token: str) -> bool:
        """Whether the holder that was given `token` is still the store's last writer."""
        return holds(self.bucket, token)

    def _path(self, one: Wanted) -> Path:
        return shard_file(self.root, one.array, one.number)

    # -- the folder --------------------------------------------------------------------------------------------

    def _make_room(self, needed: int) -> None:
        """Evict the shards of the cache that were not used for the longest, of this and other stores."""
        bound = cache_bytes()
        cached: list[tuple[float, int, Path, int]] | None = None
        used = 0
        if bound is not None:
            cached = _cached(self.folder.parent)
            used = sum(size for _, size, _, _ in cached)
        excess = (
            used + needed - bound if bound is not None else needed + _KEPT_FREE - shutil.disk_usage(self.folder).free
        )
        if excess <= 0:
            return
        for _, size, folder, number in sorted(cached if cached is not None else _cached(self.folder.parent)):
            with _locked(folder / "locks" / f"{number:06d}.use", wait=False) as free:
                if not free:
                    continue
                for chunks in (folder / "store").glob("l*/c"):
                    shard_file(folder / "store", chunks.parent.name, number).unlink(missing_ok=True)
            excess -= size
            if excess <= 0:
                return

    @contextmanager
    def _use(self, number: int) -> Iterator[None]:
        path = self.folder / "locks" / f"{number:06d}.use"
        with _locked(path, shared=True):
            now = time.time_ns()  # the kernel's own stamp is some milliseconds coarse
            os.utime(path, ns=(now, now))
            yield

    @contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        with _locked(self.folder / "locks" / name, wait=wait) as held:
            yield held

    def _partial(self) -> Path:
        return self.folder / "partial" / f"{os.getpid()}-{uuid.uuid4().hex}"

    def _sweep(self) -> None:
        """Remove what killed processes of this machine were downloading."""
        for path in (self.folder / "partial").iterdir():
            pid = path.name.partition("-")[0]
            with suppress(OSError):
                # The age too: a cache in a shared home has downloads of other machines' processes.
                old = time.time() - path.stat().st_mtime > _ABANDONED_S
                if old and pid.isdecimal() and not Path("/proc", pid).exists():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _disk(self, error: OSError) -> StoreError:
        free = shutil.disk_usage(self.folder).free
        return StoreError(
            f"{self.url}: the cache {self.folder} cannot be written: {error}. {free:,} bytes are free there. Free some "
            f"space, set {CACHE} to another folder or {CACHE_BYTES} to a smaller bound. The bucket was not changed."
        )


_MIRRORS: dict[str, Mirror] = {}


def mirror_of(path: str | Path) -> Mirror | None:
    """The mirror of a store, one in this process; None for a path of this machine."""
    url = address(path)
    if url is None:
        return None
    mirror = Mirror(url)
    return _MIRRORS.setdefault(str(mirror.root), mirror)


def mirror_at(root: Path) -> Mirror | None:
    """The mirror whose local folder this is: functions that are given a folder need not know whose it is."""
    return _MIRRORS.get(str(root))


def root_of(path: str | Path) -> Path:
    """The folder of a store: itself, or the local one of an address, with its metadata as they are now.

    Raises:
        StoreError: there is no store at the address, or it cannot be reached.
    """
    mirror = mirror_of(path)
    if mirror is None:
        return local_path(path)
    if not mirror.sync():
        mirror.require_free()
        raise StoreError(f"There is no feature store at {path}. Make one with `hsnet extract ... --store {path}`.")
    return mirror.root


def is_store(path: str | Path) -> bool:
    """Whether a store, finished or not, is there."""
    mirror = mirror_of(path)
    return (local_path(path) / ROOT).is_file() if mirror is None else mirror.bucket.head(ROOT) is not None


def is_free(path: str | Path) -> bool:
    """Whether nothing is there yet."""
    mirror = mirror_of(path)
    if mirror is None:
        return not local_path(path).exists()
    return mirror.bucket.head(ROOT) is None and not mirror.foreign()


def resync(root: Path) -> Path:
    """Bring the metadata and markers of a mirror's folder up to date; any other folder is as it is."""
    mirror = mirror_at(root)
    if mirror is not None:
        mirror.sync()
    return root


def publish(root: Path) -> None:
    """Upload the metadata that changed in a folder, if it is one of a mirror. Raises StoreError."""
    mirror = mirror_at(root)
    if mirror is not None:
        mirror.publish()


def remove_remote_shard(root: Path, number: int, arrays: Iterable[str]) -> None:
    """Delete a shard in the bucket, if the folder is one of a mirror. Raises StoreError."""
    mirror = mirror_at(root)
    if mirror is not None:
        mirror.remove(number, arrays)


def remove_remote_arrays(root: Path, names: Iterable[str]) -> None:
    """Delete arrays of metadata in the bucket, if the folder is one of a mirror. Raises StoreError."""
    mirror = mirror_at(root)
    if mirror is not None:
        mirror.bucket.delete([key for name in names if name for key in mirror.bucket.objects(name)])


@contextmanager
def named(root: Path) -> Iterator[None]:
    """Errors raised inside the block name the address, not the local folder of its mirror."""
    try:
        yield
    except HSNetError as error:
        mirror = mirror_at(root)
        if mirror is not None:
            error.args = tuple(mirror.named(str(text)) for text in error.args)
        raise


def cache_folder() -> Path:
    """Where mirrors are: HSNET_CACHE, or ~/.cache/hsnet."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "hsnet")


def cache_bytes() -> int | None:
    """HSNET_CACHE_BYTES, such as 20GB; None if there is no bound. Raises ConfigError."""
    text = os.environ.get(CACHE_BYTES, "").strip()
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text)
    if not found:
        raise ConfigError(f"{CACHE_BYTES} is '{text}', not a size such as 500MB or 20GB.")
    return int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))


def _cached(cache: Path) -> list[tuple[float, int, Path, int]]:
    """(last use, bytes, folder of the store, shard) of all shards that are here."""
    found = []
    for folder in cache.iterdir():
        sizes: dict[int, int] = {}
        for chunks in (folder / "store").glob("l*/c"):
            for name in (entry.name for entry in os.scandir(chunks) if entry.name.isdecimal()):
                with suppress(OSError):
                    size = shard_file(folder / "store", chunks.parent.name, int(name)).stat().st_size
                    sizes[int(name)] = sizes.get(int(name), 0) + size
        for number, size in sizes.items():
            with suppress(OSError):
                used = (folder / "locks" / f"{number:06d}.use").stat().st_mtime
                found.append((used, size, folder, number))
    return found


@contextmanager
def _locked(path: Path, shared: bool = False, wait: bool = True) -> Iterator[bool]:
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
