"""The training loss: two-class cross-entropy at mask size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hsnet.errors import ConfigError
from hsnet.model import resize_logits


def episode_losses(
    logits: Tensor,
    target: Tensor,
    ignore: Tensor | None = None,
    boundary: str = "background",
    left_out: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of each episode.

    Args:
        logits: (B, 2, h, w) as the learner gives them; resized here to the target's size.
        target: (B, H, W) bool or 0/1, 1 where the query shows the class.
        ignore: (B, H, W) bool, pixels labelled as object boundary.
        boundary: "background" counts them as background, as the published code trains; "ignore" leaves them out of
            the mean, as the paper's Appendix C says.
        left_out: (B, H, W) bool, further pixels that are left out of the mean, such as those of held-out classes.

    Returns:
        (B,) float32. The batch loss is its mean: without ignored pixels that equals the mean over all pixels.
    """
    if boundary not in ("background", "ignore"):
        raise ConfigError(f"boundary must be 'background' or 'ignore', got '{boundary}'.")
    counted = ~ignore if boundary == "ignore" and ignore is not None else torch.ones_like(target, dtype=torch.bool)
    if left_out is not None:
        counted = counted & ~left_out
    # Two classes are one number, how much more the pixel looks like the object: one map to resize instead of two.
    return _TwoClassLoss.apply(logits[:, 1:] - logits[:, :1], target.bool(), counted)


class _TwoClassLoss(torch.autograd.Function):
    """Cross-entropy of each episode from logit differences (B, 1, h, w), mean over the counted pixels (B, H, W).

    The gradient is taken at once, so that no map of the target's size outlives the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, difference: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        size = (target.shape[1], target.shape[2])
        pixels = resize_logits(difference.float() if difference.dtype != torch.float64 else difference, size)[:, 0]
        share = counted / counted.sum(dim=(1, 2), keepdim=True).clamp(min=1).to(pixels.dtype)
        # -log(sigmoid(x)) on the object, -log(sigmoid(-x)) beside it
        losses = -(F.logsigmoid(torch.where(target, pixels, -pixels)) * share).sum(dim=(1, 2))
        slope = (pixels.sigmoid() - target.to(pixels.dtype)) * share
        small = torch.ops.aten.upsample_bilinear2d_backward(slope[:, None], size, list(difference.shape), True)
        ctx.save_for_backward(small.to(difference.dtype))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (small,) = ctx.saved_tensors
        return small * gradients[0][:, None, None, None].to(small.dtype), None, None
