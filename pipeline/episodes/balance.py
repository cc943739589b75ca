"""What the episodes of a manifest are made of, and what a reader of a score on them should know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.episodes.manifest import Manifest


@dataclass(frozen=True)
class Balance:
    """What a manifest is made of."""

    per_class: Mapping[int, int]
    """Class id -> episodes that it is one of the classes of, for every class of the fold."""
    queries: int
    """Different query photos."""
    photos: int
    """Different photos in all."""
    repeating: int
    """Episodes in which a support occurs twice."""

    @property
    def empty(self) -> tuple[int, ...]:
        """Classes without an episode: each counts as IoU 0."""
        return tuple(class_id for class_id, count in self.per_class.items() if not count)


def balance_of(manifest: Manifest) -> Balance:
    """Count classes, photos and repetitions."""
    counts = Counter(class_id for row in manifest.rows for class_id, _ in row.classes)
    return Balance(
        {class_id: counts[class_id] for class_id in sorted(manifest.classes)},
        len({row.query for row in manifest.rows}),
        len({image for row in manifest.rows for image in row.photos}),
        sum(any(len(set(some)) < len(some) for _, some in row.classes) for row in manifest.rows),
    )


def notes(manifest: Manifest) -> tuple[str, ...]:
    """What a reader of a score on these episodes should know."""
    texts, balance = [], balance_of(manifest)
    class_id, most = max(balance.per_class.items(), key=lambda item: item[1])
    with_episodes = len(balance.per_class) - len(balance.empty)
    if with_episodes > 1 and most >= 2 * manifest.ways * len(manifest) / with_episodes:
        texts.append(
            f"{most:,} of the {len(manifest):,} episodes are of class '{manifest.classes[class_id]}' "
            f"({100 * most / len(manifest):.0f} %): FB-IoU mostly tells of it, and the other classes have wider "
            f"intervals. Balanced episodes have the same number of each."
        )
    if balance.empty:
        names = ", ".join(f"'{manifest.classes[c]}'" for c in balance.empty[:5])
        more = f" and {len(balance.empty) - 5} more" if len(balance.empty) > 5 else ""
        texts.append(f"No episode of {names}{more}: a class without one counts as IoU 0 in the mean.")
    if balance.repeating:
        texts.append(
            f"{balance.repeating:,} of the {len(manifest):,} episodes show a support twice or more, as the published "
            f"code allows."
        )
    wanted = round(float(manifest.made.get("absent", 0)) * len(manifest))
    if manifest.absent < 0.8 * wanted:
        texts.append(
            f"{manifest.absent:,} queries show none of their classes, {wanted:,} were asked for: the others are listed "
            f"for too many of the fold's classes."
        )
    return tuple(texts)
