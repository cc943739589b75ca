"""A segmenter that learns nothing but one threshold: what a trained model has to beat."""

from __future__ import annotations

import torch
from torch import Tensor


def cosine_map(deepest: Tensor, object_mask: Tensor) -> Tensor:
    """How much each query position looks like the most similar position of the object.

    Args:
        deepest: (B, L, U, V, H, W) hypercorrelation of the deepest level.
        object_mask: (B, U, V) support mask at that grid; positions above zero are the object.

    Returns:
        (B, H, W) float32 in [0, 1]: mean over the layers, maximum over the object's positions; 0 without an object.
    """
    mean = deepest.mean(dim=1).flatten(1, 2)  # (B, U V, H, W)
    outside = (object_mask <= 0).flatten(1)[:, :, None, None]
    return torch.where(outside, torch.zeros_like(mean), mean).amax(dim=1)
