"""What a training tells while it works, and when it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECENT_STEPS = 20
"""Steps whose mean loss a summary tells."""


@dataclass(frozen=True)
class StepDone:
    """One optimiser step: mean loss of its batch, seconds it took, and how many of them were spent waiting for data.

    `gradient` is the norm of the gradient over all parameters, before it was clipped.
    """

    step: int
    steps: int
    loss: float
    seconds: float
    waited: float
    learning_rate: float
    gradient: float


@dataclass(frozen=True)
class Validated:
    """A validation: scores in percent on the selection episodes."""

    step: int
    miou: float
    fb_iou: float
    is_best: bool


@dataclass(frozen=True)
class Baseline:
    """What head `contrast`, which learns nothing, comes to on the episodes of the validation that was told before."""

    step: int
    miou: float
    fb_iou: float


Event = StepDone | Validated | Baseline


@dataclass(frozen=True)
class FitSummary:
    """What a run came to. `loss` is the mean over the last `RECENT_STEPS` of this call."""

    steps: int
    resumed_at: int
    finished: bool
    """False if it was asked to stop before its last step."""
    loss: float
    best_miou: float | None
    best_step: int | None
    baseline_miou: float | None
    """Of `Baseline`, if it was asked for and there was a validation."""
    seconds: float
    run_dir: Path
    waited_share: float | None = None
    """Part of this call's steps spent waiting for data, 0 to 1; without the first, for which nothing is read ahead."""
