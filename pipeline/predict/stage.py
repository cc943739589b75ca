"""The predict stage: heads fitted to annotated photos, and new photos -> their masks, overlays and soft maps.

No store is needed: the backbone runs once per photo. Features are used in float32, whatever precision a trained head
was trained on; 8-bit codes differ from them by less than one thousandth of a correlation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from hsnet.errors import ConfigError, DataError, HSNetError
from pipeline.common.out_of_memory import memory_told
from pipeline.common.runner import read_ahead
from pipeline.datasets.images import read_photo
from pipeline.datasets.queries import Queries, names_of
from pipeline.predict.asked import ASKED, Asked
from pipeline.predict.trust import Note, Watch
from pipeline.predict.writing import Result, Said, Task, Work, decisions_in

log = logging.getLogger(__name__)

PER_FOLDER = 10_000
"""Photos whose outputs lie in one folder; with more they are spread over subfolders, at most so many files in each."""
RESULTS = "results.jsonl"

LESS_MEMORY = "Use a smaller --image-size or --tile, or --device cpu."
KEPT = "Masks written so far are whole: the same command goes on from there."

_READ_AHEAD = 2


@dataclass(frozen=True)
class Prediction:
    """What was written for one query photo."""

    query: Path
    mask: Path
    """PNG of the photo's size as viewers show it: mode L, 0 background and 255 object; with several classes mode P,
    0 background and n the n-th class, or where classes may overlap the first class's mask of 0 and 255."""
    overlay: Path | None
    """JPEG of the photo with the object tinted and outlined; None if none was wanted."""
    object_share: float
    """Share of the pixels predicted as object of any class, 0 to 1."""
    classes: Mapping[str, Said] = field(default_factory=dict)
    """Class -> numbers, in the order of their numbers in the mask."""

    @property
    def sureness(self) -> float:
        """Of the least sure class, 0 to 1; 1 if nothing is known."""
        return min((said.sureness for said in self.classes.values() if said.sureness is not None), default=1.0)


@dataclass(frozen=True)
class PredictSummary:
    """What one call did. A line per photo is in `results` (`read_results`)."""

    results: Path
    """JSON lines, written as photos are done: query, mask, overlay, object_share, classes, kept; or query, error."""
    photos: int
    kept: int
    """Photos whose mask was there, made with the same heads, annotated photos and settings of the same photo."""
    unusable: int
    """Photos that could not be read."""
    shots: int
    """Annotated photos that the heads were fitted to."""
    heads: Mapping[str, str]
    """Class -> head."""
    seconds: float
    first_s: float
    """Seconds until the first result was there, fitting not counted."""
    notes: Mapping[str, tuple[Note, ...]]
    """Class -> why not to trust its masks, by those that were made now."""

    @property
    def written(self) -> tuple[Prediction, ...]:
        """All masks, from the file of results, in the order of that file."""
        return tuple(item for item in read_results(self.results) if isinstance(item, Prediction))

    @property
    def failed(self) -> tuple[tuple[Path, str], ...]:
        """(photo, reason) of those that could not be read, from the file of results."""
        return tuple(item for item in read_results(self.results) if not isinstance(item, Prediction))


Pipe = Callable[[Work, Iterator[Task]], Iterator[Result]]
"""Does the work for every task; results in any order. `cluster.predict.RayPipe` is one."""


def in_process(work: Work, tasks: Iterator[Task], ahead: int = _READ_AHEAD) -> Iterator[Result]:
    """One photo after the other, the next ones read ahead on a thread; with 0 none before it is asked for."""
    model = work.open()

    def read(task: Task) -> Result | Image.Image:
        try:
            return work.done_before(task) or read_photo(task.query)
        except HSNetError as error:
            return Result(task, error=str(error))

    with closing(read_ahead(read, tasks, ahead, "photos")) as found:
        for task, photo in found:
            if isinstance(photo, Result):
                yield photo
                continue
            try:
                yield work.write(task, photo, work.look(model, task.query, photo))
            except HSNetError as error:
                yield Result(task, error=str(error))


def predict(
    work: Work,
    queries: Sequence[Path],
    out_dir: Path,
    *,
    supports: Mapping[str, Sequence[str]],
    pipe: Pipe = in_process,
    coming: Iterator[Task] | None = None,
    asked: Asked | None = None,
    on_event: Callable[[int, int], None] | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> PredictSummary:
    """Find the classes in every query photo and write a mask, and what else is wanted, for each.

    What is there already, made with the same heads, annotated photos and settings of an unchanged photo, is kept: an
    interrupted call goes on when it is given again. What somebody accepted or corrected (`hsnet review`) stays, too.

    Args:
        work: the fitted heads with their network, and what to write.
        queries: photo files (`pipeline.datasets.queries.list_queries`).
        out_dir: made if missing. `NAME_mask.png` and `NAME_overlay.jpg` per query, NAME from the photo's name, made
            unique when two photos share it; files of other settings with the same names are replaced. More than
            `PER_FOLDER` photos are spread over subfolders. `results.jsonl` has a line per photo as it is done.
        supports: class -> names of the annotated photos that show it.
        pipe: does the work; in this process by default.
        coming: tasks as they come (`pipeline.predict.watching.new_tasks`), instead of those of `queries`.
        asked: kept in the folder, so that `hsnet review` predicts as this call.
        on_event: called with (photos done, photos in all).
        on_result: called with every result, once its files are there.

    A query that cannot be read is logged and listed in the results, and the others are done.

    Raises:
        DataError: there is no query.
        ConfigError: out_dir is a file, or the folder that a query lies in.
        DeviceMemoryError: a photo takes more memory than there is; the masks before it are whole.
    """
    started = time.monotonic()
    if not queries and coming is None:
        raise DataError("There is no query photo")
    _check_out_dir(out_dir, queries)
    out_dir.mkdir(parents=True, exist_ok=True)
    said = decisions_in(out_dir)
    if asked is None:
        (out_dir / ASKED).unlink(missing_ok=True)  # of another call
    else:
        asked.write(out_dir)
    work = replace(
        work, decided=frozenset(os.path.abspath(photo) for photo, word in said.items() if word != "rejected")
    )
    first: list[float] = []
    watches = {name: Watch(supports[name]) for name in work.answering.names}
    done = 0

    def watched(results: Iterator[Result]) -> Iterator[Result]:
        nonlocal done
        for result in results:
            done += 1
            if not first:
                first.append(time.monotonic() - started)
            for name, seen in result.seen.items():
                watches[name].add(str(result.task.query), seen, result.classes[name].sureness or 0.0)
            if on_result and not result.error:
                on_result(result)
            yield result

    tasks = tasks_of(queries, out_dir, work.outputs.overlay) if coming is None else coming
    found = watched(pipe(work, tasks))
    with memory_told(LESS_MEMORY, KEPT):
        kept, unusable = write_results(found, out_dir / RESULTS, len(queries), on_event)
    return PredictSummary(
        out_dir / RESULTS,
        done,
        kept,
        unusable,
        len({photo for names in supports.values() for photo in names}),
        {one.name: one.fitted.name for one in work.answering.classes},
        time.monotonic() - started,
        first[0] if first else 0.0,
        {name: tuple(notes) for name, watch in watches.items() if (notes := watch.notes())},
    )


def write_results(
    found: Iterator[Result], path: Path, photos: int, on_event: Callable[[int, int], None] | None = None
) -> tuple[int, int]:
    """Write a line per result as it comes, and keep none; returns how many were kept and how many unusable."""
    path.unlink(missing_ok=True)  # a link is replaced, not followed
    done = kept = unusable = 0
    with path.open("x", encoding="utf-8") as lines, closing(_of(found)) as results:
        for result in results:
            done += 1
            kept += result.kept
            if result.error:
                log.warning("%s", result.error)
                unusable += 1
            lines.write(json.dumps(line_of(result)) + "\n")
            lines.flush()
            if on_event:
                on_event(done, max(done, photos))
    return kept, unusable


def _of(results: Iterator[Result]) -> Generator[Result, None, None]:
    """The same, to be closed: whatever pipe it is, its work ends with it."""
    yield from results


def tasks_of(queries: Sequence[Path], out_dir: Path, overlay: bool) -> Iterator[Task]:
    """Photos and where their masks go, one by one."""
    for query, name in zip(queries, names_of(queries), strict=True):
        yield Task(query, out_dir / subfolder(name, len(queries)), name, overlay)


def subfolder(name: str, photos: int) -> str:
    """Where outputs of a name go among so many photos: "" for few; otherwise one of 256, or of 65,536, by its digest.

    >>> subfolder("dog", 4), subfolder("dog", 100_000), subfolder("dog", 100_000_000)
    ('', 'cd', 'cd63')
    """
    digits = 0 if photos <= PER_FOLDER else 2 if photos <= 100 * PER_FOLDER else 4
    return hashlib.sha256(name.encode()).hexdigest()[:digits]


def line_of(result: Result) -> dict[str, Any]:
    """What the file of results says of a photo."""
    task = result.task
    if result.error:
        return {"query": str(task.query), "error": result.error}
    return {
        "query": str(task.query),
        "mask": str(task.mask),
        "overlay": task.overlay and str(task.overlay),
        "object_share": result.object_share,
        "classes": {name: said.to_json() for name, said in result.classes.items()},
        "kept": result.kept,
    }


def read_results(path: Path) -> Iterator[Prediction | tuple[Path, str]]:
    """Predictions, and (photo, reason) of those that could not be used, from a file of results; one at a time.

    Raises:
        DataError: it cannot be read, or is no such file.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                said = json.loads(line)
                if "error" in said:
                    yield Path(said["query"]), str(said["error"])
                else:
                    overlay = said["overlay"] and Path(said["overlay"])
                    classes = {name: Said.of(one) for name, one in said.get("classes", {}).items()}
                    share = float(said["object_share"])
                    yield Prediction(Path(said["query"]), Path(said["mask"]), overlay, share, classes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of results of `hsnet predict`, or it is cut off: {error}") from error


def _check_out_dir(out_dir: Path, queries: Sequence[Path]) -> None:
    if out_dir.exists() and not out_dir.is_dir():
        raise ConfigError(f"The output {out_dir} is a file; give a folder")
    parents = queries.folders if isinstance(queries, Queries) else {query.parent for query in queries}
    if any(parent.resolve() == out_dir.resolve() for parent in parents):
        raise ConfigError(
            f"The output folder {out_dir} is a query's own folder: its masks would be taken for photos next time. "
            "Give another folder. Nothing was written."
        )
