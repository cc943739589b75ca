"""Stores of made-up features, and stores as earlier versions wrote them. Loaded by path, see conftest.py."""

import json
from pathlib import Path

import numpy as np

import pipeline.store.skeleton as skeleton
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.features.precision import encode
from pipeline.features.recipe import Recipe
from pipeline.store.attributes import read_facts
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import summary_file

SHA = "sha256:" + "0" * 64
SIZE = 64


def make_index(images: int = 21, name: str = "folder") -> DatasetIndex:
    entries = tuple((i, i % 2) for i in range(images))
    return DatasetIndex(
        name, {0: "cat", 1: "dog"}, tuple(f"a/{i}.jpg" for i in range(images)), {0: {"trn": Split(entries)}}
    )


def make_recipe(precision: str = "int8") -> Recipe:
    return Recipe.of("squeezenet1_1", SHA, SIZE, precision)


def contents(store: FeatureStore, number: int) -> dict:
    """Made-up contents of a shard, the same for every call."""
    rng = np.random.default_rng(number)
    n = len(store.images_in(number))
    features = [rng.normal(size=(n, *shape)).astype(np.float32) for shape in store.recipe.level_shapes()]
    return {
        "levels": encode(features, store.recipe.precision),
        "labels": rng.integers(0, 3, (n, SIZE, SIZE)).astype(np.uint8),
        "sizes": [(100 + i, 200) for i in range(n)],
        "classes": [(i % 2,) for i in range(n)],
    }


def fill(path: Path, precision: str = "int8", shards: range | None = None, images: int = 21) -> FeatureStore:
    store = FeatureStore.create(path, make_recipe(precision), make_index(images), shard_images=8)
    with store.writing():
        for number in shards if shards is not None else range(store.shards):
            store.write_shard(number, **contents(store, number))
    return store


def make_old(path: Path) -> None:
    """Make a store one as the first versions of this program wrote it: format 1 or 2, the index in JSON, no summary."""
    summary_file(path).unlink(missing_ok=True)
    indices = {
        name: FeatureStore.open(path, require_complete=False, index_digest=state.digest).index
        for state in read_facts(path).states
        for name in (state.index_array,)
    }
    values = json.loads((path / "zarr.json").read_text())
    attributes = values["attributes"]["hsnet_store"]
    for state in (attributes["dataset"], *attributes.get("growth", ())):
        state.pop("encoding", None)
    attributes["format"] = 2 if "growth" in attributes else 1
    for name, index in indices.items():
        skeleton.write_vector(path, name, np.frombuffer(index.to_json().encode(), np.uint8), "JSON")
    (path / "zarr.json").write_text(json.dumps(values))


def change_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
