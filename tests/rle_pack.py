"""Label Studio's packed run lengths read and written bit by bit, as their format is described: slow, and by the letter.

Compared with label-studio-converter 0.0.59 on masks of many sizes, both ways. It is no dependency of the tests: it
installs a top-level package called `tests`, which hides this folder from processes that tests start.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LENGTHS = (3, 4, 8, 16)


def decode_rle(data: Sequence[int]) -> NDArray[np.uint8]:
    """The values, (n,)."""
    bits = "".join(f"{byte:08b}" for byte in data)
    place = 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    number, word = read(32), read(5) + 1
    lengths = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < number:
        repeated = read(1)
        count = read(lengths[read(2)]) + 1
        values += [read(word)] * count if repeated else [read(word) for _ in range(count)]
    assert len(values) == number
    return np.array(values, np.uint8)


def encode_rle(values: NDArray[np.uint8]) -> list[int]:
    """The same values packed: runs of three and more as one value, all else one after the other."""
    bits = f"{len(values):032b}" + f"{7:05b}" + "".join(f"{length - 1:04b}" for length in LENGTHS)

    def record(repeated: int, some: Sequence[int], count: int) -> str:
        size = next(number for number, length in enumerate(LENGTHS) if count <= 1 << length)
        head = f"{repeated}{size:02b}{count - 1:0{LENGTHS[size]}b}"
        return head + "".join(f"{value:08b}" for value in some)

    loose: list[int] = []
    start = 0
    while start < len(values):
        end = start
        while end < len(values) and values[end] == values[start] and end - start < 1 << LENGTHS[-1]:
            end += 1
        if end - start < 3 and len(loose) < (1 << LENGTHS[-1]) - 3:
            loose += [int(value) for value in values[start:end]]
        else:
            bits += record(0, loose, len(loose)) if loose else ""
            loose = []
            bits += record(1, [int(values[start])], end - start)
        start = end
    bits += record(0, loose, len(loose)) if loose else ""
    bits += "0" * (-len(bits) % 8)
    return [int(bits[first : first + 8], 2) for first in range(0, len(bits), 8)]


def mask2rle(mask: NDArray[np.uint8]) -> list[int]:
    """A mask (H, W) of 0 and 255 in all four channels."""
    return encode_rle(np.repeat(mask.ravel(), 4))
