"""Head `cosine`: the deepest level's cosine map, cut at one threshold. A trained head has to beat it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsnet.correlation import build_hypercorrelation, interpolate_mask
from hsnet.metrics import count
from hsnet.model import resize_logits
from hsnet.similarity import cosine_map
from pipeline.heads.fitting import best_threshold, training_episodes
from pipeline.heads.segmenters import Answers, margin_answers, refuse_joint
from pipeline.loading.batch import EpisodeBatch, load_batch
from pipeline.loading.source import FeatureSource


@dataclass(frozen=True)
class CosineSegmenter:
    """The deepest level's cosine map, cut at a threshold in [0, 1]: no learning but this one number."""

    threshold: float

    @torch.no_grad()
    def answer(self, batch: EpisodeBatch, joint: Sequence[int] = (), alone: int | None = None) -> Answers:
        refuse_joint(joint, "cosine")
        return margin_answers(cosine_scores(batch) - self.threshold)


def cosine_scores(batch: EpisodeBatch) -> Tensor:
    """(K, B, S, S) float32 in [0, 1]: the cosine map of every support at mask size."""
    query, support = batch.query[-1].repeat_interleave(batch.shots, 0), batch.support[-1]
    mask = interpolate_mask(batch.support_mask, (support.shape[2], support.shape[3]))
    scores = cosine_map(build_hypercorrelation(query, support, mask, unit=batch.unit), mask)
    size = (batch.target.shape[1], batch.target.shape[2])
    return resize_logits(scores[:, None], size)[:, 0].view(batch.size, batch.shots, *size).transpose(0, 1)


def fit_cosine_threshold(
    source: FeatureSource, fold: int, episodes: int = 200, seed: int = 0, steps: int = 100
) -> CosineSegmenter:
    """Choose the threshold with the best mIoU on one-shot *training* episodes; the novel classes are not looked at.

    Args:
        episodes: how many to fit on.
        steps: thresholds tried, evenly spaced over [0, 1].
    """
    drawn = training_episodes(source, fold, episodes, seed)
    thresholds = [step / steps for step in range(steps)]
    counts: list[list[Tensor]] = [[] for _ in thresholds]
    for start in range(0, episodes, 20):
        batch = load_batch(source, drawn[start : start + 20]).to("cpu")
        scores = cosine_scores(batch)[0]
        for tried, threshold in zip(counts, thresholds, strict=True):
            tried.append(count(scores > threshold, batch.target, batch.ignore))
    return CosineSegmenter(best_threshold(thresholds, [torch.cat(tried) for tried in counts], drawn))
