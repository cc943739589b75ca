"""What can answer an episode: one interface for every head, and the learner, trained or not.

All give one-shot logits, support by support, and some one answer of several supports together. How K answers make one
mask (`hsnet.fusion`) is the same for all. The other heads have a module each; `pipeline.heads.catalogue` knows them by
name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hsnet.errors import ConfigError
from hsnet.fused import FusedHSNet
from hsnet.fusion import hard_masks
from hsnet.metrics import count
from hsnet.model import HSNet
from pipeline.loading.batch import EpisodeBatch

PASS_ELEMENTS = {"cpu": 6_000_000, "cuda": 1_000_000_000}
"""Correlation elements (all positions counted) per forward pass, when no gradient is kept.

On a CPU larger passes are slower once a pair fills its caches: one pair of ResNet-50 at 400 px (27 million), five of
SqueezeNet at 112 px. A GPU wants many at once: 2 GB in bfloat16.
"""


@dataclass(frozen=True)
class Answers:
    """What a segmenter says to a batch of B episodes with K supports each."""

    logits: Tensor
    """(K, B, 2, h, w) float32: the one-shot answer to every support, or to the first that were asked for, at the
    segmenter's own size."""
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
    def answer(self, batch: EpisodeBatch, joint: Sequence[int] = (), alone: int | None = None) -> Answers:
        """Answer a batch of episodes.

        Args:
            joint: numbers of supports: for every K in it one answer of the first K of each episode together.
            alone: how many supports get a one-shot answer, the first so many (at least 1); None: every one. A head may
                give more than was asked for.

        Raises:
            ConfigError: a joint answer of a head that has none.
        """
        ...


@dataclass(frozen=True)
class LearnedSegmenter:
    """HSNet's learner, trained or not."""

    model: HSNet
    arithmetic: str = "float32"
    """Precision of its activations, see `hsnet.fused.FusedHSNet`."""

    @torch.no_grad()
    def answer(self, batch: EpisodeBatch, joint: Sequence[int] = (), alone: int | None = None) -> Answers:
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
            torch.cat(
                [torch.stack([fused.decode(of_support) for of_support in context[:alone]]) for context in contexts], 1
            ),
            {k: torch.cat([fused.joint(context[:k]) for context in contexts]) for k in joint},
        )


def margin_answers(margin: Tensor) -> Answers:
    """Answers that are foreground where the margin (K, B, h, w) is above 0."""
    return Answers(torch.stack([torch.zeros_like(margin), margin], 2), {})


def refuse_joint(joint: Sequence[int], name: str) -> None:
    """Raise ConfigError if joint answers were asked of a head that has none."""
    if joint:
        raise ConfigError(
            f"Head '{name}' answers each support by itself: it has no fusion joint. Choose vote, logits or "
            f"probabilities. Nothing was computed."
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
