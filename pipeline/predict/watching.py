"""New photos of a folder, as they come: what is predicted again and again until somebody stops it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.predict.stage import tasks_of
from pipeline.predict.writing import Task

Stamp = tuple[int, int]
"""Bytes and time of change of a file, ns."""


def new_tasks(
    photos: Callable[[], Sequence[Path]],
    out_dir: Path,
    overlay: bool,
    stopped: Callable[[], bool],
    seconds: float = 2.0,
) -> Iterator[Task]:
    """Tasks of photos that are there, then of those that come or change.

    A photo is taken when it is the same at two looks: until then somebody may still be writing it. It is given again
    when it changes, or when others that came made its output get another name.

    Args:
        photos: lists them now.
        out_dir, overlay: as `pipeline.predict.stage.tasks_of` takes them.
        stopped: asked between photos; true ends it.
        seconds: between two looks.
    """
    done: dict[tuple[Path, str], Stamp] = {}
    before: dict[Path, Stamp] = {}
    while not stopped():
        now: dict[Path, Stamp] = {}
        for task in tasks_of(photos(), out_dir, overlay):
            stamp = stamp_of(task.query)
            if stamp is None:
                continue
            now[task.query] = stamp
            if stamp == before.get(task.query) and done.get((task.query, task.name)) != stamp:
                done[task.query, task.name] = stamp
                yield task
                if stopped():
                    return
        before = now
        end = time.monotonic() + seconds
        while time.monotonic() < end and not stopped():
            time.sleep(min(0.1, seconds))


def stamp_of(path: Path) -> Stamp | None:
    """Of a file; None if it is gone."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns
