"""When not to trust masks, said aloud: what a run saw of its supports, its votes and its answers, as notes.

Nothing here knows the truth. Thresholds were chosen on jobs of five annotated photos whose truth was known; what each
is worth is in docs/predict.md (`benchmarks/trust.py`). Whatever is collected over a run has a bounded size.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from hsnet.errors import ShapeError
from pipeline.bank.tiles import FEW_PIXELS, object_pixels, suggest_tile
from pipeline.datasets.images import resize_label

ALIKE = 0.72
"""Mean IoU of the masks of different photos from which they hardly depend on the photo."""

FEWEST_MASKS = 5
"""Masks below which nothing is said of how alike they are."""

KEPT_MASKS = 256
THUMB = 64
"""Side of the masks that are kept of a photo."""
GRID = 32

LONELY = 0.1
"""Share of the marked pixels with the vote of a single support from which the vote is carried by one."""

AT_ODDS = 0.15
"""Mean IoU of single supports' answers below which the supports disagree."""

STRANGER = 0.5
"""A support that agrees with the others less than this share of what the others do is named."""

AGREEING = 0.3
"""IoU that the others must reach for that."""

LOW, HIGH = 0.3775, 0.6225
"""The band around the cut, probabilities of margins of -0.5 and 0.5."""

UNSURE = 0.35
"""Mean sureness of a run below which it is doubtful."""


@dataclass(frozen=True)
class Note:
    """A reason not to trust a run, or a photo of it."""

    kind: str
    """alike, small, single, disagree, support or unsure."""
    text: str
    """What was seen, with its numbers: a plain sentence."""
    remedy: str
    """What to do about it."""


def sureness(soft: NDArray[np.floating]) -> float:
    """How sure a photo's mask is, 0 to 1: the IoU of the masks cut a little above and a little below one half.

    Of several measures the one whose rank goes best with the IoU that came out; see docs/predict.md. It says where
    to look first, it is no probability. A photo in which nothing comes near the cut is surely without an object: 1.

    Args:
        soft: (H, W) probabilities of the object, of any size.
    """
    below = int(np.count_nonzero(soft > LOW))
    return 1.0 if below == 0 else np.count_nonzero(soft > HIGH) / below


@dataclass
class Alike:
    """How alike the masks of different photos are: a sample of them, chosen by name, in any order of the photos.

    Masks of nothing are left out: they are alike and say nothing.
    """

    _kept: list[tuple[int, str, NDArray[np.float32]]] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)

    def add(self, name: str, mask: NDArray[np.bool_]) -> None:
        """Take a photo's mask (H, W) of any size. A name that was taken before is left out."""
        if not mask.any() or name in self._names:
            return
        # the lowest digests of all names: the same sample, whichever photo comes first
        rank = -int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        if len(self._kept) == KEPT_MASKS and rank < self._kept[0][0]:
            return
        entry = (rank, name, _shares(mask))
        self._names.add(name)
        if len(self._kept) < KEPT_MASKS:
            heapq.heappush(self._kept, entry)
        else:
            self._names.remove(heapq.heappushpop(self._kept, entry)[1])

    @property
    def masks(self) -> int:
        """In the sample."""
        return len(self._kept)

    def likeness(self) -> float | None:
        """Mean IoU of all pairs of the sample, 0 to 1, on a grid of 32 by 32 shares of area; None for too few masks."""
        if self.masks < FEWEST_MASKS:
            return None
        maps = np.stack([shares for _, _, shares in self._kept])
        found = []
        for number in range(1, len(maps)):
            both = np.minimum(maps[number], maps[:number]).sum(1)
            found.append(both / np.maximum(maps[number], maps[:number]).sum(1))
        return float(np.concatenate(found).mean())

    def notes(self) -> Iterator[Note]:
        likeness = self.likeness()
        if likeness is not None and likeness >= ALIKE:
            yield Note(
                "alike",
                f"The masks hardly depend on the photo: those of {self.masks} photos have a mean IoU of "
                f"{likeness:.2f} with each other (from {ALIKE} on this is said).",
                "Look at the overlays. If the object is not always at the same place, the head has learned a place, "
                "not an object: use a head fitted to your supports, or train on photos like yours.",
            )


def _shares(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(GRID * GRID,): how much of each cell is object."""
    values = torch.from_numpy(np.ascontiguousarray(mask)).to(torch.uint8)
    # A large mask is thinned first, so that its copy in float stays small.
    step = max(1, min(mask.shape) // (8 * GRID))
    cells = F.adaptive_avg_pool2d(values[None, ::step, ::step].float(), GRID).flatten()
    if not cells.any():  # thinned to nothing
        cells = F.adaptive_avg_pool2d(values[None].float(), GRID).flatten()
    found: NDArray[np.float32] = cells.numpy()
    return found


@dataclass
class Votes:
    """How many supports stand behind the marked pixels, over all photos of a run."""

    shots: int = 0
    marked: int = 0
    single: int = 0
    by_support: list[int] = field(default_factory=list)
    """Of the pixels with a single vote: whose it was."""

    def add(self, votes: NDArray[np.bool_], mask: NDArray[np.bool_]) -> None:
        """Take one photo: masks (K, h, w) by each support, and the mask (h, w) that was made of them."""
        if votes.ndim != 3 or votes.shape[1:] != mask.shape or (self.shots and self.shots != len(votes)):
            raise ShapeError(
                f"Votes are (K, h, w) with one K in a run and a mask (h, w), got {votes.shape} after {self.shots} "
                f"supports, and {mask.shape}."
            )
        self.shots = len(votes)
        self.by_support = self.by_support or [0] * self.shots
        lonely = mask & (votes.sum(0) == 1)
        self.marked += int(np.count_nonzero(mask))
        self.single += int(np.count_nonzero(lonely))
        for number, vote in enumerate(votes):
            self.by_support[number] += int(np.count_nonzero(lonely & vote))

    @property
    def share(self) -> float:
        """Of the marked pixels, those that only one support voted for; 0 for a single support."""
        return self.single / self.marked if self.marked and self.shots > 1 else 0.0

    def notes(self, names: Sequence[str]) -> Iterator[Note]:
        """`names`: of the supports."""
        if self.shots > 2 and self.share >= LONELY:
            most = int(np.argmax(self.by_support))
            yield Note(
                "single",
                f"The vote is carried by one support: {self.share:.0%} of the marked pixels have the vote of one of "
                f"{self.shots} supports only, most of them that of {names[most]} "
                f"({self.by_support[most] / self.single:.0%}).",
                "Do not trust these masks. Take `--fusion joint` or a head fitted to the supports; a vote relative to "
                "the photo's own largest lets one support decide where no other sees anything.",
            )


@dataclass
class Agreement:
    """How far the answers by single supports agree, over all photos of a run."""

    totals: NDArray[np.float64] | None = None
    """(K, K): sums of the IoU of each pair."""
    counts: NDArray[np.int64] | None = None

    def add(self, masks: NDArray[np.bool_]) -> None:
        """Take one photo: masks (K, h, w) by each support alone. Pairs that both mark nothing are left out."""
        flat = masks.reshape(len(masks), -1).astype(np.float32)
        both = flat @ flat.T
        either = flat.sum(1)[:, None] + flat.sum(1) - both
        if self.totals is None or self.counts is None:
            self.totals, self.counts = np.zeros(both.shape), np.zeros(both.shape, np.int64)
        if self.totals.shape != both.shape:
            raise ShapeError(f"A run has one number of supports, got {len(masks)} after {len(self.totals)}.")
        self.totals += np.divide(both, either, out=np.zeros_like(both), where=either > 0)
        self.counts += either > 0

    def of_supports(self) -> NDArray[np.float64] | None:
        """(K,): each support's mean IoU with the others; None for a single support, or if nothing was marked."""
        if self.totals is None or self.counts is None or len(self.totals) < 2:
            return None
        others = ~np.eye(len(self.totals), dtype=bool)
        counts = (self.counts * others).sum(1)
        return (self.totals * others).sum(1) / np.maximum(counts, 1) if counts.any() else None

    def mean(self) -> float | None:
        """Mean IoU of all pairs, 0 to 1."""
        each = self.of_supports()
        return None if each is None else float(each.mean())

    def notes(self, names: Sequence[str]) -> Iterator[Note]:
        """`names`: of the supports."""
        each = self.of_supports()
        if each is None:
            return
        if each.mean() < AT_ODDS:
            yield Note(
                "disagree",
                f"The supports disagree: what they mark one by one has a mean IoU of {each.mean():.2f} (below "
                f"{AT_ODDS} this is said).",
                "Annotate more photos, and some that look like those to be done. Check that all masks mean the same "
                "thing, a part or the whole. A larger image size or another backbone may help.",
            )
        if len(each) < 3:
            return
        worst = int(each.argmin())
        rest = float(np.median(np.delete(each, worst)))
        if rest >= AGREEING and each[worst] < STRANGER * rest:
            yield Note(
                "support",
                f"The support {names[worst]} is at odds with the others: what it marks has a mean IoU of "
                f"{each[worst]:.2f} with theirs, half of the others have {rest:.2f} or more.",
                "Look at its mask: is it of the same object, complete, and of the right photo? If it is right, "
                "annotate another photo like it; if not, correct it or leave it out.",
            )


@dataclass
class Sureness:
    """Mean sureness of a run's photos."""

    photos: int = 0
    total: float = 0.0

    def add(self, value: float) -> None:
        """Take one photo's `sureness`."""
        self.photos += 1
        self.total += value

    def notes(self) -> Iterator[Note]:
        if self.photos and self.total / self.photos < UNSURE:
            yield Note(
                "unsure",
                f"The masks are unsure: cut a little higher and a little lower they have a mean IoU of "
                f"{self.total / self.photos:.2f} over {self.photos} photos (below {UNSURE} this is said).",
                "Expect them to be poor. Annotate those that are least sure, or take a better backbone or a larger "
                "image size.",
            )


def notes_on_supports(names: Sequence[str], masks: Sequence[NDArray[np.bool_]], image_size: int) -> list[Note]:
    """Notes on annotated photos alone: objects that a network hardly sees, or does not see at all.

    Args:
        names: of the supports.
        masks: (H, W) of each, at its photo's own size.
        image_size: side of the square that photos are squashed to.
    """
    pixels = {name: object_pixels(mask, image_size) for name, mask in zip(names, masks, strict=True) if mask.any()}
    small = {name: count for name, count in pixels.items() if count < FEW_PIXELS}
    if not small:
        return []
    gone = [name for name, count in small.items() if count == 0]
    said = ", ".join(f"{name} ({count})" for name, count in sorted(small.items(), key=lambda item: item[1])[:5])
    text = (
        f"At {image_size} x {image_size} pixels the object is nearly gone: {len(small)} of {len(pixels)} supports keep "
        f"fewer than {FEW_PIXELS} pixels of it: {said}{', ...' if len(small) > 5 else ''}."
    )
    if gone:
        text += f" {len(gone)} keep none and are of no use."
    tile = suggest_tile(masks, image_size)
    other = "photos that show the object larger" if tile is None else f"tiles of {tile} pixels (`--tile {tile}`)"
    return [Note("small", text, f"Take a larger image size, or {other}.")]


@dataclass(frozen=True, eq=False)
class Seen:
    """What is kept of one class's answer to one photo until the end of a run: little."""

    thumb: NDArray[np.bool_]
    """(64, 64): the mask."""
    votes: NDArray[np.bool_] | None = None
    """(K, h, w): what each support marks, of a head that votes."""

    @classmethod
    def of(cls, mask: NDArray[np.bool_], votes: NDArray[np.bool_] | None) -> Seen:
        """From a mask (H, W) of any size."""
        thumb = resize_label(np.ascontiguousarray(mask), (THUMB, THUMB))
        return cls(thumb.astype(bool), votes)


class Watch:
    """Notes on one class, collected over a run.

    Args:
        supports: names of the annotated photos that show it.
    """

    def __init__(self, supports: Sequence[str]) -> None:
        self.supports = supports
        self.alike, self.votes, self.agreement, self.sureness = Alike(), Votes(), Agreement(), Sureness()

    def add(self, photo: str, seen: Seen, sure: float) -> None:
        """Take one photo."""
        self.alike.add(photo, seen.thumb)
        self.sureness.add(sure)
        if seen.votes is not None and len(seen.votes) == len(self.supports):
            size = (seen.votes.shape[1], seen.votes.shape[2])
            self.votes.add(seen.votes, resize_label(seen.thumb, size).astype(bool))
            self.agreement.add(seen.votes)

    def notes(self) -> list[Note]:
        """The gravest first."""
        found = (self.alike.notes(), self.votes.notes(self.supports), self.agreement.notes(self.supports))
        return [note for some in (*found, self.sureness.notes()) for note in some]
