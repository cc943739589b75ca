"""What can answer an episode: a trained head, an untrained one, a cosine map, or one mask for all.

All give one-shot logits, support by support; how K of them make one mask (`hsnet.fusion`) is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hsnet.baseline import cosine_map
from hsnet.correlation import build_hypercorrelation, interpolate_mask
from hsnet.errors import ConfigError
from hsnet.fused import FusedHSNet
from hsnet.fusion import hard_masks
from hsnet.metrics import count, mean_iou, sum_by_class
from hsnet.model import HSNet, resize_logits
from pipeline.episodes.stream import Episode, EpisodeStream
from pipeline.loading.batch import EpisodeBatch, load_batch
from pipeline.loading.source import FeatureSource

PASS_ELEMENTS = {"cpu": 6_000_000, "cuda": 1_000_000_000}
"""Correlation elements (all positions counted) per forward pass, when no gradient is kept.

On a CPU larger passes are slower once a pair fills its caches: one pair of ResNet-50 at 400 px (27 million), five of
SqueezeNet at 112 px. A GPU wants many at once: 2 GB in bfloat16.
"""


@dataclass(frozen=True)
class Answers:
    """What a segmenter says to a batch of B episodes with K supports each."""

    logits: Tensor
    """(K, B, 2, h, w) float32: the one-shot answer to every support, at the segmenter's own size."""
    joint: Mapping[int, Tensor]
    """Number of supports -> (B, 2, h, w) float32: one answer of the first so many supports together."""

    def masks(self, size: tuple[int, int]) -> Tensor:
        """(K, B, H, W) bool: the one-shot predictions."""
        return hard_masks(self.logits, size)

    def count(self, batch: EpisodeBatch) -> Tensor:
        """(B, 2, 2) int64: counts of the first support's masks at network size, ignored pixels left out."""
        size = (batch.target.shape[1], batch.target.shape[2])
        return count(self.masks(size)[0], batch.target, batch.ignore)


class Segmenter(Protocol):
    def answer(self, batch: EpisodeBatch, joint: Sequence[int] = ()) -> Answers:
        """Answer every support of a batch, and jointly the first K of each episode for every K in `joint`."""
        ...


@dataclass(frozen=True)
class LearnedSegmenter:
    """HSNet's learner, trained or not."""

    model: HSNet
    arithmetic: str = "float32"
    """Precision of its activations, see `hsnet.fused.FusedHSNet`."""

    @torch.no_grad()
    def answer(self, batch: EpisodeBatch, joint: Sequence[int] = ()) -> Answers:
        fused = FusedHSNet(self.model, self.arithmetic)
        parts: list[list[Tensor]] = []
        # A fixed number of pairs at a time: memory does not grow with the batch, and results do not depend on how
        # episodes were handed out.
        pairs = pairs_per_pass(batch, self.model)
        episodes, shots = max(1, pairs // batch.shots), min(batch.shots, pairs)
        for first in range(0, batch.size, episodes):
            chosen = slice(first, first + episodes)
            query = [level[chosen] for level in batch.query]
            parts.append([])
            for shot in range(0, batch.shots, shots):
                drawn = slice(shot, shot + shots)
                support, mask = (
                    [level.unflatten(0, (-1, batch.shots))[chosen, drawn].flatten(0, 1) for level in levels]
                    for levels in (batch.support, [batch.support_mask])
                )
                context = fused.encode(query, support, mask[0], batch.unit)
                parts[-1].append(context.unflatten(0, (len(query[0]), -1)).transpose(0, 1))
        contexts = [torch.cat(part) for part in parts]  # (K, episodes, C, H, W) each
        # Decoded as they were encoded, so that no pass is larger than the others.
        return Answers(
            torch.cat([torch.stack([fused.decode(of_support) for of_support in context]) for context in contexts], 1),
            {k: torch.cat([fused.joint(context[:k]) for context in contexts]) for k in joint},
        )


@dataclass(frozen=True)
class CosineSegmenter:
    """The deepest level's cosine map, cut at a threshold in [0, 1]: no learning but this one number."""

    threshold: float

    @torch.no_grad()
    def answer(self, batch: EpisodeBatch, joint: Sequence[int] = ()) -> Answers:
        _require_no_joint(joint, "cosine")
        return _as_answers(cosine_scores(batch) - self.threshold)


@dataclass(frozen=True)
class LocationSegmenter:
    """One mask for every query: where objects usually are. It looks at neither query nor support.

    Photos are often taken with the object in the middle; a score below this one may come from the place alone.
    """

    mask: Tensor
    """(S, S) bool."""

    def answer(self, batch: EpisodeBatch, joint: Sequence[int] = ()) -> Answers:
        _require_no_joint(joint, "location")
        margin = self.mask.to(batch.target.device).float() - 0.5
        return _as_answers(margin.expand(batch.shots, batch.size, -1, -1))


def _as_answers(margin: Tensor) -> Answers:
    """Answers that are foreground where the margin (K, B, h, w) is above 0."""
    return Answers(torch.stack([torch.zeros_like(margin), margin], 2), {})


def _require_no_joint(joint: Sequence[int], name: str) -> None:
    if joint:
        raise ConfigError(
            f"The {name} baseline answers each support by itself: fusion joint needs a head. Choose vote, logits or "
            f"probabilities."
        )


def pairs_per_pass(batch: EpisodeBatch, model: HSNet | None = None) -> int:
    """Support-query pairs per forward pass: as many as fit PASS_ELEMENTS of the batch's device, at least one.

    Args:
        model: counts the layers that it uses; all without it.
    """
    query, support = ((model.chosen(side) if model else side) for side in (batch.query, batch.support))
    per_pair = sum(
        q.shape[1] * math.prod(q.shape[2:4]) * math.prod(s.shape[2:4]) for q, s in zip(query, support, strict=True)
    )
    return max(1, PASS_ELEMENTS["cpu" if batch.target.device.type == "cpu" else "cuda"] // per_pair)


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
    drawn = _training_episodes(source, fold, episodes, seed)
    thresholds = [step / steps for step in range(steps)]
    counts: list[list[Tensor]] = [[] for _ in thresholds]
    for start in range(0, episodes, 20):
        batch = load_batch(source, drawn[start : start + 20]).to("cpu")
        scores = cosine_scores(batch)[0]
        for tried, threshold in zip(counts, thresholds, strict=True):
            tried.append(count(scores > threshold, batch.target, batch.ignore))
    return CosineSegmenter(_best(thresholds, [torch.cat(tried) for tried in counts], drawn))


def fit_location_mask(
    source: FeatureSource, fold: int, episodes: int = 600, seed: int = 0, steps: int = 50
) -> LocationSegmenter:
    """The mean object of *training* episodes, cut at the share (of its highest value) with the best mIoU on them."""
    drawn = _training_episodes(source, fold, episodes, seed)
    labels = source.labels([episode.query for episode in drawn])
    target = labels == torch.tensor([episode.class_id + 1 for episode in drawn])[:, None, None]
    ignore = labels == source.index.ignore_label if source.index.has_ignore else None
    mean = target.float().mean(0)
    thresholds = [step / steps * float(mean.max()) for step in range(1, steps + 1)]
    counts = [count((mean >= threshold).expand_as(target), target, ignore) for threshold in thresholds]
    return LocationSegmenter(mean >= _best(thresholds, counts, drawn))


def _training_episodes(source: FeatureSource, fold: int, episodes: int, seed: int) -> list[Episode]:
    stream = EpisodeStream(source.index, fold, "trn", 1, seed, exclude=source.skipped)
    return [stream[number] for number in range(episodes)]


def _best(thresholds: Sequence[float], counts: Sequence[Tensor], drawn: Sequence[Episode]) -> float:
    """The threshold whose counts give the best mIoU over the classes drawn."""
    classes = [episode.class_id for episode in drawn]
    scores = [mean_iou(sum_by_class(tried, classes, sorted(set(classes)))) for tried in counts]
    return thresholds[scores.index(max(scores))]
