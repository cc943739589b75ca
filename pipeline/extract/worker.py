"""Make shards of a feature store: read photos, run the backbone, encode, write, all at the same time.

The calling thread runs the backbone and does nothing else. Helper threads read the next photos (one, or several beside
a GPU: `readers`), encode the features of the last ones and write the last shard; Pillow, torch, zarr and the checksums
let go of Python's lock while they work. It pays where a worker has part of another core; `make bench-pipeline` measures
it with and without.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hsnet.backbone import pack_levels
from hsnet.errors import DataError, StoreError
from pipeline.common.machine import cores
from pipeline.common.out_of_memory import memory_told
from pipeline.common.runner import read_ahead
from pipeline.datasets.images import Size, object_pixels, resize_label, same_aspect
from pipeline.features.backbones import open_backbone
from pipeline.features.forward import PhotoNetwork
from pipeline.features.precision import encode_taps
from pipeline.features.recipe import Recipe
from pipeline.store.feature_store import FeatureStore

if TYPE_CHECKING:
    from pipeline.datasets import Dataset
    from pipeline.features.weights import Weights

LESS_MEMORY = "Free the GPU of other programs, or use --device cpu; a smaller --image-size makes another store."
KEPT = "Complete shards stay: the same command goes on from there."

READ_AHEAD = 4
"""Photos read and brought to network size before they are needed, or two batches on a GPU: 2 MB each at 400 px."""

MOST_READERS = 8
"""Threads that read photos for one GPU, at most: some 1,600 photos of 500 x 375 pixels a second."""

ENCODE_BEHIND = 2
"""Forward passes whose features wait to be encoded: 20 to 90 MB each at 400 px."""

WRITE_BEHIND_BYTES = 512 << 20
"""A shard of at most this many bytes is written while the next one is computed: both are in memory then."""


@dataclass(frozen=True)
class ShardDone:
    """One shard is on disk."""

    shard: int
    images: int
    skipped: tuple[str, ...]
    """Ids of images that could not be read."""
    nbytes: int
    seconds: float
    """Time one worker took; shards made in one go share it evenly."""


@dataclass(frozen=True)
class _Photo:
    """One image, ready for the network."""

    pixels: np.ndarray
    """(3, S, S) float32; black if the image could not be read."""
    label: np.ndarray
    """(S, S)."""
    size: Size = (0, 0)
    classes: tuple[int, ...] = ()
    error: str | None = None
    """Why it could not be read."""


@dataclass
class _Shard:
    """A shard in the making."""

    number: int
    levels: list[np.ndarray]
    labels: list[np.ndarray] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    classes: list[tuple[int, ...]] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    encoding: list[Future[None]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(level.nbytes for level in self.levels)


class ShardWorker:
    """Makes a few shards per call. Built once per process, because the backbone and the store take time to load."""

    def __init__(
        self,
        dataset: Dataset,
        weights: Weights,
        path: str | Path,
        recipe: Recipe,
        *,
        token: str,
        on_error: str,
        device: str,
    ) -> None:
        self.dataset = dataset
        self.token = token
        self.skip_errors = on_error == "skip"
        with memory_told(LESS_MEMORY, KEPT):
            self.network = PhotoNetwork(open_backbone(recipe, weights), recipe.image_size, device)
        self.store = FeatureStore.open(path, recipe, require_complete=False, index_digest=dataset.index.digest)
        self.readers = readers(self.network.device.type, cores(), torch.cuda.device_count())
        self._packed: list[Tensor] | None = None  # the encoding thread's, used again for the next features

    def __call__(self, shards: Sequence[int]) -> list[ShardDone]:
        """Make shards; a repeated call finds them done and only reports them.

        After an error every shard before the one that failed is complete.

        Raises:
            DeviceMemoryError: the network's forward pass takes more memory than there is.
        """
        start = time.monotonic()
        with memory_told(LESS_MEMORY, KEPT):
            self._make([shard for shard in shards if not self.store.is_done(shard)])
        seconds = (time.monotonic() - start) / len(shards)
        reports = []
        for shard in shards:
            facts = self.store.facts(shard)
            reports.append(ShardDone(shard, len(facts.images), tuple(facts.skipped), facts.nbytes, seconds))
        return reports

    def _make(self, shards: Sequence[int]) -> None:
        images = [image for shard in shards for image in self.store.images_in(shard)]
        # Left in reverse: reading stops, then what is computed is encoded, then it is written.
        with _helper("write") as writer, _helper("encode") as encoder:
            writing: Future[None] | None = None
            ahead = READ_AHEAD if self.network.batch == 1 else 2 * self.network.batch
            with closing(read_ahead(self._read, images, ahead, "read", self.readers)) as photos:
                for number in shards:
                    shard = self._compute(number, photos, encoder)
                    if writing is not None:
                        writing.result()
                    writing = writer.submit(self._write, shard)
                    if shard.nbytes > WRITE_BEHIND_BYTES:
                        writing.result()
            if writing is not None:
                writing.result()

    def _compute(self, number: int, photos: Iterator[tuple[int, _Photo]], encoder: ThreadPoolExecutor) -> _Shard:
        images, recipe = self.store.images_in(number), self.store.recipe
        shard = _Shard(number, [np.zeros((len(images), *shape), recipe.dtype) for shape in recipe.stored_shapes()])
        for first in range(0, len(images), self.network.batch):
            group = images[first : first + self.network.batch]
            batch = list(islice(photos, len(group)))
            for image, photo in batch:
                shard.labels.append(photo.label)
                shard.sizes.append(photo.size)
                shard.classes.append(photo.classes)
                if photo.error is not None:
                    shard.skipped[image] = photo.error
            # A skipped image leaves its place in the batch black, so that its neighbours' bits stay as they are.
            taps = self.network.taps([photo.pixels for _, photo in batch])
            shard.encoding.append(encoder.submit(self._encode, shard, group, first, taps))
            del taps  # the last ones would stay in memory during the next forward pass
            if len(shard.encoding) > ENCODE_BEHIND:
                shard.encoding[-1 - ENCODE_BEHIND].result()
        return shard

    def _encode(self, shard: _Shard, images: Sequence[int], first: int, taps: Sequence[Tensor]) -> None:
        """Put the features of images into the shard, from row `first` on."""
        recipe, names = self.store.recipe, [self.store.index.images[image] for image in images]
        targets = [level[first : first + len(images)] for level in shard.levels]
        codec = self.store.codec
        if codec is None:
            encode_taps(taps, self.network.backbone.spec, recipe.precision, targets, names)
        else:
            if self._packed and len(self._packed[0]) != len(images):
                self._packed = None  # the last batch of a shard may be smaller
            self._packed = pack_levels(taps, self.network.backbone.spec, self._packed)
            for target, codes in zip(targets, codec.encode(self._packed, names), strict=True):
                target[:] = codes
        for row, image in enumerate(images):
            if image in shard.skipped:
                for target in targets:
                    target[row] = 0

    def _write(self, shard: _Shard) -> None:
        for done in shard.encoding:
            done.result()
        if not self.store.place.still_owned(self.token):
            raise StoreError(f"{self.store.path} is being written by another run now. This one stopped.")
        self.store.write_shard(
            shard.number, shard.levels, np.stack(shard.labels), shard.sizes, shard.classes, shard.skipped, self.token
        )

    def _read(self, image: int) -> _Photo:
        """An image and its label map; every failure is a DataError that names the image, or is noted if so asked."""
        index, size = self.store.index, self.store.recipe.image_size
        name = index.images[image]
        try:
            photo = self.dataset.image(image)
            label = self.dataset.label(image)
            if (
                not same_aspect((photo.height, photo.width), (label.shape[0], label.shape[1]))
                or label.dtype != index.label_dtype
            ):
                raise DataError(
                    f"its label map is {label.dtype}{label.shape}, the photo {photo.height} x {photo.width} "
                    f"(height x width)"
                )
            return _Photo(
                self.network.pixels(photo),
                resize_label(label, (size, size)),
                (photo.height, photo.width),
                tuple(object_pixels(label, index.ignore_label)),
            )
        except (DataError, OSError) as error:
            message = (
                f"Image '{name}' of {index.name} cannot be used: {str(error).rstrip('.')}. Mend or remove "
                f"it and run the same command again, or leave such images out with `--on-error skip`. Complete "
                f"shards are kept."
            )
            if not self.skip_errors:
                raise DataError(message) from error
            return _Photo(
                np.zeros((3, size, size), np.float32), np.zeros((size, size), index.label_dtype), error=message[:500]
            )


def readers(device: str, cores: float, gpus: int) -> int:
    """Threads that read photos for one worker.

    One beside a CPU that runs the backbone: the threads that encode and write share with it what is left of the cores.
    Beside a GPU, which takes photos far faster than a core decodes them (about 200 a second), its share of the cores
    but for the thread that runs it.

    >>> readers("cpu", 64, 0), readers("cuda", 16, 1), readers("cuda", 16, 4), readers("cuda", 1.5, 1)
    (1, 8, 3, 1)
    """
    return 1 if device == "cpu" else max(1, min(MOST_READERS, int(cores / max(1, gpus)) - 1))


def _helper(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix=name)
