"""N-way episodes: a one-way episode with N - 1 further classes, and queries that show none of the classes.

Everything is a pure function of (index, fold, role, seed, number), as in `pipeline.episodes.stream`. The query, its
class and its supports are the one-way episode's. What the query shows of the further classes is not drawn: it is in its
label map. Classes and supports of fewer ways or shots are the first ones of more.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from hsnet.errors import ConfigError
from pipeline.common.philox import below, philox
from pipeline.datasets.index import DatasetIndex
from pipeline.episodes.stream import Episode, images_by_class, pick_supports, positions_of, require_images


class Ways:
    """Adds classes to one-way episodes.

    Args:
        index, fold, role, seed: those of the one-way episodes.
        ways: N, classes per episode in all; 1 with `absent` 0 gives every episode back as it is.
        shots: K, supports per class.
        absent: share of the episodes, 0 to 1, whose N classes are drawn among those that the query is not listed for.
            An episode whose query is listed for so many classes that fewer than N are left stays as it is.
        repeat_supports: whether a support may occur twice in a class. (The same photo may support two classes.)
        exclude: image numbers never drawn.

    Raises:
        ConfigError: no such fold or role, fewer than `ways` classes with images (with `absent`, fewer than one more),
            or a class with too few images.
    """

    def __init__(
        self,
        index: DatasetIndex,
        fold: int,
        role: str,
        ways: int,
        seed: int,
        *,
        shots: int,
        absent: float = 0.0,
        repeat_supports: bool = True,
        exclude: Collection[int] = frozenset(),
    ) -> None:
        split = index.split(fold, role)
        self._by_class = images_by_class(entry for entry in split.entries if entry[0] not in exclude)
        needed, found = ways + (absent > 0), len(self._by_class)
        if ways < 1 or needed > found:
            names = ", ".join(index.classes[class_id] for class_id in sorted(self._by_class)[:8])
            none = " beside the query's, so that it shows none of them" if absent else ""
            raise ConfigError(
                f"{index.name}, fold {fold}, split '{role}': a {ways}-way episode needs {ways} classes with "
                f"photos{none}, there are {found} ({names}{', ...' if found > 8 else ''}). Choose 1 to "
                f"{max(found - (absent > 0), 1)} ways{' or --absent 0' if absent else ''}. Nothing was computed."
            )
        require_images(index, fold, role, self._by_class, split, 1 if repeat_supports else shots)
        self._position = {
            (class_id, image): position
            for class_id, images in self._by_class.items()
            for position, image in enumerate(images)
        }
        self._listed: dict[int, set[int]] = {}
        for class_id, images in self._by_class.items():
            for image in images:
                self._listed.setdefault(image, set()).add(class_id)
        self._mates = index.mates
        self.ways, self.absent, self.repeat_supports = ways, absent, repeat_supports
        self._key = (index.digest, fold, role, seed)

    def __call__(self, number: int, episode: Episode) -> Episode:
        """The N-way episode of that number, 0 or more, made of the one-way one."""
        chance, *draws = philox(*self._key, "ways", number).random_raw(1 + self.ways).tolist()
        shots, query = len(episode.supports), episode.query
        strangers = sorted(self._by_class.keys() - self._listed.get(query, {episode.class_id}))
        if chance < int(self.absent * 2**64) and len(strangers) >= self.ways:
            (first, supports), *others = (
                (class_id, self._supports(number, class_id, query, shots)) for class_id in self._pick(strangers, draws)
            )
            return Episode(query, supports, first, tuple(others), absent=True)
        chosen = self._pick(sorted(self._by_class.keys() - {episode.class_id}), draws[: self.ways - 1])
        return replace(episode, others=tuple((c, self._supports(number, c, query, shots)) for c in chosen))

    def _pick(self, class_ids: list[int], draws: list[int]) -> list[int]:
        """One class for every draw, none twice."""
        left = list(class_ids)
        return [left.pop(below(draw, len(left))) for draw in draws]

    def _supports(self, number: int, class_id: int, query: int, shots: int) -> tuple[int, ...]:
        draws = philox(*self._key, "supports", number, class_id).random_raw(shots).tolist()
        taken = positions_of(self._position, class_id, self._mates(query))
        return pick_supports(self._by_class[class_id], draws, taken, repeat=self.repeat_supports)
