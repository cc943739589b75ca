"""A small store file of our own, for machines without zarr: images one after the other, with an index, mapped to read.

It is laid out as a shard of a feature store is (whole images, an index of places at the end, a checksum for each), so
that reading it costs what reading a store costs but for the kind of checksum: CRC-32 of zlib in the place of crc32c.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_ENTRY = struct.Struct("<QQI")
_PIECE = 1 << 20


def write(path: Path, images: Iterable[Sequence[Tensor]]) -> None:
    """Write images, each a list of levels (L, H, W, C) int8 or uint8, all of the same shapes."""
    entries = []
    with path.open("wb") as file:
        for levels in images:
            start, checksum = file.tell(), 0
            for level in levels:
                values = np.ascontiguousarray(level.cpu().numpy()).reshape(-1).data.cast("B")
                file.write(values)
                checksum = zlib.crc32(values, checksum)
            entries.append(_ENTRY.pack(start, file.tell() - start, checksum))
        file.write(b"".join(entries))
        file.write(struct.pack("<Q", len(entries)))


class Reader:
    """Reads images of such a file.

    Raises:
        ValueError: from `read`: a checksum does not match; from the start: the file is no such file.
    """

    def __init__(self, path: Path, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.int8) -> None:
        self.shapes, self.dtype = [tuple(shape) for shape in shapes], dtype
        with path.open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._data = np.frombuffer(self._mapped, np.uint8)
        (count,) = struct.unpack_from("<Q", self._mapped, len(self._mapped) - 8)
        first = len(self._mapped) - 8 - count * _ENTRY.size
        if first < 0:
            raise ValueError(f"{path} is cut off: it names {count} images in {len(self._mapped)} bytes.")
        self._entries = list(_ENTRY.iter_unpack(self._mapped[first : len(self._mapped) - 8]))
        self.nbytes = sum(int(np.prod(shape)) for shape in self.shapes)

    def __len__(self) -> int:
        return len(self._entries)

    def empty(self, images: int, pinned: bool = False) -> list[Tensor]:
        """Memory for a batch: per level (images, L, H, W, C)."""
        return [torch.empty(images, *shape, dtype=self.dtype, pin_memory=pinned) for shape in self.shapes]

    def read(self, image: int, out: Sequence[Tensor], row: int, checked: bool = True) -> None:
        """Copy an image into row `row` of `out` (from `empty`); its checksum is taken over the copy."""
        start, length, wanted = self._entries[image]
        if length != self.nbytes:
            raise ValueError(f"image {image} has {length} bytes, its levels {self.nbytes}")
        checksum = 0
        for level in out:
            target = level[row].view(torch.uint8).numpy().reshape(-1)
            for first in range(0, len(target), _PIECE):  # summed while it is still in the processor's cache
                piece = target[first : first + _PIECE]
                np.copyto(piece, self._data[start + first : start + first + len(piece)])
                checksum = zlib.crc32(piece.data, checksum) if checked else 0
            start += len(target)
        if checked and checksum != wanted:
            raise ValueError(f"the checksum of image {image} does not match")

    def batch(self, images: Sequence[int], out: Sequence[Tensor], checked: bool = True) -> None:
        """Copy images into the rows of `out`."""
        for row, image in enumerate(images):
            self.read(image, out, row, checked)
