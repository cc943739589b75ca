"""Arrays whose memory is used again once nothing refers to it.

The system clears the pages of fresh memory when they are first touched, which takes as long as reading a warm chunk
into them. A batch of features is tens to hundreds of megabytes, and the C library gives such blocks back at once.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

KEEP_BYTES = 2 << 30
"""Free memory that is kept, at most."""

_SMALLEST = 1 << 20
"""The C library keeps blocks below this by itself."""


class Buffers:
    """Gives out arrays of uninitialised memory. Safe in several threads.

    Args:
        keep_bytes: free memory that is kept, at most.
        fresh: makes a block of so many bytes, (n,) uint8; by default ordinary memory.

    Memory comes back when the array, every view of it and every tensor that shares it are gone: nothing has to be
    returned, and nothing that is still in use is overwritten.
    """

    def __init__(
        self,
        keep_bytes: int = KEEP_BYTES,
        fresh: Callable[[int], NDArray[np.uint8]] = lambda nbytes: np.empty(nbytes, np.uint8),
    ) -> None:
        self._keep_bytes = keep_bytes
        self._fresh = fresh
        self._free: list[NDArray[np.uint8]] = []
        self._returned: deque[NDArray[np.uint8]] = deque()
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """As `numpy.empty`."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if nbytes < _SMALLEST:
            return np.empty(shape, dtype)
        memory = self._take(nbytes)
        # Over its memoryview, not over `memory` itself: views refer to the last array of a chain of views, which is
        # then this one, so that it lives as long as any of them.
        array = np.frombuffer(memory.data, np.uint8)
        # Runs wherever the last reference goes, even inside of our own lock: it must not wait.
        weakref.finalize(array, self._returned.append, memory).atexit = False
        return array[:nbytes].view(dtype).reshape(shape)

    def _take(self, nbytes: int) -> NDArray[np.uint8]:
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            fitting = [slot for slot, memory in enumerate(self._free) if nbytes <= memory.nbytes <= 2 * nbytes]
            if fitting:
                return self._free.pop(min(fitting, key=lambda slot: self._free[slot].nbytes))
            while self._free and sum(memory.nbytes for memory in self._free) > self._keep_bytes:
                self._free.pop(0)  # the longest unused
        return self._fresh(nbytes)
