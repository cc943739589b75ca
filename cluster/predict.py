"""Prediction over many photos as a pipeline of Ray Data: decoding on CPUs, the model on actors, encoding on CPUs."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from ray import cloudpickle

from hsnet.errors import ClusterError, HSNetError
from hsnet.numerics import set_numerics
from pipeline.common.out_of_memory import memory_told
from pipeline.common.runner import one_torch_thread
from pipeline.datasets.images import read_photo
from pipeline.predict.stage import KEPT, LESS_MEMORY
from pipeline.predict.writing import Result, Task, Work

GROUP = 16
"""Photos that go through the pipeline together: what one task decodes, what the model gets, what one task writes."""

WINDOW = 65_536
"""Photos of one pipeline; the next ones get another, so that nothing grows with the number of photos."""

WAIT_S = 60.0
"""Seconds that a file system over the network may take to show a file that another machine wrote."""

Packed = dict[str, Any]
"""A batch of Ray Data: column "data" with pickled lists."""


@dataclass(frozen=True)
class RayPipe:
    """A `pipeline.predict.stage.Pipe` on the Ray of the current `cluster.session`.

    Photos are read, and masks written, on all machines: photos and output folder must be on a disk that all share.

    Args:
        actors: models at a time, each with one CPU or the given share of a GPU.
        gpus: GPUs per model.
    """

    actors: int
    gpus: float = 0

    def __call__(self, work: Work, tasks: Iterator[Task]) -> Iterator[Result]:
        """Yield results as they come.

        Raises:
            ClusterError: no CPU is left for decoding, Ray broke, or masks are written where this process does not see
                them.
        """
        import ray
        import ray.data

        if not ray.is_initialized():
            raise ClusterError("Ray is not running. Use a RayPipe inside `with cluster.session.session(...)`.")
        cpus = ray.cluster_resources().get("CPU", 0)
        if cpus < self.actors + 1:
            raise ClusterError(
                f"{self.actors} models and one decoder need {self.actors + 1} CPUs, Ray has {cpus:g}. Use --workers "
                f"{max(1, int(cpus) - 1)}. Nothing was written."
            )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        # By reference: only a process that has none yet fetches the head and the backbone.
        packed = ray.put(cloudpickle.dumps(work))
        seen = False
        while window := list(islice(tasks, WINDOW)):
            groups = [window[first : first + GROUP] for first in range(0, len(window), GROUP)]
            items = [{"data": pickle.dumps(group)} for group in groups]
            photos = ray.data.from_items(items, override_num_blocks=len(items))
            options = {"batch_size": 1, "num_cpus": 0.5}
            decoded = photos.map_batches(_stage(_decode, packed), **options)
            masks = decoded.map_batches(
                _Model,
                fn_constructor_args=([packed],),
                batch_size=1,
                num_cpus=1,
                num_gpus=self.gpus or None,
                compute=ray.data.ActorPoolStrategy(size=self.actors),
            )
            written = masks.map_batches(_stage(_write, packed), **options)
            try:
                for batch in written.iter_batches(batch_size=None, batch_format="numpy"):
                    for data in batch["data"]:
                        for result in pickle.loads(data):
                            seen = seen or _require_seen(work, result)
                            yield result
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise ClusterError(
                    f"Prediction on Ray broke: {lines[-1]} Masks written so far are whole: the same command goes on."
                ) from error


def _stage(function: Callable[[Work, list[Any]], list[Any]], packed: Any) -> Callable[[Packed], Packed]:
    """A stage of Ray Data that works in any process; `packed` goes along as a reference."""
    references = [packed]

    def stage(batch: Packed) -> Packed:
        work = _work(references)
        return {"data": np.array([pickle.dumps(function(work, pickle.loads(data))) for data in batch["data"]], object)}

    return stage


_works: dict[Any, Work] = {}  # in a Ray worker process: that of the current call


def _work(references: list[Any]) -> Work:
    import ray

    (reference,) = references
    if reference not in _works:
        _works.clear()
        _works[reference] = cloudpickle.loads(ray.get(reference))
    return _works[reference]


def _decode(work: Work, tasks: list[Task]) -> list[Any]:
    """Results of tasks that are done or cannot be done; (task, squashed photo, its (H, W)) of the others."""
    found: list[Any] = []
    for task in tasks:
        try:
            done = work.done_before(task)
            if done is not None:
                found.append(done)
                continue
            photo = read_photo(task.query)
            found.append((task, work.reading.squash(photo), (photo.height, photo.width)))
        except HSNetError as error:
            found.append(Result(task, error=str(error)))
    return found


class _Model:
    """The model on its actor: adds what the heads answer, at their own size."""

    def __init__(self, references: list[Any]) -> None:
        set_numerics()
        with memory_told(LESS_MEMORY, KEPT):
            self.model = _work(references).open()

    def __call__(self, batch: Packed) -> Packed:
        return {"data": np.array([pickle.dumps(self._answers(pickle.loads(data))) for data in batch["data"]], object)}

    def _answers(self, found: list[Any]) -> list[Any]:
        left = [one for one in found if not isinstance(one, Result)]
        with one_torch_thread(), memory_told(LESS_MEMORY, KEPT):
            read = self.model.reader.read_squashed([photo for _, photo, _ in left], [size for _, _, size in left])
            answers = [(task, self.model.answer(features)) for (task, _, _), features in zip(left, read, strict=True)]
        new = iter(answers)
        return [one if isinstance(one, Result) else next(new) for one in found]


def _write(work: Work, found: list[Any]) -> list[Result]:
    results = []
    for one in found:
        if isinstance(one, Result):
            results.append(one)
            continue
        task, answers = one
        try:
            results.append(work.write(task, read_photo(task.query), answers))
        except HSNetError as error:
            results.append(Result(task, error=str(error)))
    return results


def _require_seen(work: Work, result: Result) -> bool:
    """Whether a mask was seen here. Raises ClusterError if one was written and does not show up."""
    if result.error:
        return False
    path = next(iter(work.masks_of(result.task).values()))
    end = time.monotonic() + WAIT_S
    while not path.exists():
        if time.monotonic() > end:
            raise ClusterError(
                f"{path} was written by a worker and cannot be seen here: the output folder must be on a "
                f"disk that all machines share. Give such a folder."
            )
        time.sleep(0.5)
    return True
