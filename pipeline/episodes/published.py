"""The published code's own episodes: its sequence drawn again, and its tests known by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hsnet.errors import ConfigError
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.episodes.stream import Episode, require_images

if TYPE_CHECKING:
    from pipeline.episodes.manifest import Manifest


def reference_episodes(
    index: DatasetIndex, fold: int, shots: int, n: int = 1000, seed: int = 0, role: str = "test"
) -> list[Episode]:
    """The published code's own episodes: those its `test.py` draws after `fix_randseed(0)`.

    Queries go through the split's list from its start (COCO: a random class, then a random image of it). Supports
    are drawn until `shots` of them differ from the query, so they may repeat. Each draw is
    `RandomState.choice(list, 1, replace=False)`, which shuffles the whole list to take its first: only that call
    reproduces the sequence. Episodes for other shots are other episodes.

    Source: juhongm999/hsnet @ 6b1bc12, its dataset samplers; checked against golden f.

    Raises:
        ConfigError: the data set has groups; no such fold; a class has one image only, for which the published code
            never ends.
    """
    if index.groups:
        raise ConfigError(
            "The published code's episodes know no groups of photos, and this data set has some: draw other episodes "
            "(leave out --episodes reference, or --protocol hsnet). Nothing was computed."
        )
    split = index.split(fold, role)
    pools = _published_pools(index, split)
    if index.query_order == "class":
        pools = {class_id: pools.get(class_id, ()) for class_id in split.class_ids}
    require_images(index, fold, role, pools, split, shots=1)
    random = np.random.RandomState(seed)
    episodes = []
    for number in range(n):
        if index.query_order == "class":
            class_id = int(random.choice(split.class_ids, 1, replace=False)[0])
            query = int(random.choice(pools[class_id], 1, replace=False)[0])
        else:
            query, class_id = split.entries[number % len(split.entries)]
        supports: list[int] = []
        while len(supports) < shots:
            support = int(random.choice(pools[class_id], 1, replace=False)[0])
            if support != query:
                supports.append(support)
        episodes.append(Episode(query, tuple(supports), class_id))
    return episodes


def published_name(manifest: Manifest) -> str | None:
    """ "PASCAL fold 2, 5-shot" if these are exactly the episodes of the published evaluation, else None.

    Known are PASCAL folds 0 to 3 and COCO fold 0 with 1, 5 and 10 shots (1,000 episodes), and FSS-1000 with 1 and 5
    (2,400), computed from the published split files. Those of PASCAL folds 0 and 1 and of COCO were compared with what
    the published code itself draws (golden f).
    """
    known = json.loads((Path(__file__).parent / "data" / "published_episodes.json").read_text())
    name: str | None = known.get(manifest.fingerprint)
    return name


def _published_pools(index: DatasetIndex, split: Split) -> dict[int, tuple[int, ...]]:
    pools = {class_id: images for class_id, images in split.by_class.items() if images}
    if index.name == "fss":
        # The query list of FSS-1000 is sorted as text (1, 10, 2, ...), its supports are drawn from range(1, 11).
        return {c: tuple(sorted(pool, key=lambda i: _as_number(index.images[i]))) for c, pool in pools.items()}
    return pools


def _as_number(image_id: str) -> tuple[int, str]:
    stem = image_id.rsplit("/", 1)[-1].split(".")[0]
    return (int(stem) if stem.isdecimal() else 0, image_id)
