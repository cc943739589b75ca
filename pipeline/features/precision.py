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

from hsnet.backbone import TapLayout
from hsnet.errors import ConfigError, StoreError

_INT8_MAX = 127
_BLOCK = 1 << 18
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


def encode_taps(
    taps: Sequence[Tensor], spec: TapLayout, precision: str, out: Sequence[np.ndarray], images: Sequence[str]
) -> None:
    """Encode as `encode(pack_levels(taps, spec), ...)` does, to the bit, without the packed copy, straight into `out`.

    Args:
        taps: one (B, C, H, W) float32 map per tap of `spec`, on any device.
        out: one array (B, layers, H, W, C) per level in the storage type, zero where a layer is narrower than C.

    Raises:
        StoreError: as `encode`. What `out` holds then must not be used.
    """
    rows = [0] * spec.levels
    for tap, values in zip(spec.taps, taps, strict=True):
        target = torch.from_numpy(out[tap.level])[:, rows[tap.level], :, :, : values.shape[1]]
        rows[tap.level] += 1
        maps = values.permute(0, 2, 3, 1)
        largest = _largest(maps)
        _check_finite(largest, tap.level, images)
        if precision == "int8" and values.device.type == "cpu":
            for source, by, place in zip(maps, _divisor(largest), target, strict=True):
                _write_int8(source.flatten(0, 1), by.flatten(0, 1), place.flatten(0, 1))
        else:
            target.copy_(_ENCODERS[precision](maps, largest))


def check_levels(levels: Sequence[Tensor], images: Sequence[str] | None = None) -> Iterator[Tensor]:
    """Refuse features that are not finite float32, as `encode`; yields the largest absolute value of every vector."""
    for number, values in enumerate(levels):
        if values.dtype != torch.float32 or values.ndim != 5:
            raise StoreError(
                f"Features of level {number} must be 5-dimensional float32, got {values.dtype} of shape "
                f"{tuple(values.shape)}."
            )
        largest = _largest(values)
        _check_finite(largest, number, images)
        yield largest


def _largest(values: Tensor) -> Tensor:
    """Largest absolute value of every vector, (..., 1): NaN and infinity show up in it."""
    # aminmax takes 15 times as long as these two on a CPU.
    return torch.maximum(values.amax(-1, keepdim=True), -values.amin(-1, keepdim=True))


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
    encoded = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    _write_int8(values.flatten(0, -2), _divisor(largest).flatten(0, -2), encoded.flatten(0, -2))
    return encoded


def _divisor(largest: Tensor) -> Tensor:
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _write_int8(values: Tensor, divisor: Tensor, target: Tensor) -> None:
    """(P, C) float32 and (P, 1) -> (P, C) int8."""
    # A few positions at a time on a CPU, in memory that stays in its cache: fresh memory took most of the time.
    step = max(1, _BLOCK // values.shape[1]) if values.device.type == "cpu" else max(1, len(values))
    scratch = torch.empty_like(values[:step])
    for some, by, place in zip(values.split(step), divisor.split(step), target.split(step), strict=True):
        scaled = torch.div(some, by, out=scratch[: len(some)])
        # Divided before it is multiplied: 127 / largest overflows for subnormal values.
        place.copy_(scaled.mul_(_INT8_MAX).round_())


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
