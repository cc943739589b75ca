"""Reading all of a store from somebody else, with the growth of memory watched. Loaded by path, see conftest.py."""

import tracemalloc
from pathlib import Path

import google_crc32c
import pytest
from numcodecs import zstd

from hsnet.errors import HSNetError
from pipeline.store.feature_store import FeatureStore

MEMORY = 96 << 20
"""More than any attack on these small stores may take. Each of the bombs stands for gigabytes."""
FILES = ["zarr.json", "level1/zarr.json", "index/zarr.json", "label/zarr.json"]


def read_everything(path: Path) -> None:
    """All that a command would read of a store."""
    store = FeatureStore.open(path)
    store.info()
    assert store.codec is None or store.codec.level_bytes
    for image in range(len(store.index.images)):
        store.features([image])
        store.labels([image])
        assert all(0 <= side < 1 << 28 for side in store.size(image))


def attack(path: Path) -> HSNetError:
    """The error that comes, which must come before memory is spent."""
    tracemalloc.start()
    try:
        with pytest.raises(HSNetError) as caught:
            read_everything(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY, f"{peak:,} bytes"
    return caught.value


def inner(metadata):
    return metadata["codecs"][0]["configuration"]


def frame(data: bytes) -> bytes:
    """A chunk of a small array: compressed, summed."""
    packed = zstd.compress(data, 1)
    return packed + google_crc32c.value(packed).to_bytes(4, "little")


def summed(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(4, "little")
