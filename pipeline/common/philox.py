"""Random numbers as a pure function of a key: the same on every machine, in any order, for any numpy.

Only Philox's raw counter output is used. numpy promises to keep that stream; the methods of its `Generator`
may change between versions.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np


def philox(*key: object) -> np.random.Philox:
    """A generator of raw 64-bit numbers for a key of strings, numbers or anything else JSON can hold."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def below(draw: int, limit: int) -> int:
    """A raw 64-bit number as one in [0, limit); the bias is below limit / 2**64."""
    return (draw * limit) >> 64


class Draws:
    """One sequence of draws for a key, read in order."""

    def __init__(self, *key: object) -> None:
        self._philox = philox(*key)

    def below(self, limit: int) -> int:
        """A whole number in [0, limit)."""
        return below(int(self._philox.random_raw()), limit)

    def between(self, low: float, high: float) -> float:
        """A real number in [low, high)."""
        return low + (high - low) * (int(self._philox.random_raw()) >> 11) * 2.0**-53

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.between(0.0, 1.0) < probability

    def array(self, *shape: int) -> np.ndarray:
        """Real numbers in [0, 1), float64."""
        count = int(np.prod(shape))
        return ((self._philox.random_raw(count) >> np.uint64(11)) * 2.0**-53).reshape(shape)
