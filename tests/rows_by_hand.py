"""Rows of an evaluation made up by hand, as `hsnet evaluate` would write them. Run by path, see tests/conftest.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.episodes.manifest import ListedEpisode, Manifest
from pipeline.episodes.protocols import POLICIES, resolve
from pipeline.scores.rows import COUNTS, METADATA, Results, read_results, schema

SIZE = 100
"""Network size of the made-up photos, pixels."""


def episodes_of(classes, n, shots, seed, images):
    """n episodes with class after class, queries and supports among `images` photos per class."""
    random = np.random.default_rng([seed, 1])
    rows = []
    for number in range(n):
        class_id = classes[number % len(classes)]
        photos = random.permutation(images)[: shots + 1]
        names = [f"{class_id}/{photo}.jpg" for photo in photos]
        rows.append(ListedEpisode(names[0], tuple(names[1:]), class_id))
    return tuple(rows)


def made(
    *,
    n=60,
    fold=0,
    classes=(0, 1, 2),
    shots=(1, 5),
    seeds=(0,),
    fusions=("vote", "logits"),
    protocol="default",
    quality=0.5,
    noise=0.05,
    draw=0,
    images=20,
    original=True,
    checkpoint="sha256:aa",
    store="sha256:store",
    data="sha256:data",
    method=None,
    effects=None,
    **facts,
):
    """A table. IoU of an episode: `quality`, what its query brings, noise by `draw`, and effects[its first support]."""
    columns = {name: [] for name in schema().names}
    used = resolve(protocol, episodes=n, shots=shots, seeds=seeds)
    for seed in seeds:
        drawn = episodes_of(classes, n, max(shots), seed, images)
        names = {c: f"class{c}" for c in classes}
        manifest = Manifest(data=data, dataset="own", fold=fold, role="test", classes=names, rows=drawn)
        for k in shots:
            digest = manifest.first(k).digest
            for place, fusion in enumerate(fusions):
                random = np.random.default_rng([seed, k, place, draw, 2])
                for number, row in enumerate(drawn):
                    easy = np.random.default_rng([3, *map(int, row.query.removesuffix(".jpg").split("/"))])
                    pixels = int(easy.integers(0, 60)) ** 2
                    share = quality + 0.2 * easy.normal() + noise * random.normal() + 0.05 * (k > 1)
                    share += (effects or {}).get(row.supports[0], 0.0)
                    union = max(pixels, 1) * 4
                    inside = int(np.clip(share, 0, 1) * union)
                    everything = SIZE**2 * 4
                    for number_of, policy in enumerate(POLICIES):
                        scale = 1 + number_of
                        values = (
                            (everything - union) * scale,
                            inside * scale,
                            (everything - inside) * scale,
                            union * scale + number_of,
                        )
                        null = policy.resolution == "original" and not original
                        for name, value in zip(COUNTS, values, strict=True):
                            columns[name + policy.suffix].append(None if null else value)
                    plain = {
                        "episode": number,
                        "fold": fold,
                        "seed": seed,
                        "shots": k,
                        "fusion": fusion,
                        "class_id": row.class_id,
                        "class_name": names[row.class_id],
                        "query": row.query,
                        "supports": list(row.supports[:k]),
                        "object_pixels": pixels,
                        "seconds": 0.1,
                        "manifest": digest,
                        "store": store,
                        "checkpoint": checkpoint,
                    }
                    for name, value in plain.items():
                        columns[name].append(value)
    said = {
        "data": data,
        "dataset": "own",
        "fold": fold,
        "role": "test",
        "classes": {str(c): f"class{c}" for c in classes},
        "protocol": used.to_dict(),
        "method": method or {"name": "trained", "checkpoint": checkpoint},
        "recipe": {"image_size": SIZE},
        "notes": [],
        **facts,
    }
    return pa.table(columns, schema=schema()).replace_schema_metadata({METADATA: json.dumps(said)})


def write(path: Path, table: pa.Table | None = None, **choices) -> Path:
    """Rows in a file; `choices` as for `made`."""
    pq.write_table(made(**choices) if table is None else table, path)
    return path


def read(path: Path, table: pa.Table | None = None, **choices) -> Results:
    """The same, read back."""
    return read_results(write(path, table, **choices))
