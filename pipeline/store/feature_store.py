"""The feature store: one zarr group per data set and recipe, written shard by shard, safe to kill and to resume.

    S.zarr/
      zarr.json           attributes: format, recipe, data set (name, digest, number of images), images per shard
      index/              the data set's index as JSON bytes
      index-1/ row-1/     of a store that grew: the index after the first growth, and the row of each image
      level0/ level1/ ... features (image, layer, row, column, channel), finest grid first
      codec/              the fit of coded features, as arrays; only where there is one
      label/              class-index masks at network size (image, row, column)
      _done/000000.json   one marker per complete shard, written last

docs/store.md describes it for readers that do not have this program.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer.cpu import NDBuffer

from hsnet.errors import ConfigError, DataError, ShapeError, StoreError, StoreIncomplete, StoreMismatch
from pipeline.common.files import sync, whole_folder
from pipeline.datasets.index import DatasetIndex
from pipeline.features.budgeted import TransformCodec
from pipeline.features.recipe import Recipe, difference_lines
from pipeline.store.arrays import ZSTD_LEVEL, ArrayLayout, array_layouts, calm_zarr, open_array
from pipeline.store.attributes import attributes, read_facts, read_index, read_placement, write_state
from pipeline.store.buffers import Buffers
from pipeline.store.fit_arrays import read_fit, write_fit
from pipeline.store.markers import (
    MARKERS,
    ShardFacts,
    marker_file,
    read_marker,
    remove_shard,
    shard_file,
    sweep_partials,
    sync_and_sum,
    write_marker,
)
from pipeline.store.mirror import Wanted, is_store, mirror_at, mirror_of, named, resync, root_of
from pipeline.store.place import sole_writer
from pipeline.store.shard_file import ChunkReader, OpenShards, reads, write_shard_file
from pipeline.store.states import State, StoreFacts

SHARD_IMAGES = 16
MAPPED_OF_MIRROR = 32
"""Shard files of a bucket's store that stay mapped; see `pipeline.store.shard_file.OPEN_SHARDS`."""


class FeatureStore:
    """Features, label maps and image facts of one data set, made by one recipe.

    Open with `FeatureStore.open` to read, `FeatureStore.create` to write; the constructor is private. Images are
    named by their number in `index.images`. Reading is safe in several threads and processes; writing goes through
    `write_shard`, whole shards only, inside `with store.writing():` in one process of the machine (its helpers on
    other processes write under its lock).
    """

    def __init__(self, root: Path, facts: StoreFacts, place: int, writable: bool) -> None:
        calm_zarr()
        self.root = root
        self._mirror = mirror_at(root)
        self.path = str(root) if self._mirror is None else self._mirror.url
        self.recipe = facts.recipe
        self.index = read_index(root, facts.states[place])
        self.shard_images = facts.shard_images
        self.identity = facts.identity
        self.placement = read_placement(root, facts, place)
        self.states, self.place = facts.states, place
        try:
            self._layouts = array_layouts(facts.recipe, self.index.label_dtype, facts.shard_images)
        except (ConfigError, ShapeError) as error:
            raise StoreError(f"{root} holds features this version cannot interpret: {error}") from None
        # While a store grows, its arrays may already be as long as they will be.
        rows = {facts.rows(later) for later in range(facts.current, len(facts.states))}
        metadata = [layout.check(root, rows) for layout in self._layouts]
        self._arrays = [open_array(root, layout.name, writable) for layout in self._layouts]
        # A file that is evicted takes its place on the disk until it is unmapped.
        shards = OpenShards() if self._mirror is None else OpenShards(MAPPED_OF_MIRROR)
        self._readers = [
            ChunkReader(partial(shard_file, root.resolve(), layout.name), self.shard_images, layout.compressed, shards)
            if reads(stored, layout.compressed)
            else None
            for layout, stored in zip(self._layouts, metadata, strict=True)
        ]
        self._memory = Buffers()
        self._facts: dict[int, ShardFacts] = {}
        self._read_markers()

    @classmethod
    def create(
        cls,
        path: str | Path,
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
        if not 1 <= shard_images <= 4096:
            raise ConfigError(f"Images per shard must be 1 to 4096, got {shard_images}.")
        if not index.images:
            raise DataError(f"Data set {index.name} has no images: nothing to store.")
        if mirror_of(path) is not None and not is_store(path):
            _build_remote(path, recipe, index, shard_images, codec)
        root = root_of(path)
        if not root.exists() or (root.is_dir() and not any(root.iterdir())):
            try:
                _build(root, recipe, index, shard_images, codec)
            except OSError as error:
                raise StoreError(f"Cannot make the store {root}: {error}.") from error
        return cls._open(root, recipe, index.digest, writable=True)

    @classmethod
    def open(
        cls,
        path: str | Path,
        recipe: Recipe | None = None,
        require_complete: bool = True,
        index_digest: str | None = None,
        writable: bool = False,
    ) -> FeatureStore:
        """Open a store to read.

        Args:
            recipe: what the store must have been made by; None accepts anything.
            index_digest: the data set it must hold. Of a store that grew, an earlier or an unfinished state can be
                asked for; None is the current one.
            require_complete: refuse a store with missing shards.
            writable: allow `write_shard`, for workers of the process that holds `writing`.

        Raises:
            StoreMismatch: names every differing field with both values.
            StoreIncomplete: counts the missing shards and names the command that adds them.
            StoreError: not a store, damaged, or written by a newer version.
        """
        store = cls._open(root_of(path), recipe, index_digest, writable=writable)
        missing = store.missing_shards()
        if require_complete and missing:
            raise StoreIncomplete(
                f"{path} is not complete: {len(missing)} of {store.shards} shards are missing "
                f"(first: number {missing[0]}, image '{store.index.images[store.images_in(missing[0])[0]]}'). "
                f"Run the same `hsnet extract ... --store {path}` again: it makes only what is missing.",
                missing,
            )
        return store

    @classmethod
    def _open(cls, root: Path, recipe: Recipe | None, digest: str | None, writable: bool) -> FeatureStore:
        with named(root):
            while True:
                facts = read_facts(root)
                try:
                    return cls(root, facts, _place(root, facts, recipe, digest), writable)
                except StoreMismatch:
                    raise
                except StoreError:
                    if read_facts(resync(root)) == facts:
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
        """Shards that are not complete, as of opening or the last `refresh`."""
        return tuple(number for number in range(self.shards) if number not in self._facts)

    def facts(self, number: int) -> ShardFacts:
        """What the marker of a complete shard says. Raises StoreIncomplete if it is missing."""
        return self._locate(self.images_in(number)[0])[0]

    @property
    def complete(self) -> bool:
        """Every shard is there."""
        return not self.missing_shards()

    def refresh(self) -> None:
        """Read all markers again."""
        resync(self.root)
        self._read_markers()

    def is_done(self, number: int) -> bool:
        """Look on disk, or in the bucket, whether a shard is complete now."""
        if self._mirror is not None:
            self._mirror.fetch_marker(number)
        return self._read_marker(number)

    def _read_markers(self) -> None:
        for number in range(self.shards):
            self._read_marker(number)

    def _read_marker(self, number: int) -> bool:
        images = tuple(self.index.images[i] for i in self.images_in(number))
        facts = read_marker(self.root, number, self.identity, images, self._names, look=self._mirror is None)
        self._facts.pop(number, None)
        if facts is not None:
            self._facts[number] = facts
        return facts is not None

    @property
    def skipped(self) -> dict[int, str]:
        """Image number -> reason, for images that could not be read. They hold zeros and are never to be drawn."""
        found = {
            i: facts.skipped[self.index.images[i]]
            for number, facts in self._facts.items()
            if facts.skipped
            for i in self.images_in(number)
            if self.index.images[i] in facts.skipped
        }
        return dict(sorted(found.items()))

    @cached_property
    def codec(self) -> TransformCodec | None:
        """What codes the features, None if they are stored as they are. Raises StoreError if its fit is damaged."""
        return read_fit(self.root, self.recipe)

    @property
    def nbytes(self) -> int:
        """Bytes of the complete shards on disk."""
        return sum(facts.nbytes for facts in self._facts.values())

    def info(self) -> dict[str, Any]:
        """Facts for people and machines, as JSON values."""
        images_done = sum(len(facts.images) for facts in self._facts.values())
        return {
            "path": self.path,
            "format": self.recipe.format,
            "dataset": self.index.name,
            "dataset_digest": self.index.digest,
            "classes": len(self.index.classes),
            "folds": list(self.index.folds),
            "images": len(self.index.images),
            "growths": [state.images for state in self.states[: self.place + 1]],
            "images_to_come": max(0, self.states[-1].images - len(self.index.images)),
            "images_done": images_done,
            "skipped": {self.index.images[i]: reason for i, reason in self.skipped.items()},
            "shards": self.shards,
            "shards_missing": len(self.missing_shards()),
            "shard_images": self.shard_images,
            "complete": self.complete,
            "bytes": self.nbytes,
            "bytes_per_image": round(self.nbytes / images_done) if images_done else None,
            "recipe": self.recipe.to_dict(),
            "levels": [list(layout.image_shape) for layout in self._layouts[:-1]],
        }

    # -- reading -----------------------------------------------------------------------------------------------

    def features(self, images: Sequence[int], out: Sequence[NDArray[Any]] | None = None) -> list[NDArray[Any]]:
        """Features of images, finest level first.

        Args:
            images: n image numbers, repeats allowed (read once).
            out: arrays to fill, as returned by an earlier call with as many images, or over pinned memory. Without
                it memory is taken that an earlier result no longer needs (`pipeline.store.buffers`).

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
            else [self._memory.empty((len(images), *layout.image_shape), layout.dtype) for layout in self._layouts[:-1]]
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
        buffer = np.empty((len(images), *layout.image_shape), layout.dtype)
        self._read(len(self._layouts) - 1, images, buffer)
        return buffer

    def size(self, image: int) -> tuple[int, int]:
        """Original (height, width) of a photo, pixels."""
        facts, row = self._locate(image)
        return facts.sizes[row]

    def classes_present(self, image: int) -> tuple[int, ...]:
        """Class ids in the photo's full-size mask, ascending. Small objects may be absent from the label map."""
        facts, row = self._locate(image)
        return facts.classes[row]

    def _read(self, number: int, images: Sequence[int], buffer: NDArray[Any]) -> None:
        layout = self._layouts[number]
        if buffer.shape != (len(images), *layout.image_shape) or buffer.dtype != layout.dtype:
            raise ValueError(f"out for '{layout.name}' has another shape or type: {buffer.dtype}{buffer.shape}.")
        first: dict[int, int] = {}
        with self._present([layout.name], images):
            for row, image in enumerate(map(int, images)):
                if image in first:
                    buffer[row] = buffer[first[image]]
                    continue
                first[image] = row
                facts, _ = self._locate(image)
                if self.index.images[image] in facts.skipped:
                    raise StoreError(
                        f"Image '{self.index.images[image]}' has no features in {self.path}: it was skipped at "
                        f"extraction ({facts.skipped[self.index.images[image]]}). Leave it out of the episodes."
                    )
                try:
                    self._read_chunk(number, image, buffer[row])
                except StoreError:
                    raise
                except FileNotFoundError as error:
                    raise self._damage(layout, image, "the chunk is not there, nor is its file") from error
                except Exception as error:  # zarr's errors on damaged data have no common base
                    raise self._damage(layout, image, str(error) or repr(error)) from error

    @contextmanager
    def _present(self, names: Sequence[str], images: Sequence[int]) -> Iterator[None]:
        """Inside the block the images' shards are on this machine: no work unless the store is in a bucket."""
        if self._mirror is None:
            yield
            return
        located = [self._locate(image)[0] for image in sorted(set(map(int, images)))]
        shards = {facts.number: facts for facts in located}.values()
        with named(self.root), self._mirror.present([Wanted(n, s.number, *s.files[n]) for s in shards for n in names]):
            yield

    @property
    def remote(self) -> bool:
        """Whether it is in an object store, and only mirrored on this machine."""
        return self._mirror is not None

    def shown(self, path: Path) -> str:
        """A file of the store for people: as an address if it is in an object store."""
        return str(path) if self._mirror is None else self._mirror.named(str(path))

    def fetch_anew(self, number: int, name: str) -> None:
        """Read a shard file of a bucket from there, whatever is on this machine; nothing to do on a disk.

        Raises:
            StoreError: it is not there, or not what its marker says.
        """
        if self._mirror is not None:
            wanted = [Wanted(name, number, *self.facts(number).files[name])]
            self._mirror.discard(wanted)
            with self._mirror.present(wanted):
                pass

    def read_chunk(self, name: str, image: int) -> NDArray[Any]:
        """One image of one array, verified. Errors as `features`."""
        number = self._names.index(name)
        out = np.empty((1, *self._layouts[number].image_shape), self._layouts[number].dtype)
        self._read(number, [image], out)
        return out[0]

    def _read_chunk(self, number: int, image: int, out: NDArray[Any]) -> None:
        try:
            self._read_here(number, image, out)
        except Exception:
            if self._mirror is None:
                raise
            # The copy on this machine may be what is damaged.
            self.fetch_anew(self.shard_of(image), self._names[number])
            self._read_here(number, image, out)

    def _read_here(self, number: int, image: int, out: NDArray[Any]) -> None:
        reader, layout = self._readers[number], self._layouts[number]
        if reader is not None and out.flags.c_contiguous:
            reader.read(self.row(image), out)
            return
        # One image at a time: selecting several of a sharded array at once costs 60 times as much in zarr 3.1.
        self._arrays[number].get_basic_selection((self.row(image),), out=NDBuffer.from_numpy_array(out))
        if layout.dtype.kind == "f" and not np.isfinite(out).all():
            raise ValueError("the chunk is not there, or holds NaN or infinity")
        if layout.dtype.kind != "f" and layout.name != "label" and out.flat[0] == layout.fill:
            raise ValueError("the chunk is not there")

    def _locate(self, image: int) -> tuple[ShardFacts, int]:
        if not 0 <= image < len(self.index.images):
            raise StoreError(f"{self.path} has images 0 to {len(self.index.images) - 1}, asked for {image}.")
        number, row = divmod(self.row(image), self.shard_images)
        facts = self._facts.get(number)
        if facts is None:
            # zarr would return fill values without an error.
            raise StoreIncomplete(
                f"Image '{self.index.images[image]}' is in shard {number} of {self.path}, which is missing. "
                f"Run the same `hsnet extract ... --store {self.path}` again: it makes only what is missing.",
                [number],
            )
        return facts, row

    def _damage(self, layout: ArrayLayout, image: int, what: str) -> StoreError:
        number = self.shard_of(image)
        return StoreError(
            f"{self.path}: array '{layout.name}' is damaged at image '{self.index.images[image]}' "
            f"(file {shard_file(self.root, layout.name, number)}): {what}. Nothing of it was used. Delete "
            f"{marker_file(self.root, number)} and run the same `hsnet extract` again: it makes this shard anew."
        )

    # -- writing -----------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[str]:
        """Hold the store as its only writer and clear away what a killed writer left.

        Yields a token for helper processes: `pipeline.store.place.still_owned`.

        Raises:
            StoreError: another process is writing it.
        """
        with named(self.root), sole_writer(self.root) as token:
            sweep_partials(self.root, self._names)
            self.refresh()
            if self._mirror is not None:
                shards = self._facts.values()
                self.drop(self._mirror.absent(Wanted(n, s.number, *s.files[n]) for s in shards for n in self._names))
            yield token

    def drop(self, numbers: Iterable[int]) -> None:
        """Delete shards, to be made anew. Inside `writing`."""
        for number in list(numbers):
            if self._mirror is not None:
                self._mirror.remove(number, self._names)
            remove_shard(self.root, number, self._names)
            self._facts.pop(number, None)

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
        found = [(array.shape, array.dtype.name) for array in data]
        wanted = [((len(images), *layout.image_shape), layout.dtype.name) for layout in self._layouts]
        if found != wanted or not len(sizes) == len(classes) == len(images):
            raise StoreError(f"Shard {number} of {self.path} wants arrays {wanted}, got {found}. Nothing was written.")
        self._facts.pop(number, None)
        remaking = nullcontext() if self._mirror is None else self._mirror.remaking(number, sum(a.nbytes for a in data))
        with named(self.root), remaking:
            facts = self._write_files(number, images, data, sizes, classes, skipped or {})
            if self._mirror is not None:
                self._mirror.upload(number, [Wanted(name, number, *facts.files[name]) for name in self._names], token)
        self._facts[number] = facts
        return facts

    def _write_files(
        self,
        number: int,
        images: Sequence[int],
        data: Sequence[NDArray[Any]],
        sizes: Sequence[tuple[int, int]],
        classes: Sequence[Sequence[int]],
        skipped: Mapping[int, str],
    ) -> ShardFacts:
        try:
            # An existing shard must go first: zarr 3.1 reads it before overwriting, and fails if it is damaged.
            remove_shard(self.root, number, self._names)
            files = {
                layout.name: _write_array(self.root, layout, number, values, array if reader is None else None)
                for layout, values, array, reader in zip(self._layouts, data, self._arrays, self._readers, strict=True)
            }
            for name in self._names:
                sync(shard_file(self.root, name, number).parent)
            facts = ShardFacts(
                number=number,
                store=self.identity,
                images=tuple(self.index.images[i] for i in images),
                sizes=tuple((int(height), int(width)) for height, width in sizes),
                classes=tuple(tuple(sorted(map(int, present))) for present in classes),
                skipped={self.index.images[i]: reason for i, reason in sorted(skipped.items())},
                files=files,
            )
            write_marker(self.root, facts)
        except OSError as error:
            raise self._refusal(number, sum(array.nbytes for array in data), error) from error
        return facts

    def _refusal(self, number: int, needed: int, error: OSError) -> StoreError:
        free = shutil.disk_usage(self.root).free
        advice = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Mend the cause"
        with suppress(OSError):  # In a read-only folder it stays; without a marker it counts for nothing.
            remove_shard(self.root, number, self._names)
        return StoreError(
            f"Shard {number} of {self.root} could not be written: {error}. It takes {needed:,} bytes, {free:,} are "
            f"free there. {advice} and run the same `hsnet extract` again: complete shards are kept."
        )

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(layout.name for layout in self._layouts)

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore.open, (self.path, self.recipe, False, self.index.digest)


def _write_array(
    root: Path, layout: ArrayLayout, number: int, values: NDArray[Any], through: Any = None
) -> tuple[int, str]:
    """One array's file of a shard, `through` zarr if need be; (bytes, CRC-32). It is on disk afterwards."""
    path = shard_file(root, layout.name, number)
    if through is None:
        return write_shard_file(path, values, layout.shard_images, ZSTD_LEVEL if layout.compressed else None)
    first = number * layout.shard_images
    through[first : first + len(values)] = values
    return sync_and_sum(path)


def _place(root: Path, facts: StoreFacts, recipe: Recipe | None, digest: str | None) -> int:
    """Which state is asked for; None is anything. Raises StoreMismatch if the store holds no such thing."""
    differences = facts.recipe.differences(recipe) if recipe else {}
    place = facts.current if digest is None else facts.find(digest)
    if place is not None and not differences:
        return place
    if place is None:
        differences["data set"] = (facts.states[facts.current].digest, digest)
    raise StoreMismatch(
        f"{root} was extracted with another recipe or from another data set:\n"
        f"{difference_lines(differences)}\n"
        f"Pass the stored values, or extract into a new store (`hsnet extract ... --store PATH`). "
        f"Nothing was changed.",
        differences,
    )


def _build_remote(
    path: str | Path, recipe: Recipe, index: DatasetIndex, shard_images: int, codec: TransformCodec | None
) -> None:
    """Make the skeleton here and upload it, by one process at a time: arrays of two recipes must not mix."""
    mirror = mirror_of(path)
    assert mirror is not None
    with sole_writer(mirror.root):
        if is_store(path):
            return  # another process made it in the meantime
        mirror.require_free()
        mirror.clear()
        try:
            _build(mirror.root, recipe, index, shard_images, codec)
        except OSError as error:
            raise StoreError(f"Cannot make the store {path} in {mirror.root}: {error}.") from error
        mirror.publish()


def _build(root: Path, recipe: Recipe, index: DatasetIndex, shard_images: int, codec: TransformCodec | None) -> None:
    """Make the whole skeleton or nothing: a store is never there with half its metadata."""
    calm_zarr()
    array_layouts(recipe, index.label_dtype, shard_images)  # an impossible recipe leaves nothing on the disk
    root.parent.mkdir(parents=True, exist_ok=True)
    state = State(index.digest, len(index.images))
    stored: dict[str, Any] = {"hsnet_store": attributes(StoreFacts(recipe, shard_images, (state,)), index.name)}
    try:
        with whole_folder(root) as new:
            group = zarr.open_group(str(new), mode="w-", zarr_format=3, attributes=stored)
            write_state(new, state, index)
            for layout in array_layouts(recipe, index.label_dtype, shard_images):
                layout.create(group, state.images)
            if codec is not None:
                write_fit(group, codec)
            (new / MARKERS).mkdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Another process made it in the meantime. The caller opens that one, and compares recipes.
