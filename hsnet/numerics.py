"""How a device calculates: what torch may round without being asked, and what a device can do.

torch's own defaults differ between operations: on a GPU convolutions may round their inputs to TensorFloat-32 (10 bits
of fraction), matrix products may not. `set_numerics` is the one place where that is decided, `facts` tells it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BENCHMARK = False
"""Whether cuDNN tries its kernels and keeps the fastest. Then the clock chooses how sums are ordered, and the same
extraction could give other last bits the next time; what it would gain was never measured."""

LARGEST_CODE = 127
"""Of int8 features: their scale is chosen so that -128 never comes up."""
EXACT_CHANNELS = 2**24 // LARGEST_CODE**2
"""Up to so many channels (1,040) any sum of products of two codes is a whole number below 2^24, which float32 holds."""


def set_numerics(benchmark: bool = BENCHMARK) -> None:
    """Decide, for this process, how torch's products round on a GPU. To be called before a device is used.

    float32 means float32: no TensorFloat-32 in matrix products or convolutions. Every GPU that has TensorFloat-32 has
    bfloat16, which is faster still and is asked for by its own name (`--arithmetic`). Sums of bfloat16 products are
    float32 throughout. Nothing of this touches a CPU.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.benchmark = benchmark


def facts() -> dict[str, str]:
    """Name -> what is true of this process's GPUs now; empty without one."""
    if not torch.cuda.is_available():
        return {}
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    settings = {
        "TF32 in matrix products": torch.backends.cuda.matmul.allow_tf32,
        "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
        "sums of bfloat16 products in bfloat16": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "cuDNN benchmark": torch.backends.cudnn.benchmark,
    }
    return {
        "GPU": ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "float32 matrix products": torch.get_float32_matmul_precision(),
        **{name: "on" if value else "off" for name, value in settings.items()},
    }


def has_bfloat16(device: str) -> bool:
    """Whether a device calculates in bfloat16 itself: NVIDIA's since Ampere. torch imitates it on others, slowly."""
    if not device.startswith("cuda"):
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


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
