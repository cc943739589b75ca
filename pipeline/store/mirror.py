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

import hashlib
import json
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hsnet.errors import HSNetError, StoreError
from pipeline.store.bucket import Bucket, ObjectFacts
from pipeline.store.cache import CACHE, CACHE_BYTES, cache_folder, locked, make_room, use_lock
from pipeline.store.lease import OWNER, holds, sole_remote_writer
from pipeline.store.local_place import ROOT, Place
from pipeline.store.markers import MARKERS, ShardFacts, StoredFile, marker_file, shard_file, sum_file

TRIES = 3
"""Downloads of a shard file that arrives damaged, before it is taken for damaged there."""
PIECE = 16 << 20
"""Bytes of one request."""
PARALLEL = 8
"""Requests at a time of one process."""
_LARGEST = 256 << 20
_ABANDONED_S = 3600.0
_ARRAY = re.compile(r"level\d{1,2}|label")
_METADATA = re.compile(rf"index(-\d{{1,9}})?|row-\d{{1,9}}|codec|{MARKERS}")
_DATA = re.compile(rf"({_ARRAY.pattern})/c/(\d{{1,9}})/[0/]+")
_MARKER = re.compile(rf"{MARKERS}/(\d{{6,9}})\.json")


class Mirror(Place):
    """The place of a store in a bucket; `Place` says what its methods do. Safe in several threads and processes.

    Raises:
        StoreError: the bucket refuses or cannot be reached, or the cache's disk does.
    """

    remote = True

    def __init__(self, url: str) -> None:
        self.bucket = Bucket(url)
        name = hashlib.sha256(f"{url}\n{self.bucket.endpoint}".encode()).hexdigest()[:16]
        # Resolved: files are read only where they are without any link.
        self.folder = cache_folder().resolve() / f"{url.rpartition('/')[2][:60]}-{name}"
        super().__init__(self.folder / "store")
        self.path = url
        try:
            for part in (self.root, self.folder / "locks", self.folder / "partial"):
                part.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be used as a cache: {error}. Set {CACHE} to a folder.") from None
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="mirror")
        self._sweep()

    def exists(self) -> bool:
        return self.bucket.head(ROOT) is not None

    def is_free(self) -> bool:
        return not self.exists() and not self._foreign()

    @property
    def bytes_free(self) -> int | None:
        return None

    def create(self, build: Callable[[Path], None]) -> None:
        if self.exists():
            return
        with self.sole_writer():  # arrays of two recipes must not mix
            if self.exists():
                return  # another process made it in the meantime
            self._require_free()
            self._clear()
            build(self.root)
            self.publish()

    @contextmanager
    def sole_writer(self) -> Iterator[str]:
        with self.named(), sole_remote_writer(self.bucket) as token:
            self._sync()
            with self._lock("metadata"):  # other processes of this machine do not replace it by the bucket's
                yield token

    def still_owned(self, token: str) -> bool:
        return holds(self.bucket, token)

    def shown(self, file: Path) -> str:
        return str(file).replace(str(self.root), self.path)

    @contextmanager
    def named(self) -> Iterator[None]:
        try:
            yield
        except HSNetError as error:
            error.args = tuple(str(text).replace(str(self.root), self.path) for text in error.args)
            raise

    # -- metadata and markers ----------------------------------------------------------------------------------

    def sync(self) -> None:
        if not self._sync():
            self._require_free()
            raise StoreError(
                f"There is no feature store at {self.path}. Make one with `hsnet extract ... --store {self.path}`."
            )

    def _sync(self) -> bool:
        """Bring metadata and markers here as they are in the bucket now; whether there is a store."""
        with self._lock("sync"):
            # The root is read first: what it names was uploaded before it.
            root = self._fetch(ROOT)
            if root is None:
                with self._lock("metadata", wait=False) as free:
                    if free:
                        (self.root / ROOT).unlink(missing_ok=True)
                return False
            there, known = self._list(), self._etags()
            # While a process of this machine writes, its metadata here may be ahead of the bucket's.
            with self._lock("metadata", wait=False) as free:
                changed = [key for key, entry in there.items() if not self._current(key, entry, known)]
                changed = [key for key in changed if key != ROOT and (free or _MARKER.fullmatch(key))]
                for key, data in zip(changed, self._pool.map(self._fetch, changed), strict=True):
                    if data is not None:
                        self._write(key, data)
                if free or not (self.root / ROOT).exists():
                    self._write(ROOT, root)
            for path in (self.root / MARKERS).glob("*.json"):
                if f"{MARKERS}/{path.name}" not in there:
                    self._forget_absent(int(path.stem))
            self._write_etags({key: entry.etag for key, entry in there.items() if (self.root / key).is_file()})
        return True

    def fetch_marker(self, number: int) -> None:
        key = self._marker_key(number)
        data = self._fetch(key)
        with self._lock("sync"):
            if data is None:
                self._forget_absent(number)
            elif not self._holds(key, data):
                self._write(key, data)

    def _foreign(self) -> list[str]:
        """Names at the address that no store has, some of them."""
        folders, objects = self.bucket.children()
        names = [name for name in (*folders, *objects) if name != ROOT and not name.startswith("_owner.")]
        return [name for name in names if not _ARRAY.fullmatch(name) and not _METADATA.fullmatch(name)]

    def _clear(self) -> None:
        """Empty the folder of metadata, markers and shards. The bucket is not touched."""
        with self._lock("sync"):
            old = self.folder / "partial" / f"{os.getpid()}-{uuid.uuid4().hex}"
            os.rename(self.root, old)
            self.root.mkdir(mode=0o700)
            (self.folder / "etags.json").unlink(missing_ok=True)
            shutil.rmtree(old)

    def _require_free(self) -> None:
        """Raises StoreError if something else than a store, or than remains of one, is at the address."""
        names = self._foreign()
        if names:
            raise StoreError(
                f"{self.path} is not a feature store: it has no {ROOT}, but '{names[0]}'. Give the address of a store "
                f"made by `hsnet extract`, or a new one to make one. Nothing was changed."
            )

    def publish(self) -> None:
        # The group's own last: nothing counts before it is there.
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

    def _list(self) -> dict[str, ObjectFacts]:
        """Metadata and markers in the bucket, without their sizes counting: shards are not listed."""
        folders, objects = self.bucket.children()
        for folder in folders:
            if _ARRAY.fullmatch(folder):
                entry = self.bucket.head(f"{folder}/zarr.json")
                objects |= {f"{folder}/zarr.json": entry} if entry else {}
            elif _METADATA.fullmatch(folder):
                objects |= {
                    key: entry for key, entry in self.bucket.objects(folder).items() if key.startswith(f"{folder}/")
                }
        return {key: entry for key, entry in objects.items() if key == ROOT or "/" in key}

    def _fetch(self, key: str) -> bytes | None:
        try:
            return self.bucket.get(key, _LARGEST)
        except FileNotFoundError:
            return None

    def _current(self, key: str, entry: ObjectFacts, known: Mapping[str, list[object]]) -> bool:
        """Whether the file here is the object there: as it was fetched, of a version that is still the one."""
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

    def _write(self, key: str, data: bytes) -> None:
        """Put an object's bytes in their place, whole; a shard's files go before another marker comes."""
        if marker := _MARKER.fullmatch(key):
            self._forget(int(marker[1]))
        path, partial = self.root / key, self._partial()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError as error:
            raise self._disk(error) from None

    def _forget_absent(self, number: int) -> None:
        """Forget a shard that the bucket does not have, unless a process of this machine is just making it."""
        with self._lock(f"{number:06d}.write", wait=False) as free:
            if free:
                self._forget(number)

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
    def present(self, files: Iterable[StoredFile]) -> Iterator[None]:
        files = set(files)
        with ExitStack() as stack:
            for number in sorted({file.number for file in files}):
                stack.enter_context(self._use(number))
            missing = [file for file in files if not self._here(file)]
            if missing:
                self._download(missing)
            yield

    def fetch_anew(self, files: Collection[StoredFile]) -> None:
        for file in files:
            with self._lock(f"{file.number:06d}.fetch"):
                self._path(file).unlink(missing_ok=True)
        with self.present(files):
            pass

    def _here(self, file: StoredFile) -> bool:
        try:
            return self._path(file).stat().st_size == file.size
        except OSError:
            return False

    def _download(self, missing: Sequence[StoredFile]) -> None:
        """Fetch files, the pieces of all of them at once. Each shard is locked: processes do not fetch it twice.

        Locks are taken in the order of the shards, and who holds one waits for nothing else.
        """
        with ExitStack() as stack:
            for number in sorted({file.number for file in missing}):
                stack.enter_context(self._lock(f"{number:06d}.fetch"))
            files = [file for file in missing if not self._here(file)]
            make_room(self.folder.parent, sum(file.size for file in files))
            for attempt in range(TRIES):
                files = self._try(files, last=attempt + 1 == TRIES)

    def _try(self, files: Sequence[StoredFile], last: bool) -> list[StoredFile]:
        """One download of each; those that arrived damaged."""
        partials = [self._partial() for _ in files]
        damaged = []
        try:
            with ExitStack() as stack:
                pieces = []
                for file, partial in zip(files, partials, strict=True):
                    descriptor = stack.enter_context(partial.open("wb")).fileno()
                    for start in range(0, file.size, PIECE):
                        pieces.append(self._pool.submit(self._piece, file, start, descriptor))
                try:
                    for piece in pieces:
                        piece.result()
                finally:  # nobody may write into a file that is closed
                    for piece in pieces:
                        piece.cancel() or piece.exception()
            for file, partial in zip(files, partials, strict=True):
                size, checksum = sum_file(partial)
                if (size, checksum) == (file.size, file.checksum):
                    self._path(file).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(partial, self._path(file))
                elif last:
                    raise self._damage(file, f"it has {size} bytes and CRC-32 {checksum}, its marker says")
                else:
                    damaged.append(file)
        except OSError as error:
            raise self._disk(error) from None
        finally:
            for partial in partials:
                partial.unlink(missing_ok=True)
        return damaged

    def _piece(self, file: StoredFile, start: int, descriptor: int) -> None:
        try:
            data = self.bucket.get_range(self._key(file), start, min(start + PIECE, file.size))
        except FileNotFoundError:
            raise self._damage(file, "it is not there, its marker says") from None
        os.pwrite(descriptor, data, start)

    def _path(self, file: StoredFile) -> Path:
        return shard_file(self.root, file.array, file.number)

    def _key(self, file: StoredFile) -> str:
        return self._path(file).relative_to(self.root).as_posix()

    def _damage(self, file: StoredFile, what: str) -> StoreError:
        return StoreError(
            f"{self.path}: array '{file.array}' is damaged in shard {file.number} (object {self._key(file)}): {what} "
            f"{file.size} bytes and CRC-32 {file.checksum}. Nothing of it was used. `hsnet store repair` makes this "
            f"shard anew."
        )

    # -- writing shards ----------------------------------------------------------------------------------------

    @contextmanager
    def writing_shard(self, number: int, nbytes: int) -> Iterator[None]:
        make_room(self.folder.parent, nbytes)
        with self._use(number), self._lock(f"{number:06d}.write"):
            self.bucket.delete([self._marker_key(number)])
            yield

    def commit(self, facts: ShardFacts, token: str | None) -> None:
        for sent in [self._pool.submit(self.bucket.put, self._key(f), self._path(f)) for f in facts.stored()]:
            sent.result()
        if token is not None and not self.still_owned(token):
            raise StoreError(f"{self.path} is being written by another run now. This one stopped.")
        self.bucket.put(self._marker_key(facts.number), marker_file(self.root, facts.number).read_bytes())

    def absent(self, files: Iterable[StoredFile]) -> set[int]:
        files = list(files)
        sizes = {
            key: entry.size
            for array in sorted({file.array for file in files})
            for key, entry in self.bucket.objects(f"{array}/c").items()
        }
        return {file.number for file in files if sizes.get(self._key(file)) != file.size}

    def remove_shard(self, number: int, arrays: tuple[str, ...]) -> None:
        self.bucket.delete([self._marker_key(number)])
        self.bucket.delete([self._key(StoredFile(array, number, 0, "")) for array in arrays])
        super().remove_shard(number, arrays)

    def remove_arrays(self, names: Iterable[str]) -> None:
        names = list(names)
        self.bucket.delete([key for name in names for key in self.bucket.objects(name)])
        super().remove_arrays(names)

    def _marker_key(self, number: int) -> str:
        return marker_file(self.root, number).relative_to(self.root).as_posix()

    # -- the folder --------------------------------------------------------------------------------------------

    @contextmanager
    def _use(self, number: int) -> Iterator[None]:
        path = use_lock(self.folder, number)
        with locked(path, shared=True):
            now = time.time_ns()  # the kernel's own stamp is some milliseconds coarse
            os.utime(path, ns=(now, now))
            yield

    @contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        with locked(self.folder / "locks" / name, wait=wait) as held:
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
            f"{self.path}: the cache {self.folder} cannot be written: {error}. {free:,} bytes are free there. Free "
            f"some space, set {CACHE} to another folder or {CACHE_BYTES} to a smaller bound. The bucket was not "
            f"changed."
        )
