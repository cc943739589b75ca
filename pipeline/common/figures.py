"""What training steps come to, kept on the device that computes until somebody has to know.

To look at a number makes the host wait until the device has computed it, and the device then waits for the host. So the
figures of several steps are read together, with one message between the ranks and one copy to the host.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.common.process_group import Ranks

READ_STEPS = 20
"""Steps that are read together on a device that does not share the host's memory."""


@dataclass(frozen=True)
class StepFigures:
    """A step that was made."""

    step: int
    """Its number, counted from 1."""
    loss: float
    """Sum of the losses of all ranks."""
    gradient: float
    """Norm of the gradient over all parameters."""
    finite: bool
    """Whether both are numbers on every rank."""
    seconds: float
    waited: float
    """Seconds of them that were spent waiting for data."""


@dataclass
class Unread:
    """Figures of steps that nobody has looked at yet. Every rank adds and reads at the same steps."""

    ranks: Ranks
    _steps: list[tuple[int, float, float]] = field(default_factory=list)
    _losses: list[Tensor] = field(default_factory=list)
    _gradients: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, loss: Tensor, gradient: Tensor, seconds: float, waited: float) -> None:
        """Note a step without waiting for it; `loss` and `gradient` are numbers on the device, () each.

        Args:
            loss: sum of this rank's losses.
            gradient: norm of the gradient, which the ranks have averaged.
        """
        self._steps.append((step, seconds, waited))
        self._losses.append(loss)
        self._gradients.append(gradient)

    def read(self, stop: bool = False) -> tuple[list[StepFigures], bool]:
        """Figures of the steps since the last reading, in order, and whether any rank wants to stop.

        Seconds of steps that are read together are their mean: one by one they would say when the device was given
        work, not how long it took.
        """
        started = time.perf_counter()
        count = len(self)
        losses, gradients = torch.stack(self._losses), torch.stack(self._gradients).to(self._losses[0].dtype)
        bad = (~(losses.isfinite() & gradients.isfinite())).to(losses.dtype)
        shared = self.ranks.sum(torch.cat([losses, bad, losses.new_full((1,), float(stop))]))
        values = torch.cat([shared, gradients]).tolist()
        seconds = (time.perf_counter() - started + sum(seconds for _, seconds, _ in self._steps)) / count
        waited = sum(waited for _, _, waited in self._steps) / count
        found = [
            StepFigures(step, loss, gradient, not bad and math.isfinite(loss), seconds, waited)
            for (step, *_), loss, bad, gradient in zip(
                self._steps, values[:count], values[count : 2 * count], values[2 * count + 1 :], strict=True
            )
        ]
        self._steps, self._losses, self._gradients = [], [], []
        return found, values[2 * count] > 0
