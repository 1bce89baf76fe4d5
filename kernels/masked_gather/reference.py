"""The meaning of masked_gather, in PyTorch."""

from __future__ import annotations

import torch


def masked_gather(x: torch.Tensor, index: torch.Tensor, positions: torch.Tensor | None, period: int) -> torch.Tensor:
    """x[index] (+ positions[index % period], added before rounding to x's dtype): (T, D)."""
    rows = x.index_select(0, index)
    if positions is None:
        return rows
    return (rows + positions.index_select(0, index % period)).to(x.dtype)
