"""A small store of some of a big one's images: whole and self-contained, for a bug report, a test or a notebook.

It has the same recipe (and fit, where features are coded) and the same class ids and names. Its index holds only the
chosen images, in the order of the big store, and its lists only those entries with which episodes can be drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hsnet.errors import ConfigError, StoreError
from pipeline.common.files import whole_folder
from pipeline.common.philox import Draws
from pipeline.datasets.index import ROLES, DatasetIndex, Split
from pipeline.store.feature_store import FeatureStore

IMAGES = 32


@dataclass(frozen=True)
class FoldSample:
    """What is left of one list of the data set."""

    fold: int
    role: str
    classes: tuple[str, ...]
    """Names of the classes that episodes can be drawn for."""
    entries: int
    """(image, class) pairs."""
    classes_left_out: int
    entries_left_out: int


@dataclass(frozen=True)
class Exported:
    """What `export_sample` wrote and left out."""

    path: str
    images: int
    images_left_out: int
    bytes: int
    lists: tuple[FoldSample, ...]
    """Lists of the data set that had entries."""


def export_sample(
    store: FeatureStore,
    path: str | Path,
    images: int = IMAGES,
    *,
    ids: Collection[str] = (),
    classes: Collection[str] = (),
    fold: int | None = None,
    shots: int = 1,
    seed: int = 0,
) -> Exported:
    """Write a small store to a new path.

    Args:
        images: how many at most, drawn by the seed so that each class that is taken has the images of an episode, and
            so that every list has a class before one has a second.
        ids: take exactly these images instead, by id.
        classes: draw only images listed for these, by name.
        fold: draw only for the lists of this fold; None draws for all.
        shots: supports of the episodes that shall be possible: a class needs one image more.

    Raises:
        ConfigError: no such image, class or fold, or too few images for a single class.
        StoreError: something is at `path`, an image cannot be read, or the disk refused. Nothing is left there.
    """
    target = Path(path)
    if target.exists() or target.is_symlink():
        raise StoreError(f"{target} is there already. Give a new path for the sample. Nothing was changed.")
    chosen = _named(store, ids) if ids else _drawn(store, images, classes, fold, shots, seed)
    index = sample_index(store.index, chosen, shots)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(target) as partial:
            nbytes = _copy(store, partial, index, chosen)
    except OSError as error:
        raise StoreError(f"The sample cannot be written to {target}: {error}. Nothing was left there.") from error
    return Exported(
        path=str(target),
        images=len(chosen),
        images_left_out=len(store.index.images) - len(chosen),
        bytes=nbytes,
        lists=tuple(_compare(store.index, index)),
    )


def sample_index(index: DatasetIndex, images: Sequence[int], shots: int = 1) -> DatasetIndex:
    """The index of some images of a data set, in ascending order of their numbers.

    Entries of a class with fewer than `shots` + 1 of them in a list are left out of it, and classes that a list only
    declares: no episode could be drawn for them.
    """
    new = {image: number for number, image in enumerate(images)}
    splits: dict[int, dict[str, Split]] = {}
    for fold, roles in index.splits.items():
        splits[fold] = {}
        for role, split in roles.items():
            there = Split(tuple((new[image], class_id) for image, class_id in split.entries if image in new))
            scarce = there.classes_below(shots + 1)
            splits[fold][role] = Split(tuple(entry for entry in there.entries if entry[1] not in scarce))
    note = (
        f"A sample of {len(images)} of the {len(index.images)} images of {index.name} ({index.digest[:15]}); its lists "
        f"hold only these. Scores on it are no results of that data set."
    )
    names = tuple(index.images[image] for image in images)
    old = [index.groups[image] for image in images] if index.groups else []
    numbers = {group: number for number, group in enumerate(dict.fromkeys(old))}
    groups = tuple(numbers[group] for group in old)
    return replace(index, images=names, splits=splits, groups=groups, notes=(note, *index.notes))


def _named(store: FeatureStore, ids: Collection[str]) -> list[int]:
    numbers = {name: number for number, name in enumerate(store.index.images)}
    unknown = [name for name in ids if name not in numbers]
    if unknown:
        example = store.index.images[0]
        raise ConfigError(f"The store has no image '{unknown[0]}'. Its ids look like '{example}'. Nothing was written.")
    return sorted({numbers[name] for name in ids})


def _drawn(
    store: FeatureStore, limit: int, classes: Collection[str], fold: int | None, shots: int, seed: int
) -> list[int]:
    index, needed = store.index, shots + 1
    if shots < 1:
        raise ConfigError(f"An episode needs at least 1 support, got shots = {shots}.")
    unknown = sorted(set(classes) - set(index.classes.values()))
    if unknown:
        raise ConfigError(f"The store has no class '{unknown[0]}'. It has: {', '.join(index.classes.values())}.")
    if fold is not None:
        index.split(fold, "trn")  # says which folds there are
    missing, skipped = set(store.missing_shards()), store.skipped
    there = {i for i in range(len(index.images)) if i not in skipped and store.shard_of(i) not in missing}
    turns = []
    for role in reversed(ROLES):  # test classes first: a sample too small for all lists can at least be evaluated on
        for number in index.folds if fold is None else (fold,):
            groups = {
                class_id: [image for image in dict.fromkeys(images) if image in there]
                for class_id, images in index.split(number, role).by_class.items()
                if not classes or index.classes[class_id] in classes
            }
            turns.append(_turns(groups, needed, Draws(index.digest, "export", seed, number, role)))
    chosen: dict[int, None] = {}
    while turns:
        left = []
        for turn in turns:
            wanted = next(turn, None)
            if wanted is None:
                continue
            left.append(turn)
            have = [image for image in wanted if image in chosen]
            more = [image for image in wanted if image not in chosen][: max(0, needed - len(have))]
            if len(chosen) + len(more) <= limit:
                chosen.update(dict.fromkeys(more))
        turns = left
    if not chosen:
        raise ConfigError(
            f"No class has the {needed} images of a {shots}-shot episode among at most {limit} images that are listed "
            f"and can be read here. Ask for more images or fewer shots. Nothing was written."
        )
    return sorted(chosen)


def _turns(groups: Mapping[int, Sequence[int]], needed: int, draws: Draws) -> Iterator[list[int]]:
    """Classes of a list in an order of its own, each with its images in an order of their own."""
    usable = [class_id for class_id in sorted(groups) if len(groups[class_id]) >= needed]
    for turn in np.argsort(draws.array(len(usable)), kind="stable"):
        images = groups[usable[turn]]
        yield [images[number] for number in np.argsort(draws.array(len(images)), kind="stable")]


def _copy(store: FeatureStore, path: Path, index: DatasetIndex, images: Sequence[int]) -> int:
    small = FeatureStore.create(path, store.recipe, index, store.shard_images, store.codec)
    with small.writing():
        for number in range(small.shards):
            part = [images[i] for i in small.images_in(number)]
            small.write_shard(
                number,
                store.features(part),
                store.labels(part),
                [store.size(image) for image in part],
                [store.classes_present(image) for image in part],
            )
    return small.nbytes


def _compare(before: DatasetIndex, after: DatasetIndex) -> Iterator[FoldSample]:
    for fold in before.folds:
        for role in ROLES:
            old, new = before.split(fold, role), after.split(fold, role)
            if old.entries:
                yield FoldSample(
                    fold=fold,
                    role=role,
                    classes=tuple(after.classes[class_id] for class_id in new.class_ids),
                    entries=len(new.entries),
                    classes_left_out=len(old.class_ids) - len(new.class_ids),
                    entries_left_out=len(old.entries) - len(new.entries),
                )
