"""The training loss: two-class cross-entropy at mask size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hsnet.errors import ConfigError
from hsnet.model import resize_logits

_IGNORE = -100  # torch's own "do not count" label


def episode_losses(
    logits: Tensor, target: Tensor, ignore: Tensor | None = None, boundary: str = "background"
) -> Tensor:
    """Mean cross-entropy of each episode.

    Args:
        logits: (B, 2, h, w) as the learner gives them; resized here to the target's size.
        target: (B, H, W) bool or 0/1, 1 where the query shows the class.
        ignore: (B, H, W) bool, pixels labelled as object boundary.
        boundary: "background" counts them as background, as the published code trains; "ignore" leaves them out of
            the mean, as the paper's Appendix C says.

    Returns:
        (B,) float32. The batch loss is its mean: without ignored pixels that equals the mean over all pixels.
    """
    if boundary not in ("background", "ignore"):
        raise ConfigError(f"boundary must be 'background' or 'ignore', got '{boundary}'.")
    target = target.long()
    counted = None
    if boundary == "ignore" and ignore is not None:
        target = target.masked_fill(ignore, _IGNORE)
        counted = (~ignore).sum(dim=(1, 2)).clamp(min=1)
    pixels = F.cross_entropy(
        resize_logits(logits, (target.shape[1], target.shape[2])),
        target,
        ignore_index=_IGNORE,
        reduction="none",
    )
    return pixels.mean(dim=(1, 2)) if counted is None else pixels.sum(dim=(1, 2)) / counted
