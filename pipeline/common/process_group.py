"""One process's view of a training group: alone, or in a torch.distributed group that `cluster.train` starts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
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


class Distributed:
    """This process's place in an initialised `torch.distributed` group: gradients by DistributedDataParallel."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        # NCCL only moves tensors that are on the GPU.
        self._device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")

    def wrap(self, model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        return model.no_sync()

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.to(self._device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)
