"""The rows of an N-way evaluation: one per episode, number of shots and fusion, as Parquet; read back and checked.

What a row of `pipeline.scores.rows` says of one class is a list here, in the order of the episode's classes. The counts
are the confusion of the N classes and the background, once per policy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import ConfigError, DataError
from pipeline.common.files import read_table
from pipeline.episodes.protocols import POLICIES, Policy, Protocol
from pipeline.scores.rows import METADATA, Results, facts_in, require_whole, rows_of_case

if TYPE_CHECKING:
    import pyarrow as pa

MADE_HERE = Path("(rows just made)")
"""Instead of a path, for rows that are in no file yet."""


def counts_column(policy: Policy) -> str:
    """The column of a policy's confusion."""
    return f"confusion{policy.suffix}"


def schema() -> pa.Schema:
    """Columns and types. Those of the original size are null where its masks were not at hand."""
    import pyarrow as pa

    digest = pa.dictionary(pa.int32(), pa.string())
    return pa.schema(
        [
            ("episode", pa.int32()),
            ("fold", pa.int16()),
            ("seed", pa.int64()),
            ("shots", pa.int16()),
            ("fusion", pa.string()),
            ("classes", pa.list_(pa.int32())),
            ("class_names", pa.list_(pa.string())),
            ("query", pa.string()),
            ("supports", pa.list_(pa.list_(pa.string()))),
            ("absent", pa.bool_()),
            *((counts_column(policy), pa.list_(pa.int64())) for policy in POLICIES),
            ("object_pixels", pa.list_(pa.int64())),
            ("seconds", pa.float32()),
            ("manifest", digest),
            ("store", digest),
            ("checkpoint", digest),
        ]
    )


@dataclass(frozen=True)
class WayResults(Results):
    """One file of rows of N-way episodes."""

    @property
    def ways(self) -> int:
        return int(self.facts["ways"])

    @property
    def policies(self) -> tuple[Policy, ...]:
        return tuple(p for p in POLICIES if not self.table[counts_column(p)].null_count)


@dataclass(frozen=True)
class WayEpisodes:
    """The episodes of one fold, number of shots and fusion, all seeds, ordered by seed and number. N classes each."""

    fold: int
    class_ids: tuple[int, ...]
    """Classes that are tested, with or without an episode."""
    names: Mapping[int, str]
    classes: NDArray[np.int64]
    """(n, N) class ids; the query's own first, unless it shows none."""
    seeds: NDArray[np.int64]
    queries: tuple[str, ...]
    identities: tuple[object, ...]
    """What must agree for two rows to be of one episode."""
    shown: NDArray[np.bool_]
    """(n, N), whether the query shows the class, at network size."""
    empty: NDArray[np.bool_]
    """(n,), whether it was drawn to show none, and shows none."""
    counts: NDArray[np.int64]
    """(n, N + 1, N + 1) of one policy: [episode, true label, predicted label]."""

    def __len__(self) -> int:
        return len(self.classes)


def holds_ways(path: Path) -> bool:
    """Whether a file holds rows of N-way episodes; False also for what cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        facts = json.loads((pq.read_schema(path).metadata or {})[METADATA])
    except (OSError, KeyError, ValueError, RecursionError, pa.ArrowException):
        return False
    return isinstance(facts, dict) and "ways" in facts


def read_way_results(path: Path) -> WayResults:
    """Read the rows of one N-way evaluation.

    Raises:
        DataError: not there, not Parquet, cut off, rows of 1-way episodes or of no evaluation, or values that cannot
            be.
    """
    table = read_table(path)
    facts = facts_in(path, table)
    if not isinstance(facts, dict) or type(facts.get("ways")) is not int:
        raise DataError(
            f"{path} holds rows of 1-way episodes; they cannot be put together or compared with N-way ones. Analyze "
            f"them apart. Nothing was computed."
        )
    return of_table(path, table, facts)


def of_table(path: Path | None, table: pa.Table, facts: Mapping[str, Any]) -> WayResults:
    """Check rows with their facts. Raises DataError."""
    import pyarrow as pa

    where, wanted = path or MADE_HERE, schema()
    try:
        protocol = Protocol.from_dict(facts["protocol"])
        classes = {int(class_id): str(name) for class_id, name in facts["classes"].items()}
        table = table.select(wanted.names).cast(wanted)
        results = WayResults(where, facts, protocol, classes, table)
        _check(results)
    except (ConfigError, KeyError, TypeError, AttributeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{where}: {error}. Another version wrote it, or it was changed; evaluate again.") from error
    return results


def _check(results: WayResults) -> None:
    path, table, ways = results.path, results.table, results.ways
    require_whole(results, (c for row in table["classes"].to_pylist() for c in row or ()))
    lengths = {"classes": ways, "object_pixels": ways, "supports": ways}
    for name, length in {**lengths, **{counts_column(p): (ways + 1) ** 2 for p in results.policies}}.items():
        found = {len(values) for values in table[name].to_pylist()}
        if found != {length}:
            raise DataError(
                f"{path}: rows of {ways}-way episodes have {length} values of '{name}', found {sorted(found)}. "
                f"Evaluate again."
            )
    for policy in results.policies:
        wrong = np.flatnonzero((_matrix(table[counts_column(policy)], ways) < 0).any((1, 2)))
        if len(wrong):
            raise DataError(f"{path}, row {wrong[0]}: a negative number of pixels. Evaluate again.")


def way_episodes(files: Sequence[WayResults], fold: int, shots: int, fusion: str, policy: Policy) -> WayEpisodes | None:
    """The episodes of all files of a fold, or None if there are none."""
    table = rows_of_case(files, fold, shots, fusion)
    if table is None or table[counts_column(policy)].null_count:
        return None
    first = next(file for file in files if file.fold == fold)
    names = ("seed", "episode", "classes", "query", "supports", "absent")
    columns = {name: table[name].to_pylist() for name in names}
    shown = np.array(table["object_pixels"].to_pylist(), np.int64) > 0
    return WayEpisodes(
        fold,
        tuple(sorted(first.classes)),
        first.classes,
        np.array(columns["classes"], np.int64),
        np.array(columns["seed"], np.int64),
        tuple(columns["query"]),
        tuple(zip(*columns.values(), strict=True)),
        shown,
        np.array(columns["absent"], bool) & ~shown.any(1),
        _matrix(table[counts_column(policy)], first.ways),
    )


def _matrix(column: pa.ChunkedArray, ways: int) -> NDArray[np.int64]:
    """(n, N + 1, N + 1) of a column of lists."""
    return np.array(column.to_pylist(), np.int64).reshape(-1, ways + 1, ways + 1)
