"""What `pipeline.analyze` finds: scores with intervals, how they spread, and paired differences."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.episodes.protocols import Policy
from pipeline.scores.bootstrap import Interval, Part
from pipeline.scores.rows import Results
from pipeline.scores.support_spread import SupportSpread


@dataclass(frozen=True)
class Spread:
    """How several seeds differ."""

    parts: tuple[Part, ...]
    deviation: float
    """Standard deviation of the seeds' mIoU, points."""
    expected: float
    """What one seed's interval makes one expect: its standard error, mean over the seeds."""


@dataclass(frozen=True)
class Score:
    """One number of shots, way to combine them, and policy: of a fold, or the mean over folds."""

    policy: Policy
    shots: int
    fusion: str
    fold: int | None
    """None for the mean over several folds."""
    seeds: tuple[int, ...]
    episodes: int
    queries: int
    """Different query photos of a class, summed over classes."""
    miou: Interval
    fb_iou: Interval | None
    """None if no background was counted."""
    needed: int | None
    """Episodes at which the interval of mIoU would be about plus and minus half a point; None if it cannot be told."""
    classes: tuple[Part, ...] = ()
    sizes: tuple[Part, ...] = ()
    support: SupportSpread | None = None
    spread: Spread | None = None


@dataclass(frozen=True)
class Difference:
    """The first set minus the one it is compared against, on the same episodes."""

    policy: Policy
    shots: int
    fusion: str
    fusion_against: str
    fold: int | None
    episodes: int
    miou: Interval
    p: float
    """Two-sided, of the hypothesis that swapping the two on any episode would change nothing."""
    fb_iou: Interval | None
    needed: int | None
    classes: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """Everything that was asked for."""

    files: tuple[Results, ...]
    against: tuple[Results, ...]
    unit: str
    scores: tuple[Score, ...]
    scores_against: tuple[Score, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
