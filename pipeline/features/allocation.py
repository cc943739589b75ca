"""How many levels every direction of a coded feature gets: reverse water-filling, in whole bytes.

A byte of a position codes a run of directions, each with its own number of levels; their product is at most 256. So
a direction may get a fraction of a bit, and every position of a layer takes the same number of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import ConfigError

LEVELS = 256
"""Most levels of one direction, and of all directions of a byte together."""

POSITION_WEIGHT = 0.5
"""Exponent of a layer's number of positions in the price of a bit. 0 counts the error of every correlation alike, and
1 the mean error of every layer; measured (docs/compression.md)."""

_STEPS = 48

# What is left of a normal variable's variance by the best quantiser of k levels; beyond 3 within 3 % (Max 1960).
_LEFT = np.concatenate([[1.0, 0.3634, 0.1902], 2.7207 / (np.arange(4, LEVELS + 1) + 0.88) ** 2])
_BITS = np.log2(np.arange(1, LEVELS + 1))

Run = tuple[int, ...]
"""Levels of the directions of one byte, in order of the directions."""


def allocate(costs: Sequence[NDArray[np.float64]], positions: Sequence[int], nbytes: int) -> list[list[Run]]:
    """Divide the bytes of an image over layers, and those of a position over the layer's directions.

    Args:
        costs: per layer what losing each direction costs, largest first: error is assumed to be a fixed share of it
            that depends on the number of levels alone.
        positions: of each layer, per image.
        nbytes: for all of them.

    Returns:
        Per layer the runs of a position, one per byte. Directions beyond the last run are left out.

    Raises:
        ConfigError: too little for one byte per position and layer, or more than 256 levels for every direction.
    """
    least, most = sum(positions), sum(p * len(cost) for p, cost in zip(positions, costs, strict=True))
    if nbytes < least:
        raise ConfigError(
            f"{nbytes:,} bytes per image are too few: one byte per position and layer takes {least:,}. Give more."
        )
    if nbytes >= most:
        raise ConfigError(
            f"{nbytes:,} bytes per image hold these features as int8, which takes {most:,}: use --precision int8."
        )
    prices = [float(count) ** POSITION_WEIGHT for count in positions]

    def divide(price: float) -> list[list[int]]:
        return [_starts(cost, price * each) for cost, each in zip(costs, prices, strict=True)]

    low, high = 1e-14, max(float(cost[0]) for cost in costs)
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        taken = sum(p * (len(starts) - 1) for p, starts in zip(positions, divide(middle), strict=True))
        low, high = (middle, high) if taken > nbytes else (low, middle)
    return [
        [share(cost[first:last]) for first, last in pairwise(starts)]
        for cost, starts in zip(costs, divide(high), strict=True)
    ]


def _starts(cost: NDArray[np.float64], price: float) -> list[int]:
    """Starts of a layer's runs at a price per bit, and the end of the last one.

    Directions join a byte until the bits that they are worth fill it.
    """
    worth = _BITS[np.argmin(cost[:, None] * _LEFT + price * _BITS, axis=1)]
    count = max(1, int(np.count_nonzero(worth)))  # a layer always has one byte
    starts, filled = [0], 0.0
    for direction, bits in enumerate(worth[:count].tolist()):
        if filled + bits > _BITS[-1] + 1e-9:
            starts.append(direction)
            filled = 0.0
        filled += bits
    return [*starts, count]


def share(cost: NDArray[np.float64], limit: int = LEVELS) -> Run:
    """Levels of directions that share a byte: the one that gains most per bit gets the next level, while they fit.

    >>> share(np.array([1.0, 1.0]))
    (16, 16)
    >>> share(np.array([1.0] * 5))
    (3, 3, 3, 3, 3)
    """
    if len(cost) == 1:
        return (limit,)
    levels, product = [1] * len(cost), 1
    while True:
        gains = [
            (float(cost[i] * (_LEFT[k - 1] - _LEFT[k]) / (_BITS[k] - _BITS[k - 1])), -i)
            for i, k in enumerate(levels)
            if product // k * (k + 1) <= limit
        ]
        if not gains:
            return tuple(levels)
        chosen = -max(gains)[1]
        product = product // levels[chosen] * (levels[chosen] + 1)
        levels[chosen] += 1
