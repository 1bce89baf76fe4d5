"""The registered ops in NumPy, where csrc is not built."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.mask_sampler import reference
from ijepa_fast.kernels.mask_sampler.reference import Key, Size


def sample_blocks_(
    context: torch.Tensor,
    target: torch.Tensor,
    seed: int,
    step: int,
    first: int,
    grid: Size,
    target_size: Size,
    context_size: Size,
    min_keep: int,
    skip_last: bool,
) -> None:
    """Fill context (C, B, N) bool and target (M, B, K) int32; see ops.sample_blocks."""
    drawn = reference.sample_blocks(
        Key(seed, step, first),
        context.shape[1],
        (grid[0], grid[1]),  # the dispatcher makes lists of them
        target.shape[0],
        (target_size[0], target_size[1]),
        context.shape[0],
        (context_size[0], context_size[1]),
        min_keep,
        skip_last,
    )
    for out, values in zip((context, target), drawn):
        out.copy_(torch.from_numpy(values))


def random_subset_(
    subset: torch.Tensor, kept: torch.Tensor, count: torch.Tensor, seed: int, step: int, first: int, draw: int
) -> None:
    """Fill subset (B, N) bool; see ops.random_subset."""
    subset.copy_(torch.from_numpy(reference.random_subset(Key(seed, step, first), kept.numpy(), count.numpy(), draw)))
