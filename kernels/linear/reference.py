"""The meaning of linear and linear_gelu, in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x weight^T + bias: (T, I) -> (T, O)."""
    return F.linear(x, weight, bias)


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x weight^T + bias), the exact form: (T, I) -> (T, O)."""
    return F.gelu(F.linear(x, weight, bias))
