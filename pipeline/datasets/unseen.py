"""Domain shift: a head trained on one data set, tested on classes of another that it has not seen.

The rule: a class of the test data is left out if a training class has the same name, after case, spaces, hyphens and
underscores are taken away, or a name that ALIASES calls the same. All other classes are tested together, on the
photos of every fold's test list. With a head of COCO-20i fold i and PASCAL this gives the classes of PASCAL that are
among COCO fold i's held-out ones, as in the paper's Table 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hsnet.errors import ConfigError
from pipeline.datasets.index import DatasetIndex, Split

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
        ConfigError: no class is left.
    """
    known = {canonical_name(name) for name in seen}
    kept = {class_id for class_id, name in index.classes.items() if canonical_name(name) not in known}
    entries: dict[tuple[int, int], None] = {}
    declared: set[int] = set()
    for number in index.folds:
        split = index.split(number, "test")
        entries |= dict.fromkeys(entry for entry in split.entries if entry[1] in kept)
        declared |= kept & set(split.class_ids)
    left_out = tuple(name for class_id, name in index.classes.items() if class_id not in kept)
    if not entries:
        raise ConfigError(
            f"No class of {index.name} is new to this head: it was trained on all {len(index.classes)}. Nothing was "
            f"computed."
        )
    return Transfer(
        replace(index, splits={fold: {"test": Split(tuple(entries), tuple(sorted(declared)))}}),
        fold,
        tuple(index.classes[class_id] for class_id in sorted(declared)),
        left_out,
    )
