"""Head `contrast`: nearer to the support's object or to its background? Nothing is learned and nothing is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hsnet.similarity import clear_positions, contrast
from pipeline.heads.scene import Scene, answer_scenes
from pipeline.heads.segmenters import Answers
from pipeline.loading.batch import EpisodeBatch


@dataclass(frozen=True)
class ContrastSegmenter:
    """Cosine to the nearest positions of the object minus that to the nearest of the background, cut at 0.

    The cosines are averaged over all layers before the five nearest are taken, on the deepest grid. Positions that are
    part object and part background count for neither side (`hsnet.similarity.clear_positions`); with them counted as
    object, a fitted threshold was worth three points, without them nothing (docs/heads.md).

    Several supports together (fusion `joint`) are one support with all their positions. On photos that differ much this
    is two to four points above the mean of their margins (fusion `logits`), elsewhere equal (docs/heads.md). Without an
    object at network size, the answer is background everywhere.

    Source: nearest neighbours of both sides, as in dense-matching baselines; the form is this project's own, chosen on
    training classes.
    """

    def answer(self, batch: EpisodeBatch, joint: Sequence[int] = (), alone: int | None = None) -> Answers:
        return answer_scenes(batch, margin, joint, alone)


def margin(scene: Scene) -> Tensor:
    """(P,) in [-2, 2]: the scene's supports, all positions of all of them, against the query."""
    inside, outside = clear_positions(scene.shares)
    support = scene.support.flatten(0, 1)
    return contrast(scene.query, support, inside.flatten(), outside.flatten())
