"""Several supports for one query: ways to make one mask of K one-shot answers.

Published is the vote. The two means keep what a vote throws away: how sure each answer is. A fourth
way, the joint one, needs the learner: see `hsnet.fused.FusedHSNet.joint`.

Dimension key: K shots, B queries, H W mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hsnet.errors import ConfigError, ShapeError
from hsnet.model import predict_mask, resize_logits

ONE_SHOT_FUSIONS = ("vote", "logits", "probabilities")
"""Fusions made of K one-shot answers."""


def fuse(
    logits: Tensor,
    size: tuple[int, int],
    fusion: str = "vote",
    tau: float = 0.5,
    strict: bool = False,
    normalise: str = "max",
) -> Tensor:
    """One hard mask per query from K one-shot answers.

    Args:
        logits: (K, B, 2, h, w) of `HSNet` or `FusedHSNet`, one per support; channel 0 is background.
        size: (H, W) of the mask, straight from the logits' own size.
        fusion: "vote": a hard mask each, then `vote` with `tau`, `strict`, `normalise`. "logits": their mean, then
            foreground probability against `tau`. "probabilities": softmax each, then their mean against `tau`.
        tau, strict: a pixel is foreground at `tau` or above, with `strict` only above it. For the means a tau of 0.5
            is the published rule for one answer, foreground above background, whatever `strict` says.

    Returns:
        (B, H, W) bool. With K = 1 and a tau of 0.5 all are the published one-shot prediction.

    Source: vote: Min et al. 2021, Sec. 4.5. The means are usual in the field and not in the paper.
    """
    if logits.ndim != 5 or not len(logits) or logits.shape[2] != 2:
        raise ShapeError(f"Logits must be (K, B, 2, h, w) with K >= 1, got {tuple(logits.shape)}.")
    if fusion == "vote":
        return vote(hard_masks(logits, size), tau, strict, normalise)
    if fusion == "logits":  # resizing is linear: once is enough
        return foreground(resize_logits(logits.mean(0), size), tau, strict)
    if fusion == "probabilities":
        shares = resize_logits(logits.flatten(0, 1), size).softmax(1).unflatten(0, logits.shape[:2]).mean(0)
        if tau == 0.5:
            return predict_mask(shares)
        return shares[:, 1] > tau if strict else shares[:, 1] >= tau
    raise ConfigError(f"fusion must be one of {', '.join(ONE_SHOT_FUSIONS)}, got '{fusion}'.")


def vote(masks: Tensor, threshold: float = 0.5, strict: bool = False, normalise: str = "max") -> Tensor:
    """Combine the K one-shot predictions of each query.

    Args:
        masks: (K, B, H, W) hard predictions, one per support; bool or 0/1.
        threshold: share of the normaliser at which a pixel is foreground (tau in the paper).
        strict: foreground only *above* the threshold, as the paper says; the published code takes "at or above".
        normalise: "max" divides by the image's own largest vote, at least 1, as the published code does; "shots"
            divides by K. With "max", five shots and a best pixel of two votes, one vote is enough.

    Returns:
        (B, H, W) bool. One support is returned as it is.

    Source: Min et al. 2021, Sec. 4.5.
    """
    if masks.ndim != 4 or not len(masks):
        raise ShapeError(f"Votes must be (K, B, H, W) with K >= 1, got {tuple(masks.shape)}.")
    if normalise not in ("max", "shots"):
        raise ConfigError(f"normalise must be 'max' or 'shots', got '{normalise}'.")
    if len(masks) == 1:
        return masks[0].bool()
    votes = masks.sum(0, dtype=torch.int64)
    most = votes.amax(dim=(1, 2), keepdim=True).clamp(min=1) if normalise == "max" else len(masks)
    # Divide in float32 like the published code: with K shots the quotient may be the threshold exactly.
    share = votes.float() / most
    return share > threshold if strict else share >= threshold


def hard_masks(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The one-shot predictions (K, B, H, W), bool, of logits (K, B, 2, h, w)."""
    return foreground(resize_logits(logits.flatten(0, 1), size)).unflatten(0, logits.shape[:2])


def foreground(logits: Tensor, tau: float = 0.5, strict: bool = False) -> Tensor:
    """Hard masks (B, H, W), bool, from logits (B, 2, H, W): foreground probability against `tau`."""
    if tau == 0.5:
        return predict_mask(logits)
    # The probability is above tau where the logits differ by more than tau's own: no softmax, no rounding.
    least = logits[:, 0] + math.log(tau / (1 - tau))
    return logits[:, 1] > least if strict else logits[:, 1] >= least
