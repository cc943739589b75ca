"""A store in an object store, mirrored in a folder of this machine, so that all else works on local files.

    HSNET_CACHE/<name>-<digest of the address>/
      store/       metadata, the summary of a sealed store, markers as far as they were asked for, as they were at the
                   last opening; shard files, as far as they were asked for
      etags.json   which version of every object the metadata and markers are
      synced.json  when they were last compared with the bucket
      summary      of a store that is sealed no more: what the shard files here were checked against
      locks/       files that processes of this machine lock; the time of a shard's says when it was last used
      partial/     downloads in the making

The bucket is the truth. What is trusted here: a shard file stands only beside the marker, or the summary of all
markers, that it was checked against (bytes and CRC-32); one that says something else comes, and the shard's files go
first. Writing is the same turned around: files are written here as on any disk, then uploaded, the marker last.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hsnet.errors import StoreError
from pipeline.store.cache import locked, make_room, use_lock
from pipeline.store.lease import holds, sole_remote_writer
from pipeline.store.local_place import ROOT
from pipeline.store.markers import ShardFacts, StoredFile, marker_file, shard_file, sum_file, summary_file
from pipeline.store.mirror_metadata import SUMMARY, MirroredMetadata

TRIES = 3
"""Downloads of a shard file that arrives damaged, before it is taken for damaged there."""
PIECE = 16 << 20
"""Bytes of one request."""


class Mirror(MirroredMetadata):
    """The place of a store in a bucket; `Place` says what its methods do. Safe in several threads and processes.

    Raises:
        StoreError: the bucket refuses or cannot be reached, or the cache's disk does.
    """

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
            self.bucket.delete([SUMMARY])
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

    def break_seal(self) -> None:
        self.bucket.delete([SUMMARY])
        super().break_seal()

    def publish_seal(self) -> None:
        self.bucket.put(SUMMARY, summary_file(self.root).read_bytes())
        (self.folder / "summary").unlink(missing_ok=True)

    def remove_shard(self, number: int, arrays: tuple[str, ...]) -> None:
        self.bucket.delete([SUMMARY])
        self.bucket.delete([self._marker_key(number)])
        self.bucket.delete([self._key(StoredFile(array, number, 0, "")) for array in arrays])
        super().remove_shard(number, arrays)

    def remove_arrays(self, names: Iterable[str]) -> None:
        names = list(names)
        self.bucket.delete([key for name in names for key in self.bucket.objects(name)])
        super().remove_arrays(names)

    @contextmanager
    def _use(self, number: int) -> Iterator[None]:
        path = use_lock(self.folder, number)
        with locked(path, shared=True):
            now = time.time_ns()  # the kernel's own stamp is some milliseconds coarse
            os.utime(path, ns=(now, now))
            yield
