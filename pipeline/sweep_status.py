"""What the cases of a sweep tell while they run, and how they hear that they shall stop: small files in its folder.

Whoever shares the folder shares them, on whichever machine a case runs. They are there as long as the sweep runs:

out/.sweep/
├── stop              cases that see it save and end
└── NAME.json         where a case stands, at most `TOLD_SECONDS` old while it trains
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

TOLD_SECONDS = 2.0
"""Seconds between two words of a case."""
STOP_SECONDS = 1.0
"""Seconds between two looks for the wish to stop."""
_RECENT = 20


@dataclass(frozen=True)
class CaseStatus:
    """Where a case stands."""

    name: str
    state: Literal["training", "testing"]
    step: int
    """Optimiser steps done, or episodes tested."""
    steps: int
    loss: float | None
    """Mean of the last steps; None in a test."""
    best: float | None
    """Best validation mIoU of this call, percent."""
    seconds_left: float | None
    """Of training, without validations, or of the test."""


class Board:
    """The files of a sweep that runs in a folder. It can be sent to other processes."""

    def __init__(self, out: Path) -> None:
        self.path = out.absolute() / ".sweep"
        self._looked, self._stop = 0.0, False

    def open(self) -> None:
        """Begin anew: what a killed sweep left is forgotten. Raises OSError."""
        self.close()
        self.path.mkdir(parents=True)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def ask_to_stop(self) -> None:
        """Tell all cases. Raises OSError."""
        (self.path / "stop").touch()

    def stop_wanted(self) -> bool:
        """Whether somebody did; as of at most `STOP_SECONDS` ago."""
        now = time.monotonic()
        if not self._stop and now - self._looked >= STOP_SECONDS:
            self._looked, self._stop = now, (self.path / "stop").exists()
        return self._stop

    def tell(self, status: CaseStatus) -> None:
        """Leave word. A folder that cannot be written costs the view, not the case."""
        place = self.path / f"{status.name}.json"
        partial = place.with_suffix(f".{os.getpid()}.partial")
        with suppress(OSError):
            partial.write_text(json.dumps(asdict(status)))
            partial.replace(place)

    def forget(self, name: str) -> None:
        """A case has ended."""
        with suppress(OSError):
            (self.path / f"{name}.json").unlink()

    def read(self, names: Iterable[str]) -> list[CaseStatus]:
        """Of those cases that run, in the order of their names here."""
        found = []
        for name in names:
            with suppress(OSError, ValueError, TypeError):
                found.append(CaseStatus(**json.loads((self.path / f"{name}.json").read_text())))
        return found


class Teller:
    """Turns the events of one case into words on the board, none sooner than `TOLD_SECONDS` after the last."""

    def __init__(self, board: Board, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.board, self.name, self.clock = board, name, clock
        self._told = -math.inf
        self._losses: deque[float] = deque(maxlen=_RECENT)
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._best: float | None = None
        self._test_began = 0.0, 0
        self._tested: float = math.inf

    def step(self, step: int, steps: int, loss: float, seconds: float) -> None:
        """An optimiser step was made."""
        self._losses.append(loss)
        self._seconds.append(seconds)
        loss, left = sum(self._losses) / len(self._losses), (steps - step) * median(self._seconds)
        self._tell(CaseStatus(self.name, "training", step, steps, loss, self._best, left))

    def validated(self, miou: float) -> None:
        """A validation was made."""
        self._best = miou if self._best is None else max(self._best, miou)

    def tested(self, done: int, episodes: int) -> None:
        """Episodes were tested."""
        now = self.clock()
        if done <= self._tested:  # the first that is heard of a test, which may go on from an earlier call's episodes
            self._test_began = now, done
        (began, before), self._tested = self._test_began, done
        left = (now - began) / (done - before) * (episodes - done) if done > before else None
        self._tell(CaseStatus(self.name, "testing", done, episodes, None, self._best, left))

    def _tell(self, status: CaseStatus) -> None:
        now = self.clock()
        if now - self._told >= TOLD_SECONDS:
            self._told = now
            self.board.tell(status)
