"""The runner of `pipeline.common.runner` on Ray: the worker is cached in the processes that do the items."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import ray
import torch
from ray import cloudpickle

from cluster.crew import Actors, Crew, Tasks
from hsnet.errors import ClusterError, HSNetError
from hsnet.numerics import set_numerics
from pipeline.common.runner import Failed, failure, free_gpu

T = TypeVar("T")
R = TypeVar("R")

ATTEMPTS = 8
"""Times an item is started if the process or machine that works on it dies."""

_workers: dict[str, Callable[[Any], Any]] = {}  # in a Ray worker process: the worker of the current `map`


class RayRunner:
    """Maps a function over items on the Ray of the current `cluster.session`.

    Args:
        workers: items worked on at a time.
        gpus: GPUs (or a share of one) per item.
        cpus: CPUs (or a share of one) per item; it computes with one thread all the same.
        actors: whether actors do the items, or plain tasks (`cluster.crew`); None: actors where a GPU is held.

    An item whose process or node died is done by another one: work is repeatable. The function is unpacked once per
    process, as `Runner` demands. Results must be small; they pass through Ray's object store.
    """

    def __init__(self, workers: int, gpus: float = 0, cpus: float = 1, actors: bool | None = None) -> None:
        if workers < 1:
            raise ValueError(f"A Ray runner needs at least one worker, got {workers}.")
        self.workers = workers
        self.gpus = gpus
        self.cpus = cpus
        self.actors = gpus > 0 if actors is None else actors
        self._seats: Actors[Any] | None = None

    def map(
        self,
        make_worker: Callable[[], Callable[[T], R]],
        items: Iterable[T],
        on_failure: Callable[[T, Failed], R] | None = None,
    ) -> Iterator[tuple[T, R]]:
        """Yield (item, result) as results come.

        Raises, without `on_failure`; with it an item that meets any of this but the lack of a session is one failure:
            HSNetError: raised by the function, as itself; work in progress is cancelled.
            ClusterError: no session, an item's processes died `ATTEMPTS` times, or Ray itself broke.
        """
        if not ray.is_initialized():
            raise ClusterError("Ray is not running. Use a RayRunner inside `with cluster.session.session(...)`.")
        # In a list, so that Ray hands over the reference: only a process that has no worker yet fetches the bytes.
        packed = [ray.put(cloudpickle.dumps(make_worker))]
        crew: Crew[T] = self._crew((uuid.uuid4().hex, packed))
        waiting = iter(items)
        try:
            self._fill(crew, waiting)
            while crew.busy():
                item, done = crew.next()
                try:
                    result = _result(done, item)
                except (HSNetError, ray.exceptions.RayTaskError) as error:
                    if on_failure is None:
                        raise
                    result = on_failure(item, _failed(error))
                self._fill(crew, waiting)  # before the caller takes its time
                yield item, result
        finally:
            crew.close()

    def close(self) -> None:
        """End what still holds a share of a device. The end of the session does it, too."""
        if self._seats is not None:
            self._seats.end()
            self._seats = None

    def _crew(self, words: tuple[Any, ...]) -> Crew[Any]:
        share = {"CPU": self.cpus, "GPU": self.gpus}
        if not self.actors:
            return Tasks(_run, words, share, ATTEMPTS)
        self._seats = self._seats or Actors(share, self.workers)
        return self._seats.begin(_run, words, ATTEMPTS)

    def _fill(self, crew: Crew[T], waiting: Iterator[T]) -> None:
        for item in islice(waiting, self.workers - crew.busy()):
            crew.give(item)


def _run(key: str, packed: list[Any], item: Any) -> tuple[bool, Any]:
    """(True, result), or (False, error) for an error of the user's: Ray would wrap it."""
    try:
        if key not in _workers:
            _workers.clear()  # one map at a time: let the previous one's backbone go
            torch.set_num_threads(1)
            set_numerics()
            _workers[key] = cloudpickle.loads(ray.get(packed[0]))()
        return True, _workers[key](item)
    except HSNetError as error:
        return False, error
    except Exception:
        _workers.clear()
        free_gpu()
        raise


def _failed(error: Exception) -> Failed:
    """Of a bug or a lack of memory in the function: the error itself, and where Ray keeps what its process said."""
    if not isinstance(error, ray.exceptions.RayTaskError):
        return failure(error)
    cause = error.cause if isinstance(error.cause, Exception) else error
    told = failure(cause)
    found = re.search(r"pid=(\d+), ip=([^,)\s]+)", str(error))  # the classes that Ray makes of causes do not keep them
    place = f"process {found[1]} on {found[2]}; its log is worker-*-{found[1]}.err in Ray's logs there" if found else ""
    return Failed(told.reason, str(error), place)


def _result(reference: Any, item: object) -> Any:
    try:
        worked, value = ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise  # a bug in the function; Ray shows its traceback
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ClusterError(
            f"Ray lost the work on item {item!r} for good, after up to {ATTEMPTS} attempts: {lines[0]} Often the "
            f"machine ran out of memory: use fewer workers. Run the same command again to continue."
        ) from error
    if not worked:
        raise value
    return value
