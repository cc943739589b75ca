"""How a stage maps its work: in this process here, on Ray in `cluster.runner`, by the same contract; and read-ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Runner(Protocol):
    """Maps a function over items.

    `make_worker` is called once per process that does work and returns the function; it loads what every item needs
    (a backbone, an open store). `map` yields (item, result) as results come, in any order; every item once. An
    `HSNetError` raised by the function reaches the caller as itself. The function runs with one torch thread, because
    two threads sum in another order: results must not depend on how many processes share the machine. `items` is
    advanced only when a worker is free.
    """

    @property
    def workers(self) -> int:
        """Items worked on at a time."""
        ...

    def map(self, make_worker: Callable[[], Callable[[T], R]], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        """Yield (item, result) for every item."""
        ...


class SerialRunner:
    """Works in this process, in order: the default, and the one to debug with."""

    workers = 1

    def map(self, make_worker: Callable[[], Callable[[T], R]], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        """Yield (item, result) for every item; `make_worker` is not called when there is none."""
        worker = None
        for item in items:
            with one_torch_thread():
                if worker is None:
                    worker = make_worker()
                result = worker(item)
            yield item, result


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
    read: Callable[[T], R], items: Iterable[T], depth: int, thread: str
) -> Generator[tuple[T, R], None, None]:
    """Yield (item, read(item)) in order, read on a thread of that name while the caller uses what came before.

    At most `depth` items are read ahead of the one in use; 0 reads each when it is asked for, without a thread. An
    error is raised at the item it belongs to. Close it if it is not read to its end, so that reading stops.
    """
    if depth == 0:
        for item in items:
            yield item, read(item)
        return
    with ThreadPoolExecutor(1, thread_name_prefix=thread) as pool:
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
