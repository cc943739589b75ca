"""What a device can calculate exactly."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LARGEST_CODE = 127
"""Of int8 features: their scale is chosen so that -128 never comes up."""
EXACT_CHANNELS = 2**24 // LARGEST_CODE**2
"""Up to so many channels (1,040) any sum of products of two codes is a whole number below 2^24, which float32 holds."""


def code_products(left: Tensor, right: Tensor) -> Tensor:
    """Matrix products of int8 codes, summed in float32.

    Args:
        left: (n, r, C) codes, as int8 or bfloat16, which holds every code.
        right: (n, C, c) likewise.

    Returns:
        (n, r, c) float32: the whole numbers themselves where C <= `EXACT_CHANNELS`. With more channels a sum above 2^24
        may lose its last bits, 6e-8 of it, as in every float32 product.

    Products are taken in bfloat16 where the device sums them in float32 (tensor cores), else in float32, where they are
    as exact and slower.
    """
    kind = torch.bfloat16 if sums_in_float32(left.device) else torch.float32
    left, right = left.to(kind), right.to(kind)
    return torch.bmm(left, right) if kind == torch.float32 else torch.bmm(left, right, out_dtype=torch.float32)


@cache
def sums_in_float32(device: torch.device) -> bool:
    """Whether bfloat16 products can be had in float32 on a device: tried once, with sums that bfloat16 cannot hold."""
    codes = torch.full((1, 8, 64), LARGEST_CODE, dtype=torch.bfloat16, device=device)
    codes[:, :, 0] = 1
    try:
        products = torch.bmm(codes, codes.transpose(1, 2), out_dtype=torch.float32)
        return bool((products == 1 + 63 * LARGEST_CODE**2).all())
    except (RuntimeError, TypeError):  # no such product on this device, or none in this torch
        return False
