"""Paths, sizes and times as text for people."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


def printable(path: Path | str) -> str:
    """A path that is safe to print: control characters and bytes that are no text are shown as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size_text(nbytes: float) -> str:
    """1536 -> '1.5 KB' (powers of 1000, as disks are sold)."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def time_text(seconds: float) -> str:
    """75.3 -> '1:15'; below ten seconds with one decimal, '4.2 s'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What an error adds after a name that is not known: the nearest of the known ones, or nothing.

    >>> did_you_mean("learning_rte", ["seed", "learning_rate"])
    "; did you mean 'learning_rate'?"
    >>> did_you_mean("speed", ["kernel"])
    ''
    """
    near = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
