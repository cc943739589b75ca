"""Metadata, markers and summary of a store in a bucket, as they are in its mirror's folder on this machine.

What the folder holds, and what of it is trusted: `pipeline.store.mirror`.
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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from hsnet.errors import HSNetError, StoreError
from pipeline.store.bucket import Bucket, ObjectFacts
from pipeline.store.cache import CACHE, CACHE_BYTES, cache_folder, locked
from pipeline.store.lease import OWNER
from pipeline.store.local_place import ROOT, Place
from pipeline.store.markers import MARKERS, marked_shards, marker_file, shard_file, summary_file
from pipeline.store.summary import Summary, summary_of

PARALLEL = 8
"""Requests at a time of one process."""
SUMMARY = summary_file(Path()).as_posix()
ARRAY = re.compile(r"level\d{1,2}|label")
METADATA = re.compile(rf"index(-\d{{1,9}})?|row-\d{{1,9}}|codec|{MARKERS}")
_LARGEST = 256 << 20
_LARGEST_COLUMNS = 4 << 30
_ABANDONED_S = 3600.0
_MARKER = re.compile(rf"{MARKERS}/(\d{{6,9}})\.json")


class MirroredMetadata(Place):
    """The part of a mirror that holds no shards. Every method may raise StoreError."""

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
        self._known_summary: tuple[tuple[int, ...], Summary | None] = ((), None)
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="mirror")
        self._sweep()

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

    def sync_markers(self) -> None:
        called = time.time_ns()
        with self._lock("sync"):
            if self._synced("markers", called):
                return
            began = time.time_ns()
            there = {key: entry for key, entry in self.bucket.objects(MARKERS).items() if _MARKER.fullmatch(key)}
            known = self._etags()
            self._update([key for key, entry in there.items() if not self._current(key, entry, known)])
            for number in marked_shards(self.root):
                if self._marker_key(number) not in there:
                    self._forget_absent(number)
            self._write_etags(there, {key: value for key, value in known.items() if not _MARKER.fullmatch(key)})
            self._note("markers", began)

    def _sync(self) -> bool:
        """Bring metadata here as they are in the bucket now; whether there is a store.

        Of a sealed store that is here as it is there, two objects are asked for.
        """
        called = time.time_ns()
        with self._lock("sync"):
            if self._synced("metadata", called):
                return True
            began = time.time_ns()
            # The root is read first: what it names was uploaded before it.
            root = self._fetch(ROOT)
            if root is None:
                with self._lock("metadata", wait=False) as free:
                    if free:
                        (self.root / ROOT).unlink(missing_ok=True)
                return False
            seal, known = self.bucket.head(SUMMARY), self._etags()
            # While a process of this machine writes, its metadata here may be ahead of the bucket's.
            with self._lock("metadata", wait=False) as free:
                same = seal is not None and summary_file(self.root).is_file() and self._holds(ROOT, root)
                if free and not (same and seal and known.get(SUMMARY, [""])[0] == seal.etag):
                    there = self._list() | ({SUMMARY: seal} if seal else {})
                    changed = [key for key, entry in there.items() if not self._current(key, entry, known)]
                    if seal is None:
                        self._keep_summary()
                    self._update([key for key in changed if key not in (ROOT, SUMMARY)])
                    if SUMMARY in changed and (data := self._fetch(SUMMARY)) is not None:
                        self._adopt_summary(data)
                    self._write(ROOT, root)
                    self._write_etags(there, {key: value for key, value in known.items() if _MARKER.fullmatch(key)})
                elif not (self.root / ROOT).exists():
                    self._write(ROOT, root)
            self._note("metadata", began)
        return True

    def _update(self, keys: Sequence[str]) -> None:
        """Fetch objects and put them in their place."""
        for key, data in zip(keys, self._pool.map(self._fetch, keys), strict=True):
            if data is not None:
                self._write(key, data)

    def _synced(self, what: str, since: int) -> bool:
        """Whether another process of this machine has looked into the bucket while this one waited for it."""
        try:
            noted = json.loads((self.folder / "synced.json").read_text(encoding="utf-8"))[what]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return type(noted) is int and since <= noted <= time.time_ns()

    def _note(self, what: str, began: int) -> None:
        path = self.folder / "synced.json"
        try:
            noted = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            noted = {}
        partial = self._partial()
        partial.write_text(json.dumps({**noted, what: began}), encoding="utf-8")
        os.replace(partial, path)

    def _keep_summary(self) -> None:
        """The store is not sealed any more: what was checked against the summary still is what it was."""
        with suppress(FileNotFoundError):
            os.replace(summary_file(self.root), self.folder / "summary")

    def _adopt_summary(self, data: bytes) -> None:
        """Take another summary, after the files and markers that it does not vouch for are gone."""
        new = summary_of(data)
        here = {int(name) for folder in self.root.iterdir() if ARRAY.fullmatch(folder.name) for name in _names(folder)}
        for number in here | marked_shards(self.root):
            if new is None or number >= new.shards or self._vouched(number) != new.files(number):
                self._forget(number)
        (self.folder / "summary").unlink(missing_ok=True)
        self._write(SUMMARY, data)

    def _vouched(self, number: int) -> dict[str, tuple[int, str]] | None:
        """Array -> (bytes, CRC-32) that the files here of a shard were checked against; None if nobody knows."""
        try:
            return _files_in(marker_file(self.root, number).read_bytes())
        except OSError:
            pass
        for path in (summary_file(self.root), self.folder / "summary"):
            summary = self._summary(path)
            if summary is not None:
                return summary.files(number) if number < summary.shards else None
        return None

    def _summary(self, path: Path) -> Summary | None:
        try:
            status = path.stat()
            identity = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._known_summary[0] != identity:
                self._known_summary = identity, summary_of(path.read_bytes())
        except OSError:
            return None
        return self._known_summary[1]

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
        return [name for name in names if not ARRAY.fullmatch(name) and not METADATA.fullmatch(name)]

    def _clear(self) -> None:
        """Empty the folder of metadata, markers and shards. The bucket is not touched."""
        with self._lock("sync"):
            old = self.folder / "partial" / f"{os.getpid()}-{uuid.uuid4().hex}"
            os.rename(self.root, old)
            self.root.mkdir(mode=0o700)
            for name in ("etags.json", "synced.json", "summary"):
                (self.folder / name).unlink(missing_ok=True)
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
            files = [path for entry in self.root.iterdir() for path in _metadata(entry)]
            keys = sorted(
                path.relative_to(self.root).as_posix() for path in files if not path.name.endswith(".partial")
            )
            keys = [key for key in keys if key != OWNER]
            changed = [key for key in keys if key not in there or not self._current(key, there[key], known)]
            for key in sorted(changed, key=lambda key: key == ROOT):
                self.bucket.put(key, (self.root / key).read_bytes())

    def _list(self) -> dict[str, ObjectFacts]:
        """Metadata in the bucket: shards and markers are not listed."""
        folders, objects = self.bucket.children()
        for folder in folders:
            if ARRAY.fullmatch(folder):
                entry = self.bucket.head(f"{folder}/zarr.json")
                objects |= {f"{folder}/zarr.json": entry} if entry else {}
            elif METADATA.fullmatch(folder) and folder != MARKERS:
                objects |= {
                    key: entry for key, entry in self.bucket.objects(folder).items() if key.startswith(f"{folder}/")
                }
        return {key: entry for key, entry in objects.items() if key == ROOT or "/" in key}

    def _fetch(self, key: str) -> bytes | None:
        try:
            return self.bucket.get(key, _LARGEST_COLUMNS if key == SUMMARY or key.startswith("index") else _LARGEST)
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
            number = int(marker[1])
            files = _files_in(data)
            if files is None or files != self._vouched(number):
                self._forget(number)
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
        arrays = [path.name for path in self.root.iterdir() if ARRAY.fullmatch(path.name)]
        return [path for array in arrays if (path := shard_file(self.root, array, number)).is_file()]

    def _etags(self) -> dict[str, list[object]]:
        try:
            values = json.loads((self.folder / "etags.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def _write_etags(self, there: Mapping[str, ObjectFacts], others: Mapping[str, list[object]]) -> None:
        """Note the versions of what is here; `others` stay as they were noted."""
        here = {key: entry.etag for key, entry in there.items() if (self.root / key).is_file()}
        known = {key: [etag, zlib.crc32((self.root / key).read_bytes())] for key, etag in here.items()} | dict(others)
        partial = self._partial()
        partial.write_text(json.dumps(known), encoding="utf-8")
        os.replace(partial, self.folder / "etags.json")

    # -- the folder --------------------------------------------------------------------------------------------

    def _marker_key(self, number: int) -> str:
        return marker_file(self.root, number).relative_to(self.root).as_posix()

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


def _files_in(marker: bytes) -> dict[str, tuple[int, str]] | None:
    """Array -> (bytes, CRC-32) that a marker says; None if it cannot be understood."""
    try:
        files = json.loads(marker)["files"]
        return {str(name): (int(file["bytes"]), str(file["crc32"])) for name, file in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None


def _names(array: Path) -> list[str]:
    """Numbers of the shards that have a folder in that of an array."""
    with suppress(FileNotFoundError), os.scandir(array / "c") as entries:
        return [entry.name for entry in entries if entry.name.isdecimal()]
    return []


def _metadata(entry: Path) -> list[Path]:
    """Files of metadata among what is at the top of a store: no shards, no markers, no summary."""
    if ARRAY.fullmatch(entry.name):
        return [entry / "zarr.json"]
    if entry.is_dir():
        return [] if entry.name == MARKERS else [path for path in entry.rglob("*") if path.is_file()]
    return [entry]
