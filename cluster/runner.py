"""The runner of `pipeline.common.runner` on Ray: plain tasks, whose worker is cached in the process that runs them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import ray
import torch
from ray import cloudpickle

from hsnet.errors import ClusterError, HSNetError
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

    Tasks and not actors, because Ray repeats a task whose process or node died without any code here, and work is
    repeatable. The function is packed once per process, as `Runner` demands: `max_calls=0` keeps GPU processes alive
    between tasks. Results must be small; they pass through Ray's object store.
    """

    def __init__(self, workers: int, gpus: float = 0, cpus: float = 1) -> None:
        if workers < 1:
            raise ValueError(f"A Ray runner needs at least one worker, got {workers}.")
        self.workers = workers
        self.gpus = gpus
        self.cpus = cpus

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
        make_remote = ray.remote(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_calls=0,
            max_retries=ATTEMPTS - 1,
            scheduling_strategy="SPREAD",
        )
        task = make_remote(_run)
        key = uuid.uuid4().hex
        # In a list, so that Ray hands over the reference: only a process that has no worker yet fetches the bytes.
        packed = [ray.put(cloudpickle.dumps(make_worker))]
        running: dict[Any, T] = {}
        waiting = iter(items)
        try:
            _submit(task, key, packed, waiting, running, self.workers)
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                item = running.pop(done)
                try:
                    result = _result(done, item)
                except (HSNetError, ray.exceptions.RayTaskError) as error:
                    if on_failure is None:
                        raise
                    result = on_failure(item, _failed(error))
                _submit(task, key, packed, waiting, running, self.workers)  # before the caller takes its time
                yield item, result
        finally:
            # By force: a gentle cancel raises KeyboardInterrupt anywhere, which can leave a half-imported module in
            # a process that lives on. Whoever writes files does so atomically.
            for reference in running:
                ray.cancel(reference, force=True)


def _submit(task: Any, key: str, packed: list[Any], waiting: Iterator[T], running: dict[Any, T], limit: int) -> None:
    for item in islice(waiting, limit - len(running)):
        running[task.remote(key, packed, item)] = item


def _run(key: str, packed: list[Any], item: Any) -> tuple[bool, Any]:
    """(True, result), or (False, error) for an error of the user's: Ray would wrap it."""
    try:
        if key not in _workers:
            _workers.clear()  # one map at a time: let the previous one's backbone go
            torch.set_num_threads(1)
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
