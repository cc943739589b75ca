"""How a stage maps its work: in this process here, on Ray in `cluster.runner`, by the same contract; and read-ahead."""

from __future__ import annotations

import gc
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from hsnet.errors import HSNetError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Failed:
    """Why an item has no result: given to the `on_failure` of `Runner.map`."""

    reason: str
    """One line or, of an `HSNetError`, its message: what was raised, or how the process ended."""
    detail: str
    """Traceback of what nobody foresaw, else ""."""
    place: str
    """Where it happened and where to read on; "" in this process."""


class Runner(Protocol):
    """Maps a function over items.

    `make_worker` is called once per process that does work and returns the function; it loads what every item needs
    (a backbone, an open store). `map` yields (item, result) as results come, in any order; every item once. An
    `HSNetError` raised by the function reaches the caller as itself. The function runs with one torch thread, because
    two threads sum in another order: results must not depend on how many processes share the machine. `items` is
    advanced only when a worker is free.

    With `on_failure` an item that fails, for whatever reason, does not end the others: its result is what `on_failure`
    makes of it. The worker of its process is made anew for the next item, without what the failed one had on a GPU.
    """

    @property
    def workers(self) -> int:
        """Items worked on at a time."""
        ...

    def map(
        self,
        make_worker: Callable[[], Callable[[T], R]],
        items: Iterable[T],
        on_failure: Callable[[T, Failed], R] | None = None,
    ) -> Iterator[tuple[T, R]]:
        """Yield (item, result) for every item."""
        ...


class SerialRunner:
    """Works in this process, in order: the default, and the one to debug with."""

    workers = 1

    def map(
        self,
        make_worker: Callable[[], Callable[[T], R]],
        items: Iterable[T],
        on_failure: Callable[[T, Failed], R] | None = None,
    ) -> Iterator[tuple[T, R]]:
        """Yield (item, result) for every item; `make_worker` is not called when there is none."""
        worker = None
        for item in items:
            try:
                with one_torch_thread():
                    if worker is None:
                        worker = make_worker()
                    result = worker(item)
            except Exception as error:
                if on_failure is None:
                    raise
                failed = failure(error)
                worker = None
            else:
                yield item, result
                continue
            free_gpu()
            yield item, on_failure(item, failed)


def failure(error: Exception, place: str = "") -> Failed:
    """What is told of an error."""
    if isinstance(error, HSNetError):
        return Failed(str(error), "", place)
    first = (str(error).strip().splitlines() or [""])[0]
    detail = "".join(traceback.format_exception(error))
    return Failed(f"{type(error).__name__}: {first}".rstrip(": "), detail, place)


def free_gpu() -> None:
    """Give back what freed tensors of this process still hold of a GPU: another case may need it."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def in_groups(
    items: Sequence[T], seconds: Callable[[], float | None], wanted: float, workers: int
) -> Iterator[tuple[T, ...]]:
    """Items for `Runner.map` in groups of about `wanted` seconds of work, each chosen when a worker is free.

    A worker that is given several items can read or write one while it computes another.

    Args:
        seconds: how long one item takes, as known by now; None gives them out one by one.
        workers: groups worked on at a time. Towards the end groups get smaller, so that all workers end together.
    """
    given = 0
    while given < len(items):
        known = seconds()
        fits = int(wanted / max(known, 1e-9)) if known is not None else 1
        fair = (len(items) - given) // (2 * workers - 1)
        group = tuple(items[given : given + max(1, min(fits, fair))])
        yield group
        given += len(group)


def read_ahead(
    read: Callable[[T], R],
    items: Iterable[T],
    depth: int,
    thread: str,
    threads: int = 1,
    begin: Callable[[], None] = lambda: None,
) -> Generator[tuple[T, R], None, None]:
    """Yield (item, read(item)) in order, read on threads of that name while the caller uses what came before.

    At most `depth` items are read ahead of the one in use; 0 reads each when it is asked for, without a thread. An
    error is raised at the item it belongs to, whatever was read meanwhile. Close it if it is not read to its end, so
    that reading stops.

    Args:
        threads: items read at a time, each by one thread; more than `depth` would have nothing to do. `read` must be
            safe in so many threads. `items` is advanced by the caller alone.
        begin: called first on every thread.
    """
    if depth == 0:
        for item in items:
            yield item, read(item)
        return
    with ThreadPoolExecutor(max(1, min(threads, depth)), thread_name_prefix=thread, initializer=begin) as pool:
        waiting: deque[tuple[T, Future[R]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(read, item)))
                if len(waiting) > depth:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch with one thread per operation inside the block, and restore the number after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
