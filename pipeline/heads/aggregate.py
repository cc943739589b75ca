"""Head `aggregate`: positions of the query that look alike answer alike. Nothing is learned and nothing is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hsnet.similarity import affinity
from pipeline.heads import contrast
from pipeline.heads.scene import Scene, answer_scenes
from pipeline.heads.segmenters import Answers
from pipeline.loading.batch import EpisodeBatch

TEMPERATURE = 0.05
"""Of the query's affinity: cosines that differ by this much differ by a factor e in what they contribute."""

WALKS = 2
"""Times that each position takes the answers of those that look like it."""


@dataclass(frozen=True)
class AggregateSegmenter:
    """`contrast`'s margin, carried along the query's own similarities and cut at 0.

    Each position of the query takes the mean of all positions' margins, weighted by the softmax of their cosines to it,
    `WALKS` times: what a single position happened to match is outvoted by those that look like it. Temperature and
    number of walks were chosen on training classes (docs/heads.md).

    Source: the idea that a query's own self-similarity groups what belongs together is that of training-free in-context
    segmentation with self-supervised features (INSID3), which clusters; here a random walk stands for the clusters.
    """

    def answer(self, batch: EpisodeBatch, joint: Sequence[int] = (), alone: int | None = None) -> Answers:
        return answer_scenes(batch, margin, joint, alone)


def margin(scene: Scene) -> Tensor:
    """(P,) in [-2, 2], object above 0."""
    return carried(contrast.margin(scene), scene.query)


def carried(answer: Tensor, query: Tensor) -> Tensor:
    """(P,): margins (P,) of any kind, carried along the self-similarity of the query's positions (P, D)."""
    similar = affinity(query, TEMPERATURE)
    for _ in range(WALKS):
        answer = similar @ answer
    return answer
