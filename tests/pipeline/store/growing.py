"""Ten photos, and thirteen more. Loaded by path, see conftest.py."""

import hashlib
from pathlib import Path

from fakes import CLASSES

from pipeline.extract.stage import extract
from pipeline.store.feature_store import FeatureStore

SIZE = 64
SHARD = 4
COW = {**CLASSES, 2: "cow"}
FIRST = tuple(range(0, 20, 2))
"""Ten photos: two whole shards and one of two images."""
MORE = tuple(range(23))
"""Thirteen more, before, between and after them."""
SOME = tuple(sorted({*FIRST, 5, 7}))
HALF = tuple(sorted({*FIRST, *range(5, 17)}))


def run(photos, weights, path, **options):
    return extract(photos, weights, path, image_size=SIZE, precision="int8", shard_images=SHARD, **options)


def data_files(path: Path) -> dict[str, tuple[str, int, int]]:
    """Shards and markers, without their summary: contents, inode and time of the last change."""
    files = [f for f in path.rglob("*") if f.is_file() and ("c" in f.parts or "_done" in f.parts)]
    files = [f for f in files if f.name != "summary"]
    return {
        str(f.relative_to(path)): (
            hashlib.sha256(f.read_bytes()).hexdigest(),
            f.stat().st_ino,
            f.stat().st_mtime_ns,
        )
        for f in files
    }


def contents(store: FeatureStore) -> dict[str, list]:
    """All that a reader gets, by image id."""
    images = range(len(store.index.images))
    arrays = [*store.features(images), store.labels(images)]
    return {
        name: [*(array[i].tobytes() for array in arrays), store.size(i), store.classes_present(i)]
        for i, name in enumerate(store.index.images)
    }
