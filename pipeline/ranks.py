"""One process's view of a training group; the group of one. Ray's group is in `cluster.train`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn


class Ranks(Protocol):
    """What training needs to know of the other processes."""

    rank: int
    world_size: int

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over all ranks."""
        ...

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Context in which backward passes of the wrapped model only accumulate."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, the same on each."""
        ...


class Alone:
    """Training in this process only."""

    rank = 0
    world_size = 1

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor
