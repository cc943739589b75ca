"""Episode manifests: the episodes of a test written down, so that two results can be known to be of the same ones.

A manifest names photos by their ids, so it can be read without the data set. Its digest covers the data set's digest,
fold, role and every episode; how the episodes were drawn is written beside them but is not part of their identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from hsnet.errors import ConfigError, DataError
from pipeline.datasets.index import DatasetIndex
from pipeline.episodes.stream import Episode

MANIFEST_FORMAT = 1
WAYS_FORMAT = 2
"""Format of manifests whose episodes have several classes, or queries that show none of them."""


@dataclass(frozen=True, slots=True)
class ListedEpisode:
    """One episode, photos by their ids."""

    query: str
    supports: tuple[str, ...]
    class_id: int
    others: tuple[tuple[int, tuple[str, ...]], ...] = ()
    """(class id, its supports) of the N - 1 further classes of an N-way episode."""
    absent: bool = False
    """The query was drawn to show none of the episode's classes."""

    @property
    def classes(self) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """(class id, its supports) of all N classes; that of `class_id` first."""
        return ((self.class_id, self.supports), *self.others)

    @property
    def photos(self) -> tuple[str, ...]:
        """Every photo's id, the query's first; a photo may come several times."""
        return (self.query, *(image for _, supports in self.classes for image in supports))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The episodes of one test, in order.

    Raises:
        DataError: rows with different numbers of supports or classes, a photo that is its own support, a class without
            a name or twice in an episode.
    """

    data: str
    """Digest of the data set's index."""
    dataset: str
    fold: int
    role: str
    classes: Mapping[int, str]
    """Every class of the fold and role -> name, also those without an episode: they count as 0 in a mean."""
    rows: tuple[ListedEpisode, ...]
    made: Mapping[str, Any] = field(default_factory=dict)
    """How the episodes were drawn (draw, seed, balance, ...) or where they came from. Not part of the digest."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise DataError("A manifest needs at least one episode.")
        shots, ways = len(self.rows[0].supports), self.ways
        for number, row in enumerate(self.rows):
            if len(row.classes) != ways or len({class_id for class_id, _ in row.classes}) != ways:
                raise DataError(
                    f"Episode {number} has classes {[c for c, _ in row.classes]}, episode 0 has {ways}; a manifest "
                    f"needs the same number of different classes everywhere."
                )
            for class_id, supports in row.classes:
                if not supports or len(supports) != shots:
                    raise DataError(
                        f"Episode {number} has {len(supports)} supports, episode 0 has {shots}; a manifest needs the "
                        f"same number, at least 1, everywhere."
                    )
                if row.query in supports:
                    raise DataError(f"Episode {number}: photo '{row.query}' is the query and its own support.")
                if class_id not in self.classes:
                    raise DataError(f"Episode {number}: class {class_id} is not tested in fold {self.fold}.")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shots(self) -> int:
        """Supports per episode. Fewer are the first ones of each (`first`)."""
        return len(self.rows[0].supports)

    @property
    def ways(self) -> int:
        """Classes per episode."""
        return 1 + len(self.rows[0].others)

    @property
    def absent(self) -> int:
        """Episodes whose query was drawn to show none of their classes."""
        return sum(row.absent for row in self.rows)

    @property
    def format(self) -> int:
        """1 for one class that the query shows, as ever; 2 for what came later."""
        return WAYS_FORMAT if self.ways > 1 or self.absent else MANIFEST_FORMAT

    def first(self, shots: int) -> Manifest:
        """The same episodes with their first supports only. Its digest is what rows of that many shots carry.

        Raises:
            ConfigError: more supports than there are.
        """
        if not 1 <= shots <= self.shots:
            raise ConfigError(f"The manifest has {self.shots} supports per episode: it cannot give {shots} shots.")
        if shots == self.shots:
            return self
        return replace(
            self,
            rows=tuple(
                replace(
                    row, supports=row.supports[:shots], others=tuple((c, listed[:shots]) for c, listed in row.others)
                )
                for row in self.rows
            ),
        )

    @cached_property
    def digest(self) -> str:
        """ "sha256:..." of data set, fold, role and episodes: equal ones are the same test."""
        hasher = hashlib.sha256(canonical([self.format, self.data, self.fold, self.role]))
        for number, row in enumerate(self.rows):
            hasher.update(b"\n" + row_content(number, row))
        return "sha256:" + hasher.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the lines "query support,...,support class": that of the published code's episodes is known."""
        lines = (
            " ".join([row.query, *(f"{','.join(supports)} {class_id}" for class_id, supports in row.classes)])
            for row in self.rows
        )
        return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def of_episodes(
    index: DatasetIndex, fold: int, role: str, episodes: Iterable[Episode], made: Mapping[str, Any]
) -> Manifest:
    """Episodes of an index as a manifest."""

    def named(images: Iterable[int]) -> tuple[str, ...]:
        return tuple(index.images[image] for image in images)

    rows = tuple(
        ListedEpisode(
            index.images[e.query],
            named(e.supports),
            e.class_id,
            tuple((class_id, named(supports)) for class_id, supports in e.others),
            e.absent,
        )
        for e in episodes
    )
    classes = {class_id: index.classes[class_id] for class_id in index.split(fold, role).class_ids}
    return Manifest(
        data=index.digest, dataset=index.name, fold=fold, role=role, classes=classes, rows=rows, made=dict(made)
    )


def episodes_in(manifest: Manifest, index: DatasetIndex, skipped: Collection[int] = ()) -> list[Episode]:
    """The manifest's episodes with the image numbers of this index.

    Raises:
        DataError: it is of another data set (names both digests and missing photos), a photo is not listed for its
            class, or the query of an absent episode is listed for one of its classes.
        ConfigError: a photo was skipped at extraction.
    """
    numbers = {image_id: number for number, image_id in enumerate(index.images)}
    wanted = dict.fromkeys(image for row in manifest.rows for image in row.photos)
    missing = [image for image in wanted if image not in numbers]
    if manifest.data != index.digest:
        absent = (
            f"{len(missing)} of its {len(wanted)} photos are not there, first '{missing[0]}'. "
            if missing
            else "All its photos are there, but lists or classes differ. "
        )
        raise DataError(
            f"The manifest is of another data set:\n"
            f"  manifest   {manifest.dataset}, {manifest.data}\n"
            f"  data here  {index.name}, {index.digest}\n"
            f"{absent}Give the data it was made for, or make it again for these with `hsnet episodes import`. "
            f"Nothing was computed."
        )
    if missing:
        raise DataError(f"The manifest names {len(missing)} photos that the data set has not, first '{missing[0]}'.")
    listed = set(index.split(manifest.fold, manifest.role).entries)
    episodes = []
    for number, row in enumerate(manifest.rows):
        query, supports = numbers[row.query], []
        for class_id, images in row.classes:
            shown = () if row.absent or class_id != row.class_id else (row.query,)
            for image in (*shown, *images):
                if (numbers[image], class_id) not in listed:
                    raise DataError(
                        f"Episode {number}: photo '{image}' is not listed for class {class_id} "
                        f"'{index.classes.get(class_id, '?')}' in fold {manifest.fold}, '{manifest.role}'."
                    )
            if row.absent and (query, class_id) in listed:
                raise DataError(
                    f"Episode {number}: its query '{row.query}' should show none of its classes, but is listed for "
                    f"class {class_id} '{index.classes.get(class_id, '?')}'."
                )
            supports.append(tuple(numbers[image] for image in images))
        others = tuple((row.others[place][0], images) for place, images in enumerate(supports[1:]))
        episodes.append(Episode(query, supports[0], row.class_id, others, row.absent))
    require_there(index, episodes, skipped)
    return episodes


def difference(first: Manifest, second: Manifest) -> str | None:
    """Where two manifests differ, in one line; None if they are the same test."""
    if first.digest == second.digest:
        return None
    for name in ("data", "fold", "role"):
        if getattr(first, name) != getattr(second, name):
            return f"{name}: {getattr(first, name)} and {getattr(second, name)}"
    for number, (mine, theirs) in enumerate(zip(first.rows, second.rows, strict=False)):
        if mine != theirs:
            texts = [row_text(row, manifest.classes) for row, manifest in ((mine, first), (theirs, second))]
            return f"episode {number}: {' and '.join(texts)}"
    return f"number of episodes: {len(first)} and {len(second)}"


def row_text(row: ListedEpisode, names: Mapping[int, str]) -> str:
    """ "query <- support, support (cat)"; of several ways, all classes with their supports.

    Args:
        names: class id -> name, such as `Manifest.classes`; a class without one is called by its id.
    """
    classes = "; ".join(f"{', '.join(supports)} ({names.get(c, f'class id {c}')})" for c, supports in row.classes)
    return f"{row.query} <- {classes}{', none of them shown' if row.absent else ''}"


def row_content(number: int, row: ListedEpisode) -> bytes:
    """The bytes of one episode that digests are taken over."""
    more = [row.others, row.absent] if row.others or row.absent else []
    return canonical([number, row.query, list(row.supports), row.class_id, *more])


def canonical(value: object) -> bytes:
    """One way to write a value as JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def require_there(index: DatasetIndex, episodes: Sequence[Episode], skipped: Collection[int]) -> None:
    left_out = set(skipped)
    gone = sorted({image for e in episodes for image in e.photos if image in left_out})
    if gone:
        raise ConfigError(
            f"These episodes need {len(gone)} images that were skipped at extraction (first: "
            f"'{index.images[gone[0]]}'). Repair the images and extract again, or draw other episodes."
        )
