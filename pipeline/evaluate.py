"""The evaluate stage, in two loops: predict once and keep a row per episode, then make any table from the rows.

Rows do not depend on the number of workers: episodes come in blocks of fixed size, every block is computed with one
torch thread, and the counts are integers.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hsnet.errors import ConfigError, DataError
from hsnet.metrics import class_iou, count, foreground_background_iou, mean_iou, sum_by_class
from hsnet.vote import vote
from pipeline.datasets.index import DatasetIndex
from pipeline.episodes import Episode, EpisodeStream, fingerprint, reference_episodes
from pipeline.features import EpisodeBatch, FeatureSource, prefetch
from pipeline.runner import Runner, SerialRunner, in_groups
from pipeline.segmenters import Segmenter

if TYPE_CHECKING:  # imported where tables are made: training counts masks and makes none
    import pyarrow as pa

BLOCK = 25
"""Episodes that are planned together; a worker gets several blocks if they are quick."""

TASK_SECONDS = 5.0
"""About how long a worker is busy with the blocks it is given at a time: it reads one while it computes another."""

READ_AHEAD = 1
"""Groups of episodes read while one is predicted; 0 reads in line."""

COUNTS = ("intersection_background", "intersection", "union_background", "union")
"""Columns of an episode's counts, pixels at network size; each again with `_all` where ignored pixels are counted."""


@dataclass(frozen=True)
class Scores:
    """Results of one number of shots, in percent."""

    shots: int
    episodes: int
    miou: float
    fb_iou: float
    per_class: Mapping[int, float]
    """Class id -> IoU; a class without an episode counts as 0, as in the published evaluation."""
    episodes_per_class: Mapping[int, int]


@dataclass(frozen=True)
class Evaluation:
    """All rows and the scores made of them."""

    rows: pa.Table
    scores: tuple[Scores, ...]
    protocol: Mapping[str, Any]
    """What was evaluated and how; stored with the rows."""


@dataclass(frozen=True)
class _Block:
    first: int
    """Number of its first episode."""
    episodes: tuple[Episode, ...]
    shots: tuple[int, ...]
    """Results wanted: every K up to the episodes' own."""


def evaluate(
    make_segmenter: Callable[[], Segmenter],
    make_source: Callable[[], FeatureSource],
    index: DatasetIndex,
    *,
    fold: int,
    shots: Sequence[int] = (1,),
    episodes: int | Literal["reference"] = 1000,
    seed: int = 0,
    role: str = "test",
    repeat_supports: bool = True,
    skipped: Sequence[int] = (),
    runner: Runner | None = None,
    device: str = "cpu",
    protocol: Mapping[str, Any] | None = None,
    on_event: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Predict the episodes of a fold and score them.

    Args:
        make_segmenter, make_source: called once per worker process; must be picklable for Ray.
        shots: one or more K. A K-shot episode's first supports are those of the episode with fewer shots, so one
            pass over the largest K gives every smaller one.
        episodes: how many; or "reference": the published code's 1,000, drawn with seed 0 for every K anew.
        role: "test" for results, "val" to look at the selection stream.
        skipped: images that must not be drawn.
        protocol: more to store with the rows (digests of store and checkpoint, method).
        on_event: called with (episodes done, episodes in all).

    Raises:
        ConfigError: no such fold, no episodes, a class with too few images for K shots, or `reference` drawing a
            skipped image.
    """
    wanted = sorted(set(shots))
    if not wanted or wanted[0] < 1:
        raise ConfigError(f"shots must be one or more numbers from 1, got {list(shots)}.")
    if episodes != "reference" and episodes < 1:
        raise ConfigError(f"episodes must be at least 1, or 'reference', got {episodes}.")
    plan = _plan(index, fold, wanted, episodes, seed, role, repeat_supports, skipped)
    total = sum(len(block.episodes) for block in plan)

    def make_worker() -> Callable[[Sequence[_Block]], tuple[list[dict[str, Any]], float]]:
        segmenter, source = make_segmenter(), make_source()
        return lambda blocks: _rows(segmenter, source, blocks, fold, device)

    runner = runner or SerialRunner()
    results: list[dict[str, Any]] = []
    done, took = 0, [0.0]
    if on_event:
        on_event(0, total)  # so that the rate shown counts from here
    groups = in_groups(plan, lambda: took[-1] or None, TASK_SECONDS, runner.workers)
    for blocks, (rows, seconds) in runner.map(make_worker, groups):
        results += rows
        took.append(seconds)
        done += sum(len(block.episodes) for block in blocks)
        if on_event:
            on_event(done, total)
    ordered = sorted(results, key=lambda row: (row["shots"], row["episode"]))  # blocks come in any order
    resolved = {
        "data": index.digest,
        "dataset": index.name,
        "fold": fold,
        "role": role,
        "shots": wanted,
        "episodes": episodes,
        "seed": 0 if episodes == "reference" else seed,
        "repeat_supports": True if episodes == "reference" else repeat_supports,
        "fingerprints": {str(k): _fingerprint(index, ordered, k) for k in wanted},
        "resolution": "network size, squashed",
        "ignore": "boundary pixels count for nothing" if index.has_ignore else "no ignore label",
        **(protocol or {}),
    }
    import pyarrow as pa

    table = pa.Table.from_pylist([_named(row, index) for row in ordered], schema=_schema())
    table = table.replace_schema_metadata({"hsnet": json.dumps(resolved, sort_keys=True)})
    class_ids = index.split(fold, role).class_ids
    return Evaluation(table, tuple(score(table, k, class_ids) for k in wanted), resolved)


def score(rows: pa.Table, shots: int, class_ids: Sequence[int]) -> Scores:
    """mIoU, FB-IoU and class IoUs from the rows of one number of shots."""
    chosen = [row for row in rows.select(["shots", "class_id", *COUNTS]).to_pylist() if row["shots"] == shots]
    classes = [row["class_id"] for row in chosen]
    totals = sum_by_class(_counts(chosen), classes, class_ids)
    return Scores(
        shots,
        len(chosen),
        mean_iou(totals),
        foreground_background_iou(totals),
        dict(zip(class_ids, class_iou(totals).tolist(), strict=True)),
        {class_id: classes.count(class_id) for class_id in class_ids},
    )


def require_writable(path: Path) -> None:
    """Find out before hours of work whether rows can be written there. Raises DataError."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the name of a Parquet file. Nothing was computed.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror or error}. Nothing was computed.") from error


def write_rows(path: Path, rows: pa.Table) -> None:
    """Write the rows as Parquet, whole or not at all. Raises DataError if the place cannot be written."""
    import pyarrow.parquet as pq

    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, part, compression="zstd")
        os.replace(part, path)
    except OSError as error:
        if part.is_file():
            part.unlink()
        raise DataError(f"Cannot write {path}: {error.strerror or error}. Nothing was left there.") from error


def count_masks(masks: Tensor, batch: EpisodeBatch, shots: int) -> tuple[Tensor, Tensor]:
    """Counts of the vote over the first `shots` supports, (B, 2, 2) int64: without and with ignored pixels."""
    prediction = vote(masks[:shots])
    return count(prediction, batch.target, batch.ignore), count(prediction, batch.target)


def _plan(
    index: DatasetIndex,
    fold: int,
    wanted: Sequence[int],
    episodes: int | Literal["reference"],
    seed: int,
    role: str,
    repeat_supports: bool,
    skipped: Sequence[int],
) -> list[_Block]:
    runs: list[tuple[tuple[int, ...], list[Episode]]]
    if episodes == "reference":
        runs = [((k,), reference_episodes(index, fold, k, role=role)) for k in wanted]
        gone = set(skipped) & {image for _, drawn in runs for e in drawn for image in (e.query, *e.supports)}
        if gone:
            raise ConfigError(
                f"The reference episodes need {len(gone)} images that were skipped at extraction (first: "
                f"'{index.images[min(gone)]}'). Repair the images and extract again, or use --episodes N."
            )
    else:
        stream = EpisodeStream(
            index, fold, role, wanted[-1], seed, repeat_supports=repeat_supports, exclude=frozenset(skipped)
        )
        runs = [(tuple(wanted), [stream[number] for number in range(episodes)])]
    plan: list[_Block] = []
    for ks, drawn in runs:
        for first in range(0, len(drawn), BLOCK):
            plan.append(_Block(first, tuple(drawn[first : first + BLOCK]), ks))
    return plan


def _rows(
    segmenter: Segmenter, source: FeatureSource, blocks: Sequence[_Block], fold: int, device: str
) -> tuple[list[dict[str, Any]], float]:
    """(rows of the blocks' episodes, seconds per block); the next episodes are read while these are predicted."""
    started = time.monotonic()
    # Cut alike however blocks are grouped: episodes that are predicted together could tell by their last bits.
    parts = [(block, start) for block in blocks for start in range(0, len(block.episodes), _step(block))]
    reads = (block.episodes[start : start + _step(block)] for block, start in parts)
    rows = []
    with closing(prefetch(source, reads, READ_AHEAD)) as loaded:
        for (block, start), (episodes, batch) in zip(parts, loaded, strict=True):
            batch = batch.to(device)
            masks = segmenter.masks(batch)
            for shots in block.shots:
                kept, everything = (counts.flatten(1).tolist() for counts in count_masks(masks, batch, shots))
                for offset, episode in enumerate(episodes):
                    rows.append(
                        {
                            "episode": block.first + start + offset,
                            "fold": fold,
                            "shots": shots,
                            "class_id": episode.class_id,
                            "query": episode.query,
                            "supports": list(episode.supports[:shots]),
                            **dict(zip(COUNTS, kept[offset], strict=True)),
                            **dict(zip((f"{name}_all" for name in COUNTS), everything[offset], strict=True)),
                        }
                    )
    return rows, (time.monotonic() - started) / len(blocks)


def _step(block: _Block) -> int:
    """Episodes read and predicted together: fewer at many shots, which bounds memory."""
    return max(1, BLOCK // len(block.episodes[0].supports))


def _named(row: Mapping[str, Any], index: DatasetIndex) -> dict[str, Any]:
    return {
        **row,
        "class_name": index.classes[row["class_id"]],
        "query": index.images[row["query"]],
        "supports": [index.images[image] for image in row["supports"]],
    }


def _schema() -> pa.Schema:
    import pyarrow as pa

    whole = [(name, pa.int64()) for name in (*COUNTS, *(f"{name}_all" for name in COUNTS))]
    return pa.schema(
        [
            ("episode", pa.int32()),
            ("fold", pa.int16()),
            ("shots", pa.int16()),
            ("class_id", pa.int32()),
            ("class_name", pa.string()),
            ("query", pa.string()),
            ("supports", pa.list_(pa.string())),
            *whole,
        ]
    )


def _fingerprint(index: DatasetIndex, rows: Sequence[Mapping[str, Any]], shots: int) -> str:
    drawn = [Episode(r["query"], tuple(r["supports"]), r["class_id"]) for r in rows if r["shots"] == shots]
    return fingerprint(index, drawn)


def _counts(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.tensor([[row[name] for name in COUNTS] for row in rows], dtype=torch.int64).view(-1, 2, 2)
