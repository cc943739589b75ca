"""Timing on a device where a way may fail: an error is a row of the result, not its end."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks import timing

T = TypeVar("T")
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What every part is given."""

    options: argparse.Namespace
    device: torch.device
    backbone: str

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def times(self, runs: Mapping[str, Callable[[], object]], repeats: int | None = None) -> Outcome:
        """Time several ways in turn, as `benchmarks.timing.alternate`; one that fails is left out and said."""
        left = dict(runs)
        failed: dict[str, str] = {}
        while left:
            guarded = {name: _Guarded(name, run, self.wait) for name, run in left.items()}
            broke = None
            try:
                many = self.options.repeats if repeats is None else repeats
                seconds = self.options.seconds
                return Outcome(timing.alternate(guarded, many, self.options.warmup, seconds, self.wait), failed)
            except _Broke as error:
                broke = error.name, error.reason
            failed[broke[0]] = broke[1]
            del left[broke[0]]
            release()
        return Outcome({}, failed)

    def rows(
        self,
        runs: Mapping[str, Callable[[], object]],
        value: Callable[[str, float], float] = lambda _, seconds: 1e3 * seconds,
        unit: str = "ms",
        repeats: int | None = None,
    ) -> dict[str, Row]:
        """`times` as rows by label: median and quartiles of `value(label, seconds)`, or why it failed."""
        outcome = self.times(runs, repeats)
        rows: dict[str, Row] = {}
        for name in runs:
            if name in outcome.failed:
                rows[name] = {"failed": outcome.failed[name]}
            else:
                found = timing.summary([value(name, seconds) for seconds in outcome.times[name].wall])
                rows[name] = {"value": found["median"], "q1": found["q1"], "q3": found["q3"], "unit": unit}
        return rows

    def measurement(self, work: str, title: str, rows: Mapping[str, Row], **facts: Any) -> dict[str, Any]:
        """A measurement that is a list of rows, as it is stored."""
        common = {"device": self.device.type, "backbone": self.backbone, "work": work, "title": title}
        return {**common, "image_size": self.options.size, **facts, "rows": dict(rows)}


@dataclass(frozen=True)
class Outcome:
    """Times of what ran, and why the others did not, by name."""

    times: dict[str, timing.Times]
    failed: dict[str, str]


class _Broke(Exception):
    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class _Guarded:
    def __init__(self, name: str, run: Callable[[], object], wait: Callable[[], None]) -> None:
        self.name, self.run, self.wait = name, run, wait

    def __call__(self) -> None:
        _, reason = attempt(lambda: (self.run(), self.wait()))
        if reason is not None:
            raise _Broke(self.name, reason)


def attempt(do: Callable[[], T]) -> tuple[T | None, str | None]:
    """(what `do` gives, None), or (None, why not). The error is let go: it would keep the tensors of its frames."""
    reason = None
    try:
        return do(), None
    except Exception as error:  # a compiler, a capture, a full memory: a finding, and other ways go on
        reason = why(error)
    release()
    return None, reason


def why(error: BaseException) -> str:
    """One line.

    >>> why(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."))
    'out of memory: CUDA out of memory. Tried to allocate 9 GiB.'
    >>> why(ValueError())
    'ValueError'
    """
    first = (str(error).strip().splitlines() or [""])[0][:240]
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError | MemoryError) else type(error).__name__
    return f"{kind}: {first}".removesuffix(": ")


def release() -> None:
    """Give freed memory back to the device, so that what comes next is not charged for it."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Memory:
    """What a way takes of a GPU beyond what was taken when this was made.

    The allocator's peak does not count a CUDA graph's private pool once the graph is captured: a replay allocates
    nothing. What is *reserved* does, and so does the difference of the device's free bytes, in which the libraries'
    own workspaces and all other processes are, too.

    Args:
        cuda: `torch.cuda`, or what stands for it in a test.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        release()
        cuda.synchronize(device)
        self.allocated, self.reserved = cuda.memory_allocated(device), cuda.memory_reserved(device)
        self.free = cuda.mem_get_info(device)[0]

    def begin(self) -> None:
        """Forget the peaks of building, compiling and trying out."""
        release()
        self.cuda.synchronize(self.device)
        self.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> dict[str, int]:
        """Bytes since `begin`: allocated and reserved at most, and how much less is free on the device now."""
        self.cuda.synchronize(self.device)
        return {
            "peak_bytes": self.cuda.max_memory_allocated(self.device) - self.allocated,
            "reserved_bytes": self.cuda.max_memory_reserved(self.device) - self.reserved,
            "device_bytes": self.free - self.cuda.mem_get_info(self.device)[0],
        }
