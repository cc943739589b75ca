"""The feature store: one zarr group per data set and recipe, written shard by shard, safe to kill and to resume.

    S.zarr/
      zarr.json           attributes: format, recipe, data set (name, digest, number of images), images per shard
      index/              the data set's index as JSON bytes
      level0/ level1/ ... features (image, layer, row, column, channel), finest grid first
      codec/              the fit of coded features, as arrays; only where there is one
      label/              class-index masks at network size (image, row, column)
      _done/000000.json   one marker per complete shard, written last

docs/store.md describes it for readers that do not have this program.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.errors
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer.cpu import NDBuffer

from hsnet.errors import ConfigError, DataError, ShapeError, StoreError, StoreIncomplete, StoreMismatch
from pipeline.buffers import Buffers
from pipeline.chunks import ChunkReader, OpenShards, reads, write_shard_file
from pipeline.datasets.index import DatasetIndex
from pipeline.fit_arrays import read_fit, write_fit
from pipeline.ownership import sole_writer
from pipeline.recipe import FORMAT, Recipe, difference_lines
from pipeline.shards import (
    MARKERS,
    ShardFacts,
    marker_file,
    read_marker,
    remove_shard,
    shard_file,
    sweep_partials,
    sync_and_sum,
    sync_folder,
    write_marker,
)
from pipeline.transform import TransformCodec

SHARD_IMAGES = 16
_LARGEST_METADATA = 1 << 20
_LARGEST_INDEX = 256 << 20
_ZSTD_LEVEL = 3
_AXES = ("image", "layer", "row", "column", "channel")


@dataclass(frozen=True)
class _Layout:
    """What one array must look like. Everything follows from the recipe, so a stored array can be checked."""

    name: str
    shape: tuple[int, ...]
    shard_images: int
    dtype: np.dtype
    compressed: bool

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    @property
    def fill(self) -> int | float:
        """A value no image begins with, so that data which is not there cannot pass for zeros."""
        if self.dtype.kind == "f":
            return math.nan
        return int(np.iinfo(self.dtype).min if self.dtype.kind == "i" else np.iinfo(self.dtype).max)

    def create(self, group: zarr.Group) -> None:
        # Every inner chunk carries a checksum: zarr protects only the shard's index by itself. Empty chunks are
        # written, so that a chunk which is absent was never written.
        checksum = Crc32cCodec()
        group.create_array(
            self.name,
            shape=self.shape,
            chunks=(1, *self.image_shape),
            shards=(self.shard_images, *self.image_shape),
            dtype=self.dtype,
            filters=None,
            compressors=[ZstdCodec(level=_ZSTD_LEVEL), checksum] if self.compressed else [checksum],
            fill_value=self.fill,
            dimension_names=_AXES if not self.compressed else ("image", "row", "column"),
            config={"write_empty_chunks": True, "order": "C"},
        )

    def check(self, root: Path) -> dict[str, Any]:
        """Compare the array's metadata on disk, before zarr or anyone else acts on it, and return it."""
        stored = _read_json(root / self.name / "zarr.json")
        try:
            (sharding,) = stored["codecs"]
            inner = sharding["configuration"]
            found: dict[str, object] = {
                "shape": stored["shape"],
                "data_type": stored["data_type"],
                "shard": stored["chunk_grid"]["configuration"]["chunk_shape"],
                "chunk": inner["chunk_shape"],
                "codecs": [codec["name"] for codec in inner["codecs"]],
            }
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{root}: the metadata of array '{self.name}' is damaged ({error!r}).") from None
        wanted: dict[str, object] = {
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "shard": [self.shard_images, *self.image_shape],
            "chunk": [1, *self.image_shape],
            "codecs": ["bytes", "zstd", "crc32c"] if self.compressed else ["bytes", "crc32c"],
        }
        if found != wanted:
            pairs = {key: (found[key], wanted[key]) for key in wanted if found[key] != wanted[key]}
            raise StoreError(
                f"{root}: array '{self.name}' does not fit the store's recipe:\n{difference_lines(pairs)}\n"
                f"The store was changed by something else. Extract into a new store."
            )
        return stored


class FeatureStore:
    """Features, label maps and image facts of one data set, made by one recipe.

    Open with `FeatureStore.open` to read, `FeatureStore.create` to write; the constructor is private. Images are
    named by their number in `index.images`. Reading is safe in several threads and processes; writing goes through
    `write_shard`, whole shards only, inside `with store.writing():` in one process of the machine (its helpers on
    other processes write under its lock).
    """

    def __init__(self, root: Path, recipe: Recipe, index: DatasetIndex, shard_images: int, writable: bool) -> None:
        _calm_zarr()
        self.root = root
        self.recipe = recipe
        self.index = index
        self.shard_images = shard_images
        self.identity = _identity(recipe, index)
        try:
            self._layouts = _layouts(recipe, index, shard_images)
        except (ConfigError, ShapeError) as error:
            raise StoreError(f"{root} holds features this version cannot interpret: {error}") from None
        metadata = [layout.check(root) for layout in self._layouts]
        self._arrays = [_open_array(root, layout.name, writable) for layout in self._layouts]
        shards = OpenShards()
        self._readers = [
            ChunkReader(partial(shard_file, root.resolve(), layout.name), shard_images, layout.compressed, shards)
            if reads(stored, layout.compressed)
            else None
            for layout, stored in zip(self._layouts, metadata, strict=True)
        ]
        self._memory = Buffers()
        self._facts: dict[int, ShardFacts] = {}
        self.refresh()

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
        root = Path(path)
        if not 1 <= shard_images <= 4096:
            raise ConfigError(f"Images per shard must be 1 to 4096, got {shard_images}.")
        if not index.images:
            raise DataError(f"Data set {index.name} has no images: nothing to store.")
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
            recipe, index_digest: what the store must hold; None accepts anything.
            require_complete: refuse a store with missing shards.
            writable: allow `write_shard`, for workers of the process that holds `writing`.

        Raises:
            StoreMismatch: names every differing field with both values.
            StoreIncomplete: counts the missing shards and names the command that adds them.
            StoreError: not a store, damaged, or written by a newer version.
        """
        store = cls._open(Path(path), recipe, index_digest, writable=writable)
        missing = store.missing_shards()
        if require_complete and missing:
            raise StoreIncomplete(
                f"{path} is not complete: {len(missing)} of {store.shards} shards are missing "
                f"(first: number {missing[0]}, image '{store.index.images[missing[0] * store.shard_images]}'). "
                f"Run the same `hsnet extract ... --store {path}` again: it makes only what is missing.",
                missing,
            )
        return store

    @classmethod
    def _open(cls, root: Path, recipe: Recipe | None, digest: str | None, writable: bool) -> FeatureStore:
        stored, stored_digest, shard_images, images = _read_attributes(root)
        differences = stored.differences(recipe) if recipe else {}
        if digest is not None and digest != stored_digest:
            differences["data set"] = (stored_digest, digest)
        if differences:
            raise StoreMismatch(
                f"{root} was extracted with another recipe or from another data set:\n"
                f"{difference_lines(differences)}\n"
                f"Pass the stored values, or extract into a new store (`hsnet extract ... --store PATH`). "
                f"Nothing was changed.",
                differences,
            )
        index = _read_index(root)
        if index.digest != stored_digest or len(index.images) != images:
            raise StoreError(
                f"{root}: the index in the store does not belong to it: digest {index.digest} of "
                f"{len(index.images)} images, the attributes say {stored_digest} of {images}."
            )
        return cls(root, stored, index, shard_images, writable)

    # -- what there is -----------------------------------------------------------------------------------------

    @property
    def shards(self) -> int:
        """Number of shards of the complete store."""
        return -(-len(self.index.images) // self.shard_images)

    def shard_range(self, number: int) -> range:
        """Numbers of a shard's images."""
        return range(number * self.shard_images, min((number + 1) * self.shard_images, len(self.index.images)))

    def missing_shards(self) -> tuple[int, ...]:
        """Shards that are not complete, as of opening or the last `refresh`."""
        return tuple(number for number in range(self.shards) if number not in self._facts)

    def facts(self, number: int) -> ShardFacts:
        """What the marker of a complete shard says. Raises StoreIncomplete if it is missing."""
        return self._locate(number * self.shard_images)[0]

    @property
    def complete(self) -> bool:
        """Every shard is there."""
        return not self.missing_shards()

    def refresh(self) -> None:
        """Read all markers again."""
        for number in range(self.shards):
            self.is_done(number)

    def is_done(self, number: int) -> bool:
        """Look on disk whether a shard is complete now."""
        images = tuple(self.index.images[i] for i in self.shard_range(number))
        facts = read_marker(self.root, number, self.identity, images, self._names)
        self._facts.pop(number, None)
        if facts is not None:
            self._facts[number] = facts
        return facts is not None

    @property
    def skipped(self) -> dict[int, str]:
        """Image number -> reason, for images that could not be read. They hold zeros and are never to be drawn."""
        return {
            i: facts.skipped[self.index.images[i]]
            for number, facts in sorted(self._facts.items())
            for i in self.shard_range(number)
            if self.index.images[i] in facts.skipped
        }

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
            "path": str(self.root),
            "format": self.recipe.format,
            "dataset": self.index.name,
            "dataset_digest": self.index.digest,
            "classes": len(self.index.classes),
            "folds": list(self.index.folds),
            "images": len(self.index.images),
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
                it memory is taken that an earlier result no longer needs (`pipeline.buffers`).

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
        for row, image in enumerate(map(int, images)):
            if image in first:
                buffer[row] = buffer[first[image]]
                continue
            first[image] = row
            facts, _ = self._locate(image)
            if self.index.images[image] in facts.skipped:
                raise StoreError(
                    f"Image '{self.index.images[image]}' has no features in {self.root}: it was skipped at extraction "
                    f"({facts.skipped[self.index.images[image]]}). Leave it out of the episodes."
                )
            try:
                self._read_chunk(number, image, buffer[row])
            except FileNotFoundError as error:
                raise self._damage(layout, image, "the chunk is not there, nor is its file") from error
            except Exception as error:  # zarr's errors on damaged data have no common base
                raise self._damage(layout, image, str(error) or repr(error)) from error

    def read_chunk(self, name: str, image: int) -> NDArray[Any]:
        """One image of one array, verified. Errors as `features`."""
        number = self._names.index(name)
        out = np.empty((1, *self._layouts[number].image_shape), self._layouts[number].dtype)
        self._read(number, [image], out)
        return out[0]

    def _read_chunk(self, number: int, image: int, out: NDArray[Any]) -> None:
        reader, layout = self._readers[number], self._layouts[number]
        if reader is not None and out.flags.c_contiguous:
            reader.read(image, out)
            return
        # One image at a time: selecting several of a sharded array at once costs 60 times as much in zarr 3.1.
        self._arrays[number].get_basic_selection((image,), out=NDBuffer.from_numpy_array(out))
        if layout.dtype.kind == "f" and not np.isfinite(out).all():
            raise ValueError("the chunk is not there, or holds NaN or infinity")
        if layout.dtype.kind != "f" and layout.name != "label" and out.flat[0] == layout.fill:
            raise ValueError("the chunk is not there")

    def _locate(self, image: int) -> tuple[ShardFacts, int]:
        if not 0 <= image < len(self.index.images):
            raise StoreError(f"{self.root} has images 0 to {len(self.index.images) - 1}, asked for {image}.")
        number, row = divmod(image, self.shard_images)
        facts = self._facts.get(number)
        if facts is None:
            # zarr would return fill values without an error.
            raise StoreIncomplete(
                f"Image '{self.index.images[image]}' is in shard {number} of {self.root}, which is missing. "
                f"Run the same `hsnet extract ... --store {self.root}` again: it makes only what is missing.",
                [number],
            )
        return facts, row

    def _damage(self, layout: _Layout, image: int, what: str) -> StoreError:
        number = image // self.shard_images
        return StoreError(
            f"{self.root}: array '{layout.name}' is damaged at image '{self.index.images[image]}' "
            f"(file {shard_file(self.root, layout.name, number)}): {what}. Nothing of it was used. Delete "
            f"{marker_file(self.root, number)} and run the same `hsnet extract` again: it makes this shard anew."
        )

    # -- writing -----------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[str]:
        """Hold the store as its only writer and clear away what a killed writer left.

        Yields a token for helper processes: `pipeline.ownership.still_owned`.

        Raises:
            StoreError: another process is writing it.
        """
        with sole_writer(self.root) as token:
            sweep_partials(self.root, self._names)
            self.refresh()
            yield token

    def drop(self, numbers: Iterable[int]) -> None:
        """Delete shards, to be made anew. Inside `writing`."""
        for number in list(numbers):
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
    ) -> ShardFacts:
        """Write one whole shard and commit it; whatever was there of it is deleted first.

        Args:
            levels: one (n, layers, rows, columns, channels) array per level in the storage type, n = the shard's
                images, in order.
            labels: (n, S, S), `index.label_dtype`.
            sizes: n original (height, width), pixels.
            classes: n lists of the class ids in the full-size masks.
            skipped: image number -> reason, for images without features.

        Raises:
            StoreError: shapes or types do not fit, or the disk refused (full, read-only); says how much was needed
                and is free. The shard then counts as missing, all others are as they were.
        """
        images = self.shard_range(number)
        data = [*levels, labels]
        found = [(array.shape, array.dtype.name) for array in data]
        wanted = [((len(images), *layout.image_shape), layout.dtype.name) for layout in self._layouts]
        if found != wanted or not len(sizes) == len(classes) == len(images):
            raise StoreError(f"Shard {number} of {self.root} wants arrays {wanted}, got {found}. Nothing was written.")
        self._facts.pop(number, None)
        try:
            # An existing shard must go first: zarr 3.1 reads it before overwriting, and fails if it is damaged.
            remove_shard(self.root, number, self._names)
            files = {
                layout.name: _write_array(self.root, layout, number, values, array if reader is None else None)
                for layout, values, array, reader in zip(self._layouts, data, self._arrays, self._readers, strict=True)
            }
            for name in self._names:
                sync_folder(shard_file(self.root, name, number).parent)
            facts = ShardFacts(
                number=number,
                store=self.identity,
                images=tuple(self.index.images[i] for i in images),
                sizes=tuple((int(height), int(width)) for height, width in sizes),
                classes=tuple(tuple(sorted(map(int, present))) for present in classes),
                skipped={self.index.images[i]: reason for i, reason in sorted((skipped or {}).items())},
                files=files,
            )
            write_marker(self.root, facts)
        except OSError as error:
            raise self._refusal(number, sum(array.nbytes for array in data), error) from error
        self._facts[number] = facts
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
        return FeatureStore.open, (str(self.root), self.recipe, False, self.index.digest)


def _write_array(
    root: Path, layout: _Layout, number: int, values: NDArray[Any], through: Any = None
) -> tuple[int, str]:
    """One array's file of a shard, `through` zarr if need be; (bytes, CRC-32). It is on disk afterwards."""
    path = shard_file(root, layout.name, number)
    if through is None:
        return write_shard_file(path, values, layout.shard_images, _ZSTD_LEVEL if layout.compressed else None)
    first = number * layout.shard_images
    through[first : first + len(values)] = values
    return sync_and_sum(path)


def _layouts(recipe: Recipe, index: DatasetIndex, shard_images: int) -> list[_Layout]:
    n = len(index.images)
    size = recipe.image_size
    levels = [
        _Layout(f"level{k}", (n, *shape), shard_images, recipe.dtype, compressed=False)
        for k, shape in enumerate(recipe.stored_shapes())
    ]
    return [*levels, _Layout("label", (n, size, size), shard_images, np.dtype(index.label_dtype), compressed=True)]


def image_nbytes(recipe: Recipe, index: DatasetIndex) -> int:
    """Bytes an image takes at most: features exactly, its label map as if it did not compress."""
    per_chunk = 32  # checksum, place in the shard's index
    layouts = _layouts(recipe, index, 1)
    return sum(math.prod(layout.image_shape) * layout.dtype.itemsize + per_chunk for layout in layouts)


def _identity(recipe: Recipe, index: DatasetIndex) -> str:
    return "sha256:" + hashlib.sha256(f"{recipe.to_json()}\n{index.digest}".encode()).hexdigest()


def _build(root: Path, recipe: Recipe, index: DatasetIndex, shard_images: int, codec: TransformCodec | None) -> None:
    """Make the whole skeleton beside its place and rename it: a store is never there with half its metadata."""
    _calm_zarr()
    layouts = _layouts(recipe, index, shard_images)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.", suffix=".partial") as folder:
        new = Path(folder) / "store"
        attributes: dict[str, Any] = {
            "format": FORMAT,
            "recipe": recipe.to_dict(),
            "dataset": {"name": index.name, "digest": index.digest, "images": len(index.images)},
            "shard_images": shard_images,
        }
        group = zarr.open_group(str(new), mode="w-", zarr_format=3, attributes={"hsnet_store": attributes})
        text = np.frombuffer(index.to_json().encode(), np.uint8)
        group.create_array(
            "index",
            data=text,
            chunks=text.shape,
            filters=None,
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            attributes={"content": "JSON, UTF-8: the data set's images, classes and splits"},
        )
        for layout in layouts:
            layout.create(group)
        if codec is not None:
            write_fit(group, codec)
        (new / MARKERS).mkdir()
        try:
            os.rename(new, root)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another process made it in the meantime. The caller opens that one, and compares recipes.
    sync_folder(root.parent)


def _read_attributes(root: Path) -> tuple[Recipe, str, int, int]:
    """(recipe, data-set digest, images per shard, images) from the group's attributes, each checked."""
    if not root.exists():
        raise StoreError(f"There is no feature store at {root}. Make one with `hsnet extract ... --store {root}`.")
    if not (root / "zarr.json").is_file():
        raise StoreError(
            f"{root} is not a feature store: it has no zarr.json. Give the path of a store made by `hsnet extract`, "
            f"or a new path to make one. Nothing was changed."
        )
    metadata = _read_json(root / "zarr.json")
    attributes = metadata.get("attributes")
    values = attributes.get("hsnet_store") if isinstance(attributes, dict) else None
    if not isinstance(values, dict):
        raise StoreError(
            f"{root} is a zarr {metadata.get('node_type')} but not a feature store: it lacks the attribute "
            f"'hsnet_store'. Nothing was changed."
        )
    version = values.get("format")
    if version != FORMAT:
        raise StoreError(
            f"{root} has store format {version!r}; this version of the program reads format {FORMAT}. "
            f"Use the version that wrote it, or extract into a new store."
        )
    try:
        recipe = Recipe.from_dict(values["recipe"])
        digest, images = values["dataset"]["digest"], values["dataset"]["images"]
        shard_images = values["shard_images"]
    except (KeyError, TypeError, ConfigError) as error:
        raise StoreError(f"{root}: the store's attributes are damaged: {error}") from None
    counts = type(shard_images) is type(images) is int and 1 <= shard_images <= 4096 and images >= 1
    if not counts or not isinstance(digest, str):
        raise StoreError(
            f"{root}: the store's attributes are damaged: {images!r} images, {shard_images!r} per shard, "
            f"digest {digest!r}."
        )
    return recipe, digest, shard_images, images


def _read_index(root: Path) -> DatasetIndex:
    metadata = _read_json(root / "index" / "zarr.json")
    shape = metadata.get("shape")
    if not (
        isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and metadata.get("data_type") == "uint8"
    ):
        raise StoreError(f"{root}: array 'index' must be a line of bytes, its metadata says {shape!r}.")
    if not 0 < shape[0] <= _LARGEST_INDEX:
        raise StoreError(f"{root}: the index claims {shape[0]:,} bytes; {_LARGEST_INDEX:,} is the most that is read.")
    array = _open_array(root, "index", writable=False)
    try:
        text = bytes(array[:]).decode()
    except Exception as error:  # zarr's errors on damaged data have no common base
        raise StoreError(f"{root}: the index cannot be read: {error!r}.") from error
    try:
        return DatasetIndex.from_json(text)
    except DataError as error:
        raise StoreError(f"{root}: the index is damaged: {error}") from error


def _open_array(root: Path, name: str, writable: bool) -> Any:
    try:
        return zarr.open_array(str(root / name), mode="r+" if writable else "r", zarr_format=3)
    except Exception as error:  # zarr's errors on damaged metadata have no common base
        raise StoreError(f"{root}: array '{name}' cannot be opened: {error!r}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = path.lstat()
        # A link may lead out of the store, a pipe or a device never ends.
        if not stat.S_ISREG(facts.st_mode):
            raise StoreError(f"{path} is a link, a pipe or a device, not a file of the store. Nothing of it was read.")
        size = facts.st_size
        if size > _LARGEST_METADATA:
            raise StoreError(f"{path} has {size:,} bytes of metadata; {_LARGEST_METADATA:,} is the most that is read.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}. The store is damaged.") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: {error}.") from error
    if not isinstance(values, dict):
        raise StoreError(f"{path} is damaged: it holds {type(values).__name__}, not an object.")
    return values


def _calm_zarr() -> None:
    """Few threads per process: many processes of this program share a machine, and zarr's default is up to 32."""
    zarr.config.set({"threading.max_workers": 2, "async.concurrency": 4})
