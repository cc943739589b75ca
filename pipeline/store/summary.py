"""The seal of a complete store: what all its markers say, in one file of columns that is mapped.

`_done/summary` is written by the store's writer when the last shard is there, and removed before anything is written or
deleted again: where it is, the store is complete and nobody needs to read markers. What of it a shard or an image needs
is looked up where it lies (`pipeline.common.columns`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from hsnet.errors import StoreError
from pipeline.common.columns import CRC, Texts, column, map_block, pack, unpack, with_checksum
from pipeline.common.files import whole
from pipeline.store.markers import LARGEST_PHOTO, ShardFacts, StoredFile, summary_file

LARGEST_SUMMARY = 4 << 30
"""Bytes: an image takes some 30."""
_FORMAT = 1


class SummaryDamaged(StoreError):
    """The summary of a store cannot be used; its markers may well be whole."""


class Summary:
    """Facts of all shards of a store.

    Args:
        block: as `summarise` makes it.

    Raises:
        ValueError: its columns contradict each other.
    """

    def __init__(self, block: NDArray[np.uint8]) -> None:
        facts, columns = unpack(block)
        try:
            self.store, self.digest = str(facts["store"]), str(facts["dataset"])
            self.shards, self.shard_images = int(facts["shards"]), int(facts["shard_images"])
            self.arrays = tuple(map(str, facts["arrays"]))
            self.states = {str(digest): checksum for digest, checksum in facts["states"].items()}
            self._heights, self._widths = (column(columns, name, "int32") for name in ("height", "width"))
            self._class_ends = column(columns, "classes.ends", "int64")
            self._classes = column(columns, "classes", "int32")
            self._skipped = column(columns, "skipped", "int64")
            self._reasons = Texts(column(columns, "reasons", "uint8"), column(columns, "reasons.ends", "int64"))
            self._files = [
                (column(columns, f"{name}.bytes", "int64"), column(columns, f"{name}.crc32", "uint32"))
                for name in self.arrays
            ]
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"it lacks {error!r:.100}") from None
        if facts.get("format") != _FORMAT:
            raise ValueError(f"its format is {facts.get('format')!r:.40}, {_FORMAT} is read")
        rows = len(self._heights)
        images = (self._widths, self._class_ends)
        shards = [column for pair in self._files for column in pair]
        if (
            not (self.shards - 1) * self.shard_images < rows <= self.shards * self.shard_images
            or {len(column) for column in images} != {rows}
            or {len(column) for column in shards} != {self.shards}
            or len(self._skipped) != len(self._reasons)
        ):
            raise ValueError("its columns are not of one length")
        if len(self._skipped) and not (int(self._skipped.min()) >= 0 and int(self._skipped.max()) < rows):
            raise ValueError("it skips images that are not there")
        pixels = self._heights.astype(np.int64) * self._widths
        if int(self._heights.min()) < 0 or int(self._widths.min()) < 0 or int(pixels.max()) > LARGEST_PHOTO:
            raise ValueError("a photo has an impossible size")
        ends = self._class_ends
        if (np.diff(ends) < 0).any() or int(ends[0]) < 0 or int(ends[-1]) != len(self._classes):
            raise ValueError("its lists of classes do not end where they must")

    @cached_property
    def skipped(self) -> dict[int, str]:
        """Row -> why its image could not be read."""
        return dict(zip(self._skipped.tolist(), self._reasons, strict=True))

    def size(self, row: int) -> tuple[int, int]:
        """Original (height, width) of the photo in a row, pixels."""
        return int(self._heights[row]), int(self._widths[row])

    def classes(self, row: int) -> tuple[int, ...]:
        """Class ids in the full-size mask of the photo in a row."""
        start = int(self._class_ends[row - 1]) if row else 0
        return tuple(self._classes[start : int(self._class_ends[row])].tolist())

    def files(self, number: int) -> dict[str, tuple[int, str]]:
        """Array -> (bytes, CRC-32 as 8 hex digits) of its file of a shard."""
        return {
            name: (int(sizes[number]), f"{int(sums[number]):08x}")
            for name, (sizes, sums) in zip(self.arrays, self._files, strict=True)
        }

    def stored(self, number: int, arrays: Iterable[str]) -> list[StoredFile]:
        """Files of a shard."""
        files = self.files(number)
        return [StoredFile(name, number, *files[name]) for name in arrays]

    def facts(self, number: int, images: tuple[str, ...]) -> ShardFacts:
        """What the marker of a shard says; `images` are the ids of its images."""
        rows = range(number * self.shard_images, number * self.shard_images + len(images))
        return ShardFacts(
            number=number,
            store=self.store,
            images=images,
            sizes=tuple(map(self.size, rows)),
            classes=tuple(map(self.classes, rows)),
            skipped={image: self.skipped[row] for row, image in zip(rows, images, strict=True) if row in self.skipped},
            files=self.files(number),
        )

    def nbytes(self, shards: int) -> int:
        """Bytes of the array files of the first `shards` shards."""
        return sum(int(sizes[:shards].sum()) for sizes, _ in self._files)


def summarise(
    facts: Iterable[ShardFacts],
    store: str,
    digest: str,
    shard_images: int,
    arrays: tuple[str, ...],
    states: Mapping[str, int],
) -> NDArray[np.uint8]:
    """One block of what the markers of all shards say, in the order of the shards.

    Args:
        store, digest: identity of the store; digest of the data set that it is complete for.
        states: digest -> `pipeline.store.attributes.state_checksum` of every state: markers name the images of their
            rows, and so does this.
    """
    sizes: list[tuple[int, int]] = []
    ends: list[int] = []
    classes: list[int] = []
    skipped: dict[int, str] = {}
    files: list[list[tuple[int, str]]] = []
    for shard in facts:
        gap = len(files) * shard_images - len(sizes)  # a growth begins a new shard
        sizes += [(0, 0)] * gap
        ends += [len(classes)] * gap
        for row, image in enumerate(shard.images, len(sizes)):
            if image in shard.skipped:
                skipped[row] = shard.skipped[image]
        sizes += shard.sizes
        for present in shard.classes:
            classes += present
            ends.append(len(classes))
        files.append([shard.files[name] for name in arrays])
    reasons = Texts.of(list(skipped.values()))
    columns: dict[str, NDArray[Any]] = {
        "height": np.array([height for height, _ in sizes], np.int32),
        "width": np.array([width for _, width in sizes], np.int32),
        "classes": np.array(classes, np.int32),
        "classes.ends": np.array(ends, np.int64),
        "skipped": np.array(list(skipped), np.int64),
        "reasons": reasons.text,
        "reasons.ends": reasons.ends,
    }
    for place, name in enumerate(arrays):
        columns[f"{name}.bytes"] = np.array([shard[place][0] for shard in files], np.int64)
        columns[f"{name}.crc32"] = np.array([int(shard[place][1], 16) for shard in files], np.uint32)
    about = {
        "format": _FORMAT,
        "store": store,
        "dataset": digest,
        "shards": len(files),
        "shard_images": shard_images,
        "arrays": list(arrays),
        "states": dict(states),
    }
    return pack(about, columns)


def write_summary(path: Path, block: NDArray[np.uint8]) -> None:
    """Write the file of a summary, whole or not at all. Raises OSError."""
    with whole(path) as partial:
        partial.write_bytes(with_checksum(block))


def summary_of(data: bytes) -> Summary | None:
    """The summary in the bytes of a file; None if they are none."""
    block = np.frombuffer(data, np.uint8)
    try:
        if google_crc32c.value(block[:-CRC]) != int.from_bytes(data[-CRC:], "little"):
            return None
        return Summary(block[:-CRC])
    except ValueError:
        return None


def read_summary(root: Path, store: str, digests: Iterable[str], arrays: tuple[str, ...]) -> Summary | None:
    """The summary of the store at `root`, None if it has none.

    Args:
        store: identity of the store.
        digests: of the states of its data set that the summary may be of.

    Raises:
        SummaryDamaged: it is damaged, or one of another store.
    """
    path = summary_file(root)
    try:
        summary = Summary(map_block(path, LARGEST_SUMMARY))
        if (summary.store, summary.arrays) != (store, arrays) or summary.digest not in set(digests):
            raise ValueError(
                f"it is of the store {summary.store:.23} with data set {summary.digest:.23} and arrays "
                f"{', '.join(summary.arrays):.80}; this one is {store:.23}"
            )
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise SummaryDamaged(
            f"{path}, the summary of the store's markers, cannot be used: {error}. Nothing of it was used; markers and "
            f"shards may well be whole. `hsnet store repair` with the options of the `hsnet extract` that made the "
            f"store compares both and writes the summary anew. (Or delete this one file: the store is then read by its "
            f"markers.)"
        ) from error
    return summary
