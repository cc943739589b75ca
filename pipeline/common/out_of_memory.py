"""A lack of memory, told as what to ask for less of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hsnet.errors import DeviceMemoryError


def lacked_memory(error: BaseException) -> bool:
    """Whether an error says that a device or this machine had no more memory to give."""
    known = (MemoryError, torch.OutOfMemoryError, DeviceMemoryError)
    return isinstance(error, known) or "can't allocate memory" in str(error)


@contextmanager
def memory_told(less: str, kept: str) -> Iterator[None]:
    """Turn a lack of memory inside the block into an error that says what to do.

    Args:
        less: which options take less memory, a whole sentence.
        kept: what was not lost, a whole sentence.

    Raises:
        DeviceMemoryError: instead of what torch raised.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacked_memory(error):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DeviceMemoryError(f"Out of memory ({first}). {less} {kept}") from error
