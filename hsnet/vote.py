"""Several supports for one query: a pixel-wise vote over the one-shot predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from hsnet.errors import ConfigError, ShapeError


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
