"""Features as they are stored: float32, float16, or int8 without scale.

Only the direction of a feature vector matters, because all that is ever computed from it is a cosine. A vector may
therefore be scaled as its storage type likes, and the scale thrown away. No decoder is needed: readers convert to
float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hsnet.errors import ConfigError, StoreError

_INT8_MAX = 127
_FLOAT16_MAX = 65504.0
_FLOAT16_SMALLEST_NORMAL = 2.0**-14


def encode(
    levels: Sequence[Tensor | np.ndarray], precision: str, images: Sequence[str] | None = None
) -> list[np.ndarray]:
    """Convert features of B images to their storage type.

    Args:
        levels: one (B, layers, rows, columns, channels) float32 array or tensor (on any device) per level.
        precision: "float32" keeps every bit. "float16" rounds; a vector that does not fit its range (largest value
            above 65504, or below 2**-14) is first scaled by a power of two. "int8" divides every vector (one image,
            layer and position) by its largest absolute value and rounds to -127..127, half to even.
        images: B image ids, for the error message.

    Returns:
        Arrays of the same shapes, on the host. Zero vectors stay zero. int8 never holds -128.

    Raises:
        StoreError: a value is NaN or infinite; names the image and the level.

    Error of int8, real SqueezeNet features: cosines differ by 3-7e-4 on average (their spread is 0.10-0.15).
    """
    if precision not in _ENCODERS:
        raise ConfigError(f"Unknown precision '{precision}'. Choose one of: {', '.join(_ENCODERS)}.")
    tensors = [torch.as_tensor(level) for level in levels]
    return [
        _ENCODERS[precision](values, largest).cpu().numpy()
        for values, largest in zip(tensors, check_levels(tensors, images), strict=True)
    ]


def check_levels(levels: Sequence[Tensor], images: Sequence[str] | None = None) -> Iterator[Tensor]:
    """Refuse features that are not finite float32, as `encode`; yields the largest absolute value of every vector."""
    for number, values in enumerate(levels):
        if values.dtype != torch.float32 or values.ndim != 5:
            raise StoreError(
                f"Features of level {number} must be 5-dimensional float32, got {values.dtype} of shape "
                f"{tuple(values.shape)}."
            )
        # NaN and infinity of a vector show up here. (aminmax takes 15 times as long as these two on a CPU.)
        largest = torch.maximum(values.amax(-1, keepdim=True), -values.amin(-1, keepdim=True))
        _check_finite(largest, number, images)
        yield largest


def _keep(values: Tensor, largest: Tensor) -> Tensor:
    return values


def _to_float16(values: Tensor, largest: Tensor) -> Tensor:
    misfit = (largest > _FLOAT16_MAX) | ((largest < _FLOAT16_SMALLEST_NORMAL) & (largest > 0))
    if misfit.any():
        # Largest value becomes 2**14 to 2**15: far from both ends, and a power of two loses no bit of the rest.
        exponent = 15 - torch.frexp(largest).exponent
        values = torch.where(misfit, torch.ldexp(values.double(), exponent).float(), values)
    return values.to(torch.float16)


def _to_int8(values: Tensor, largest: Tensor) -> Tensor:
    divisor = torch.where(largest > 0, largest, torch.ones_like(largest))
    encoded = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    # One map at a time: fresh memory for a whole level took most of the time on a CPU (ResNet-50, 400 px: 11 to 7 ms).
    for source, by, target in zip(values.flatten(0, 1), divisor.flatten(0, 1), encoded.flatten(0, 1), strict=True):
        # Divide before multiplying: 127 / largest overflows for subnormal values.
        target.copy_(torch.div(source, by).mul_(_INT8_MAX).round_())
    return encoded


_ENCODERS = {"float32": _keep, "float16": _to_float16, "int8": _to_int8}


def _check_finite(largest: Tensor, level: int, images: Sequence[str] | None) -> None:
    finite = torch.isfinite(largest).flatten(1).all(1)
    if not finite.all():
        row = int(torch.nonzero(~finite)[0])
        name = f"image '{images[row]}'" if images else f"image {row} of the batch"
        raise StoreError(
            f"Features of {name} hold NaN or infinity at level {level}. The backbone's weights are damaged, or belong "
            f"to a network that expects another normalisation. Nothing of this shard was written."
        )
