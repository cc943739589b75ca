"""What a store's attributes say, and the states of its data set: as it was first, and after each growth.

A state is one index (classes, images, lists) and the place of each of its images. Rows are only ever added: the
images of a growth begin at the next shard, in the order of their data set, and keep their rows for good. A store that
never grew has one state, whose image i is row i.

The store is read in its current state. States before it can still be opened by their digest; one after it is a growth
whose images are not all extracted. `pipeline.store.growth` adds states.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.features.recipe import Recipe


@dataclass(frozen=True)
class State:
    """A data set that the store holds, or is to hold."""

    digest: str
    """Of its index."""
    images: int
    number: int = 0
    """Of its arrays `index-<number>` and `row-<number>`; 0 is the first state: `index`, and image i is row i."""

    @property
    def index(self) -> str:
        """Name of the array that holds the index."""
        return f"index-{self.number}" if self.number else "index"

    @property
    def row(self) -> str:
        """Name of the array that holds the rows; empty if image i is row i."""
        return f"row-{self.number}" if self.number else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = {"index": self.index, "row": self.row} if self.number else {}
        return {"digest": self.digest, "images": self.images, **names}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> State:
        """What `to_dict` gave. Raises KeyError, TypeError, ValueError for anything else."""
        index = values.get("index", "index")
        if not re.fullmatch(r"index(-[1-9][0-9]{0,8})?", index):
            raise ValueError(f"no array of an index can be called {index!r}")
        state = cls(values["digest"], values["images"], int(index.partition("-")[2] or 0))
        if not (isinstance(state.digest, str) and type(state.images) is int and 1 <= state.images < 1 << 40):
            raise ValueError(f"a data set of {state.images!r} images with digest {state.digest!r}")
        if state.to_dict() != values:
            raise ValueError(f"a state of the data set is {values!r}")
        return state


@dataclass(frozen=True)
class StoreFacts:
    """The attributes of a store, each checked.

    Raises:
        ValueError: they contradict each other.
    """

    recipe: Recipe
    shard_images: int
    states: tuple[State, ...]
    """In the order in which they were added; the number of images never falls."""
    current: int = 0
    """Place among the states of the one that readers are given."""

    def __post_init__(self) -> None:
        if type(self.shard_images) is not int or not 1 <= self.shard_images <= 4096:
            raise ValueError(f"{self.shard_images!r} images per shard")
        if len({state.digest for state in self.states}) < len(self.states):
            raise ValueError("the same data set twice")
        numbers = [state.number for state in self.states]
        if numbers[0] != 0 or len(set(numbers)) < len(numbers) or min(self.counts) < 0:
            raise ValueError(f"states of the data set that cannot follow each other: {numbers}, {self.counts}")

    @property
    def identity(self) -> str:
        """Of the store, for its markers: the recipe and the first data set, so that growing leaves them valid."""
        text = f"{json.dumps(self.recipe.identity())}\n{self.states[0].digest}"
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of images that each state added."""
        images = [0, *(state.images for state in self.states)]
        return tuple(after - before for before, after in pairwise(images))

    def find(self, digest: str) -> int | None:
        """Place of a data set among the states."""
        return next((k for k, state in enumerate(self.states) if state.digest == digest), None)

    def rows(self, place: int) -> int:
        """Rows of the arrays in a state."""
        return max(part.stop for part in row_ranges(self.counts[: place + 1], self.shard_images))


class Placement:
    """Where the images of a state are: row of an image, images of a shard.

    Args:
        counts: images that each state added.
        rows: (images,) row of each; None if image i is row i.

    Raises:
        ValueError: the rows are not those that the counts give.
    """

    def __init__(self, counts: Sequence[int], shard_images: int, rows: NDArray[np.int64] | None = None) -> None:
        self.images = sum(counts)
        self.shards = sum(-(-count // shard_images) for count in counts)
        self._shard_images = shard_images
        self._rows: Sequence[int] = range(self.images)
        self._members: list[tuple[int, ...]] | None = None
        if rows is None:
            return
        wanted = [np.arange(part.start, part.stop) for part in row_ranges(counts, shard_images)]
        order = np.argsort(rows, kind="stable")
        if rows.shape != (self.images,) or not np.array_equal(rows[order], np.concatenate(wanted)):
            raise ValueError(f"the rows of {len(rows)} images do not fit growths of {list(counts)} images")
        self._rows = rows.tolist()
        self._members = [
            tuple(part.tolist())
            for added in np.split(order, np.cumsum(counts)[:-1])
            for part in np.split(added, range(shard_images, len(added), shard_images))
            if len(part)
        ]

    def row(self, image: int) -> int:
        """Row of an image, in every array."""
        return self._rows[image]

    def images_in(self, shard: int) -> Sequence[int]:
        """Image numbers of a shard, in the order of its rows."""
        if self._members is not None:
            return self._members[shard]
        return range(shard * self._shard_images, min((shard + 1) * self._shard_images, self.images))


def row_ranges(counts: Sequence[int], shard_images: int) -> list[range]:
    """Rows of the images of each growth. Shards are whole files: a growth begins a new one.

    >>> row_ranges([21, 0, 5], 8)
    [range(0, 21), range(0, 0), range(24, 29)]
    """
    ranges, start = [], 0
    for count in counts:
        ranges.append(range(start, start + count) if count else range(0))
        start += -(-count // shard_images) * shard_images
    return ranges
