"""The rows of an evaluation: one per episode, number of shots and way to combine the shots, as Parquet.

Counts are whole numbers of pixels, once per `pipeline.episodes.protocols.Policy`; every score, interval and test is made of
them later (`pipeline.analyze`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.episodes.protocols import POLICIES, Policy

if TYPE_CHECKING:  # imported where tables are made: training counts masks and makes none
    import pyarrow as pa

COUNTS = ("intersection_background", "intersection", "union_background", "union")
"""Columns of an episode's counts, pixels, in the order of `hsnet.metrics.count`; each again with every suffix."""

METADATA = b"hsnet"
"""Key of the table's metadata under which the facts of the evaluation are, as JSON."""


def count_columns(policy: Policy) -> tuple[str, ...]:
    """The four columns of a policy's counts."""
    return tuple(f"{name}{policy.suffix}" for name in COUNTS)


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
            ("class_id", pa.int32()),
            ("class_name", pa.string()),
            ("query", pa.string()),
            ("supports", pa.list_(pa.string())),
            *((name, pa.int64()) for policy in POLICIES for name in count_columns(policy)),
            ("object_pixels", pa.int64()),
            ("seconds", pa.float32()),
            ("manifest", digest),
            ("store", digest),
            ("checkpoint", digest),
        ]
    )
