"""Rates of reading a feature store, against a plain memory-mapped file of the same bytes and against zarr.

    python -m benchmarks.store                             # ResNet-50 at 400 px, int8 and float32
    python -m benchmarks.store --precisions int8 --size 128 --images 32 --repeats 5

Everything is in the page cache, and every way reads the same images in the same order, taking turns. The store
verifies the checksum of each chunk; the mapped file is read once without, which no store can beat that verifies, and
once with the same checksum taken over the copy.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr

from benchmarks import timing
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.features.recipe import Recipe
from pipeline.store.feature_store import FeatureStore

EPISODES = 20
"""One-shot episodes of a batch: twice as many images."""


def make_store(path: Path, recipe: Recipe, images: int) -> FeatureStore:
    """A store of noise. How long reading takes does not depend on values, except for label maps: one disc in each."""
    entries = tuple((image, image % 2) for image in range(images))
    names = tuple(f"{image}.jpg" for image in range(images))
    index = DatasetIndex("folder", {0: "cat", 1: "dog"}, names, {0: {"trn": Split(entries)}})
    store, rng, size = FeatureStore.create(path, recipe, index), np.random.default_rng(0), recipe.image_size
    rows, columns = np.mgrid[:size, :size]
    with store.writing():
        for number in range(store.shards):
            some = len(store.images_in(number))
            levels = [rng.integers(-127, 128, (some, *shape)).astype(recipe.dtype) for shape in recipe.level_shapes()]
            radius = rng.integers(size // 8, size // 2, (some, 1, 1))
            labels = ((rows - size / 2) ** 2 + (columns - size / 2) ** 2 < radius**2).astype(np.uint8)
            store.write_shard(number, levels, labels, [(size, size)] * some, [(0,)] * some)
    return FeatureStore.open(path)


def map_copy(store: FeatureStore, path: Path) -> np.ndarray:
    """The features as one plain file, image after image, mapped."""
    with path.open("wb") as file:
        for image in range(len(store.index.images)):
            for level in store.features([image]):
                file.write(level.tobytes())
    return np.memmap(path, np.uint8, "r").reshape(len(store.index.images), -1)


def measure(precision: str, backbone: str, size: int, images: int, repeats: int, scratch: Path) -> dict[str, Any]:
    """Median seconds and rates of every way of reading."""
    recipe = Recipe.of(backbone, "sha256:" + "0" * 64, size, precision)
    store = make_store(scratch / f"{precision}.zarr", recipe, images)
    mapped = map_copy(store, scratch / f"{precision}.bin")
    group = zarr.open_group(str(store.root), mode="r")
    arrays: list[Any] = [group[f"level{level}"] for level in range(len(recipe.level_shapes()))]
    labels: Any = group["label"]
    nbytes, rng = mapped.shape[1], np.random.default_rng(1)
    order: list[int] = []

    def one(read: Callable[[int], object]) -> Callable[[], None]:
        def run() -> None:
            for image in order:
                read(image)

        return run

    flat, into, batch = (
        np.empty(nbytes, np.uint8),
        store.features([0]),
        rng.permutation(images)[: 2 * EPISODES].tolist(),
    )

    def checked(image: int) -> None:
        np.copyto(flat, mapped[image])
        google_crc32c.value(flat)

    singles = {
        "mapped file": one(lambda image: np.copyto(flat, mapped[image])),
        "mapped file, new memory": one(lambda image: np.array(mapped[image])),
        "mapped file, checksum": one(checked),
        "store, given memory": one(lambda image: store.features([image], out=into)),
        "store": one(lambda image: store.features([image])),
        "zarr": one(lambda image: [array[image] for array in arrays]),
    }
    others = {
        "store, a batch": lambda: store.features(batch),
        "mapped file, a batch": lambda: mapped[batch],
        "labels": lambda: store.labels(batch),
        "labels, zarr": lambda: [labels[image] for image in batch],
    }
    rounds: dict[str, list[float]] = {name: [] for name in singles}
    for number in range(-1, repeats):
        order[:] = rng.integers(images, size=8).tolist()
        for name, times in timing.alternate(singles, 1, warmup=0).items():
            if number >= 0:
                rounds[name].append(times.wall[0] / len(order))
    seconds = {name: statistics.median(values) for name, values in rounds.items()}
    taken = timing.alternate(others, max(3, repeats // 4))
    seconds |= {name: statistics.median(one.wall) / len(batch) for name, one in taken.items()}
    result: dict[str, Any] = {"bytes_per_image": nbytes, "images": images, "batch_images": len(batch)}
    result["ms_per_image"] = {name: 1000 * value for name, value in seconds.items()}
    result["gb_per_s"] = {name: nbytes / value / 1e9 for name, value in seconds.items() if "labels" not in name}
    plain = seconds["mapped file"]
    result["share_of_mapped_file"] = {name: plain / seconds[name] for name in singles}
    result["share_of_mapped_file_with_checksum"] = seconds["mapped file, checksum"] / seconds["store, given memory"]
    result["share_of_mapped_file_batch"] = seconds["mapped file, a batch"] / seconds["store, a batch"]
    return result


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", default="int8,float32", help="commas between them")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=400, help="side of the network input, pixels")
    parser.add_argument("--images", type=int, default=48, help="in the store; all of them must fit in free memory")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of eight images each")
    parser.add_argument("--scratch", type=Path, help="folder for the stores; the system's temporary one if left out")
    parser.add_argument("--out", type=Path, help="JSON file to add to; benchmarks/results/store/DATE-MACHINE.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Path:
    """Run what the command line says; returns the file of results."""
    options = parse(arguments)
    out = options.out or timing.RESULTS / "store" / timing.result_path().name
    run = timing.describe_run("cpu", vars(options), "numpy", "zarr", "numcodecs")
    for precision in options.precisions.split(","):
        facts = {"device": "cpu", "backbone": options.backbone, "work": f"read {precision}", "image_size": options.size}
        with tempfile.TemporaryDirectory(prefix="bench-", dir=options.scratch) as folder:
            measured = measure(precision, options.backbone, options.size, options.images, options.repeats, Path(folder))
        timing.record(run, {**facts, **measured}, out)
        print(
            f"\n{options.backbone} at {options.size} px, {precision}: {measured['bytes_per_image']:,} bytes per image"
        )
        for name, value in measured["ms_per_image"].items():
            rate = measured["gb_per_s"].get(name)
            share = measured["share_of_mapped_file"].get(name)
            print(
                f"  {name:<26}{value:9.3f} ms per image"
                + (f"{rate:8.2f} GB/s" if rate else "")
                + (f"{share:8.0%} of the mapped file" if share else ""),
                flush=True,
            )
        print(f"  of the mapped file with checksum: {measured['share_of_mapped_file_with_checksum']:.0%}; ", end="")
        print(f"a batch: {measured['share_of_mapped_file_batch']:.0%} of the mapped file's")
    print(f"\nAdded to {out}")
    return out


if __name__ == "__main__":
    main(sys.argv[1:])
