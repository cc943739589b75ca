"""Which episodes the gallery shows: the best, the worst, some at random, and some of every object size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.common.philox import Draws
from pipeline.scores.rows import ScoredEpisodes


def choose(episodes: ScoredEpisodes, wanted: int, seed: int = 0) -> list[tuple[str, str, list[int]]]:
    """Best, worst, random and by object size, a quarter of `wanted` each, at least one.

    No episode is chosen twice, best and worst have each query at most once, and each class where there are enough of
    them; queries without a visible object are left to the random ones.

    Returns:
        (heading, how they were chosen, their positions in `episodes`); a part without an episode is left out.
    """
    each = max(1, wanted // 4)
    iou = episodes.iou
    visible = [number for number in range(len(episodes)) if episodes.object_pixels[number] > 0]
    taken: set[int] = set()
    parts = []
    ranked = sorted(visible, key=lambda number: (-iou[number], number))
    for heading, order in (("Best", ranked), ("Worst", ranked[::-1])):
        chosen = _different(episodes, order, each, taken)
        once = "query" if _few_classes(episodes, each) else "class"
        parts.append((heading, f"The {heading.lower()} episodes, each {once} at most once.", chosen))
    left = [number for number in range(len(episodes)) if number not in taken]
    draws, chosen = Draws("gallery", seed), []
    while left and len(chosen) < each:
        chosen.append(left.pop(draws.below(len(left))))
    taken |= set(chosen)
    how = f"Drawn among all {len(episodes):,} episodes, seed {seed}: nothing was picked by eye."
    parts.append(("Random", how, chosen))
    chosen = _by_size(episodes, iou, each, [number for number in visible if number not in taken])
    how = "Episodes in order of their object's size, cut into groups of one length: the median IoU of each."
    parts.append(("By object size", how, chosen))
    return [part for part in parts if part[2]]


def _different(episodes: ScoredEpisodes, order: Sequence[int], wanted: int, taken: set[int]) -> list[int]:
    """The first of an order with different queries and, where there are enough, different classes."""
    chosen: list[int] = []
    classes: set[int] = set()
    queries: set[str] = set()
    few = _few_classes(episodes, wanted)
    for number in order:
        class_id, query = int(episodes.classes[number]), episodes.queries[number]
        if len(chosen) == wanted:
            break
        if number in taken or query in queries or (class_id in classes and not few):
            continue
        chosen.append(number)
        classes.add(class_id)
        queries.add(query)
    taken |= set(chosen)
    return chosen


def _few_classes(episodes: ScoredEpisodes, wanted: int) -> bool:
    """Whether different classes would not do for so many episodes."""
    return len(set(episodes.classes.tolist())) < wanted


def _by_size(episodes: ScoredEpisodes, iou: NDArray[np.float64], wanted: int, numbers: Sequence[int]) -> list[int]:
    """One episode of each group of sizes, small objects first."""
    ordered = sorted(numbers, key=lambda number: (episodes.object_pixels[number], number))
    chosen = []
    for group in np.array_split(np.asarray(ordered, np.int64), min(wanted, len(ordered)) or 1):
        if len(group):
            inside = sorted(group.tolist(), key=lambda number: (iou[number], number))
            chosen.append(inside[len(inside) // 2])
    return chosen
