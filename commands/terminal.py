"""How results, progress and notes look on a terminal, in a log file and to a program reading JSON.

Results are for stdout; notes and progress go to stderr. Nothing heavy is imported, and rich only for a real terminal.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.common.text import printable, time_text

PLAIN_PROGRESS_S = 5.0
"""Seconds between two progress lines when stderr is not a terminal; more on long runs, to keep log files short."""


def plain(value: Any) -> Any:
    """Anything a stage returns, as what JSON can hold. NaN and infinity become null: JSON has neither."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return printable(value)
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), left: int = 1) -> str:
    """Columns of text; the first `left` of them to the left, the others to the right."""
    every = [list(head), *map(list, rows)] if head else [list(row) for row in rows]
    widths = [max(len(row[column]) for row in every) for column in range(len(every[0]))]
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in every
    ]
    if head:
        lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def fact_lines(facts: Mapping[str, str]) -> str:
    """One `name  value` line each, the values below each other."""
    width = max(map(len, facts)) + 2
    return "\n".join(f"{name.ljust(width)}{value}" for name, value in facts.items())


class Progress:
    """A bar on a terminal, a plain line every few seconds elsewhere; on stderr in any case.

    `update(done, total, note)` may be called as often as you like.
    """

    def __init__(self, what: str, unit: str, quiet: bool = False) -> None:
        self.what, self.unit, self.quiet = what, unit, quiet
        self._started = self._last = time.monotonic()
        self._first: int | None = None
        self._shown = -1
        self._state: tuple[int, int | None, str] = (0, None, "")
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[facts]}"),
                console=Console(stderr=True),
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=None, facts="starting")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        elif not self.quiet and self._first is not None and self._state[0] != self._shown:
            self._print_line()

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Show that `done` of `total` units are done. The rate counts what was done since the first call."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._started, self._last = done, now, now
        self._state = (done, total, note)
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, facts=self._facts())
        elif not self.quiet and now - self._last >= max(PLAIN_PROGRESS_S, (now - self._started) / 20):
            self._print_line()
            self._last = now

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def _facts(self) -> str:
        done, total, note = self._state
        seconds = time.monotonic() - self._started
        new = done - (self._first or 0)
        facts = [f"{done}/{total} {self.unit}" if total else f"{done} {self.unit}"]
        if new > 0 and seconds > 0.5:
            slow = new < seconds  # then a rate would be 0.3, and say nothing
            one = self.unit.removesuffix("s")
            facts.append(f"{seconds / new:.1f} s per {one}" if slow else f"{new / seconds:.1f} {self.unit}/s")
            if total and done < total:
                facts.append(f"{time_text((total - done) * seconds / new)} left")
        return ", ".join([*facts, note] if note else facts)

    def _print_line(self) -> None:
        self._shown = self._state[0]
        print(f"{self.what}: {self._facts()}", file=sys.stderr, flush=True)


class _Lines(logging.Formatter):
    """`Warning: text` for warnings and worse, the bare text for notes."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno < logging.WARNING else f"{record.levelname.capitalize()}: {text}"


def set_up_logging(quiet: bool = False) -> None:
    """Our own notes and warnings as lines on stderr; other packages' from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for room in ("cli", "cluster", "commands", "hsnet", "pipeline"):
        logging.getLogger(room).setLevel(logging.WARNING if quiet else logging.INFO)
