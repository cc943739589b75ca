"""Domain shift: a head trained on one data set, tested on classes of another that it has not seen.

The rule: a class of the test data is left out if a training class has the same name, after case, spaces, hyphens and
underscores are taken away, or a name that ALIASES calls the same. All other classes are tested together, on the
photos of every fold's test list. With a head of COCO-20i fold i and PASCAL this gives the classes of PASCAL that are
among COCO fold i's held-out ones, as in the paper's Table 4. A new class that no fold of the test data holds out is
tested on its photos in the validation lists, or, where those are fewer than two, in the training lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from hsnet.errors import ConfigError
from pipeline.datasets.index import ROLES, DatasetIndex, Split

ALIASES = (
    ("aeroplane", "airplane"),
    ("motorbike", "motorcycle"),
    ("sofa", "couch"),
    ("tvmonitor", "tv"),
)
"""Names of PASCAL and COCO (and their synonyms) for one thing."""

_CANONICAL = {name: group[0] for group in ALIASES for name in group}


@dataclass(frozen=True)
class Transfer:
    """What is tested."""

    index: DatasetIndex
    """The test data's index with one fold, whose test list shows unseen classes only."""
    fold: int
    tested: tuple[str, ...]
    """Names of the classes tested."""
    left_out: tuple[str, ...]
    """Names of the test data's classes that the head was trained on."""
    elsewhere: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Role ("val" or "trn") -> names of tested classes that no fold holds out, whose photos are from lists of it."""
    too_few: Mapping[str, int] = field(default_factory=dict)
    """Names of new classes that cannot be tested -> how many photos are listed for each: an episode needs two."""


def canonical_name(name: str) -> str:
    """The name that decides whether two classes are the same.

    >>> canonical_name("TV monitor"), canonical_name("potted_plant"), canonical_name("airplane")
    ('tvmonitor', 'pottedplant', 'aeroplane')
    """
    plain = "".join(letter for letter in name.casefold() if letter.isalnum())
    return _CANONICAL.get(plain, plain)


def unseen_classes(index: DatasetIndex, seen: Iterable[str], fold: int = 0) -> Transfer:
    """The test data's index, narrowed to classes that are none of the seen ones.

    Args:
        index: of the test data.
        seen: names of the classes that the head was trained on.
        fold: number that the one fold of the result gets.

    Raises:
        ConfigError: no class is left: all were trained on, or the new ones have too few photos.
    """
    known = {canonical_name(name) for name in seen}
    kept = {class_id for class_id, name in index.classes.items() if canonical_name(name) not in known}
    left_out = tuple(name for class_id, name in index.classes.items() if class_id not in kept)
    entries: dict[tuple[int, int], None] = {}
    declared: set[int] = set()
    for number in index.folds:
        split = index.split(number, "test")
        entries |= dict.fromkeys(entry for entry in split.entries if entry[1] in kept)
        declared |= kept & set(split.class_ids)
    elsewhere: dict[str, tuple[str, ...]] = {}
    listed: dict[int, dict[int, None]] = {}
    for role in ("val", "trn"):
        missing = kept - declared
        listed = _photos(index, role, missing)
        found = sorted(class_id for class_id in missing if len(listed[class_id]) > 1)
        entries |= dict.fromkeys((image, class_id) for class_id in found for image in listed[class_id])
        declared |= set(found)
        elsewhere |= {role: tuple(index.classes[class_id] for class_id in found)} if found else {}
    too_few = {index.classes[class_id]: len(listed[class_id]) for class_id in sorted(kept - declared)}
    if not entries:
        some = ", ".join(f"{name} ({count})" for name, count in list(too_few.items())[:5])
        raise ConfigError(
            f"No class of {index.name} is new to this head: it was trained on all {len(index.classes)}. Nothing was "
            f"computed."
            if not kept
            else f"Of the {len(index.classes)} classes of {index.name} this head was trained on {len(left_out)}; the "
            f"others cannot be tested: an episode needs 2 photos of its class, listed are (in brackets) "
            f"{some or 'none'}{', ...' if len(too_few) > 5 else ''}. Add photos of these classes. Nothing was computed."
        )
    return Transfer(
        replace(index, splits={fold: {"test": Split(tuple(entries), tuple(sorted(declared)))}}),
        fold,
        tuple(index.classes[class_id] for class_id in sorted(declared)),
        left_out,
        elsewhere,
        too_few,
    )


def training_index(index: DatasetIndex, seen: Iterable[str], fold: int = 0) -> DatasetIndex:
    """The index narrowed to classes that were trained on elsewhere: one fold with a training list of all their photos.

    For a number that is fitted on training classes (`pipeline.heads.fitting`) where only test data are at hand.
    Classes with fewer than two photos are left out; the list may be empty.
    """
    known = {canonical_name(name) for name in seen}
    classes = {class_id for class_id, name in index.classes.items() if canonical_name(name) in known}
    listed: dict[int, dict[int, None]] = {class_id: {} for class_id in sorted(classes)}
    for role in ROLES:
        for class_id, photos in _photos(index, role, classes).items():
            listed[class_id] |= photos
    entries = tuple((image, c) for c, photos in listed.items() if len(photos) > 1 for image in sorted(photos))
    return replace(index, splits={fold: {"trn": Split(entries)}})


def _photos(index: DatasetIndex, role: str, classes: set[int]) -> dict[int, dict[int, None]]:
    """Class id -> its photos in the lists of a role, of all folds, in order, each once."""
    listed: dict[int, dict[int, None]] = {class_id: {} for class_id in classes}
    for number in index.folds if classes else ():
        for image, class_id in index.split(number, role).entries:
            if class_id in classes:
                listed[class_id][image] = None
    return listed
