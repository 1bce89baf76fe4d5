"""The meaning of layer_norm, in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LN(x), or (LN(s), s) with s = x + residual; (T, D)."""
    total = x if residual is None else x + residual
    y = F.layer_norm(total, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return y if residual is None else (y, total)
