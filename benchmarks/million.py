"""What a store of very many photos costs to open, to go on with, to verify and to grow; how large shards shall be.

    python -m benchmarks.million                         # 10^5 tiny images, and the slope
    python -m benchmarks.million --images 1000000
    python -m benchmarks.million sizes                   # real shards of different sizes, written and read

The features are small (SqueezeNet at 32 px) and the same in every shard, as hard links to one file: only what grows
with the number of images and shards is measured. Each step runs in a process of its own, which tells the seconds, the
memory that is its own (not what it shares by mapping files) and the files it opened.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from pipeline.datasets.index import DatasetIndex, Split
from pipeline.features.recipe import Recipe
from pipeline.store.feature_store import FeatureStore
from pipeline.store.growth import grow
from pipeline.store.markers import marker_file, shard_file, write_marker
from pipeline.store.verify import verify

RECIPE = Recipe.of("squeezenet1_1", "sha256:" + "0" * 64, 32, "int8")
CLASSES = 20
MISSING = 10
"""One shard in so many is taken away for going on with the store."""
GROWTH = 100
"""The data set grows by one image for so many."""


def make_index(images: int) -> DatasetIndex:
    """As PASCAL-5i: every image in the training list of three folds and the test list of one."""
    entries = [(image, image % CLASSES) for image in range(images)]
    splits = {
        fold: {
            "trn": Split(tuple(entry for entry in entries if entry[1] // 5 != fold)),
            "test": Split(tuple(entry for entry in entries if entry[1] // 5 == fold)),
        }
        for fold in range(4)
    }
    names = tuple(f"photos/{image % 1000:03d}/{image:08d}.jpg" for image in range(images))
    return DatasetIndex("folder", {number: f"class {number}" for number in range(CLASSES)}, names, splits)


def make(path: Path, images: int, shard_images: int) -> None:
    """A complete store. Nothing is forced to disk."""
    with patch("os.fsync"):
        _make(path, images, shard_images)


def _make(path: Path, images: int, shard_images: int) -> None:
    store = FeatureStore.create(path, RECIPE, make_index(images), shard_images)
    rng, made = np.random.default_rng(0), {}
    with store.writing():
        for number in (0, store.shards - 1):  # the last one may be shorter
            some = len(store.images_in(number))
            levels = [rng.integers(-127, 128, (some, *shape)).astype(np.int8) for shape in RECIPE.stored_shapes()]
            labels = np.zeros((some, 32, 32), np.uint8)
            made[number] = store.write_shard(number, levels, labels, [(375, 500)] * some, [(number % CLASSES,)] * some)
    base = 0
    for number in range(1, store.shards - 1):
        for name in made[0].files:
            target = shard_file(path, name, number)
            target.parent.mkdir(parents=True)
            if number % 50_000:
                os.link(shard_file(path, name, base), target)
            else:  # a file has 65,000 names at most
                shutil.copy(shard_file(path, name, base), target)
        base = base if number % 50_000 else number
        names = tuple(store.index.images[image] for image in store.images_in(number))
        write_marker(path, replace(made[0], number=number, images=names))
    with FeatureStore.open(path, require_complete=False).writing():
        pass


def own_memory() -> int:
    """Bytes of this process that no file stands for."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) << 10
    raise OSError("the kernel does not say")


def open_whole(path: Path, images: int) -> None:
    """As training does: open, ask which images were skipped, read one."""
    store = FeatureStore.open(path)
    assert not store.skipped
    store.features([images // 2])


def open_worker(path: Path, images: int) -> None:
    """As a process of an extraction does: open an unfinished store, look whether its shards are there."""
    store = FeatureStore.open(path, require_complete=False)
    assert store.is_done(store.shards // 2)


def find_missing(path: Path, images: int) -> None:
    """The shards that are missing."""
    store = FeatureStore.open(path, require_complete=False)
    assert len(store.missing_shards()) == len(range(1, store.shards, MISSING))


def go_on(path: Path, images: int) -> None:
    """As `hsnet extract` does before it makes a shard: take the store for writing, with every marker read."""
    store = FeatureStore.open(path, require_complete=False)
    with store.writing():
        assert len(store.missing_shards()) == len(range(1, store.shards, MISSING))


def verify_all(path: Path, images: int) -> None:
    """Read everything."""
    assert not verify(FeatureStore.open(path)).damage


def grow_some(path: Path, images: int) -> None:
    """Make room for one image in `GROWTH` more."""
    grow(path, RECIPE, make_index(images + images // GROWTH))


STEPS: dict[str, Callable[[Path, int], None]] = {
    "open a complete store": open_whole,
    "open as a worker": open_worker,
    "verify": verify_all,
    "missing shards": find_missing,
    "go on": go_on,
    "grow": grow_some,
}


def play(step: str, path: Path, images: int) -> None:
    """One step; prints what it took as JSON."""
    opened = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal opened
        if event == "open" and str(arguments[0]).startswith(str(path)):
            opened += 1

    import zarr  # noqa: F401 (not part of what is measured, where a step needs it)

    sys.addaudithook(count)
    before, began = own_memory(), time.perf_counter()
    STEPS[step](path, images)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "memory": own_memory() - before, "files": opened}))


def run(step: str, path: Path, images: int, repeats: int) -> dict[str, float]:
    """The fastest of some runs, each in a process of its own."""
    code = [sys.executable, "-m", "benchmarks.million", "step", step, str(path), "--images", str(images)]
    lines = [subprocess.run(code, check=True, capture_output=True, text=True).stdout for _ in range(repeats)]
    return min((json.loads(line) for line in lines), key=lambda found: found["seconds"])


def measure(images: int, shard_images: int, repeats: int, scratch: Path) -> dict[str, dict[str, float]]:
    """All steps on a new store."""
    path = scratch / f"{images}.zarr"
    code = [sys.executable, "-m", "benchmarks.million", "make", str(path)]
    subprocess.run([*code, "--images", str(images), "--shard-images", str(shard_images)], check=True)
    found = {}
    for step in STEPS:
        if step == "missing shards":
            for number in range(1, -(-images // shard_images), MISSING):
                marker_file(path, number).unlink()
        if step == "grow":  # it takes complete stores only in their current state, which is complete again
            shutil.rmtree(path)
            subprocess.run([*code, "--images", str(images), "--shard-images", str(shard_images)], check=True)
        once = step in ("verify", "grow")
        found[step] = run(step, path, images, 1 if once else repeats)
        print(f"  {step:24}{_text(found[step])}", flush=True)
    shutil.rmtree(path)
    return found


def _text(found: dict[str, float]) -> str:
    return f"{found['seconds']:9.2f} s {found['memory'] / 1e6:9.1f} MB {found['files']:10,.0f} files"


def slope(images: tuple[int, int], found: tuple[dict[str, float], dict[str, float]], wanted: int) -> dict[str, float]:
    """What a line through two measurements says of another number of images."""
    share = (wanted - images[0]) / (images[1] - images[0])
    return {name: found[0][name] + share * (found[1][name] - found[0][name]) for name in found[0]}


def compare_sizes(megabytes: list[int], gigabytes: float, scratch: Path) -> None:
    """Shards of SqueezeNet's int8 features at 400 px, written as extraction does and read in random order."""
    recipe = Recipe.of("squeezenet1_1", "sha256:" + "0" * 64, 400, "int8")
    rng = np.random.default_rng(0)
    one = [rng.integers(-127, 128, shape).astype(np.int8) for shape in recipe.stored_shapes()]
    nbytes = sum(level.nbytes for level in one)
    label = np.zeros((400, 400), np.uint8)
    print(f"{nbytes / 1e6:.1f} MB an image; {gigabytes} GB of them in every size")
    for size in megabytes:
        each, images = max(1, int(size * 1e6) // nbytes), int(gigabytes * 1e9) // nbytes
        names = tuple(f"{image}.jpg" for image in range(images))
        index = DatasetIndex("folder", {0: "cat"}, names, {})
        path = scratch / "sizes.zarr"
        store = FeatureStore.create(path, recipe, index, each)
        written = []
        with store.writing():
            for number in range(store.shards):
                some = len(store.images_in(number))
                levels, labels = [np.stack([level] * some) for level in one], np.stack([label] * some)
                began = time.perf_counter()
                store.write_shard(number, levels, labels, [(400, 400)] * some, [(0,)] * some)
                written.append(time.perf_counter() - began)
        del levels, labels
        order = rng.permutation(images).tolist()
        store = FeatureStore.open(path)
        began = time.perf_counter()
        for image in order:
            store.features([image])
        read = (time.perf_counter() - began) / images
        print(
            f"{size:5} MB, {each:4} images: written at {images * nbytes / sum(written) / 1e6:6.0f} MB/s, "
            f"a shard in {max(written):5.2f} s at most; an image read in {read * 1e3:5.2f} ms; "
            f"{-(-(10**6) // each):9,} shards of 10^6 images",
            flush=True,
        )
        shutil.rmtree(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="measure", choices=("measure", "sizes", "make", "step"))
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--shard-images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--scratch", type=Path, help="folder for the stores [default: a temporary one]")
    options = parser.parse_args()
    if options.what == "make":
        make(Path(options.rest[0]), options.images, options.shard_images)
        return
    if options.what == "step":
        play(options.rest[0], Path(options.rest[1]), options.images)
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        if options.what == "sizes":
            compare_sizes(options.megabytes, options.gigabytes, Path(folder))
            return
        counts = (options.images // 4, options.images)
        found = []
        for images in counts:
            print(
                f"{images:,} images in shards of {options.shard_images}: seconds, own memory, files opened", flush=True
            )
            found.append(measure(images, options.shard_images, options.repeats, Path(folder)))
        print("by the slope, 1,000,000 images:")
        for step in STEPS:
            print(f"  {step:24}{_text(slope(counts, (found[0][step], found[1][step]), 10**6))}")


if __name__ == "__main__":
    main()
