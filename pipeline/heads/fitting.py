"""Choosing a number on training episodes, for heads that have one; the novel classes are not looked at."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hsnet.metrics import mean_iou, sum_by_class
from pipeline.episodes.stream import Episode, EpisodeStream
from pipeline.loading.source import FeatureSource


def training_episodes(source: FeatureSource, fold: int, episodes: int, seed: int) -> list[Episode]:
    stream = EpisodeStream(source.index, fold, "trn", 1, seed, exclude=source.skipped)
    return [stream[number] for number in range(episodes)]


def best_threshold(thresholds: Sequence[float], counts: Sequence[Tensor], drawn: Sequence[Episode]) -> float:
    """The threshold whose counts give the best mIoU over the classes drawn."""
    classes = [episode.class_id for episode in drawn]
    scores = [mean_iou(sum_by_class(tried, classes, sorted(set(classes)))) for tried in counts]
    return thresholds[scores.index(max(scores))]
