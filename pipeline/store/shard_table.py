"""Which shards of a store are complete and what is known of each: from the summary of a sealed store, else from its
marker, read when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from hsnet.errors import StoreError
from pipeline.store.attributes import (
    SEALED_FORMAT,
    read_facts,
    read_index,
    read_placement,
    state_checksum,
    write_facts,
)
from pipeline.store.local_place import Place
from pipeline.store.markers import ShardFacts, StoredFile, marked_shards, read_marker, summary_file
from pipeline.store.summary import Summary, read_summary, summarise, write_summary


class ShardTable:
    """What is known of the shards of a store opened in one state. Safe in several threads.

    Args:
        place: of the store, synced.
        identity: of the store, which its markers name.
        arrays: names of the arrays, each with a file in every shard.
        shards: how many there are when the store is complete.
        images: ids of a shard's images.

    `use_seal` takes the summary of a sealed store instead of markers; a marker that was read since counts more.
    """

    def __init__(
        self,
        place: Place,
        identity: str,
        arrays: tuple[str, ...],
        shards: int,
        images: Callable[[int], tuple[str, ...]],
    ) -> None:
        self._place, self._identity, self._arrays, self._shards = place, identity, arrays, shards
        self._images = images
        self._read: dict[int, ShardFacts | None] = {}
        self._names: set[int] | None = None
        self._summary: Summary | None = None

    def get(self, number: int) -> ShardFacts | None:
        """Facts of a shard, None if it is not complete."""
        if number in self._read:
            return self._read[number]
        return self.sealed(number) or self.look(number)

    @property
    def is_sealed(self) -> bool:
        """Whether there is a summary."""
        return self._summary is not None

    def sealed(self, number: int) -> ShardFacts | None:
        """What the summary says of a shard; None if there is no summary."""
        return None if self._summary is None else self._summary.facts(number, self._images(number))

    def has(self, number: int) -> bool:
        """Whether a shard is complete."""
        if number in self._read:
            return self._read[number] is not None
        return self._summary is not None or self.look(number) is not None

    def size(self, number: int, row: int) -> tuple[int, int]:
        """Original (height, width) of an image of a complete shard, pixels; `row` counts within the shard."""
        facts = self._read.get(number)
        if facts is None and self._summary is not None:
            return self._summary.size(number * self._summary.shard_images + row)
        return self._whole(number).sizes[row]

    def classes(self, number: int, row: int) -> tuple[int, ...]:
        """Class ids of an image of a complete shard."""
        facts = self._read.get(number)
        if facts is None and self._summary is not None:
            return self._summary.classes(number * self._summary.shard_images + row)
        return self._whole(number).classes[row]

    def reason(self, number: int, row: int) -> str | None:
        """Why an image of a complete shard was skipped; None if it was not."""
        facts = self._read.get(number)
        if facts is None and self._summary is not None:
            return self._summary.skipped.get(number * self._summary.shard_images + row)
        facts = self._whole(number)
        return facts.skipped.get(facts.images[row]) if facts.skipped else None

    def stored(self, number: int, arrays: Iterable[str]) -> list[StoredFile]:
        """Files of a complete shard."""
        facts = self._read.get(number)
        if facts is None and self._summary is not None:
            return self._summary.stored(number, arrays)
        return self._whole(number).stored(list(arrays))

    def _whole(self, number: int) -> ShardFacts:
        facts = self.get(number)
        if facts is None:
            raise KeyError(number)
        return facts

    def look(self, number: int) -> ShardFacts | None:
        """As `get`, from the marker as it is now, on disk or in the bucket."""
        self._place.fetch_marker(number)
        return self._look(number)

    def _look(self, number: int) -> ShardFacts | None:
        remote = self._place.remote
        facts = read_marker(
            self._place.root, number, self._identity, self._images(number), self._arrays, look=not remote
        )
        self._read[number] = facts
        return facts

    def put(self, facts: ShardFacts) -> None:
        """A shard was written, and the seal broken."""
        self._summary = None
        self._read[facts.number] = facts

    def drop(self, number: int) -> None:
        """A shard is not complete any more, and the seal broken."""
        self._summary = None
        self._read[number] = None

    def missing(self) -> tuple[int, ...]:
        """Shards that are not complete: without a marker, by the names in one folder, or with one that was read and
        does not count.
        """
        if self._summary is not None:
            return tuple(number for number in sorted(self._read) if self._read[number] is None)
        if self._names is None and len(self._read) < self._shards:
            self._place.sync_markers()
            self._names = marked_shards(self._place.root)
        names = self._names or set()
        there = (self._read[n] is not None if n in self._read else n in names for n in range(self._shards))
        return tuple(number for number, complete in enumerate(there) if not complete)

    def check(self) -> None:
        """Read every marker, as it is now."""
        self._place.sync_markers()
        self._names = marked_shards(self._place.root)
        for number in range(self._shards):
            if number in self._names:
                self._look(number)
            else:
                self._read[number] = None

    def refresh(self) -> None:
        """Look which markers are there now; those that were not read, or did not count, are read when asked for."""
        self._place.sync_markers()
        self._names = marked_shards(self._place.root)
        if not summary_file(self._place.root).exists():
            self._summary = None
        self._read = {n: facts for n, facts in self._read.items() if facts is not None and n in self._names}

    def all(self) -> Iterable[ShardFacts]:
        """Facts of all complete shards, in their order."""
        if self._summary is None and len(self._read) < self._shards:
            self._place.sync_markers()
        for number in range(self._shards):
            facts = self._read[number] if number in self._read else self.sealed(number) or self._look(number)
            if facts is not None:
                yield facts

    def nbytes(self) -> int:
        """Bytes of the files of all complete shards."""
        if self._summary is not None and not self._read:
            return self._summary.nbytes(self._shards)
        return sum(facts.nbytes for facts in self.all())

    def skipped(self) -> dict[tuple[int, int], str]:
        """(shard, row in it) of the images that could not be read -> why."""
        if self._summary is not None and not self._read:
            each = self._summary.shard_images
            known = {divmod(row, each): reason for row, reason in self._summary.skipped.items()}
            return {place: reason for place, reason in known.items() if place[0] < self._shards}
        return {
            (facts.number, row): facts.skipped[image]
            for facts in self.all()
            if facts.skipped
            for row, image in enumerate(facts.images)
            if image in facts.skipped
        }

    # -- the seal ----------------------------------------------------------------------------------------------

    def use_seal(self, digests: Sequence[str], state: int, checksum: int, shard_images: int) -> None:
        """Go by the summary of all markers if there is one of the state that was opened, or of a later one.

        Args:
            digests: of all states of the data set.
            state: which of them was opened.
            checksum: of that state, see `pipeline.store.attributes.state_checksum`.

        Raises:
            SummaryDamaged: there is one that cannot be used.
        """
        summary = read_summary(self._place.root, self._identity, digests, self._arrays)
        if summary is None or digests.index(summary.digest) < state or summary.shard_images != shard_images:
            return
        if summary.states.get(digests[state]) != checksum:
            return  # other images, or in other rows: the markers name them
        # A marker may have been deleted, to have a shard made anew. In a bucket nothing is listed for that.
        if self._place.remote or marked_shards(self._place.root).issuperset(range(summary.shards)):
            self._summary = summary

    def break_false_seal(self) -> None:
        """Remove a summary that is not what the markers say, which were all just read. By the store's writer only."""
        false = self._summary is None or any(self.sealed(number) != facts for number, facts in self._read.items())
        if not false:
            return
        self._summary = None
        try:
            self._place.break_seal()
        except OSError as error:
            raise StoreError(f"{self._place.path} cannot be written: {error}. Nothing was changed.") from error

    def write_seal(self, digest: str, shard_images: int, token: str) -> None:
        """Write the summary of all markers if all are there and no images are to come. By the store's writer only.

        Args:
            digest: of the data set.
            token: what the store's writer was given.

        Raises:
            StoreError: the disk or the server refused, or another writer has the store now.
        """
        place, root = self._place, self._place.root
        if self.missing() or summary_file(root).exists():
            return
        facts = read_facts(root)
        if not digest == facts.states[-1].digest == facts.states[facts.current].digest:
            return
        known = list(self.all())
        if len(known) < self._shards:
            return
        try:
            if facts.format != SEALED_FORMAT:
                write_facts(root, facts)  # older programs would write without breaking the seal
                place.publish()
            states = {
                state.digest: state_checksum(read_index(root, state), read_placement(root, facts, number))
                for number, state in enumerate(facts.states)
            }
            block = summarise(known, self._identity, digest, shard_images, self._arrays, states)
            if not place.still_owned(token):
                raise StoreError(f"{place.path} is being written by another run now. This one stopped.")
            write_summary(summary_file(root), block)
            # A writer that lost the store may have been late: see `remove_shard`.
            if not marked_shards(root).issuperset(range(self._shards)):
                place.break_seal()
                return
            place.publish_seal()
        except OSError as error:
            raise StoreError(
                f"{place.path}: all shards are there, but the summary of their markers could not be written: {error}. "
                f"The store can be read without it; run the same command again to have it."
            ) from error
        self._summary = Summary(block)
