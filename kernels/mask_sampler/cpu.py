"""The registered ops in NumPy, where csrc is not built."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ijepa_fast.kernels.mask_sampler import reference
from ijepa_fast.kernels.mask_sampler.reference import Key


def sample_blocks_(
    context: torch.Tensor,
    target: torch.Tensor,
    seed: int,
    step: int,
    rank: int,
    grid: Sequence[int],
    target_size: Sequence[int],
    context_size: Sequence[int],
    min_keep: int,
    skip_last: bool,
) -> None:
    """Fill context (C, B, N) bool and target (M, B, K) int32; see ops.sample_blocks."""
    drawn = reference.sample_blocks(
        Key(seed, step, rank),
        context.shape[1],
        tuple(grid),
        target.shape[0],
        tuple(target_size),
        context.shape[0],
        tuple(context_size),
        min_keep,
        skip_last,
    )
    for out, values in zip((context, target), drawn):
        out.copy_(torch.from_numpy(values))


def random_subset_(
    subset: torch.Tensor, kept: torch.Tensor, count: torch.Tensor, seed: int, step: int, rank: int, draw: int
) -> None:
    """Fill subset (B, N) bool; see ops.random_subset."""
    subset.copy_(torch.from_numpy(reference.random_subset(Key(seed, step, rank), kept.numpy(), count.numpy(), draw)))
