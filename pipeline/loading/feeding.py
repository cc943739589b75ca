"""Batches on their way to where they are used: read ahead on threads and, for a CUDA device, sent beside the computing.

    reader      reads into page-locked memory, copies from it on a stream of its own, marks the end of the copies
    consumer    has its stream wait for that mark, makes the batch and computes; asks for the next
    feed        marks what was asked of the device with the batch; the consumer is kept two such marks ahead at most

Page-locked memory is used again when the copies from it are done, memory of the device when what was computed with it
is. Nobody waits for the device on the host, except a consumer that is further ahead of it than that. What is sent is
each photo once, as it is stored: decoding it, gathering the batch and its masks are the device's.

Other devices have no part in this: there a batch is made by the reader and handed over.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pipeline.common.runner import read_ahead
from pipeline.loading.source import FeatureSource, pin, readers

UNFINISHED = 2
"""Batches whose computing the device may have before it when the next is taken. What they hold cannot be used again."""

T = TypeVar("T")
B = TypeVar("B", covariant=True)
R = TypeVar("R")


class Readable(Protocol[B]):
    """What is read for a batch, such as `pipeline.loading.batch.BatchParts`."""

    def moved(self, move: Callable[[Tensor], Tensor], /) -> Readable[B]:
        """The same with what `move` makes of each tensor."""
        ...

    def made(self) -> B:
        """The batch, where the tensors are."""
        ...


class Mark(Protocol):
    """A point in the work of a stream, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether it is reached."""
        ...

    def synchronize(self) -> None:
        """Wait on the host until it is reached."""
        ...


class Lane(Protocol):
    """What feeding needs of a device that works by itself. `CopyStream` is the real one."""

    def begin(self) -> None:
        """Have the thread that calls work for the device."""
        ...

    def copying(self) -> AbstractContextManager[Any]:
        """Inside the block this thread's work for the device goes on the lane's own stream."""
        ...

    def stage(self, tensor: Tensor) -> Tensor:
        """The tensor in page-locked memory; what is there, or on the device, stays as it is."""
        ...

    def send(self, staged: Tensor) -> Tensor:
        """Its copy on the device, which is complete when the stream has come so far."""
        ...

    def mark(self) -> Mark:
        """Mark the end of what this thread's stream was given until now."""
        ...

    def wait_for(self, mark: Mark) -> None:
        """Have this thread's stream wait for a mark of another; the host goes on."""
        ...

    def use(self, tensor: Tensor) -> None:
        """This thread's stream will read a tensor of another: its memory must not be given away before that."""
        ...


class CopyStream:
    """A stream of a CUDA device beside the one that the calling thread computes on."""

    def __init__(self, device: torch.device) -> None:
        # With its number: "cuda" alone means GPU 0 on a new thread.
        number = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", number)
        self.stream = torch.cuda.Stream(self.device)
        # Images kept on the device, and a network there, were written by the thread's own stream.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def begin(self) -> None:
        # Page-locked memory belongs to the current device's context, which would be made anew on GPU 0.
        torch.cuda.set_device(self.device)

    def copying(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)

    def stage(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory()

    def send(self, staged: Tensor) -> Tensor:
        return staged.to(self.device, non_blocking=True)

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self.device).record_event()

    def wait_for(self, mark: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def use(self, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(self.device))


def lane_of(device: str | torch.device) -> Lane | None:
    """The lane to a device; None where there is no stream to copy on."""
    device = torch.device(device)
    return CopyStream(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class _Parcel(Generic[B]):
    """A batch on its way."""

    reading: Readable[B]
    tensors: list[Tensor]
    copied: Mark


class Feed(Generic[T, R], Iterator[tuple[T, R]]):
    """(item, batch) in order; see `feed`. Close it if it is not taken to its end."""

    waited: float = 0.0
    """Seconds that the consumer waited for the last batch to be read; not those it waited for the device."""

    def __init__(
        self,
        read: Callable[[T, bool], Readable[R]],
        items: Iterable[T],
        lane: Lane | None,
        depth: int,
        threads: int,
    ) -> None:
        self._read = read
        self._behind = 0.0
        self._held: list[tuple[Mark, list[Tensor]]] = []
        self._lock = threading.Lock()
        self._batches: Generator[tuple[T, R], None, None]
        if lane is None:
            self._batches = read_ahead(lambda item: read(item, False).made(), items, depth, "prefetch", threads)
        else:
            self._batches = self._sent(lane, items, depth, threads)

    def __next__(self) -> tuple[T, R]:
        before, self._behind = time.perf_counter(), 0.0
        taken = next(self._batches)
        self.waited = time.perf_counter() - before - self._behind
        return taken

    def close(self) -> None:
        """Stop reading."""
        self._batches.close()

    def _sent(self, lane: Lane, items: Iterable[T], depth: int, threads: int) -> Generator[tuple[T, R], None, None]:
        used: deque[Mark] = deque()
        try:
            with closing(
                read_ahead(partial(self._send, lane), items, depth, "prefetch", threads, lane.begin)
            ) as parcels:
                for item, parcel in parcels:
                    yield item, _opened(lane, parcel)
                    del parcel  # the batch in use is the consumer's
                    used.append(lane.mark())
                    if len(used) > UNFINISHED:
                        before = time.perf_counter()
                        used.popleft().synchronize()
                        self._behind += time.perf_counter() - before
        finally:
            for copied, _ in self._held:
                copied.synchronize()
            self._held.clear()

    def _send(self, lane: Lane, item: T) -> _Parcel[R]:
        """Read a batch and have it copied."""
        with self._lock:
            self._held = [(copied, staged) for copied, staged in self._held if not copied.query()]
        staged, sent = [], []

        def move(tensor: Tensor) -> Tensor:
            staged.append(lane.stage(tensor))
            sent.append(lane.send(staged[-1]))
            return sent[-1]

        with lane.copying():
            reading = self._read(item, True).moved(move)
            copied = lane.mark()
        with self._lock:
            self._held.append((copied, staged))  # what is referred to is not read into
        return _Parcel(reading, sent, copied)


def _opened(lane: Lane, parcel: _Parcel[R]) -> R:
    """The batch, for the stream of the calling thread."""
    lane.wait_for(parcel.copied)
    for tensor in parcel.tensors:
        lane.use(tensor)
    return parcel.reading.made()


def feed(
    source: FeatureSource,
    read: Callable[..., Readable[R]],
    items: Iterable[T],
    device: str | torch.device = "cpu",
    depth: int = 2,
) -> Feed[T, R]:
    """Batches of a source for a device, read ahead.

    Args:
        read: called with the source, an item and `once`, as `pipeline.loading.batch.read_batch`.
        items: what is read for each batch; advanced on the calling thread.
        device: where batches are used. On a CUDA device they come there; on others they stay where they are read, and
            `EpisodeBatch.to` brings them.
        depth: batches read ahead of the one in use, and sent where they are sent; 0 reads each when it is asked for.

    An error is raised at the item it belongs to. A store is read by several threads (`readers`), and for a CUDA device
    into page-locked memory; without one no memory is locked.
    """
    lane = lane_of(device)
    if lane is not None:
        pin(source)
    return Feed(lambda item, once: read(source, item, once=once), items, lane, depth, readers(source))
