"""How a running sweep looks: a table of its cases on a terminal, plain lines elsewhere; on stderr."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from commands.terminal import Progress
from pipeline.common.text import printable, time_text

if TYPE_CHECKING:
    from pipeline.sweep_status import CaseStatus

HEAD = ("case", "", "step", "loss", "best mIoU", "time left")
_LINE_CASES = 3


class SweepProgress:
    """`running` and `done` may be called from any thread, as often as you like."""

    def __init__(self, cases: int, quiet: bool = False) -> None:
        self.cases, self.quiet = cases, quiet
        self._done = 0
        self._running: Sequence[CaseStatus] = ()
        self._plain = Progress("sweep", "cases", quiet)
        self._live: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> SweepProgress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True)
            self._live = Live(self._table(), console=console, auto_refresh=False, transient=True)
            self._live.start()
        else:
            self._plain.__enter__()
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        else:
            self._plain.__exit__()

    def say(self, text: str) -> None:
        """A line of its own, above the table."""
        with self._lock:
            if self._live:
                self._live.console.print(text, markup=False, highlight=False)
            else:
                self._plain.say(text)

    def done(self, count: int) -> None:
        """So many cases are done."""
        self._done = count
        self._show()

    def running(self, cases: Sequence[CaseStatus]) -> None:
        """These run."""
        self._running = cases
        self._show()

    def _show(self) -> None:
        with self._lock:
            if self._live:
                self._live.update(self._table(), refresh=True)
            else:
                self._plain.update(self._done, self.cases, self._line())

    def _line(self) -> str:
        parts = [f"{printable(one.name)} {one.state} {_steps(one)}" for one in self._running[:_LINE_CASES]]
        more = len(self._running) - len(parts)
        return "; ".join([*parts, f"and {more} more"] if more else parts)

    def _table(self) -> Any:
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=f"{self._done} of {self.cases} cases done, {len(self._running)} running", title_justify="left"
        )
        for number, name in enumerate(HEAD):
            table.add_column(name, justify="right" if number > 1 else "left")
        for one in self._running:
            table.add_row(*map(escape, status_cells(one)))
        return table


def status_cells(one: CaseStatus) -> tuple[str, ...]:
    """What `HEAD` names."""
    return (
        printable(one.name),
        one.state,
        _steps(one),
        "-" if one.loss is None else f"{one.loss:.4f}",
        "-" if one.best is None else f"{one.best:.2f}",
        "?" if one.seconds_left is None else time_text(one.seconds_left),
    )


def _steps(one: CaseStatus) -> str:
    return f"{one.step:,}/{one.steps:,}"
