"""BitRound and Quantize of numcodecs before writing float features: bytes, errors of correlations and rates.

`python -m benchmarks.compression round` runs it. Every way is a function on the floats of one image and level, then
zstd, alone or with the bytes of equal significance put together first (shuffle), as zarr readers undo it without
numcodecs. int8 is what they are compared with. One photo at a time, one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numcodecs import BitRound, Quantize, Shuffle, zstd
from numpy.typing import NDArray
from torch import Tensor

from pipeline.features.budgeted import unit_vectors
from pipeline.features.precision import encode
from pipeline.store.arrays import ZSTD_LEVEL

KEPT_BITS = range(4, 11)
DIGITS = (1, 2, 3)
PLAIN = "int8 as stored, no zstd"
_POSITIONS = 256
_PLAIN, _ZSTD, _SHUFFLED = "plain", "zstd", "shuffled"

Levels = Sequence[NDArray[np.generic]]


@dataclass(frozen=True)
class Rounded:
    """What one way of rounding costs."""

    way: str
    bytes_per_value: float
    """After zstd."""
    bytes_per_value_shuffled: float
    """After shuffle and zstd."""
    mean: float
    """Absolute error of correlations, all layers together."""
    largest: float
    encode_per_s: float
    """Photos a second, to the smaller of the two kinds of bytes."""
    decode_per_s: float


def ways() -> Iterator[tuple[str, Callable[[Sequence[Tensor]], Levels]]]:
    """(name, function from exact float32 levels to what is compressed)."""
    yield PLAIN, lambda levels: encode(levels, "int8")
    yield "int8", lambda levels: encode(levels, "int8")
    for dtype in ("float32", "float16"):
        yield dtype, partial(encode, precision=dtype)
        for bits in KEPT_BITS if dtype == "float32" else KEPT_BITS[:-1]:  # float16 has ten
            yield f"{dtype}, BitRound {bits}", _each(BitRound(keepbits=bits), dtype)
        for digits in DIGITS:
            # Computed in float32: in float16 its products overflow.
            quantize = Quantize(digits=digits, dtype="float32", astype=dtype)
            yield f"{dtype}, Quantize {digits}", _each(quantize, "float32")


def _each(rounding: BitRound | Quantize, dtype: str) -> Callable[[Sequence[Tensor]], Levels]:
    def run(levels: Sequence[Tensor]) -> Levels:
        rounded = [np.asarray(rounding.encode(level)) for level in encode(levels, dtype)]
        return [level if level.dtype.kind == "f" else level.view(dtype) for level in rounded]  # BitRound gives its bits

    return run


def measure(photos: Sequence[Sequence[Tensor]]) -> Iterator[Rounded]:
    """Try every way on photos: levels (1, L, H, W, C) float32 each. Correlations are between neighbours in the list."""
    exact = [_correlations(*pair) for pair in pairwise(photos)]
    values = sum(level.numel() for levels in photos for level in levels)
    for name, convert in ways():
        found = [convert(levels) for levels in photos]
        back = [[torch.from_numpy(level).float() for level in levels] for levels in found]
        errors = [
            (ours - theirs).abs()
            for one, pair in zip(exact, pairwise(back), strict=True)
            for ours, theirs in zip(_correlations(*pair), one, strict=True)
        ]
        kinds = (_PLAIN,) * 2 if name == PLAIN else (_ZSTD, _SHUFFLED)
        packed = {kind: [[_pack(x, kind) for x in levels] for levels in found] for kind in kinds}
        sizes = {s: sum(len(data) for levels in every for data in levels) for s, every in packed.items()}
        best = min(kinds, key=lambda kind: sizes[kind])
        shapes = [(level.shape, level.dtype) for level in found[0]]
        yield Rounded(
            way=name,
            bytes_per_value=sizes[kinds[0]] / values,
            bytes_per_value_shuffled=sizes[kinds[1]] / values,
            mean=float(torch.stack([error.mean() for error in errors]).mean()),
            largest=max(float(error.max()) for error in errors),
            encode_per_s=_rate(lambda levels: [_pack(x, best) for x in convert(levels)], photos),  # noqa: B023
            decode_per_s=_rate(
                lambda levels: [_unpack(x, *kind, best) for x, kind in zip(levels, shapes, strict=True)],  # noqa: B023
                packed[best],
            ),
        )


def line(rounded: Rounded) -> str:
    """A row of the table in docs/compression.md."""
    r = rounded
    sizes = f"{r.bytes_per_value:.2f} | {r.bytes_per_value_shuffled:.2f}"
    return f"| {r.way} | {sizes} | {r.mean:.5f} | {r.largest:.3f} | {r.encode_per_s:.0f} | {r.decode_per_s:.0f} |"


def facts(rounded: Sequence[Rounded]) -> dict[str, dict[str, object]]:
    """For a JSON file, by way."""
    return {each.way: asdict(each) for each in rounded}


def _correlations(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """Per level and layer, of evenly spread positions."""
    result = []
    for levels in zip(one, other, strict=True):
        for layer in range(levels[0].shape[1]):
            query, support = (unit_vectors(level[0, layer]) for level in levels)
            step = max(1, len(query) // _POSITIONS)
            result.append((query[::step] @ support[::step].t()).clamp_(min=0))
    return result


def _pack(values: NDArray[np.generic], kind: str) -> bytes:
    if kind == _PLAIN:
        return values.tobytes()
    data = Shuffle(values.dtype.itemsize).encode(values) if kind == _SHUFFLED else values
    return bytes(zstd.compress(np.ascontiguousarray(data), ZSTD_LEVEL, False))


def _unpack(data: bytes, shape: tuple[int, ...], dtype: np.dtype[np.generic], kind: str) -> NDArray[np.generic]:
    if kind == _PLAIN:
        return np.frombuffer(data, dtype).reshape(shape).copy()
    raw = zstd.decompress(data)
    return np.frombuffer(Shuffle(dtype.itemsize).decode(raw) if kind == _SHUFFLED else raw, dtype).reshape(shape)


def _rate(work: Callable[[Any], object], items: Sequence[object]) -> float:
    seconds = []
    for item in items:
        started = time.perf_counter()
        work(item)
        seconds.append(time.perf_counter() - started)
    return 1 / float(np.median(seconds))
