"""Run lengths of masks row by row, and Label Studio's packed form of them.

Label Studio packs the bytes of an RGBA picture, row by row, into bits, high bits first:

    32 bits   number of values, H x W x 4
     5 bits   bits per value, less 1 (7: bytes)
    4 x 4     bits of each of four lengths, less 1 (3, 4, 8 and 16 bits)
    then, until all values are there:
     1 bit    1: one value, repeated; 0: values one after the other
     2 bits   which of the four lengths follows
     n bits   how many values, less 1
     8 bits   the value, or so many values

and pads the last byte. The fourth channel is the mask. This is the "rle-pack" of the @thi.ng/rle-pack library.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.annotations.item import Mask

_LENGTH_BITS = np.array([3, 4, 8, 16])
_CHANNELS = 4
_HEAD = 32 + 5 + 4 * 4


def row_runs(mask: Mask) -> NDArray[np.int64]:
    """Run lengths of a mask (h, w), row by row, background first (0 if it begins with the object); sum h x w."""
    flat = mask.ravel()
    ends = np.flatnonzero(np.concatenate([flat[1:] != flat[:-1], [True]])) + 1 if flat.size else np.zeros(0, np.int64)
    runs = np.diff(ends, prepend=0)
    return np.concatenate([[0], runs]) if flat.size and flat[0] else runs


def placed_runs(mask: Mask, left: int, top: int, height: int, width: int) -> NDArray[np.int64]:
    """Run lengths of a photo (height, width), row by row, in which a mask (h, w) lies at (left, top), all else
    background. Only the rows of the mask are looked at."""
    rows = np.zeros((mask.shape[0], width), bool)
    rows[:, left : left + mask.shape[1]] = mask
    runs = row_runs(rows)
    before, after = top * width, (height - top - mask.shape[0]) * width
    if not len(runs):
        return np.array([height * width])
    runs[0] += before
    if len(runs) % 2:  # it ends with background
        runs[-1] += after
        return runs
    return np.append(runs, after) if after else runs


def pack(runs: NDArray[np.int64]) -> list[int]:
    """Run lengths of a photo, row by row, in Label Studio's form: all four channels 255 on the object; bytes as whole
    numbers."""
    number = int(runs.sum()) * _CHANNELS
    runs = runs * _CHANNELS
    values = np.where(np.arange(len(runs)) % 2, 255, 0)
    # A run longer than 2^16 values takes several records.
    longest = 1 << int(_LENGTH_BITS[-1])
    pieces = -(-runs // longest)
    which = np.repeat(np.arange(len(runs)), pieces)
    last = np.cumsum(pieces)[which] - 1 == np.arange(len(which))
    lengths = np.where(last, runs[which] - (pieces[which] - 1) * longest, longest)
    size = np.searchsorted(1 << _LENGTH_BITS, lengths)
    bits = _LENGTH_BITS[size]
    codes = ((((1 << 2) | size) << bits) | (lengths - 1)) << 8 | values[which]
    head = int(f"{number:032b}" + f"{7:05b}" + "".join(f"{n - 1:04b}" for n in _LENGTH_BITS), 2)
    widths = np.concatenate([[_HEAD], 3 + bits + 8])
    codes = np.concatenate([[head], codes])
    ends = np.cumsum(widths)
    packed = np.zeros(int(ends[-1]), np.uint8)
    for place in range(_HEAD):  # the bit so far from the end of each record
        long = widths > place
        packed[ends[long] - 1 - place] = (codes[long] >> place) & 1
    return np.packbits(packed).tolist()


def unpack(data: Sequence[int], height: int, width: int) -> Mask:
    """The mask (H, W) of Label Studio's form: True where the fourth channel is at least 128.

    Raises:
        ValueError: the numbers are no bytes, are cut off, or hold another number of values than H x W x 4.
    """
    stream = bytes(data)
    number, start = int.from_bytes(stream[:4], "big"), 32
    if len(stream) * 8 < _HEAD or number != height * width * _CHANNELS:
        raise ValueError(f"{number:,} values, where {width} x {height} pixels have {height * width * _CHANNELS:,}")

    def read(bits: int) -> int:
        nonlocal start
        first, end = start // 8, start + bits
        if end > len(stream) * 8:
            raise ValueError("it ends in the middle")
        window = int.from_bytes(stream[first : (end + 7) // 8], "big")
        start = end
        return window >> (-end % 8) & ((1 << bits) - 1)

    if read(5) != 7:
        raise ValueError("its values are no bytes")
    lengths = [read(4) + 1 for _ in range(4)]
    values = np.empty(number, np.uint8)
    done = 0
    while done < number:
        repeated = read(1)
        count = read(lengths[read(2)]) + 1
        if done + count > number:
            raise ValueError(f"more values than the {number:,} that it says")
        if repeated:
            values[done : done + count] = read(8)
        else:
            values[done : done + count] = list(read(8 * count).to_bytes(count, "big"))
        done += count
    return values.reshape(height, width, _CHANNELS)[..., 3] >= 128
