"""Photos of scenes: held-out classes are in the background of training photos, which says that they are background."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from pipeline.datasets.index import DatasetIndex

COMMON = 0.5
"""Share of the training photos from which on a user is told what it does."""


@dataclass(frozen=True)
class NovelPhotos:
    """Photos of a fold's training list that show a class which the fold holds out."""

    looked_at: int
    """Photos whose masks were looked at: all listed ones, or evenly spaced ones of very many."""
    listed: int
    """Photos in the training list."""
    shown: int
    """Of those looked at, how many show a held-out class."""
    per_class: dict[str, int]
    """Names of held-out classes -> photos that show them, the most first."""

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.shown / self.looked_at if self.looked_at else 0.0

    def text(self, novel_pixels: str) -> str:
        """What to tell before training; "" if no photo shows such a class.

        Args:
            novel_pixels: what their pixels are in the loss, "background" or "ignore" (`RunConfig.novel_pixels`).
        """
        if not self.shown:
            return ""
        names = ", ".join(f"{name} {count}" for name, count in list(self.per_class.items())[:4])
        more = ", ..." if len(self.per_class) > 4 else ""
        sample = "" if self.looked_at == self.listed else f" looked at, of {self.listed:,}"
        told = (
            f"{self.shown:,} of {self.looked_at:,} training photos{sample} ({100 * self.share:.0f} %) show a class "
            f"that this fold holds out ({names}{more}); its pixels are "
        )
        if novel_pixels == "ignore":
            return f"{told}left out of the loss."
        told += "trained as background, as in the published code."
        if self.share >= COMMON:
            told += " A head that learns so may not find these classes later: --novel-pixels ignore leaves them out."
        return told


def novel_photos(
    index: DatasetIndex,
    fold: int,
    classes_present: Callable[[int], Iterable[int]],
    skipped: Collection[int] = (),
    most: int = 20_000,
) -> NovelPhotos:
    """Count the training photos that show a held-out class.

    Args:
        classes_present: gives the class ids in the full-size mask of an image, by its number.
        skipped: images that are never drawn.
        most: so many photos are looked at, evenly spaced, where more are listed.
    """
    novel = set(index.split(fold, "test").class_ids)
    listed = sorted({image for image, _ in index.split(fold, "trn").entries} - set(skipped))
    chosen = listed if len(listed) <= most else [listed[place * len(listed) // most] for place in range(most)]
    counts: Counter[int] = Counter()
    shown = 0
    for image in chosen:
        there = novel.intersection(classes_present(image))
        counts.update(there)
        shown += bool(there)
    per_class = {index.classes[class_id]: count for class_id, count in sorted(counts.items(), key=lambda c: (-c[1], c))}
    return NovelPhotos(len(chosen), len(listed), shown, per_class)
