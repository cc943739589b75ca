"""Columns: arrays of numbers with names, texts and a few facts in one block of bytes, used where it lies.

    uint64 (little-endian)   bytes of the head
    head                     JSON: {"facts": {...}, "columns": {name: [type, first byte, values]}}, spaces at its end
    columns                  values of each, little-endian, each beginning at a multiple of 8 bytes

A file of a block ends with the block's crc32c. It is mapped: processes of a machine share its memory, and what is not
asked for is not decoded.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import google_crc32c
import numpy as np
from numpy.typing import NDArray

_TYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4", "int32": "<i4", "int64": "<i8"}
_ALIGNED = 8
_LARGEST_HEAD = 64 << 20
CRC = 4
"""Bytes of the checksum at the end of a file."""


def pack(facts: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """One block of everything; the same for the same content.

    Args:
        facts: plain JSON values.
        columns: (n,) each, uint8, uint16, uint32, int32 or int64.
    """
    arrays = {name: np.ascontiguousarray(columns[name], _TYPES[columns[name].dtype.name]) for name in sorted(columns)}
    places: dict[str, list[object]] = {}
    start = 0
    for name, values in arrays.items():
        places[name] = [values.dtype.name, start, len(values)]
        start += -(-values.nbytes // _ALIGNED) * _ALIGNED
    head = json.dumps({"facts": dict(facts), "columns": places}, sort_keys=True).encode()
    head += b" " * (-len(head) % _ALIGNED)
    first = 8 + len(head)
    block = np.zeros(first + start, np.uint8)
    block[:8] = np.frombuffer(len(head).to_bytes(8, "little"), np.uint8)
    block[8:first] = np.frombuffer(head, np.uint8)
    for name, values in arrays.items():
        place = first + int(str(places[name][1]))
        block[place : place + values.nbytes] = values.view(np.uint8)
    return block


def unpack(block: NDArray[np.uint8]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Facts and columns of a block; the columns are views of it. Trusts nothing in it.

    Raises:
        ValueError: it is no such block.
    """
    length = int.from_bytes(block[:8].tobytes(), "little")
    if len(block) < 8 or not 0 < length <= min(_LARGEST_HEAD, len(block) - 8) or length % _ALIGNED:
        raise ValueError(f"its head claims {length:,} bytes of {len(block):,}")
    try:
        head = json.loads(block[8 : 8 + length].tobytes())
        facts, places = head["facts"], head["columns"]
        named = [(name, *place) for name, place in places.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its head is damaged: {error!r:.200}") from None
    data = block[8 + length :]
    columns = {}
    for name, *place in named:
        if len(place) != 3 or place[0] not in _TYPES or not all(type(number) is int for number in place[1:]):
            raise ValueError(f"column '{name:.40}' is described by {place!r:.80}")
        dtype, start, count = np.dtype(_TYPES[place[0]]), place[1], place[2]
        end = start + count * dtype.itemsize
        if start < 0 or count < 0 or start % _ALIGNED or end > len(data):
            raise ValueError(f"column '{name:.40}' claims bytes {start} to {end} of {len(data)}")
        columns[name] = data[start:end].view(dtype)
    if not isinstance(facts, dict):
        raise ValueError(f"its facts are a {type(facts).__name__}, must be an object")
    return facts, columns


def column(columns: Mapping[str, NDArray[Any]], name: str, *types: str) -> NDArray[Any]:
    """A column of one of some types. Raises ValueError if there is none."""
    values = columns.get(name)
    if values is None or values.dtype.name not in types:
        found = "not there" if values is None else values.dtype.name
        raise ValueError(f"column '{name:.40}' is {found}, must be {' or '.join(types)}")
    return values


def with_checksum(block: NDArray[np.uint8]) -> bytes:
    """What a file of a block holds."""
    return block.tobytes() + google_crc32c.value(block).to_bytes(CRC, "little")


def map_block(path: Path, most: int) -> NDArray[np.uint8]:
    """The bytes of a block's file, mapped and compared with their checksum.

    Args:
        most: bytes it may have.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is a link, no file, too large, too short, or damaged.
    """
    # Not waiting: opening a pipe would, for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a file")
        if not CRC < status.st_size <= most:
            raise ValueError(f"the file has {status.st_size:,} bytes; {CRC + 1} to {most:,} can be")
        mapped = mmap.mmap(descriptor, status.st_size, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    block = np.frombuffer(mapped, np.uint8, status.st_size - CRC)
    if google_crc32c.value(block) != int.from_bytes(mapped[-CRC:], "little"):
        raise ValueError("its checksum does not match")
    return block


class Texts(Sequence[str]):
    """Texts of a block, each decoded when it is asked for. Equal to a tuple of the same texts.

    Args:
        text: (bytes,) uint8, all of them in UTF-8.
        ends: (n,) int64, byte after the last one of each.

    Raises:
        ValueError: the ends do not fit the text, or it is not UTF-8.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends
        if (int(ends[-1]) if len(ends) else 0) != len(text) or (ends < starts).any():
            raise ValueError(f"{len(ends)} texts do not end where {len(text)} bytes do")
        if len(text) and int(text.max()) >= 0x80:
            text.tobytes().decode("utf-8", "surrogatepass")
            inside = starts[ends > starts]
            if ((text[inside] & 0xC0) == 0x80).any():
                raise ValueError("a text begins within a character")
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        """Texts as columns. Names of files that are not UTF-8 are kept, too."""
        if isinstance(texts, Texts):
            return texts
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, item: int) -> str: ...

    @overload
    def __getitem__(self, item: slice) -> tuple[str, ...]: ...

    def __getitem__(self, item: int | slice) -> str | tuple[str, ...]:
        if isinstance(item, slice):
            return tuple(self[number] for number in range(*item.indices(len(self))))
        number = range(len(self.ends))[item]
        start = int(self.ends[number - 1]) if number else 0
        return self.text[start : int(self.ends[number])].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        text, start = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield text[start:end].decode("utf-8", "surrogatepass")
            start = end

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Texts):
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.text, other.text)
        return isinstance(other, (tuple, list)) and len(self) == len(other) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"<{len(self)} texts>"


class Pairs(Sequence[tuple[int, int]]):
    """Pairs of numbers of a block, made when they are asked for. Equal to a tuple of the same pairs.

    Args:
        first, second: (n,) of any integers.

    Raises:
        ValueError: they are not of one length.
    """

    def __init__(self, first: NDArray[Any], second: NDArray[Any]) -> None:
        if len(first) != len(second):
            raise ValueError(f"{len(first)} first numbers, {len(second)} second ones")
        self.first, self.second = first, second

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]]) -> Pairs:
        """Pairs as columns: int32, or int64 where they must."""
        if isinstance(pairs, Pairs):
            return pairs
        both = np.array(pairs, np.int64).reshape(len(pairs), 2)
        return cls(*(fitting(both[:, side]) for side in (0, 1)))

    def __len__(self) -> int:
        return len(self.first)

    @overload
    def __getitem__(self, item: int) -> tuple[int, int]: ...

    @overload
    def __getitem__(self, item: slice) -> tuple[tuple[int, int], ...]: ...

    def __getitem__(self, item: int | slice) -> tuple[int, int] | tuple[tuple[int, int], ...]:
        if isinstance(item, slice):
            return tuple(zip(self.first[item].tolist(), self.second[item].tolist(), strict=True))
        return int(self.first[item]), int(self.second[item])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self.first.tolist(), self.second.tolist(), strict=True))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Pairs):
            return np.array_equal(self.first, other.first) and np.array_equal(self.second, other.second)
        return isinstance(other, (tuple, list)) and len(self) == len(other) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"<{len(self)} pairs>"


def fitting(values: NDArray[np.int64]) -> NDArray[Any]:
    """As int32 if all of them fit."""
    fits = not len(values) or (int(values.min()) >= -(1 << 31) and int(values.max()) < 1 << 31)
    return values.astype(np.int32 if fits else np.int64)
