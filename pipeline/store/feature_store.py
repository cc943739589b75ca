"""The feature store: one zarr group per data set and recipe, written shard by shard, safe to kill and to resume.

    S.zarr/
      zarr.json           attributes: format, recipe, data set (name, digest, number of images), images per shard
      index/              the data set's index, a block of columns
      index-1/ row-1/     of a store that grew: the index after the first growth, and the row of each image
      level0/ level1/ ... features (image, layer, row, column, channel), finest grid first
      codec/              the fit of coded features, as arrays; only where there is one
      label/              class-index masks at network size (image, row, column)
      _done/000000.json   one marker per complete shard, written last
      _done/summary       what all markers say, once all are there

docs/store.md describes it for readers that do not have this program.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import ConfigError, DataError, ShapeError, StoreError, StoreIncomplete, StoreMismatch
from pipeline.datasets.index import DatasetIndex
from pipeline.features.budgeted import TransformCodec
from pipeline.features.recipe import Recipe
from pipeline.store.arrays import MOST_IMAGES, SHARD_IMAGES, ArrayLayout, array_layouts, read_fit
from pipeline.store.attributes import StoreFacts, choose_state, read_facts, read_index, read_placement, state_checksum
from pipeline.store.buffers import Buffers
from pipeline.store.local_place import Place
from pipeline.store.markers import (
    ShardFacts,
    marker_file,
    require_no_links,
    shard_file,
    sweep_partials,
)
from pipeline.store.place import place_of
from pipeline.store.shard_file import ChunkReader, OpenShards, mapped_files
from pipeline.store.shard_table import ShardTable
from pipeline.store.shard_writer import write_whole_shard

MAPPED_OF_MIRROR = 32
"""Shard files of a bucket's store that stay mapped; of a folder's see `pipeline.store.shard_file.mapped_files`."""


class FeatureStore:
    """Features, label maps and image facts of one data set, made by one recipe.

    Open with `FeatureStore.open` to read, `FeatureStore.create` to write; the constructor is private. Images are
    named by their number in `index.images`. Reading is safe in several threads and processes; writing goes through
    `write_shard`, whole shards only, inside `with store.writing():` in one process of the machine (its helpers on
    other processes write under its lock).
    """

    def __init__(self, place: Place, facts: StoreFacts, state: int) -> None:
        root = place.root
        self.place, self.root, self.path = place, root, place.path
        self.format, self.recipe = facts.format, facts.recipe
        self.states, self.state = facts.states, state
        self.index = read_index(root, facts.states[state])
        self.shard_images = facts.shard_images
        self.identity = facts.identity
        self.placement = read_placement(root, facts, state)
        try:
            self._layouts = array_layouts(facts.recipe, self.index.label_dtype, facts.shard_images)
        except (ConfigError, ShapeError) as error:
            raise StoreError(f"{root} holds features this version cannot interpret: {error}") from None
        # While a store grows, its arrays may already be as long as they will be.
        rows = {facts.rows(later) for later in range(facts.current, len(facts.states))}
        for layout in self._layouts:
            layout.check(root, rows)
        # A file that is evicted takes its place on the disk until it is unmapped.
        files = self.shards * len(self._layouts)
        shards = OpenShards(min(MAPPED_OF_MIRROR, mapped_files(files)) if place.remote else mapped_files(files))
        self._readers = [
            ChunkReader(partial(shard_file, root.resolve(), layout.name), self.shard_images, layout.compressed, shards)
            for layout in self._layouts
        ]
        self.memory = Buffers()
        """Where features and labels are read into; may be replaced."""
        self._table = ShardTable(place, self.identity, self._names, self.shards, self._ids)
        digests = [each.digest for each in facts.states]
        self._table.use_seal(digests, state, state_checksum(self.index, self.placement), facts.shard_images)

    @classmethod
    def create(
        cls,
        path: str | Path | Place,
        recipe: Recipe,
        index: DatasetIndex,
        shard_images: int = SHARD_IMAGES,
        codec: TransformCodec | None = None,
    ) -> FeatureStore:
        """Make a store, or open the one that is there to go on writing it.

        Args:
            shard_images: images per shard of a new store. An existing one keeps its own: it changes no feature.
            codec: the fit of a new store of coded features.

        Raises:
            StoreMismatch: a store of another recipe or data set is there.
            StoreError: something else is there, or the folder cannot be written.
        """
        # zarr takes a while to import, and nothing that reads needs it.
        from pipeline.store.skeleton import build_skeleton

        if not 1 <= shard_images <= MOST_IMAGES:
            raise ConfigError(f"Images per shard must be 1 to {MOST_IMAGES}, got {shard_images}.")
        if not index.images:
            raise DataError(f"Data set {index.name} has no images: nothing to store.")
        place = place_of(path)
        try:
            place.create(lambda root: build_skeleton(root, recipe, index, shard_images, codec))
        except OSError as error:
            raise StoreError(f"Cannot make the store {place.path}: {error}.") from error
        return cls._open(place, recipe, index.digest)

    @classmethod
    def open(
        cls,
        path: str | Path | Place,
        recipe: Recipe | None = None,
        require_complete: bool = True,
        index_digest: str | None = None,
    ) -> FeatureStore:
        """Open a store as it is now.

        Args:
            recipe: what the store must have been made by; None accepts anything.
            index_digest: the data set it must hold. Of a store that grew, an earlier or an unfinished state can be
                asked for; None is the current one.
            require_complete: refuse a store with missing shards.

        Raises:
            StoreMismatch: names every differing field with both values.
            StoreIncomplete: counts the missing shards and names the command that adds them.
            StoreError: not a store, damaged, or written by a newer version.
        """
        store = cls._open(place_of(path), recipe, index_digest)
        if not require_complete:
            return store
        if not store.sealed:
            store.check_markers()
        missing = store.missing_shards()
        if missing:
            raise StoreIncomplete(
                f"{store.path} is not complete: {len(missing)} of {store.shards} shards are missing "
                f"(first: number {missing[0]}, image '{store.index.images[store.images_in(missing[0])[0]]}'). "
                f"Run the same `hsnet extract ... --store {store.path}` again: it makes only what is missing.",
                missing,
            )
        return store

    @classmethod
    def _open(cls, place: Place, recipe: Recipe | None, digest: str | None) -> FeatureStore:
        place.sync()
        with place.named():
            while True:
                facts = read_facts(place.root)
                try:
                    return cls(place, facts, choose_state(place.root, facts, recipe, digest))
                except StoreMismatch:
                    raise
                except StoreError:
                    place.sync()
                    if read_facts(place.root) == facts:
                        raise
                    # It grew between the reading of one file and the next.

    # -- what there is -----------------------------------------------------------------------------------------

    @property
    def shards(self) -> int:
        """Number of shards of the complete store."""
        return self.placement.shards

    def row(self, image: int) -> int:
        """Row of an image in every array: its number, unless the store grew."""
        return self.placement.row(image)

    def shard_of(self, image: int) -> int:
        """Number of the shard that holds an image."""
        return self.row(image) // self.shard_images

    def images_in(self, number: int) -> Sequence[int]:
        """Numbers of a shard's images, in the order of its rows."""
        return self.placement.images_in(number)

    def missing_shards(self) -> tuple[int, ...]:
        """Shards that are not complete: that have no marker, or one of which is known that it does not count.

        What markers hold is known once they were read: `check_markers`, and where a shard is read.
        """
        return self._table.missing()

    def check_markers(self) -> None:
        """Read every marker now, and look for the files that each names."""
        self._table.check()

    def facts(self, number: int) -> ShardFacts:
        """What the marker of a complete shard says. Raises StoreIncomplete if it is missing."""
        self._locate(self.images_in(number)[0])
        facts = self._table.get(number)
        assert facts is not None
        return facts

    def sealed_facts(self, number: int) -> ShardFacts | None:
        """What the summary says of a shard, to be compared with its marker; None if there is no summary."""
        return self._table.sealed(number)

    @property
    def complete(self) -> bool:
        """Every shard is there."""
        return not self.missing_shards()

    def refresh(self) -> None:
        """Look again which shards are there."""
        self.place.sync()
        self._table.refresh()

    def is_done(self, number: int) -> bool:
        """Look on disk, or in the bucket, whether a shard is complete now."""
        return self._table.look(number) is not None

    def _ids(self, number: int) -> tuple[str, ...]:
        return tuple(self.index.images[image] for image in self.images_in(number))

    @property
    def sealed(self) -> bool:
        """Whether there is a summary of all markers, so that none of them is read."""
        return self._table.is_sealed

    @property
    def skipped(self) -> dict[int, str]:
        """Image number -> reason, for images that could not be read. They hold zeros and are never to be drawn."""
        known = self._table.skipped().items()
        return dict(sorted((self.images_in(number)[row], reason) for (number, row), reason in known))

    @cached_property
    def codec(self) -> TransformCodec | None:
        """What codes the features, None if they are stored as they are. Raises StoreError if its fit is damaged."""
        with self.place.named():
            return read_fit(self.root, self.recipe)

    @property
    def nbytes(self) -> int:
        """Bytes of the complete shards on disk."""
        return self._table.nbytes()

    def info(self) -> dict[str, Any]:
        """Facts for people and machines, as JSON values."""
        nbytes, missing = self.nbytes, self.missing_shards()  # in this order: the first reads what is not known
        images_done = len(self.index.images) - sum(len(self.images_in(number)) for number in missing)
        return {
            "path": self.path,
            "format": self.format,
            "dataset": self.index.name,
            "dataset_digest": self.index.digest,
            "classes": len(self.index.classes),
            "folds": list(self.index.folds),
            "images": len(self.index.images),
            "growths": [state.images for state in self.states[: self.state + 1]],
            "images_to_come": max(0, self.states[-1].images - len(self.index.images)),
            "images_done": images_done,
            "skipped": {self.index.images[i]: reason for i, reason in self.skipped.items()},
            "shards": self.shards,
            "shards_missing": len(missing),
            "shard_images": self.shard_images,
            "complete": not missing,
            "sealed": self.sealed,
            "bytes": nbytes,
            "bytes_per_image": round(nbytes / images_done) if images_done else None,
            "recipe": self.recipe.to_dict(),
            "levels": [list(layout.image_shape) for layout in self._layouts[:-1]],
        }

    # -- reading -----------------------------------------------------------------------------------------------

    def features(self, images: Sequence[int], out: Sequence[NDArray[Any]] | None = None) -> list[NDArray[Any]]:
        """Features of images, finest level first.

        Args:
            images: n image numbers, repeats allowed (read once).
            out: C-ordered arrays to fill, as returned by an earlier call with as many images, or over pinned
                memory. Without it memory is taken that an earlier result no longer needs (`pipeline.store.buffers`).

        Returns:
            One (n, layers, rows, columns, channels) array per level in the storage type. int8 vectors have lost
            their length: only their direction means anything. Coded ones, (n, 1, rows, columns, bytes), are read
            by `codec.decode`.

        Raises:
            StoreError: an image was skipped or its chunk is damaged; names the store, the array and the image.
            StoreIncomplete: the image's shard is missing.
        """
        buffers = (
            list(out)
            if out is not None
            else [self.memory.empty((len(images), *layout.image_shape), layout.dtype) for layout in self._layouts[:-1]]
        )
        with self._present(self._names[:-1], images):  # all levels are fetched at once
            for level, buffer in enumerate(buffers):
                self._read(level, images, buffer)
        return buffers

    def labels(self, images: Sequence[int]) -> NDArray[Any]:
        """(n, S, S) label maps at network size: 0 background, class id + 1, or `index.ignore_label`.

        Errors as `features`.
        """
        layout = self._layouts[-1]
        buffer = self.memory.empty((len(images), *layout.image_shape), layout.dtype)
        self._read(len(self._layouts) - 1, images, buffer)
        return buffer

    def size(self, image: int) -> tuple[int, int]:
        """Original (height, width) of a photo, pixels."""
        return self._table.size(*self._locate(image))

    def classes_present(self, image: int) -> tuple[int, ...]:
        """Class ids in the photo's full-size mask, ascending. Small objects may be absent from the label map."""
        return self._table.classes(*self._locate(image))

    def _read(self, number: int, images: Sequence[int], buffer: NDArray[Any]) -> None:
        layout = self._layouts[number]
        if (
            buffer.shape != (len(images), *layout.image_shape)
            or buffer.dtype != layout.dtype
            or not buffer.flags.c_contiguous
        ):
            raise ValueError(
                f"out for '{layout.name}' has another shape, type or order than a C-ordered "
                f"{layout.dtype}{(len(images), *layout.image_shape)}: {buffer.dtype}{buffer.shape}."
            )
        first: dict[int, int] = {}
        with self._present([layout.name], images):
            for row, image in enumerate(map(int, images)):
                if image in first:
                    buffer[row] = buffer[first[image]]
                    continue
                first[image] = row
                reason = self._table.reason(*self._locate(image))
                if reason is not None:
                    raise StoreError(
                        f"Image '{self.index.images[image]}' has no features in {self.path}: it was skipped at "
                        f"extraction ({reason}). Leave it out of the episodes."
                    )
                try:
                    self._read_image(number, image, buffer[row])
                except FileNotFoundError as error:
                    raise self._damage(layout, image, "the chunk is not there, nor is its file") from error
                except (ValueError, OSError, RuntimeError) as error:
                    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                        raise StoreError(
                            f"{self.path} cannot be read: {error.strerror}. Raise the limit (`ulimit -n`). Nothing is "
                            f"wrong with the store."
                        ) from error
                    raise self._damage(layout, image, str(error) or repr(error)) from error

    def _read_image(self, number: int, image: int, out: NDArray[Any]) -> None:
        try:
            self._readers[number].read(self.row(image), out)
        except (ValueError, OSError, RuntimeError):
            if not self.place.remote:
                raise
            # The copy on this machine may be what is damaged.
            self.place.fetch_anew(self._table.stored(self.shard_of(image), [self._layouts[number].name]))
            self._readers[number].read(self.row(image), out)

    def _present(self, names: Sequence[str], images: Sequence[int]) -> AbstractContextManager[None]:
        """Inside the block the images' shards are on this machine."""
        shards = (self._locate(int(image))[0] for image in images)  # looked at for a bucket only
        return self.place.present(file for number in shards for file in self._table.stored(number, names))

    def read_chunk(self, name: str, image: int) -> NDArray[Any]:
        """One image of one array, verified. Errors as `features`."""
        number = self._names.index(name)
        out = np.empty((1, *self._layouts[number].image_shape), self._layouts[number].dtype)
        self._read(number, [image], out)
        return out[0]

    def _locate(self, image: int) -> tuple[int, int]:
        """(shard, row in it) of an image of a complete shard."""
        if not 0 <= image < len(self.index.images):
            raise StoreError(f"{self.path} has images 0 to {len(self.index.images) - 1}, asked for {image}.")
        number, row = divmod(self.row(image), self.shard_images)
        if not self._table.has(number):
            raise StoreIncomplete(
                f"Image '{self.index.images[image]}' is in shard {number} of {self.path}, which is missing. "
                f"Run the same `hsnet extract ... --store {self.path}` again: it makes only what is missing.",
                [number],
            )
        return number, row

    def _damage(self, layout: ArrayLayout, image: int, what: str) -> StoreError:
        number = self.shard_of(image)
        return StoreError(
            f"{self.path}: array '{layout.name}' is damaged at image '{self.index.images[image]}' "
            f"(file {self.place.shown(shard_file(self.root, layout.name, number))}): {what}. Nothing of it was used. "
            f"Delete {self.place.shown(marker_file(self.root, number))} and run the same `hsnet extract` "
            f"again: it makes this shard anew."
        )

    # -- writing -----------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[str]:
        """Hold the store as its only writer and clear away what a killed writer left.

        Yields a token for helper processes: `Place.still_owned`. If the block ends well and every shard is there (in
        this store object's knowledge: `refresh`), the store is sealed, see `pipeline.store.summary`.

        Raises:
            StoreError: another process is writing it.
        """
        with self.place.sole_writer() as token:
            require_no_links(self.root, self._names)
            self.check_markers()
            self._table.break_false_seal()
            sweep_partials(self.root, self._names, self.missing_shards())
            self.drop(self.place.absent(file for facts in self._table.all() for file in facts.stored()))
            yield token
            self._table.write_seal(self.index.digest, self.shard_images, token)

    def drop(self, numbers: Iterable[int]) -> None:
        """Delete shards, to be made anew. Inside `writing`."""
        for number in list(numbers):
            self.place.remove_shard(number, self._names)
            self._table.drop(number)

    def write_shard(
        self,
        number: int,
        levels: Sequence[NDArray[Any]],
        labels: NDArray[Any],
        sizes: Sequence[tuple[int, int]],
        classes: Sequence[Sequence[int]],
        skipped: Mapping[int, str] | None = None,
        token: str | None = None,
    ) -> ShardFacts:
        """Write one whole shard and commit it; whatever was there of it is deleted first.

        Args:
            levels: one (n, layers, rows, columns, channels) array per level in the storage type, n = the shard's
                images, in order.
            labels: (n, S, S), `index.label_dtype`.
            sizes: n original (height, width), pixels.
            classes: n lists of the class ids in the full-size masks.
            skipped: image number -> reason, for images without features.
            token: what `writing` gave. Uploading takes long: a writer that has lost a bucket's store by then must not
                commit.

        Raises:
            StoreError: shapes or types do not fit, or the disk refused (full, read-only); says how much was needed
                and is free. The shard then counts as missing, all others are as they were.
        """
        images = self.images_in(number)
        data = [*levels, labels]
        given = [(array.shape, array.dtype.name) for array in data]
        wanted = [((len(images), *layout.image_shape), layout.dtype.name) for layout in self._layouts]
        if given != wanted or not len(sizes) == len(classes) == len(images):
            raise StoreError(f"Shard {number} of {self.path} wants arrays {wanted}, got {given}. Nothing was written.")
        facts = ShardFacts(
            number=number,
            store=self.identity,
            images=tuple(self.index.images[i] for i in images),
            sizes=tuple((int(height), int(width)) for height, width in sizes),
            classes=tuple(tuple(sorted(map(int, present))) for present in classes),
            skipped={self.index.images[i]: reason for i, reason in sorted((skipped or {}).items())},
            files={},
        )
        self._table.drop(number)
        with self.place.writing_shard(number, sum(array.nbytes for array in data)):
            facts = write_whole_shard(self.root, self._layouts, data, facts)
            self.place.commit(facts, token)
        self._table.put(facts)
        return facts

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(layout.name for layout in self._layouts)

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore.open, (self.path, self.recipe, False, self.index.digest)
