"""Episodes: which images are query and support, as a pure function of (index, fold, role, seed, number).

No image is opened here and nothing is kept between two episodes, so any worker can make any episode, in any
order, on any machine. (The published code's own sequence exists in order only: `pipeline.episodes.published`.)
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hsnet.errors import ConfigError
from pipeline.common.philox import below, philox
from pipeline.datasets.index import DatasetIndex, Split


@dataclass(frozen=True, slots=True)
class Episode:
    """One task: find what the supports show in the query. Image numbers point into `DatasetIndex.images`."""

    query: int
    supports: tuple[int, ...]
    class_id: int
    others: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Of an N-way episode: (class id, its supports) of the N - 1 further classes; see `pipeline.episodes.ways`."""
    absent: bool = False
    """The query is listed for none of the episode's classes: it was drawn to show none of them."""

    @property
    def classes(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(class id, its supports) of all N classes; that of `class_id` first."""
        return ((self.class_id, self.supports), *self.others)

    @property
    def photos(self) -> tuple[int, ...]:
        """Every photo's number, the query's first; a photo may come several times."""
        return (self.query, *(image for _, supports in self.classes for image in supports))


class EpisodeStream:
    """An endless sequence of episodes that can be read at any position.

    Episode `i` depends on the index digest, fold, role, seed and `i` (and on which images are left out), not on
    what was read before. The first supports of a K-shot episode are those of the episode with fewer shots: same
    query, same class.

    Queries follow `index.query_order`. "list" (PASCAL, FSS, own data): every pass over the split, a cycle of
    `epoch_length` episodes, uses each listed (image, class) once, in an order of its own. "class" (COCO): a class
    uniformly, then one of its images uniformly, as the published code does.

    Args:
        index: the data set's index.
        fold: which classes are held out.
        role: "trn", "val" or "test".
        shots: supports per episode, at least 1.
        seed: any integer; another seed gives another sequence.
        repeat_supports: whether a support may occur twice in an episode, as in the published code.
        drop_novel: gives the classes visible in an image, by its number (as stored from the full-size masks).
            When given, listed images that show a class of the fold's test split are left out. The published code
            keeps them, with the novel class as background; leaving them out is worth about 3 points (BAM#45).
        exclude: image numbers never drawn, such as the unreadable ones.
        balance: "listed" as above; "class": whatever the data set, every class of the split comes once in each run of
            as many episodes as there are classes, and each of its images once before one comes again.

    Raises:
        ConfigError: no such fold, role or balance; nothing is listed; a class has fewer than 2 images, or `shots` + 1
            where supports must differ.
    """

    def __init__(
        self,
        index: DatasetIndex,
        fold: int,
        role: str,
        shots: int,
        seed: int,
        *,
        repeat_supports: bool = True,
        drop_novel: Callable[[int], Iterable[int]] | None = None,
        exclude: Collection[int] = frozenset(),
        balance: str = "listed",
    ) -> None:
        if shots < 1:
            raise ConfigError(f"An episode needs at least 1 support, got shots = {shots}.")
        if balance not in ("listed", "class"):
            raise ConfigError(f"balance must be 'listed' or 'class', got '{balance}'.")
        split = index.split(fold, role)
        left_out = frozenset(exclude)
        novel: frozenset[int] = frozenset()
        if drop_novel is not None:
            novel = novel_images(index, fold, role, drop_novel) - left_out
            left_out |= novel
        self.shots = shots
        self.repeat_supports = repeat_supports
        self.entries = tuple(entry for entry in split.entries if entry[0] not in left_out)
        self._by_class = images_by_class(self.entries)
        self._balanced = balance == "class"
        if self._balanced:  # a class that lost all its images, or never had one, cannot have its share
            self._by_class = {class_id: self._by_class.get(class_id, ()) for class_id in split.class_ids}
        require_images(index, fold, role, self._by_class, split, 1 if repeat_supports else shots, novel)
        self.class_ids = tuple(sorted(self._by_class))
        self._position = {
            (class_id, image): position
            for class_id, images in self._by_class.items()
            for position, image in enumerate(images)
        }
        self._mates = index.mates
        self._by_list = index.query_order == "list"
        self._key = (index.digest, fold, role, seed)
        self._cycles: dict[tuple[object, ...], tuple[int, np.ndarray]] = {}

    @property
    def epoch_length(self) -> int:
        """Number of listed (image, class) pairs: episodes in one pass over the split, where queries follow the list."""
        return len(self.entries)

    def __getitem__(self, number: int) -> Episode:
        """Episode `number`, 0 or more. There is no last one."""
        if number < 0:
            raise IndexError(f"Episodes are numbered from 0, got {number}.")
        draws = philox(*self._key, "episode", number).random_raw(2 + self.shots).tolist()
        if self._balanced:
            turn, position = divmod(number, len(self.class_ids))
            class_id = self.class_ids[self._order(turn, len(self.class_ids), "classes")[position]]
            images = self._by_class[class_id]
            cycle, position = divmod(turn, len(images))
            query = images[self._order(cycle, len(images), "images", class_id)[position]]
        elif self._by_list:
            cycle, position = divmod(number, len(self.entries))
            query, class_id = self.entries[self._order(cycle, len(self.entries), "cycle")[position]]
        else:
            class_id = self.class_ids[below(draws[0], len(self.class_ids))]
            images = self._by_class[class_id]
            query = images[below(draws[1], len(images))]
        return Episode(query, self._supports(class_id, query, draws[2:]), class_id)

    def __iter__(self) -> Iterator[Episode]:
        """All episodes from number 0 on; never ends."""
        number = 0
        while True:
            yield self[number]
            number += 1

    def _supports(self, class_id: int, query: int, draws: Sequence[int]) -> tuple[int, ...]:
        taken = positions_of(self._position, class_id, self._mates(query))
        return pick_supports(self._by_class[class_id], draws, taken, repeat=self.repeat_supports)

    def _order(self, cycle: int, count: int, *what: object) -> np.ndarray:
        """The order of `count` things in one pass over them; the latest pass of each kind is kept."""
        kept = self._cycles.get(what)
        if kept is None or kept[0] != cycle:
            keys = philox(*self._key, *what, cycle).random_raw(count)
            kept = self._cycles[what] = cycle, np.argsort(keys, kind="stable")
        return kept[1]


def novel_images(
    index: DatasetIndex, fold: int, role: str, classes_present: Callable[[int], Iterable[int]]
) -> frozenset[int]:
    """Images listed for `role` that show a class of the fold's test split.

    `classes_present` gives the classes visible in the image of that number, taken from its full-size mask (small
    objects vanish from a resized one).
    """
    novel = set(index.split(fold, "test").class_ids)
    listed = {image for image, _ in index.split(fold, role).entries}
    return frozenset(image for image in listed if not novel.isdisjoint(classes_present(image)))


def positions_of(places: Mapping[tuple[int, int], int], class_id: int, images: Iterable[int]) -> list[int]:
    """Positions, ascending, that images have among those of a class; of those that it has."""
    found = (places.get((class_id, image)) for image in images)
    return sorted(position for position in found if position is not None)


def pick_supports(images: Sequence[int], draws: Iterable[int], taken: list[int], *, repeat: bool) -> tuple[int, ...]:
    """One of a class's images for every raw draw.

    Args:
        taken: positions, ascending, of images that must not be picked (the query's, and those of its group); grows if
            supports must differ.
        repeat: whether an image may be picked twice.
    """
    # Positions already taken are stepped over instead of copying the class without them: COCO's "person"
    # has 45,000 images.
    supports = []
    for draw in draws:
        position = below(draw, len(images) - len(taken))
        for other in taken:
            position += position >= other
        supports.append(images[position])
        if not repeat:
            bisect.insort(taken, position)
    return tuple(supports)


def images_by_class(entries: Iterable[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """Class id -> its images in the order of the list, each once."""
    groups: dict[int, dict[int, None]] = {}  # a dict as an ordered set
    for image, class_id in entries:
        groups.setdefault(class_id, {})[image] = None
    return {class_id: tuple(images) for class_id, images in groups.items()}


def require_images(
    index: DatasetIndex,
    fold: int,
    role: str,
    pools: dict[int, tuple[int, ...]],
    split: Split,
    shots: int,
    novel: Collection[int] = (),
) -> None:
    """Refuse lists that cannot make an episode. `novel` are the images left out because they show a held-out class.

    Raises:
        ConfigError: no image at all, or too few of a class.
    """
    where = f"{index.name}, fold {fold}, split '{role}'"
    why = ""
    if novel:
        held_out = [index.classes[class_id] for class_id in index.split(fold, "test").class_ids]
        why = (
            f" {len(novel)} of the {len({image for image, _ in split.entries})} photos listed were left out because "
            f"they show a class that fold {fold} holds out ({', '.join(held_out[:4])}"
            f"{', ...' if len(held_out) > 4 else ''}): without --drop-novel-images they are kept, and with "
            f"--novel-pixels ignore the pixels of these classes are left out of the loss instead."
        )
    if not pools:
        notes = " ".join(index.notes)
        if why:
            raise ConfigError(f"{where}: no image is left to draw episodes from.{why} Nothing was changed.")
        raise ConfigError(
            f"{where}: no images to draw episodes from ({len(split.entries)} listed, all left out or none there). "
            f"{notes + ' ' if notes else ''}Choose another fold"
            f"{', or train with --select-on none' if role == 'val' else ''}."
        )
    if index.groups:
        _require_groups(index, where, pools, shots)
    small = [(class_id, len(set(images))) for class_id, images in pools.items() if len(set(images)) < shots + 1]
    if small:
        listed = images_by_class(split.entries)
        names = "; ".join(
            f"class {class_id} '{index.classes[class_id]}' has {count} of {len(listed.get(class_id, ()))} listed"
            for class_id, count in small[:4]
        )
        more = f"; and {len(small) - 4} more" if len(small) > 4 else ""
        if why:
            raise ConfigError(
                f"{where}: an episode needs {shots + 1} images of its class, left are: {names}{more}.{why} Nothing was "
                f"changed."
            )
        raise ConfigError(
            f"{where}: a {shots}-shot episode needs {shots + 1} images of its class, usable are: {names}{more}. "
            f"Use fewer shots, add images of these classes, or take the classes out of the data set."
        )


def _require_groups(index: DatasetIndex, where: str, pools: dict[int, tuple[int, ...]], shots: int) -> None:
    """Refuse classes whose photos are so much of one group that a query of it lacks supports. Raises ConfigError."""
    for class_id, images in pools.items():
        groups = Counter(index.groups[image] for image in set(images))
        group, most = max(groups.items(), key=lambda item: item[1], default=(0, 0))
        if most > 1 and sum(groups.values()) - most < shots:
            name, first = index.classes[class_id], next(i for i in images if index.groups[i] == group)
            raise ConfigError(
                f"{where}: {most} of the {sum(groups.values())} photos of class {class_id} '{name}' are of one group "
                f"(that of {index.images[first]}), and a query of it needs {shots} support{'' if shots == 1 else 's'} "
                f"of other groups. Use fewer shots, add photos of other groups, or take `groups` out of dataset.yaml. "
                f"Nothing was computed."
            )


def batch_numbers(step: int, batch_size: int, epoch_length: int) -> range:
    """Episode numbers of an optimiser step, counted from 0.

    Every epoch is one pass over the training list; its last batch is shorter, as in the published code
    (14 episodes for PASCAL fold 0).

    >>> [list(batch_numbers(step, 2, 5)) for step in range(4)]
    [[0, 1], [2, 3], [4], [5, 6]]
    """
    epoch, number = divmod(step, steps_per_epoch(batch_size, epoch_length))
    first = epoch * epoch_length
    return range(first + number * batch_size, min(first + (number + 1) * batch_size, first + epoch_length))


def steps_per_epoch(batch_size: int, epoch_length: int) -> int:
    """Optimiser steps of one pass over the training list."""
    return -(-epoch_length // batch_size)
