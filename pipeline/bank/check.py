"""The expected IoU on a person's own photos: every annotated photo is left out once and answered by the others.

Few photos say little, and that is said: the interval is that of a new folder's pooled IoU by Student's t. A handful of
photos may lie close together by chance, so their spread is drawn towards what photos usually have. The annotated photos
are taken for a fair draw of those to come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from pipeline.bank.heads import CONTRAST, HSNET, STANDING, TUNE, Coarse, Example, Fitted, Trained, fit
from pipeline.datasets.images import resize_label

FOLDS = 10
"""Of more annotated photos than this, groups are left out together: so many fits for a head at most."""

SIDE = 320
"""Answers are scored at the photo's shape with at most so many pixels a side."""

NEW_PHOTOS = 30
"""The folder to come is taken to have so many photos: its own chance is in the interval, too."""

COVERAGE = 0.95

USUAL_SPREAD, ITS_WEIGHT = 0.25, 4
"""Standard deviation of the IoU of photos, and how many photos it counts for beside those at hand. Chosen on 149 jobs
of five photos (docs/practice.md): without it 80 to 95 % of the intervals held what came out, with it 90 to 98 %, and
they are narrower."""
HURTS = 0.03
"""A photo without which the others are answered better by so much is named."""
MOST_FOR_INFLUENCE = 8
"""With more photos it is not asked what each of them does to the others: that takes a fit for every pair."""


@dataclass(frozen=True)
class HeadScore:
    """How a head does on photos that it has not seen."""

    head: str
    ious: tuple[float, ...]
    """Of every photo that shows the class, 0 to 1."""
    pooled: float
    """Intersections of all of them over their unions."""
    low: float
    high: float
    """Where the pooled IoU of new photos is expected, see the top of this file."""
    shown: tuple[float, ...]
    """`Coarse.presence` of photos that show the class, each by a fit that has not seen it."""
    absent: tuple[float, ...]
    """The same of photos known not to show it."""
    fewer: float | None = None
    """Pooled IoU with one annotated photo less; None if it was not asked."""


@dataclass(frozen=True)
class ClassCheck:
    """What is to be expected for one class."""

    name: str
    photos: tuple[str, ...]
    """Names of the photos that show it."""
    absent: int
    """Photos known not to show it."""
    scores: tuple[HeadScore, ...]
    """The best first; empty for a class with a single photo."""
    hurts: tuple[str, ...] = ()
    """Photos without which the others are answered better."""

    @property
    def best(self) -> HeadScore | None:
        return self.scores[0] if self.scores else None


def candidates(trained: Trained | None, tiled: bool = False) -> tuple[str, ...]:
    """Heads to choose among; a trained one answers whole photos only."""
    return (CONTRAST, TUNE) if trained is None or tiled else (CONTRAST, TUNE, HSNET, STANDING)


def without_check(trained: Trained | None, tiled: bool = False) -> str:
    """The head for a class with a single photo, of which nothing can be left out."""
    return TUNE if trained is None or tiled else HSNET


def check_class(
    name: str,
    photos: Sequence[str],
    examples: Sequence[Example],
    heads: Sequence[str],
    trained: Trained | None = None,
    *,
    influence: bool = False,
    on_event: Callable[[str], None] | None = None,
) -> ClassCheck:
    """Leave every photo out in turn, for each head.

    Args:
        photos, examples: photos with the class and without, and their names.
        heads: see `pipeline.bank.heads.HEADS`.
        influence: also find out what each photo does to the others, by leaving out pairs, for the best head.
        on_event: called with what is done next, in words.

    Returns:
        A check; without scores if fewer than two photos show the class.
    """
    shown = [number for number, one in enumerate(examples) if one.mask is not None]
    names = tuple(photos[number] for number in shown)
    absent = len(examples) - len(shown)
    if len(shown) < 2:
        return ClassCheck(name, names, absent, ())
    scores = []
    for head in heads:
        if on_event:
            on_event(f"{name}: {head}")
        scores.append(_score(head, examples, trained))
    scores.sort(key=lambda score: -score.pooled)
    hurts: tuple[str, ...] = ()
    if influence and 3 <= len(shown) <= MOST_FOR_INFLUENCE:
        if on_event:
            on_event(f"{name}: pairs left out")
        fewer, hurts = _influence(scores[0], examples, shown, photos, trained)
        scores[0] = HeadScore(**{**vars(scores[0]), "fewer": fewer})
    return ClassCheck(name, names, absent, tuple(scores), hurts)


def _score(head: str, examples: Sequence[Example], trained: Trained | None) -> HeadScore:
    counts: dict[int, tuple[float, float]] = {}
    presences: dict[int, float] = {}
    for group in _groups(examples):
        kept = [one for number, one in enumerate(examples) if number not in group]
        if not any(one.mask is not None for one in kept):
            continue
        fitted = fit(head, kept, trained)
        for number in group:
            coarse = fitted.answer(examples[number].features)
            presences[number] = coarse.presence
            counts[number] = overlap(fitted, coarse, examples[number])
    shown = [number for number in sorted(counts) if examples[number].mask is not None]
    both, either = (np.array([counts[number][side] for number in shown]) for side in (0, 1))
    pooled, low, high = pooled_interval(both, either)
    return HeadScore(
        head,
        tuple(float(b / e) if e else 0.0 for b, e in zip(both, either, strict=True)),
        pooled,
        low,
        high,
        tuple(presences[number] for number in shown),
        tuple(presences[number] for number in sorted(presences) if examples[number].mask is None),
    )


def _groups(examples: Sequence[Example]) -> list[set[int]]:
    """Numbers of the examples that are left out together; those with the class and those without are dealt alike."""
    sides: list[list[int]] = [[], []]
    for number, one in enumerate(examples):
        sides[one.mask is None].append(number)
    groups = min(FOLDS, max(len(sides[0]), 2))
    dealt: list[set[int]] = [set() for _ in range(groups)]
    for side in sides:
        for place, number in enumerate(side):
            dealt[place % groups].add(number)
    return [group for group in dealt if group]


def overlap(fitted: Fitted, coarse: Coarse, example: Example, tau: float = 0.5) -> tuple[float, float]:
    """Intersection and union of an answer and the truth, as shares of the photo's area."""
    height, width = example.features.size
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    said = fitted.soft(coarse, size) >= tau
    truth = _small(np.zeros((height, width), bool) if example.mask is None else example.mask, size)
    if example.ignore is not None:
        known = ~_small(example.ignore, size)
        said, truth = said & known, truth & known
    return float((said & truth).mean()), float((said | truth).mean())


def _small(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = resize_label(np.ascontiguousarray(mask.astype(np.uint8)), size) > 0
    return found


def pooled_interval(
    both: NDArray[np.float64], either: NDArray[np.float64], new: int = NEW_PHOTOS
) -> tuple[float, float, float]:
    """The pooled IoU of n photos, and the interval in which that of `new` others is expected, all 0 to 1.

    A ratio of sums: its spread is that of both - pooled * either over the mean of either (the usual linearisation),
    pooled with `USUAL_SPREAD`.
    """
    count = len(both)
    total = float(either.sum())
    if not total:
        return 0.0, 0.0, 1.0
    pooled = float(both.sum()) / total
    if count < 2:
        return pooled, 0.0, 1.0
    squares = float((((both - pooled * either) / either.mean()) ** 2).sum())
    freedom = count - 1 + ITS_WEIGHT
    spread = ((squares + ITS_WEIGHT * USUAL_SPREAD**2) / freedom) ** 0.5
    reach = float(student.ppf((1 + COVERAGE) / 2, freedom)) * spread * (1 / count + 1 / new) ** 0.5
    return pooled, max(0.0, pooled - reach), min(1.0, pooled + reach)


def _influence(
    score: HeadScore, examples: Sequence[Example], shown: Sequence[int], photos: Sequence[str], trained: Trained | None
) -> tuple[float, tuple[str, ...]]:
    """Pooled IoU with one photo less, and the names of photos without which the others are answered better."""
    gains: dict[int, list[float]] = {number: [] for number in shown}
    sums = np.zeros(2)
    for place, first in enumerate(shown):
        for second in shown[place + 1 :]:
            kept = [one for number, one in enumerate(examples) if number not in (first, second)]
            fitted = fit(score.head, kept, trained)
            for gone, asked in ((first, second), (second, first)):
                both, either = overlap(fitted, fitted.answer(examples[asked].features), examples[asked])
                sums += both, either
                gains[gone].append((both / either if either else 0.0) - score.ious[shown.index(asked)])
    hurts = [
        photos[number]
        for number, found in gains.items()
        if mean(found) >= HURTS and sum(gain > 0 for gain in found) > len(found) / 2
    ]
    return float(sums[0] / sums[1]) if sums[1] else 0.0, tuple(hurts)


@dataclass(frozen=True)
class Presence:
    """Is the class in a photo at all? By `Coarse.presence` of photos that show it and of photos that do not."""

    middle: float
    """Where both are as likely."""
    slope: float

    @classmethod
    def of(cls, score: HeadScore | None) -> Presence | None:
        """By two normal distributions of one width, each as likely; None where nothing tells the two apart."""
        if score is None or len(score.shown) < 2 or not score.absent:
            return None
        shown, absent = np.array(score.shown), np.array(score.absent)
        distance = float(shown.mean() - absent.mean())
        if distance <= 0:
            return None
        squares = ((shown - shown.mean()) ** 2).sum() + ((absent - absent.mean()) ** 2).sum()
        # Few photos lie closer together than all would: never narrower than a tenth of what lies between.
        variance = max(float(squares) / max(1, len(shown) + len(absent) - 2), (distance / 10) ** 2)
        return cls(float(shown.mean() + absent.mean()) / 2, distance / variance)

    def score(self, presence: float) -> float:
        """How sure that the class is in the photo, 0 to 1."""
        return float(1 / (1 + np.exp(-np.clip(self.slope * (presence - self.middle), -50, 50))))
