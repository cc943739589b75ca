"""What is kept of an evaluation while it runs: rows as parts (files, in memory, or none), and what scores need.

Of an episode the scores need its class and four counts: 20 bytes. Everything else of its rows stays in files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.runner import Runner
from pipeline.datasets.index import DatasetIndex
from pipeline.episodes.protocols import Policy
from pipeline.episodes.stream import Episode
from pipeline.evaluate.blocks import BLOCK, Block, Blocks, Drawn, L, PartRows, Rows, answered
from pipeline.evaluate.parts import Part, PartFolder, PartWriter
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.heads.segmenters import Segmenter
from pipeline.loading.feeding import Readable
from pipeline.scores.rows import count_columns

if TYPE_CHECKING:
    import pyarrow as pa

Counted = dict[int, tuple[NDArray[np.int32], NDArray[np.int32]]]
"""Number of shots -> class ids (n,) and counts (n, 4) of n episodes that follow each other."""


class Tally:
    """Classes and counts of all episodes, by one policy and fusion, in the order of the rows.

    Counts are pixels of one photo, so 32 bits hold them; sums are to be made with 64.

    Attributes:
        classes: number of shots -> (n,) class ids.
        counts: number of shots -> (n, 4), the columns of `pipeline.scores.rows.COUNTS`.
    """

    def __init__(self, tests: Sequence[Drawn]) -> None:
        self.classes: dict[int, NDArray[np.int32]] = {}
        self.counts: dict[int, NDArray[np.int32]] = {}
        self._starts: dict[tuple[int, str], int] = {}
        for shots in sorted({k for test in tests for k in test.shots}):
            total = 0
            for test in sorted((test for test in tests if shots in test.shots), key=lambda test: test.seed):
                self._starts[shots, test.manifest] = total
                total += len(test.episodes)
            self.classes[shots] = np.full(total, -1, np.int32)
            self.counts[shots] = np.zeros((total, 4), np.int32)

    def add(self, manifest: str, first: int, counted: Counted) -> None:
        """Take over the episodes of a test from number `first` on."""
        for shots, (classes, counts) in counted.items():
            start = self._starts[shots, manifest] + first
            self.classes[shots][start : start + len(classes)] = classes
            self.counts[shots][start : start + len(counts)] = counts


def counted_in(table: pa.Table, policy: Policy, fusion: str) -> Counted:
    """What a tally needs of rows that follow each other in one test."""
    import pyarrow.compute as pc

    columns = count_columns(policy)
    found: Counted = {}
    table = table.filter(pc.equal(table["fusion"], fusion))
    for shots in pc.unique(table["shots"]).to_pylist():
        some = table.filter(pc.equal(table["shots"], shots))
        counts = np.stack([some[name].to_numpy() for name in columns], 1).astype(np.int32)
        found[shots] = some["class_id"].to_numpy().astype(np.int32), counts
    return found


@dataclass(frozen=True)
class Keeping:
    """What is done with rows where they are made. Goes to every worker."""

    schema: pa.Schema
    same: dict[str, str]
    """Columns that are the same in all rows."""
    writer: PartWriter | None
    in_memory: bool
    """Without a writer: send the rows to the process that asked for them."""
    headline: tuple[Policy, str] | None
    """Policy and fusion of the tally, if one is made."""

    def __call__(self, blocks: Sequence[Block], rows: Rows) -> tuple[Part, Counted | None]:
        import pyarrow as pa

        table = pa.Table.from_pylist([{**row, **self.same} for row in rows], schema=self.schema)
        counted = counted_in(table, *self.headline) if self.headline else None
        manifest, first, last = blocks[0].manifest, blocks[0].first, blocks[-1].last
        if self.writer is not None:
            return self.writer.write(manifest, first, last, table), counted
        return Part(manifest, first, last, table if self.in_memory else table.slice(0, 0)), counted


def keep_answers(
    plan: EvaluationPlan,
    tests: Sequence[Drawn],
    read: Callable[..., Readable[L]],
    part_rows: Callable[[Segmenter, L, Sequence[Episode], Block, DatasetIndex], PartRows],
    keeping: Keeping,
    *,
    folder: PartFolder | None = None,
    tally: Tally | None = None,
    runner: Runner | None = None,
    on_event: Callable[[int, int], None] | None = None,
) -> list[Part]:
    """Answer the episodes that no part has yet, and return the parts of all of them; fill the tally.

    Args:
        read, part_rows, runner, on_event: as for `pipeline.evaluate.blocks.answered`.
        folder: where parts are files; None keeps rows in memory, or not at all (`Keeping.in_memory`).

    Raises:
        DataError: a part of another evaluation, or the disk refuses one.
    """
    parts = folder.found(tests) if folder else []
    before = sum(part.last - part.first for part in parts)
    for part in parts:
        if tally is not None and keeping.headline is not None:
            columns = ["shots", "fusion", "class_id", *count_columns(keeping.headline[0])]
            tally.add(part.manifest, part.first, counted_in(part.table(columns), *keeping.headline))
    blocks = Blocks(tests, ((part.manifest, part.first, part.last) for part in parts))
    for part, counted in answered(plan, blocks, read, part_rows, keeping, runner, on_event, before):
        if tally is not None and counted is not None:
            tally.add(part.manifest, part.first, counted)
        if folder is not None:
            parts.append(part if isinstance(part.place, Path) else folder.writer.keep(part))
        elif keeping.in_memory:
            parts.append(part)
    return parts


def decided_by(plan: EvaluationPlan, facts: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """Everything that decides the rows: only parts that agree in it are put together."""
    return {
        **facts,
        "masks at original size": plan.dataset is not None,
        "device": plan.device.partition(":")[0],
        "columns": schema.names,
        "block": BLOCK,
    }


def same_in_all(facts: Mapping[str, Any]) -> dict[str, str]:
    """Columns of the rows that facts of the evaluation give."""
    return {"store": facts["store"], "checkpoint": facts["checkpoint"]}
