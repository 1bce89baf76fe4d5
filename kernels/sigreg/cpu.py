"""The registered ops in PyTorch on a CPU: a knot at a time, each angle from the last one by a rotation."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def _rotations(x: torch.Tensor, step: float, points: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """cos(j step x) and sin(j step x) for j = 0 to points - 1, in memory that the next pair overwrites."""
    turn = x * step
    by_cos, by_sin = turn.cos(), turn.sin()
    cos, sin = torch.ones_like(x), torch.zeros_like(x)
    for j in range(points):
        if j:
            cos, sin = cos * by_cos - sin * by_sin, sin * by_cos + cos * by_sin
        yield cos, sin


def sigreg_sums(x: torch.Tensor, step: float, points: int) -> torch.Tensor:
    """x (V, N, K) fp32 or fp64 -> (2, T, V, K): sums over the samples of cos(j step x) and sin(j step x)."""
    sums = x.new_empty(2, points, x.shape[0], x.shape[2])
    for j, pair in enumerate(_rotations(x, step, points)):
        for part, values in enumerate(pair):
            torch.sum(values, 1, out=sums[part, j])
    return sums


def sigreg_bwd(x: torch.Tensor, factors: torch.Tensor, step: float) -> torch.Tensor:
    """x (V, N, K), factors (2, T, V, K) -> (V, N, K): sum over j of factors times cos(j step x) and sin(j step x)."""
    gradient = torch.zeros_like(x)
    for j, pair in enumerate(_rotations(x, step, factors.shape[1])):
        for part, values in enumerate(pair):
            gradient.addcmul_(values, factors[part, j][:, None])
    return gradient
