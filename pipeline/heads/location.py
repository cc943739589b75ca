"""Head `location`: one mask for every query. What a score is worth that this one reaches, too, is doubtful."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsnet.metrics import count
from pipeline.heads.fitting import best_threshold, training_episodes
from pipeline.heads.segmenters import Answers, margin_answers, refuse_joint
from pipeline.loading.batch import EpisodeBatch
from pipeline.loading.source import FeatureSource


@dataclass(frozen=True)
class LocationSegmenter:
    """One mask for every query: where objects usually are. It looks at neither query nor support.

    Photos are often taken with the object in the middle; a score below this one may come from the place alone.
    """

    mask: Tensor
    """(S, S) bool."""

    def answer(self, batch: EpisodeBatch, joint: Sequence[int] = (), alone: int | None = None) -> Answers:
        refuse_joint(joint, "location")
        margin = self.mask.to(batch.target.device).float() - 0.5
        return margin_answers(margin.expand(batch.shots, batch.size, -1, -1))


def fit_location_mask(
    source: FeatureSource, fold: int, episodes: int = 600, seed: int = 0, steps: int = 50
) -> LocationSegmenter:
    """The mean object of *training* episodes, cut at the share (of its highest value) with the best mIoU on them."""
    drawn = training_episodes(source, fold, episodes, seed)
    labels = source.labels([episode.query for episode in drawn])
    target = labels == torch.tensor([episode.class_id + 1 for episode in drawn])[:, None, None]
    ignore = labels == source.index.ignore_label if source.index.has_ignore else None
    mean = target.float().mean(0)
    thresholds = [step / steps * float(mean.max()) for step in range(1, steps + 1)]
    counts = [count((mean >= threshold).expand_as(target), target, ignore) for threshold in thresholds]
    return LocationSegmenter(mean >= best_threshold(thresholds, counts, drawn))
