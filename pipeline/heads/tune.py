"""Head `tune`: a cut through the features, fitted to the episode's own supports and to nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from hsnet.readout import balanced, fit_readouts
from hsnet.similarity import NO_OBJECT, affinity
from pipeline.heads.scene import Scene, answer_scenes, grid_of
from pipeline.heads.segmenters import Answers, Segmenter
from pipeline.loading.batch import EpisodeBatch

PENALTIES = (3e-4, 1e-3, 3e-3)
"""Among which leave-one-out chooses."""

ONE_SHOT_PENALTY = 1e-3
"""With one support there is none to leave out; chosen on training classes."""

OFFSETS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Among which leave-one-out chooses where to cut: a fit that weighs both sides alike calls too much an object."""

ONE_SHOT_OFFSET = 0.0
"""The same with one support, chosen on training classes."""

WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)
"""Among which leave-one-out chooses how much the read-out counts beside a trained head."""

ONE_SHOT_WEIGHT = 0.25
"""The same with one support."""

LEFT_OUT_STEPS = 30
"""Iterations of the fits that are only compared with each other."""

TEMPERATURE = 0.05
"""Of the query's affinity: cosines that differ by this much differ by a factor e in what they contribute."""

WALKS = 2
"""Times that each position takes the answers of those that look like it."""


@dataclass(frozen=True)
class TuneSegmenter:
    """A regularised logistic regression on the supports' positions, cut where it separates supports it has not seen.

    Each position is one vector, the unit features of all layers side by side; its target is the share of its area that
    is object; object and background weigh alike. With several supports, each is left out once: the penalty and the
    threshold are those with the best IoU on the supports left out. The margin is carried along the query's
    self-similarity (`carried`). All K supports are fitted together (fusion `joint`).

    Source: linear read-outs of frozen features are the usual probe of self-supervised networks; here they are fitted
    per episode.
    """

    head: Segmenter | None = None
    """A trained head to stand on: its margin, and this one's with a weight that leave-one-out chooses."""

    def answer(self, batch: EpisodeBatch, joint: Sequence[int] = (), alone: int | None = None) -> Answers:
        return answer_scenes(batch, self.margin, joint, alone)

    def margin(self, scene: Scene) -> Tensor:
        """(P,) logits on the deepest grid; (h, w) at the trained head's own size where there is one."""
        if not scene.shares.any():
            return scene.query.new_full(scene.query.shape[:1], NO_OBJECT)
        scene = distinct(scene)
        vectors, shares = scene.support.flatten(0, 1), scene.shares.flatten()
        fit = fit_supports(scene.support, scene.shares)
        direction, bias = fit.solve(vectors, shares)
        answer = scene.query @ direction + bias
        stand = None if self.head is None else Standing.on(self.head, scene, fit)
        answer = carried(answer, scene.query) - fit.offset
        return answer if stand is None else stand.together(answer)


def distinct(scene: Scene) -> Scene:
    """The scene without supports that are there already: left out, they would be seen all the same."""
    new = [
        k
        for k, (vectors, shares) in enumerate(zip(scene.support, scene.shares, strict=True))
        if not any(torch.equal(vectors, scene.support[j]) and torch.equal(shares, scene.shares[j]) for j in range(k))
    ]
    return scene if len(new) == len(scene.support) else scene.of(new)


@dataclass(frozen=True)
class Fit:
    """How the supports of an episode are best fitted."""

    penalty: float
    offset: float
    """Where the margin is cut."""
    left_out: Tensor | None
    """(n,) margins of all positions, each support's by a fit to the others, not yet cut; None for one support."""

    def solve(self, vectors: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """(direction (D,), bias ()) of all supports' positions (n, D) and shares (n,)."""
        positive, negative = balanced(shares)
        penalty = vectors.new_tensor([self.penalty])
        direction, bias = fit_readouts(vectors, positive[None], negative[None], penalty)
        return direction[0], bias[0]


def fit_supports(vectors: Sequence[Tensor] | Tensor, shares: Sequence[Tensor] | Tensor) -> Fit:
    """Penalty and threshold with the best IoU on supports left out; fixed ones for a single support.

    Args:
        vectors: of every support (P, D); supports may have different numbers of positions.
        shares: of every support (P,) in [0, 1].
    """
    count = len(vectors)
    if count == 1:
        return Fit(ONE_SHOT_PENALTY, ONE_SHOT_OFFSET, None)
    every, all_shares = torch.cat(list(vectors)), torch.cat(list(shares))
    ends = list(accumulate(len(some) for some in shares))
    parts = [slice(end - len(some), end) for end, some in zip(ends, shares, strict=True)]
    kept = torch.ones(count, len(every), dtype=torch.bool, device=every.device)
    for left, part in enumerate(parts):
        kept[left, part] = False
    sides = [torch.zeros(count, len(every), dtype=every.dtype, device=every.device) for _ in range(2)]
    for left in range(count):
        for side, weights in zip(sides, balanced(all_shares[kept[left]]), strict=True):
            side[left, kept[left]] = weights
    penalties = every.new_tensor(PENALTIES).repeat_interleave(count)
    positive, negative = (side.repeat(len(PENALTIES), 1) for side in sides)
    directions, biases = fit_readouts(every, positive, negative, penalties, steps=LEFT_OUT_STEPS)
    # (penalties, n): every support by the fit that has not seen it
    margins = torch.cat(
        [every[part] @ directions[left::count].T + biases[left::count] for left, part in enumerate(parts)]
    ).T
    scores = torch.stack([soft_iou(margins > offset, all_shares, 1) for offset in OFFSETS], 1)
    best = int(scores.argmax())
    chosen, cut = divmod(best, len(OFFSETS))
    return Fit(PENALTIES[chosen], OFFSETS[cut], margins[chosen])


def soft_iou(said: Tensor, shares: Tensor, first: int = 0) -> Tensor:
    """IoU of masks with shares of area, sums over every axis from `first` on."""
    both = (said * shares).flatten(first).sum(-1)
    either = said.flatten(first).sum(-1) + shares.sum() - both
    return both / either.clamp(min=torch.finfo(shares.dtype).tiny)


def carried(answer: Tensor, query: Tensor) -> Tensor:
    """(P,): margins (P,) of any kind, carried along the self-similarity of the query's positions (P, D).

    Each position takes the mean of all positions' margins, weighted by the softmax of their cosines to it, `WALKS`
    times: what a single position happened to match is outvoted by those that look like it.

    Source: that a query's own self-similarity groups what belongs together is the idea of training-free in-context
    segmentation with self-supervised features (INSID3), which clusters; here a random walk stands for the clusters.
    """
    similar = affinity(query, TEMPERATURE)
    for _ in range(WALKS):
        answer = similar @ answer
    return answer


@dataclass(frozen=True)
class Standing:
    """A trained head's answer to an episode, and what a read-out counts beside it."""

    margin: Tensor
    """(h, w) at the trained head's own size: mean over the supports of its logits, object minus background."""
    weight: float
    grid: tuple[int, int]
    """Of the read-out's positions."""

    @classmethod
    def on(cls, head: Segmenter, scene: Scene, fit: Fit) -> Standing:
        """With the weight that is best on supports left out: each is a query of the others, to the head and the fit."""
        grid = grid_of(scene.batch)
        margin = head_margin(head, scene.batch)[0]
        if fit.left_out is None:
            return cls(margin, ONE_SHOT_WEIGHT, grid)
        left_out = _resized(left_out_margins(head, scene.batch), grid).flatten()
        tried = torch.stack([left_out + weight * (fit.left_out - fit.offset) for weight in WEIGHTS])
        return cls(margin, WEIGHTS[int(soft_iou(tried > 0, scene.shares.flatten(), 1).argmax())], grid)

    def together(self, answer: Tensor) -> Tensor:
        """Both margins, (h, w)."""
        size = (self.margin.shape[0], self.margin.shape[1])
        return self.margin + self.weight * _resized(answer.unflatten(0, self.grid)[None], size)[0]


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, H, W) at another size, as logits are resized."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=True)[:, 0]


def head_margin(head: Segmenter, batch: EpisodeBatch) -> Tensor:
    """(B, h, w): the mean of a trained head's margins by all supports."""
    logits = head.answer(batch).logits
    return (logits[:, :, 1] - logits[:, :, 0]).mean(0)


def left_out_margins(head: Segmenter, batch: EpisodeBatch) -> Tensor:
    """(K, h, w): each support as the query of the others."""
    count = batch.shots
    others = [[k for k in range(count) if k != left] for left in range(count)]
    places = torch.tensor(others, device=batch.support_mask.device).flatten()
    turned = replace(
        batch,
        query=batch.support,
        support=[level[places] for level in batch.support],
        support_mask=batch.support_mask[places],
        target=batch.support_mask,
        ignore=None,
        shots=count - 1,
    )
    return head_margin(head, turned)
