"""The registered ops in PyTorch on a CPU."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.masked_gather.reference import masked_gather as masked_gather_fwd

__all__ = ["masked_gather_bwd", "masked_gather_fwd"]


def masked_gather_bwd(
    dy: torch.Tensor, index: torch.Tensor, rows: int, unique: bool, dtype: torch.dtype
) -> torch.Tensor:
    """Sum of the rows of dy (T, D) by `index` (T,) -> (rows, D) of `dtype`."""
    total = dy.new_zeros(rows, dy.shape[1], dtype=torch.float32)
    return total.index_add_(0, index, dy.float()).to(dtype)
