"""What the losses need of other ranks. In a process of its own each function is the identity."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

around_exchange: Callable[[], AbstractContextManager[object]] = nullcontext
"""Entered around each exchange, where somebody times them."""


def world_size() -> int:
    """Return the number of ranks, 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank, 0 outside a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def total(x: Tensor) -> Tensor:
    """Return the sum of a constant over ranks."""
    x = x.detach().clone()
    if world_size() > 1:
        with around_exchange():
            dist.all_reduce(x)
    return x


class _Gather(torch.autograd.Function):
    """All-gather whose gradient is summed over the ranks: each of them has used these rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        parts = [torch.empty_like(x) for _ in range(world_size())]
        with around_exchange():
            dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        (gradient,) = gradients
        return total(gradient.contiguous()).chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """Return the rows `(row, ...)` of all ranks in their order, `(rank * row, ...)`.

    The gradient comes back from every rank. Each rank has as many rows, and divides its loss by a
    count over all of them (`global_mean`): then DDP's mean of the gradients is that of one process.
    """
    if world_size() == 1:
        return x
    rows: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return rows


def global_mean(values: Tensor, held: Tensor) -> Tensor:
    """Return the mean of `values` where `held` (same shape, bool) over the rows of all ranks.

    To be exact: this rank's share of it times the number of ranks, so that the mean over ranks of
    both the value and its gradient are those of one process, however unequal the ranks' counts.
    Zero, with a gradient of zero, where nobody holds anything.
    """
    count = total(held.sum()).clamp_min(1)
    return torch.where(held, values, 0).sum() * world_size() / count
