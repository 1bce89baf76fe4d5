"""Statistics of a batch that lies on several ranks, with gradient.

Every rank is to compute one and the same loss of what comes out. Its gradient here is then that of the sum of all
ranks' losses, and their average over ranks, which the engine takes, is the gradient of the one loss.
"""

from __future__ import annotations

from typing import Any

import torch


def ranks() -> int:
    """How many ranks train."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def summed(x: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' `x`."""
    return x if ranks() == 1 else _Summed.apply(x)


def gathered(x: torch.Tensor) -> torch.Tensor:
    """All ranks' rows `x` (n, ...), as many on each -> (ranks * n, ...), in the order of the ranks."""
    return x if ranks() == 1 else _Gathered.apply(x)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        return _Summed.forward(ctx, upstream)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks())]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        return _Summed.forward(ctx, upstream).chunk(ranks())[torch.distributed.get_rank()]
