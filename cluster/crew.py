"""Who does the items of a `cluster.runner` map: tasks of Ray or, where a device is held, one actor per share of it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import ray

from cluster import nodes

T = TypeVar("T")

SILENT_SECONDS = 30.0
"""How long nothing may come before that is said."""

log = logging.getLogger(__name__)


class Crew(Protocol[T]):
    """Works on items for one map at a time."""

    def give(self, item: T) -> None:
        """Take one more item."""
        ...

    def busy(self) -> int:
        """Items that were given and have not come back."""
        ...

    def next(self) -> tuple[T, Any]:
        """An item that is done, and the reference of its result; of its failure, after the last attempt."""
        ...

    def close(self) -> None:
        """End what is in progress, by force: a gentle cancel raises KeyboardInterrupt anywhere, which can leave a
        half-imported module in a process that lives on. Whoever writes files does so atomically."""
        ...


class Tasks(Generic[T]):
    """Tasks and not actors, because Ray repeats a task whose process or node died without any code here.

    Args:
        run: what a task does with the item, after `words`.
        share: CPUs and GPUs of each, by Ray's names.
        attempts: times an item is started if its process dies.
    """

    def __init__(self, run: Callable[..., Any], words: Sequence[Any], share: dict[str, float], attempts: int) -> None:
        make = ray.remote(
            num_cpus=share["CPU"],
            num_gpus=share["GPU"],
            max_calls=0,  # otherwise a process that had a GPU ends after its task
            max_retries=attempts - 1,
            scheduling_strategy="SPREAD",
        )
        self._task, self._words, self._share = make(run), words, share
        self._running: dict[Any, T] = {}

    def give(self, item: T) -> None:
        self._running[self._task.remote(*self._words, item)] = item

    def busy(self) -> int:
        return len(self._running)

    def next(self) -> tuple[T, Any]:
        done = first_done(list(self._running), self._share)
        return self._running.pop(done), done

    def close(self) -> None:
        for reference in self._running:
            ray.cancel(reference, force=True)
        self._running.clear()


class Seat:
    """An actor's process: it keeps its share of the device, and what it has loaded there, from item to item."""

    def ready(self) -> None:
        """Answers when the process is there."""

    def do(self, run: Callable[..., Any], *words: Any) -> Any:
        return run(*words)


class Actors(Generic[T]):
    """One process for each share of a device.

    Ray gives a task to any of its idle processes and starts more when it likes; each that has had a GPU keeps a CUDA
    context and a network there, whoever has the share now. Actors are as many as there are shares. They stay for the
    next map, until the session ends. Ray would start a lost one again only where its share is free, and its item would
    wait for that; so the item goes to another one here, and a new actor is asked for beside.

    Args:
        share: as of `Tasks`.
        most: actors at most.
    """

    def __init__(self, share: dict[str, float], most: int) -> None:
        self._make = ray.remote(
            num_cpus=share["CPU"], num_gpus=share["GPU"], max_restarts=0, scheduling_strategy="SPREAD"
        )(Seat)
        self._share, self._most, self._attempts = share, most, 1
        self._run: Callable[..., Any] | None = None
        self._words: Sequence[Any] = ()
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, T, int]] = {}
        self._waiting: deque[tuple[T, int]] = deque()
        self._failed = 0

    def begin(self, run: Callable[..., Any], words: Sequence[Any], attempts: int) -> Actors[T]:
        """For the next map; as of `Tasks`."""
        self._run, self._words, self._attempts, self._failed = run, words, attempts, 0
        return self

    def give(self, item: T) -> None:
        self._waiting.append((item, 1))
        self._assign()

    def busy(self) -> int:
        return len(self._waiting) + len(self._running)

    def next(self) -> tuple[T, Any]:
        while True:
            self._assign()
            done = first_done([*self._running, *self._starting], self._share)
            lost = _lost(done)
            if done in self._starting:
                actor = self._starting.pop(done)
                if not lost:
                    self._idle.append(actor)
                    self._failed = 0
                    continue
                self._failed += 1
                if self._failed >= self._attempts and self._waiting and not self._running:
                    return self._waiting.popleft()[0], done
                continue
            actor, item, attempt = self._running.pop(done)
            if not lost:
                self._idle.append(actor)
                return item, done
            ray.kill(actor)
            if attempt >= self._attempts:
                return item, done
            self._waiting.appendleft((item, attempt + 1))

    def close(self) -> None:
        for actor, _, _ in self._running.values():
            ray.kill(actor)
        self._running.clear()
        self._waiting.clear()

    def end(self) -> None:
        """End all processes and give their shares back."""
        self.close()
        for actor in (*self._idle, *self._starting.values()):
            ray.kill(actor)
        self._idle.clear()
        self._starting.clear()

    def _assign(self) -> None:
        while self._waiting and self._idle:
            actor, (item, attempt) = self._idle.pop(), self._waiting.popleft()
            self._running[actor.do.remote(self._run, *self._words, item)] = actor, item, attempt
        while len(self._starting) < min(len(self._waiting), self._most - len(self._running)):
            actor = self._make.remote()
            self._starting[actor.ready.remote()] = actor


def _lost(reference: Any) -> bool:
    """Whether the process died; an error that was raised in it does not count."""
    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError:
        return False
    except ray.exceptions.RayError:
        return True
    return False


def first_done(references: list[Any], share: dict[str, float]) -> Any:
    """Wait for one of them, and say so where it takes long: ever less often, unless no machine has room."""
    waited, pause = 0.0, SILENT_SECONDS
    while True:
        done, _ = ray.wait(references, num_returns=1, timeout=pause)
        if done:
            return done[0]
        waited += pause
        if nodes.places(share):
            pause = waited
            log.info(
                "Nothing for %d s: %d items are being worked on, or wait for a process that is being started",
                waited,
                len(references),
            )
        else:
            pause = SILENT_SECONDS
            log.warning(
                "Nothing for %d s: no machine of the cluster has %g CPUs and %g GPUs. It waits for one; Ctrl-C ends "
                "the command, and the same command goes on with what is finished.",
                waited,
                share["CPU"],
                share["GPU"],
            )
